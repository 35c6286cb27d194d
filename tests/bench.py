"""Benchmarks: this repository's hot paths against the plain way of doing the same, in turn in one run.

    python tests/bench.py                            # all rows but t: 4 minutes on 2 cores
    python tests/bench.py --rows a d                 # some of them
    python tests/bench.py --json results/bench.json  # the numbers too

(a) decode, short prompts: tiny model, 16 prompts x 8 samples x 64 tokens
                                                    against transformers' generate
(b) decode, long prompt: 1,024 tokens x 8 samples x 64 slots, latents in them
                                                    against transformers' generate
(c) score and back-propagate the same shape         against rows that each have their own prompt
(d) make 6 x 3 latents again in a 1,024-slot row    against one pass over the prefix per latent
(t) a GRPO step on the tiny task with its reward, 16 prompts x 16 samples, stopped or cut at 240 tokens
                                                    against TRL's GRPOTrainer (needs `pip install trl`)

Both sides have the same weights, lengths and sampling. Each row has a process of its own: what ran before
decides how the C library's malloc treats large blocks, and that moves a row by a quarter.
"""
import argparse
import concurrent.futures
import copy
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import litereason
from data import tiny
from lib import checkpoint, memory, scoring
from litereason import (LATENT, Rollout, attach, generate, group_advantages, load, logprobs, policy_loss,
                        unroll)

NEVER = -7  # a stop token that is never sampled: all rows run to the same length on both sides
# Of the large model; the vocabulary is Qwen2.5's, its head a third of the work.
WIDTH, VOCABULARY = 512, 151_936


# ============================================================ what rows share
def tiny_models(device):
    """-> (ours, theirs, with transformers' sdpa, tokenizer)"""
    ours, tokenizer = load("tiny", device)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.TINY, dtype=torch.float32,
                                                  attn_implementation="sdpa")
    return ours, theirs.to(device).eval(), tokenizer


def large_models(device):
    """The same of 8 layers with random weights."""
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1408,
                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                         max_position_embeddings=16_384, tie_word_embeddings=True, attn_implementation="sdpa")
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(config).to(device).eval()
    return attach(copy.deepcopy(theirs)), theirs, load("tiny", "cpu")[1]


def random_ids(*shape, seed=0):
    return torch.randint(10, 150_000, shape, generator=torch.Generator().manual_seed(seed))


def tiny_prompts(tokenizer, split):
    """The split's first 16 examples, and their prompts without the offer of a tag, as token ids."""
    examples = tiny.examples(split)[:16]
    return examples, [tokenizer.encode(tiny.prompt(example, False)) for example in examples]


def tags_fire(model, tokenizer, every, n):
    """From now on one token id in `every` ends a tag of n latents: random weights write no tags by
    themselves. 0: none does."""
    cap = model.config.litereason_max_reasoning_steps
    watch = litereason.tag_table(tokenizer, cap, model.config.vocab_size, model.device)
    for table in (watch.next_state, watch.fires, watch.classes):
        table.zero_()
    if every:
        watch.classes[::every] = 1
        watch.fires[1] = n
    litereason.watcher = lambda *_: watch


def their_generate(model, prompts, samples, steps):
    """Prompts (lists of ids), each repeated per sample and padded on the left -> (rows, steps) ids."""
    rows = [prompt for prompt in prompts for _ in range(samples)]
    width = max(map(len, rows))
    ids = torch.tensor([[-1] * (width - len(row)) + row for row in rows], device=model.device)
    out = model.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long(), do_sample=True, temperature=1.0,
                         top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0, max_new_tokens=steps)
    return out[:, width:]


def their_logprobs(model, prompt, own):
    """Every row with its own copy of the prompt; own (rows, S) ids -> log-probs (rows, S)."""
    own = own.to(model.device)
    ids = torch.cat([torch.tensor(prompt, device=model.device).expand(len(own), -1), own], 1)
    logits = model(input_ids=ids, logits_to_keep=own.shape[1] + 1).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, own[..., None])[..., 0]


def clock(run, device):
    """Seconds that run() takes, after all that was under way has ended."""
    wait = getattr(torch, device).synchronize
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


# ====================================================== the rows: device -> (ours, theirs), to be run in turn
def decode_short(device):
    ours, theirs, tokenizer = tiny_models(device)
    return in_turn(ours, theirs, tokenizer, tiny_prompts(tokenizer, "test")[1], 0)


def decode_long(device):
    return in_turn(*large_models(device), random_ids(1, 1024).tolist(), 50)


def in_turn(ours, theirs, tokenizer, prompts, every):
    tags_fire(ours, tokenizer, every, 3)
    return (lambda: generate(ours, tokenizer, prompts, 8, 64),
            lambda: their_generate(theirs, prompts, 8, 64))


def score(device):
    ours, theirs, _ = large_models(device)
    prompt = random_ids(1024).tolist()
    own = random_ids(8, 64, seed=1)
    rollouts = [Rollout(prompt, slots, torch.zeros(0, WIDTH)) for slots in own.tolist()]

    def backward(model, logp):
        logp.sum().backward()
        model.zero_grad(set_to_none=True)

    return (lambda: backward(ours, logprobs(ours, rollouts)[0]),
            lambda: backward(theirs, their_logprobs(theirs, prompt, own)))


def latents_again(device):
    ours, theirs, _ = large_models(device)
    prompt = random_ids(768).tolist()
    slots = random_ids(1024 - 768 - 18, seed=2).tolist()
    for i in range(6):
        at = 20 + 37 * i
        slots[at:at] = [LATENT] * 3
    rollout = Rollout(prompt, slots, torch.zeros(0, WIDTH))
    ids = torch.tensor([prompt + [max(slot, 0) for slot in slots]], device=device)

    @torch.no_grad()
    def prefixes():
        """As the released code does: the whole text before a latent goes through the model for each."""
        x = theirs.get_input_embeddings()(ids)
        for t, slot in enumerate(slots, len(prompt)):
            if slot == LATENT:
                states = theirs.model(inputs_embeds=x[:, :t], use_cache=False).last_hidden_state
                x[:, t] = ours.reasoning_projector(states[:, -1])
        return theirs.model(inputs_embeds=x, use_cache=False).last_hidden_state

    return torch.no_grad()(lambda: unroll(ours, [rollout])), prefixes


ROWS = {"a": ("decode, short prompts", decode_short), "b": ("decode, long prompt", decode_long),
        "c": ("score + backward", score), "d": ("latents again", latents_again),
        "t": ("GRPO step, against TRL", None)}  # see pairs_with_trl


# ============================================================ (t) TRL's trainer
def pairs_with_trl(device, repeats):
    """[(our seconds, TRL's seconds)] of training steps in turn, the first of which is not to be counted; both
    on the same prompts, with the same reward and settings."""
    import datasets
    import trl

    model, theirs, tokenizer = tiny_models(device)
    examples, prompts = tiny_prompts(tokenizer, "train")
    pairs = []

    base = memory.base_parameters(model)
    optimizer = torch.optim.AdamW(base, lr=1.2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def our_step():
        rollouts = generate(model, tokenizer, prompts, 16, 240, latent="none")
        rewards = torch.tensor([tiny.reward(examples[r.prompt], r.text) for r in rollouts]).view(16, 16)
        advantages = group_advantages(rewards).flatten().to(device)
        for part in scoring.pack(rollouts, 12_000):
            logp, scored = logprobs(model, [rollouts[i] for i in part])
            policy_loss(logp, logp.detach(), advantages[part], scored, len(rollouts))[0].backward()
        torch.nn.utils.clip_grad_norm_(base, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def their_rewards(completions, number, **_):
        return [tiny.reward(examples[i], completion) for i, completion in zip(number, completions)]

    class Stopwatch(transformers.TrainerCallback):
        """Times each of TRL's steps, sampling included, and runs one of ours after it."""

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            theirs = time.perf_counter() - self.began
            pairs.append((clock(our_step, device), theirs))

    rows = [{"prompt": tiny.prompt(example, False), "number": i} for i, example in enumerate(examples)]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, max_steps=repeats + 1, learning_rate=1.2e-4, lr_scheduler_type="constant",
            adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, num_generations=16,
            max_completion_length=240, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, epsilon=0.2,
            loss_type="grpo", use_cpu=device == "cpu", bf16=False, gradient_checkpointing=False,
            # Four micro-batches to one optimiser step: faster here than all 256 rollouts at once.
            per_device_train_batch_size=64, gradient_accumulation_steps=4,
            save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True)
        words = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint.TINY, padding_side="left")
        trainer = trl.GRPOTrainer(
            model=theirs, processing_class=words, args=config, reward_funcs=their_rewards,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[Stopwatch()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return pairs


# ============================================================ the script
def measure(name, device, repeats):
    """One row -> its numbers; the first pair is not counted."""
    title, row = ROWS[name]
    if name == "t":
        pairs = pairs_with_trl(device, repeats)
    else:
        checkpoint.stop_tokens = lambda *_: [NEVER]
        sides = row(device)
        pairs = [[clock(side, device) for side in sides] for _ in range(repeats + 1)]
    our_seconds, their_seconds = zip(*pairs[1:])
    ratios = sorted(theirs / ours for ours, theirs in pairs[1:])
    return {"what": title, "ours_s": statistics.median(our_seconds),
            "theirs_s": statistics.median(their_seconds), "ratio": statistics.median(ratios),
            "ratios": ratios}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", nargs="*", default=["a", "b", "c", "d"], choices=list(ROWS))
    ap.add_argument("--repeats", type=int, default=5, help="pairs per row, after one that is not counted")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = ap.parse_args()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    result = {"machine": machine, "torch": torch.__version__, "rows": {}}
    print(f"{machine}; torch {torch.__version__}; medians of {args.repeats} pairs\n")
    print("| row | ours, s | theirs, s | ratio | lowest, highest |\n|---|---|---|---|---|", flush=True)
    for name in args.rows:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            n = process.submit(measure, name, args.device, args.repeats).result()
        result["rows"][name] = n
        print(f"| ({name}) {n['what']} | {n['ours_s']:.3f} | {n['theirs_s']:.3f} | {n['ratio']:.1f}x | "
              f"{n['ratios'][0]:.1f}, {n['ratios'][-1]:.1f} |", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
