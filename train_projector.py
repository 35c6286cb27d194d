"""Stages 1 and 2 of the paper (Sec. 3.3): collect the model's own traces, put tags into them, train the projector.

Stage 1: k samples per prompt from the base, the tag prompt, reward > 0 kept; in every kept trace random sentences are
replaced by tags (10 % and 25 % of them, five versions each), N from the sentence's length. Stage 2: the base is frozen;
cross-entropy on the text after the first tag trains the projector, through all latent steps of all tags.

Left out, and why: (1) spaCy: sentences end at [.!?] or a newline. (2) The released code drops paragraphs when it joins
sentences again; here the text between them stays. (3) Its loss is summed over 16 micro-batches by accident (research
notes, weakness 5), so that its clip of 0.2 bites harder; here the mean over a batch's tokens is clipped.

    python train_projector.py                                  # the tiny model: half a minute on 2 cores
    python train_projector.py --model Qwen2.5-1.5B --out out/projector     # the paper's plot holes, on one GPU
    python train_projector.py --steps 2 --prompts 8 --n 8      # a smoke run
    python train_projector.py --resume out/projector           # go on with a stopped run, exactly: on a CPU bit for bit
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import time

import torch
from tqdm import tqdm

from data import score, start_task, task_flags
from engine import checkpoint_layers, pack
from eval import evaluate
from litereason import CAP, CLOSE, LATENT, OPEN, Rollout, UserError, generate, insert_latents, load, parse_tags, projector_loss
from runs import (chat_parts, check_arguments, device_flags, encode_prompt, is_small, lock, on_stop, optimizer_tensors, parse_resumable, read_state,
                  restore_optimizer, run_script, save, signals_restored, write_json, write_settings, write_state)

RATIOS, VERSIONS = (0.10, 0.25), 5  # of the sentences; versions per trace and ratio (method.md section 4)
AT_ONCE = 32  # prompts of which stage 1 samples the traces, before it writes them down


def split_answer(text, marker="\\boxed{"):
    """(reasoning, answer): the answer begins at the last marker; ("", "") if there is none."""
    at = text.rfind(marker)
    return (text[:at], text[at:]) if at >= 0 else ("", "")


SENTENCE = re.compile(r"\s*[^\n]*?(?:(?<![.!?])[.!?]+[\"')\]]*(?=\s)|\n|$)")  # the look-behind: a run of dots is tried once, not n times


def mask_sentences(rng, tokenizer, reasoning, ratio, cap=CAP):
    """Replaces max(1, int(ratio * n)) random sentences by tags, N = clamp(int(0.2 * tokens of the sentence), 1, cap).

    The sentence is deleted: there is no target for the latents themselves. Tags already there are kept and never
    replaced. One space on each side of a tag (Sec. 4 of method.md). rng: random.Random. None if there is no sentence.
    Ours: sentences end at [.!?] or a newline; the released code uses spaCy in stage 1, another splitter in stage 3.
    """
    pieces, start = [], 0  # [text, is a sentence]
    for a, b, _ in parse_tags(reasoning, cap) + [(len(reasoning), len(reasoning), 0)]:
        pieces += [[s, bool(s.strip())] for s in SENTENCE.findall(reasoning[start:a]) if s]
        pieces.append([reasoning[a:b], False])
        start = b
    sentences = [i for i, (_, is_sentence) in enumerate(pieces) if is_sentence]
    if not sentences:
        return None
    for i in rng.sample(sentences, max(1, int(ratio * len(sentences)))):
        n = max(1, min(cap, int(0.2 * len(tokenizer.encode(pieces[i][0].strip(), add_special_tokens=False)))))
        pieces[i][0] = f" {OPEN}{n}{CLOSE} "
    text = "".join(p for p, _ in pieces)
    return re.sub(rf"(?:(?<!\s)\s+|)({OPEN}[0-9 ]*{CLOSE})\s*", r" \1 ", text).replace(f"{CLOSE}  {OPEN}", f"{CLOSE} {OPEN}").strip()


def collect_traces(model, tokenizer, task, examples, k, max_new_tokens, seed, path):
    """Stage 1: -> [{"example", "prompt", "text"}], the samples with reward > 0.

    `path` has a line for the settings and one for each AT_ONCE prompts, written when they are done: what is there with the same settings
    is not sampled again. The draws of a line follow from the seed and its number alone, so that a stopped stage 1 loses one at most.
    The base has no trained projector yet, so tags that it writes run no latents (latent="none")."""
    own = getattr(task, "settings", {"reward": None, "scorer": None})
    header = {"model": model.config._name_or_path, "task": task.__name__, "prompts": len(examples), "k": k, "max_new_tokens": max_new_tokens,
              "at_once": AT_ONCE, "seed": seed, "reward": own["reward"], "scorer": own["scorer"] and own["scorer"][0].config._name_or_path}
    done = []
    try:
        with open(path) as f:
            found, *done = [json.loads(line) for line in f if line.endswith("\n")]  # without its end it is half a line
        if found != header:
            print(f"stage 1: {path} was made with other settings; sampling anew")
            done = []
    except FileNotFoundError:
        pass
    except ValueError:
        print(f"stage 1: {path} is not readable; sampling anew")
    starts = range(0, len(examples), AT_ONCE)
    if done:
        print(f"stage 1: {sum(map(len, done))} traces from {path}, {len(done)} of {len(starts)} lines of it")
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in [header] + done)
        f.flush()
        os.replace(path + ".tmp", path)
        for number, i in enumerate(tqdm(starts, desc="stage 1", leave=False)):
            if number < len(done):
                continue
            part = examples[i : i + AT_ONCE]
            got = generate(model, tokenizer, [task.prompt(e, True) for e in part], k, max_new_tokens, temperature=0.7, top_p=0.8,
                           top_k=20, latent="none", generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
            rewards = score(task, [part[r.prompt] for r in got], [r.text for r in got])
            done.append([{"example": i + r.prompt, "prompt": task.prompt(part[r.prompt], True), "text": r.text}
                         for r, reward in zip(got, rewards) if reward > 0 and r.finished])
            f.write(json.dumps(done[-1]) + "\n")
            f.flush()
            os.fsync(f.fileno())
    traces = [t for line in done for t in line]
    print(f"stage 1: kept {len(traces)} of {k * len(examples)} traces (reward > 0), in {path}")
    return traces


def masked_trace(model, tokenizer, rng, prompt, text, answer, marker, ratio):
    """One training trace: the reasoning with sentences replaced by tags, then the answer. None if there is no sentence.

    prompt: text or token ids. answer: the text to end in; None keeps the trace's own."""
    reasoning, own = split_answer(text, marker)
    masked = mask_sentences(rng, tokenizer, reasoning, ratio, model.config.litereason_max_reasoning_steps)
    if masked is None:
        return None
    text = masked + "\n" + (own if answer is None else answer).strip()
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) + [chat_parts(model, tokenizer)[2]]
    slots = insert_latents(model, tokenizer, ids)
    none = torch.zeros(0, model.config.hidden_size)
    prompt_ids = encode_prompt(model, tokenizer, prompt) if isinstance(prompt, str) else prompt
    return Rollout(prompt_ids, slots, none, text=text) if LATENT in slots else None


def mean_loss(model, traces, latent, budget=12_000):
    """Loss after the first tag over all traces, per token."""
    with torch.no_grad():
        parts = [projector_loss(model, [traces[i] for i in part], latent) for part in pack(traces, budget)]
    return float(sum(l for l, _ in parts)) / max(1, sum(n for _, n in parts))


def fit_projector(model, traces, lr, batch, steps=None, schedule=True, clip=0.2, seed=0, budget=12_000, progress=None, states=None,
                  every=50, carried=None):
    """Trains the projector and nothing else on traces, one epoch or `steps` steps; -> the last steps' mean loss.

    Used by stage 2 (cosine to 10 %, warm-up 10 %) and by the refresh of stage 3 (constant rate, as released).
    states: a directory. The fit goes on from the newest state in it, and leaves one there every so many steps and when it is stopped,
    with `carried` (JSON) in it."""
    frozen = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("reasoning_projector.")]
    for p in frozen:
        p.requires_grad_(False)
    parameters = list(model.reasoning_projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng, order, losses, done, kept = random.Random(seed), [], [], 0, None
    steps = steps if steps is not None else max(1, len(traces) // batch)
    found = states and read_state(states)
    if found:
        done = kept = found[0]
        losses = found[2]["losses"]
        restore_optimizer(parameters, optimizer, found[1])
        print(f"stage 2: resumed from {states}/state-{done}", flush=True)

    def keep():
        nonlocal kept
        if kept != done:
            write_state(states, done, optimizer_tensors(parameters, optimizer), {"losses": losses, "carried": carried})
        kept = done
        return f"step {done} of {steps} of stage 2 is saved; go on with --resume {os.path.dirname(states)}"

    if states:
        keep()  # what `carried` says has cost an evaluation
    hold = on_stop(keep) if states else lambda on: None
    for step in tqdm(range(done, steps), desc=progress, initial=done, total=steps, leave=False, disable=progress is None):
        while len(order) < (step + 1) * batch:  # from the first step on, so that the order follows from the seed: no state needs it
            order += rng.sample(range(len(traces)), len(traces))
        rows = [traces[i] for i in order[step * batch : (step + 1) * batch]]
        rows.sort(key=lambda r: (len(r.slots), r.slots.index(LATENT)))  # rows of a micro-batch alike: less padding
        warm = max(1, steps // 10)
        scale = min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        optimizer.param_groups[0]["lr"] = lr * (scale if schedule else 1.0)
        # The denominator is known before the first micro-batch: text tokens after the first tag, over the whole batch.
        tokens = sum(s != LATENT for r in rows for s in r.slots[r.slots.index(LATENT):])
        total = 0.0
        for part in pack(rows, budget):
            loss = projector_loss(model, [rows[i] for i in part])[0] / tokens
            loss.backward()
            total += loss.item()
        hold(True)
        if torch.nn.utils.clip_grad_norm_(parameters, clip).isfinite():  # one bad batch must not cost the projector
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        done = step + 1
        if states and (done % every == 0 or done == steps):
            keep()
        hold(False)
    for p in frozen:
        p.requires_grad_(True)
    return sum(losses[-20:]) / max(1, len(losses[-20:]))


# The released settings, and what a model of under 50 M parameters trained from scratch wants.
RELEASED = {"prompts": None, "k": 5, "lr": 1e-4, "batch": 16, "steps": None}
SMALL = {"prompts": 160, "k": 5, "lr": 1e-3, "batch": 16, "steps": 150}


def run(model, tokenizer, task, out, max_new_tokens, seed=0, n=200, every=50, **changes):
    """Both stages; trains model.reasoning_projector in place and prints what came of it. -> the figures printed.

    Goes on from what a stopped run left in `out`: traces.jsonl, and stage 2's states (one every so many steps) in stage-2/.
    changes: of RELEASED or SMALL above, whichever the model's size selects; None leaves a value as it is."""
    cfg = {**(SMALL if is_small(model) else RELEASED), **{k: v for k, v in changes.items() if v is not None}}
    say = lambda v: "all" if v is None else f"{v:g}"  # all prompts; all traces once
    print("stages 1 and 2: " + ", ".join(f"{k} {say(v)}" + (f" (released: {say(RELEASED[k])})" if v != RELEASED[k] else "") for k, v in cfg.items()))
    start, rng = time.time(), random.Random(seed)
    marker = getattr(task, "ANSWER", "\\boxed{")
    examples = task.examples("train")[: cfg["prompts"]]
    on_stop(lambda: f"the traces sampled so far are kept; go on with --resume {out}")  # stage 2 has its own way to stop
    traces = collect_traces(model, tokenizer, task, examples, cfg["k"], max_new_tokens, seed, os.path.join(out, "traces.jsonl"))
    masked = []  # (story, trace)
    for t in traces:
        for ratio in RATIOS * VERSIONS:
            row = masked_trace(model, tokenizer, rng, t["prompt"], t["text"], None, marker, ratio)
            if row is not None:
                masked.append((t["example"], row))
    stories = sorted({story for story, _ in masked})
    held_out = set(stories[len(stories) - max(1, len(stories) // 10):])  # a tenth of the stories is kept for validation
    train, held = [row for i, row in masked if i not in held_out], [row for i, row in masked if i in held_out]
    if not train or not held:
        raise UserError(f"stage 1 kept {len(traces)} traces, too few with a sentence to mask: this model earns too little reward "
                        f"on this task with the tag prompt (give more --prompts, or a stronger --model)")
    held = rng.sample(held, min(256, len(held)))
    print(f"stage 2: {len(train)} masked traces, {len(held)} more held out; the base is frozen", flush=True)
    rows, check = task.examples("val")[:n], dict(latent_prompt=True, seed=seed, max_new_tokens=max_new_tokens)
    states = os.path.join(out, "stage-2")
    found = read_state(states)
    losses, before = found[2]["carried"] if found else (
        {"no latents": mean_loss(model, held, "none"), "zeros": mean_loss(model, held, "zeros"), "warm start": mean_loss(model, held, "projector")},
        evaluate(model, tokenizer, task, rows, **check)[0])
    fit_projector(model, train, cfg["lr"], cfg["batch"], cfg["steps"], seed=seed, progress="stage 2", states=states, every=every,
                  carried=[dict(losses), before])
    losses["trained"] = mean_loss(model, held, "projector")
    after = evaluate(model, tokenizer, task, rows, **check)[0]
    print("stage 2: validation loss after the first tag: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
    print(f"stage 2: accuracy with the tag prompt on {len(rows)} val stories: {before['accuracy']:.3f} with the warm start, "
          f"{after['accuracy']:.3f} trained; both stages {time.time() - start:.0f}s", flush=True)
    return {"kept": len(traces), "sampled": cfg["k"] * len(examples), "losses": losses, "before": before, "after": after}


@signals_restored()
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = ap.add_argument_group("what")
    g.add_argument("--model", default="tiny", help="tiny, a directory, or a hub name such as Qwen2.5-1.5B")
    task_flags(g)
    g.add_argument("--out", default="out/projector", metavar="DIR", help="traces, settings, figures and the model go there")
    g = ap.add_argument_group("stage 1 (default: set by the model's size, see RELEASED and SMALL)")
    g.add_argument("--prompts", type=int, default=None, help="train prompts to sample traces for")
    g.add_argument("--samples", type=int, default=None, help="traces per prompt")
    g.add_argument("--max-new-tokens", type=int, default=None, help="slots per trace, latents included (default: 160 for a "
                   "small model, else 2048)")
    g = ap.add_argument_group("stage 2")
    g.add_argument("--steps", type=int, default=None, help="optimiser steps")
    g.add_argument("--batch", type=int, default=None, help="traces per optimiser step")
    g.add_argument("--lr", type=float, default=None, help="peak learning rate, of AdamW")
    g = ap.add_argument_group("run")
    g.add_argument("--resume", default=None, metavar="DIR", help="go on with the run in DIR, by its own settings; only --device "
                   "and --graphs may stand beside it")
    g.add_argument("--save-every", type=int, default=50, help="steps of stage 2 between two states on the disk, from which --resume goes on; "
                   "the last two are kept. Stage 1 keeps each 32 prompts' traces")
    g.add_argument("--n", type=int, default=200, help="val stories for the accuracy before and after")
    g.add_argument("--seed", type=int, default=0)
    device_flags(g)
    args = parse_resumable(ap, "train_projector.py")
    check_arguments(args)
    held = lock(args.out)  # until the process ends
    model, tokenizer = load(args.model, args.device)
    model.graphs = args.graphs
    task = start_task(args, model, args.model)
    args.max_new_tokens = args.max_new_tokens or (160 if is_small(model) else 2048)
    if not is_small(model):
        checkpoint_layers(model)
    if not args.resume:  # an earlier run's
        shutil.rmtree(os.path.join(args.out, "stage-2"), ignore_errors=True)
    write_settings(args, "train_projector.py")
    result = run(model, tokenizer, task, args.out, args.max_new_tokens, args.seed, args.n, args.save_every, prompts=args.prompts,
                 k=args.samples, lr=args.lr, batch=args.batch, steps=args.steps)
    save(model, tokenizer, os.path.join(args.out, "model"))
    write_json(os.path.join(args.out, "results.json"), result)
    print(f"saved {args.out}/model; next: python train_rl.py --model {args.out} --task {args.task}")


if __name__ == "__main__":
    run_script(main)
