"""Measures which start of the projector holds on real weights; rows go to starts-real.json here.

For each model and start: how large latents are along a chain of five, the loss after the first tag before and
after 30 steps of stage 2, with the row's own latents and with another row's, and the gradient's norms.

    mlp       the paper's: three copies of the last block's MLP, one after the other
    normed    a norm behind each copy (litereason.NormedProjector)
    pause     one learned vector, whatever h is (a control: what a constant can do)

The other starts in starts-real.json were measured at commit 8e3502b, where this script has them; "scaled" is
mlp with each copy's output scaled once, on one text, to the size of what it reads, the last one's to an
embedding's. Traces: a sentence of a tale as the prompt, three more of which one becomes a tag, and a fifth.
They are not the model's own (a small model earns too few), so this measures the start and not the method.

    python results/starts.py --text TALES.jsonl --models DIR DIR DIR          # 2 hours on a core
    python results/starts.py --text TALES.jsonl --models DIR --starts mlp normed --seeds 0 1 2
    python results/starts.py                                                  # the table of what is kept
"""
import collections
import dataclasses
import itertools
import json
import os
import random
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import torch

import data
from lib import checkpoint, run
from litereason import (LATENT, Rollout, insert_latents, load, logprobs, projector_loss, start_projector,
                        unroll, z_size)
from train_projector import mask_sentences, sentences_of, warm_up_and_cosine

PATH = os.path.join(HERE, "starts-real.json")
HELD, BATCH, PROMPT, LENGTH = 24, 4, 24, 72  # rows held out, rows a step, most tokens of prompt and of trace
STEPS, CHAIN = 30, 5
STARTS = ("mlp", "normed", "pause")


# ============================================================ the traces
def traces_of(model, tokenizer, tales, seed):
    """[Rollout], shuffled, each with a tag and at least eight tokens behind it."""
    rng = random.Random(seed)
    fives = []
    for tale in tales:
        for section in tale["sections"]:
            sentences = sentences_of(" ".join(section.split()))
            fives += [sentences[i : i + 5] for i in range(0, len(sentences) - 4, 5)]
    rng.shuffle(fives)
    rows = []
    for first, *middle, last in fives[:1000]:
        masked = mask_sentences(rng, tokenizer, " ".join(middle), 0.34)
        text = checkpoint.encode_text(tokenizer, masked + " " + last)[:LENGTH]
        slots = insert_latents(model, tokenizer, text)
        if LATENT in slots and slots[::-1].index(LATENT) >= 8:
            prompt = tokenizer.encode(first)[-PROMPT:]
            rows.append(Rollout(prompt, slots, torch.zeros(0, model.config.hidden_size)))
    return rows


# ============================================================ what is measured
@torch.no_grad()
def loss_of(model, rows, latent="projector"):
    parts = [projector_loss(model, rows[i : i + 8], latent) for i in range(0, len(rows), 8)]
    return float(sum(loss for loss, _ in parts)) / sum(n for _, n in parts)


@torch.no_grad()
def with_own_and_other(model, rows):
    """The loss with each row's own latents, and with those of the next row that has as many."""
    _, latents = unroll(model, rows)
    groups = collections.defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.n_latents].append(i)
    losses = []
    for shift in (0, 1):
        costs = []
        for group in groups.values():
            for a, b in zip(group, group[shift:] + group[:shift]) if len(group) > 1 else ():
                logp, scored = logprobs(model, [dataclasses.replace(rows[a], latents=latents[b])])
                first = rows[a].slots.index(LATENT)
                costs.append(-logp[0, first:][scored[0, first:]])
        losses.append(float(torch.cat(costs).mean()))
    return losses


@torch.no_grad()
def chain_of(model, rows):
    """[median size of z_1, .. z_5], in sizes of an embedding, of five latents at the first tag."""
    cut = []
    for row in rows[:12]:
        before = row.slots[: row.slots.index(LATENT)]
        cut.append(dataclasses.replace(row, slots=[*before, *[LATENT] * CHAIN, row.slots[-1]]))
    _, latents = unroll(model, cut)
    return [run.if_finite(z_size(model, z)) for z in torch.stack(latents).unbind(1)]


def measure(path, tales, start, seed, steps, lr):
    """A start of a model, before and after `steps` steps of stage 2 -> the figures of its row."""
    torch.manual_seed(seed)
    model, tokenizer = load(path)
    start_projector(model, start)
    rows = traces_of(model, tokenizer, tales, seed)
    held, train = rows[:HELD], rows[HELD:]
    before = {
        "no latents": loss_of(model, held, "none"), "zeros": loss_of(model, held, "zeros"),
        "chain before": chain_of(model, held), "loss before": loss_of(model, held)}

    model.requires_grad_(False)
    model.reasoning_projector.requires_grad_(True)
    weights = list(model.reasoning_projector.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * warm_up_and_cosine(step, steps, max(1, steps // 10))
        loss, n = projector_loss(model, [train[(step * BATCH + i) % len(train)] for i in range(BATCH)])
        (loss / n).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, 0.2)))
        if torch.tensor(norms[-1]).isfinite():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    own, other = with_own_and_other(model, held)
    norms.sort()
    return {**before, "loss after": loss_of(model, held), "own": own, "other": other,
            "chain after": chain_of(model, held), "gradient": [norms[0], norms[len(norms) // 2], norms[-1]]}


# ============================================================ the table
def table(rows):
    lines = ["| model | start | lr | seed | z_1 .. z_5, in sizes of an embedding | after training "
             "| no latents, zeros | loss before | loss after | own, another's latents | gradient norms |",
             f"|{'---|' * 11}"]
    for row in rows:
        lines.append(f"| {row['model']} | {row['start']} | {row['lr']:g} | {row['seed']} "
                     f"| {numbers(row['chain before'])} | {numbers(row['chain after'])} "
                     f"| {row['no latents']:.3f}, {row['zeros']:.3f} | {row['loss before']:.3f} "
                     f"| {row['loss after']:.3f} | {row['own']:.3f}, {row['other']:.3f} "
                     f"| {numbers(row['gradient'])} |")
    return "\n".join(lines)


def numbers(values):
    return ", ".join("not finite" if value is None else f"{value:.2g}" for value in values)


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--models", nargs="+", metavar="DIR", default=[], help="checkpoints (default none)")
    parser.add_argument("--text", metavar="FILE", help="tales as jsonl, each with sections")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the traces (default 0)")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak rate (default the paper's 1e-4)")
    args = parser.parse_args()
    with open(PATH) as file:
        rows = json.load(file)
    if args.models and not args.text:
        parser.error("--models needs --text")
    tales = [tale for _, tale in data.read_rows(args.text)] if args.models else []
    for path, seed, start in itertools.product(args.models, args.seeds, args.starts):
        name = os.path.basename(os.path.normpath(path))
        asked = {"model": name, "start": start, "seed": seed, "lr": args.lr, "steps": STEPS}
        if not any(asked.items() <= row.items() for row in rows):
            rows.append({**asked, **measure(path, tales, start, seed, STEPS, args.lr)})
            run.write_json(PATH, rows)
    print(table(rows))


if __name__ == "__main__":
    run.run_script(main)
