"""Kills a tiny run of all stages at random moments, resumes it, kills it again; the end must be the end of a run left alone, bit for bit.

    python tests/kill.py --kills 50       # one kill each few seconds, the more the longer the run: its steps grow with the kills
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = ["--device", "cpu", "--n", "2", "--train-prompts", "8", "--prompts", "4", "--group", "4", "--minibatches", "2", "--max-new-tokens", "60",
         "--save-every", "1", "--show-every", "0", "--projector-steps", "2", "--trace-prompts", "8"]


def start(words, log):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "train_rl.py"), *words], env=env, stdout=log, stderr=subprocess.STDOUT)


def result(out):
    """All that a run leaves, but for what a clock or the operating system says."""
    weights = load_file(os.path.join(out, "model", "model.safetensors"))
    drop = lambda m: {k: v for k, v in m.items() if k not in ("seconds", "peak_memory_gib")}
    lines = [drop(json.loads(line)) for line in open(os.path.join(out, "metrics.jsonl"))]
    return weights, lines, [drop(r) for r in json.load(open(os.path.join(out, "results.json")))]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--kills", type=int, default=50)
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    at, rng = tempfile.mkdtemp(), random.Random(args.seed)
    alone, killed = os.path.join(at, "alone"), os.path.join(at, "killed")
    sizes, counts = SIZES + ["--steps", str(2 * args.kills + 4)], {}
    with open(os.path.join(at, "log"), "w+") as log:
        begin = time.time()
        assert start([*sizes, "--out", alone], log).wait() == 0, log.name
        whole, done = time.time() - begin, 0
        print(f"left alone: {whole:.0f}s; log in {log.name}", flush=True)
        while True:
            # --resume wants a config.json: killed before that, a run is just started again
            go_on = os.path.exists(os.path.join(killed, "config.json"))
            process = start(["--resume", killed] if go_on else [*sizes, "--out", killed], log)
            # Half of the kills fall on a moment drawn from what a process lives through, half on a state that is being written.
            left, writing = rng.randint(1, 4), False  # the how-manieth state
            target, until = rng.random() < 0.5, time.time() + rng.uniform(0.1, min(whole, 15 + 0.2 * whole))
            while process.poll() is None and done < args.kills:
                names = os.listdir(killed) if os.path.isdir(killed) else []
                before, writing = writing, any(".writing" in name for name in names)
                left -= writing and not before
                if (writing and left <= 0) if target else time.time() > until:
                    process.send_signal(signal.SIGKILL)
                    done += 1
                    where = "the writing of a state or model" if writing else "RL" if any(n.startswith("state-") for n in names) else "stages 1 and 2"
                    counts[where] = counts.get(where, 0) + 1
                time.sleep(0.001)
            if process.wait() == 0:
                break
            if process.returncode != -signal.SIGKILL:
                log.flush()
                sys.exit(f"ended with {process.returncode} after {done} kills; see {log.name}")
    a, b = result(alone), result(killed)
    equal = a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0]), a[1] == b[1], a[2] == b[2]
    print(f"{done} kills ({', '.join(f'{n} in {k}' for k, n in counts.items())}): weights, metrics, table equal: {equal}")
    if not all(equal) or done < args.kills:
        sys.exit(f"not equal, or the run came to its end before the last kill; both are in {at}")
    shutil.rmtree(at)


if __name__ == "__main__":
    main()
