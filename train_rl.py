"""Stage 3 of the paper (Sec. 3.4): GRPO on a model that may think in latents; stages 1 and 2 first if needed.

The policy is the LM; its actions are the tokens it samples, the tags among them. Latents are constants in the
policy-gradient pass. The projector learns only by imitation: in stage 2, and after each epoch from that
epoch's own rewarded rollouts. Ours, with targets: `add_anchor` in the update, and `rehearse` as the refresh.

Every difference from the released code: results/differences.md.

    python train_rl.py                               # the tiny model, all stages, a table: 4 minutes
    python train_rl.py --resume out/tiny-litereason  # continue a stopped run: on a CPU bit for bit
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
from eval import PAPER, evaluate, latent_of, latents_of_others
from lib import UserError, checkpoint, decoder, display, memory, run, scoring
from lib.run import BySize
from litereason import RULES, Rollout, generate, load, logprobs, policy_loss, recompute_latents, z_size
from train_projector import (RATIOS, SHARED, add_anchor, fit_projector, fit_to_targets, kept, lines_of,
                             masked_again, masked_trace, pieces_of, run_stage_1, run_stage_2, set_start,
                             settings_of, warm_up_and_cosine)

# ============================================================ settings
NAMES = {"litereason": "LiteReason", "grpo": "RL without latents", "tag": "RL with tags, no latents"}
MEMORY = "memory, speed and disk (no result changes but by rounding)"
# As in train_projector.py; 2880 steps are 30 passes over 290 stories.
SETTINGS = {
    "what is run": run.COMMON | {
        "method": ("litereason", list(NAMES), "litereason; grpo: no tags, no latents; tag: a tag is text"),
        "smoke": (False, bool, "see whether all works: few prompts, few steps, ten minutes")},
    "how much [small model | any other, as released]": {
        "steps": (BySize(24, 2880), 0, "optimiser steps"),
        "prompts": (BySize(16, 48), 1, "prompts per rollout batch"),
        "num_generations": (BySize(16, 16), 2, "rollouts per prompt"),
        "minibatches": (BySize(1, 16), 1, "optimiser steps per rollout batch"),
        "max_new_tokens": (run.SLOTS, 1, "slots per rollout, latents included"),
        "train_prompts": (None, 1, "train prompts of RL; one pass over them is an epoch [all]"),
        "val": (100, 0, "val examples, evaluated after each epoch; 0 for none"),
        "n": (500, 0, "test stories for the final table; 0 for none")},
    "update of the base": {
        "lr": (BySize(1.2e-4, 5e-7), 0.0, "learning rate of AdamW"),
        "lr_schedule": ("constant", ["constant", "cosine"], "cosine, as released: warm-up, then to a tenth"),
        "rule": ("grpo", list(RULES), "advantages, and what a rollout's loss is divided by"),
        "overlong_buffer": (BySize(run.SLOTS.small, 0), 0, "DAPO's length penalty: the last N slots"),
        "anchor": (BySize(10.0, 0.0), 0.0, "ours, with --targets words: weight of stage 2's error"),
        "recompute_latents": (False, bool, "score with latents of the current weights, as released")},
    "projector": {
        "targets": SHARED["targets"],
        "projector": SHARED["projector"],
        "trace_prompts": (None, 1, "train prompts of stage 1 [as in train_projector.py]"),
        "projector_steps": (None, 0, "optimiser steps of stage 2 [as in train_projector.py]"),
        "refresh_every": (BySize(0, 0), -1, "rollout batches between refreshes; 0: epochs' ends; -1: never")},
    MEMORY: {  # None: as lib/memory.py plans it
        "gen_batch_size": (BySize(512, None), 1, "rollouts decoded at once, whole groups"),
        "micro_batch_tokens": (BySize(12_000, None), 1, "positions per forward pass of the update"),
        "checkpoint_layers": (BySize(False, None), bool, "keep no activations in layers: a third more time"),
        "offload": (BySize(False, None), bool, "fp32 weights and AdamW's moments on the host"),
        "graphs": (True, bool, "on CUDA, record the decoding step and replay it"),
        "save_every": (BySize(4, 16), 1, "steps between two states on the disk; the last two are kept"),
        "show_every": (20, 0, "steps between two rollouts on the screen; 0 for never")}}
CLIP = 0.2  # of the probability ratio
REFRESH_LR, REFRESH_SHARE, REFRESH_BATCH, REFRESH_CLIP = 1e-4, 0.1, 16, 0.2
# --smoke: other defaults, so that all stages run to the table in minutes, whatever the model.
SMOKE = {"steps": 4, "prompts": 2, "num_generations": 4, "minibatches": 2, "max_new_tokens": 128,
         "train_prompts": 4, "trace_prompts": 8, "projector_steps": 2, "n": 2, "val": 2}
# Most that sampler and scorer may differ in a log-prob, by whether the model computes in bf16.
DLOGP = {False: 1e-2, True: 2.0}


# ============================================================ stage 3
def train(args, model, base, masters, tokenizer, task, examples, prompts, vals, stage_1, saved, stopped):
    """The loop; leaves model/ in args.out. base: the weights that are trained; masters: what the optimiser
    steps on, the same unless offloaded; prompts: of the examples, token ids; stage_1: its traces, with
    targets; saved: what run.read_state found, or None; stopped: see run.stops_noted."""
    # Prompts that fill no whole rollout batch sit this epoch out: the next one has a new order.
    per_epoch = max(1, len(examples) // args.prompts)
    optimizer = torch.optim.AdamW(masters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    state = State(args.micro_batch_tokens)
    if saved:
        load_state(state, saved, model, base, masters, optimizer)
        print(f"resumed from {run.state_path(args.out, state.step)}", flush=True)
    else:
        save_state(args, state, model, masters, optimizer)
    for name in ("imitation", "stage-2"):  # states of stage 2: what was in them is in RL's now
        shutil.rmtree(os.path.join(args.out, name), ignore_errors=True)
    log = run.open_log(os.path.join(args.out, "metrics.jsonl"), state.metrics)
    latent = "projector" if args.method == "litereason" else "none"  # what a tag of the policy runs
    refreshes = args.method == "litereason" and args.refresh_every >= 0
    began, first = time.time(), state.step

    for step in range(first, args.steps):
        # Numbers of the rollout batch, of the minibatch in it, and of the train prompts.
        batch, minibatch = divmod(step, args.minibatches)
        epoch, batch_in_epoch = divmod(batch, per_epoch)
        order = random.Random(f"{args.seed} {epoch}").sample(range(len(examples)), len(examples))
        index = order[batch_in_epoch * args.prompts :][: args.prompts]
        phases = run.Phases(model.device)
        if minibatch == 0:
            # (1) Sample a group of rollouts for each prompt. All draws follow from (seed, batch).
            state.rollouts = generate(
                model, tokenizer, [prompts[i] for i in index], args.num_generations, args.max_new_tokens,
                generator=torch.Generator().manual_seed(args.seed * 1_000_003 + batch), latent=latent,
                gen_batch_size=args.gen_batch_size)
            phases.end("sample")

            # (2) Reward what the policy wrote.
            asked = [examples[index[r.prompt]] for r in state.rollouts]
            rewards = data.score(task, asked, [r.text for r in state.rollouts], batch + 1)
            state.rewards = torch.tensor(rewards)  # (B,)
            bad = (~state.rewards.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise UserError(f"step {step + 1}: a reward is {rewards[bad[0]]}; {aside(args, state, bad)}")

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
        gap = add_gradients(args, model, state, chosen, advantages, loss_norm)
        anchor_loss = None
        if stage_1 and args.anchor:  # ours, with targets
            anchor_loss = add_anchor(model, tokenizer, stage_1, step, args.anchor, args.noise, args.seed,
                                     state.micro_batch_tokens)
        phases.end("update")
        # Before an update only: after one they must differ. In latents made again rounding grows.
        allowed = DLOGP[model.bf16 or args.offload]
        if minibatch == 0 and gap > allowed and not args.recompute_latents:
            raise UserError(f"step {step + 1}: sampler and scorer differ by {gap:.3g} in a log-prob: what is "
                            f"trained is not what was sampled; {aside(args, state, chosen)}")

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
            if vals:
                figures, _ = evaluate(model, tokenizer, task, vals, args.method != "grpo", seed=args.seed,
                                      max_new_tokens=args.max_new_tokens, latent=latent)
                val = figures["accuracy"]
            phases.end("validate")

        # The step's line, and the state.
        state.step = step + 1
        state.skipped += not is_finite
        state.skipped_in_a_row = 0 if is_finite else state.skipped_in_a_row + 1
        m = metrics(model, task, state, epoch, groups, gap, norm, anchor_loss, refresh_loss, val, phases)
        state.metrics.append(json.dumps(m) + "\n")
        log.write(state.metrics[-1])
        log.flush()
        print(step_line(m, args.steps), flush=True)
        if args.show_every and step % args.show_every == 0:
            for b in (0, args.num_generations)[: args.prompts]:
                shown = display.readable(tokenizer, state.rollouts[b])
                print(f"    [{float(state.rewards[b]):g}] {shown}", flush=True)
        if state.step == first + args.minibatches:  # a whole batch was timed
            hours = (time.time() - began) / args.minibatches * (args.steps - state.step) / 3600
            print(f"pace: {hours:.1f} hours to go", flush=True)
        if not is_finite:
            print(f"warning: step {step + 1}: a loss, gradient or latent is not finite; step skipped, "
                  f"{state.skipped} so far; {aside(args, state, chosen)}", flush=True)
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
def length_penalty(args, task, rollouts):
    """DAPO's soft overlong penalty -> (B,): 0, and over the last overlong_buffer slots down to -1 (or what
    the task says)."""
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
    """Step (5) for the rollouts `chosen` (their numbers), in micro-batches -> how far sampler and scorer
    differ at most in a log-prob. Out of memory: again, from here on with half the positions per pass."""
    useful = [b for b in chosen if advantages[b] != 0]  # others have no gradient: not run, but they count

    def add(positions):
        state.micro_batch_tokens = positions
        memory.forget_gradients(model)
        gap = 0.0
        for indices in scoring.pack([state.rollouts[b] for b in useful], positions):
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
            gap = max(gap, float(torch.where(scored, (logp.detach() - old_logp).abs(), 0.0).max()))
        return gap

    one_rollout = args.max_new_tokens - 1
    return decoder.once_more_in_halves(model, add, state.micro_batch_tokens, "positions", least=one_rollout)


def learning_rate(args, step):
    """Step (6): constant, or OpenRLHF's default: up over 3 % of the steps, then down a cosine to a tenth."""
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
    """The refresh with targets (ours) -> the loss, or None. A rollout's latents have no targets, so stage 2
    goes on instead, on a share of stage 1's traces. batch: as in refresh."""
    n = max(1, int(REFRESH_SHARE * len(stage_1[0])))
    rng = random.Random(f"{args.seed} {batch} refresh")
    rows = masked_again(model, tokenizer, stage_1, n, rng)
    if not rows:
        return None
    return fit_to_targets(model, rows, REFRESH_LR, REFRESH_BATCH, schedule=False, seed=batch,
                          clip=REFRESH_CLIP, budget=state.micro_batch_tokens, noise=args.noise)


# ============================================================ the step's line, and what is put aside
def metrics(model, task, state, epoch, groups, gap, norm, anchor_loss, refresh_loss, val, phases):
    """One line of metrics.jsonl. The loss is not there: under grpo, at ratio 1, it is 0 by construction."""

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


def aside(args, state, which):
    """Writes the rollouts that caused trouble (their numbers) to a file, to be read -> where they are."""
    path = os.path.join(args.out, "bad-rollouts.json")
    rows = [{"reward": float(state.rewards[b]), **vars(state.rollouts[b])} for b in which]
    run.write_text(path, json.dumps(rows, default=torch.Tensor.tolist))
    return f"see {path}"


# ============================================================ the script
def parse_arguments():
    ap = run.parser(__doc__, SETTINGS)
    if ap.parse_known_args()[0].smoke:
        ap.set_defaults(**SMOKE)  # what the command line says wins
    return run.parse_resumable(ap, "train_rl.py", free=("steps", "device", "graphs"))


def main():
    args = parse_arguments()
    args.task, task = data.choose_task(args.task, args.model, args.reward, args.scorer)
    args.out = args.out or run.default_out(args.model, args.task, args.method)
    run.check_arguments(args, SETTINGS)
    lock_file = run.take_directory(args.out, args.model, args.resume, args.overwrite)  # noqa: F841
    saved = run.read_state(args.out) if args.resume else None
    examples, vals, tests = (task.examples(split) for split in data.SPLITS)
    args.examples = run.digest([examples, vals, tests])
    examples, vals, tests = examples[: args.train_prompts], vals[: args.val], tests[: args.n]

    # (1) The model, and the settings that it decides.
    model, tokenizer = load(args.model, args.device)
    model.graphs = args.graphs and model.device.type == "cuda"
    data.start_task(task, args.model, args.reward, args.scorer, args.seed, args.device)
    settle(args, model, len(examples))
    set_start(args, model)
    has_tags = args.method != "grpo"
    texts = [task.prompt(example, has_tags) for example in examples + vals]
    prompts = [checkpoint.encode_prompt(model, tokenizer, text) for text in texts]
    checkpoint.check_lengths(model, prompts, args.max_new_tokens)  # now, not in the middle of an epoch
    plan = settle_memory(args, model, task, max(map(len, prompts)))
    if args.checkpoint_layers:
        memory.checkpoint_layers(model)
    base = memory.base_parameters(model)
    masters = memory.offload(model, base) if args.offload else base
    has_targets = args.method == "litereason" and args.targets == "words"
    learns_from_traces = has_targets and (args.anchor > 0 or args.refresh_every >= 0)
    if learns_from_traces and model.projector_trained and not args.resume:
        copy_traces(args)
    run.begin(args.out, "train_rl.py", vars(args))
    prompts = prompts[: len(examples)]
    say_what_runs(args, model, prompts, plan)

    # (2) The table's rows before RL, stages 1 and 2 among them. A file keeps them for a resumed run.
    before = os.path.join(args.out, "before-rl.json")
    rows = run.read_json(before, [])

    def add_row(name, has_tags, latent):
        if tests and name not in [row["model"] for row in rows]:
            figures, _ = evaluate(model, tokenizer, task, tests, has_tags, seed=args.seed, progress=name,
                                  latent=latent, alone=8, max_new_tokens=args.max_new_tokens, **PAPER)
            rows.append({"model": name, **figures})

    if not saved:
        start = "start" if model.projector_trained else "base"  # stage 2 may have moved the base
        add_row(f"{start}, explicit reasoning", False, "none")
        if has_tags:
            add_row(f"{start}, tag prompt", True, "none")  # a plain LM: its tags are text
        run.write_json(before, rows)
        display.show_table(rows, data.measure_of(task))
        if args.method == "litereason" and not model.projector_trained:
            of_stages = settings_of(model, prompts=args.trace_prompts, steps=args.projector_steps,
                                    targets=args.targets, max_new_tokens=args.max_new_tokens, seed=args.seed,
                                    save_every=args.save_every)
            masked, held, _ = run_stage_1(model, tokenizer, task, args.out, of_stages, args.smoke)
            run_stage_2(model, tokenizer, masked, held, args.out, of_stages)
            checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
        if args.method == "litereason":
            add_row("LiteReason before RL", True, "projector")
            run.write_json(before, rows)

    # (3) Stage 3.
    model.projector_trained = args.method == "litereason" or model.projector_trained
    stage_1 = None
    if learns_from_traces:
        _, *lines = lines_of(os.path.join(args.out, "traces.jsonl"))
        stage_1 = pieces_of(tokenizer, kept(lines), data.opening_of(task))
    with run.stops_noted(f"go on with: python train_rl.py --resume {args.out}") as stopped:
        train(args, model, base, masters, tokenizer, task, examples, prompts, vals, stage_1, saved, stopped)

    # (4) The table's rows after it.
    add_row(NAMES[args.method], has_tags, "projector" if args.method == "litereason" else "none")
    if tests and args.method == "litereason":
        add_row("  its latents taken away", True, "none")
        others = latents_of_others(model, tokenizer, task, task.examples("val")[: args.val or 100],
                                   seed=args.seed, max_new_tokens=args.max_new_tokens, **PAPER)
        if others:  # else the policy runs no latents
            add_row(display.SHUFFLED, True, latent_of("shuffled", model, others, args.seed))
    if rows:
        run.write_json(os.path.join(args.out, "results.json"), rows)
        display.show_table(rows, data.measure_of(task))
        print(f"\n{len(tests)} test stories, the paper's sampling, seed {args.seed}; numbers in "
              f"{args.out}/results.json")


def settle(args, model, n_examples):
    """Gives each setting that no flag gave its value."""
    # A run of stages 1 and 2 has decided what a latent holds.
    made = run.run_settings(args.out if args.resume else args.model)
    of_latents = settings_of(model, targets=args.targets or made.get("targets"), noise=made.get("noise"))
    args.targets, args.noise = of_latents.targets, of_latents.noise
    if args.method != "litereason" or args.targets == "none":
        args.anchor = 0.0
    if args.method == "grpo" and args.overlong_buffer is None:
        args.overlong_buffer = 0  # a small model without tags answers the penalty with no reasoning at all
    run.fill(args, SETTINGS, checkpoint.is_small(model))
    args.overlong_buffer = min(args.overlong_buffer, args.max_new_tokens)
    args.minibatches = min(args.minibatches, args.prompts, n_examples)  # each has a prompt at least


def settle_memory(args, model, task, longest):
    """Plans the settings of memory that are still open -> the plan in words."""
    names = ("gen_batch_size", "micro_batch_tokens", "checkpoint_layers", "offload")
    given = {name: getattr(args, name) for name in names}
    if None not in given.values():
        return ""
    reader = getattr(task, "settings", {}).get("scorer")
    chosen, plan = memory.plan(model, longest, args.max_new_tokens, args.prompts, args.num_generations, given,
                               reader and reader[0])
    vars(args).update(chosen)
    return plan


def copy_traces(args):
    """Those of the run that --model is, into --out: so a run can be continued without that one."""
    theirs = os.path.join(run.directory_of_run(args.model), "traces.jsonl")
    if not os.path.exists(theirs):
        raise UserError(f"there is no {theirs}, from which --targets words learns in RL: say --targets none")
    shutil.copyfile(theirs, os.path.join(args.out, "traces.jsonl"))


def say_what_runs(args, model, prompts, plan):
    """What is trained, on how much, and what differs from the released settings. plan: of memory."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    weights = "bf16 weights, fp32 masters on the host" if args.offload else "fp32 weights"
    print(f"{args.method} on {args.task}: {args.model}, {millions:.1f} M parameters, {model.device}, "
          f"{weights}; {len(prompts)} train prompts of up to {max(map(len, prompts))} tokens")
    n_rollouts = args.prompts * args.num_generations
    print(f"{args.steps} steps, {args.minibatches} on each batch of {n_rollouts} rollouts of up to "
          f"{args.max_new_tokens} tokens, {args.num_generations} for each of {args.prompts} prompts")
    if model.device.type == "cpu" and not checkpoint.is_small(model) and not args.smoke:
        print("on a CPU this takes days: --smoke shows in minutes whether all works")
    idle = [*SETTINGS[MEMORY], *(SETTINGS["projector"] if args.method != "litereason" else [])]
    print(run.beside_released(vars(args), SETTINGS, idle), *filter(None, [plan]), sep="\n", flush=True)


if __name__ == "__main__":
    run.run_script(main)
