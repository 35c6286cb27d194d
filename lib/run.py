"""A run on disk and on the command line: how it ends, stops and goes on, its flags and its directory. A first
reading can skip it."""
import argparse
import contextlib
import fcntl
import functools
import glob
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
import zipfile

import torch

from lib import UserError

STOPS = signal.SIGINT, signal.SIGTERM


def run_script(main):
    """Runs a script's main. What the user can put right ends in one line and exit code 2, Ctrl-C and SIGTERM
    in one line and the shell's 130 and 143. A script may raise KeyboardInterrupt(signal, what to say)."""

    def stop(number, _):
        raise KeyboardInterrupt(number, "what was written is kept; training goes on with --resume")

    for number in STOPS:
        signal.signal(number, stop)
    code = 2
    try:
        return main()
    except UserError as e:
        said = f"error: {e}"
    except KeyboardInterrupt as e:
        number, why = e.args
        code, said = 128 + number, f"stopped by {signal.Signals(number).name}; {why}"
    except (RuntimeError, OSError) as e:
        # The context: torch, when it closes a file that could not be written.
        of_disk = e if isinstance(e, OSError) else e.__context__
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e):  # the second: a CPU's
            why = str(e).partition("\n")[0][:200]
            said = f"error: out of memory ({why}): see --help's flags of memory, or take a smaller model"
        elif isinstance(of_disk, OSError):
            said = f"error: {of_disk}; what was written before is kept"
        else:
            raise
    print(f"{os.path.basename(sys.argv[0])}: {said}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def stops_noted(said):
    """Inside this block Ctrl-C and SIGTERM are only noted: the list that it gives is no longer empty, and the
    block should save its state and end. Then the run stops, with the words `said`. A second signal ends the
    process at once."""
    noted = []

    def note(number, _):
        noted.append(number)
        for each in STOPS:
            signal.signal(each, signal.SIG_DFL)
        print("\nstopping at the end of this step; a second signal stops at once", file=sys.stderr)

    former = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield noted
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if noted:
        raise KeyboardInterrupt(noted[0], said)


# ============================================================ states: a run can be resumed
def saved_states(out):
    """The steps of which `out` holds a state, in order."""
    return sorted(int(name[len("state-") : -len(".pt")]) for name in glob.glob("state-*.pt", root_dir=out))


def state_path(out, step):
    return os.path.join(out, f"state-{step}.pt")


def write_state(out, step, value):
    """Saves `value`, a dict of tensors and plain data, as out/state-STEP.pt; the last two states are kept.
    The file is complete or absent: it is written beside, brought to the disk and then renamed."""
    os.makedirs(out, exist_ok=True)
    new = os.path.join(out, "state.tmp")
    with open(new, "wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, state_path(out, step))
    for former in saved_states(out)[:-2]:
        os.remove(state_path(out, former))


def read_state(out):
    """-> (step, value) of the newest state in `out`, tensors on the CPU; None if there is none. UserError if
    it is damaged."""
    steps = saved_states(out)
    if not steps:
        return None
    path = state_path(out, steps[-1])
    try:
        is_damaged = zipfile.ZipFile(path).testzip()  # torch.load does not look at the checksums
    except zipfile.BadZipFile:
        is_damaged = True
    if is_damaged:
        raise UserError(f"{path} is damaged: delete it, and the run goes on from the one before")
    return steps[-1], torch.load(path, map_location="cpu", weights_only=True)


def if_finite(number):
    """For JSON, which has no nan and no inf: None in their place."""
    return number if number is None or math.isfinite(number) else None


def open_log(path, lines):
    """A file of metrics, to be written on. Resumed: its lines up to the state, none lost, doubled or cut."""
    write_text(path, "".join(lines))
    return open(path, "a")


# ============================================================ settings, of which flags are made
class BySize(typing.NamedTuple):
    """A default that the model's size decides."""
    small: object  # of a model with less than 50 M parameters
    released: object  # of any other: as in the released code


SLOTS = BySize(240, 2048)  # per answer, latents included, where no flag says another number


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
    for name, (default, _, _) in [row for part in table.values() for row in part.items()]:
        if getattr(args, name) is None:
            setattr(args, name, default[not small] if isinstance(default, BySize) else default)


def beside_released(settings, table, idle=()):
    """What is not as released among the settings of a table, as text. idle: names that change nothing."""
    others = []
    for name, (default, _, _) in [row for part in table.values() for row in part.items()]:
        if isinstance(default, BySize) and name not in idle and settings[name] != default.released:
            others.append(f"{name} {settings[name]} (released: {default.released})")
    return f"not as released: {', '.join(others)}" if others else "all settings as released"


# ============================================================ the command line
class OneLinePerFlag(argparse.RawDescriptionHelpFormatter):
    def format_help(self):
        return re.sub(r"\n\n(?=[^\n]+:\n  -)", "\n", super().format_help())  # no empty line before a title

    def _format_action_invocation(self, action):
        name = super()._format_action_invocation(action)
        return re.sub(r"^--(.*), --no-\1$", r"--[no-]\1", name)


def parser(doc, table=()):
    """An argparse parser for a script with the docstring `doc`. --help shows its first paragraph and its
    indented ones, the usual commands; what else stands there is for readers of the script.

    table: the settings of which flags are made, {title: {name: (default, bound, what it is)}}. default: a
    value, a list (then the flag takes several words) or BySize. bound: the least number, an int or a float; a
    list of choices; str; or bool, a switch."""
    for word in [word.partition("=")[0] for word in sys.argv[1:]]:
        if word in OLD_FLAGS:
            raise UserError(f"{word} is now {OLD_FLAGS[word]}")
    first, *others = doc.split("\n\n")
    shown = [first] + [paragraph for paragraph in others if paragraph.startswith("    ")]
    style = functools.partial(OneLinePerFlag, max_help_position=29, width=110)
    ap = argparse.ArgumentParser(description="\n\n".join(shown), usage="%(prog)s [flags]", allow_abbrev=False,
                                 add_help=False, formatter_class=style)
    ap.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    for title, settings in dict(table).items():
        group = ap.add_argument_group(title)
        for name, (default, bound, what) in settings.items():
            shown, kind = default, {"default": default}
            if isinstance(default, BySize):
                shown = " | ".join(dict.fromkeys(map(str, default)))
                kind["default"] = None
            elif isinstance(default, list):
                shown = " ".join(default)
                kind["nargs"] = "+"
            if bound is bool:
                kind["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
            elif isinstance(bound, list):
                kind.update(choices=bound, metavar="WORD")
            else:
                of = bound if bound is str else type(bound)
                kind.update(type=of, metavar={int: "N", float: "X", str: "NAME"}[of])
            help = what if shown is None or isinstance(shown, bool) else f"{what} [{shown}]"
            group.add_argument(flag(name), help=help, **kind)
    return ap


def flag(name):
    return "--" + name.replace("_", "-")


def check_arguments(args, table):
    """UserError for a number below its bound, or if the device is not there. Makes the output directory."""
    for name, (_, bound, _) in [row for part in table.values() for row in part.items()]:
        value = getattr(args, name)
        if type(bound) in (int, float) and value is not None and not value >= bound:  # nan is not, too
            raise UserError(f"{flag(name)} is {value}; it must be at least {bound}")
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
    made = settings_in(out) | {"out": out, "resume": out, "overwrite": False}
    if made.get("script") != script or vars(args).keys() - made.keys():
        raise UserError(f"nothing to resume in {out!r}: it has no config.json of this version's {script}")
    settings = {name: made[name] for name in vars(args)}
    # What is in the namespace already takes no default.
    args = parser.parse_args(namespace=argparse.Namespace(**settings))
    args.resume = out  # the model/ in it may have been named
    changed = [name for name in settings if getattr(args, name) != settings[name] and name not in free]
    if changed:
        raise UserError(f"{flag(changed[0])}: a resumed run keeps the settings of {out}/config.json, save "
                        f"{' and '.join(map(flag, free))}")
    return args


# ============================================================ the directory of a run
# What a run writes there, but for its traces: they say themselves what they were made with.
WRITTEN = ("state-*.pt", "state.tmp", "model", "metrics.jsonl", "results.json", "before-rl.json",
           "bad-rollouts.json", "seconds.json", "imitation*", "stage-2*")


def take_directory(out, model, resumes=False, overwrite=False):
    """Makes this process the only one that writes into the directory of a run; keep the file that comes back.
    UserError if another process has it, or if a new run would replace another one, its own --model, or what
    no run has written."""
    file = open(os.path.join(out, "lock"), "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"another process is writing to {out}; wait for it, or choose another --out") from e
    if resumes:
        return file
    made, top = settings_in(out), os.path.abspath(out)
    is_foreign = "script" not in made and os.path.exists(os.path.join(out, "config.json"))
    if is_foreign or os.path.commonpath([top, os.path.abspath(model)]) == top:
        raise UserError(f"--out {out} holds --model {model}, or what no run wrote: choose another --out")
    has_states = any(saved_states(os.path.join(out, name)) for name in ("", "imitation", "stage-2"))
    if (has_states or os.path.exists(os.path.join(out, "results.json"))) and not overwrite:
        raise UserError(f"{out} holds a run of {made.get('script')} on {made.get('task')}: go on with "
                        f"--resume {out}, choose another --out, or replace it with --overwrite")
    return file


def begin(out, script, settings):
    """Writes config.json, which --resume and the other scripts read. settings: vars(args). A new run deletes
    what an earlier one has WRITTEN."""
    made = settings_in(out)
    if settings.get("resume") and made["examples"] != settings["examples"]:
        raise UserError(f"the examples of {settings['task']} are not those that the run in {out} began with: "
                        "set LITEREASON_DATA as then, prepare those again, or choose another --out")
    if not settings.get("resume") and "script" in made:
        for name in [name for pattern in WRITTEN for name in glob.glob(pattern, root_dir=out)]:
            path = os.path.join(out, name)
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    settings = {name: value for name, value in settings.items() if name not in ("resume", "overwrite")}
    settings = {"script": script, "base": base_of(settings["model"]), **settings}
    write_json(os.path.join(out, "config.json"), settings)


def digest(examples):
    """16 digits that change with the examples of a task."""
    text = json.dumps(examples, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def directory_of_run(path):
    """Of a run directory, or of the model/ in it."""
    parent, name = os.path.split(os.path.normpath(path))
    return parent if name == "model" and "script" in settings_in(parent) else os.path.normpath(path)


def settings_in(directory):
    """What its config.json says; {} without one."""
    return read_json(os.path.join(directory, "config.json"), {})


def run_settings(path):
    """What a run directory, or the model/ in it, was made with; {} if it is none."""
    return settings_in(directory_of_run(path))


def base_of(name):
    """The model that a run directory was trained from; any other model is its own base."""
    base = run_settings(name).get("base", name)
    return os.path.abspath(base) if os.path.isdir(base) else base


def default_out(model, task, method):
    """out/MODEL-TASK-METHOD: each kind of run has a directory of its own."""
    base = os.path.basename(os.path.normpath(base_of(model)))
    parts = [task, method] if task.split(".")[0] == base else [base, task, method]
    return os.path.join("out", "-".join(parts))


def read_json(path, default=None):
    """What the file holds; the default without one that can be read."""
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError):
        return default


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def write_text(path, text):
    """The whole file or, if that fails, the one that was there before."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


# ============================================================ seconds and memory
class Phases:
    """Seconds and peak GiB of each phase of a step; `end` closes the one since the last end. On CUDA the
    allocator's peak within the phase, on a CPU the process's so far."""

    def __init__(self, device):
        self.device, self.began = device, time.time()
        self.seconds, self.memory = {}, {}

    def end(self, name):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds[name] = round(time.time() - self.began, 3)
        self.memory[name] = round(peak / 2**30, 3)
        self.began = time.time()
