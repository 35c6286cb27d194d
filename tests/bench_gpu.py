"""What is to be measured on a GPU: Qwen2.5-1.5B's shape with random weights. What an H100 gave is in
results/gpu.json.

    python tests/bench_gpu.py --json results/gpu.json   # on the first CUDA device
    python tests/bench_gpu.py --device cpu              # a toy shape, to see that the harness works

(f) one decoding step of 128 rows (8 prompts of 1,024 tokens x 16), plain and recorded as a CUDA graph, beside
    one reading of weights and cache at the measured bandwidth (the floor) and transformers' generate in bf16
(g) one GRPO step at the paper's shape (48 prompts x 16 samples, 1,024 + 256 tokens): seconds by phase, peak
    memory beside what lib/memory.py expects, utilisation of the update; from them, on paper, the hours of the
    paper's plot-hole run, at 256 slots an answer and at the paper's means, 115 without and 34 with latents
"""
import argparse
import gc
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench import NEVER, clock
from lib import checkpoint, memory
from lib.scoring import pack
from litereason import attach, generate, group_advantages, load, logprobs, policy_loss
from test_memory import QWEN

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 without sparsity, NVIDIA's data sheets


def make_model(device, dtype=torch.float32):
    small = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "eos_token_id": None} if device == "cpu" else {}
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(Qwen2Config(**{**QWEN, **small})).to(dtype).eval()


def random_prompts(model, *shape):
    return torch.randint(10, model.config.vocab_size - 10, shape,
                         generator=torch.Generator().manual_seed(1)).tolist()


def decode(device, steps=64):
    real = device == "cuda"
    model, tok = attach(make_model(device)), load("tiny", "cpu")[1]
    P, G, L = (8, 16, 1024) if real else (2, 2, 64)
    prompts = random_prompts(model, P, L)

    def seconds(run, repeats):
        return min(clock(run, device) for _ in range(repeats))

    def seconds_of_a_step():
        first, last = (seconds(lambda: generate(model, tok, prompts, G, n, latent="none"), 3)
                       for n in (1, steps + 1))
        return (last - first) / steps

    step = seconds_of_a_step()
    model.graphs = True
    generate(model, tok, prompts, G, 2, latent="none")  # where nothing can be recorded, it says so
    played = seconds_of_a_step() if model.graphs else None
    two = torch.empty(2, 2**30 if real else 2**24, dtype=torch.uint8, device=device)
    bandwidth = 2 * len(two[0]) / seconds(lambda: two[0].copy_(two[1]), 10)  # bytes read and written
    c, width = model.config, 2 if model.bf16 else 4
    weights = width * sum(p.numel() for p in memory.base_parameters(model))
    cache = (2 * width * c.num_hidden_layers * c.num_key_value_heads
             * (c.hidden_size // c.num_attention_heads) * (P * L + P * G * steps / 2))
    theirs = make_model(device, torch.bfloat16 if real else torch.float32)
    ids = torch.tensor(prompts, device=device).repeat_interleave(G, 0)
    first, last = (seconds(lambda: theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None,
        max_new_tokens=n), 2) for n in (1, steps + 1))  # as ours: without the reading of prompts
    return {"ms_per_step": 1000 * step, "ms_per_step_graphs": played and 1000 * played,
            "floor_ms": 1000 * (weights + cache) / bandwidth, "bandwidth_GB_s": bandwidth / 1e9,
            "tokens_per_s": P * G / min(step, played or step),
            "tokens_per_s_transformers": P * G * steps / (last - first)}


def grpo(device):
    """One step, sampling to optimiser, with the memory settings that train_rl.py would choose here."""
    real = device == "cuda"
    model, tok = attach(make_model(device)), load("tiny", "cpu")[1]
    model.graphs = real
    P, G, L, S = (48, 16, 1024, 256) if real else (2, 4, 64, 16)
    plan, expected = memory.plan(model, L, S, P, G, {})
    print(expected, file=sys.stderr, flush=True)
    if plan["checkpoint_layers"]:
        memory.checkpoint_layers(model)
    base = memory.base_parameters(model)
    masters = memory.offload(model, base) if plan["offload"] else base
    optimizer = torch.optim.AdamW(masters, lr=1e-7, fused=True)
    rollouts = []

    def sample():
        rollouts[:] = generate(model, tok, random_prompts(model, P, L), G, S, start=3,  # three latents each
                               gen_batch_size=plan["gen_batch_size"])

    def update():
        rewards = torch.rand(P, G, generator=torch.Generator().manual_seed(2))
        advantages = group_advantages(rewards).flatten().to(device)
        for part in pack(rollouts, plan["micro_batch_tokens"]):
            logp, scored = logprobs(model, [rollouts[i] for i in part])
            policy_loss(logp, logp.detach(), advantages[part], scored, P * G)[0].backward()
            memory.wait_for_gradients(model)

    def step():
        memory.gradients_to_masters(base, masters)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        memory.weights_from_masters(base, masters)

    out = {"settings": plan, "expected": expected}
    for _ in range(2):  # the first time kernels are called, and AdamW's moments made; it is not counted
        for run in (sample, update, step):
            torch.cuda.reset_peak_memory_stats() if real else None
            out[f"{run.__name__}_s"] = clock(run, device)
            out[f"{run.__name__}_GiB"] = torch.cuda.max_memory_allocated() / 2**30 if real else None
    positions = sum(len(r.slots) for r in rollouts) + P * L
    passes = 8 if plan["checkpoint_layers"] else 6  # forward, again if checkpointed, backward
    flops = passes * sum(p.numel() for p in base) * positions
    # sampling and update taken to grow with the slots; 16 optimiser steps per batch, as released
    hours = {n: 30 * 290 / P * (out["sample_s"] * n / S + out["update_s"] * (P * L + P * G * n) / positions
                                + 16 * out["step_s"]) / 3600
             for n in (256, 115, 34)}
    card = torch.cuda.get_device_name() if real else ""
    peak = next((most for name, most in PEAK_FLOPS.items() if name in card), None)
    return {**out, "positions": positions, "update_TFLOPs": flops / 1e12,
            "utilisation": peak and flops / out["update_s"] / peak,
            "hours_of_the_papers_run": hours, "recorded": model.graphs}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", nargs="+", default=["f", "g"], choices=["f", "g"])
    ap.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    ap.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = ap.parse_args()
    checkpoint.stop_tokens = lambda *_: [NEVER]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    result = {"torch": torch.__version__, "device": machine}
    for name in args.rows:
        result[name] = {"f": decode, "g": grpo}[name](args.device)
        print(f"({name}) {json.dumps(result[name])}", flush=True)
        gc.collect()  # the next row begins with an empty card
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
