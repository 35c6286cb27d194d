"""Can latents carry what an answer needs? A probe, as favourable as it can be, of the world, the recipe and the method (README, What came out).

In the trained policy of the tiny world latents are idle: what is true is looked up in words. Here the look-up is taken away: the answer to the
plot-hole prompt begins with K latents, so whatever is not said after them goes through them, or the verdict is a guess (0.5). Gold answers, 4,000
stories, the base frozen, greedy decoding, and three things to vary:

    things   events that have to be read: a story of 1, 2 or 8 things, each put and fetched once (the base has read stories of 8)
    K        length of the unroll
    recipe   paper: stage 2 as in the paper: the projector starts as copies of the last MLP, cross-entropy on the box after the block
             words: no stage 2; the projector learns on written look-ups to feed the embedding of the word that comes next, by squared error
             words, then paper: one after the other, the second with a tenth of the learning rate
             base too: as paper, but the base is trained as well (Coconut's SFT without stages, with a projector)

Each is then run with its own latents and with those of another story in their order. If the first is right and the second a guess, the latents
carry the answer.

    python results/needed.py            # 15 minutes on one core; writes results/needed.json and the README's table
"""
import argparse
import functools
import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import torch
from tqdm import tqdm

from data import tiny
from eval import evaluate, latent_of
from litereason import LATENT, Rollout, control_projector, load, projector_loss, states
from results.reproduce import into_readme
from runs import run_script, write_json

# (recipe, things, K): one dimension at a time; a written look-up has 18 words
RUNS = [("paper", 8, 1), ("paper", 8, 5), ("paper", 8, 18), ("paper", 2, 5), ("paper", 1, 5), ("words", 8, 8), ("words", 8, 16), ("words", 8, 18),
        ("words, then paper", 8, 18), ("words, then paper", 8, 10), ("words, then paper", 8, 5), ("base too", 8, 5), ("base too", 8, 18)]


def stories(split, n, things, seed=0):
    rng, rows = random.Random(f"{split} {things} {seed}"), []
    while len(rows) < n:
        row = tiny.make_story(rng, len(rows) % 2, things)
        if tiny.split_of(row["story"]) == split:
            rows.append(row)
    return rows


def look_up(row):
    """What a careful reader writes about the thing that is asked for."""
    thing, put, found = next(step for step in row["steps"] if step[0] == row["asked"])
    verdict = "fine" if tiny.NAMES[put] == found else "clash"
    return f"look for the {thing} in the story : put {thing} {put} , got {thing} {found} , {verdict} . "


def batches(rows, size, steps, seed):
    rng = random.Random(seed)
    for _ in range(steps):
        yield rng.sample(rows, size)


@functools.cache
def words_first(things, steps=1500, peak=2e-3):
    """P(h_t) = the embedding of word t + 1 of a written look-up, by squared error; the base is frozen -> P's weights, and the error on
    new stories as a share of the embeddings' own spread."""
    model, tokenizer = load("tiny")
    torch.manual_seed(0)
    projector = control_projector(model, "random")  # the warm start's outputs are a million embeddings long
    optimizer = torch.optim.AdamW(projector.parameters(), lr=peak, weight_decay=0.0)

    def error(rows):
        some = [Rollout(tokenizer.encode(tiny.prompt(r, True)), tokenizer.encode(look_up(r) + tiny.answer(r)), torch.zeros(0, 128)) for r in rows]
        with torch.no_grad():
            h, slots, valid = states(model, some)  # h[b, s] predicts slots[b, s]
            gold = model.get_input_embeddings()(slots[valid])  # (M, D)
        return (projector(h[valid]) - gold).square().mean() / gold.var()

    train = stories("train", 4000, things)
    for step, batch in enumerate(tqdm(batches(train, 32, steps, "words"), total=steps, desc="words first", leave=False)):
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 40, 0.05 + 0.95 * (steps - step) / steps)
        error(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return projector.state_dict(), float(error(stories("val", 100, things)))


def probe(recipe, things, K, steps):
    model, tokenizer = load("tiny")
    train, test, error = stories("train", 4000, things), stories("test", 300, things), None
    if recipe.startswith("words"):
        start, error = words_first(things)
        model.reasoning_projector.load_state_dict(start)
    base = [p for n, p in model.named_parameters() if not n.startswith("reasoning_projector.")]
    for p in base:
        p.requires_grad_(recipe == "base too")
    groups = [{"params": list(model.reasoning_projector.parameters()), "lr": 1e-4 if error else 1e-3}] + [{"params": base, "lr": 3e-4}] * (recipe == "base too")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    peaks, steps, loss, tokens = [g["lr"] for g in optimizer.param_groups], 0 if recipe == "words" else steps, None, 1
    for step, batch in enumerate(tqdm(batches(train, 32, steps, f"{recipe} {K}"), total=steps, desc=f"{recipe}, {things} things, K = {K}", leave=False)):
        for g, peak in zip(optimizer.param_groups, peaks):
            g["lr"] = peak * min(1, (step + 1) / 40, 0.1 + 0.9 * (steps - step) / steps)
        some = [Rollout(tokenizer.encode(tiny.prompt(r, True)), [LATENT] * K + tokenizer.encode(tiny.answer(r)) + [tokenizer.eos_token_id],
                        torch.zeros(0, 128)) for r in batch]
        loss, tokens = projector_loss(model, some)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    say = dict(seed=0, max_new_tokens=K + 60, temperature=0, tag=0, start=K)
    own = evaluate(model, tokenizer, tiny, test, **say)[0]
    other = latent_of("other", model, [r.latents for r in evaluate(model, tokenizer, tiny, stories("val", 200, things), **say)[1]])
    swapped = evaluate(model, tokenizer, tiny, test, latent=other, **say)[0]
    return {"recipe": recipe, "things": things, "K": K, "own": own["accuracy"], "own_ci95": own["accuracy_ci95"], "text_tokens": own["text_tokens"],
            "other": swapped["accuracy"], "other_ci95": swapped["accuracy_ci95"], "loss": loss and float(loss.detach()) / tokens, "words_error": error}


def table_of(rows):
    lines = ["| recipe | things | K | text | right, its own latents | 95 % interval | right, another story's | 95 % interval |", "|---|---|---|---|---|---|---|---|"]
    say = lambda r, which: f"{r[which]:.3f} | {r[which + '_ci95'][0]:.3f} to {r[which + '_ci95'][1]:.3f}"
    return "\n".join(lines + [f"| {r['recipe']} | {r['things']} | {r['K']} | {r['text_tokens']:.1f} | {say(r, 'own')} | {say(r, 'other')} |" for r in rows])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=400, help="optimiser steps of stage 2, of 32 stories each")
    ap.add_argument("--runs", type=int, nargs="+", default=range(len(RUNS)), choices=range(len(RUNS)), metavar="I", help="which of RUNS, from 0")
    args = ap.parse_args()
    rows = []
    for i in args.runs:
        start = time.time()
        rows.append({**probe(*RUNS[i], args.steps), "seconds": time.time() - start})
        print("{recipe:17} things {things} K {K:2d} | own latents {own:.3f} | another story's {other:.3f} | text {text_tokens:.1f} | loss {loss} | "
              "words' error {words_error} | {seconds:.0f}s".format(**rows[-1]), flush=True)
    if len(rows) == len(RUNS):
        write_json(os.path.join(HERE, "needed.json"), rows)
        into_readme("needed", table_of(rows))


if __name__ == "__main__":
    run_script(main)
