"""Can latents carry what an answer needs? A probe, as favourable as it can be, of the world, the recipe and the method (README, What came out).

In the trained policy of the tiny world latents are idle: what is true is looked up in words. Here there are no words: the answer to the plot-hole
prompt is K latents and then the box, so whatever the answer needs goes through the latents, or the answer is a guess (0.5). Gold answers, 4,000
stories, the stage 2 of the paper (cross-entropy on the text after the block, through all latents), and three things to vary:

    things   events that have to be read: a story of 1, 2, 4 or 8 things, each put and fetched once (the base has read stories of 8)
    K        length of the unroll
    recipe   paper: the projector starts as copies of the last MLP, the base is frozen
             words first: before that it learns on a written look-up to feed the next word's own embedding, so that a latent is a word unsaid
             base too: as paper, but the base is trained as well (then it is Coconut's SFT without stages, with a projector)

Each is then run with its own latents, with those of another story in their order, and with none. If the first is right and the second a guess,
the latents carry the answer.

    python results/needed.py            # 20 minutes on one core; writes results/needed.json and the README's table
"""
import argparse
import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import torch
from tqdm import tqdm

from data import tiny
from eval import evaluate, latent_of, write_json
from litereason import LATENT, Rollout, load, projector_loss, run_script, states
from results.reproduce import into_readme

# (recipe, things, K): one dimension at a time around the middle
RUNS = [("paper", 8, 1), ("paper", 8, 5), ("paper", 8, 16), ("paper", 4, 5), ("paper", 2, 5), ("paper", 1, 5),
        *(("words first", 8, k) for k in (1, 2, 5, 10, 16, 20)), ("words first", 2, 5), ("words first", 1, 5), ("base too", 8, 5), ("base too", 8, 16)]


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


def words_first(model, tokenizer, rows, steps, lr=1e-3):
    """P(h_t) = the embedding of word t + 1 of a written look-up, by squared error; the base is frozen. -> the last error, as a share of
    the embeddings' own spread."""
    embed = model.get_input_embeddings()
    optimizer = torch.optim.AdamW(model.reasoning_projector.parameters(), lr=lr, weight_decay=0.0)
    for batch in batches(rows, 32, steps, "words"):
        some = [Rollout(tokenizer.encode(tiny.prompt(r, True)), tokenizer.encode(look_up(r) + tiny.answer(r)), torch.zeros(0, 128)) for r in batch]
        with torch.no_grad():
            h, slots, valid = states(model, some)  # h[b, s] predicts slots[b, s]
            gold = embed(slots[valid])  # (M, D)
        error = (model.reasoning_projector(h[valid]) - gold).square().mean() / gold.var()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(error.detach())


def probe(recipe, things, K, steps):
    model, tokenizer = load("tiny")
    train, test = stories("train", 4000, things), stories("test", 300, things)
    base = [p for n, p in model.named_parameters() if not n.startswith("reasoning_projector.")]
    for p in base:
        p.requires_grad_(recipe == "base too")
    error = words_first(model, tokenizer, train, 400) if recipe == "words first" else None
    groups = [{"params": list(model.reasoning_projector.parameters()), "lr": 1e-3}] + [{"params": base, "lr": 3e-4}] * (recipe == "base too")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    peaks = [g["lr"] for g in optimizer.param_groups]
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
    say = dict(seed=0, max_new_tokens=K + 12, temperature=0, tag=0)
    own, rollouts = evaluate(model, tokenizer, tiny, test, start=K, **say)
    other = latent_of("other", model, [r.latents for r in evaluate(model, tokenizer, tiny, stories("val", 200, things), start=K, **say)[1]])
    return {"recipe": recipe, "things": things, "K": K, "own": own["accuracy"], "own_ci95": own["accuracy_ci95"], "loss": float(loss.detach()) / tokens,
            "other": evaluate(model, tokenizer, tiny, test, start=K, latent=other, **say)[0]["accuracy"],
            "none": evaluate(model, tokenizer, tiny, test, **say)[0]["accuracy"], "words_error": error}


def table_of(rows):
    lines = ["| recipe | things | K | its own latents | 95 % interval | another story's | none |", "|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['recipe']} | {r['things']} | {r['K']} | {r['own']:.3f} | {r['own_ci95'][0]:.3f} to {r['own_ci95'][1]:.3f} | "
                              f"{r['other']:.3f} | {r['none']:.3f} |" for r in rows])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=600, help="optimiser steps of stage 2, of 32 stories each")
    ap.add_argument("--runs", type=int, nargs="+", default=range(len(RUNS)), help="which of RUNS")
    args = ap.parse_args()
    rows = []
    for i in args.runs:
        start = time.time()
        rows.append({**probe(*RUNS[i], args.steps), "seconds": time.time() - start})
        print("{recipe:12} things {things} K {K:2d} | own latents {own:.3f} | another story's {other:.3f} | none {none:.3f} | loss {loss:.3f} | "
              "words' error {words_error} | {seconds:.0f}s".format(**rows[-1]), flush=True)
    if len(rows) == len(RUNS):
        write_json(os.path.join(HERE, "needed.json"), rows)
        into_readme("needed", table_of(rows))


if __name__ == "__main__":
    run_script(main)
