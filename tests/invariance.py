"""How far do the numbers of one rollout depend on the company it keeps? Measured, as a table (README).

    python tests/invariance.py                  1,000 rollouts of the tiny model, CPU
    python tests/invariance.py --n 64 --device cuda

The rollouts are sampled once, in float32. Then each is scored alone, and the same rollouts in every other
way that the scripts know: all in one batch, in runs of so many positions (scoring.pack), in another order,
with the layers' activations computed again, and after a resume: rollouts and weights written as a state of
train_rl.py, read back into a model loaded again, each scored alone.
A cell is max |difference| of a sampled token's log-prob (gradient: of the largest entry, relative to it)
from the rollout scored alone in the same type. (In float64 too, transformers takes the RMS norm in float32:
gradients agree to 1e-7, log-probs to nothing lost.)
Two rows are no invariance but belong beside it: what sampling itself wrote down, and the distance to
float64.
"""
import argparse
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from data import tiny
from data.tiny import next_chapter
from lib.kv_cache import autocast
from lib.memory import checkpoint_layers
from lib.scoring import pack
from litereason import Rollout, generate, load, logprobs
from lib.run import State, read_state

TYPES = {"float64": (torch.float64, False), "float32": (torch.float32, False),
         "bf16 compute": (torch.float32, True)}


def score(model, rollouts, parts):
    """log-probs of the sampled tokens, rollout by rollout, of rollouts scored in these parts
    -> [(tokens,)]."""
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
    """(model, rollouts) as a resumed run of train_rl.py has them: written to the disk, and read into a
    model `fresh` from there."""
    parts = lambda m: [p for n, p in m.named_parameters() if not n.startswith("reasoning_projector.")]
    start = lambda m: torch.optim.AdamW(parts(m))
    with tempfile.TemporaryDirectory() as at:
        State(1, rollouts, torch.zeros(len(rollouts)), {}).save(at, model, parts(model), start(model))
        with torch.no_grad():
            for p in fresh.parameters():
                p.zero_()  # what is not read back shows
        rollouts = State.restore(*read_state(at), fresh, parts(fresh), start(fresh), Rollout).rollouts
    fresh.bf16 = model.bf16
    return fresh, rollouts


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
    # Prompts of several lengths (within one task of the tiny world they are all equal),
    # with the offer of the tag and without.
    kinds = [(task, latent) for task in (tiny, next_chapter) for latent in (True, False)]
    prompts = [task.prompt(e, latent) for i, (task, latent) in enumerate(kinds)
               for e in task.examples("train")[:480][i::4]]
    # 241: a walk through all four kinds
    prompts = [prompts[(i * 241) % len(prompts)] for i in range(-(-args.n // 8))]
    rollouts = generate(model, tokenizer, prompts, samples=8, max_new_tokens=args.max_new_tokens,
                        generator=torch.Generator().manual_seed(args.seed))[: args.n]
    alone = [[i] for i in range(len(rollouts))]
    batch = [list(range(i, min(i + 256, len(rollouts)))) for i in range(0, len(rollouts), 256)]
    mixed = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(args.seed)).tolist()
    ways = {"batches of 256": batch,
            **{f"packed, {b} positions": pack(rollouts, b) for b in (1024, 4096, 16384)},
            "another order, 4096": [[mixed[i] for i in part]
                                    for part in pack([rollouts[i] for i in mixed], 4096)]}
    few = list(range(0, len(rollouts), -(-len(rollouts) // 32)))  # gradients: of these, or it takes an hour
    order = list(range(len(few)))
    table, sampled = {}, [r.logprobs[[s >= 0 for s in r.slots]].double() for r in rollouts]
    exact = None
    for name, (dtype, bf16) in TYPES.items():
        model, _ = load(args.model, args.device, dtype)
        model.bf16 = bf16
        worst = lambda a, b: max(float((x - y).abs().max()) for x, y in zip(a, b) if len(x))
        with torch.no_grad():
            reference = score(model, rollouts, alone)
            column = {way: worst(score(model, rollouts, parts), reference) for way, parts in ways.items()}
            column["after a resume"] = worst(
                score(*resumed(model, rollouts, load(args.model, args.device, dtype)[0]), alone), reference)
        apart = gradient(model, [rollouts[i] for i in few], [[i] for i in order])
        share = lambda g: float((g - apart).abs().max() / apart.abs().max())
        column["gradient: one batch"] = share(gradient(model, [rollouts[i] for i in few], [order]))
        checkpoint_layers(model)  # only a pass with gradients computes layers again
        column["layer checkpointing, batches of 32"] = worst(
            score(model, [rollouts[i] for i in few], [order]), [reference[i] for i in few])
        column["gradient: one batch, layer checkpointing"] = share(
            gradient(model, [rollouts[i] for i in few], [order]))
        column["(as sampled, in float32)"] = worst(sampled, reference)
        exact = exact or reference
        column["(float64 alone)"] = worst(exact, reference)
        table[name] = column
    latents = sum(r.n_latents for r in rollouts)
    print(f"{args.model}: {len(rollouts)} rollouts of {len(prompts)} prompts, "
          f"{sum(r.n_tokens for r in rollouts)} sampled tokens, {latents} latents, {args.device}, "
          f"torch {torch.__version__}, {time.time() - started:.0f} s\n")
    print(f"| max abs. difference from each rollout scored alone | {' | '.join(table)} |\n"
          f"|---|{'---|' * len(table)}")
    for way in next(iter(table.values())):
        print(f"| {way} | {' | '.join(f'{column[way]:.1e}' for column in table.values())} |")


if __name__ == "__main__":
    main()
