"""Stage 3 of the paper (Sec. 3.4): GRPO on a model that may think in latents; stages 1 and 2 first if needed.

The policy is the LM; its actions are the tokens it samples, the tags and their numbers included. Latent
vectors are constants in the policy-gradient pass. The projector learns only by imitation: in stage 2, and
again after each epoch from that epoch's own rewarded rollouts. Ours, with targets: the update holds the base
to the latents of stage 1's traces (the anchor), and the refresh is on such traces too (`rehearse`). The loop
is `train`; its seven numbered steps are the README's.

Left out, and why: (1) no KL term and no reference model: the released runs set the coefficient to 0. (2) No
second pass for the old log-probs: the sampler's own are the scorer's up to rounding (tests/test_decode.py; in
bf16 on CUDA up to 0.2). (3) A small model gets one optimiser step per rollout batch, so that its ratio is 1
up to that rounding and the clip idle; a real model gets 16, as released. (4) Latents are replayed as they
were sampled; --recompute-latents makes them again with the current weights, as released. (5) The learning
rate is constant; the released script leaves it to OpenRLHF's default (--lr-schedule cosine). (6) The refresh
steps on 16 traces at a time, with a clipped gradient; the released one on one trace per GPU, unclipped.

    python train_rl.py                               # the tiny model, all stages, a table: 3 minutes, 2 cores
    python train_rl.py --method grpo                 # RL without latents, by default without a length penalty
    python train_rl.py --resume out/tiny-litereason  # continue a stopped run, exactly: on a CPU bit for bit
    python train_rl.py --model Qwen2.5-1.5B          # plot holes; first data/flawed_fictions/prepare.py
"""
import os

# Sampling and training take turns in memory.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import dataclasses
import json
import math
import random
import shutil
import time

import torch

import data
from eval import PAPER, against, evaluate, latent_of, latents_of_others
from lib import UserError, checkpoint, display, memory, run, scoring
from lib.run import BySize
from litereason import (RULES, TAG, Rollout, generate, load, logprobs, policy_loss, recompute_latents, z_size)
from train_projector import (RATIOS, SHARED, add_anchor, fit_projector, fit_to_targets, masked_again,
                             masked_trace, pieces_of, read_traces, run_stage_1, run_stage_2, set_start,
                             settings_of, warm_up_and_cosine)

# ============================================================ settings
NAMES = display.METHODS
# {title: {name: (default, least value or choices or kind, what it is)}}. BySize: of a model of under 50 M
# parameters, and of any other, which is as released: 2880 steps are 30 passes over 290 stories, 6 rollout
# batches each, 16 steps a batch.
SETTINGS = {
    "what is run": {
        "model": ("tiny", str, "tiny, a directory (a run's too), or a hub name such as Qwen2.5-1.5B"),
        "method": ("litereason", list(NAMES), "litereason; grpo: no tags, no latents; tag: a tag is text"),
        "task": (None, str, "a folder under data/, or tiny.next_chapter [by the model]"),
        "reward": (None, ["contrastive", "vrcli", "thresholded"], "of next_chapter [contrastive]"),
        "scorer": (None, str, "the frozen model that reads chapters [a copy of the base]"),
        "seed": (0, 0, "of all random draws"),
        "smoke": (False, bool, "see whether all works: few prompts, few steps, ten minutes"),
        "out": (None, str, "the run's directory [out/MODEL-TASK-METHOD]"),
        "overwrite": (False, bool, "replace the run that --out holds"),
        "resume": (None, str, "continue the run in this directory, by its own settings")},
    "how much [small model | any other, as released]": {
        "steps": (BySize(24, 2880), 0, "optimiser steps"),
        "prompts": (BySize(16, 48), 1, "prompts per rollout batch"),
        "num_generations": (BySize(16, 16), 2, "rollouts per prompt"),
        "minibatches": (BySize(1, 16), 1, "optimiser steps per rollout batch"),
        "max_new_tokens": (BySize(checkpoint.SLOTS_SMALL, checkpoint.SLOTS_RELEASED), 1,
                           "slots per rollout, latents included"),
        "train_prompts": (None, 1, "train prompts of RL; one pass over them is an epoch [all]"),
        "val": (100, 0, "val examples, evaluated after each epoch; 0 for none"),
        "n": (500, 0, "test stories for the final table; 0 for none")},
    "update of the base": {
        "lr": (BySize(1.2e-4, 5e-7), 0.0, "learning rate of AdamW"),
        "lr_schedule": ("constant", ["constant", "cosine"], "cosine, as released: warm-up, then to a tenth"),
        "rule": ("grpo", list(RULES), "advantages, and what a rollout's loss is divided by"),
        "overlong_buffer": (BySize(checkpoint.SLOTS_SMALL, 0), 0, "DAPO's length penalty: the last N slots"),
        "anchor": (BySize(10.0, 0.0), 0.0, "ours, with --targets words: weight of stage 2's error"),
        "recompute_latents": (False, bool, "score with latents of the current weights, as released")},
    "projector": {
        "targets": SHARED["targets"],
        "projector": SHARED["projector"],
        "trace_prompts": (None, 1, "train prompts of stage 1 [as in train_projector.py]"),
        "projector_steps": (None, 0, "optimiser steps of stage 2 [as in train_projector.py]"),
        "refresh_every": (BySize(0, 0), -1, "rollout batches between refreshes; 0: epochs' ends; -1: never")},
    "memory, speed and disk (no result changes but by rounding)": {
        "gen_batch_size": (None, 1, "rollouts decoded at once, whole groups [what fits]"),
        "micro_batch_tokens": (None, 1, "positions per forward pass of the update [what fits]"),
        "checkpoint_layers": (None, bool, "keep no activations in layers: a third more time [if needed]"),
        "offload": (None, bool, "fp32 weights and AdamW's moments on the host [if needed]"),
        "device": (None, str, "cpu or cuda [cuda if there is one]"),
        "graphs": (True, bool, "on CUDA, record the decoding step and replay it"),
        "save_every": (BySize(4, 16), 1, "steps between two states on the disk; the last two are kept"),
        "show_every": (20, 0, "steps between two rollouts on the screen; 0 for never")}}
# Not flags. Released: the same, but a refresh on one trace for each of 4 GPUs, without a clip.
CLIP = 0.2  # of the probability ratio
REFRESH_LR, REFRESH_SHARE, REFRESH_BATCH, REFRESH_CLIP = 1e-4, 0.1, 16, 0.2
# Memory, of a small model on a CPU.
FIXED = {"gen_batch_size": 512, "micro_batch_tokens": 12_000, "checkpoint_layers": False, "offload": False}
# --smoke: other defaults, so that all stages run to the table in minutes, whatever the model.
SMOKE = {"steps": 4, "prompts": 2, "num_generations": 4, "minibatches": 2, "max_new_tokens": 128,
         "train_prompts": 4, "trace_prompts": 8, "projector_steps": 2, "n": 2, "val": 2}
# Most that sampler and scorer may differ in a log-prob, by whether the model computes in bf16.
DLOGP = {False: 1e-2, True: 2.0}
TAKEN_AWAY, ANOTHERS = "  its latents taken away", "  shuffled latents"


# ============================================================ stage 3
def train(args, model, base, masters, tokenizer, task, examples, prompts, vals, table_rows, saved, stopped):
    """The loop; leaves model/ in args.out. base: the weights that are trained; masters: what the optimiser
    steps on, the same unless offloaded; prompts: of the examples, token ids; table_rows: of the final table,
    so far; saved: what run.read_state found, or None; stopped: see run.stops_noted."""
    # Rollout batches per epoch. Prompts that fill no whole batch sit this epoch out: the next one has a new
    # order.
    per_epoch = max(1, len(examples) // args.prompts)
    optimizer = torch.optim.AdamW(masters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = State(table_rows, args.micro_batch_tokens)
    if saved:
        load_state(state, saved, model, base, masters, optimizer)
        print(f"resumed from {run.state_path(args.out, state.step)}", flush=True)
    else:
        save_state(args, state, model, masters, optimizer)
    for name in ("imitation", "stage-2", "first-rows"):  # what was in them is in the state now
        run.remove(os.path.join(args.out, name))
    log = run.open_log(os.path.join(args.out, "metrics.jsonl"), state.metrics)
    refreshes = args.method == "litereason" and args.refresh_every >= 0
    stage_1 = traces_of_stage_1(args, tokenizer, task) if needs_traces(args) else None
    began, first = time.time(), state.step

    for step in range(first, args.steps):
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
            rewards = data.score(task, asked, [r.text for r in state.rollouts], batch + 1)
            state.rewards = torch.tensor(rewards)  # (B,)
            bad = (~state.rewards.isfinite()).nonzero().flatten().tolist()
            if bad:
                stop(args, step, state, index, bad, f"a reward is {rewards[bad[0]]}")

        # (3) Advantages: each rollout against the other rollouts of its prompt.
        shaped = state.rewards + length_penalty(args, task, state.rollouts)  # (B,)
        groups = shaped.view(len(index), args.num_generations)  # (P, G)
        tokens = torch.tensor([r.n_tokens for r in state.rollouts]).view_as(groups)
        advantages, loss_norm = RULES[args.rule](groups, tokens, args.max_new_tokens)  # (P, G) each
        advantages, loss_norm = advantages.flatten(), loss_norm.flatten()  # (B,) each
        phases.end("reward")

        # (4) Old log-probs: nothing to do, each rollout carries the sampler's own.

        # (5) The clipped loss, in micro-batches.
        chosen = rollouts_of_minibatch(args, batch, minibatch, len(index))
        gap, worst = add_gradients(args, model, state, chosen, advantages, loss_norm)
        anchor_loss = None
        if stage_1 and args.anchor:  # ours, with targets
            anchor_loss = add_anchor(model, tokenizer, stage_1, step, args.anchor, args.noise, args.seed,
                                     state.micro_batch_tokens)
        phases.end("update")
        # Before an update only: after one they must differ. In latents made again rounding grows.
        allowed = DLOGP[model.bf16 or args.offload]
        if minibatch == 0 and gap > allowed and not args.recompute_latents:
            stop(args, step, state, index, [worst], f"sampler and scorer differ by {gap:.3g} in a log-prob; "
                 f"more than {allowed:g} means that what is trained is not what was sampled")

        # (6) One optimiser step on the base; the projector is not in the optimiser and gets no gradient.
        memory.gradients_to_masters(base, masters)
        norm = float(torch.nn.utils.clip_grad_norm_(masters, 1.0))  # OpenRLHF's default
        # A NaN loss has a NaN gradient; a NaN latent may have none.
        is_finite = math.isfinite(norm) and all(r.latents.isfinite().all() for r in state.rollouts)
        if is_finite:
            optimizer.param_groups[0]["lr"] = learning_rate(args, step)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        memory.weights_from_masters(base, masters)
        phases.end("step")

        # (7) At the end of each epoch the projector is refreshed on the epoch's own rewarded rollouts.
        if minibatch == 0 and refreshes and args.targets == "none":
            state.rewarded += [(index[r.prompt], r.text) for r, reward in zip(state.rollouts, rewards)
                               if reward > 0]
        refresh_loss = val = None
        ends_epoch = (step + 1) % (per_epoch * args.minibatches) == 0
        is_due = args.refresh_every > 0 and (step + 1) % (args.refresh_every * args.minibatches) == 0
        if refreshes and (ends_epoch or is_due):
            if args.targets == "none":
                refresh_loss = refresh(args, model, tokenizer, task, state, examples, prompts, batch)
            else:
                refresh_loss = rehearse(args, model, tokenizer, state, stage_1, batch)
            phases.end("refresh")
        if ends_epoch:
            checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
            val = validate(args, model, tokenizer, task, vals)
            phases.end("validate")

        # The step's line, and the state.
        state.step = step + 1
        state.skipped += not is_finite
        state.skipped_in_a_row = 0 if is_finite else state.skipped_in_a_row + 1
        m = metrics(model, task, state, epoch, groups, gap, norm, anchor_loss, refresh_loss, val, phases)
        tell(args, tokenizer, log, state, m, is_new_batch=minibatch == 0)
        if state.step == first + args.minibatches:
            seconds = (time.time() - began) / args.minibatches
            hours = seconds * (args.steps - state.step) / 3600
            print(f"pace: {seconds:.1f} seconds a step, {hours:.1f} hours to go", flush=True)
        if not is_finite:
            aside = put_aside(args, step, state, chosen)
            print(f"warning: step {step + 1}: a loss, gradient or latent is not finite; step skipped, "
                  f"{state.skipped} so far; its rollouts are in {aside}", flush=True)
        fails = state.skipped_in_a_row == 3
        if state.step % args.save_every == 0 or state.step == args.steps or fails or stopped:
            save_state(args, state, model, masters, optimizer)
        if fails:
            raise UserError(f"steps {step - 1} to {step + 1} were not finite and were skipped: stopped; the "
                            f"weights before them are in {run.state_path(args.out, state.step)}")
        if stopped:
            return
    log.close()
    checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
    print(f"saved {args.out}/model")


# ============================================================ what goes from one step to the next
@dataclasses.dataclass
class State:
    """Besides weights and moments; on the disk with them. The order of the data and all draws follow from
    (seed, step): they need no state."""

    table_rows: list  # (name, figures) of the final table, so far
    micro_batch_tokens: int  # halved when memory runs out
    step: int = 0  # optimiser steps that are done
    rollouts: list = ()  # of the present batch, for its further minibatches
    rewards: torch.Tensor = None  # (B,) theirs, the task's alone
    rewarded: list = dataclasses.field(default_factory=list)  # for the refresh: (train prompt's number, text)
    metrics: list = dataclasses.field(default_factory=list)  # the lines of metrics.jsonl
    skipped: int = 0  # steps that were not finite
    skipped_in_a_row: int = 0


def save_state(args, state, model, masters, optimizer):
    is_in_batch = state.step % args.minibatches > 0  # else its rollouts are not needed any more
    rollouts = [vars(r) for r in state.rollouts] if is_in_batch else []
    run.write_state(args.out, state.step, {
        "state": {**vars(state), "rollouts": rollouts},
        "weights": [p.detach() for p in masters],
        "projector": model.reasoning_projector.state_dict(),
        "adamw": optimizer.state_dict()})


@torch.no_grad()
def load_state(state, saved, model, base, masters, optimizer):
    """The inverse. saved: what run.read_state found."""
    _, value = saved
    vars(state).update(value["state"])
    state.rollouts = [Rollout(**row) for row in state.rollouts]
    for p, weight in zip(masters, value["weights"]):
        p.copy_(weight)
    memory.weights_from_masters(base, masters)
    model.reasoning_projector.load_state_dict(value["projector"])
    optimizer.load_state_dict(value["adamw"])


# ============================================================ the parts of a step, in the order of the loop
def latent_of_method(args):
    """What a tag of the policy runs."""
    return "projector" if args.method == "litereason" else "none"


def prompts_of_batch(seed, n_examples, n_prompts, epoch, batch_in_epoch):
    """The numbers of a rollout batch's train prompts: their order is a function of (seed, epoch) alone."""
    order = random.Random(f"{seed} {epoch}").sample(range(n_examples), n_examples)
    return order[batch_in_epoch * n_prompts :][:n_prompts]


def sample_groups(args, model, tokenizer, prompts, batch):
    """Step (1): num_generations rollouts for each prompt; the draws are a function of (seed, batch) alone."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + batch)
    return generate(model, tokenizer, prompts, args.num_generations, args.max_new_tokens, generator=generator,
                    gen_batch_size=args.gen_batch_size, latent=latent_of_method(args))


def length_penalty(args, task, rollouts):
    """DAPO's soft overlong penalty -> (B,): 0 up to max_new_tokens - overlong_buffer slots, then down to -1
    (or what the task says) at the limit."""
    if not args.overlong_buffer:
        return torch.zeros(len(rollouts))
    length = torch.tensor([len(r.slots) for r in rollouts])  # (B,) latents count
    begins = args.max_new_tokens - args.overlong_buffer
    return getattr(task, "PENALTY", 1.0) * ((begins - length) / args.overlong_buffer).clamp(-1, 0)


def rollouts_of_minibatch(args, batch, minibatch, n_prompts):
    """Their numbers within the rollout batch, whole groups, in order."""
    rng = random.Random(f"{args.seed} {batch} minibatches")
    shuffled = rng.sample(range(n_prompts), n_prompts)
    groups = sorted(shuffled[minibatch :: args.minibatches])
    return [group * args.num_generations + i for group in groups for i in range(args.num_generations)]


def add_gradients(args, model, state, chosen, advantages, loss_norm):
    """Step (5) for the rollouts `chosen` (their numbers) -> (how far sampler and scorer differ at most in a
    log-prob, in which rollout). Out of memory: again with half the positions per forward pass; no result
    changes."""
    while True:
        try:
            return _add_gradients(args, model, state, chosen, advantages, loss_norm)
        except torch.OutOfMemoryError:
            if state.micro_batch_tokens < args.max_new_tokens:  # that was one rollout alone
                raise
        memory.forget_gradients(model)  # here the exception, and what it held, is gone
        torch.cuda.empty_cache()
        state.micro_batch_tokens //= 2
        print(f"step {state.step + 1}: out of memory in the update; from here on --micro-batch-tokens is "
              f"{state.micro_batch_tokens}", flush=True)


def _add_gradients(args, model, state, chosen, advantages, loss_norm):
    """As many rollouts at once as the budget of positions allows, each with its share of the whole mean.
    Those without an advantage have no gradient and are not run; they count in the denominator."""
    largest, worst = 0.0, None
    useful = [b for b in chosen if advantages[b] != 0]
    for indices in scoring.pack([state.rollouts[b] for b in useful], state.micro_batch_tokens):
        micro = [useful[i] for i in indices]
        some = [state.rollouts[b] for b in micro]
        if args.recompute_latents and args.method == "litereason":
            some = recompute_latents(model, some)
        logp, scored = logprobs(model, some)  # (b, S)
        old_logp = torch.nn.utils.rnn.pad_sequence([r.logprobs for r in some], batch_first=True).to(logp)
        loss, _ = policy_loss(logp, old_logp, advantages[micro].to(logp), scored, len(chosen), CLIP,
                              loss_norm[micro].to(logp.device))
        loss.backward()
        memory.wait_for_gradients(model)
        gaps = torch.where(scored, (logp.detach() - old_logp).abs(), 0.0).amax(1)  # (b,)
        if gaps.max() > largest:
            largest = float(gaps.max())
            worst = micro[int(gaps.argmax())]
    return largest, worst


def learning_rate(args, step):
    """Step (6): constant (ours) or, as OpenRLHF's default, up over the first 3 % of the steps and then down a
    cosine to a tenth."""
    if args.lr_schedule == "constant":
        return args.lr
    return args.lr * warm_up_and_cosine(step, args.steps, math.ceil(0.03 * args.steps))


def refresh(args, model, tokenizer, task, state, examples, prompts, batch):
    """Step (7), paper Sec. 3.4 -> the loss, or None if there was nothing to learn from.

    A random share of the rewarded rollouts since the last refresh, each masked once per ratio; tags already
    there stay and are never replaced; the target ends in the gold answer in exactly the format that the
    reward parses. batch: the number of the rollout batch just learned from."""
    rewarded, state.rewarded = state.rewarded, []
    if not rewarded:
        return None
    rng = random.Random(f"{args.seed} {batch} refresh")
    marker = data.opening_of(task)
    traces = []
    for i, text in rng.sample(rewarded, max(1, int(REFRESH_SHARE * len(rewarded)))):
        gold = task.answer(examples[i]) if hasattr(task, "answer") else None
        for ratio in RATIOS:
            trace = masked_trace(model, tokenizer, rng, prompts[i], text, gold, marker, ratio)
            traces += [] if trace is None else [trace]
    if not traces:
        return None
    return fit_projector(model, traces, REFRESH_LR, REFRESH_BATCH, schedule=False, seed=batch,
                         clip=REFRESH_CLIP, budget=state.micro_batch_tokens)


def rehearse(args, model, tokenizer, state, stage_1, batch):
    """The refresh with targets (ours) -> the loss, or None if there was nothing to learn from. What the
    latents of a rollout should have said is not known, so stage 2 goes on for some steps instead, on a share
    of stage 1's traces. batch: as in refresh."""
    n = max(1, int(REFRESH_SHARE * len(stage_1[0])))
    rng = random.Random(f"{args.seed} {batch} refresh")
    rows = masked_again(model, tokenizer, stage_1, n, rng)
    if not rows:
        return None
    return fit_to_targets(model, rows, REFRESH_LR, REFRESH_BATCH, schedule=False, seed=batch,
                          clip=REFRESH_CLIP, budget=state.micro_batch_tokens, noise=args.noise)


def traces_of_stage_1(args, tokenizer, task):
    """For the anchor and the refresh with targets -> (traces, [(sentences, answer)], words that tell
    nothing)."""
    traces = read_traces(os.path.join(args.out, "traces.jsonl"))
    return pieces_of(tokenizer, traces, data.opening_of(task))


def needs_traces(args):
    """Whether RL learns from stage 1's traces: the anchor and the refresh with targets do."""
    has_targets = args.method == "litereason" and args.targets == "words"
    return has_targets and (args.anchor > 0 or args.refresh_every >= 0)


def validate(args, model, tokenizer, task, vals):
    """The accuracy on the val examples, None without any; by a generator of its own, so no draw of the
    training changes."""
    if not vals:
        return None
    figures, _ = evaluate(model, tokenizer, task, vals, args.method != "grpo", seed=args.seed,
                          max_new_tokens=args.max_new_tokens, latent=latent_of_method(args))
    return figures["accuracy"]


# ============================================================ the step's line, and what is put aside
def metrics(model, task, state, epoch, groups, gap, norm, anchor_loss, refresh_loss, val, phases):
    """One line of metrics.jsonl. The loss is not among them: under grpo, at ratio 1, it is 0 by
    construction."""

    def mean(of):
        return sum(map(of, state.rollouts)) / len(state.rollouts)

    return {
        "step": state.step,
        "epoch": epoch,
        "reward": float(groups.mean()),  # what is trained on, length penalty included
        "accuracy": float(state.rewards.mean()),  # the task's reward alone
        "text_tokens": mean(lambda r: r.n_tokens),  # sampled tokens per rollout
        "latent_steps": mean(lambda r: r.n_latents),  # per rollout
        "tags": mean(lambda r: r.n_tags),  # that ran latents, per rollout
        "tag_share": mean(lambda r: r.n_tags > 0),  # share of rollouts in which one did
        "zero_variance": float((groups.amax(1) == groups.amin(1)).float().mean()),  # teach nothing
        "truncated": mean(lambda r: not r.finished),  # share of rollouts cut by the length limit
        "no_verdict": mean(lambda r: not data.has_verdict(task, r.text)),  # the reward found nothing to read
        "max_dlogp": gap,  # how far sampler and scorer differ at most; on a first update it is rounding
        # Median norm of a latent, in sizes of an embedding.
        "z_size": run.if_finite(z_size(model, torch.cat([r.latents for r in state.rollouts]))),
        "grad_norm": run.if_finite(norm),  # before clipping
        "skipped": state.skipped,  # steps so far that were not finite
        "anchor_loss": anchor_loss,
        "refresh_loss": refresh_loss,
        "val_accuracy": val,
        "seconds": phases.seconds,  # by phase
        "peak_memory_gib": phases.memory}  # by phase; on CUDA the allocator's, on a CPU the process's so far


def step_line(m, steps):
    """A step in one line. m: its metrics; steps: of the whole run."""
    norm = math.nan if m["grad_norm"] is None else m["grad_norm"]
    size = "-" if m["z_size"] is None else f"{m['z_size']:.2g}"
    seconds, gib = m["seconds"], m["peak_memory_gib"]
    line = (f"step {m['step']:4d}/{steps} | reward {m['reward']:6.3f} | text {m['text_tokens']:6.1f} | "
            f"latent {m['latent_steps']:5.1f} | tags {m['tags']:4.2f} | z size {size:>4s} | "
            f"zero-var {m['zero_variance']:4.2f} | cut {m['truncated']:4.2f} | gnorm {norm:6.3f} | "
            f"dlogp {m['max_dlogp']:.0e} | {sum(seconds.values()):5.1f}s "
            f"(sample {seconds.get('sample', 0):.1f}) | GiB {gib.get('sample', 0):.2f} {gib['update']:.2f}")
    now_and_then = {"no verdict": m["no_verdict"] or None, "refresh loss": m["refresh_loss"],
                    "val": m["val_accuracy"]}
    return line + "".join(f" | {name} {x:.3f}" for name, x in now_and_then.items() if x is not None)


def tell(args, tokenizer, log, state, m, is_new_batch):
    """Metrics to the file; the step's line, two rollouts now and then, and warnings to the screen."""
    state.metrics.append(json.dumps(m) + "\n")
    log.write(state.metrics[-1])
    log.flush()
    print(step_line(m, args.steps), flush=True)
    if args.show_every and (m["step"] - 1) % args.show_every == 0:
        for b in (0, args.num_generations)[: args.prompts]:
            shown = display.readable(tokenizer, state.rollouts[b])
            print(f"    [{float(state.rewards[b]):g}] {shown}", flush=True)
    if is_new_batch:
        warn(m, args.method == "litereason", [r.text for r in state.rollouts])


def warn(m, has_latents, texts):
    """Prints what is wrong with a rollout batch, if anything is. m: the step's metrics; texts: what was
    written."""
    warnings = []
    if has_latents and m["tag_share"] == 0:
        warnings.append("no rollout ran a tag: there is no latent reasoning left")
    if m["zero_variance"] == 1:
        warnings.append(f"in each group all earned the same (mean {m['reward']:.3f}): nothing to learn from")
    if len(set(texts)) == 1:
        warnings.append(f"all {len(texts)} rollouts wrote the same: {texts[0][:60]!r}")
    elif not any(TAG.sub("", text).strip() for text in texts):
        warnings.append(f"all {len(texts)} rollouts wrote tags and nothing else")
    for warning in warnings:
        print(f"warning: step {m['step']}: {warning}", flush=True)


def stop(args, step, state, index, which, why):
    """A tripwire: these rollouts are put aside, and the run ends."""
    prompt = index[state.rollouts[which[0]].prompt]
    raise UserError(f"step {step + 1}: {why}: rollout {which[0]}, of train prompt {prompt}, is in "
                    f"{put_aside(args, step, state, which)}")


def put_aside(args, step, state, which):
    """Writes the rollouts that caused trouble to a file, to be read -> its path. which: their numbers."""
    path = os.path.join(args.out, "bad-rollouts.json")
    rows = []
    for b in which:
        r = state.rollouts[b]
        rows.append({"step": step + 1, "rollout": b, "reward": float(state.rewards[b]), "text": r.text,
                     "latents_finite": bool(r.latents.isfinite().all()), "prompt_ids": r.prompt_ids,
                     "slots": r.slots, "logprobs": r.logprobs.tolist()})
    run.write_json(path, rows)
    return path


# ============================================================ the script
def parse_arguments():
    ap = run.parser(__doc__)
    run.add_flags(ap, SETTINGS)
    if ap.parse_known_args()[0].smoke:
        ap.set_defaults(**SMOKE)  # what the command line says wins
    return run.parse_resumable(ap, "train_rl.py", free=("steps", "device", "graphs"))


def main():
    args = parse_arguments()
    args.task, task = data.choose_task(args.task, args.model, args.reward, args.scorer)
    args.out = args.out or run.default_out(args.model, args.task, args.method)
    run.check_bounds(args, SETTINGS)
    run.check_arguments(args)
    lock_file = run.lock(args.out)  # noqa: F841, held until the process ends
    saved = run.read_state(args.out) if args.resume else None
    run.check_what_is_there(args.out, args.model, args.resume, args.overwrite)
    examples, vals, tests = (task.examples(split) for split in data.SPLITS)
    args.examples, args.data = run.check_examples(args.out, args.resume, train=examples, val=vals, test=tests)
    examples, vals, tests = examples[: args.train_prompts], vals[: args.val], tests[: args.n]

    # The model, and the settings that it decides.
    model, tokenizer = load(args.model, args.device)
    run.use_graphs(model, args.graphs)
    data.start_task(task, args.model, args.reward, args.scorer, args.seed, args.device)
    settle(args, model, saved, len(examples))
    set_start(args, model)

    # Stop now if something cannot work, not in the middle of an epoch.
    has_tags = args.method != "grpo"
    texts = [task.prompt(example, has_tags) for example in examples + vals]
    prompts = [checkpoint.encode_prompt(model, tokenizer, text) for text in texts]
    checkpoint.check_lengths(model, prompts, args.max_new_tokens)
    check_answers(task, examples[:8])
    plan = settle_memory(args, model, task, max(map(len, prompts)))
    base = memory.base_parameters(model)
    masters = memory.offload(model, base) if args.offload else base
    if not args.resume:
        if model.projector_trained and needs_traces(args):
            copy_traces(args)  # it may refuse, and then an earlier run should still be there
        run.delete_earlier_run(args.out)
    run.write_settings(args.out, "train_rl.py", vars(args))
    prompts = prompts[: len(examples)]
    say_what_runs(args, model, prompts, plan)

    # The rows of the final table that come before RL, stages 1 and 2 among them.
    started = time.time()
    first_rows = os.path.join(args.out, "first-rows")
    if saved:
        table_rows = saved[1]["state"]["table_rows"]
    else:
        table_rows = (run.read_state(first_rows) or (0, {"rows": []}))[1]["rows"]

    def add_row(name, has_tags, latent):
        """Evaluates one row of the table, unless it is there."""
        if tests and name not in dict(table_rows):
            figures, _ = evaluate(model, tokenizer, task, tests, has_tags, seed=args.seed, progress=name,
                                  latent=latent, alone=8, max_new_tokens=args.max_new_tokens, **PAPER)
            table_rows.append((name, figures))
            if not run.saved_states(args.out):
                run.write_state(first_rows, len(table_rows), {"rows": table_rows})

    def show_table():
        if table_rows:
            print(f"\n{display.table(table_rows, data.measure_of(task))}", flush=True)

    if not saved:
        start = "start" if model.projector_trained else "base"  # stage 2 may have moved the base
        add_row(f"{start}, explicit reasoning", False, "none")
        if has_tags:
            add_row(f"{start}, tag prompt", True, "none")  # a plain LM: its tags are text
        if args.method == "litereason":
            if not model.projector_trained:
                of_stages = settings_of(model, prompts=args.trace_prompts, steps=args.projector_steps,
                                        targets=args.targets, max_new_tokens=args.max_new_tokens,
                                        seed=args.seed, save_every=args.save_every)
                try:
                    masked, held, _ = run_stage_1(model, tokenizer, task, args.out, of_stages, args.smoke)
                except UserError:  # no traces: the base's rows say more
                    show_table()
                    raise
                run_stage_2(model, tokenizer, masked, held, args.out, of_stages)
                checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
            add_row("LiteReason before RL", True, "projector")

    if args.method == "litereason":
        model.projector_trained = True  # here, or before the run was resumed
    with run.stops_noted(f"go on with: python train_rl.py --resume {args.out}") as stopped:
        train(args, model, base, masters, tokenizer, task, examples, prompts, vals, table_rows, saved,
              stopped)

    add_row(NAMES[args.method], has_tags, latent_of_method(args))
    if args.method == "litereason":
        add_row(TAKEN_AWAY, True, "none")
        others = tests and latents_of_others(model, tokenizer, task, task.examples("val")[: args.val or 100],
                                             seed=args.seed, max_new_tokens=args.max_new_tokens, **PAPER)
        if others:
            add_row(ANOTHERS, True, latent_of("shuffled", model, others, args.seed))
    if table_rows:
        results = [{"model": name, **figures} for name, figures in table_rows]
        run.write_json(os.path.join(args.out, "results.json"), results)
        show_table()
        print(f"\n{len(tests)} test stories, the paper's sampling (temperature 0.7, top-p 0.8, top-k 20), "
              f"seed {args.seed}, {time.time() - started:.0f}s in all; numbers in {args.out}/results.json")
        if args.method == "litereason":
            print(what_latents_did(dict(table_rows)))


def settle(args, model, saved, n_examples):
    """Gives each setting that no flag gave its value. UserError for a flag that would change nothing."""
    made = run.run_settings(args.out if args.resume else args.model)
    if saved and args.steps is not None and args.steps < saved[0]:
        raise UserError(f"--steps is {args.steps}, but the run in {args.out} is at step {saved[0]} already")
    if saved and args.lr_schedule == "cosine" and args.steps != made["steps"]:
        raise UserError("--steps: with --lr-schedule cosine the learning rate falls towards the --steps that "
                        "the run began with, so a resumed run keeps them")
    # A run of stages 1 and 2 has decided what a latent holds.
    of_latents = settings_of(model, targets=args.targets or made.get("targets"), noise=made.get("noise"))
    args.targets, args.noise = of_latents.targets, of_latents.noise
    if args.method != "litereason" or args.targets == "none":
        if args.anchor:
            raise UserError("--anchor holds the base to targets of latents: it goes with --method litereason "
                            "and --targets words")
        args.anchor = 0.0
    if args.method == "grpo" and args.overlong_buffer is None:
        args.overlong_buffer = 0  # a small model without tags answers the penalty with no reasoning at all
    run.fill(args, SETTINGS, checkpoint.is_small(model))
    args.overlong_buffer = min(args.overlong_buffer, args.max_new_tokens)
    args.minibatches = min(args.minibatches, args.prompts, n_examples)  # each has a prompt at least


def settle_memory(args, model, task, longest):
    """The settings of memory: fixed ones for a small model on a CPU, else those of the plan -> its text."""
    given = {name: getattr(args, name) for name in FIXED}
    if memory.has_fixed_numbers(model):
        chosen = {name: FIXED[name] if value is None else value for name, value in given.items()}
        plan = ""
    else:
        reader = getattr(task, "settings", {}).get("scorer")
        chosen, plan = memory.plan(model, longest, args.max_new_tokens, args.prompts, args.num_generations,
                                   given, reader and reader[0])
    vars(args).update(chosen)
    if args.checkpoint_layers:
        memory.checkpoint_layers(model)
    return plan


def check_answers(task, examples):
    """Before the first step, on real rows: the refresh's target, the label and the reward agree. For tasks
    with `answer`."""
    marker = data.opening_of(task)
    for i, example in enumerate(examples if hasattr(task, "answer") else []):
        answer = task.answer(example)
        reward = data.score(task, [example], ["Some reasoning.\n" + answer])[0]
        if reward != 1 or not answer.startswith(marker):
            raise UserError(f"train example {i}: its own answer {answer!r} earns {reward:g}, not 1, or does "
                            f"not begin with {marker!r}: the label, the answer and the reward do not agree")


def copy_traces(args):
    """Those of the run that --model is, into --out: so a run can be continued without that one."""
    theirs = os.path.join(run.directory_of_run(args.model), "traces.jsonl")
    ours = os.path.join(args.out, "traces.jsonl")
    way = "say --targets none, or --anchor 0 --refresh-every -1"
    if not os.path.exists(theirs):
        raise UserError(f"--targets words needs stage 1's traces in RL, and there is no {theirs}: {way}")
    with open(theirs) as f:
        header = json.loads(f.readline())
    if header.get("tag", "forbidden") != "forbidden":  # what their tags skipped is not known, so no target is
        raise UserError(f"the traces in {theirs} may hold tags, as the paper's stage 1 leaves them: {way}")
    if os.path.abspath(theirs) != os.path.abspath(ours):
        shutil.copyfile(theirs, ours)


def say_what_runs(args, model, prompts, plan):
    """What is trained, on how much, and what differs from the released settings. plan: of memory."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    weights = "bf16 weights, fp32 masters on the host" if args.offload else "fp32 weights"
    print(f"{args.method} on {args.task}: {args.model}, {millions:.1f} M parameters, {model.device}, "
          f"{weights}; {len(prompts)} train prompts of up to {max(map(len, prompts))} tokens")
    n_rollouts = args.prompts * args.num_generations
    print(f"{args.steps} steps, {args.minibatches} on each batch of {n_rollouts} rollouts of up to "
          f"{args.max_new_tokens} tokens, {args.num_generations} for each of {args.prompts} prompts")
    idle = {"save_every"} if args.method == "litereason" else {"save_every", *SETTINGS["projector"]}
    print(run.beside_released(vars(args), SETTINGS, idle), *filter(None, [plan]), sep="\n", flush=True)


def what_latents_did(rows):
    """The last line of a run: its own latents against shuffled ones, on the same stories and draws."""
    if ANOTHERS not in rows:
        return "what the latents did: nothing, the policy runs none"
    own, other = rows[NAMES["litereason"]], rows[ANOTHERS]
    test = against(other, own)
    low, high = test["accuracy_ci95"]
    return (f"what the latents did: {own['accuracy']:.3f} with its own, {other['accuracy']:.3f} with "
            f"shuffled ones ({test['accuracy']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, "
            f"p {test['accuracy_p']:.1g}), in {own['tokens']:.1f} and {other['tokens']:.1f} tokens")


if __name__ == "__main__":
    run.run_script(main)
