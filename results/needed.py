"""Can latents carry what an answer needs? A probe, as favourable as it can be, of the world, the recipe and
the method (README, What came out).

In the trained policy of the tiny world latents are idle: what is true is looked up in words. Here the
look-up is taken away: the answer to the plot-hole prompt begins with K latents, so whatever is not said
after them goes through them, or the verdict is a guess (0.5). Gold answers, 4,000 stories, the base frozen,
greedy decoding, and three things to vary:

    things   events that have to be read: a story of 1, 2 or 8 things, each put and fetched once (the base has
             read stories of 8)
    K        length of the unroll
    recipe   paper: stage 2 as in the paper: the projector starts as copies of the last MLP, cross-entropy on
                 the box after the block
             words: no stage 2; the projector learns on written look-ups to feed the embedding of the word
                 that comes next, by squared error
             words, then paper: one after the other, the second with a tenth of the learning rate
             base too: as paper, but the base is trained as well (Coconut's SFT without stages, with a
                 projector)

Each is then run with its own latents and with those of another story in their order. If the first is right
and the second a guess, the latents carry the answer.

    python results/needed.py    # 15 minutes on one core; writes results/needed.json and the README's table
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

import engine
import runs
from data import tiny
from eval import evaluate, latent_of
from litereason import LATENT, Rollout, load, projector_loss, start_projector, states
from results.reproduce import into_readme

# (recipe, things, K): one dimension at a time; a written look-up has 18 words
RUNS = [("paper", 8, 1), ("paper", 8, 5), ("paper", 8, 18), ("paper", 2, 5), ("paper", 1, 5),
        ("words", 8, 8), ("words", 8, 16), ("words", 8, 18),
        ("words, then paper", 8, 18), ("words, then paper", 8, 10), ("words, then paper", 8, 5),
        ("base too", 8, 5), ("base too", 8, 18)]


def stories(split, n, things, seed=0):
    """n stories of the split with so many things, every second one with an error."""
    rng = random.Random(f"{split} {things} {seed}")
    rows = []
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


def batches(rows, steps, seed, progress):
    """`steps` times 32 rows drawn by chance, behind a progress bar -> (number of the step, rows)."""
    rng = random.Random(seed)
    for step in tqdm(range(steps), desc=progress, leave=False):
        yield step, rng.sample(rows, 32)


def warm_up_and_decay(step, steps, floor):
    """The learning rate, as a share of its peak: up over 40 steps, then down to `floor`."""
    return min(1, (step + 1) / 40, floor + (1 - floor) * (steps - step) / steps)


@functools.cache
def words_first(things, steps=1500, peak=2e-3):
    """P(h_t) = the embedding of word t + 1 of a written look-up, by squared error; the base is frozen ->
    P's weights, and the error on new stories as a share of the embeddings' own spread."""
    model, tokenizer = load("tiny")
    torch.manual_seed(0)
    start_projector(model, "random")  # the warm start's outputs are a million embeddings long
    projector = model.reasoning_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=peak, weight_decay=0.0)
    no_latents = torch.zeros(0, model.config.hidden_size)

    def error(rows):
        written = []
        for row in rows:
            slots = tokenizer.encode(look_up(row) + tiny.answer(row))
            written.append(Rollout(tokenizer.encode(tiny.prompt(row, True)), slots, no_latents))
        with torch.no_grad():
            h, slots, valid = states(model, written)  # h[b, s] predicts slots[b, s]
            gold = model.get_input_embeddings()(slots[valid])  # (M, D)
        z, _ = projector(h[valid])
        return (z - gold).square().mean() / gold.var()

    train = stories("train", 4000, things)
    for step, rows in batches(train, steps, "words", "words first"):
        optimizer.param_groups[0]["lr"] = peak * warm_up_and_decay(step, steps, 0.05)
        error(rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return projector.state_dict(), float(error(stories("val", 100, things)))


def optimizer_of(model, recipe):
    """AdamW over what the recipe trains; the rest is frozen."""
    projector = list(model.reasoning_projector.parameters())
    base = engine.base_parameters(model)
    groups = [{"params": projector, "lr": 1e-4 if recipe.startswith("words") else 1e-3}]
    if recipe == "base too":
        groups.append({"params": base, "lr": 3e-4})
    for p in base:
        p.requires_grad_(recipe == "base too")
    return torch.optim.AdamW(groups, weight_decay=0.0)


def learn_to_answer(model, tokenizer, recipe, things, K, steps):
    """Stage 2 on answers that follow K latents at once -> the last batch's loss per token, if any."""
    optimizer = optimizer_of(model, recipe)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    peaks = [group["lr"] for group in optimizer.param_groups]
    no_latents = torch.zeros(0, model.config.hidden_size)
    train = stories("train", 4000, things)
    per_token = None
    for step, rows in batches(train, steps, f"{recipe} {K}", f"{recipe}, {things} things, K = {K}"):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * warm_up_and_decay(step, steps, 0.1)
        traces = []
        for row in rows:
            prompt = tokenizer.encode(tiny.prompt(row, True))
            answer = tokenizer.encode(tiny.answer(row)) + [tokenizer.eos_token_id]
            traces.append(Rollout(prompt, [LATENT] * K + answer, no_latents))
        loss, tokens = projector_loss(model, traces)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        per_token = float(loss.detach()) / tokens
    return per_token


def probe(recipe, things, K, steps):
    """One run: trains, then answers test stories with its own latents and with another story's -> a row."""
    model, tokenizer = load("tiny")
    error = None
    if recipe.startswith("words"):
        start, error = words_first(things)
        model.reasoning_projector.load_state_dict(start)
    loss = learn_to_answer(model, tokenizer, recipe, things, K, 0 if recipe == "words" else steps)

    decoding = dict(seed=0, max_new_tokens=K + 60, temperature=0, tag=0, start=K)
    test = stories("test", 300, things)
    own, _ = evaluate(model, tokenizer, tiny, test, **decoding)
    _, rollouts = evaluate(model, tokenizer, tiny, stories("val", 200, things), **decoding)
    another = latent_of("other", model, [rollout.latents for rollout in rollouts])
    other, _ = evaluate(model, tokenizer, tiny, test, latent=another, **decoding)
    return {"recipe": recipe, "things": things, "K": K,
            "own": own["accuracy"], "own_ci95": own["accuracy_ci95"], "text_tokens": own["text_tokens"],
            "other": other["accuracy"], "other_ci95": other["accuracy_ci95"],
            "loss": loss, "words_error": error}


def table_of(rows):
    """-> Markdown."""
    lines = ["| recipe | things | K | text | right, its own latents | 95 % interval | right, another story's | "
             "95 % interval |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["recipe"], row["things"], row["K"], f"{row['text_tokens']:.1f}"]
        for latents in ("own", "other"):
            low, high = row[f"{latents}_ci95"]
            cells += [f"{row[latents]:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400,
                        help="optimiser steps of stage 2, of 32 stories each")
    parser.add_argument("--runs", type=int, nargs="+", default=range(len(RUNS)), choices=range(len(RUNS)),
                        metavar="I", help="which of RUNS, from 0")
    return parser.parse_args()


def main():
    args = parse_arguments()
    rows = []
    for i in args.runs:
        start = time.time()
        row = probe(*RUNS[i], args.steps)
        rows.append({**row, "seconds": time.time() - start})
        line = ("{recipe:17} things {things} K {K:2d} | own latents {own:.3f} | another story's {other:.3f} | "
                "text {text_tokens:.1f} | loss {loss} | words' error {words_error} | {seconds:.0f}s")
        print(line.format(**rows[-1]), flush=True)
    if len(rows) == len(RUNS):
        runs.write_json(os.path.join(HERE, "needed.json"), rows)
        into_readme("needed", table_of(rows))


if __name__ == "__main__":
    runs.run_script(main)
