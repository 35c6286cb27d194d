"""Measures which start of the projector holds on real weights; rows go to starts-real.json here.

For each model and start (of litereason.PROJECTORS; pause is a control, what a constant can do): how large
latents are along a chain of five, the loss after the first tag before and after 30 steps of stage 2, with the
row's own latents and with another row's, and the gradient's norms.

The other starts in starts-real.json were measured at commit 8e3502b, where this script has them; "scaled" is
mlp with each copy's output scaled once, on one text, to the size of what it reads, the last one's to an
embedding's. Traces: a sentence of a tale as the prompt, three more of which one becomes a tag, and a fifth.
They are not the model's own (a small model earns too few), so this measures the start and not the method.

    python results/starts.py --text TALES.jsonl --models DIR DIR DIR          # 2 hours on a core
    python results/starts.py                                                  # the table of what is kept
"""
import collections
import dataclasses
import itertools
import json
import math
import os
import random
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import torch

import data
from lib import checkpoint, memory, run
from litereason import (LATENT, Rollout, insert_latents, load, logprobs, projector_loss, start_projector,
                        unroll, z_size)
from results.stats import markdown
from train_projector import mask_sentences, mean_loss, optimise, sentences_of

PATH = os.path.join(HERE, "starts-real.json")
HELD, BATCH, PROMPT, LENGTH = 24, 4, 24, 72  # rows held out, rows a step, most tokens of prompt and of trace
STEPS, CHAIN = 30, 5
STARTS = ("mlp", "normed", "pause")


# ============================================================ the traces
def traces_of(model, tokenizer, tales, seed):
    """[Rollout], shuffled, each with a tag and at least eight tokens behind it."""
    rng = random.Random(seed)
    fives = []
    for section in itertools.chain(*(tale["sections"] for tale in tales)):
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
def with_own_and_other(model, rows):
    """The loss with each row's own latents, and with those of the next row that has as many."""
    _, latents = unroll(model, rows)
    groups = collections.defaultdict(list)
    for i, row in enumerate(rows):
        groups[row.n_latents].append(i)
    costs = [], []
    for group in groups.values():
        for a, b in zip(group, group[1:] + group[:1]) if len(group) > 1 else ():
            for cost, other in zip(costs, (a, b)):
                logp, scored = logprobs(model, [dataclasses.replace(rows[a], latents=latents[other])])
                first = rows[a].slots.index(LATENT)
                cost.append(-logp[0, first:][scored[0, first:]])
    return [float(torch.cat(cost).mean()) for cost in costs]


@torch.no_grad()
def chain_of(model, rows):
    """[median size of z_1, .. z_5], in sizes of an embedding, of five latents at the first tag."""
    cut = []
    for row in rows[:12]:
        before = row.slots[: row.slots.index(LATENT)]
        cut.append(dataclasses.replace(row, slots=[*before, *[LATENT] * CHAIN, row.slots[-1]]))
    _, latents = unroll(model, cut)
    return [run.if_finite(z_size(model, z)) for z in torch.stack(latents).unbind(1)]


def measure(path, tales, start, seed, lr):
    """A start of a model, before and after some steps of stage 2 -> the figures of its row."""
    torch.manual_seed(seed)
    model, tokenizer = load(path)
    start_projector(model, start)
    rows = traces_of(model, tokenizer, tales, seed)
    held, train = rows[:HELD], rows[HELD:]
    before = {
        "no latents": mean_loss(model, held, "none"), "zeros": mean_loss(model, held, "zeros"),
        "chain before": chain_of(model, held), "loss before": mean_loss(model, held, "projector")}

    def losses_of(_, step):  # of the traces in turn
        loss, n = projector_loss(model, [train[(step * BATCH + i) % len(train)] for i in range(BATCH)])
        yield loss / n

    learners = [(model.reasoning_projector.parameters(), lr, 0.0)]
    with memory.base_frozen(model), tempfile.TemporaryDirectory() as out:
        optimise(model, train, learners, BATCH, STEPS, losses_of, states=f"{out}/stage-2")
        with open(f"{out}/stage-2.jsonl") as file:
            norms = [json.loads(line)["grad_norm"] for line in file]
    norms = sorted(math.inf if norm is None else norm for norm in norms)
    own, other = with_own_and_other(model, held)
    return {**before, "loss after": mean_loss(model, held, "projector"), "own": own, "other": other,
            "chain after": chain_of(model, held), "gradient": [norms[0], norms[len(norms) // 2], norms[-1]]}


# ============================================================ the table
def table(rows):
    def numbers(values, form=".2g"):
        return ", ".join("not finite" if value is None else f"{value:{form}}" for value in values)

    headings = ["model", "start", "lr", "seed", "z_1 .. z_5, in sizes of an embedding", "after training",
                "no latents, zeros", "loss before", "loss after", "own, another's latents", "gradient norms"]
    return markdown(headings, [
        [row["model"], row["start"], f"{row['lr']:g}", f"{row['seed']}", numbers(row["chain before"]),
         numbers(row["chain after"]), numbers([row["no latents"], row["zeros"]], ".3f"),
         f"{row['loss before']:.3f}", f"{row['loss after']:.3f}", numbers([row["own"], row["other"]], ".3f"),
         numbers(row["gradient"])] for row in rows])


def main():
    parser = run.parser(__doc__)
    parser.add_argument("--models", nargs="+", metavar="DIR", default=[], help="checkpoints [none]")
    parser.add_argument("--text", metavar="FILE", help="tales as jsonl, each with sections")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the traces [0]")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak rate [1e-4, the paper's]")
    args = parser.parse_args()
    rows = run.read_json(PATH, [])
    if args.models and not args.text:
        parser.error("--models needs --text")
    tales = [tale for _, tale in data.read_rows(args.text)] if args.models else []
    for path, seed, start in itertools.product(args.models, args.seeds, STARTS):
        name = os.path.basename(os.path.normpath(path))
        asked = {"model": name, "start": start, "seed": seed, "lr": args.lr, "steps": STEPS}
        if not any(asked.items() <= row.items() for row in rows):
            rows.append({**asked, **measure(path, tales, start, seed, args.lr)})
            run.write_json(PATH, rows)
    print(table(rows))


if __name__ == "__main__":
    run.run_script(main)
