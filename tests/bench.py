"""Benchmarks: this repository's hot paths against the plain way of doing the same, in turn in one run.

    python tests/bench.py                                         # rows a to d: 4 minutes on 2 cores
    python tests/bench.py --model DIR --rows g h l u s            # real weights
    python tests/bench.py --rows a d --json results/bench.json    # some of them, the numbers kept too

(a) decode, short prompts: tiny model, 16 prompts x 8 samples x 64 tokens
                                                    against transformers' generate
(b) decode, long prompt: 1,024 tokens x 8 samples x 64 slots, latents in them
                                                    against transformers' generate
(c) score and back-propagate the same shape         against rows that each have their own prompt
(d) make 6 x 3 latents again in a 1,024-slot row    against one pass over the prefix per latent
(t) a GRPO step on the tiny task with its reward, 16 prompts x 16 samples, stopped or cut at 240 tokens
                                                    against TRL's GRPOTrainer (needs `pip install trl`)
With the weights of --model, random prompts:
(g, h, l) decode 24 tokens: a prompt of 300 tokens x 8 samples; one of 1,200 x 16; four of 300 x 1
                                                    against transformers' generate
(u) update on a prompt of 300 x 8 samples of 12 to 180 tokens
                                                    against rows padded, each with its own prompt
(p) a step of stage 2: a trace of a prompt of 300 and 120 tokens, in it three tags of 5 latents
                                                    against one pass over the prefix per latent, as released
(s) a GRPO step: a prompt of 300 x 8 samples x 24 tokens, and the process' peak memory
                                                    against TRL's GRPOTrainer

Both sides have the same weights, lengths and sampling. Each row has a process of its own: what ran before
decides how the C library's malloc treats large blocks, and that moves a row by a quarter.
"""
import argparse
import concurrent.futures
import copy
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
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import litereason
from data import tiny
from lib import checkpoint, memory, scoring
from litereason import (LATENT, Rollout, attach, generate, group_advantages, load, logprobs, policy_loss,
                        projector_loss, unroll)

NEVER = -7  # a stop token that is never sampled: all rows run to the same length on both sides
# Of the large model; the vocabulary is Qwen2.5's, its head a third of the work.
WIDTH, VOCABULARY = 512, 151_936


# ============================================================ what rows share
def models(name, device):
    """A checkpoint -> (ours, theirs, with transformers' sdpa, tokenizer)"""
    ours, tokenizer = load(name, device)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.TINY if name == "tiny" else name,
                                                  dtype=torch.float32, attn_implementation="sdpa")
    return ours, theirs.to(device).eval(), tokenizer


def large_models(device):
    """The same of 8 layers with random weights."""
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1408,
                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                         max_position_embeddings=16_384, tie_word_embeddings=True, attn_implementation="sdpa")
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(config).to(device).eval()
    return attach(copy.deepcopy(theirs)), theirs, load("tiny", "cpu")[1]


def random_ids(*shape, seed=0, most=150_000):
    return torch.randint(10, most, shape, generator=torch.Generator().manual_seed(seed))


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
    """Every row with its own copy of the prompt, padded on the right; own: lists of ids -> their log-probs."""
    S = max(map(len, own))
    padded = torch.tensor([row + [0] * (S - len(row)) for row in own], device=model.device)  # (rows, S)
    ids = torch.cat([torch.tensor(prompt, device=model.device).expand(len(own), -1), padded], 1)
    logits = model(input_ids=ids, logits_to_keep=S + 1).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, padded[..., None])[..., 0]
    return torch.cat([of_row[: len(row)] for of_row, row in zip(logp, own)])


def prefix_passes(model, projector, rollout):
    """Latents as the released code makes them, the text before each through the whole model -> states."""
    ids = torch.tensor([rollout.prompt_ids + [max(slot, 0) for slot in rollout.slots]], device=model.device)
    x = model.get_input_embeddings()(ids)
    for t, slot in enumerate(rollout.slots, len(rollout.prompt_ids)):
        if slot == LATENT:
            states = model.model(inputs_embeds=x[:, :t], use_cache=False).last_hidden_state
            x = torch.cat([x[:, :t], projector(states[:, -1:]), x[:, t + 1 :]], 1)
    return model.model(inputs_embeds=x, use_cache=False).last_hidden_state


def clock(run, device):
    """Seconds that run() takes, after all that was under way has ended."""
    wait = getattr(torch, device).synchronize
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


# ================================================= the rows: model, device -> (ours, theirs), to be run in turn
def decode_short(_, device):
    ours, theirs, tokenizer = models("tiny", device)
    return decode(ours, theirs, tokenizer, tiny_prompts(tokenizer, "test")[1], 8, 64)


def decode_long(_, device):
    return decode(*large_models(device), random_ids(1, 1024).tolist(), 8, 64, every=50)


def decode(ours, theirs, tokenizer, prompts, samples, steps, every=0):
    tags_fire(ours, tokenizer, every, 3)
    return (lambda: generate(ours, tokenizer, prompts, samples, steps),
            lambda: their_generate(theirs, prompts, samples, steps))


def decode_real(n, length, samples):
    return lambda model, device: decode(*models(model, device),
                                        random_ids(n, length, most=40_000).tolist(), samples, 24)


def score(_, device):
    return update(*large_models(device)[:2], random_ids(1024).tolist(), random_ids(8, 64, seed=1).tolist())


def update_real(model, device):
    own = [random_ids(n, seed=n, most=40_000).tolist() for n in (12, 20, 30, 40, 60, 80, 120, 180)]
    return update(*models(model, device)[:2], random_ids(300, most=40_000).tolist(), own)


def update(ours, theirs, prompt, own):
    rollouts = [Rollout(prompt, slots, torch.zeros(0, ours.config.hidden_size)) for slots in own]

    def backward(model, logp):
        logp.sum().backward()
        model.zero_grad(set_to_none=True)

    return (lambda: backward(ours, logprobs(ours, rollouts)[0]),
            lambda: backward(theirs, their_logprobs(theirs, prompt, own)))


def trace(prompt, n_text, blocks, n_latents, seed, most):
    """A rollout of random words, with `blocks` blocks of latents in it."""
    slots = random_ids(n_text, seed=seed, most=most).tolist()
    for i in range(blocks):
        at = 20 + 37 * i
        slots[at:at] = [LATENT] * n_latents
    return Rollout(prompt, slots, torch.zeros(0, WIDTH))


def latents_again(_, device):
    ours, theirs, _ = large_models(device)
    rollout = trace(random_ids(768).tolist(), 1024 - 768 - 18, 6, 3, 2, 150_000)
    return (torch.no_grad()(lambda: unroll(ours, [rollout])),
            torch.no_grad()(lambda: prefix_passes(theirs, ours.reasoning_projector, rollout)))


def stage_2(model, device):
    ours, theirs, _ = models(model, device)
    rollout = trace(random_ids(300, most=40_000).tolist(), 120, 3, 5, 0, 40_000)
    for p in [*memory.base_parameters(ours), *theirs.parameters()]:  # the LM is frozen
        p.requires_grad_(False)

    def their_step():
        h = prefix_passes(theirs, ours.reasoning_projector, rollout)
        first = rollout.slots.index(LATENT)
        slots = torch.tensor(rollout.slots[first:], device=device)
        logits = theirs.lm_head(h[0, len(rollout.prompt_ids) + first - 1 : -1][slots != LATENT])
        torch.nn.functional.cross_entropy(logits, slots[slots != LATENT], reduction="sum").backward()

    return lambda: projector_loss(ours, [rollout])[0].backward(), their_step


ROWS = {"a": ("decode, short prompts", decode_short), "b": ("decode, long prompt", decode_long),
        "c": ("score + backward", score), "d": ("latents again", latents_again),
        "t": ("GRPO step, against TRL", None),  # see pairs_with_trl
        "g": ("decode, 300 x 8", decode_real(1, 300, 8)), "h": ("decode, 1,200 x 16", decode_real(1, 1200, 16)),
        "l": ("decode, four of 300 x 1", decode_real(4, 300, 1)), "u": ("update, unequal lengths", update_real),
        "p": ("stage 2, a step", stage_2), "s": ("GRPO step, against TRL", None)}


# ============================================================ (t, s) TRL's trainer
def pairs_with_trl(name, model, device, repeats, sides="both"):
    """[(our seconds, TRL's seconds)] of training steps in turn, the first of which is not to be counted; both
    on the same prompts, with the same reward and settings. sides: "ours", "theirs": that one alone."""
    import datasets
    import trl

    real = name == "s"
    ours, theirs, tokenizer = models(model if real else "tiny", device)
    if real:
        checkpoint.stop_tokens = lambda *_: [NEVER]
        words = AutoTokenizer.from_pretrained(model, padding_side="left")
        prompts = [words.encode(words.decode(random_ids(290, most=40_000)))[:300]]
        samples, limit, micro_batch, steps_of = 8, 24, 8, 1
        texts = [words.decode(prompts[0])]

        def reward(_, text):
            return float(len(set(text)))
    else:
        examples, prompts = tiny_prompts(tokenizer, "train")
        words = transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint.TINY, padding_side="left")
        # Four micro-batches to one optimiser step: faster here than all 256 rollouts at once.
        samples, limit, micro_batch, steps_of = 16, 240, 64, 4
        texts = [tiny.prompt(example, False) for example in examples]

        def reward(i, text):
            return tiny.reward(examples[i], text)

    pairs = []
    base = memory.base_parameters(ours)
    optimizer = torch.optim.AdamW(base, lr=1.2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def our_step():
        rollouts = generate(ours, tokenizer, prompts, samples, limit, latent="none")
        rewards = torch.tensor([reward(r.prompt, r.text) for r in rollouts]).view(-1, samples)
        advantages = group_advantages(rewards).flatten().to(device)
        for part in scoring.pack(rollouts, 12_000):
            logp, scored = logprobs(ours, [rollouts[i] for i in part])
            policy_loss(logp, logp.detach(), advantages[part], scored, len(rollouts))[0].backward()
        torch.nn.utils.clip_grad_norm_(base, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if sides == "ours":
        del theirs
        return [(clock(our_step, device), 0.0) for _ in range(repeats + 1)]

    def their_rewards(completions, number, **_):
        return [reward(i, completion) for i, completion in zip(number, completions)]

    class Stopwatch(transformers.TrainerCallback):
        """Times each of TRL's steps, sampling included, and runs one of ours after it."""

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            theirs = time.perf_counter() - self.began
            pairs.append((clock(our_step, device) if sides == "both" else 0.0, theirs))

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, max_steps=repeats + 1, learning_rate=1.2e-4, lr_scheduler_type="constant",
            adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, num_generations=samples,
            max_completion_length=limit, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, epsilon=0.2,
            loss_type="grpo", use_cpu=device == "cpu", bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=steps_of,
            generation_kwargs={"min_new_tokens": limit} if real else None,
            save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True)
        rows = [{"prompt": text, "number": i} for i, text in enumerate(texts)]
        trainer = trl.GRPOTrainer(
            model=theirs, processing_class=words, args=config, reward_funcs=their_rewards,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[Stopwatch()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return pairs


def peak_gib(*args):
    """The process' peak while one side trains alone."""
    pairs_with_trl(*args)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ============================================================ the script
def measure(name, model, device, repeats):
    """One row -> its numbers; the first pair is not counted."""
    title, row = ROWS[name]
    if row is None:
        pairs = pairs_with_trl(name, model, device, repeats)
    else:
        checkpoint.stop_tokens = lambda *_: [NEVER]
        sides = row(model, device)
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
    ap.add_argument("--rows", nargs="*", default=["a", "b", "c", "d"], choices=list(ROWS))
    ap.add_argument("--model", help="a checkpoint with real weights, for rows g to s")
    ap.add_argument("--repeats", type=int, default=5, help="pairs per row, after one that is not counted")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = ap.parse_args()
    if not args.model and set(args.rows) - set("abcdt"):
        ap.error("rows g to s need --model DIR")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    result = {"machine": machine, "torch": torch.__version__, "model": args.model, "rows": {}}
    print(f"{machine}; torch {torch.__version__}; medians of {args.repeats} pairs\n")
    print("| row | ours, s | theirs, s | ratio | lowest, highest |\n|---|---|---|---|---|", flush=True)
    for name in args.rows:
        n = alone(measure, name, args.model, args.device, args.repeats)
        if name == "s":
            n["peak_gib"] = [alone(peak_gib, name, args.model, args.device, 1, side) for side in ("ours", "theirs")]
        result["rows"][name] = n
        peak = "" if name != "s" else " peaks {:.1f} and {:.1f} GiB".format(*n["peak_gib"])
        print(f"| ({name}) {n['what']}{peak} | {n['ours_s']:.3f} | {n['theirs_s']:.3f} | {n['ratio']:.1f}x | "
              f"{n['ratios'][0]:.1f}, {n['ratios'][-1]:.1f} |", flush=True)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
