"""What is to be measured on a GPU: Qwen2.5-1.5B's real shape with random weights. What an H100 gave is in
results/gpu.json.

    python tests/bench_gpu.py --rows f g --json results/gpu.json
    python tests/bench_gpu.py --rows g --cap 24               # as on a card of 24 GB
    python tests/bench_gpu.py --device cpu --small            # a toy shape, to see that the harness works

(f) one decoding step of 128 rows (8 prompts of 1,024 tokens x 16), plain and recorded as a CUDA graph: beside
    the time to read weights and cache once at the measured bandwidth (the floor), and transformers' generate
    in bf16
(g) one GRPO step at the paper's shape (48 prompts x 16 samples, 1,024 + 256 tokens): seconds by phase, peak
    memory beside the expected one, utilisation of the update; from them, on paper, the hours of the paper's
    plot-hole run (290 stories x 16 x 30 epochs), at 256 slots an answer and at the paper's means, 115 without
    and 34 with latents
(i) stage 2 on 16 rows of 2,048 tokens with 6 tags of 3 latents: seconds and peak memory of one optimiser step
"""
import argparse
import json
import os
import re
import sys
import types

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

import train_projector
from bench import NEVER, clock, random_ids, tags_fire, their_generate
from lib import checkpoint, memory
from lib.scoring import pack
from litereason import (LATENT, Rollout, attach, generate, group_advantages, load, logprobs, policy_loss,
                        projector_loss)

SHAPE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "shared", "qwen2.5-1.5b")
# bf16 without sparsity, from NVIDIA's data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def make_model(args, dtype=torch.float32):
    small = dict(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
                 tie_word_embeddings=True)
    config = Qwen2Config(**small) if args.small else AutoConfig.from_pretrained(args.shape)
    torch.manual_seed(0)
    with torch.device(args.device):
        return Qwen2ForCausalLM(config).to(dtype).eval()


def prompts_for(model, P, L):
    return random_ids(P, L, most=model.config.vocab_size - 10, seed=1).tolist()


def peak_gib(args):
    return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None


def decode(args, P=8, G=16, L=1024, steps=64):
    model, tok = attach(make_model(args)), load("tiny", "cpu")[1]
    tags_fire(model, tok, 0, 0)
    P, G, L = (2, 2, 64) if args.small else (P, G, L)
    prompts = prompts_for(model, P, L)

    def fastest(run, times):
        return min(clock(run, args.device) for _ in range(times))

    def seconds_per_step():
        one, many = (fastest(lambda: generate(model, tok, prompts, G, n), 3) for n in (1, steps + 1))
        return (many - one) / steps

    step = seconds_per_step()
    model.graphs = True
    generate(model, tok, prompts, G, 2)
    played = seconds_per_step() if model.graphs else None  # None: could not be recorded
    two = torch.empty(2, 2**24 if args.small else 2**30, dtype=torch.uint8, device=args.device)
    # Bytes per second, read and written.
    bandwidth = 2 * len(two[0]) / fastest(lambda: two[0].copy_(two[1]), 10)
    c, width = model.config, 2 if model.bf16 else 4
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads)
    weights = sum(p.numel() for p in memory.base_parameters(model))
    read = width * (weights + cached * (P * L + P * G * steps / 2))
    theirs = make_model(args, torch.bfloat16 if args.device == "cuda" else torch.float32)
    plain = fastest(lambda: their_generate(theirs, prompts, G, steps), 2)
    return {"ms_per_step": 1000 * step, "ms_per_step_graphs": played and 1000 * played,
            "floor_ms": 1000 * read / bandwidth, "bandwidth_GB_s": bandwidth / 1e9,
            "tokens_per_s": P * G / min(step, played or step),
            "tokens_per_s_transformers": P * G * steps / plain}


def grpo(args, P=48, G=16, L=1024, S=256):
    """One step, sampling to optimiser, with the memory settings that train_rl.py would choose here."""
    model, tok = attach(make_model(args)), load("tiny", "cpu")[1]
    tags_fire(model, tok, 50, 3)
    model.graphs = args.device == "cuda"
    P, G, L, S = (2, 4, 64, 16) if args.small else (P, G, L, S)
    room = (args.cap or 80) * 2**30 if args.device == "cpu" else args.cap and args.cap * 2**30
    settings, said = memory.plan(model, L, S, P, G, {}, room=room)
    print(said, file=sys.stderr, flush=True)
    expected = {phase: float(gib) for phase, gib in re.findall(r"^  (\w+) +([\d.]+) GiB", said, re.MULTILINE)}
    out = {"settings": settings, "expected_GiB": expected}
    plan = types.SimpleNamespace(**settings)
    if plan.checkpoint_layers:
        memory.checkpoint_layers(model)
    base = memory.base_parameters(model)
    masters = memory.offload(model, base) if plan.offload else base
    optimizer = torch.optim.AdamW(masters, lr=1e-7, fused=True)
    rollouts = []

    def sample():
        rollouts.extend(generate(model, tok, prompts_for(model, P, L), G, S, gen_batch_size=plan.gen_batch_size))

    def update():
        rewards = torch.rand(P, G, generator=torch.Generator().manual_seed(2))
        advantages = group_advantages(rewards).flatten().to(args.device)
        for part in pack(rollouts, plan.micro_batch_tokens):
            logp, scored = logprobs(model, [rollouts[i] for i in part])
            policy_loss(logp, logp.detach(), advantages[part], scored, P * G)[0].backward()
            memory.wait_for_gradients(model)

    def step():
        memory.gradients_to_masters(base, masters)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        memory.weights_from_masters(base, masters)

    # Before the clock starts: AdamW's moments are in memory, and the kernels of the update have been called.
    for p in masters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    prompt = prompts_for(model, 1, L)[0]
    alike = [Rollout(prompt, (prompt * S)[:S], torch.zeros(0, model.config.hidden_size))] * G
    logprobs(model, alike[: len(pack(alike, plan.micro_batch_tokens)[0])])[0].sum().backward()
    memory.wait_for_gradients(model)
    memory.forget_gradients(model)
    for name, run in (("sample", sample), ("update", update), ("step", step)):
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        out[f"{name}_s"] = clock(run, args.device)
        out[f"{name}_GiB"] = peak_gib(args)
    positions = sum(len(r.slots) for r in rollouts) + P * L
    passes = 8 if plan.checkpoint_layers else 6  # forward, forward again if layers are checkpointed, backward
    flops = passes * sum(p.numel() for p in base) * positions
    # Sampling and update taken to grow with the slots; 16 optimiser steps per batch, as released.
    hours = {n: 30 * 290 / P * (out["sample_s"] * n / S + out["update_s"] * (P * L + P * G * n) / positions
                                + 16 * out["step_s"]) / 3600
             for n in (256, 115, 34)}
    card = torch.cuda.get_device_name() if args.device == "cuda" else ""
    peak = next((flops_per_s for name, flops_per_s in PEAK_FLOPS.items() if name in card), None)
    return {**out, "positions": positions, "update_TFLOPs": flops / 1e12,
            "utilisation": peak and flops / out["update_s"] / peak,
            "hours_of_the_papers_run": hours, "recorded": model.graphs}


def projector(args, rows=16, length=2048):
    model = attach(make_model(args))
    memory.checkpoint_layers(model)
    rows, length = (2, 128) if args.small else (rows, length)
    traces = []
    for ids in prompts_for(model, rows, length):
        slots = ids[length // 2 :]
        for k in range(6):
            slots[4 + 8 * k : 4 + 8 * k] = [LATENT] * 3
        traces.append(Rollout(ids[: length // 2], slots, torch.zeros(0, model.config.hidden_size)))
    optimizer = torch.optim.AdamW(model.reasoning_projector.parameters(), lr=1e-4)

    def step():
        for part in pack(traces, 4 * length):
            projector_loss(model, [traces[i] for i in part])[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with train_projector.base_frozen(model):
        step()
        return {"step_s": min(clock(step, args.device) for _ in range(2)), "GiB": peak_gib(args)}


ROWS = {"f": decode, "g": grpo, "i": projector}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    ap.add_argument("--shape", default=SHAPE, metavar="DIR", help="whose config.json gives the shape")
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--small", action="store_true", help="a toy shape")
    ap.add_argument("--json", metavar="FILE", help="write the numbers there")
    ap.add_argument("--cap", type=int, metavar="GIB", help="the most that the allocator may use")
    args = ap.parse_args()
    result = {"torch": torch.__version__, "device": "cpu"}
    if args.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
        if args.cap:
            share = args.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    checkpoint.stop_tokens = lambda *_: [NEVER]
    for name in args.rows:
        result[name] = {"what": ROWS[name].__name__, "cap_GiB": args.cap, **ROWS[name](args)}
        print(f"({name}) {json.dumps(result[name])}", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
