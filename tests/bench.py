"""Benchmarks: this repository's hot paths against the plain way of doing the same, paired in one run. Asserts nothing.

Each row runs ours and theirs in turn, --repeats times, and prints both medians and the median of the paired ratios; the
growth tables show what a path costs as one dimension grows. Same weights, same lengths, same sampling on both sides. Each in a
process of its own: what ran before decides how the C library's malloc treats large blocks, and that moves a row by a quarter.

    python tests/bench.py                           # all rows and growth tables: 6 minutes on 2 cores
    python tests/bench.py --rows a d --growth none  # some of it
    python tests/bench.py --json results/bench.json # the numbers too

(a) decode, short prompts: tiny model, 16 prompts x 8 samples x 64 tokens        against transformers' generate
(b) decode, long prompts: 1,024 tokens x 8 samples x 64 slots, latents in them    against transformers' generate
(c) score and back-propagate the same shape                                       against rows padded, each with its own prompt
(d) make 6 x 3 latents again in a 1,024-slot row                                   against one pass over the prefix per latent
(e) a GRPO step on the tiny task: sample, score, back-propagate, update           against generate and padded scoring
(w) prompts that wait: 16 prompts of 256 tokens x 4 through 16 rows, lengths of 24 on average, 96 at most
                                                                                  against our own loop, one batch after the other
"""
import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import litereason
import runs
from data import tiny
from litereason import (LATENT, Rollout, attach, generate, group_advantages, load, logprobs, policy_loss,
                        unroll)
from runs import TINY

ROWS = {"a": "decode, short prompts", "b": "decode, long prompt", "c": "score + backward", "d": "latents again", "e": "GRPO step, tiny task",
        "w": "prompts that wait"}
NEVER = -7  # a stop token that is never sampled: all rows run to the same length on both sides


def models(kind, device):
    """(ours, theirs, tokenizer): the same weights with our attention and with transformers' sdpa."""
    ours, tokenizer = load("tiny", device)
    if kind == "tiny":
        theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).to(device).eval()
    else:  # 8 layers, 512 wide, random, with the vocabulary size of Qwen2.5 (the head is a third of the work)
        torch.manual_seed(0)
        theirs = Qwen2ForCausalLM(Qwen2Config(vocab_size=151_936, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                                              num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=16_384,
                                              tie_word_embeddings=True, attn_implementation="sdpa")).to(device).eval()
        ours = Qwen2ForCausalLM(copy.deepcopy(theirs.config)).to(device)
        ours.load_state_dict(theirs.state_dict())
        ours = attach(ours)
    return ours, theirs, tokenizer


def tags_fire(model, tokenizer, every, n):
    """From now on one token id in `every` ends a tag of n latents: random weights write no tags by themselves. 0: none does."""
    watch = litereason.tag_table(tokenizer, model.config.litereason_max_reasoning_steps, model.config.vocab_size, model.device)
    watch.next_state, watch.fires = torch.zeros_like(watch.next_state[:2]), torch.zeros_like(watch.fires[:2])
    watch.classes.zero_()
    if every:
        watch.classes[::every], watch.fires[1] = 1, n
    litereason.watcher = lambda *_: watch


def their_generate(model, prompts, samples, steps):
    """Prompts (lists of ids) repeated per sample, padded on the left, as transformers wants them -> (rows, steps) ids."""
    rows = [p for p in prompts for _ in range(samples)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=model.device)
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
                          pad_token_id=0, max_new_tokens=steps)[:, width:]


def their_logprobs(model, prompts, samples, own):
    """Every row with its own copy of the prompt, padded on the right; own (rows, S) ids -> log-probs (rows, S)."""
    rows = [p + o for p, o in zip([p for p in prompts for _ in range(samples)], own.tolist())]
    S, width = own.shape[1], max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=model.device)  # own parts aligned at the right end
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=S + 1).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, own.to(model.device)[..., None])[..., 0]


def clock(run, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_rows(device):
    """{row: (ours, theirs)}, functions without arguments; built when first asked for."""

    def long_prompt(P=1, L=1024, seed=0):
        return torch.randint(10, 150_000, (P, L), generator=torch.Generator().manual_seed(seed)).tolist()

    def a():
        ours, theirs, tok = models("tiny", device)
        prompts = [tok.encode(tiny.prompt(e, False)) for e in tiny.examples("test")[:16]]
        tags_fire(ours, tok, 0, 0)
        return lambda: generate(ours, tok, prompts, 8, 64), lambda: their_generate(theirs, prompts, 8, 64)

    def b():
        ours, theirs, tok = models("large", device)
        tags_fire(ours, tok, 50, 3)
        return lambda: generate(ours, tok, long_prompt(), 8, 64), lambda: their_generate(theirs, long_prompt(), 8, 64)

    def c():
        ours, theirs, tok = models("large", device)
        own = torch.randint(10, 150_000, (8, 64), generator=torch.Generator().manual_seed(1))
        rollouts = [Rollout(long_prompt()[0], o, torch.zeros(0, 512)) for o in own.tolist()]

        def backward(model, loss):
            loss.backward()
            model.zero_grad(set_to_none=True)

        return (lambda: backward(ours, logprobs(ours, rollouts)[0].sum()),
                lambda: backward(theirs, their_logprobs(theirs, long_prompt(), 8, own).sum()))

    def d():
        ours, theirs, _ = models("large", device)
        slots = long_prompt(1, 1024 - 768 - 18, seed=2)[0]
        for i in range(6):
            slots[20 + 37 * i : 20 + 37 * i] = [LATENT] * 3
        rollout = Rollout(long_prompt(1, 768)[0], slots, torch.zeros(0, 512))

        @torch.no_grad()
        def prefixes():
            """As the released code does: the whole text before a latent goes through the model for each latent."""
            x = theirs.get_input_embeddings()(torch.tensor([rollout.prompt_ids + [max(s, 0) for s in slots]], device=device))
            for t, s in enumerate(slots, 768):
                if s == LATENT:
                    h = theirs.model(inputs_embeds=x[:, :t], use_cache=False).last_hidden_state[:, -1]
                    x[:, t] = ours.reasoning_projector(h)[0]
            return theirs.model(inputs_embeds=x, use_cache=False).last_hidden_state

        return torch.no_grad()(lambda: unroll(ours, [rollout])), prefixes

    def e():
        ours, theirs, tok = models("tiny", device)
        prompts = [tok.encode(tiny.prompt(x, False)) for x in tiny.examples("train")[:16]]
        tags_fire(ours, tok, 0, 0)
        advantages = group_advantages(torch.rand(16, 16, generator=torch.Generator().manual_seed(3))).flatten().to(device)
        steppers = {m: torch.optim.AdamW(m.parameters(), lr=1e-7) for m in (ours, theirs)}

        def update(model, loss):
            loss.backward()
            steppers[model].step()
            steppers[model].zero_grad(set_to_none=True)

        def mine():
            rollouts = generate(ours, tok, prompts, 16, 96)
            for i in range(0, 256, 128):
                some = rollouts[i : i + 128]
                logp, scored = logprobs(ours, some)
                old = torch.stack([r.logprobs for r in some]).to(logp)
                policy_loss(logp, old, advantages[i : i + 128], scored, 256)[0].backward()
            steppers[ours].step()
            steppers[ours].zero_grad(set_to_none=True)

        def plain():
            own = their_generate(theirs, prompts, 16, 96)
            for i in range(0, 256, 128):
                logp = their_logprobs(theirs, prompts[i // 16 : i // 16 + 8], 16, own[i : i + 128])
                policy_loss(logp, logp.detach(), advantages[i : i + 128], torch.ones_like(logp, dtype=torch.bool), 256)[0].backward()
            steppers[theirs].step()
            steppers[theirs].zero_grad(set_to_none=True)

        return mine, plain

    def w():
        ours, _, tok = models("large", device)
        tags_fire(ours, tok, 0, 0)
        prompts = long_prompt(16, 256)

        def decode(parts):
            """With one token of the vocabulary in 24 as a stop token: random weights draw any with about the same odds."""
            never, runs.stop_tokens = runs.stop_tokens, lambda *_: list(range(0, 151_936, 24))
            try:
                draws = torch.Generator().manual_seed(0)
                for part in parts:
                    generate(ours, tok, part, 4, 96, rows=16, generator=draws)
            finally:
                runs.stop_tokens = never

        return lambda: decode([prompts]), lambda: decode([prompts[i : i + 4] for i in range(0, 16, 4)])

    return {"a": a, "b": b, "c": c, "d": d, "e": e, "w": w}


def growth(which, device, repeats):
    """How decoding grows: slots per second against rows, prompt length, and latents per tag (the large model)."""
    ours, _, tok = models("large", device)
    prompt = torch.randint(10, 150_000, (8192,), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"rows": [(n, prompt[:256], n, 0) for n in (1, 4, 16, 64, 256)],
                "prompt": [(n, prompt[:n], 8, 0) for n in (256, 1024, 4096, 8192)],
                "latents": [(n, prompt[:256], 8, n) for n in (0, 1, 3, 5)]}[which]
    out = []
    for n, p, rows, latents in settings:
        tags_fire(ours, tok, 20 if latents else 0, latents)
        prefill = statistics.median(clock(lambda: generate(ours, tok, [p], rows, 1), device) for _ in range(repeats))
        whole = statistics.median(clock(lambda: generate(ours, tok, [p], rows, 33), device) for _ in range(repeats))
        step = (whole - prefill) / 32
        out.append({which: n, "prefill_s": prefill, "ms_per_step": 1000 * step, "slots_per_s": rows / step})
        print(f"| {n} | {prefill:.3f} | {1000 * step:.1f} | {rows / step:.0f} |", flush=True)
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="which comparisons")
    ap.add_argument("--growth", nargs="*", default=["rows", "prompt", "latents"], choices=["rows", "prompt", "latents", "none"])
    ap.add_argument("--repeats", type=int, default=5, help="pairs per row, after one that is not counted")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = ap.parse_args()
    runs.stop_tokens = lambda *_: [NEVER]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; medians of {args.repeats} pairs\n\n| row | ours, s | theirs, s | ratio | lowest, highest |\n|---|---|---|---|---|")
    result = {"machine": machine, "torch": torch.__version__, "rows": {}, "growth": {}}
    for name in args.rows:
        if len(args.rows) > 1:
            words = [sys.executable, __file__, "--rows", name, "--growth", "none", "--repeats", str(args.repeats), "--device", args.device]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            print(done[-2], flush=True)
            result["rows"][name] = json.loads(done[-1])
            continue
        ours, theirs = make_rows(args.device)[name]()
        pairs = [(clock(ours, args.device), clock(theirs, args.device)) for _ in range(args.repeats + 1)][1:]
        ratios = sorted(t / o for o, t in pairs)
        o, t = (statistics.median(x) for x in zip(*pairs))
        result["rows"][name] = {"what": ROWS[name], "ours_s": o, "theirs_s": t, "ratio": statistics.median(ratios), "ratios": ratios}
        print(f"| ({name}) {ROWS[name]} | {o:.3f} | {t:.3f} | {statistics.median(ratios):.1f}x | {ratios[0]:.1f}, {ratios[-1]:.1f} |\n"
              f"{json.dumps(result['rows'][name])}", flush=True)
    for which in args.growth:
        if which != "none":
            print(f"\n| {which} | prefill, s | ms per step | slots per s |\n|---|---|---|---|", flush=True)
            result["growth"][which] = growth(which, args.device, max(1, args.repeats // 2))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
