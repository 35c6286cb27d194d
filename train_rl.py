"""Stage 3 of the paper (Sec. 3.4): GRPO on a model that may think in latents; runs stages 1 and 2 first if it
must.

The policy is the LM; its actions are the tokens it samples, the tags and their numbers included. Latent
vectors are constants in the policy-gradient pass. The projector learns only by imitation: in stage 2, and
again after each epoch from that epoch's own rewarded rollouts. Ours, with targets (targets.py): the update
holds the base to the latents of stage 1's traces (`targets.add_anchor`), and the refresh is on such traces
too (`rehearse`). The loop is `train` below; its seven numbered steps are the README's.

Left out, and why: (1) no KL term and no reference model: the released runs set the coefficient to 0. (2) No
second pass for the old log-probs: the sampler's own are the scorer's up to rounding (tests/test_decode.py; in
bf16 on CUDA up to 0.2). (3) A small model gets one optimiser step per rollout batch, so that its ratio is 1
up to that rounding and the clip idle; a real model gets 16, as released. (4) Latents are replayed as they
were sampled; --recompute-latents makes them again with the current weights, as released. (5) The learning
rate is constant; the released script leaves it to OpenRLHF's default (--lr-schedule cosine). (6) The refresh
steps on 16 traces at a time, with a clipped gradient; the released one on one trace per GPU, unclipped
(--refresh-batch, --refresh-clip).

    python train_rl.py                               # the tiny model, all stages, a table: 3 minutes, 2 cores
    python train_rl.py --method grpo                 # RL without latents, by default without a length penalty
    python train_rl.py --resume out/tiny-litereason  # continue a stopped run, exactly: on a CPU bit for bit
    python train_rl.py --model Qwen2.5-1.5B          # the paper's plot holes on one GPU; before it, once:
                                                     #   python data/flawed_fictions/prepare.py
"""
import os

# Sampling and training take turns in memory.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import argparse
import functools
import json
import math
import random
import shutil
import time

import torch

import data
from lib import checkpoint, display, memory, run, scoring
import targets
from eval import PAPER, against, evaluate, latent_of, latents_of_others
from litereason import (RULES, Rollout, UserError, generate, load, logprobs, policy_loss, recompute_latents,
                        z_size)
from train_projector import (RATIOS, add_start_flags, fit_projector, masked_trace, pieces_of, read_traces,
                             set_start, short_enough, stages_1_and_2, warm_up_and_cosine)

# ============================================================ settings that depend on the model's size
# RELEASED is the authors' script: 2880 steps are 30 passes over 290 stories, 6 rollout batches each, 16 steps
# a batch. The last line of each is ours and changes no result: how much is in memory at once (where it is not
# there, card.py chooses), and the steps between two states on the disk.
RELEASED = {
    "lr": 5e-7, "group": 16, "prompts": 48, "minibatches": 16, "steps": 2880,
    "max_new_tokens": checkpoint.SLOTS_RELEASED, "overlong_buffer": 0,
    "clip": 0.2, "refresh_lr": 1e-4, "refresh_share": 0.1, "refresh_every": 0,
    "targets": "none", "words": 2, "noise": 0.2, "anchor": 0.0,
    "save_every": 16}
SMALL = {
    "lr": 1.2e-4, "group": 16, "prompts": 16, "minibatches": 1, "steps": 24,
    "max_new_tokens": checkpoint.SLOTS_SMALL, "overlong_buffer": checkpoint.SLOTS_SMALL,
    "clip": 0.2, "refresh_lr": 1e-4, "refresh_share": 0.1, "refresh_every": 0,
    "targets": "words", "words": 2, "noise": 0.2, "anchor": 10.0,
    "rows": 512, "tokens_per_forward": 12_000, "checkpoint_layers": False, "save_every": 4}
PLANNED = ("rows", "tokens_per_forward", "checkpoint_layers", "offload")
# --smoke: other defaults of flags, so that all stages run to the table in minutes, whatever the model.
SMOKE = {
    "steps": 4, "prompts": 2, "group": 4, "minibatches": 2, "max_new_tokens": 128, "train_prompts": 4,
    "trace_prompts": 8, "projector_steps": 2, "n": 2, "val": 2}
TAKEN_AWAY, ANOTHERS = "  its latents taken away", "  another story's latents"
NAMES = display.METHODS


# ============================================================ stage 3
def train(args, model, base, masters, tokenizer, task, examples, prompts, vals, table_rows, saved):
    """The loop; leaves model/ in args.out. base: the weights that are trained; masters: what the optimiser
    steps on, the same unless offloaded; prompts: of the examples, token ids; table_rows: of the final table,
    so far; saved: what run.read_state found, or None."""
    # Rollout batches per epoch. Prompts that fill no whole batch sit this epoch out: the next one has a new
    # order.
    per_epoch = max(1, len(examples) // args.prompts)
    optimizer = torch.optim.AdamW(masters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if saved is None:
        state = run.State.new(args, table_rows)
    else:
        state = run.State.restore(*saved, model, masters, optimizer, Rollout)
        memory.weights_from_masters(base, masters)
        args.tokens_per_forward = state.carried["tokens_per_forward"]
        print(f"resumed from {args.out}/state-{state.step}", flush=True)
    keep = run.keeper(args, state, model, masters, optimizer, is_saved=saved is not None)
    log = run.open_log(os.path.join(args.out, "metrics.jsonl"), state.carried["metrics"])
    # Before step (6) a signal discards the step; after it, the step is finished first.
    uninterrupted = run.on_stop(keep)
    refreshes = args.method == "litereason" and not args.no_refresh
    stage_1 = traces_of_stage_1(args, tokenizer, task) if needs_traces(args) else None

    for step in range(state.step, args.steps):
        # Numbers of the rollout batch, of the minibatch in it, and of the train prompts.
        batch, minibatch = divmod(step, args.minibatches)
        epoch, batch_in_epoch = divmod(batch, per_epoch)
        index = prompts_of_batch(args.seed, len(examples), args.prompts, epoch, batch_in_epoch)
        phases = run.Phases(model.device)
        if minibatch == 0:
            # (1) Sample a group of rollouts for each prompt.
            state.rollouts = sample_groups(args, model, tokenizer, [prompts[i] for i in index], batch)
            phases.end("sample")

            # (2) Reward what the policy wrote.
            asked = [examples[index[r.prompt]] for r in state.rollouts]
            earned = data.score(task, asked, [r.text for r in state.rollouts], batch + 1)
            state.earned = torch.tensor(earned)  # (B,)
            display.stop_if_a_reward_is_not_finite(args, step, state, index)

        # (3) Advantages: each rollout against the other rollouts of its prompt.
        rewards = state.earned + length_penalty(args, state.rollouts)  # (B,)
        groups = rewards.view(len(index), args.group)  # (P, G)
        tokens = torch.tensor([r.n_tokens for r in state.rollouts]).view_as(groups)
        advantages, divisors = rule_of(args)(groups, tokens, args.max_new_tokens)  # (P, G) each
        advantages, divisors = advantages.flatten(), divisors.flatten()  # (B,) each
        phases.end("reward")

        # (4) Old log-probs: nothing to do, each rollout carries the sampler's own.

        # (5) The clipped loss, in micro-batches.
        chosen = rollouts_of_minibatch(args, batch, minibatch, len(index))
        gap = add_gradients_with_one_retry(args, step, model, state, chosen, advantages, divisors)
        anchor_loss = None
        if stage_1 and args.anchor:  # ours, with targets
            anchor_loss = targets.add_anchor(args, model, tokenizer, stage_1, step)
        phases.end("update")
        if minibatch == 0 and not args.recompute_latents:  # there rounding moves every later latent
            display.stop_if_sampler_and_scorer_differ(args, step, model, state, index, gap)

        with uninterrupted():
            # (6) One optimiser step on the base; the projector is not in the optimiser and gets no gradient.
            memory.gradients_to_masters(base, masters)
            norm = float(torch.nn.utils.clip_grad_norm_(masters, 1.0))  # OpenRLHF's default
            step_is_finite = all_finite(norm, state.rollouts)
            if step_is_finite:
                optimizer.param_groups[0]["lr"] = learning_rate(args, step)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            memory.weights_from_masters(base, masters)
            phases.end("step")

            # (7) At the end of each epoch the projector is refreshed on the epoch's own rewarded rollouts.
            if minibatch == 0 and refreshes and args.targets == "none":
                remember_rewarded(state, index)
            refresh_loss = val = None
            ends_epoch = (step + 1) % (per_epoch * args.minibatches) == 0
            if refreshes and (ends_epoch or refresh_is_due(args, step)):
                if args.targets == "none":
                    refresh_loss = refresh(args, model, tokenizer, task, state, examples, prompts, batch)
                else:
                    refresh_loss = rehearse(args, model, tokenizer, stage_1, batch)
                phases.end("refresh")
            if ends_epoch:
                checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
                val = validate(args, model, tokenizer, task, vals)
                phases.end("validate")

            state.count_skipped(step_is_finite)
            size = z_size(model, torch.cat([r.latents for r in state.rollouts]))
            m = metrics(task, state, step, epoch, groups, gap, norm, size, anchor_loss, refresh_loss, val,
                        phases)
            tell(args, tokenizer, log, state, m, val, is_new_batch=minibatch == 0)
            display.set_aside_if_skipped(args, step, state, chosen, step_is_finite)
            state.step = step + 1
            keep_if_due(args, state, keep)
            display.stop_if_three_in_a_row_were_skipped(args, state)
    log.close()
    checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
    print(f"saved {args.out}/model")


# ============================================================ the parts of a step, in the order of the loop
def latent_of_method(args):
    """What a tag of the policy runs."""
    return "projector" if args.method == "litereason" else "none"


def encode_prompts(args, model, tokenizer, task, examples):
    """Token ids; the prompt offers the tag, but not to the method without tags."""
    offers_tag = args.method != "grpo"
    return [checkpoint.encode_prompt(model, tokenizer, task.prompt(example, offers_tag)) for example in examples]


def prompts_of_batch(seed, n_examples, n_prompts, epoch, batch_in_epoch):
    """The numbers of a rollout batch's train prompts: their order is a function of (seed, epoch) alone."""
    order = random.Random(f"{seed} {epoch}").sample(range(n_examples), n_examples)
    return order[batch_in_epoch * n_prompts :][:n_prompts]


def sample_groups(args, model, tokenizer, prompts, batch):
    """Step (1): args.group rollouts for each prompt; the draws are a function of (seed, number of the batch)
    alone."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + batch)
    return generate(model, tokenizer, prompts, args.group, args.max_new_tokens, generator=generator,
                    rows=args.rows, latent=latent_of_method(args))


def length_penalty(args, rollouts):
    """DAPO's soft overlong penalty -> (B,): 0 up to max_new_tokens - overlong_buffer slots, then down to
    -overlong_penalty at the limit."""
    if not args.overlong_buffer:
        return torch.zeros(len(rollouts))
    length = torch.tensor([len(r.slots) for r in rollouts])  # (B,) latents count
    begins = args.max_new_tokens - args.overlong_buffer
    return args.overlong_penalty * ((begins - length) / args.overlong_buffer).clamp(-1, 0)


def rule_of(args):
    """Step (3): the RL rule; --advantage-eps is GRPO's."""
    rule = RULES[args.rule]
    return functools.partial(rule, eps=args.advantage_eps) if args.rule == "grpo" else rule


def rollouts_of_minibatch(args, batch, minibatch, n_prompts):
    """Their numbers within the rollout batch, whole groups, in order."""
    rng = random.Random(f"{args.seed} {batch} minibatches")
    shuffled = rng.sample(range(n_prompts), n_prompts)
    groups = sorted(shuffled[minibatch :: args.minibatches])
    return [group * args.group + i for group in groups for i in range(args.group)]


def add_gradients(args, model, rollouts, chosen, advantages, divisors):
    """Step (5) for the rollouts `chosen` (their numbers) -> (how far sampler and scorer differ at most in a
    log-prob, in which rollout).

    As many at once as the budget of positions allows, each with its share of the whole mean. Rollouts without
    an advantage have no gradient and are not run; they count in the denominator."""
    largest, worst = 0.0, None
    useful = [b for b in chosen if advantages[b] != 0]
    for indices in scoring.pack([rollouts[b] for b in useful], args.tokens_per_forward):
        micro = [useful[i] for i in indices]
        some = [rollouts[b] for b in micro]
        if args.recompute_latents and args.method == "litereason":
            some = recompute_latents(model, some)
        logp, scored = logprobs(model, some)  # (b, S)
        old_logp = torch.nn.utils.rnn.pad_sequence([r.logprobs for r in some], batch_first=True).to(logp)
        loss, _ = policy_loss(logp, old_logp, advantages[micro].to(logp), scored, len(chosen), args.clip,
                              divisors[micro].to(logp.device))
        loss.backward()
        memory.wait_for_gradients(model)
        gaps = torch.where(scored, (logp.detach() - old_logp).abs(), 0.0).amax(1)  # (b,)
        if gaps.max() > largest:
            largest = float(gaps.max())
            worst = micro[int(gaps.argmax())]
    return largest, worst


def add_gradients_with_one_retry(args, step, model, state, chosen, advantages, divisors):
    """Out of memory: the same with half the positions per forward pass, once; no result changes."""
    for is_retry in (False, True):
        try:
            return add_gradients(args, model, state.rollouts, chosen, advantages, divisors)
        except torch.OutOfMemoryError as e:
            if is_retry:
                raise UserError(f"step {step + 1}: out of memory with --tokens-per-forward "
                                f"{args.tokens_per_forward} too: start with less, or with "
                                "--checkpoint-layers or --offload") from e
        memory.forget_gradients(model)  # here the exception, and what it held, is gone
        torch.cuda.empty_cache()
        args.tokens_per_forward = max(1, args.tokens_per_forward // 2)
        state.carried["tokens_per_forward"] = args.tokens_per_forward
        print(f"step {step + 1}: out of memory in the update; from here on --tokens-per-forward is "
              f"{args.tokens_per_forward}", flush=True)


def all_finite(norm, rollouts):
    """A NaN loss has a NaN gradient; a NaN latent may have none."""
    return math.isfinite(norm) and all(r.latents.isfinite().all() for r in rollouts)


def learning_rate(args, step):
    """Step (6): constant (ours) or, as OpenRLHF's default, up over the first 3 % of the steps and then down a
    cosine to a tenth."""
    if args.lr_schedule == "constant":
        return args.lr
    return args.lr * warm_up_and_cosine(step, args.steps, math.ceil(0.03 * args.steps))


def remember_rewarded(state, index):
    """The batch's rewarded rollouts, for the refresh: (number of the train prompt, text)."""
    for rollout, reward in zip(state.rollouts, state.earned.tolist()):
        if reward > 0:
            state.carried["rewarded"].append((index[rollout.prompt], rollout.text))


def refresh_is_due(args, step):
    """Whether the step ends a rollout batch after which --refresh-every asks for a refresh."""
    return args.refresh_every > 0 and (step + 1) % (args.refresh_every * args.minibatches) == 0


def refresh(args, model, tokenizer, task, state, examples, prompts, batch):
    """Step (7), paper Sec. 3.4 -> the loss, or None if there was nothing to learn from.

    A random share of the rewarded rollouts since the last refresh, each masked once per ratio; tags already
    there stay and are never replaced; the target ends in the gold answer in exactly the format that the
    reward parses. One step for each full --refresh-batch of these, at least one. batch: the number of the
    rollout batch just learned from."""
    rewarded = state.carried["rewarded"]
    state.carried["rewarded"] = []
    if not rewarded:
        return None
    rng = random.Random(f"{args.seed} {batch} refresh")
    marker = data.opening_of(task)
    traces = []
    for i, text in rng.sample(rewarded, max(1, int(args.refresh_share * len(rewarded)))):
        gold = task.answer(examples[i]) if hasattr(task, "answer") else None
        for ratio in RATIOS:
            trace = masked_trace(model, tokenizer, rng, prompts[i], text, gold, marker, ratio)
            if trace is not None:
                traces.append(trace)
    traces = short_enough(traces, args.refresh_max_length)
    if not traces:
        return None
    return fit_projector(model, traces, args.refresh_lr, args.refresh_batch, schedule=False, seed=batch,
                         clip=args.refresh_clip or math.inf, budget=args.tokens_per_forward)


def traces_of_stage_1(args, tokenizer, task):
    """For the anchor and the refresh with targets -> (traces, [(sentences, answer)], the words that tell
    nothing)."""
    traces = read_traces(os.path.join(args.out, "traces.jsonl"))
    pieces, common = pieces_of(tokenizer, traces, data.opening_of(task))
    return traces, pieces, common


def rehearse(args, model, tokenizer, stage_1, batch):
    """The refresh with targets (ours) -> the loss, or None if there was nothing to learn from. What the
    latents of a rollout should have said is not known, so stage 2 goes on for some steps instead, on a share
    of stage 1's traces. batch: the number of the rollout batch just learned from."""
    traces, _, _ = stage_1
    n = max(1, int(args.refresh_share * len(traces)))
    rows = targets.masked_again(args, model, tokenizer, stage_1, n, f"{batch} refresh")
    rows = short_enough(rows, args.refresh_max_length)
    if not rows:
        return None
    return fit_projector(model, rows, args.refresh_lr, args.refresh_batch, schedule=False, seed=batch,
                         clip=args.refresh_clip or math.inf, budget=args.tokens_per_forward, aim="words",
                         noise=args.noise)


def learns_targets(args):
    return args.method == "litereason" and args.targets == "words"


def needs_traces(args):
    """Whether RL learns from stage 1's traces: the anchor and the refresh with targets do."""
    return learns_targets(args) and (args.anchor > 0 or not args.no_refresh)


def copy_traces(args):
    """Those of the run that --model is, into --out: so a run can be continued without that one."""
    start = run.directory_of_run(args.model)
    theirs, ours = (os.path.join(path, "traces.jsonl") for path in (start, args.out))
    if not os.path.exists(theirs):
        raise UserError(f"--targets words learns from stage 1's traces in RL too, and there is no {theirs}: "
                        f"say --targets none, or --anchor 0 --no-refresh")
    with open(theirs) as f:
        header = json.loads(f.readline())
    if header.get("tag", "forbidden") != "forbidden":  # what their tags skipped is not known, so no target is
        raise UserError(f"the traces in {theirs} may hold tags, as the paper's stage 1 leaves them: say "
                        f"--targets none, or --anchor 0 --no-refresh")
    if os.path.abspath(theirs) != os.path.abspath(ours):
        shutil.copyfile(theirs, ours)


def validate(args, model, tokenizer, task, vals):
    """The figures of the val examples, None without any; by a generator of its own, so no draw of the
    training changes."""
    if not vals:
        return None
    figures, _ = evaluate(model, tokenizer, task, vals, args.method != "grpo", seed=args.seed,
                          max_new_tokens=args.max_new_tokens, latent=latent_of_method(args))
    return figures


def metrics(task, state, step, epoch, groups, gap, norm, size, anchor_loss, refresh_loss, val, phases):
    """One line of metrics.jsonl. The loss is not among them: under grpo, at ratio 1, it is 0 by
    construction."""

    def mean(of):
        return sum(map(of, state.rollouts)) / len(state.rollouts)

    lowest, highest = groups.amin(1), groups.amax(1)  # (P,)
    return {
        "step": step + 1,
        "epoch": epoch,
        "reward": float(groups.mean()),  # what is trained on, length penalty included
        "accuracy": float(state.earned.mean()),  # the task's reward alone
        "text_tokens": mean(lambda r: r.n_tokens),  # sampled tokens per rollout
        "latent_steps": mean(lambda r: r.n_latents),  # per rollout
        "tags": mean(lambda r: r.n_tags),  # that ran latents, per rollout
        "tag_share": mean(lambda r: r.n_tags > 0),  # share of rollouts in which one did
        # Share of groups with nothing to learn from.
        "zero_variance": float((highest == lowest).float().mean()),
        "truncated": mean(lambda r: not r.finished),  # share of rollouts cut by the length limit
        # share of rollouts in which the reward found nothing to read
        "no_verdict": mean(lambda r: not data.has_verdict(task, r.text)),
        "max_dlogp": gap[0],  # how far sampler and scorer differ at most; on a first update it is rounding
        "z_size": run.if_finite(size),  # median norm of a latent, in sizes of an embedding
        "grad_norm": run.if_finite(norm),  # before clipping
        "skipped": state.carried["skipped"],  # steps so far that were not finite
        "anchor_loss": anchor_loss,
        "refresh_loss": refresh_loss,
        "val_accuracy": val and val["accuracy"],
        "seconds": phases.seconds,  # by phase
        "peak_memory_gib": phases.memory}  # by phase; on CUDA the allocator's, on a CPU the process's so far


def tell(args, tokenizer, log, state, m, val, is_new_batch):
    """Metrics to the file; the step's line, two rollouts now and then, and warnings to the screen."""
    state.carried["metrics"].append(json.dumps(m) + "\n")
    log.write(state.carried["metrics"][-1])
    log.flush()
    print(display.step_line(m, args.steps), flush=True)
    if args.show_every and (m["step"] - 1) % args.show_every == 0:
        for b in (0, args.group):
            if b < len(state.rollouts):
                shown = display.readable(tokenizer, state.rollouts[b])
                print(f"    [{float(state.earned[b]):g}] {shown}", flush=True)
    if is_new_batch:
        n_groups = len(state.rollouts) // args.group
        display.warn(m, args.method == "litereason", n_groups, [r.text for r in state.rollouts])
    if val:
        display.warn_of_validation([json.loads(line) for line in state.carried["metrics"]], val)


def keep_if_due(args, state, keep):
    is_due = state.step % args.save_every == 0 or state.step == args.steps
    if is_due or state.carried["skipped_in_a_row"] >= 3:
        keep()


# ============================================================ the script
def by_size(name):
    return run.default_text(SMALL[name], RELEASED[name])


def parse_arguments():
    ap = run.parser(__doc__)
    g = ap.add_argument_group("what")
    g.add_argument("--model", default="tiny", help="tiny, a directory (a run of train_projector.py "
                   "too), or a hub name such as Qwen2.5-1.5B (default tiny)")
    g.add_argument("--method", default="litereason", choices=list(NAMES),
                   help="grpo: RL with the plain prompt, no tags and no latents (and by default no length "
                   "penalty); tag: with the tag prompt, but a tag is text (default litereason)")
    data.task_flags(g)
    run.out_flags(g, "settings, metrics.jsonl, the model and the table", "out/MODEL-TASK-METHOD")
    g.add_argument("--resume", metavar="DIR", help="continue the run in DIR, by its own settings; only "
                   "--steps, --device and --graphs may stand beside it (default: a new run)")
    g.add_argument("--seed", type=int, default=0, help="of all random draws (default 0)")
    g = ap.add_argument_group("how much (a small model has less than 50 M parameters)")
    g.add_argument("--smoke", action="store_true", help="a whole run in about ten minutes on two cores, "
                   "which says that everything works and nothing else: other defaults for these flags: "
                   + ", ".join(f"{name.replace('_', '-')} {value}" for name, value in SMOKE.items())
                   + "; if stage 1 keeps too little it says so and goes on with what it sampled (default "
                   "off)")
    g.add_argument("--steps", type=int, metavar="N", help=f"optimiser steps ({by_size('steps')})")
    g.add_argument("--prompts", type=int, metavar="N", help="prompts per rollout batch "
                   f"({by_size('prompts')})")
    g.add_argument("--group", type=int, metavar="N", help="rollouts per prompt, 2 or more "
                   f"({by_size('group')})")
    g.add_argument("--max-new-tokens", type=int, metavar="N",
                   help=f"slots per rollout, latents included ({by_size('max_new_tokens')})")
    g.add_argument("--train-prompts", type=int, metavar="N",
                   help="train prompts of RL, one pass over which is an epoch; stage 1 has --trace-prompts "
                   "(default all)")
    g.add_argument("--n", type=int, default=500, help="test stories for the final table, 0 for none "
                   "(default 500)")
    g.add_argument("--val", type=int, default=100, help="val examples evaluated after each epoch, to warn if "
                   "validation falls while the train reward rises; 0 for none (default 100)")
    g = ap.add_argument_group("update")
    g.add_argument("--lr", type=float, help=f"learning rate of AdamW ({by_size('lr')})")
    g.add_argument("--overlong-buffer", type=int, metavar="SLOTS",
                   help="soft length penalty (DAPO) over the last so many slots before --max-new-tokens; 0 "
                   f"is off ({by_size('overlong_buffer')}; 0 with --method grpo)")
    g.add_argument("--overlong-penalty", type=float, metavar="REWARD",
                   help="what it takes off a rollout that reaches --max-new-tokens (default 1; "
                   "tiny.next_chapter, which pays in percent, 400)")
    g.add_argument("--rule", default="grpo", choices=list(RULES),
                   help="advantages, and how a rollout's tokens are averaged (default grpo, the paper's)")
    g.add_argument("--clip", type=float, help=f"clip range of the probability ratio ({by_size('clip')})")
    g.add_argument("--minibatches", type=int, metavar="N", help="optimiser steps per rollout batch "
                   f"({by_size('minibatches')})")
    add_projector_flags(ap.add_argument_group("projector"))
    add_memory_flags(ap.add_argument_group("memory, speed and disk (results are the same up to rounding)"))
    add_released_flags(ap.add_argument_group("as released (for stages 1 and 2: train_projector.py)"))
    if ap.parse_known_args()[0].smoke:
        ap.set_defaults(**SMOKE)  # what the command line says wins
    return run.parse_resumable(ap, "train_rl.py", ("steps", "device", "graphs"))


def add_projector_flags(g):
    add_start_flags(g)
    g.add_argument("--anchor", type=float, metavar="X",
                   help="with --targets words: weight of stage 2's squared error in the update of the base, "
                   f"on {targets.ANCHORED} traces of stage 1 a step, so that RL does not move the base away "
                   f"from the projector (ours; {by_size('anchor')})")
    g.add_argument("--refresh-every", type=int, metavar="N",
                   help="rollout batches between two refreshes of the projector, besides the one at the end "
                   f"of each epoch; 0: only at the end of each epoch ({by_size('refresh_every')})")
    g.add_argument("--no-refresh", action="store_true",
                   help="leave the projector as stage 2 made it (default: refresh it)")
    g.add_argument("--projector-steps", type=int, metavar="N",
                   help="optimiser steps of stage 2, if it is run (default as in train_projector.py)")
    g.add_argument("--trace-prompts", type=int, metavar="N",
                   help="train prompts that stage 1 samples traces for, if it is run (default as in "
                   "train_projector.py)")
    targets.add_flags(g)


def add_memory_flags(g):
    """The defaults are card.py's, but of a small model on a CPU."""
    def default(name):
        return f"({run.default_text(SMALL[name], SMALL[name])} for a small model on a CPU, else what fits)"

    g.add_argument("--rows", type=int, metavar="N", help="rollouts decoded at once, whole groups: memory "
                   f"for their keys and values {default('rows')}")
    g.add_argument("--tokens-per-forward", type=int, metavar="N",
                   help="positions per forward pass of the update, a group's prompt counted once "
                   f"{default('tokens_per_forward')}")
    g.add_argument("--checkpoint-layers", action=argparse.BooleanOptionalAction,
                   help="keep no activations inside layers: less memory, a third more time "
                   f"{default('checkpoint_layers')}")
    g.add_argument("--offload", action=argparse.BooleanOptionalAction,
                   help="bf16 weights on the card, fp32 masters and AdamW's moments on the host (default "
                   "off; on CUDA if nothing else fits)")
    run.device_flags(g)
    g.add_argument("--save-every", type=int, metavar="N", help="steps between two states on the disk, from "
                   f"which --resume continues; the last two are kept ({by_size('save_every')})")
    g.add_argument("--show-every", type=int, metavar="N", default=20,
                   help="print two rollouts every so many steps, 0 for never (default 20)")


def add_released_flags(g):
    """What the authors' code does where our default is another."""
    g.add_argument("--lr-schedule", default="constant", choices=["constant", "cosine"],
                   help="cosine: up over the first 3 %% of --steps, then down to a tenth (default constant; "
                   "released cosine)")
    g.add_argument("--recompute-latents", action="store_true",
                   help="score with latents made by the current weights, as released (default: as they were "
                   "sampled)")
    g.add_argument("--advantage-eps", type=float, default=1e-4, metavar="EPS",
                   help="beside the deviation in --rule grpo (default 1e-4; released 1e-9)")
    g.add_argument("--refresh-batch", type=int, default=16, metavar="N",
                   help="traces per optimiser step of the refresh (default 16; released 1 on each of 4 GPUs)")
    g.add_argument("--refresh-clip", type=float, default=0.2, metavar="NORM",
                   help="largest gradient norm in the refresh, 0 for any (default 0.2; released 0)")
    g.add_argument("--refresh-max-length", type=int, metavar="N",
                   help="leave longer traces, prompt included, out of the refresh (default: none are; "
                   "released 2048)")


@run.signals_restored()
def main():
    args = parse_arguments()
    task = data.choose_task(args, args.model)
    args.out = args.out or run.default_out(args.model, args.task, args.method)
    run.check_arguments(args, n=0)
    lock_file = run.lock(args.out)  # noqa: F841, held until the process ends
    saved = run.read_state(args.out) if args.resume else None
    run.check_what_is_there(args, saved)
    if args.group is not None and args.group < 2:
        raise UserError("--group must be 2 or more: an advantage compares the rollouts of one prompt")
    examples, vals, tests = (task.examples(split) for split in data.SPLITS)
    run.check_examples(args, train=examples, val=vals, test=tests)  # all: rewards may draw from them
    examples, vals, tests = examples[: args.train_prompts], vals[: args.val], tests[: args.n]

    # The model, with the settings for its size.
    source = run.source_of_weights(args, saved)
    model, tokenizer = load(source, args.device)
    run.use_graphs(model, args.graphs)
    data.start_task(args, task, args.model)
    if args.method == "grpo" and args.overlong_buffer is None:
        args.overlong_buffer = 0  # a small model without tags answers the penalty with no reasoning at all
    made = run.run_settings(args.model)
    for name in targets.OF_A_LATENT:  # a run of stages 1 and 2 has decided what a latent holds
        if getattr(args, name) is None:
            setattr(args, name, made.get(name))
    check_flags_of_latents(args, model, source)
    for name, value in (SMALL if checkpoint.is_small(model) else RELEASED).items():
        is_planned = name in PLANNED and not memory.has_fixed_numbers(model)
        if getattr(args, name, None) is None and not is_planned:
            setattr(args, name, value)
    args.overlong_buffer = min(args.overlong_buffer, args.max_new_tokens)
    args.minibatches = min(args.minibatches, args.prompts, len(examples))  # each has a prompt at least
    if not learns_targets(args):
        args.anchor = 0.0
    if args.overlong_penalty is None:
        args.overlong_penalty = getattr(task, "PENALTY", 1.0)
    if source == args.model:
        set_start(args, model)

    # Stop now if something cannot work, not in the middle of an epoch.
    prompts = encode_prompts(args, model, tokenizer, task, examples + vals)
    checkpoint.check_lengths(model, prompts, args.max_new_tokens)
    display.check_answers(task, examples[:8])
    display.warn_of_unknown_words(tokenizer, prompts)
    base_learns_in_stage_2 = args.train_base or args.imitate
    if base_learns_in_stage_2 and args.offload is None:
        args.offload = False  # it takes fp32 weights on the card
    plan = fit_to_memory(args, model, task, prompts)
    base = memory.base_parameters(model)
    if args.offload and base_learns_in_stage_2:
        raise UserError("--train-base and --imitate take fp32 weights on the card: leave --offload out, or "
                        "run train_projector.py first")
    masters = memory.offload(model, base) if args.offload else base
    if not args.resume:
        if model.projector_trained and needs_traces(args):
            copy_traces(args)  # it may refuse, and then an earlier run should still be there
        run.delete_earlier_run(args.out)
    run.write_settings(args, "train_rl.py")
    # Until stage 2 and RL say more.
    run.on_stop(lambda: f"go on with: python train_rl.py --resume {args.out}")
    display.say_what_runs(args, model, tokenizer, prompts[: len(examples)], released_settings(args), plan)

    # The rows of the final table that come before RL, stages 1 and 2 among them; a resumed run has them in
    # its state.
    started = time.time()
    first_rows = os.path.join(args.out, "first-rows")
    if saved:
        table_rows = saved[2]["carried"]["rows"]
    else:
        table_rows = (run.read_state(first_rows) or (0, {}, []))[2]

    def add_row(name, latent_prompt, latent):
        """Evaluates one row of the table, unless it is there."""
        if tests and name not in dict(table_rows):
            figures, _ = evaluate(model, tokenizer, task, tests, latent_prompt, seed=args.seed, progress=name,
                                  latent=latent, alone=8, max_new_tokens=args.max_new_tokens, **PAPER)
            table_rows.append((name, figures))
            if not run.saved_states(args.out):
                run.write_state(first_rows, len(table_rows), {}, table_rows)

    def show_table():
        if table_rows:
            print(f"\n{display.table(table_rows, data.measure_of(task))}", flush=True)

    if saved is None:
        # a run of train_projector.py may have moved the base
        start = "start" if model.projector_trained else "base"
        add_row(f"{start}, explicit reasoning", False, "none")
        if args.method != "grpo":
            add_row(f"{start}, tag prompt", True, "none")  # a plain LM: its tags are text
        if args.method == "litereason":
            if not model.projector_trained:
                try:
                    stages_1_and_2(model, tokenizer, task, args.out, args.max_new_tokens, args.seed,
                                   n=min(200, args.n or 200), every=args.save_every,
                                   steps=args.projector_steps, prompts=args.trace_prompts,
                                   imitate=args.imitate, targets=args.targets, words=args.words,
                                   noise=args.noise,
                                   train_base=0.0 if args.offload else args.train_base,
                                   smoke=args.smoke)
                except UserError:  # no traces: the base's rows say more
                    show_table()
                    raise
                checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
            add_row("LiteReason before RL", True, "projector")

    if args.method == "litereason":
        model.projector_trained = True  # here, or before the run was resumed
    train(args, model, base, masters, tokenizer, task, examples, prompts[: len(examples)], vals, table_rows,
          saved)

    add_row(NAMES[args.method], args.method != "grpo", latent_of_method(args))
    if args.method == "litereason":
        add_row(TAKEN_AWAY, True, "none")
        others = tests and latents_of_others(model, tokenizer, task, task.examples("val")[: args.val or 100],
                                             seed=args.seed, max_new_tokens=args.max_new_tokens, **PAPER)
        if others:
            add_row(ANOTHERS, True, latent_of("other", model, others, args.seed))
    if table_rows:
        results = [{"model": name, **figures} for name, figures in table_rows]
        run.write_json(os.path.join(args.out, "results.json"), results)
        show_table()
        print(f"\n{len(tests)} test stories, the paper's sampling "
              f"(temperature 0.7, top-p 0.8, top-k 20), seed {args.seed}, {time.time() - started:.0f}s for "
              f"everything; numbers in {args.out}/results.json")
        if args.method == "litereason":
            print(what_latents_did(dict(table_rows)))


def what_latents_did(rows):
    """The last line of a run: its own latents against another story's,
    on the same stories and random numbers."""
    if ANOTHERS not in rows:
        return "what the latents did: nothing, the policy runs none"
    own, other = rows[NAMES["litereason"]], rows[ANOTHERS]
    test = against(other, own)
    low, high = test["accuracy_ci95"]
    return (f"what the latents did: {own['accuracy']:.3f} with its own, {other['accuracy']:.3f} with another "
            f"story's ({test['accuracy']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, "
            f"p {test['accuracy_p']:.1g}), in {own['tokens']:.1f} and {other['tokens']:.1f} tokens")


def released_settings(args):
    """The released values of those settings that do something in this run."""
    idle = {"save_every"}
    if args.method != "litereason":
        idle |= {"refresh_lr", "refresh_share", "refresh_every", "targets"}
    if not learns_targets(args):
        idle |= {"words", "noise", "anchor"}
    return {name: value for name, value in RELEASED.items() if name not in idle}


def fit_to_memory(args, model, task, prompts):
    """The settings of memory: fixed ones for a small model on a CPU, else those of the plan -> its lines."""
    reader = getattr(task, "settings", {}).get("scorer")
    lines = []
    if not memory.has_fixed_numbers(model):
        given = dict(gen_batch_size=args.rows, micro_batch_tokens=args.tokens_per_forward,
                     checkpoint_layers=args.checkpoint_layers, offload=args.offload)
        longest = max(map(len, prompts))
        chosen, text = memory.plan(model, longest, args.max_new_tokens, args.prompts, args.group, given,
                                   reader and reader[0])
        args.rows, args.tokens_per_forward, args.checkpoint_layers, args.offload = chosen.values()
        lines = text.splitlines()
    args.offload = bool(args.offload)
    if args.checkpoint_layers:
        memory.checkpoint_layers(model)
    return lines


def check_flags_of_latents(args, model, source):
    """UserError for a flag that would change nothing, said before anything is sampled. Flags are as given,
    without defaults."""
    if args.resume:
        return
    if args.anchor and (args.method != "litereason" or args.targets == "none"):
        raise UserError("--anchor holds the base to targets of latents: it goes with --method litereason "
                        "and --targets words")
    if args.train_base and args.targets == "none":
        raise UserError("--train-base goes with --targets words: the paper's stage 2 leaves the base frozen")
    of_stage_2 = {"--imitate": args.imitate, "--train-base": args.train_base}
    for flag, value in of_stage_2.items():
        if value and source == args.model and model.projector_trained:
            raise UserError(f"{flag} {value} is for stage 2, but {args.model} has a trained projector: leave "
                            "the flag out, or start from a model that has none")


if __name__ == "__main__":
    run.run_script(main)
