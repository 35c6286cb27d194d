"""A model's files, and what its tokenizer makes of a text; a first reading can skip it."""
import copy
import functools
import hashlib
import json
import os
import re
import shutil
import textwrap

import transformers
from safetensors import safe_open
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from lib import UserError

TINY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "tiny", "base")
FAMILIES = ("qwen2", "qwen3", "llama", "gemma", "gemma3_text")  # config.model_type
OWN_TOKENIZER = ("TokenizersBackend", "PreTrainedTokenizerFast")


def is_small(model):
    """Whether a model needs the settings of one trained from scratch, or else the released ones."""
    return sum(p.numel() for p in model.parameters()) < 50e6


# ============================================================ a model's files
def read_checkpoint(name_or_path, dtype):
    """-> (causal LM on the CPU, tokenizer, weights of its projector, {} if it has none). For the arguments
    see litereason.load. Raises UserError, in one line, if there is no such model, it cannot be fetched, or
    its files do not fit together."""
    path = checkpoint_path(name_or_path)
    is_local = os.path.isdir(path)
    transformers.logging.set_verbosity_error()  # to it the projector's keys are unexpected
    if is_local:  # else gigabytes may come
        transformers.logging.disable_progress_bar()
    try:
        return _read_files(path, dtype, local_files_only=is_local, trust_remote_code=False)
    except Exception as e:  # a damaged file comes out of transformers as nearly any of them
        why = textwrap.shorten(str(e), 300, placeholder=" ..") or type(e).__name__
        if not is_local:
            why += " (if gated, accept its terms there, then `hf auth login`)"
        where = f"the model in {path!r}" if is_local else f"{path!r} from the hub"
        raise UserError(f"cannot load {where}: {why}") from e
    finally:
        transformers.logging.enable_progress_bar()


def checkpoint_path(name_or_path):
    """The directory, or the hub id, that a name means."""
    path = TINY if name_or_path == "tiny" else str(name_or_path)
    if os.path.exists(os.path.join(path, "model", "config.json")):
        path = os.path.join(path, "model")  # a run's output directory
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and not os.path.exists(path)
    if not is_hub_name and not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"no model directory at {path!r} (a directory with config.json and *.safetensors; if "
                        "a save was killed, the former one is beside it, as *.replaced)")
    return f"Qwen/{path}" if is_hub_name and re.match("Qwen[^/]*$", path) else path


def _read_files(path, dtype, **only):
    tokenizer = _read_tokenizer(path, only)
    weights = _read_projector(path, only["local_files_only"])
    config = transformers.AutoConfig.from_pretrained(path, **only)
    # Whatever it says: attention code may be fetched from the hub by name.
    config._attn_implementation = "sdpa"
    model, keys = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True,
                                                       output_loading_info=True, **only)
    unexpected = [key for key in keys["unexpected_keys"] if key.startswith("model.layers.")]
    odd = sorted(keys["missing_keys"]) + sorted(unexpected)
    if odd:  # transformers would continue, with random weights for what is missing
        raise ValueError(f"its weights and its config.json do not fit: {odd[0]}")
    # Where its files are missing, transformers makes a tokenizer of special tokens alone.
    if not 20 <= len(tokenizer) <= model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    return model, tokenizer, weights


def _read_tokenizer(path, only):
    """AutoTokenizer, but a checkpoint that says it brings its own tokenizer.json gets that one: of a Qwen2
    transformers 5 would replace it by Qwen's own class, whatever the checkpoint says."""
    config = os.path.join(path, "tokenizer_config.json")
    named = OWN_TOKENIZER[0]
    if os.path.exists(config):
        with open(config) as f:
            named = json.load(f).get("tokenizer_class")
    is_its_own = named in OWN_TOKENIZER and os.path.exists(os.path.join(path, "tokenizer.json"))
    reader = transformers.PreTrainedTokenizerFast if is_its_own else AutoTokenizer
    return reader.from_pretrained(path, **only)


def _read_projector(path, is_local):
    """{"i.gate_proj.weight": tensor} from a checkpoint's safetensors files; {} if it has none."""
    fetch = functools.partial(transformers.utils.cached_file, path, local_files_only=is_local,
                              _raise_exceptions_for_missing_entries=False)
    names = ["model.safetensors"]  # as in transformers first; an index beside it is an old one
    index = None if fetch(names[0]) else fetch("model.safetensors.index.json")
    if index:
        with open(index) as f:
            names = sorted(set(json.load(f)["weight_map"].values()))
    # Others would be unpickled by transformers.
    files = [fetch(name) if name.endswith(".safetensors") else None for name in names]
    if None in files:
        raise ValueError("its weights are not in safetensors files, the only kind that is read")
    weights, prefix = {}, "reasoning_projector."
    for file in files:
        with safe_open(file, "pt") as f:
            weights |= {key[len(prefix) :]: f.get_tensor(key) for key in f.keys() if key.startswith(prefix)}
    return weights


def check_model(model, cap, layers):
    """UserError unless LiteReason works with this causal LM -> (cap on N, projector layers): what its
    config.json says, else these defaults."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise UserError(f"config.json: {type(model).__name__} is none of the families that are known to "
                        f"decode here as in transformers: {', '.join(FAMILIES)}")
    rope = f"{getattr(config, 'rope_parameters', None)} {getattr(config, 'rope_scaling', None)}"
    if "longrope" in rope or "'dynamic'" in rope:
        raise UserError("config.json: rope_type longrope or dynamic makes a row depend on the longest beside "
                        "it: that is not supported here")
    for name in ("use_bidirectional_attention", "final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None):
            raise UserError(f"config.json: {name} is set, which is not supported")
    cap = getattr(config, "litereason_max_reasoning_steps", cap)
    layers = getattr(config, "litereason_num_reasoning_layers", layers)
    for name, value in (("litereason_max_reasoning_steps", cap), ("litereason_num_reasoning_layers", layers)):
        if type(value) is not int or not 1 <= value <= 64:
            raise UserError(f"config.json: {name} is {value!r}, expected a whole number from 1 to 64")
    return cap, layers


def fingerprint(model):
    """16 digits that change with the base's weights, of which some of each tensor are read."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if "reasoning_projector" not in name:
            sample = weight.detach().flatten()[:: max(1, weight.numel() // 256)]
            digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(model, tokenizer, path):
    """An ordinary checkpoint directory (safetensors), written beside and then renamed: killed at any moment,
    this leaves a complete one at `path` or at PATH.replaced."""
    model.config.litereason_projector_trained = getattr(model, "projector_trained", True)
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer)  # so others stop where we do
    path = os.path.abspath(path)
    new, old = f"{path}.writing", f"{path}.replaced"
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    except Exception as e:  # of a full disk an OSError, a SafetensorError or a plain Exception
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"cannot write {path}: {e}") from e
    if os.path.exists(path):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(new, path)
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
    """The text of every vocabulary entry as it reads inside a text (leading spaces kept), V strings."""
    anchor = (tokenizer.encode("a", add_special_tokens=False) or [0])[-1:]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    pairs = [anchor + [i] for i in range(len(tokenizer))]
    texts = tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
    return [text[len(before):] if text.startswith(before) else text for text in texts]


def end_of_answer(model, tokenizer):
    """The id that ends an answer."""
    end = chat_parts(model, tokenizer)[2]
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

    A chat model is one that stops where its template ends a turn: Qwen2.5-Instruct (at <|im_end|>), and not
    Qwen2.5, a base model that ships the same template but stops at <|endoftext|> only."""
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
        raise UserError(f"the tokenizer's chat template does not work for a user and an assistant turn: "
                        f"{str(e).splitlines()[0]}") from e
    places = {tail.find(str(tokenizer.convert_ids_to_tokens(i))): i for i in stop_tokens(model, tokenizer)}
    places.pop(-1, None)
    return (before, after, places[min(places)]) if places else ("", "", tokenizer.eos_token_id)


def encode_prompt(model, tokenizer, text, opening=""):
    """A prompt as token ids: one user turn and the answer's header for a chat model, the text alone for a
    base model. opening: the answer's first words, put into the model's mouth. A story is data: "<|im_end|>"
    in it becomes the tokens of those ten characters. Else the ids are those of the whole text at once."""
    before, after, _ = chat_parts(model, tokenizer)
    if not after:
        return encode_text(tokenizer, f"{text} {opening}" if opening else text, begins=True)
    # BPE may merge neighbours, but not across a special token: the text is cut there, and only there.
    special = "|".join(re.escape(token.content) for token in tokenizer.added_tokens_decoder.values())
    head = re.match(f"(.*({special}))?", before, re.DOTALL)[0]  # to the last one
    tail = re.search(f"({special}).*|$", after, re.DOTALL)[0]  # from the first one
    encode = functools.partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=False)
    middle = before.removeprefix(head) + text + after.removesuffix(tail)
    return encode(head) + encode_text(tokenizer, middle) + encode(tail + opening)


def check_lengths(model, prompts, max_new_tokens):
    """UserError unless every prompt (token ids) and its answer fit the model's positions."""
    limit = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty")
        if len(prompt) + max_new_tokens > limit:
            raise UserError(f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                            f"more than the model's {limit} positions: lower --max-new-tokens")
