"""Stage 3 of the paper (Sec. 3.4): GRPO on a model that may think in latents; runs stages 1 and 2 first if it must.

The policy is the LM; its actions are the tokens it samples, the tags and their numbers included. Latent vectors are
constants in the policy-gradient pass. The projector learns only by imitation: in stage 2, and anew after each epoch from
that epoch's own rewarded rollouts. The loop below has seven numbered steps; the README has the same seven.

Left out, and why: (1) no KL term and no reference model: the released runs set the coefficient to 0. (2) No second pass
for the old log-probs: the sampler's own are exact (tests/test_decode.py). (3) A small model gets one optimiser step
per rollout batch, where the released script takes 16 (and so does a real model here): the ratio is then 1 and the clip idle.
(4) Latents are replayed as they were sampled; --recompute-latents makes them anew with the current weights, as released.

    python train_rl.py                                  # the tiny model, all stages, the table: under 2 minutes on 2 cores
    python train_rl.py --method grpo --out out/grpo     # the same RL without latents, for comparison
    python train_rl.py --resume out/rl                  # go on with a stopped run, exactly: on a CPU bit for bit
    python train_rl.py --model Qwen2.5-1.5B             # the paper's plot holes on one GPU; data/flawed_fictions/prepare.py first
"""
import os
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # sampling and training take turns in memory
import argparse
import json
import math
import os
import random
import resource
import shutil
import time

import torch

from data import score, start_task, task_flags
from engine import checkpoint_layers, pack
from eval import evaluate
from litereason import (LATENT, TAG, Rollout, UserError, control_projector, generate, group_advantages, load, logprobs, policy_loss,
                        recompute_latents)
from report import forecast, pace, put_aside, readable, table, warn, warn_of_validation
from runs import (check_arguments, check_lengths, device_flags, encode_prompt, is_small, lock, on_stop, optimizer_tensors, parse_resumable,
                  read_state, restore_optimizer, run_script, run_settings, save, saved_states, signals_restored, write_json, write_settings,
                  write_state)
from train_projector import RATIOS, fit_projector, masked_trace, run as run_stages_1_and_2

# ---------------------------------------------------------------- settings that depend on the model's size
# RELEASED is the authors' script. 2880 steps are 30 passes over 290 stories: 6 rollout batches each, 16 steps per batch. Only the
# last four are not theirs (they have several GPUs and vLLM): how much is in memory at once, and how often the whole state is
# written to the disk (here after each rollout batch; the tiny model's four steps are half a minute). These four change no result.
RELEASED = {"lr": 5e-7, "group": 16, "prompts": 48, "minibatches": 16, "steps": 2880, "max_new_tokens": 2048, "clip": 0.2, "refresh_lr": 1e-4,
            "refresh_share": 0.1, "rows": 256, "tokens_per_forward": 16_384, "checkpoint_layers": True, "save_every": 16}
SMALL = {"lr": 1.5e-4, "group": 16, "prompts": 16, "minibatches": 1, "steps": 48, "max_new_tokens": 160, "clip": 0.2, "refresh_lr": 1e-4,
         "refresh_share": 0.1, "rows": 512, "tokens_per_forward": 12_000, "checkpoint_layers": False, "save_every": 4}
OURS = ("rows", "tokens_per_forward", "checkpoint_layers", "save_every")
DLOGP = {False: 1e-2, True: 2.0}  # most that sampler and scorer may differ, by whether the model computes in bf16; before an update only


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = ap.add_argument_group("what")
    g.add_argument("--model", default="tiny", help="tiny, a directory (a run of train_projector.py too), or a hub name")
    task_flags(g)
    g.add_argument("--out", default="out/rl", metavar="DIR", help="settings, metrics.jsonl, the model and the table go there")
    g.add_argument("--method", default="litereason", choices=["litereason", "grpo", "tag"],
                   help="grpo: the same RL with the plain prompt, no tags and no latents; tag: with the tag prompt, but a tag is text")
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
    g.add_argument("--projector", default="warm", choices=["warm", "random", "pause"], help="what stage 2 starts from: copies of the last MLP "
                   "(the paper), random weights, or instead of a projector one learned vector for every latent (controls)")
    g.add_argument("--no-refresh", action="store_true", help="leave the projector as stage 2 made it")
    g = ap.add_argument_group("run")
    g.add_argument("--resume", default=None, metavar="DIR", help="go on with the run in DIR, by its own settings; only --steps, "
                   "--device and --graphs may stand beside it")
    g.add_argument("--save-every", type=int, default=None, help="steps between two states on the disk, from which --resume goes on; the "
                   "last two are kept")
    g.add_argument("--n", type=int, default=500, help="test stories for the final table; 0 leaves it out")
    g.add_argument("--val", type=int, default=100, help="val examples evaluated after each epoch, to warn if "
                   "validation falls while the train reward rises; 0 leaves it out")
    g.add_argument("--show-every", type=int, default=20, help="print two rollouts every so many steps; 0 never")
    g.add_argument("--seed", type=int, default=0)
    device_flags(g)
    return parse_resumable(ap, "train_rl.py", ("steps", "device", "graphs"))


@signals_restored()
def main():
    args = parse_arguments()
    check_arguments(args, n=0)
    held = lock(args.out)  # until the process ends
    found = read_state(args.out) if args.resume else None
    before, asked_for = saved_states(args.out), run_settings(args.out).get("steps")
    if before and not args.resume and before[-1] < (asked_for or 0):
        raise UserError(f"{args.out} holds a run that was stopped at step {before[-1]} of {asked_for}: go on with --resume {args.out}, choose "
                        f"another --out, or delete {args.out}/state-*")
    if found and args.steps < found[0]:
        raise UserError(f"--steps is {args.steps}, but the run in {args.out} is at step {found[0]} already")
    if args.group is not None and args.group < 2:
        raise UserError("--group must be 2 or more: an advantage compares the rollouts of one prompt")
    model, tokenizer = load(args.model, args.device)
    model.graphs = args.graphs
    task = start_task(args, model, args.model)
    for key, value in (SMALL if is_small(model) else RELEASED).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if args.checkpoint_layers:
        checkpoint_layers(model)
    if args.projector != "warm":
        if model.projector_trained:
            raise UserError(f"--projector {args.projector} is where stage 2 starts, but {args.model} has a trained projector")
        torch.manual_seed(args.seed)
        model.reasoning_projector = control_projector(model, args.projector)
    latent, tags = args.method == "litereason", args.method != "grpo"  # a tag runs latents; the prompt offers the tag
    examples = task.examples("train")[: args.train_prompts]
    prompts = [encode_prompt(model, tokenizer, task.prompt(e, tags)) for e in examples]
    vals = task.examples("val")[: args.val]
    asked = prompts + [encode_prompt(model, tokenizer, task.prompt(e, tags)) for e in vals]
    check_lengths(model, asked, args.max_new_tokens)  # now, not in the middle of an epoch
    check_answers(task, examples[:8])
    if not args.resume:
        for name in [f"state-{step}" for step in before] + ["stage-2", "first-rows"]:  # of an earlier run
            shutil.rmtree(os.path.join(args.out, name), ignore_errors=True)
    write_settings(args, "train_rl.py")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.method} on {args.task}: {args.model}, {parameters / 1e6:.1f} M parameters, {model.device}, fp32 weights; "
          f"{len(examples)} train prompts of up to {max(map(len, prompts))} tokens")
    print("settings: " + ", ".join(f"{k} {getattr(args, k):g}" + (f" (released: {v:g})" if k not in OURS and getattr(args, k) != v else "")
                                   for k, v in RELEASED.items()))
    if not is_small(model):
        print(forecast(model, args, max(map(len, prompts)), *getattr(task, "settings", {}).get("scorer", ())[:1]), flush=True)
        print(pace(model, tokenizer, prompts, args), flush=True)

    # ------------------------------------------------------------ the starting point: table rows, stages 1 and 2
    tests, start, first = task.examples("test")[: args.n], time.time(), os.path.join(args.out, "first-rows")
    rows = found[2]["carried"]["rows"] if found else (read_state(first) or (0, {}, []))[2]

    def note(name, latent_prompt, run="projector"):
        """One row of the final table, unless the run that goes on has it."""
        if tests and name not in dict(rows):
            rows.append((name, evaluate(model, tokenizer, task, tests, latent_prompt, seed=args.seed, progress=name, latent=run, alone=8,
                                        max_new_tokens=args.max_new_tokens)[0]))
            if not saved_states(args.out):
                write_state(first, len(rows), {}, rows)

    if found is None:  # else the state has all that comes of it
        note("base, explicit reasoning", False)
        if tags:
            note("base, tag prompt", True, run="none")  # a plain LM: its tags are text
        if latent:
            if not model.projector_trained:
                run_stages_1_and_2(model, tokenizer, task, args.out, args.max_new_tokens, args.seed, n=min(200, args.n or 200),
                                   every=args.save_every, steps=args.projector_steps, prompts=args.trace_prompts)
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

    # What goes from one step to the next, and so into a state: `done` steps, weights, moments, the rollouts of a batch that has
    # minibatches to go, and `carried`, which is JSON as it stands. The order of the data and all draws follow from (seed, step).
    done, kept, rollouts, earned = 0, None, [], torch.zeros(0)
    carried = {"rows": rows, "metrics": [], "epoch_rollouts": [], "skipped": 0, "skipped_in_a_row": 0,
               "tokens_per_forward": args.tokens_per_forward}
    if found:
        done = kept = found[0]
        rollouts, earned, carried = restore_state(model, masters, optimizer, *found[1:])
        args.tokens_per_forward = carried["tokens_per_forward"]
        print(f"resumed from {args.out}/state-{done}", flush=True)
        if args.offload:
            for p, master in zip(base, masters):
                p.data.copy_(master.data)

    def keep():
        nonlocal kept
        if kept != done:
            save_state(args.out, done, model, masters, optimizer, rollouts if done % args.minibatches else [], earned, carried)
        kept = done
        return f"step {done} of {args.steps} is saved; go on with: python train_rl.py --resume {args.out}"

    keep()  # stages 1 and 2 are safe, and what they needed to go on can go
    for name in ("stage-2", "first-rows"):
        shutil.rmtree(os.path.join(args.out, name), ignore_errors=True)
    path = os.path.join(args.out, "metrics.jsonl")
    log = open(path + ".tmp", "w")
    log.writelines(carried["metrics"])  # resumed: its lines up to the state, none lost, doubled or half written
    log.flush()
    os.replace(path + ".tmp", path)
    hold = on_stop(keep)  # up to step (6) all is as the last finished step left it, and a begun one is dropped; later it is ended
    for step in range(done, args.steps):
        number, part = divmod(step, args.minibatches)  # rollout batch, and which minibatch of it
        epoch, seconds, memory, clock = number // per_epoch, {}, {}, time.time()

        def lap(phase):
            """The phase that ends here: its seconds, and its peak of memory in GiB (on a CPU the process's so far)."""
            nonlocal clock
            if model.device.type == "cuda":
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            else:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            seconds[phase], memory[phase], clock = time.time() - clock, peak / 2**30, time.time()

        # (1) Sample a group of rollouts for each prompt. Data order and draws are functions of (seed, step) alone.
        order = random.Random(f"{args.seed} {epoch}").sample(range(len(examples)), len(examples))
        index = order[number % per_epoch * args.prompts :][: args.prompts]
        if part == 0:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
            new = generate(model, tokenizer, [prompts[i] for i in index], args.group, args.max_new_tokens, generator=generator,
                           rows=args.rows, latent="projector" if latent else "none")
            lap("sample")
            # (2) Reward what the policy wrote; the optional length penalty comes on top.
            got = torch.tensor(score(task, [examples[index[r.prompt]] for r in new], [r.text for r in new], number + 1))  # (B,)
            bad = (~got.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise UserError(f"step {step + 1}: the reward of a rollout of train prompt {index[new[bad[0]].prompt]} is {float(got[bad[0]])}; "
                                f"its text is in {put_aside(args.out, step, new, got, bad)}")
            rollouts, earned = new, got
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
        n_rollouts = len(chosen) * args.group
        for last in (False, True):  # out of memory: once more in halves
            try:
                max_dlogp, worst = add_gradients(model, rollouts, batch, advantages, n_rollouts, args)
                break
            except torch.OutOfMemoryError as e:
                if last:
                    raise UserError(f"step {step + 1}: out of memory with --tokens-per-forward {args.tokens_per_forward} too: start with "
                                    f"less, or with --checkpoint-layers or --offload") from e
            model.zero_grad(set_to_none=True)  # here the exception, and what it held, is gone
            torch.cuda.empty_cache()
            args.tokens_per_forward = carried["tokens_per_forward"] = max(1, args.tokens_per_forward // 2)
            print(f"step {step + 1}: out of memory in the update; from here on --tokens-per-forward is {args.tokens_per_forward}", flush=True)
        lap("update")
        if part == 0 and not args.recompute_latents and max_dlogp > DLOGP[model.bf16 or args.offload]:
            raise UserError(f"step {step + 1}: sampler and scorer differ by {max_dlogp:.3g} in a log-prob of rollout {worst} (train prompt "
                            f"{index[rollouts[worst].prompt]}); more than {DLOGP[model.bf16 or args.offload]:g} means that what is trained is not "
                            f"what was sampled; it is in {put_aside(args.out, step, rollouts, earned, [worst])}")
        # (6) One optimiser step on the base; the projector is not in the optimiser and gets no gradient.
        if args.offload:
            for p, master in zip(base, masters):
                master.grad, p.grad = None if p.grad is None else p.grad.to("cpu", torch.float32), None
        hold(True)
        norm = float(torch.nn.utils.clip_grad_norm_(masters, 1.0))
        whole = math.isfinite(norm) and all(r.latents.isfinite().all() for r in rollouts)  # a NaN loss has a NaN gradient
        if whole:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        carried["skipped"] += not whole
        carried["skipped_in_a_row"] = 0 if whole else carried["skipped_in_a_row"] + 1
        if args.offload:
            for p, master in zip(base, masters):
                p.data.copy_(master.data)
        lap("step")
        # (7) At the end of each epoch the projector is refreshed on the epoch's own rewarded rollouts.
        if latent and not args.no_refresh and part == 0:
            carried["epoch_rollouts"] += [(index[r.prompt], r.text) for r, e in zip(rollouts, earned.tolist()) if e > 0]
        refreshed = val = None
        if (step + 1) % (per_epoch * args.minibatches) == 0:
            if carried["epoch_rollouts"]:
                pairs = [(examples[i], prompts[i], text) for i, text in carried["epoch_rollouts"]]
                refreshed = refresh(model, tokenizer, task, pairs, args, epoch)
            carried["epoch_rollouts"] = []
            save(model, tokenizer, os.path.join(args.out, "model"))
            lap("refresh")
            if vals:  # with a generator of its own: no draw of the training changes
                val = evaluate(model, tokenizer, task, vals, tags, seed=args.seed, rows=args.rows, max_new_tokens=args.max_new_tokens,
                               latent="projector" if latent else "none")[0]
                lap("validate")

        mean = lambda f: sum(map(f, rollouts)) / len(rollouts)
        m = {"step": step + 1, "epoch": epoch, "reward": float(rewards.mean()), "accuracy": float(earned.mean()),
             "text_tokens": mean(lambda r: r.n_tokens), "latent_steps": mean(lambda r: r.n_latents),
             "tags": mean(lambda r: r.n_tags), "tag_share": mean(lambda r: r.n_tags > 0),
             "zero_variance": float((groups.amax(1) == groups.amin(1)).float().mean()),
             "truncated": mean(lambda r: not r.finished), "max_dlogp": max_dlogp, "grad_norm": norm if math.isfinite(norm) else None,
             "skipped": carried["skipped"], "refresh_loss": refreshed, "val_accuracy": val and val["accuracy"],
             "seconds": {k: round(v, 3) for k, v in seconds.items()},
             "peak_memory_gib": {k: round(v, 3) for k, v in memory.items()}}
        carried["metrics"].append(json.dumps(m) + "\n")
        log.write(carried["metrics"][-1])
        log.flush()
        print(f"step {step + 1:4d}/{args.steps} | reward {m['reward']:6.3f} | text {m['text_tokens']:6.1f} | latent {m['latent_steps']:5.1f} | "
              f"tags {m['tags']:4.2f} | zero-var {m['zero_variance']:4.2f} | cut {m['truncated']:4.2f} | gnorm {norm:6.3f} | "
              f"dlogp {max_dlogp:.0e} | {sum(seconds.values()):5.1f}s (sample {seconds.get('sample', 0):.1f}) | "
              f"GiB {memory.get('sample', 0):.2f} {memory['update']:.2f}" + (f" | refresh loss {refreshed:.3f}" if refreshed is not None else ""), flush=True)
        if args.show_every and (step % args.show_every == 0):
            for r, e in list(zip(rollouts, earned.tolist()))[: 2 * args.group : args.group]:
                print(f"    [{e:g}] {readable(tokenizer, r)}", flush=True)
        if part == 0:
            warn(m, latent, len(index), [r.text for r in rollouts])
        if val:
            warn_of_validation([json.loads(line) for line in carried["metrics"]], val)
        if not whole:
            aside = put_aside(args.out, step, rollouts, earned, [p * args.group + i for p in sorted(chosen) for i in range(args.group)])
            print(f"warning: step {step + 1}: a loss, gradient or latent is not finite; step skipped, {carried['skipped']} so far; its rollouts "
                  f"are in {aside}", flush=True)
        done = step + 1
        if done % args.save_every == 0 or done == args.steps or carried["skipped_in_a_row"] >= 3:
            keep()
        if carried["skipped_in_a_row"] >= 3:
            raise UserError(f"steps {done - 2} to {done} were not finite and were skipped: stopped; the weights before them are in {args.out}/state-{done}")
        hold(False)
    log.close()
    save(model, tokenizer, os.path.join(args.out, "model"))
    print(f"saved {args.out}/model")

    # ------------------------------------------------------------ the table
    note({"litereason": "LiteReason", "grpo": "RL without latents", "tag": "RL with tags, no latents"}[args.method], tags, "projector" if latent else "none")
    if latent:
        note("  its latents taken away", True, run="none")
    if rows:
        write_json(os.path.join(args.out, "results.json"), [{"model": name, **r} for name, r in rows])
        print(f"\n{table(rows)}\n\n{len(tests)} test stories, seed {args.seed}, {time.time() - start:.0f}s for everything; "
              f"numbers in {args.out}/results.json")


def add_gradients(model, rollouts, batch, advantages, n_rollouts, args):
    """Step (5) for the rollouts `batch` (their numbers), as many at once as the dial allows, each with its share of the whole mean
    -> how far sampler and scorer differ at most in a log-prob, and in which rollout."""
    max_dlogp, worst = 0.0, None
    for indices in pack([rollouts[b] for b in batch], args.tokens_per_forward):
        micro = [batch[i] for i in indices]
        some = [rollouts[b] for b in micro]
        if args.recompute_latents and args.method == "litereason":
            some = recompute_latents(model, some)
        logp, scored = logprobs(model, some)  # (b, S)
        old = torch.nn.utils.rnn.pad_sequence([r.logprobs for r in some], batch_first=True).to(logp)
        loss, ratio = policy_loss(logp, old, advantages[micro].to(logp), scored, n_rollouts, args.clip)
        loss.backward()
        off = torch.where(scored, (logp.detach() - old).abs(), 0.0).amax(1)  # (b,)
        if off.max() > max_dlogp:
            max_dlogp, worst = float(off.max()), micro[int(off.argmax())]
    return max_dlogp, worst


def refresh(model, tokenizer, task, rollouts, args, epoch):
    """Step (7), paper Sec. 3.4: a random share of the rewarded rollouts (example, prompt ids, text), each once per ratio; tags already
    there stay and are never replaced; the target ends in the gold answer in exactly the format that the reward parses."""
    rng, traces = random.Random(f"{args.seed} {epoch} refresh"), []
    marker = getattr(task, "ANSWER", "\\boxed{")
    for example, prompt, text in rng.sample(rollouts, max(1, int(args.refresh_share * len(rollouts)))):
        gold = task.answer(example) if hasattr(task, "answer") else None
        traces += [masked_trace(model, tokenizer, rng, prompt, text, gold, marker, ratio) for ratio in RATIOS]
    traces = [t for t in traces if t is not None]
    if not traces:
        return None
    return fit_projector(model, traces, args.refresh_lr, batch=16, schedule=False, seed=epoch, budget=args.tokens_per_forward)


# ---------------------------------------------------------------- tripwires: what goes wrong without a crash, one line each
def check_answers(task, examples):
    """Before the first step, on real rows: the refresh's target, the label and the reward agree. For tasks with an `answer`."""
    marker = getattr(task, "ANSWER", "\\boxed{")
    for i, e in enumerate(examples if hasattr(task, "answer") else []):
        answer = task.answer(e)
        earned = score(task, [e], ["Some reasoning.\n" + answer])[0]
        if earned != 1 or not answer.startswith(marker):
            raise UserError(f"train example {i}: its own answer {answer!r} earns {earned:g}, not 1, or does not begin with {marker!r}: the label, "
                            f"the answer and the reward of this task do not agree")


# ---------------------------------------------------------------- the state
def save_state(out, step, model, masters, optimizer, rollouts, earned, carried):
    """out/state-STEP: weights (with --offload the fp32 masters), AdamW's moments, the projector, and what else goes from step to step."""
    tensors = {f"projector {n}": p for n, p in model.reasoning_projector.named_parameters()} | optimizer_tensors(masters, optimizer)
    if rollouts:  # in the midst of a batch's minibatches
        tensors |= {"latents": torch.cat([r.latents for r in rollouts]), "logprobs": torch.cat([r.logprobs for r in rollouts])}
    plain = [[r.prompt_ids, r.slots, r.text, r.finished, r.prompt] for r in rollouts]
    write_state(out, step, tensors, {"carried": carried, "rollouts": plain, "earned": earned.tolist()})


@torch.no_grad()
def restore_state(model, masters, optimizer, tensors, rest):
    """The way back, into model, masters and optimizer. -> rollouts, earned, carried"""
    for n, p in model.reasoning_projector.named_parameters():
        p.copy_(tensors[f"projector {n}"])
    restore_optimizer(masters, optimizer, tensors)
    rollouts, a, b = [], 0, 0
    for prompt_ids, slots, text, finished, prompt in rest["rollouts"]:
        r = Rollout(prompt_ids, slots, tensors["latents"][a : a + slots.count(LATENT)],
                    tensors["logprobs"][b : b + len(slots)], text, finished, prompt)
        rollouts, a, b = rollouts + [r], a + slots.count(LATENT), b + len(slots)
    return rollouts, torch.tensor(rest["earned"]), rest["carried"]


if __name__ == "__main__":
    run_script(main)
