"""A model's files, from a directory or the hub, and what its tokenizer makes of a text; a first reading can skip it.
"""
import copy
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import textwrap
import urllib.parse
import urllib.request

import transformers
from safetensors import safe_open
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from lib import UserError

TINY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "tiny", "base")


# ============================================================ a model's files
# Slots per answer, latents included, where no flag says another number: of a small model, and as released.
SLOTS_SMALL, SLOTS_RELEASED = 240, 2048


def is_small(model):
    """Whether a model needs the settings of one trained from scratch (and, by default, the tiny world) or the
    released ones."""
    return sum(p.numel() for p in model.parameters()) < 50e6


def slots_per_answer(model):
    return SLOTS_SMALL if is_small(model) else SLOTS_RELEASED


def read_checkpoint(name_or_path, dtype):
    """-> (causal LM on the CPU, tokenizer, weights of its projector, {} if it has none). For the arguments
    see litereason.load.

    Raises UserError, in one line, if there is no such model, it cannot be fetched, or its files do not fit
    together."""
    path = checkpoint_path(name_or_path)
    is_local = os.path.isdir(path)
    # Without a network fail now, not after minutes of retries. No code of the checkpoint's own.
    only = {"local_files_only": is_local or not hub_answers(), "trust_remote_code": False}
    verbosity = transformers.logging.get_verbosity()
    if is_local:
        transformers.logging.disable_progress_bar()
    else:
        transformers.logging.enable_progress_bar()  # gigabytes may come
    # The projector's keys are "unexpected" to transformers; we read them below.
    transformers.logging.set_verbosity_error()
    try:
        return _read_files(path, dtype, only)
    except Exception as e:  # a damaged file comes out of transformers as nearly any of them
        raise UserError(_why_not(path, is_local, e)) from e
    finally:
        transformers.logging.set_verbosity(verbosity)


def _why_not(path, is_local, error):
    """What went wrong with a checkpoint, and what to do, in one line."""
    why = textwrap.shorten(str(error), 200, placeholder=" ..") or type(error).__name__
    if is_local:
        return f"cannot load the model in {path!r}: {why}"
    refused = why_the_hub_refuses(path, "model", error)
    if refused:
        return refused
    if "have a file named model.safetensors" in why:
        return (f"{path!r} has no weights in safetensors files, the only kind that is read: look for a copy "
                f"of the model that has them")
    return (f"cannot fetch {path!r} from the hub ({why}). Without a network these work: 'tiny', or a "
            f"directory; where there is one: `hf download {path} --local-dir DIR`, then pass DIR")


def why_the_hub_refuses(name, what, error):
    """In one line, and what to do, if a repository is gated, private or not there; else None.
    what: "model" or "data set"."""
    kinds = set()  # of this error and of those that led to it
    texts = str(error)
    while error is not None:
        kinds.add(type(error).__name__)
        error = error.__cause__ or error.__context__
    is_missing = "RepositoryNotFoundError" in kinds  # whose text speaks of gates, too
    if "GatedRepoError" in kinds or ("gated repo" in texts and not is_missing):
        page = name if what == "model" else f"datasets/{name}"
        return (f"{name!r} is gated on the hub: accept its terms on https://huggingface.co/{page}, then "
                f"`hf auth login` (or set HF_TOKEN)")
    if is_missing:
        return (f"there is no {what} {name!r} on the hub, or it is private: check the name, or `hf auth "
                f"login` (or set HF_TOKEN)")
    return None


def checkpoint_path(name_or_path):
    """The directory, or the hub id, that a name means."""
    path = TINY if name_or_path == "tiny" else str(name_or_path)
    if os.path.exists(os.path.join(path, "model", "config.json")):
        path = os.path.join(path, "model")  # a run's output directory
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise UserError(f"{path!r} has no config.json: it is not a saved model")
        return path
    if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"no model directory at {path!r} (a directory with config.json and *.safetensors)")
    return f"Qwen/{path}" if "/" not in path and path.startswith("Qwen") else path


def _read_files(path, dtype, only):
    tokenizer = _read_tokenizer(path, **only)
    generation = os.path.join(path, "generation_config.json")
    if os.path.exists(generation):  # transformers leaves out one that cannot be read, with its stop ids
        with open(generation) as f:
            json.load(f)
    weights = _read_projector(path, local_files_only=only["local_files_only"])
    config = transformers.AutoConfig.from_pretrained(path, **only)
    # Whatever it says: attention code may be fetched from the hub by name.
    config._attn_implementation = "sdpa"
    model, keys = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True,
                                                       output_loading_info=True, **only)
    unexpected = [key for key in keys["unexpected_keys"] if key.startswith("model.layers.")]
    odd = sorted(keys["missing_keys"]) + sorted(unexpected)
    if odd:  # transformers would continue, with random weights for what is missing
        raise ValueError(f"its weights and its config.json do not fit: {odd[0]}")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    return model, tokenizer, weights


def _read_tokenizer(path, **only):
    """AutoTokenizer, but a checkpoint that says it brings its own tokenizer.json gets that one: of a Qwen2
    transformers 5 would replace it by Qwen's own class, whatever the checkpoint says."""
    try:
        with open(os.path.join(path, "tokenizer_config.json")) as f:
            own = json.load(f).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    except FileNotFoundError:
        own = os.path.exists(os.path.join(path, "tokenizer.json"))
    except (OSError, ValueError):
        own = False
    reader = transformers.PreTrainedTokenizerFast if own else AutoTokenizer
    tokenizer = reader.from_pretrained(path, **only)
    if len(tokenizer) < 20:  # transformers makes one of special tokens alone where the files are missing
        raise ValueError(f"its tokenizer has {len(tokenizer)} entries: is tokenizer.json missing?")
    return tokenizer


def _read_projector(path, local_files_only):
    """{"i.gate_proj.weight": tensor} from a checkpoint's safetensors files; {} if it has none."""
    fetch = functools.partial(transformers.utils.cached_file, path, local_files_only=local_files_only)
    names = ["model.safetensors"]  # as in transformers first; an index beside it is an old one
    index = None
    if not fetch(names[0], _raise_exceptions_for_missing_entries=False):
        index = fetch("model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        with open(index) as f:
            names = sorted(set(json.load(f)["weight_map"].values()))
    if not all(name.endswith(".safetensors") for name in names):  # transformers would unpickle it
        raise ValueError(f"model.safetensors.index.json names {names}, not only safetensors files")
    weights, prefix = {}, "reasoning_projector."
    for file in [fetch(name) for name in names]:
        with safe_open(file, "pt") as f:
            for key in f.keys():
                if key.startswith(prefix):
                    weights[key[len(prefix):]] = f.get_tensor(key)
    return weights


FAMILIES = ("qwen2", "qwen3", "llama", "gemma", "gemma3_text")  # config.model_type


def check_model(model, cap, layers):
    """UserError unless LiteReason works with this causal LM -> (cap on N, projector layers): what its
    config.json says, else these defaults."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise UserError(f"{type(model).__name__} is none of the families that are known to decode here as in "
                        f"transformers: {', '.join(FAMILIES)} (tests/test_families.py tries one)")
    if len(model.model.layers) == 0:
        raise UserError("config.json: num_hidden_layers is 0")
    rope = f"{getattr(config, 'rope_parameters', None)} {getattr(config, 'rope_scaling', None)}"
    if "longrope" in rope or "'dynamic'" in rope:
        raise UserError("config.json: rope_type longrope or dynamic makes a row depend on the longest beside "
                        "it: that is not supported here")
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError("config.json: use_bidirectional_attention is set, and this is a causal LM")
    if any(getattr(config, key, None) for key in ("attn_logit_softcapping", "final_logit_softcapping")):
        raise UserError(f"{type(model).__name__} caps its logits by a tanh (as Gemma 2 does), which "
                        f"LiteReason does not support")
    cap = getattr(config, "litereason_max_reasoning_steps", cap)
    layers = getattr(config, "litereason_num_reasoning_layers", layers)
    for key, value in (("max_reasoning_steps", cap), ("num_reasoning_layers", layers)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
            raise UserError(f"config.json: litereason_{key} is {value!r}, expected a whole number from 1 to "
                            "64")
    rule = getattr(config, "litereason_tag_rule", "text")
    if rule != "text":
        raise UserError(f"config.json: litereason_tag_rule is {rule!r}, but tags fire wherever one is written; "
                        "if this model may be run so, delete the entry")
    return cap, layers


def hub_answers():
    """Whether the model hub, or the proxy on the way to it, can be reached."""
    if any(os.environ.get(key, "0") not in ("", "0") for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return False
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname):
        url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
        return True
    except (OSError, ValueError):  # the second: a port that is no number
        return False


def fingerprint(model):
    """16 digits that change with the weights, of which some of each tensor are read; not with the projector,
    nor with the precision."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "reasoning_projector" not in name:
            sample = weight.detach().flatten()[:: max(1, weight.numel() // 256)]
            digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(model, tokenizer, path):
    """An ordinary checkpoint directory (safetensors); complete or absent, since it is renamed into place at
    the end."""
    if not getattr(model, "projector_trained", True):
        model.config.litereason_projector_trained = False  # else its weights would say that it is
    elif hasattr(model.config, "litereason_projector_trained"):
        del model.config.litereason_projector_trained
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer)  # so others stop where we do
    path = os.path.abspath(path)
    new = f"{path}.writing-{os.getpid()}"
    old = f"{path}.replaced-{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    if os.path.isfile(path):
        raise UserError(f"cannot write {path}: it is a file, not a directory")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for file in os.scandir(new):  # safetensors' own are for their owner alone, whatever the umask says
            if file.is_file():
                shutil.copymode(os.path.join(new, "config.json"), file.path)
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(new, path)
    except BaseException as e:
        # a full disk is an OSError, a SafetensorError or, of a tokenizer, a plain Exception
        shutil.rmtree(new, ignore_errors=True)
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)
        if not isinstance(e, Exception):  # Ctrl-C
            raise
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    shutil.rmtree(old, ignore_errors=True)


# ============================================================ what a checkpoint makes of a text
def stop_ids(model):
    """The ids that end a turn by the checkpoint's two configs, sorted."""
    ids = []
    for own in (model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)):
        ids += own if isinstance(own, list) else [own]
    return sorted(set(ids) - {None})


def stop_tokens(model, tokenizer):
    """Every id that ends a turn: the tokenizer's and the checkpoint's (Qwen has two)."""
    return sorted({tokenizer.eos_token_id, *stop_ids(model)} - {None})


def no_words(model, tokenizer):
    """The ids that are no word, sorted: a matrix may be larger than the vocabulary (Qwen's by 271 rows)."""
    words = {*tokenizer.get_vocab().values(), *stop_tokens(model, tokenizer)}
    return sorted(set(range(model.config.vocab_size)) - words)


def token_texts(tokenizer):
    """The text of every vocabulary entry as it reads inside a text (leading spaces kept): a list of V
    strings."""
    anchor = (tokenizer.encode("a", add_special_tokens=False) or [0])[-1:]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    pairs = [anchor + [i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    return [text[len(before):] if text.startswith(before) else text for text in texts]


def end_of_answer(model, tokenizer):
    """The id that ends an answer."""
    _, _, end = chat_parts(model, tokenizer)
    if end is None:
        raise UserError("neither the checkpoint nor its tokenizer names a token that ends an answer: set "
                        "eos_token_id in its config.json")
    return end


def encode_text(tokenizer, text, begins=False):
    """Token ids of a text or a part of one, all of ordinary text: no control token is recognised in it.

    begins: with what the tokenizer puts before a whole text (Llama's BOS); else nothing is added."""
    return _for_text(tokenizer).encode(text, add_special_tokens=begins, split_special_tokens=True)


@functools.lru_cache(maxsize=4)
def _for_text(tokenizer):
    """The tokenizer that reads texts. transformers' split_special_tokens takes apart what the tokenizer calls
    special; in this copy that is every added token (Qwen's <tool_call> too) but blanks, which are ordinary
    text (Gemma's "\\n\\n")."""
    added = tokenizer.added_tokens_decoder.values()
    control = [token.content for token in added if not token.special and not token.content.isspace()]
    if not control:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in control], special_tokens=True)
    return tokenizer


def chat_parts(model, tokenizer):
    """(before, after, end): the text around the user's words, and the id that ends an answer; ("", "", the
    eos) for a base model.

    A chat model is one that stops where its template ends a turn. So Qwen2.5-Instruct is one (<|im_end|> is
    among its stop tokens), and Qwen2.5, a base model that ships the same template but stops at <|endoftext|>
    only, gets its prompts plain."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "", tokenizer.eos_token_id
    user, said = "THE-USERS-WORDS", "THE-ANSWER"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    # enable_thinking is Qwen3's switch; others ignore it.
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
    try:
        tail = render(turns).rpartition(said)[2]
        before, _, after = render(turns[:1], add_generation_prompt=True).partition(user)
    except Exception as e:  # a template is a program of somebody else's: anything may come
        why = str(e).splitlines()[0]
        raise UserError(f"the tokenizer's chat template does not work for a user and an assistant turn: "
                        f"{why}") from e
    places = {tail.find(str(tokenizer.convert_ids_to_tokens(i))): i for i in stop_tokens(model, tokenizer)}
    places.pop(-1, None)
    return (before, after, places[min(places)]) if places else ("", "", tokenizer.eos_token_id)


def encode_prompt(model, tokenizer, text, opening=""):
    """A prompt as token ids: one user turn and the answer's header for a chat model, the text alone for a
    base model.

    opening: the answer's first words, put into the model's mouth. A story is data: "<|im_end|>" in it becomes
    the tokens of those ten characters; only the template's own words become special tokens. Apart from that
    the ids are those of the whole text at once."""
    before, after, _ = chat_parts(model, tokenizer)
    if not after:
        return encode_text(tokenizer, f"{text} {opening}" if opening else text, begins=True)
    # BPE may merge neighbours, but not across a special token: the text is cut there, and only there.
    special = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values())
    start = max([match.end() for match in re.finditer(special, before)], default=0)
    end = min([match.start() for match in re.finditer(special, after)], default=len(after))
    encode = functools.partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=False)
    return (encode(before[:start]) + encode_text(tokenizer, before[start:] + text + after[:end])
            + encode(after[end:] + opening))


def check_lengths(model, prompts, max_new_tokens):
    """UserError unless every prompt (token ids) and its answer fit the model's positions."""
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty")
        if len(prompt) + max_new_tokens > limit:
            raise UserError(f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                            f"more than the model's {limit} positions: lower --max-new-tokens, or prepare "
                            "shorter texts")
