"""A run on disk and on the command line; a first reading can skip it.

    run_script                          how a script ends
    lock, write_state, read_state       a run that is stopped, killed or damaged can be resumed
    State                               .. of train_rl.py, between two steps
    on_stop, signals_restored           Ctrl-C and SIGTERM
    device_flags, parse_resumable, ..   the command line and config.json
    Phases                              seconds and peak memory of each phase of a step
"""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import typing
import zlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dataclasses
from lib import UserError, checkpoint


def run_script(main):
    """Runs a script's main. What the user can put right ends in one line and exit code 2, never in a
    traceback; Ctrl-C and SIGTERM end in one line and the shell's 130 and 143. A script may raise
    KeyboardInterrupt(signal, what to say)."""

    def stop(number, _):
        raise KeyboardInterrupt(number)

    name = os.path.basename(sys.argv[0])
    try:
        signal.signal(signal.SIGTERM, stop)
        main()
    except UserError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):  # a CPU's
            raise
        why = str(e).partition("\n")[0][:200]
        print(f"{name}: error: out of memory ({why}): see the flags of memory in --help, or take a smaller "
              "model", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        print(f"{name}: error: {e}; what was written before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        said = e.args[1] if len(e.args) > 1 else None
        by = "the keyboard" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\nstopped by {by}; {said or 'what was written so far is kept'}", file=sys.stderr)
        sys.exit(128 + number)


# ============================================================ states: a run can be resumed
def lock(out):
    """Makes this process the only one that writes into the directory `out`, for as long as it lives: the
    kernel takes the lock back however the process ends. Keep the file that comes back. What a killed run left
    half written is removed."""
    try:
        file = open(os.path.join(out, "lock"), "a")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another process is writing to {out}; wait for it, or choose another --out") from e
    except OSError as e:
        raise UserError(f"cannot lock {out}: {e.strerror}") from e
    model = os.path.join(out, "model")
    for name in os.listdir(out):
        if name.startswith("model.replaced-") and not os.path.exists(model):
            os.rename(os.path.join(out, name), model)  # killed between the two renames of save()
        elif re.match(r"(model\.(writing|replaced)-|state-\d+\.writing$)", name):
            shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    return file


def saved_states(out):
    """The steps of which `out` holds a state, in order."""
    if not os.path.isdir(out):
        return []
    names = map(re.compile(r"state-(\d+)").fullmatch, os.listdir(out))
    return sorted(int(match.group(1)) for match in names if match)


def write_state(out, step, tensors, rest, keep=2):
    """out/state-STEP: named tensors and whatever JSON can say. Complete or absent: written beside, brought to
    the disk, checksummed, then renamed. After that all but the last `keep` states are deleted, and those of
    later steps, which were damaged when the run was resumed."""
    path = os.path.join(os.path.abspath(out), f"state-{step}")
    new = path + ".writing"
    shutil.rmtree(new, ignore_errors=True)
    try:
        os.makedirs(new)
        plain = {name: t.detach().contiguous() for name, t in tensors.items()}
        save_file(plain, os.path.join(new, "tensors.safetensors"))
        with open(os.path.join(new, "rest.json"), "w") as f:
            json.dump(rest, f)
        with open(os.path.join(new, "crc32"), "w") as f:
            f.write(_checksum(new))
        shutil.copymode(os.path.join(new, "crc32"), os.path.join(new, "tensors.safetensors"))  # as in save
        for name in [*os.listdir(new), "."]:
            _sync(os.path.join(new, name))
        # The same step again, after a resume from an older one: it was a damaged one.
        if os.path.exists(path):
            shutil.rmtree(path)
        os.rename(new, path)
        _sync(os.path.dirname(path))
    except (OSError, SafetensorError) as e:
        shutil.rmtree(new, ignore_errors=True)
        last = [f"; state-{s}, written before, is still there" for s in saved_states(out)[-1:]]
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}{''.join(last)}") from e
    kept = [s for s in saved_states(out) if s <= step][-keep:]
    for s in set(saved_states(out)) - set(kept):
        shutil.rmtree(os.path.join(out, f"state-{s}"), ignore_errors=True)


def read_state(out):
    """(step, tensors, rest) of the newest whole state in `out`; a damaged one is passed over and named. None
    if there is none."""
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
    tensors = {f"weight {i}": p for i, p in enumerate(parameters)}
    for i, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"adamw {i} {name}"] = value
    return tensors


@torch.no_grad()
def restore_optimizer(parameters, optimizer, tensors):
    """The inverse: read_state's tensors into parameters and optimizer."""
    moments = {}
    for key, value in tensors.items():
        if key.startswith("adamw "):
            _, i, name = key.split()
            moments.setdefault(int(i), {})[name] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    for i, p in enumerate(parameters):
        p.copy_(tensors[f"weight {i}"])


def _checksum(path):
    """Of a state's two files, as text."""
    crc = 0
    for name in ("tensors.safetensors", "rest.json"):
        with open(os.path.join(path, name), "rb") as f:
            while block := f.read(1 << 24):
                crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _sync(path):
    """Brings a file, or a directory's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ============================================================ the state of an RL run
@dataclasses.dataclass
class State:
    """What goes from one step of train_rl.py to the next, besides weights and moments, and so into a state on
    the disk. The order of the data and all draws follow from (seed, step): they need no state."""

    step: int  # optimiser steps that are done
    rollouts: list  # of the present batch, for its further minibatches
    earned: torch.Tensor  # (B,) their rewards
    carried: dict  # JSON as it stands

    @classmethod
    def new(cls, args, rows):
        """rows: of the final table, so far."""
        carried = {"rows": rows, "metrics": [], "rewarded": [], "skipped": 0, "skipped_in_a_row": 0,
                   "tokens_per_forward": args.tokens_per_forward}
        return cls(0, [], torch.zeros(0), carried)

    def count_skipped(self, step_is_finite):
        in_a_row = self.carried["skipped_in_a_row"]
        self.carried["skipped"] += not step_is_finite
        self.carried["skipped_in_a_row"] = 0 if step_is_finite else in_a_row + 1

    def save(self, out, model, masters, optimizer, is_in_batch=True):
        """out/state-STEP, with weights (offloaded: the fp32 masters), AdamW's moments and the projector.
        is_in_batch: the batch has minibatches to go, so its rollouts are needed."""
        tensors = {f"projector {name}": p for name, p in model.reasoning_projector.named_parameters()}
        tensors |= optimizer_tensors(masters, optimizer)
        rollouts = self.rollouts if is_in_batch else []
        if rollouts:
            tensors["latents"] = torch.cat([r.latents for r in rollouts])
            tensors["logprobs"] = torch.cat([r.logprobs for r in rollouts])
        plain = [[r.prompt_ids, r.slots, r.text, r.finished, r.prompt] for r in rollouts]
        rest = {"carried": self.carried, "rollouts": plain, "earned": self.earned.tolist()}
        write_state(out, self.step, tensors, rest)

    @classmethod
    @torch.no_grad()
    def restore(cls, step, tensors, rest, model, masters, optimizer, make_rollout):
        """The inverse, into model, masters and optimizer, from what read_state found. make_rollout:
        litereason.Rollout."""
        for name, p in model.reasoning_projector.named_parameters():
            p.copy_(tensors[f"projector {name}"])
        restore_optimizer(masters, optimizer, tensors)
        rollouts, latents_read, slots_read = [], 0, 0
        for prompt_ids, slots, text, finished, prompt in rest["rollouts"]:
            rollout = make_rollout(prompt_ids, slots, None, None, text, finished, prompt)
            rollout.latents = tensors["latents"][latents_read : latents_read + rollout.n_latents]
            rollout.logprobs = tensors["logprobs"][slots_read : slots_read + len(slots)]
            latents_read += rollout.n_latents
            slots_read += len(slots)
            rollouts.append(rollout)
        return cls(step, rollouts, torch.tensor(rest["earned"]), rest["carried"])


def keeper(args, state, model, masters, optimizer, is_saved):
    """-> keep(), which writes the state unless it is on the disk, and says how to continue. It is called at
    once: then stages 1 and 2 are saved, and their intermediate files can go."""
    kept = state.step if is_saved else None

    def keep():
        nonlocal kept
        if kept != state.step:
            is_in_batch = state.step % args.minibatches > 0
            state.save(args.out, model, masters, optimizer, is_in_batch)
        kept = state.step
        return f"step {kept} of {args.steps} is saved; go on with: python train_rl.py --resume {args.out}"

    keep()
    for name in ("imitation", "stage-2", "first-rows"):
        shutil.rmtree(os.path.join(args.out, name), ignore_errors=True)
    return keep


def if_finite(number):
    """For JSON, which has no nan and no inf: None in their place."""
    return number if number is None or math.isfinite(number) else None


def open_log(path, lines):
    """A file of metrics, to be written on; resumed: its lines up to the state, none lost, doubled or half
    written."""
    log = open(path + ".tmp", "w")
    log.writelines(lines)
    log.flush()
    os.replace(path + ".tmp", path)
    return log


# ============================================================ Ctrl-C and SIGTERM
def on_stop(keep):
    """From now on Ctrl-C and SIGTERM call keep() and end the run with what it returns.

    -> `uninterrupted`, a context manager: a signal that arrives inside it takes effect at its end."""
    caught = []
    held = False

    def leave():
        nonlocal held
        held = True  # a second signal changes nothing any more
        try:
            said = keep()
        except Exception as e:
            said = f"its last steps could not be saved ({e})"
        raise KeyboardInterrupt(caught[0], said)

    def handler(number, _):
        caught.append(number)
        if not held:
            leave()

    @contextlib.contextmanager
    def uninterrupted():
        nonlocal held
        held = True
        yield
        held = False
        if caught:
            leave()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return uninterrupted


@contextlib.contextmanager
def signals_restored():
    """Restores the handlers of Ctrl-C and SIGTERM at the end, however that comes; also a decorator."""
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# ============================================================ a settings table makes the flags
class BySize(typing.NamedTuple):
    """A default that the model's size decides."""

    small: object  # of a model with less than 50 M parameters
    released: object  # of any other: as in the released code


def add_flags(ap, table):
    """The flags of a settings table: {title: {name: (default, bound, what it is)}}.

    default: a value or BySize. bound: the least number, an int or a float; a list of choices; str; or bool, a switch."""
    for title, settings in table.items():
        group = ap.add_argument_group(title)
        for name, (default, bound, what) in settings.items():
            flag = "--" + name.replace("_", "-")
            is_by_size = isinstance(default, BySize)
            shown = f"{_shown(default.small)} | {_shown(default.released)}" if is_by_size else _shown(default)
            kind = {"help": f"{what} [{shown}]" if shown else what, "default": None if is_by_size else default}
            if bound is bool:
                kind["action"] = argparse.BooleanOptionalAction
            elif isinstance(bound, list):
                kind["choices"] = bound
                kind["metavar"] = "WORD"
            else:
                kind["type"] = bound if bound is str else type(bound)
                kind["metavar"] = {int: "N", float: "X", str: "NAME"}[kind["type"]]
            group.add_argument(flag, **kind)


def _shown(default):
    """A default as text; nothing where the words of the flag say it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None else str(default)


def fill(args, table, small):
    """Gives every setting that no flag gave its default. small: whether the model is small."""
    for settings in table.values():
        for name, (default, _, _) in settings.items():
            if getattr(args, name) is None:
                setattr(args, name, default[not small] if isinstance(default, BySize) else default)


def check_bounds(args, table):
    """UserError in one line for a number below its bound."""
    for settings in table.values():
        for name, (_, bound, _) in settings.items():
            value = getattr(args, name)
            if isinstance(value, (int, float)) and bound is not bool and not value >= bound:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {bound}")


# ============================================================ the command line and config.json
def parser(doc):
    """An argparse parser for a script with the docstring `doc`. --help shows its first paragraph and its
    indented ones, the usual commands; what else stands there is for readers of the script."""
    first, *others = doc.split("\n\n")
    shown = [first] + [paragraph for paragraph in others if paragraph.startswith("    ")]
    return argparse.ArgumentParser(description="\n\n".join(shown), usage="%(prog)s [flags]",
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def default_text(small, released):
    """A default that depends on the model's size, for --help."""
    def said(value):
        if value is None or isinstance(value, bool):
            return {None: "all", True: "on", False: "off"}[value]
        return f"{value:g}"

    if small == released:
        return f"default {said(small)}"
    return f"default {said(small)} for a small model, else {said(released)}"


def out_flags(group, what, default):
    group.add_argument("--out", metavar="DIR", help=f"{what} go there (default {default})")
    group.add_argument("--overwrite", action="store_true", help="replace the run that --out holds (default: "
                       "refuse)")


def device_flags(group):
    """Where a script runs, and how a GPU is used."""
    group.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    group.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True,
                       help="on CUDA, record the decoding step as a graph and replay it; where that fails it "
                       "runs without (default on)")


def use_graphs(model, wanted):
    """--graphs; a CPU has none."""
    model.graphs = wanted and model.device.type == "cuda"


# The least that a number may be; of others it is 0 if it may be a fraction, else 1.
LEAST = {
    "n": 1, "seed": 0, "val": 0, "steps": 0, "projector_steps": 0, "overlong_buffer": 0, "show_every": 0,
    "show": 0, "write": 0, "alone": 0, "top_k": 0, "n_latents": 0, "refresh_every": 0,
    "imitate": 0}


def check_arguments(args, n=1):
    """Bounds that all scripts share; a wrong value ends in one line. n: the least --n. Makes the output
    directory."""
    least = {**LEAST, "n": n}
    for name, value in vars(args).items():
        bound = least.get(name, 0 if isinstance(value, float) else 1)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= bound:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {bound}")
    top_p = getattr(args, "top_p", None)
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is {args.top_p}; it must be above 0 and at most 1")
    betas = getattr(args, "betas", [])
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"--betas are {betas}; each must be at least 0 and below 1")
    device = args.device or "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device is {args.device!r}; it must be cpu, cuda or, of several, cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device that torch can use; leave the flag "
                        "out or say cpu")
    if device.startswith("cuda:") and int(device[5:]) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} of them, from 0 on")
    if args.out:
        make_directory(args.out)


def parse_resumable(parser, script, free=("device", "graphs")):
    """The command line of a script; with --resume DIR the settings of the run in DIR, beside which only the
    flags in `free` may stand."""
    args = parser.parse_args()
    if args.resume is None:
        for flag in ("model", "scorer", "traces"):
            name = getattr(args, flag, None)
            if name not in (None, "tiny") and os.path.exists(name):
                setattr(args, flag, os.path.abspath(name))  # --resume may be said from elsewhere
        return args
    args.resume = directory_of_run(args.resume)
    settings = settings_in(args.resume)
    if settings.get("script") != script:
        raise UserError(f"nothing to resume in {args.resume!r}: it has no config.json of {script}")
    settings = {name: value for name, value in settings.items() if name in vars(args)}
    settings.update(out=args.resume, resume=args.resume)
    # What is in the namespace already takes no default.
    args = parser.parse_args(namespace=argparse.Namespace(**settings))
    changed = [name for name, value in settings.items() if getattr(args, name) != value and name not in free]
    if changed:
        flags = " and ".join(f"--{name}" for name in free)
        raise UserError(f"--{changed[0].replace('_', '-')}: a resumed run keeps the settings of "
                        f"{args.resume}/config.json, save {flags}")
    return args


def check_examples(args, **splits):
    """Notes a digest of the examples, for config.json; UserError if a resumed run began with others.

    splits: {name: examples}. A run from before there were digests is taken as it is."""
    args.examples = {}
    for split, examples in splits.items():
        text = json.dumps(examples, sort_keys=True, default=str)
        args.examples[split] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
    args.data = os.environ.get("LITEREASON_DATA") and os.path.abspath(os.environ["LITEREASON_DATA"])
    made = settings_in(args.out)
    changed = [name for name, digest in made.get("examples", {}).items() if args.examples.get(name) != digest]
    if args.resume and changed:
        had = f"set LITEREASON_DATA={made['data']}" if made["data"] else "unset LITEREASON_DATA"
        way = f"{had}, or " if made["data"] != args.data else ""
        raise UserError(f"the {' and '.join(changed)} examples of {args.task} are not those that {args.out} "
                        f"began with: {way}prepare those again, or begin a new run in another --out")


def write_settings(args, script):
    """config.json, which --resume and the other scripts read."""
    settings = {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")}
    settings = {"script": script, "base": base_of(args.model), **settings}
    write_json(os.path.join(args.out, "config.json"), settings)


def directory_of_run(path):
    """Of a run directory, or of the model/ in it."""
    path = os.path.normpath(path)
    is_in_run = os.path.basename(path) == "model" and "script" not in settings_in(path)
    return os.path.dirname(path) if is_in_run else path


def settings_in(directory):
    """What its config.json says; {} without one that can be read."""
    try:
        with open(os.path.join(directory, "config.json")) as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError):
        return {}


def run_settings(path):
    """What a run directory, or the model/ in it, was made with; {} if it is none."""
    return settings_in(directory_of_run(path))


def base_of(name):
    """The model that a run directory was trained from; any other model is its own base."""
    base = run_settings(name).get("base", name)
    return os.path.abspath(base) if os.path.isdir(base) else base


def default_out(model, task, method):
    """out/MODEL-TASK-METHOD, so that no run lands in the directory of another kind of run by default."""
    base = os.path.basename(os.path.normpath(str(base_of(model))))
    parts = [task, method] if task.split(".")[0] == base else [base, task, method]
    return os.path.join("out", "-".join(parts))


def check_what_is_there(args, saved=None):
    """UserError if the command line does not go with what is in the output directory already: a stopped run
    that could be resumed, or a finished one that would be replaced."""
    if saved and args.steps < saved[0]:
        raise UserError(f"--steps is {args.steps}, but the run in {args.out} is at step {saved[0]} already")
    if saved and args.lr_schedule == "cosine" and args.steps != settings_in(args.out)["steps"]:
        raise UserError("--steps: with --lr-schedule cosine the learning rate falls towards the --steps that "
                        "the run began with, so a resumed run keeps them")
    if args.resume:
        return
    out = os.path.abspath(args.out)
    source = os.path.abspath(checkpoint.checkpoint_path(args.model))
    if source == out or source.startswith(out + os.sep):
        raise UserError(f"--model {args.model} is in --out {args.out}, which is to be replaced: choose "
                        f"another --out")
    made = settings_in(args.out)
    if os.path.exists(os.path.join(args.out, "config.json")) and "script" not in made:
        raise UserError(f"{args.out} has a config.json that no run wrote: choose another --out")
    if args.overwrite:
        return
    states = saved_states(args.out)
    asked_for = made.get("steps") or 0
    if states and states[-1] < asked_for:
        raise UserError(f"{args.out} holds a run that was stopped at step {states[-1]} of {asked_for}: go on "
                        f"with --resume {args.out}, choose another --out, or replace it with --overwrite")
    if states or os.path.exists(os.path.join(args.out, "results.json")):
        what = f"{made.get('script', 'another script')} on {made.get('task', 'some task')}"
        raise UserError(f"{args.out} holds a finished run of {what}: choose another --out, or replace it "
                        "with --overwrite")
    if any(saved_states(os.path.join(args.out, name)) for name in ("imitation", "stage-2")):
        raise UserError(f"{args.out} holds a run that was stopped in stage 2 or soon after it: go on with "
                        f"--resume {args.out}, choose another --out, or replace it with --overwrite")


def source_of_weights(args, saved):
    """What a run loads: args.model or, where that is not on this disk, the run's own model, if it has a state
    and so all weights: no hub is needed then. (The base first: on a CPU a last digit can depend on where in
    its file a weight stands, so that only from the same file a resumed run is bit for bit the run that was
    never stopped.)"""
    own = os.path.join(args.out, "model")
    try:
        base_is_here = os.path.isdir(checkpoint.checkpoint_path(args.model))
    except UserError:
        base_is_here = False
    has_all = saved is not None and os.path.exists(os.path.join(own, "config.json"))
    return own if has_all and not base_is_here else args.model


def delete_earlier_run(out):
    """All that an earlier run left in `out` but the traces, which say themselves what they were made with."""
    if "script" not in settings_in(out):  # no run was here: what there is belongs to somebody else
        return
    states = [f"state-{step}" for step in saved_states(out)]
    for name in [*states, "metrics.jsonl", "results.json", "bad-rollouts.json", "seconds.json", "model",
                 "imitation", "stage-2", "imitation.jsonl", "stage-2.jsonl", "first-rows", "config.json"]:
        path = os.path.join(out, name)
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        elif os.path.exists(path):
            os.remove(path)


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
    """The whole file or, if that fails, the one that was there before."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".tmp", path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


# ============================================================ seconds and memory
class Phases:
    """Seconds and peak memory in GiB of each phase of a step: `end(name)` closes the phase that began at the
    last end.

    On CUDA the allocator's peak within the phase, on a CPU the process's so far."""

    def __init__(self, device):
        self.device = device
        self.seconds, self.memory = {}, {}
        self.began = time.time()

    def end(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        now = time.time()
        self.seconds[name] = round(now - self.began, 3)
        self.memory[name] = round(peak / 2**30, 3)
        self.began = now
