"""How far do the numbers of one rollout depend on the company it keeps? Measured, as a table.

    python tests/invariance.py --n 1000     # rollouts of the tiny model, on a CPU

The rollouts are sampled once, in float32. A cell is the largest difference of a sampled token's log-prob from
the rollout scored alone in the same type (of a gradient: of the largest entry, relative to it). The last two
rows are no invariance but belong beside it: what sampling itself wrote down, and the distance to float64.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from data import tiny
from data.tiny import next_chapter
from lib.kv_cache import autocast
from lib.memory import checkpoint_layers
from lib.scoring import pack
from litereason import generate, load, logprobs

TYPES = {"float64": (torch.float64, False), "float32": (torch.float32, False),
         "bf16 compute": (torch.float32, True)}


def score(model, rollouts, parts):
    """Log-probs of the sampled tokens of rollouts scored in these parts -> [(tokens,)]."""
    out = [None] * len(rollouts)
    for part in parts:
        logp, scored = logprobs(model, [rollouts[i] for i in part])
        for i, row, own in zip(part, logp.double(), scored):
            out[i] = row[own].detach()
    return out


def gradient(model, rollouts, parts):
    """Of the sum of all log-probs, in these parts -> one long vector."""
    model.zero_grad(set_to_none=True)
    with autocast(model):
        for part in parts:
            logprobs(model, [rollouts[i] for i in part])[0].sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def differences(model, rollouts, ways, exact):
    """-> ({way: largest difference}, the rollouts scored alone). exact: those in float64, None: these are."""
    alone = [[i] for i in range(len(rollouts))]
    few = rollouts[:32]  # gradients: of these, or it takes an hour
    worst = lambda some: max(float((a - b).abs().max()) for a, b in zip(some, reference) if len(a))
    with torch.no_grad():
        reference = score(model, rollouts, alone)
        found = {way: worst(score(model, rollouts, parts)) for way, parts in ways.items()}
    apart, together = (gradient(model, few, parts) for parts in (alone[:32], [range(len(few))]))
    found["gradient: one batch"] = float((together - apart).abs().max() / apart.abs().max())
    checkpoint_layers(model)  # only a pass with gradients computes layers again
    found["layer checkpointing, batches of 32"] = worst(score(model, few, [range(len(few))]))
    found["(as sampled, in float32)"] = worst(r.logprobs[[s >= 0 for s in r.slots]] for r in rollouts)
    found["(float64 alone)"] = worst(exact or reference)
    return found, reference


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--n", type=int, default=1000, help="rollouts of up to 200 slots, 8 per prompt")
    n = cli.parse_args().n
    # Prompts of several lengths, with the offer of the tag and without.
    examples = {task: task.examples("train") for task in (tiny, next_chapter)}
    kinds = [(task, latent) for task in examples for latent in (True, False)]
    prompts = []
    for i in range(-(-n // 8)):
        task, latent = kinds[i % 4]
        prompts.append(task.prompt(examples[task][i], latent))
    seed = lambda: torch.Generator().manual_seed(0)
    rollouts = generate(*load("tiny", "cpu"), prompts, 8, 200, generator=seed())[:n]
    mixed = torch.randperm(n, generator=seed()).tolist()
    ways = {"batches of 256": [range(i, min(i + 256, n)) for i in range(0, n, 256)],
            **{f"packed, {budget} positions": pack(rollouts, budget) for budget in (1024, 4096, 16384)},
            "another order, 4096": [[mixed[i] for i in part]
                                    for part in pack([rollouts[i] for i in mixed], 4096)]}
    table, exact = {}, None
    for name, (dtype, bf16) in TYPES.items():
        model = load("tiny", "cpu", dtype)[0]
        model.bf16 = bf16
        table[name], reference = differences(model, rollouts, ways, exact)
        exact = exact or reference
    print(f"| max abs. difference from each rollout scored alone | {' | '.join(table)} |\n"
          f"|---|{'---|' * len(table)}")
    for way in table["float64"]:
        print(f"| {way} | {' | '.join(f'{column[way]:.1e}' for column in table.values())} |")


if __name__ == "__main__":
    main()
