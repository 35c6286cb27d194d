"""A run on disk and on the command line."""
import argparse
import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import socket
import sys
import urllib.parse
import zlib

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class UserError(Exception):
    """Something the person at the keyboard can put right; scripts print it in one line and exit with code 2."""


TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "tiny", "base")


def hub_answers():
    """Whether the model hub can be reached; a proxy is taken at its word."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or os.environ.get("TRANSFORMERS_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
        return True
    except OSError:
        return False


def _load_tokenizer(path, **kwargs):
    """AutoTokenizer, but a Qwen2 checkpoint that says it brings its own tokenizer.json (the tiny world's words) gets that
    one: transformers 5 would replace it by Qwen's own class, whatever the checkpoint says."""
    try:
        with open(os.path.join(path, "tokenizer_config.json")) as f:
            own = json.load(f).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    except (OSError, ValueError):
        own = False
    return (transformers.PreTrainedTokenizerFast if own else AutoTokenizer).from_pretrained(path, **kwargs)


def _projector_weights(path, **kwargs):
    """{"i.gate_proj.weight": tensor} from a checkpoint's safetensors files; {} if it has none."""
    weights, prefix = {}, "reasoning_projector."
    index = transformers.utils.cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **kwargs)
    names = sorted(set(json.load(open(index))["weight_map"].values())) if index else ["model.safetensors"]
    if not all(n.endswith(".safetensors") for n in names):
        raise ValueError(f"model.safetensors.index.json names {names}, not only safetensors files")  # transformers would unpickle it
    for file in [transformers.utils.cached_file(path, n, **kwargs) for n in names]:
        with safe_open(file, "pt") as f:
            weights.update({k[len(prefix):]: f.get_tensor(k) for k in f.keys() if k.startswith(prefix)})
    return weights


def save(model, tokenizer, path):
    """An ordinary checkpoint directory (safetensors); complete or absent, since it is renamed into place at the end."""
    path = os.path.abspath(path)
    new, old = f"{path}.writing-{os.getpid()}", f"{path}.replaced-{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    if os.path.isfile(path):
        raise UserError(f"cannot write {path}: it is a file, not a directory")
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(new, path)
    except Exception as e:  # a full disk is an OSError, a SafetensorError, or, of a tokenizer, a plain Exception
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from e
    shutil.rmtree(old, ignore_errors=True)


def stop_tokens(model, tokenizer):
    """Every id that ends a turn: the tokenizer's and the checkpoint's (Qwen has two)."""
    return sorted({tokenizer.eos_token_id, *_stop_ids(model)} - {None})


def _stop_ids(model):
    ids = [model.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
    return sorted({i for x in ids if x is not None for i in (x if isinstance(x, list) else [x])})


def chat_parts(model, tokenizer):
    """(before, after, end): the text around the user's words, and the id that ends an answer; ("", "", the eos) for a base model.

    A chat model is one that stops where its template ends a turn. So Qwen2.5-Instruct is one (<|im_end|> is among its stop tokens), and
    Qwen2.5, a base model that ships the same template but stops at <|endoftext|> only, gets its prompts plain.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", "", tokenizer.eos_token_id
    user, said = "THE-USERS-WORDS", "THE-ANSWER"
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)  # Qwen3's switch; others ignore it
    try:
        tail = render(turns).rpartition(said)[2]
        before, _, after = render(turns[:1], add_generation_prompt=True).partition(user)
    except Exception as e:  # a template is a program of somebody else's: anything may come
        raise UserError(f"the tokenizer's chat template does not work for a user and an assistant turn: {str(e).splitlines()[0]}") from e
    at = {tail.find(str(tokenizer.convert_ids_to_tokens(i))): i for i in stop_tokens(model, tokenizer)}
    at.pop(-1, None)
    return (before, after, at[min(at)]) if at else ("", "", tokenizer.eos_token_id)


def encode_prompt(model, tokenizer, text, opening=""):
    """A prompt as token ids: one user turn and the answer's header for a chat model, the text alone for a base model.

    opening: the answer's first words, put into the model's mouth. A story is data: "<|im_end|>" in it becomes the tokens of those ten
    characters; only the template's own words become special tokens. Apart from that the ids are those of the whole text at once.
    """
    before, after, _ = chat_parts(model, tokenizer)
    if not after:
        return tokenizer.encode(f"{text} {opening}" if opening else text, split_special_tokens=True)
    special = "|".join(re.escape(t.content) for t in tokenizer.added_tokens_decoder.values())
    start = max([m.end() for m in re.finditer(special, before)], default=0)  # BPE may merge neighbours, but not across a special token
    end = min([m.start() for m in re.finditer(special, after)], default=len(after))
    parts = [(before[:start], False), (before[start:] + text + after[:end], True), (after[end:] + opening, False)]
    return [i for part, plain in parts for i in tokenizer.encode(part, add_special_tokens=False, split_special_tokens=plain)]


def check_lengths(model, prompts, max_new_tokens):
    """UserError unless every prompt (token ids) and its answer fit the model's positions."""
    limit = model.config.max_position_embeddings
    for i, p in enumerate(prompts):
        if not p:
            raise UserError(f"prompt {i} is empty")
        if len(p) + max_new_tokens > limit:
            raise UserError(f"prompt {i} has {len(p)} tokens; with {max_new_tokens} new ones that is more than the model's {limit} positions: "
                            f"lower --max-new-tokens, or prepare shorter texts")


def lock(out):
    """Makes this process the only one that writes into the directory `out`, for as long as it lives: the kernel takes the lock
    back however the process ends. Keep the file that comes back. What a killed run left half written is removed."""
    try:
        file = open(os.path.join(out, "lock"), "a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another process is writing to {out}; wait for it, or choose another --out") from e
    except OSError as e:
        raise UserError(f"cannot lock {out}: {e.strerror}") from e
    for name in os.listdir(out):
        if name.startswith("model.replaced-") and not os.path.exists(os.path.join(out, "model")):
            os.rename(os.path.join(out, name), os.path.join(out, "model"))  # killed between the two renames of save()
        elif re.match(r"(model\.(writing|replaced)-|state-\d+\.writing$)", name):
            shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    return file


def saved_states(out):
    """The steps of which `out` holds a state, in order."""
    return sorted(int(m.group(1)) for m in map(re.compile(r"state-(\d+)").fullmatch, os.listdir(out)) if m) if os.path.isdir(out) else []


def write_state(out, step, tensors, rest, keep=2):
    """out/state-STEP: named tensors and whatever JSON can say. Complete or absent: written beside, brought to the disk, checksummed,
    then renamed. After that all but the last `keep` states go, and those of later steps, which were damaged when the run was resumed."""
    path = os.path.join(os.path.abspath(out), f"state-{step}")
    new = path + ".writing"
    shutil.rmtree(new, ignore_errors=True)
    try:
        os.makedirs(new)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, os.path.join(new, "tensors.safetensors"))
        with open(os.path.join(new, "rest.json"), "w") as f:
            json.dump(rest, f)
        with open(os.path.join(new, "crc32"), "w") as f:
            f.write(_checksum(new))
        for name in [*os.listdir(new), "."]:
            _sync(os.path.join(new, name))
        if os.path.exists(path):  # the same step again, after a resume from an older one: it was a damaged one
            shutil.rmtree(path)
        os.rename(new, path)
        _sync(os.path.dirname(path))
    except (OSError, SafetensorError) as e:
        shutil.rmtree(new, ignore_errors=True)
        last = [f"; state-{s}, written before, is still there" for s in saved_states(out)[-1:]]
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}{''.join(last)}") from e
    last = [s for s in saved_states(out) if s <= step][-keep:]
    for s in set(saved_states(out)) - set(last):
        shutil.rmtree(os.path.join(out, f"state-{s}"), ignore_errors=True)


def read_state(out):
    """(step, tensors, rest) of the newest whole state in `out`; a damaged one is passed over and named. None if there is none."""
    for step in reversed(saved_states(out)):
        path = os.path.join(out, f"state-{step}")
        try:
            with open(os.path.join(path, "crc32")) as f:
                if f.read() != _checksum(path):
                    raise ValueError("its checksum is wrong")
            with open(os.path.join(path, "rest.json")) as f:
                return step, load_file(os.path.join(path, "tensors.safetensors")), json.load(f)
        except (OSError, ValueError, SafetensorError) as e:
            print(f"{path} is damaged ({e}); looking for the one before", file=sys.stderr)
    return None


def optimizer_tensors(parameters, optimizer):
    """Weights and AdamW's moments, named, for write_state."""
    weights = {f"weight {i}": p for i, p in enumerate(parameters)}
    return weights | {f"adamw {i} {k}": v for i, own in optimizer.state_dict()["state"].items() for k, v in own.items()}


@torch.no_grad()
def restore_optimizer(parameters, optimizer, tensors):
    """The way back, from read_state's tensors into parameters and optimizer."""
    moments = {}
    for name, value in tensors.items():
        if name.startswith("adamw "):
            _, i, k = name.split()
            moments.setdefault(int(i), {})[k] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    for i, p in enumerate(parameters):
        p.copy_(tensors[f"weight {i}"])


def on_stop(save):
    """From now on Ctrl-C and SIGTERM end the run, once, by save() and what that says. -> hold: after hold(True) a signal is only noted,
    and obeyed at hold(False), so that what must not be cut in two is not."""
    caught, held = [], False

    def leave():
        nonlocal held
        held = True  # a second signal changes nothing any more
        raise KeyboardInterrupt(caught[0], save())

    def handler(number, _):
        caught.append(number)
        if not held:
            leave()

    def hold(on):
        nonlocal held
        held = on
        if caught and not on:
            leave()

    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, handler)
    return hold


@contextlib.contextmanager
def signals_restored():
    """However what is inside ends (or the function that this decorates), Ctrl-C and SIGTERM do afterwards what they did before."""
    former = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in former.items():
            signal.signal(s, handler)


def _checksum(path):
    """Of a state's two files, as text."""
    crc = 0
    for name in ("tensors.safetensors", "rest.json"):
        with open(os.path.join(path, name), "rb") as f:
            while part := f.read(1 << 24):
                crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def _sync(path):
    """Brings a file, or a directory's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def run_script(main):
    """Runs a script's main: what the user can put right ends in one line and exit code 2, never in a traceback; Ctrl-C and SIGTERM
    end in one line and the shell's 130 and 143. A script may raise KeyboardInterrupt(signal, what to say)."""
    def stop(number, _):
        raise KeyboardInterrupt(number)

    name = os.path.basename(sys.argv[0])
    try:
        signal.signal(signal.SIGTERM, stop)
        main()
    except UserError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        print(f"{name}: error: {e}; what was written before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        number, said = (e.args + (signal.SIGINT, None)[len(e.args):])[:2]
        by = "the keyboard" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\nstopped by {by}; {said or 'what was written so far is kept'}", file=sys.stderr)
        sys.exit(128 + number)


def is_small(model):
    """Whether a model wants the settings of one trained from scratch (and, by default, the tiny world) or the released ones."""
    return sum(p.numel() for p in model.parameters()) < 50e6


def device_flags(g):
    """Where, and how a GPU is used."""
    g.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    g.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=False, help="on CUDA, record the decoding step as a graph and play "
                   "it; where that fails it runs as ever (not yet tried on a GPU)")


def run_settings(path):
    """What a run directory, or the model/ in it, was made with; {} if it is none."""
    run = os.path.dirname(os.path.normpath(path)) if os.path.basename(os.path.normpath(path)) == "model" else path
    try:
        with open(os.path.join(run, "config.json")) as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def base_of(name):
    """The model that a run directory was trained from; any other model is its own base."""
    base = run_settings(name).get("base", name)
    return os.path.abspath(base) if os.path.isdir(base) else base


def check_arguments(args, n=1):
    """Bounds that all scripts share; a wrong value ends in one line. n: the least --n."""
    least = {"n": n, "seed": 0, "val": 0, "steps": 0, "projector_steps": 0, "overlong_buffer": 0, "show_every": 0, "show": 0, "write": 0, "alone": 0,
             "top_k": 0, "n_latents": 0}
    for name, value in vars(args).items():
        bound = least.get(name, 0 if isinstance(value, float) else 1)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= bound:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {bound}")
    if not 0 < getattr(args, "top_p", 1) <= 1:
        raise UserError(f"--top-p is {args.top_p}; it must be above 0 and at most 1")
    if args.device is not None and not (args.device == "cpu" or args.device.startswith("cuda")):
        raise UserError(f"--device is {args.device!r}; it must be cpu or cuda")
    if (args.device or "").startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; leave the flag out or say cpu")
    if args.out:
        make_directory(args.out)


def make_directory(path):
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as e:
        raise UserError(f"cannot write to the output directory {path!r}: {e.strerror}") from e


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".tmp", path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def parse_resumable(ap, script, free=("device", "graphs")):
    """The command line of a script; with --resume DIR the settings of the run in DIR, beside which only the flags in `free` may stand."""
    args = ap.parse_args()
    if args.resume is None:
        return args
    settings = run_settings(args.resume)
    if settings.get("script") != script:
        raise UserError(f"nothing to resume in {args.resume!r}: it has no config.json of {script}")
    settings = {**{k: v for k, v in settings.items() if k in vars(args)}, "out": args.resume, "resume": args.resume}
    args = ap.parse_args(namespace=argparse.Namespace(**settings))  # what is in the namespace already takes no default
    changed = [k for k, v in settings.items() if getattr(args, k) != v and k not in free]
    if changed:
        raise UserError(f"--{changed[0].replace('_', '-')}: a resumed run keeps the settings of {args.resume}/config.json, save "
                        + " and ".join(f"--{k}" for k in free))
    return args


def write_settings(args, script):
    """config.json, from which --resume and the other scripts read; --resume may be said from elsewhere, so a directory's name is made whole."""
    args.model = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    own = {k: v for k, v in vars(args).items() if k != "resume"}
    write_json(os.path.join(args.out, "config.json"), {"script": script, "base": base_of(args.model), **own})


def read_checkpoint(name_or_path, dtype=None):
    """The files of a checkpoint -> (causal LM, tokenizer, the projector's weights, {} if it has none). See litereason.load."""
    path = TINY if name_or_path == "tiny" else str(name_or_path)
    if os.path.exists(os.path.join(path, "model", "config.json")):
        path = os.path.join(path, "model")  # a run's output directory
    if not os.path.isdir(path):
        if os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"no model directory at {path!r} (a directory with config.json and *.safetensors)")
        path = f"Qwen/{path}" if "/" not in path and path.startswith("Qwen") else path
    elif not os.path.exists(os.path.join(path, "config.json")):
        raise UserError(f"{path!r} has no config.json: it is not a saved model")
    local = os.path.isdir(path)
    only = {"local_files_only": local or not hub_answers()}  # without a network fail now, not after minutes of retries
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # the projector's keys are "unexpected" to transformers; we read them below
    try:
        tokenizer = _load_tokenizer(path, trust_remote_code=False, **only)
        weights = _projector_weights(path, **only)
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **only)
        config._attn_implementation = "sdpa"  # whatever it says: attention code may be fetched from the hub by name
        model, read = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype or torch.float32, use_safetensors=True,
                                                           trust_remote_code=False, output_loading_info=True, **only)
        odd = sorted(read["missing_keys"]) + sorted(k for k in read["unexpected_keys"] if k.startswith("model.layers."))
        if odd:  # transformers would go on, with random weights for what is missing
            raise ValueError(f"its weights and its config.json do not fit: {odd[0]}")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    except Exception as e:  # a damaged file comes out of transformers as nearly any of them
        why = " ".join(str(e).split())[:200] or type(e).__name__
        if local:
            raise UserError(f"cannot load the model in {path!r}: {why}") from e
        if any(sign in str(e) for sign in ("gated repo", "401 Client Error", "403 Client Error")):
            raise UserError(f"{path!r} is gated on the hub: accept its terms on https://huggingface.co/{path}, then `hf auth login` "
                            f"(or set HF_TOKEN)") from e
        raise UserError(f"cannot fetch {path!r} from the hub ({why}). Without a network these work: 'tiny', or a directory; "
                        f"where there is one: `hf download {path} --local-dir DIR`, then pass DIR") from e
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model, tokenizer, weights
