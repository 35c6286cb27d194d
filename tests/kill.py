"""Kills a tiny run of all stages at random moments, resumes it, kills it again; the end must be the end of a
run left alone, bit for bit.

    python tests/kill.py 60       # kills, a third of them in each stage: traces, projector, RL

Half of the kills fall on a moment that a clock draws. In the other half the process, a fork of this one,
kills itself before or after the n-th call that changes the disk, or with only a part of a file on it."""
import collections
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from test_resume import same

import train_projector
import train_rl
from lib import run as runs

torch.set_num_threads(1)
train_projector.VERSIONS, train_projector.AT_ONCE = 1, 4  # stage 1 in 120 short batches
SIZES = ["--device", "cpu", "--n", 2, "--val", 2, "--train-prompts", 8, "--prompts", 4,
         "--num-generations", 4, "--minibatches", 2, "--max-new-tokens", 80, "--save-every", 1,
         "--show-every", 0, "--trace-prompts", 480]
DISK = [(os, "mkdir"), (os, "makedirs"), (os, "rename"), (os, "replace"), (os, "remove"), (os, "fsync"),
        (shutil, "rmtree"), (torch, "save")]


def kill_at(n, half):
    """From now on this process dies at the n-th call of DISK, or, with half, after the one before, and what
    that brought to the disk is cut."""

    def watched(real, name):
        def call(*args, **kwargs):
            nonlocal n
            n -= 1
            if n == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            out = real(*args, **kwargs)
            if n == 1 and half:
                if name == "fsync":
                    os.truncate(args[0], max(0, os.fstat(args[0]).st_size - 1000))
                os.kill(os.getpid(), signal.SIGKILL)
            return out
        return call

    for module, name in DISK:
        setattr(module, name, watched(getattr(module, name), name))


def train(words, log, n, half):
    """train_rl.py, in a fork of this process; n > 0: see kill_at."""
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.argv = ["train_rl.py", *map(str, words)]
    if n:
        kill_at(n, half)
    runs.run_script(train_rl.main)


def start(*args):
    child = multiprocessing.get_context("fork").Process(target=train, args=args)
    child.start()
    return child


def stage(out):
    """Where a run is, by what it has left so far."""
    if runs.saved_states(out):
        return "RL"
    return "projector" if runs.saved_states(out / "stage-2") else "traces"


def main():
    share = -(-int(sys.argv[1] if sys.argv[1:] else 60) // 3)  # kills in each stage
    begin, at, rng = time.time(), pathlib.Path(tempfile.mkdtemp()), random.Random(0)
    alone, killed = at / "alone", at / "killed"
    sizes = [*SIZES, "--projector-steps", 3 * share, "--steps", 3 * share]
    kills = collections.Counter()  # (stage, how)

    def wanted(s):
        return kills[s, "clock"] + kills[s, "disk"] < share

    with open(at / "log", "w+") as log:
        child = start([*sizes, "--out", alone], log, 0, False)
        child.join()
        print(f"left alone: {time.time() - begin:.0f}s; log in {log.name}", flush=True)
        while child.exitcode in (0, -signal.SIGKILL):
            # --resume wants a config.json: killed before that, a run is just started again
            is_there = (killed / "config.json").exists()
            words = ["--resume", killed] if is_there else [*sizes, "--out", killed]
            disk = rng.random() < 0.5 and wanted(stage(killed))
            n = rng.randint(1, 4 if stage(killed) == "traces" else 50) if disk else 0  # stage 1 calls 5 times
            child = start(words, log, n, rng.random() < 0.5)
            child.join(None if disk else rng.uniform(0.1, 2))
            while child.is_alive():
                if wanted(stage(killed)):
                    child.kill()
                child.join(0.001)
            if child.exitcode == 0:
                break
            kills[stage(killed), "disk" if disk else "clock"] += 1
        else:
            sys.exit(f"ended with {child.exitcode}; see {log.name}")
    left = [((out / "traces.jsonl").read_text(), sorted(os.listdir(out))) for out in (alone, killed)]
    equal = {"weights, metrics and table": same(alone, killed), "traces and files": left[0] == left[1]}
    print(f"{sum(kills.values())} kills in {time.time() - begin:.0f}s: "
          + ", ".join(f"{s} {n} by {how}" for (s, how), n in kills.items()))
    print("equal to the run left alone: " + ", ".join(f"{what} {yes}" for what, yes in equal.items()))
    if not all(equal.values()) or any(map(wanted, ("traces", "projector", "RL"))):
        sys.exit(f"not equal, or a stage came to its end before its last kill; both are in {at}")
    shutil.rmtree(at)


if __name__ == "__main__":
    main()
