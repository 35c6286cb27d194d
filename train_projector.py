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
"""
import argparse
import json
import math
import os
import random
import time

import torch
from tqdm import tqdm

from eval import base_of, check_arguments, evaluate, is_small, score, start_task, task_flags, write_json
from litereason import (LATENT, Rollout, UserError, chat_parts, checkpoint_layers, encode_prompt, generate, insert_latents, load,
                        mask_sentences, pack, projector_loss, run_script, save, split_answer)

RATIOS, VERSIONS = (0.10, 0.25), 5  # of the sentences; versions per trace and ratio (method.md section 4)


def collect_traces(model, tokenizer, task, examples, k, max_new_tokens, seed, path):
    """Stage 1: -> [{"example", "prompt", "text"}], the samples with reward > 0; kept in `path` for a second run.

    The base has no trained projector yet, so tags that it writes run no latents (latent="none")."""
    own = getattr(task, "settings", {"reward": None, "scorer": None})
    header = {"model": model.config._name_or_path, "task": task.__name__, "prompts": len(examples), "k": k, "max_new_tokens": max_new_tokens,
              "seed": seed, "reward": own["reward"], "scorer": own["scorer"] and own["scorer"][0].config._name_or_path}
    try:
        with open(path) as f:
            found, *traces = [json.loads(line) for line in f]
        if found == header and traces:
            print(f"stage 1: {len(traces)} traces from {path}")
            return traces
        print(f"stage 1: {path} was made with other settings; sampling anew")
    except FileNotFoundError:
        pass
    except ValueError:
        print(f"stage 1: {path} is not readable; sampling anew")
    traces, generator = [], torch.Generator().manual_seed(seed)
    for i in tqdm(range(0, len(examples), 32), desc="stage 1", leave=False):
        part = examples[i : i + 32]
        got = generate(model, tokenizer, [task.prompt(e, True) for e in part], k, max_new_tokens, temperature=0.7, top_p=0.8,
                       top_k=20, latent="none", generator=generator)
        rewards = score(task, [part[r.prompt] for r in got], [r.text for r in got])
        traces += [{"example": i + r.prompt, "prompt": task.prompt(part[r.prompt], True), "text": r.text}
                   for r, reward in zip(got, rewards) if reward > 0 and r.finished]
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in [header] + traces)
    os.replace(path + ".tmp", path)
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


def fit_projector(model, traces, lr, batch, steps=None, schedule=True, clip=0.2, seed=0, budget=12_000, progress=None):
    """Trains the projector and nothing else on traces, one epoch or `steps` steps; -> the last steps' mean loss.

    Used by stage 2 (cosine to 10 %, warm-up 10 %) and by the refresh of stage 3 (constant rate, as released)."""
    frozen = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("reasoning_projector.")]
    for p in frozen:
        p.requires_grad_(False)
    parameters = list(model.reasoning_projector.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng, order, losses = random.Random(seed), [], []
    steps = steps if steps is not None else max(1, len(traces) // batch)
    for step in tqdm(range(steps), desc=progress, leave=False, disable=progress is None):
        while len(order) < batch:
            order += rng.sample(range(len(traces)), len(traces))
        rows, order = [traces[i] for i in order[:batch]], order[batch:]
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
        if torch.nn.utils.clip_grad_norm_(parameters, clip).isfinite():  # one bad batch must not cost the projector
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    for p in frozen:
        p.requires_grad_(True)
    return sum(losses[-20:]) / max(1, len(losses[-20:]))


# The released settings, and what a model of under 50 M parameters trained from scratch wants.
RELEASED = {"prompts": None, "k": 5, "lr": 1e-4, "batch": 16, "steps": None}
SMALL = {"prompts": 160, "k": 5, "lr": 1e-3, "batch": 16, "steps": 150}


def run(model, tokenizer, task, out, max_new_tokens, seed=0, n=200, **changes):
    """Both stages; trains model.reasoning_projector in place and prints what came of it. -> the figures printed.

    changes: of RELEASED or SMALL above, whichever the model's size selects; None leaves a value as it is."""
    cfg = {**(SMALL if is_small(model) else RELEASED), **{k: v for k, v in changes.items() if v is not None}}
    say = lambda v: "all" if v is None else f"{v:g}"  # all prompts; all traces once
    print("stages 1 and 2: " + ", ".join(f"{k} {say(v)}" + (f" (released: {say(RELEASED[k])})" if v != RELEASED[k] else "") for k, v in cfg.items()))
    start, rng = time.time(), random.Random(seed)
    marker = getattr(task, "ANSWER", "\\boxed{")
    examples = task.examples("train")[: cfg["prompts"]]
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
    losses = {"no latents": mean_loss(model, held, "none"), "zeros": mean_loss(model, held, "zeros"),
              "warm start": mean_loss(model, held, "projector")}
    rows, check = task.examples("val")[:n], dict(latent_prompt=True, seed=seed, max_new_tokens=max_new_tokens)
    before = evaluate(model, tokenizer, task, rows, **check)[0]
    fit_projector(model, train, cfg["lr"], cfg["batch"], cfg["steps"], seed=seed, progress="stage 2")
    losses["trained"] = mean_loss(model, held, "projector")
    after = evaluate(model, tokenizer, task, rows, **check)[0]
    print("stage 2: validation loss after the first tag: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
    print(f"stage 2: accuracy with the tag prompt on {len(rows)} val stories: {before['accuracy']:.3f} with the warm start, "
          f"{after['accuracy']:.3f} trained; both stages {time.time() - start:.0f}s", flush=True)
    return {"kept": len(traces), "sampled": cfg["k"] * len(examples), "losses": losses, "before": before, "after": after}


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
    g.add_argument("--n", type=int, default=200, help="val stories for the accuracy before and after")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    args = ap.parse_args()
    check_arguments(args)
    model, tokenizer = load(args.model, args.device)
    task = start_task(args, model, args.model)
    args.max_new_tokens = args.max_new_tokens or (160 if is_small(model) else 2048)
    if not is_small(model):
        checkpoint_layers(model)
    write_json(os.path.join(args.out, "config.json"), {"script": "train_projector.py", "base": base_of(args.model), **vars(args)})
    result = run(model, tokenizer, task, args.out, args.max_new_tokens, args.seed, args.n, prompts=args.prompts, k=args.samples,
                 lr=args.lr, batch=args.batch, steps=args.steps)
    save(model, tokenizer, os.path.join(args.out, "model"))
    write_json(os.path.join(args.out, "results.json"), result)
    print(f"saved {args.out}/model; next: python train_rl.py --model {args.out} --task {args.task}")


if __name__ == "__main__":
    run_script(main)
