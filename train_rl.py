"""Stage 3 of the paper (Sec. 3.4): GRPO on a model that may think in latents; runs stages 1 and 2 first if it must.

The policy is the LM; its actions are the tokens it samples, the tags and their numbers included. Latent vectors are
constants in the policy-gradient pass. The projector learns only by imitation: in stage 2, and anew after each epoch from
that epoch's own rewarded rollouts. The loop below has seven numbered steps; the README has the same seven.

Left out, and why: (1) no KL term and no reference model: the released runs set the coefficient to 0. (2) No second pass
for the old log-probs: the sampler's own are exact (tests/test_decode.py). (3) A small model gets one optimiser step
per rollout batch, where the released script takes 16 (and so does a real model here): the ratio is then 1 and the clip idle.
(4) Latents are replayed as they were sampled; --recompute-latents makes them anew with the current weights, as released.

    python train_rl.py                                  # the tiny model, all stages, the table: < 10 minutes on 2 cores
    python train_rl.py --method grpo --out out/grpo     # the same RL without latents, for comparison
    python train_rl.py --model Qwen2.5-1.5B             # the paper's plot holes on one GPU; data/flawed_fictions/prepare.py first
"""
import os

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # sampling and training take turns in memory

import argparse
import json
import random
import resource
import time

import torch

from eval import base_of, check_arguments, evaluate, is_small, readable, score, start_task, table, task_flags, write_json
from litereason import (UserError, check_lengths, checkpoint_layers, encode_prompt, generate, group_advantages, load, logprobs, pack,
                        policy_loss, recompute_latents, run_script, save)
from train_projector import RATIOS, fit_projector, masked_trace, run as run_stages_1_and_2

# ---------------------------------------------------------------- settings that depend on the model's size
# RELEASED is the authors' script. 2880 steps are 30 passes over 290 stories: 6 rollout batches each, 16 steps per batch. Only the
# last three are not theirs (they have several GPUs and vLLM): how much is in memory at once. These three change no result.
RELEASED = {"lr": 5e-7, "group": 16, "prompts": 48, "minibatches": 16, "steps": 2880, "max_new_tokens": 2048, "clip": 0.2, "refresh_lr": 1e-4,
            "refresh_share": 0.1, "rows": 256, "tokens_per_forward": 16_384, "checkpoint_layers": True}
SMALL = {"lr": 1.5e-4, "group": 16, "prompts": 16, "minibatches": 1, "steps": 48, "max_new_tokens": 160, "clip": 0.2, "refresh_lr": 1e-4,
         "refresh_share": 0.1, "rows": 512, "tokens_per_forward": 12_000, "checkpoint_layers": False}
OURS = ("rows", "tokens_per_forward", "checkpoint_layers")


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = ap.add_argument_group("what")
    g.add_argument("--model", default="tiny", help="tiny, a directory (a run of train_projector.py too), or a hub name")
    task_flags(g)
    g.add_argument("--out", default="out/rl", metavar="DIR", help="settings, metrics.jsonl, the model and the table go there")
    g.add_argument("--method", default="litereason", choices=["litereason", "grpo"],
                   help="grpo: the same RL with the plain prompt, no tags and no latents")
    g = ap.add_argument_group("rollouts (default: set by the model's size, see RELEASED and SMALL)")
    g.add_argument("--steps", type=int, default=None, help="optimiser steps")
    g.add_argument("--prompts", type=int, default=None, help="prompts per rollout batch")
    g.add_argument("--train-prompts", type=int, default=None, help="use only so many train prompts: one pass over them is an epoch")
    g.add_argument("--group", type=int, default=None, help="rollouts per prompt, 2 or more")
    g.add_argument("--max-new-tokens", type=int, default=None, help="slots per rollout, latents included")
    g.add_argument("--overlong-buffer", type=int, default=0, help="soft length penalty (DAPO): from 0 at max-new-tokens minus "
                   "this many slots down to -1 at max-new-tokens; 0 is off")
    g.add_argument("--rows", type=int, default=None, help="rollouts decoded at once, whole groups: memory for their keys and values; changes "
                   "no result")
    g = ap.add_argument_group("update")
    g.add_argument("--lr", type=float, default=None, help="learning rate of AdamW, constant")
    g.add_argument("--clip", type=float, default=None, help="of the probability ratio")
    g.add_argument("--minibatches", type=int, default=None, help="optimiser steps per rollout batch")
    g.add_argument("--tokens-per-forward", type=int, default=None, help="positions per forward pass, a group's prompt counted once: the "
                   "memory dial; changes no result")
    g.add_argument("--checkpoint-layers", action=argparse.BooleanOptionalAction, default=None, help="keep no activations inside layers: "
                   "less memory, a third more time")
    g.add_argument("--recompute-latents", action="store_true", help="score with latents made by the current weights")
    g.add_argument("--offload", action="store_true", help="bf16 weights on the card, fp32 masters and AdamW's moments on the host")
    g = ap.add_argument_group("projector")
    g.add_argument("--projector-steps", type=int, default=None, help="optimiser steps of stage 2, if it is run")
    g.add_argument("--trace-prompts", type=int, default=None, help="train prompts that stage 1 samples traces for, if it is run")
    g.add_argument("--no-refresh", action="store_true", help="leave the projector as stage 2 made it")
    g = ap.add_argument_group("run")
    g.add_argument("--n", type=int, default=500, help="test stories for the final table; 0 leaves it out")
    g.add_argument("--show-every", type=int, default=20, help="print two rollouts every so many steps; 0 never")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    return ap.parse_args()


def main():
    args = parse_arguments()
    check_arguments(args, n=0)
    if args.group is not None and args.group < 2:
        raise UserError("--group must be 2 or more: an advantage compares the rollouts of one prompt")
    model, tokenizer = load(args.model, args.device)
    task = start_task(args, model, args.model)
    for key, value in (SMALL if is_small(model) else RELEASED).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.checkpoint_layers:
        checkpoint_layers(model)
    latent = args.method == "litereason"
    examples = task.examples("train")[: args.train_prompts]
    prompts = [encode_prompt(model, tokenizer, task.prompt(e, latent)) for e in examples]
    check_lengths(model, prompts, args.max_new_tokens)  # now, not in the middle of an epoch
    write_json(os.path.join(args.out, "config.json"), {"script": "train_rl.py", "base": base_of(args.model), **vars(args)})
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.method} on {args.task}: {args.model}, {parameters / 1e6:.1f} M parameters, {model.device}, fp32 weights; "
          f"{len(examples)} train prompts of up to {max(map(len, prompts))} tokens")
    print("settings: " + ", ".join(f"{k} {getattr(args, k):g}" + (f" (released: {v:g})" if k not in OURS and getattr(args, k) != v else "")
                                   for k, v in RELEASED.items()))
    if not is_small(model):
        print(forecast(model, args, max(map(len, prompts)), *getattr(task, "settings", {}).get("scorer", ())[:1]), flush=True)

    # ------------------------------------------------------------ the starting point: table rows, stages 1 and 2
    rows, tests, start = [], task.examples("test")[: args.n], time.time()

    def note(name, latent_prompt, run="projector"):
        """One row of the final table."""
        if tests:
            rows.append((name, evaluate(model, tokenizer, task, tests, latent_prompt, seed=args.seed, progress=name, latent=run,
                                        max_new_tokens=args.max_new_tokens)[0]))

    note("base, explicit reasoning", False)
    if latent:
        note("base, tag prompt", True, run="none")  # a plain LM: its tags are text
        if not model.projector_trained:
            run_stages_1_and_2(model, tokenizer, task, args.out, args.max_new_tokens, args.seed, steps=args.projector_steps,
                               prompts=args.trace_prompts, n=min(200, args.n or 200))
            save(model, tokenizer, os.path.join(args.out, "model"))
        note("LiteReason before RL", True)

    # ------------------------------------------------------------ stage 3
    base = [p for n, p in model.named_parameters() if not n.startswith("reasoning_projector.")]
    masters = base
    if args.offload:  # bf16 weights and gradients on the card; what needs fp32, the masters and their moments, on the host
        masters = [p.detach().to("cpu", torch.float32, copy=True).requires_grad_() for p in base]
        for p in base:
            p.data = p.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    per_epoch = max(1, len(examples) // args.prompts)  # rollout batches in one pass; what is left over is other prompts in every epoch
    epoch_rollouts = []
    log = open(os.path.join(args.out, "metrics.jsonl"), "w")
    for step in range(args.steps):
        number, part = divmod(step, args.minibatches)  # rollout batch, and which minibatch of it
        epoch, seconds, clock = number // per_epoch, {}, time.time()
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def lap(phase):
            nonlocal clock
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[phase], clock = time.time() - clock, time.time()

        if part == 0:
            # (1) Sample a group of rollouts for each prompt. Data order and draws are functions of (seed, step) alone.
            order = random.Random(f"{args.seed} {epoch}").sample(range(len(examples)), len(examples))
            index = order[number % per_epoch * args.prompts :][: args.prompts]
            prompts = [task.prompt(examples[i], latent) for i in index]
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
            rollouts = generate(model, tokenizer, prompts, args.group, args.max_new_tokens, generator=generator, rows=args.rows,
                                latent="projector" if latent else "none")
            lap("sample")
            # (2) Reward what the policy wrote; the optional length penalty comes on top.
            earned = torch.tensor(score(task, [examples[index[r.prompt]] for r in rollouts], [r.text for r in rollouts], number + 1))  # (B,)
            rewards = earned.clone()
            if args.overlong_buffer:
                length = torch.tensor([len(r.slots) for r in rollouts])  # (B,) latents count
                rewards += ((args.max_new_tokens - args.overlong_buffer - length) / args.overlong_buffer).clamp(-1, 0)
            # (3) Advantages: each rollout against the other rollouts of its prompt.
            groups = rewards.view(len(index), args.group)  # (P, G)
            advantages = group_advantages(groups).flatten()  # (B,)
            lap("reward")
            # (4) The old log-probs are those that the sampler stored: no extra pass.
            shuffled = random.Random(f"{args.seed} {number} minibatches").sample(range(len(index)), len(index))

        # (5) The clipped loss, in micro-batches. Groups without a winner or loser have no gradient and are not run;
        #     they count in the denominator, which is fixed here.
        chosen = shuffled[part :: args.minibatches]  # prompts of this minibatch, whole groups
        batch = [b for p in sorted(chosen) for b in range(p * args.group, (p + 1) * args.group) if advantages[b] != 0]
        n_rollouts, max_dlogp = len(chosen) * args.group, 0.0
        for indices in pack([rollouts[b] for b in batch], args.tokens_per_forward):
            micro = [batch[i] for i in indices]
            some = [rollouts[b] for b in micro]
            if args.recompute_latents and latent:
                some = recompute_latents(model, some)
            logp, scored = logprobs(model, some)  # (b, S)
            old = torch.nn.utils.rnn.pad_sequence([r.logprobs for r in some], batch_first=True).to(logp)
            loss, ratio = policy_loss(logp, old, advantages[micro].to(logp), scored, n_rollouts, args.clip)
            loss.backward()
            max_dlogp = max(max_dlogp, float((logp.detach() - old)[scored].abs().max()))
        lap("update")
        # (6) One optimiser step on the base; the projector is not in the optimiser and gets no gradient.
        if args.offload:
            for p, master in zip(base, masters):
                master.grad, p.grad = None if p.grad is None else p.grad.to("cpu", torch.float32), None
        norm = float(torch.nn.utils.clip_grad_norm_(masters, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.offload:
            for p, master in zip(base, masters):
                p.data.copy_(master.data)
        lap("step")
        # (7) At the end of each epoch the projector is refreshed on the epoch's own rewarded rollouts.
        if latent and not args.no_refresh and part == 0:
            epoch_rollouts += [(examples[index[r.prompt]], r) for r, e in zip(rollouts, earned.tolist()) if e > 0]
        refreshed = None
        if (step + 1) % (per_epoch * args.minibatches) == 0:
            if epoch_rollouts:
                refreshed = refresh(model, tokenizer, task, epoch_rollouts, args, epoch)
            epoch_rollouts = []
            save(model, tokenizer, os.path.join(args.out, "model"))
            lap("refresh")

        mean = lambda f: sum(map(f, rollouts)) / len(rollouts)
        m = {"step": step + 1, "epoch": epoch, "reward": float(rewards.mean()), "accuracy": float(earned.mean()),
             "text_tokens": mean(lambda r: r.n_tokens), "latent_steps": mean(lambda r: r.n_latents),
             "tags": mean(lambda r: r.n_tags), "tag_share": mean(lambda r: r.n_tags > 0),
             "zero_variance": float((groups.amax(1) == groups.amin(1)).float().mean()),
             "truncated": mean(lambda r: not r.finished), "max_dlogp": max_dlogp, "grad_norm": norm,
             "refresh_loss": refreshed, "seconds": {k: round(v, 3) for k, v in seconds.items()},
             "peak_memory_gib": (torch.cuda.max_memory_allocated() if model.device.type == "cuda"
                                 else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30}
        log.write(json.dumps(m) + "\n")
        log.flush()
        print(f"step {step + 1:4d}/{args.steps} | reward {m['reward']:6.3f} | text {m['text_tokens']:6.1f} | latent {m['latent_steps']:5.1f} | "
              f"tags {m['tags']:4.2f} | zero-var {m['zero_variance']:4.2f} | cut {m['truncated']:4.2f} | gnorm {norm:6.3f} | "
              f"dlogp {max_dlogp:.0e} | {sum(seconds.values()):5.1f}s (sample {seconds.get('sample', 0):.1f}) | "
              f"{m['peak_memory_gib']:.2f} GiB" + (f" | refresh loss {refreshed:.3f}" if refreshed is not None else ""), flush=True)
        if args.show_every and (step % args.show_every == 0):
            for r, e in list(zip(rollouts, earned.tolist()))[: 2 * args.group : args.group]:
                print(f"    [{e:g}] {readable(tokenizer, r)}", flush=True)
    log.close()
    save(model, tokenizer, os.path.join(args.out, "model"))
    print(f"saved {args.out}/model")

    # ------------------------------------------------------------ the table
    note("LiteReason" if latent else "RL without latents", latent)
    if latent:
        note("  its latents taken away", True, run="none")
    if rows:
        write_json(os.path.join(args.out, "results.json"), [{"model": name, **r} for name, r in rows])
        print(f"\n{table(rows)}\n\n{len(tests)} test stories, seed {args.seed}, {time.time() - start:.0f}s for everything; "
              f"numbers in {args.out}/results.json")


def forecast(model, args, longest, scorer=None):
    """Sizes of this run and the memory it will want, as text, from the configuration; on CUDA also whether it fits, and what to turn.

    An estimate from shapes, rounded up: every rollout as long as allowed, every prompt as long as the longest (in tokens)."""
    c, gib = model.config, 2.0**30
    H, K, D, V, layers = c.num_attention_heads, c.num_key_value_heads, c.hidden_size, c.vocab_size, c.num_hidden_layers
    d, width, S = getattr(c, "head_dim", None) or D // H, 2 if model.bf16 else 4, args.max_new_tokens
    numbers = sum(p.numel() for p in model.parameters())
    base = numbers - sum(p.numel() for p in model.reasoning_projector.parameters())
    batch = args.prompts * args.group
    rows = min(batch, max(1, args.rows // args.group) * args.group)  # decoded at once
    tokens = max(args.tokens_per_forward, longest + S)
    # One layer's activations per token: norms and residuals in fp32, q k v and output, the MLP's four; and each slot's attention weights.
    layer = 28 * D + width * (2 * (H + K) * d + 4 * c.intermediate_size) + (5 + 2 * width) * H * (longest + S)
    kept = 2 if args.offload else 4  # bytes per weight, and per gradient, on the card
    always = {"weights": kept * numbers, "AdamW": 0 if args.offload else 8 * base, "16-bit copies": 2 * base * (model.bf16 and not args.offload),
              "scorer": 4 * sum(p.numel() for p in scorer.parameters()) if scorer else 0}
    sampling = {"keys and values": 2 * layers * K * d * width * (rows * S + rows // args.group * longest), "logits": 5 * 4 * rows * V}
    update = {"gradients": kept * base, "activations": tokens * (layers * (4 * D + 2 * K * d * width) + 2 * layer if args.checkpoint_layers else layers * layer),
              "logits": 3 * 4 * min(512, tokens) * V}
    peak = sum(always.values()) + max(sum(sampling.values()), sum(update.values()))
    say = lambda sizes: ", ".join(f"{k} {v / gib:.2f}" for k, v in sizes.items())
    text = (f"per rollout batch: {batch} rollouts, {rows} rows at a time, up to {S} decoding steps; the update reads up to "
            f"{batch * S + args.prompts * longest:,} positions, {tokens:,} at a time\n"
            f"memory at most, GiB: {say(always)}; sampling: {say(sampling)}; update: {say(update)}; "
            f"peak {peak / gib:.1f}")
    card = torch.cuda.get_device_properties(model.device).total_memory if model.device.type == "cuda" else None
    if card and peak > 0.95 * card:
        text += (f"\nthis card has {card / gib:.1f} GiB, so it may not fit: lower --rows (sampling) or --tokens-per-forward (update), say "
                 f"--checkpoint-layers, --offload, shorten --max-new-tokens, or take a smaller model")
    return text


def refresh(model, tokenizer, task, rollouts, args, epoch):
    """Step (7), paper Sec. 3.4: a random share of the rewarded rollouts, each once per ratio; tags already there stay and
    are never replaced; the target ends in the gold answer in exactly the format that the reward parses."""
    rng, traces = random.Random(f"{args.seed} {epoch} refresh"), []
    marker = getattr(task, "ANSWER", "\\boxed{")
    for example, r in rng.sample(rollouts, max(1, int(args.refresh_share * len(rollouts)))):
        gold = task.answer(example) if hasattr(task, "answer") else None
        traces += [masked_trace(model, tokenizer, rng, r.prompt_ids, r.text, gold, marker, ratio) for ratio in RATIOS]
    traces = [t for t in traces if t is not None]
    if not traces:
        return None
    return fit_projector(model, traces, args.refresh_lr, batch=16, schedule=False, seed=epoch, budget=args.tokens_per_forward)


if __name__ == "__main__":
    run_script(main)
