"""Benchmarks with real weights: this repository's hot paths against the plain way of doing the same, in turn.

    python tests/bench.py DIR                             # all rows but s, with the checkpoint in DIR
    python tests/bench.py DIR --rows s                    # needs `pip install trl`
    python tests/bench.py DIR --json results/bench.json   # the numbers kept

(g, h, l) decode 24 tokens: a prompt of 300 tokens x 8 samples; one of 1,200 x 16; four of 300 x 1
                                                    against transformers' generate
(u) update on a prompt of 300 x 8 samples of 12 to 180 tokens
                                                    against rows padded, each with its own prompt
(p) stage 2 on four traces: prompts of 300, 60 to 180 tokens, in them one to four tags of 5 latents
                                                    against one pass over the prefix per latent, as released
(s) a GRPO step: a prompt of 300 x 8 samples x 24 tokens, and the process' peak memory
                                                    against TRL's GRPOTrainer

Both sides have the same weights (fp32), lengths and sampling; prompts are random words. Each row has a
process of its own: what ran before decides how the C library's malloc treats large blocks.
"""
import argparse
import concurrent.futures
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import checkpoint, memory, scoring
from litereason import (LATENT, Rollout, generate, group_advantages, load, logprobs, policy_loss,
                        projector_loss)

NEVER = -7  # a stop token that is never sampled: all rows run to the same length on both sides


# ============================================================ what rows share
def models(path, device):
    """-> (ours, theirs, with transformers' sdpa, tokenizer)"""
    ours, tokenizer = load(path, device)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    return ours, theirs.to(device).eval(), tokenizer


def random_ids(*shape, seed=0):
    return torch.randint(10, 40_000, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def clock(run, device):
    """Seconds that run() takes, after all that was under way has ended."""
    wait = getattr(torch, device).synchronize
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


# ============================================ the rows: model, device -> (ours, theirs), to be run in turn
def decode(n, length, samples):
    def sides(path, device):
        ours, theirs, tokenizer = models(path, device)
        prompts = random_ids(n, length)
        ids = torch.tensor([prompt for prompt in prompts for _ in range(samples)], device=device)
        settings = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0,
                    "attention_mask": torch.ones_like(ids), "max_new_tokens": 24}
        return (lambda: generate(ours, tokenizer, prompts, samples, 24, latent="none"),
                lambda: theirs.generate(ids, **settings))

    return sides


def update(path, device):
    ours, theirs, _ = models(path, device)
    prompt, own = random_ids(300), [random_ids(n, seed=n) for n in (12, 20, 30, 40, 60, 80, 120, 180)]
    rollouts = [Rollout(prompt, slots, torch.zeros(0, ours.config.hidden_size)) for slots in own]
    S = max(map(len, own))
    ids = torch.tensor([prompt + slots + [0] * (S - len(slots)) for slots in own], device=device)
    scored = torch.tensor([[True] * len(slots) + [False] * (S - len(slots)) for slots in own], device=device)

    def our_side():
        logprobs(ours, rollouts)[0].sum().backward()
        ours.zero_grad(set_to_none=True)

    def their_side():
        logits = theirs(input_ids=ids, logits_to_keep=S + 1).logits[:, :-1]
        logp = logits.log_softmax(-1).gather(-1, ids[:, len(prompt) :, None])[..., 0]
        logp[scored].sum().backward()
        theirs.zero_grad(set_to_none=True)

    return our_side, their_side


def stage_2(path, device):
    ours, theirs, _ = models(path, device)
    rollouts = []
    for i in range(4):
        slots = random_ids(60 + 40 * i, seed=i)
        for tag in range(1 + i):
            slots[20 + 37 * tag : 20 + 37 * tag] = [LATENT] * 5
        rollouts.append(Rollout(random_ids(300, seed=i), slots, torch.zeros(0, ours.config.hidden_size)))
    for p in [*memory.base_parameters(ours), *theirs.parameters()]:  # the LM is frozen
        p.requires_grad_(False)
    embed = theirs.get_input_embeddings()

    def their_side():
        """As released: trace by trace; the text before a latent goes through the whole model for each."""
        for rollout in rollouts:
            fed = rollout.prompt_ids + rollout.slots
            x = embed(torch.tensor([fed], device=device).clamp(min=0))
            for t, slot in enumerate(fed):
                if slot == LATENT:
                    states = theirs.model(inputs_embeds=x[:, :t], use_cache=False).last_hidden_state
                    x = torch.cat([x[:, :t], ours.reasoning_projector(states[:, -1:]), x[:, t + 1 :]], 1)
            first = fed.index(LATENT)
            after = torch.tensor(fed[first:], device=device)
            h = theirs.model(inputs_embeds=x, use_cache=False).last_hidden_state[0, first - 1 : -1]
            logits = theirs.lm_head(h[after != LATENT])
            torch.nn.functional.cross_entropy(logits, after[after != LATENT], reduction="sum").backward()

    return lambda: projector_loss(ours, rollouts)[0].backward(), their_side


ROWS = {"g": ("decode, 300 x 8", decode(1, 300, 8)), "h": ("decode, 1,200 x 16", decode(1, 1200, 16)),
        "l": ("decode, four of 300 x 1", decode(4, 300, 1)), "u": ("update, unequal lengths", update),
        "p": ("stage 2, four traces", stage_2), "s": ("GRPO step", None)}  # see pairs_with_trl


# ============================================================ (s) TRL's trainer
def pairs_with_trl(path, device, repeats, side="both"):
    """[(our seconds, TRL's seconds)] of training steps in turn, the first of which is not to be counted; both
    on the same prompt, with the same reward and settings. side: "ours", "theirs": that one alone."""
    words = AutoTokenizer.from_pretrained(path, padding_side="left")
    text = words.decode(random_ids(290))
    prompt = words.encode(text)
    pairs = []

    def reward(text):
        return float(len(set(text)))

    if side != "theirs":
        ours, tokenizer = load(path, device)
        base = memory.base_parameters(ours)
        optimizer = torch.optim.AdamW(base, lr=5e-7, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def our_step():
        rollouts = generate(ours, tokenizer, [prompt], 8, 24, latent="none")
        rewards = torch.tensor([[reward(r.text) for r in rollouts]])
        advantages = group_advantages(rewards).flatten().to(device)
        for part in scoring.pack(rollouts, 12_000):
            logp, scored = logprobs(ours, [rollouts[i] for i in part])
            policy_loss(logp, logp.detach(), advantages[part], scored, len(rollouts))[0].backward()
        torch.nn.utils.clip_grad_norm_(base, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if side == "ours":
        return [(clock(our_step, device), 0.0) for _ in range(repeats + 1)]
    import datasets
    import trl

    class Stopwatch(transformers.TrainerCallback):
        """Times each of TRL's steps, sampling included, and runs one of ours after it."""

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            theirs = time.perf_counter() - self.began
            pairs.append((clock(our_step, device) if side == "both" else 0.0, theirs))

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, max_steps=repeats + 1, learning_rate=5e-7, lr_scheduler_type="constant",
            adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, num_generations=8, max_completion_length=24,
            generation_kwargs={"min_new_tokens": 24}, temperature=1.0, top_k=0, top_p=1.0, beta=0.0,
            epsilon=0.2, loss_type="grpo", use_cpu=device == "cpu", bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=8, save_strategy="no", report_to="none", logging_steps=1,
            disable_tqdm=True)
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), processing_class=words,
            args=config, reward_funcs=lambda completions, **_: list(map(reward, completions)),
            train_dataset=datasets.Dataset.from_list([{"prompt": text}]), callbacks=[Stopwatch()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return pairs


def peak_gib(*args):
    """The process' peak while one side trains alone."""
    pairs_with_trl(*args)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ============================================================ the script
def measure(name, path, device, repeats):
    """One row -> its numbers; the first pair is not counted."""
    title, row = ROWS[name]
    checkpoint.stop_tokens = lambda *_: [NEVER]
    if name == "s":
        pairs = pairs_with_trl(path, device, repeats)
    else:
        sides = row(path, device)
        pairs = [[clock(side, device) for side in sides] for _ in range(repeats + 1)]
    our_seconds, their_seconds = zip(*pairs[1:])
    ratios = sorted(theirs / ours for ours, theirs in pairs[1:])
    return {"what": title, "ours_s": statistics.median(our_seconds),
            "theirs_s": statistics.median(their_seconds), "ratio": statistics.median(ratios),
            "ratios": ratios}


def alone(function, *args):
    """function(*args) in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", help="a directory with a checkpoint")
    ap.add_argument("--rows", nargs="*", default=["g", "h", "l", "u", "p"], choices=list(ROWS))
    ap.add_argument("--repeats", type=int, default=3, help="pairs per row, after one that is not counted")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = ap.parse_args()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    result = {"machine": machine, "torch": torch.__version__, "model": os.path.basename(args.model)}
    rows = result["rows"] = {}
    print(f"{machine}; torch {torch.__version__}; medians of {args.repeats} pairs\n")
    print("| row | ours, s | theirs, s | ratio | lowest, highest |\n|---|---|---|---|---|", flush=True)
    for name in args.rows:
        n = alone(measure, name, args.model, args.device, args.repeats)
        what = n["what"]
        if name == "s":
            n["peak_gib"] = [alone(peak_gib, args.model, args.device, 1, side) for side in ("ours", "theirs")]
            what += ", peaks {:.2f} and {:.2f} GiB".format(*n["peak_gib"])
        rows[name] = n
        print(f"| ({name}) {what} | {n['ours_s']:.2f} | {n['theirs_s']:.2f} | {n['ratio']:.1f}x | "
              f"{n['ratios'][0]:.1f}, {n['ratios'][-1]:.1f} |", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
