"""Can the paper's claim fail in the tiny world? Measures the three properties of data/tiny/readme.md and
exits with 1 if one is missing: the base is imperfect by habit and RL mends it, the answer takes serial work,
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

from lib import memory, run
from data import tiny
from eval import PAPER, TRAINED, evaluate
from litereason import Rollout, load, logprobs

SAMPLINGS = {"greedy": {"temperature": 0.0}, "the paper's": PAPER, "temperature 1": TRAINED}


def check(path):
    """Prints the three properties of readme.md for the model in a directory -> 0 if it has them, else 1."""
    failures = []

    def say(what, value, low, high):
        holds = low <= value <= high
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {value:.3f} (wanted: {low:g} to {high:g})", flush=True)
        failures.extend([] if holds else [what])

    def accuracy(name, latent_prompt, **settings):
        model, tokenizer = load(name, "cpu")
        figures, _ = evaluate(model, tokenizer, tiny, tests, latent_prompt, latent="none", max_new_tokens=200,
                              **settings)
        print(f"     {name}, {'tag' if latent_prompt else 'plain'} prompt, {settings}: "
              f"{figures['accuracy']:.3f} in {figures['tokens']:.1f} tokens", flush=True)
        return figures["accuracy"]

    tests = tiny.examples("test")
    # (3) Tags with nothing behind them lose the thread.
    for name, sampling in SAMPLINGS.items():
        gain = accuracy(path, False, **sampling) - accuracy(path, True, **sampling)
        say(f"(3) what tags without latents cost, {name}", gain, 0.05, 1)
    # (2) The answer takes serial work.
    for n, steps in ((480, 240), (4000, 600)):
        say(f"(2) answers at once, trained on {n} gold answers", answers_at_once(path, n, steps), 0, 0.75)
    # (1) The base is imperfect by habit, and RL mends it.
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, os.path.join(ROOT, "train_rl.py"), "--model", path, "--task", "tiny",
                   "--method", "grpo", "--overlong-buffer", "0", "--n", "0", "--val", "0",
                   "--out", os.path.join(out, "grpo")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name, sampling in SAMPLINGS.items():
            base = accuracy(path, False, **sampling)
            say(f"(1) the base, {name}", base, 0.55, 0.85)
            gain = accuracy(os.path.join(out, "grpo"), False, **sampling) - base
            say(f"(1) the gain of RL, {name}", gain, 0.1, 1)
    return 1 if failures else 0


def answers_at_once(path, n, steps, batch=32, lr=1e-3):
    """Fine-tunes the model to answer without reasoning, on n gold answers
    -> its accuracy on the test stories."""
    model, tokenizer = load(path, "cpu")
    nothing = torch.zeros(0, model.config.hidden_size)
    rows = []
    for example in tiny.examples("train", n):
        answer = tokenizer.encode(tiny.answer(example)) + [tokenizer.eos_token_id]
        rows.append(Rollout(tokenizer.encode(tiny.prompt(example, False)), answer, nothing))
    optimizer = torch.optim.AdamW(memory.base_parameters(model), lr=lr, weight_decay=0.01)
    rng = random.Random(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        logp, scored = logprobs(model, rng.sample(rows, batch))
        (-logp.sum() / scored.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = {"latent": "none", "at_once": True, "temperature": 0.0}
    seen, _ = evaluate(model, tokenizer, tiny, tiny.examples("train", n)[:500], False, **settings)
    figures, _ = evaluate(model, tokenizer, tiny, tiny.examples("test"), False, **settings)
    print(f"     at once after {n} gold answers: {seen['accuracy']:.3f} on the training stories", flush=True)
    return figures["accuracy"]


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--model", metavar="DIR", default=os.path.join(ROOT, "data", "tiny", "base"),
                        help="the base to measure (default data/tiny/base)")
    sys.exit(check(parser.parse_args().model))


if __name__ == "__main__":
    run.run_script(main)
