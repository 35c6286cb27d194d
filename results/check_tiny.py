"""Measures whether the paper's claim can fail in the tiny world: the three properties of data/tiny/readme.md.

Exits with 1 if one is missing: the base is imperfect by habit and RL mends it, the answer takes serial work,
and tags with nothing behind them lose the thread.

    python results/check_tiny.py                        # of the shipped base
    python results/check_tiny.py --model /tmp/base      # of another one that data/tiny/prepare.py made
"""
import os
import random
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

from data import tiny
from eval import PAPER, TRAINED, evaluate
from lib import memory, run
from litereason import load, logprobs
from results.baselines import row_of

SAMPLINGS = {"greedy": {"temperature": 0.0}, "the paper's": PAPER, "temperature 1": TRAINED}


def accuracy(model, tokenizer, latent_prompt, **settings):
    tests = tiny.examples("test")
    figures, _ = evaluate(model, tokenizer, tiny, tests, latent_prompt, latent="none", **settings)
    return figures["accuracy"]


def answers_at_once(path, n, steps, batch=32, lr=1e-3):
    """Fine-tunes the model on n gold answers, without reasoning -> its accuracy on the test stories."""
    model, tokenizer = load(path, "cpu")
    rows = [row_of(model, tokenizer, tiny.prompt(example, False), tiny.answer(example))
            for example in tiny.examples("train", n)]
    optimizer = torch.optim.AdamW(memory.base_parameters(model), lr=lr, weight_decay=0.01)
    rng = random.Random(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        logp, scored = logprobs(model, rng.sample(rows, batch))
        (-logp.sum() / scored.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return accuracy(model, tokenizer, False, at_once=True, temperature=0.0)


def properties(path, out):
    """Yields (what, its value, the least and the most that is wanted) of the model in a directory."""
    base = load(path, "cpu")
    plain = {name: accuracy(*base, False, max_new_tokens=200, **own) for name, own in SAMPLINGS.items()}
    for name, sampling in SAMPLINGS.items():
        tagged = accuracy(*base, True, max_new_tokens=200, **sampling)
        yield f"(3) what tags without latents cost, {name}", plain[name] - tagged, 0.05, 1
    for n, steps in ((480, 240), (4000, 600)):
        yield f"(2) answers at once, trained on {n} gold answers", answers_at_once(path, n, steps), 0, 0.75
    command = "train_rl.py --task tiny --method grpo --overlong-buffer 0 --n 0 --val 0".split()
    subprocess.run([sys.executable, *command, "--model", path, "--out", out], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)
    mended = load(out, "cpu")
    for name, sampling in SAMPLINGS.items():
        yield f"(1) the base, {name}", plain[name], 0.55, 0.85
        gain = accuracy(*mended, False, max_new_tokens=200, **sampling) - plain[name]
        yield f"(1) the gain of RL, {name}", gain, 0.1, 1


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--model", metavar="DIR", default=os.path.join(ROOT, "data", "tiny", "base"),
                        help="the base to measure [data/tiny/base]")
    path = os.path.abspath(parser.parse_args().model)
    failed = 0
    with tempfile.TemporaryDirectory() as out:
        for what, value, low, high in properties(path, out):
            holds = low <= value <= high
            failed += not holds
            said = "ok  " if holds else "FAIL"
            print(f"{said} {what}: {value:.3f} (wanted: {low:g} to {high:g})", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    run.run_script(main)
