"""How far do the numbers of one rollout depend on the company it keeps? Measured, as a table (results/README).

    python tests/invariance.py                  1,000 rollouts of the tiny model, CPU
    python tests/invariance.py --n 64 --device cuda

The rollouts are sampled once, in float32. Then each is scored alone, and in every other way that the scripts
know: in one batch, in runs of so many positions (scoring.pack), in another order, with the activations of
layers computed again, and after a resume: rollouts and weights written as a state of train_rl.py and read
back. A cell is max |difference| of a sampled token's log-prob from the rollout scored alone in the same type
(of a gradient: of the largest entry, relative to it). Two rows are no invariance but belong beside it: what
sampling itself wrote down, and the distance to float64.
"""
import argparse
import os
import sys
import tempfile
import time
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import train_rl
from data import tiny
from data.tiny import next_chapter
from lib import run
from lib.kv_cache import autocast
from lib.memory import base_parameters, checkpoint_layers
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
            out[i] = row[own].detach().cpu()
    return out


def gradient(model, rollouts, parts):
    """Of the sum of all log-probs, in these parts -> one long vector."""
    model.zero_grad(set_to_none=True)
    with autocast(model):
        for part in parts:
            logprobs(model, [rollouts[i] for i in part])[0].sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def resumed(model, rollouts, fresh):
    """(model, rollouts) as a resumed run of train_rl.py has them, read into a model `fresh`."""
    state, read = train_rl.State([], 0, step=1, rollouts=rollouts), train_rl.State([], 0)
    base, fresh_base = base_parameters(model), base_parameters(fresh)
    with tempfile.TemporaryDirectory() as at, torch.no_grad():
        args = types.SimpleNamespace(out=at, minibatches=2)
        train_rl.save_state(args, state, model, base, torch.optim.AdamW(base))
        for p in fresh.parameters():
            p.zero_()  # what is not read back shows
        train_rl.load_state(read, run.read_state(at), fresh, fresh_base, fresh_base,
                            torch.optim.AdamW(fresh_base))
    fresh.bf16 = model.bf16
    return fresh, read.rollouts


def differences(model, fresh, rollouts, ways, sampled, exact):
    """-> {way: largest difference}, the rollouts scored alone. exact: those in float64, None: these are."""
    def worst(a, b):
        return max(float((x - y).abs().max()) for x, y in zip(a, b) if len(x))

    def share(g):
        return float((g - apart).abs().max() / apart.abs().max())

    alone = [[i] for i in range(len(rollouts))]
    with torch.no_grad():
        reference = score(model, rollouts, alone)
        found = {way: worst(score(model, rollouts, parts), reference) for way, parts in ways.items()}
        found["after a resume"] = worst(score(*resumed(model, rollouts, fresh), alone), reference)
    few = rollouts[:: -(-len(rollouts) // 32)]  # gradients: of these, or it takes an hour
    one_batch = [list(range(len(few)))]
    apart = gradient(model, few, [[i] for i in one_batch[0]])
    found["gradient: one batch"] = share(gradient(model, few, one_batch))
    checkpoint_layers(model)  # only a pass with gradients computes layers again
    found["layer checkpointing, batches of 32"] = worst(score(model, few, one_batch),
                                                        reference[:: -(-len(rollouts) // 32)])
    found["gradient: one batch, layer checkpointing"] = share(gradient(model, few, one_batch))
    found["(as sampled, in float32)"] = worst(sampled, reference)
    found["(float64 alone)"] = worst(exact or reference, reference)
    return found, reference


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--model", default="tiny")
    cli.add_argument("--n", type=int, default=1000, help="rollouts, 8 per prompt")
    cli.add_argument("--max_new_tokens", type=int, default=200)
    cli.add_argument("--device", default="cpu")
    cli.add_argument("--seed", type=int, default=0)
    args = cli.parse_args()
    started = time.time()
    model, tokenizer = load(args.model, args.device)
    # Prompts of several lengths (within one task they are equal), with the offer of the tag and without.
    kinds = [(task, latent) for task in (tiny, next_chapter) for latent in (True, False)]
    every = [task.prompt(e, latent) for i, (task, latent) in enumerate(kinds)
             for e in task.examples("train")[:480][i::4]]
    prompts = [every[i * 241 % len(every)] for i in range(-(-args.n // 8))]  # a walk through all four kinds
    draws = torch.Generator().manual_seed(args.seed)
    rollouts = generate(model, tokenizer, prompts, 8, args.max_new_tokens, generator=draws)[: args.n]
    mixed = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(args.seed)).tolist()
    numbers = list(range(len(rollouts)))
    ways = {"batches of 256": [numbers[i : i + 256] for i in range(0, len(numbers), 256)],
            **{f"packed, {budget} positions": pack(rollouts, budget) for budget in (1024, 4096, 16384)},
            "another order, 4096": [[mixed[i] for i in part]
                                    for part in pack([rollouts[i] for i in mixed], 4096)]}
    sampled = [r.logprobs[[s >= 0 for s in r.slots]].double() for r in rollouts]
    table, exact = {}, None
    for name, (dtype, bf16) in TYPES.items():
        model, fresh = (load(args.model, args.device, dtype)[0] for _ in range(2))
        model.bf16 = bf16
        table[name], reference = differences(model, fresh, rollouts, ways, sampled, exact)
        exact = exact or reference
    print(f"{args.model}: {len(rollouts)} rollouts of {len(prompts)} prompts, "
          f"{sum(r.n_tokens for r in rollouts)} sampled tokens, {sum(r.n_latents for r in rollouts)} latents, "
          f"{args.device}, torch {torch.__version__}, {time.time() - started:.0f} s\n")
    print(f"| max abs. difference from each rollout scored alone | {' | '.join(table)} |\n"
          f"|---|{'---|' * len(table)}")
    for way in table["float64"]:
        print(f"| {way} | {' | '.join(f'{column[way]:.1e}' for column in table.values())} |")


if __name__ == "__main__":
    main()
