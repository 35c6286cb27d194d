"""A run on disk and on the command line: how it ends, stops and goes on, its flags and its directory. A first
reading can skip it."""
import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import typing
import zipfile

import torch

from lib import UserError, checkpoint


def run_script(main):
    """Runs a script's main. What the user can put right ends in one line and exit code 2, never in a
    traceback; Ctrl-C and SIGTERM end in one line and the shell's 130 and 143. A script may raise
    KeyboardInterrupt(signal, what to say)."""

    def stop(number, _):
        raise KeyboardInterrupt(number)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except UserError as e:
        _end(2, f"error: {e}")
    except KeyboardInterrupt as e:
        number = e.args[0] if e.args else signal.SIGINT
        said = e.args[1] if len(e.args) > 1 else "what was written is kept; training goes on with --resume"
        by = "the keyboard" if number == signal.SIGINT else signal.Signals(number).name
        _end(128 + number, f"stopped by {by}; {said}")
    except (RuntimeError, OSError) as e:
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):  # the second: a CPU's
            why = str(e).partition("\n")[0][:200]
            _end(2, f"error: out of memory ({why}): see --help's flags of memory, or take a smaller model")
        # The context: torch, when it closes a file that could not be written.
        of_disk = e if isinstance(e, OSError) else e.__context__
        if isinstance(of_disk, OSError):
            _end(2, f"error: {of_disk}; what was written before is kept")
        raise
    finally:
        signal.signal(signal.SIGTERM, former)


def _end(code, said):
    print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    sys.exit(code)


# ============================================================ Ctrl-C and SIGTERM
@contextlib.contextmanager
def stops_noted(said):
    """Inside this block Ctrl-C and SIGTERM are only noted: the list that it gives is no longer empty, and the
    block should save its state and come to its end. There the run stops, with the words `said`. A second
    signal ends the process at once."""
    noted = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number, _):
        noted.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping at the end of this step; a second signal stops at once", file=sys.stderr)

    former = {number: signal.signal(number, note) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if noted:
        raise KeyboardInterrupt(noted[0], said)


# ============================================================ states: a run can be resumed
def lock(out):
    """Makes this process the only one that writes into the directory `out`; keep the file that comes back.
    What a killed run left half written is removed. UserError if another process has the lock."""
    file = open(os.path.join(out, "lock"), "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another process is writing to {out}; wait for it, or choose another --out") from e
    model = os.path.join(out, "model")
    for name in os.listdir(out):
        path = os.path.join(out, name)
        if name.startswith("model.replaced-") and not os.path.exists(model):
            os.rename(path, model)  # killed between the two renames of checkpoint.save
        elif re.match(r"model\.(writing|replaced)-|state-\d+\.pt\.tmp", name):
            remove(path)
    return file


def saved_states(out):
    """The steps of which `out` holds a state, in order."""
    names = os.listdir(out) if os.path.isdir(out) else []
    matches = map(re.compile(r"state-(\d+)\.pt").fullmatch, names)
    return sorted(int(match[1]) for match in matches if match)


def state_path(out, step):
    return os.path.join(out, f"state-{step}.pt")


def write_state(out, step, value):
    """Saves `value`, a dict of tensors and plain data (lists, dicts, numbers, texts), as out/state-STEP.pt.

    The file is complete or absent: it is written beside, brought to the disk and then renamed. After that all
    but the last two states are deleted."""
    path = state_path(out, step)
    os.makedirs(out, exist_ok=True)
    with open(path + ".tmp", "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)
    for former in saved_states(out)[:-2]:
        remove(state_path(out, former))


def read_state(out):
    """-> (step, value) of the newest state in `out`, tensors on the CPU; None if there is none. UserError if
    it is damaged."""
    steps = saved_states(out)
    if not steps:
        return None
    path = state_path(out, steps[-1])
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile("a checksum is wrong")
        return steps[-1], torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it, and the run goes on from the one before") from e


def if_finite(number):
    """For JSON, which has no nan and no inf: None in their place."""
    return number if number is None or math.isfinite(number) else None


def open_log(path, lines):
    """A file of metrics, to be written on. Resumed: its lines up to the state, none lost, doubled or cut."""
    log = open(path + ".tmp", "w")
    log.writelines(lines)
    log.flush()
    os.replace(path + ".tmp", path)
    return log


# ============================================================ a settings table makes the flags
class BySize(typing.NamedTuple):
    """A default that the model's size decides."""

    small: object  # of a model with less than 50 M parameters
    released: object  # of any other: as in the released code


def add_flags(ap, table):
    """The flags of a settings table: {title: {name: (default, bound, what it is)}}.

    default: a value, a list (then the flag takes several words) or BySize. bound: the least number, an int or
    a float; a list of choices; str; or bool, a switch."""
    for title, settings in table.items():
        group = ap.add_argument_group(title)
        for name, (default, bound, what) in settings.items():
            kind = {"default": default, "help": what}
            if isinstance(default, BySize):
                kind = {"default": None, "help": f"{what} [{' | '.join(dict.fromkeys(map(str, default)))}]"}
            elif isinstance(default, list):
                kind.update(nargs="+", help=f"{what} [{' '.join(default)}]")
            elif default is not None and bound is not bool:
                kind["help"] = f"{what} [{default}]"
            if bound is bool:
                kind["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
            elif isinstance(bound, list):
                kind.update(choices=bound, metavar="WORD")
            else:
                of = bound if bound is str else type(bound)
                kind.update(type=of, metavar={int: "N", float: "X", str: "NAME"}[of])
            group.add_argument(flag(name), **kind)


def flag(name):
    return "--" + name.replace("_", "-")


# Settings that the training scripts share.
COMMON = {
    "model": ("tiny", str, "tiny, a directory (a run's too), or a hub name such as Qwen2.5-1.5B"),
    "task": (None, str, "a folder under data/, or tiny.next_chapter [by the model]"),
    "reward": (None, ["contrastive", "vrcli", "thresholded"], "of next_chapter [contrastive]"),
    "scorer": (None, str, "the frozen model that reads chapters [a copy of the base]"),
    "seed": (0, 0, "of all random draws"),
    "out": (None, str, "the run's directory [out/MODEL-TASK-METHOD]"),
    "overwrite": (False, bool, "replace the run that --out holds"),
    "resume": (None, str, "continue the run in this directory, by its own settings"),
    "device": (None, str, "cpu or cuda [cuda if there is one]")}
OLD_FLAGS = {"--rows": "--gen-batch-size", "--group": "--num-generations",
             "--tokens-per-forward": "--micro-batch-tokens", "--no-refresh": "--refresh-every -1"}


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
            if type(bound) in (int, float) and value is not None and not value >= bound:  # nan is not, too
                raise UserError(f"{flag(name)} is {value}; it must be at least {bound}")


def beside_released(settings, table, idle=()):
    """What is not as released among the settings of a table, as text. idle: names that change nothing."""
    released = {name: default.released for part in table.values() for name, (default, _, _) in part.items()
                if isinstance(default, BySize) and name not in idle}
    others = [f"{name} {settings[name]} (released: {value})" for name, value in released.items()
              if settings[name] != value]
    return f"not as released: {', '.join(others)}" if others else "all settings as released"


# ============================================================ the command line
class OneLinePerFlag(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=29, width=110)

    def format_help(self):
        return re.sub(r"\n\n(?=[^\n]+:\n  -)", "\n", super().format_help())  # no empty line before a title

    def _format_action_invocation(self, action):
        name = super()._format_action_invocation(action)
        return re.sub(r"^--(.*), --no-\1$", r"--[no-]\1", name)


def parser(doc):
    """An argparse parser for a script with the docstring `doc`. --help shows its first paragraph and its
    indented ones, the usual commands; what else stands there is for readers of the script."""
    for word in sys.argv[1:]:
        if word.partition("=")[0] in OLD_FLAGS:
            raise UserError(f"{word.partition('=')[0]} is now {OLD_FLAGS[word.partition('=')[0]]}")
    first, *others = doc.split("\n\n")
    shown = [first] + [paragraph for paragraph in others if paragraph.startswith("    ")]
    ap = argparse.ArgumentParser(description="\n\n".join(shown), usage="%(prog)s [flags]", allow_abbrev=False,
                                 add_help=False, formatter_class=OneLinePerFlag)
    ap.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    return ap


def use_graphs(model, wanted):
    """--graphs; a CPU has none."""
    model.graphs = wanted and model.device.type == "cuda"


def check_arguments(args):
    """UserError if the device is not there. Makes the output directory."""
    is_cuda = str(args.device).startswith("cuda")
    if is_cuda and not torch.cuda.is_available() or not is_cuda and args.device not in (None, "cpu"):
        raise UserError(f"--device {args.device}: it must be cpu, or cuda where torch can use one")
    if args.out:
        os.makedirs(args.out, exist_ok=True)


def parse_resumable(parser, script, free=("device",)):
    """The command line of a script; with --resume DIR the settings of the run in DIR, beside which only the
    flags in `free` may stand."""
    args = parser.parse_args()
    if args.resume is None:
        for name in ("model", "scorer", "traces"):
            path = getattr(args, name, None)
            if path not in (None, "tiny") and os.path.exists(path):
                setattr(args, name, os.path.abspath(path))  # --resume may be said from elsewhere
        return args
    out = directory_of_run(args.resume)
    made = settings_in(out)
    if made.get("script") != script:
        raise UserError(f"nothing to resume in {out!r}: it has no config.json of {script}")
    missing = vars(args).keys() - made.keys() - {"resume", "overwrite"}
    if missing:
        raise UserError(f"{out} is a run of another version, without {flag(min(missing))}: begin a new run")
    settings = {name: made[name] for name in vars(args) if name in made} | {"out": out, "resume": out}
    # What is in the namespace already takes no default.
    args = parser.parse_args(namespace=argparse.Namespace(**settings))
    changed = [name for name, value in settings.items() if getattr(args, name) != value and name not in free]
    if changed:
        raise UserError(f"{flag(changed[0])}: a resumed run keeps the settings of {out}/config.json, save "
                        f"{' and '.join(map(flag, free))}")
    return args


# ============================================================ the directory of a run
def take_directory(out, model, resumes=False, overwrite=False):
    """Locks the directory of a run -> the lock, see there. UserError if a new run would replace another one,
    its own --model, or what no run has written."""
    file = lock(out)
    if resumes:
        return file
    made = settings_in(out)
    source = os.path.abspath(checkpoint.checkpoint_path(model))
    if os.path.join(source, "").startswith(os.path.join(os.path.abspath(out), "")):
        raise UserError(f"--model {model} is in --out {out}, which is to be replaced: choose another --out")
    if "script" not in made and os.path.exists(os.path.join(out, "config.json")):
        raise UserError(f"{out} has a config.json that no run wrote: choose another --out")
    has_states = any(saved_states(os.path.join(out, name)) for name in ("", "imitation", "stage-2"))
    if (has_states or os.path.exists(os.path.join(out, "results.json"))) and not overwrite:
        raise UserError(f"{out} holds a run of {made.get('script')} on {made.get('task')}: go on with "
                        f"--resume {out}, choose another --out, or replace it with --overwrite")
    return file


def begin(out, script, settings):
    """Writes config.json, which --resume and the other scripts read. settings: vars(args). A new run deletes
    all that an earlier one left in `out` but the traces, which say themselves what they were made with."""
    made = settings_in(out)
    if settings.get("resume") and made["examples"] != settings["examples"]:
        raise UserError(f"the examples of {settings['task']} are not those that the run in {out} began with: "
                        "set LITEREASON_DATA as then, prepare those again, or choose another --out")
    if not settings.get("resume") and "script" in made:
        states = [os.path.basename(state_path(out, step)) for step in saved_states(out)]
        for name in [*states, "metrics.jsonl", "results.json", "before-rl.json", "bad-rollouts.json",
                     "seconds.json", "model", "imitation", "stage-2", "imitation.jsonl", "stage-2.jsonl"]:
            remove(os.path.join(out, name))
    settings = {name: value for name, value in settings.items() if name not in ("resume", "overwrite")}
    settings = {"script": script, "base": base_of(settings["model"]), **settings}
    write_json(os.path.join(out, "config.json"), settings)


def digest(examples):
    """16 digits that change with the examples of a task."""
    text = json.dumps(examples, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def directory_of_run(path):
    """Of a run directory, or of the model/ in it."""
    path = os.path.normpath(path)
    is_in_run = os.path.basename(path) == "model" and "script" not in settings_in(path)
    return os.path.dirname(path) if is_in_run else path


def settings_in(directory):
    """What its config.json says; {} without one that can be read."""
    try:
        return dict(read_json(os.path.join(directory, "config.json"), {}))
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


def remove(path):
    """A file, or a directory with all that is in it; nothing if there is none."""
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def read_json(path, default):
    """What the file holds; the default if there is none."""
    if not os.path.exists(path):
        return default
    with open(path) as f:
        return json.load(f)


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
    last end. On CUDA the allocator's peak within the phase, on a CPU the process's so far."""

    def __init__(self, device):
        self.device, self.began = device, time.time()
        self.seconds, self.memory = {}, {}

    def end(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.seconds[name] = round(time.time() - self.began, 3)
        self.memory[name] = round(peak / 2**30, 3)
        self.began = time.time()
