"""Benchmarks: this repository's hot paths against the plain way of doing the same, paired in one run.
Asserts nothing.

Each row runs ours and theirs in turn, --repeats times, with the same weights, lengths and sampling on both
sides. It prints both medians, and the median, lowest and highest of the paired ratios. The growth tables show
what a path costs as one dimension grows. Each row has a process of its own: what ran before decides how the C
library's malloc treats large blocks, and that moves a row by a quarter.

    python tests/bench.py                           # all rows and growth tables: 6 minutes on 2 cores
    python tests/bench.py --rows a d --growth none  # some of it
    python tests/bench.py --json results/bench.json # the numbers too

(a) decode, short prompts: tiny model, 16 prompts x 8 samples x 64 tokens
                                                    against transformers' generate
(b) decode, long prompt: 1,024 tokens x 8 samples x 64 slots, latents in them
                                                    against transformers' generate
(c) score and back-propagate the same shape         against rows padded, each with its own prompt
(d) make 6 x 3 latents again in a 1,024-slot row    against one pass over the prefix per latent
(e) a GRPO step on the tiny task: sample, score, back-propagate, update
                                                    against generate and padded scoring
(t) a GRPO step on the tiny task with its reward, 16 prompts x 16 samples, stopped or cut at 160 tokens
                                                    against TRL's GRPOTrainer (needs `pip install trl`)
(w) prompts that wait: 16 prompts of 256 tokens x 4 through 16 rows, lengths of 24 on average, 96 at most
                                                    against our own loop, one batch after the other
"""
import argparse
import copy
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lib import checkpoint, memory
import litereason
import train_rl
from data import tiny
from litereason import (LATENT, Rollout, attach, generate, group_advantages, load, logprobs, policy_loss,
                        unroll)
from lib.checkpoint import TINY

NEVER = -7  # a stop token that is never sampled: all rows run to the same length on both sides
# of the large model; the vocabulary is Qwen2.5's, its head a third of the work
WIDTH, VOCABULARY = 512, 151_936


# ============================================================ what rows share
def models(kind, device):
    """(ours, theirs, tokenizer): the same weights with our attention and with transformers' sdpa.

    kind: "tiny", or "large": 8 layers with random weights."""
    ours, tokenizer = load("tiny", device)
    if kind == "tiny":
        theirs = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        return ours, theirs.to(device).eval(), tokenizer
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1408,
                         num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
                         max_position_embeddings=16_384, tie_word_embeddings=True, attn_implementation="sdpa")
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(config).to(device).eval()
    ours = Qwen2ForCausalLM(copy.deepcopy(theirs.config)).to(device)
    ours.load_state_dict(theirs.state_dict())
    return attach(ours), theirs, tokenizer


def random_ids(*shape, seed=0):
    """Token ids of the large vocabulary, a tensor."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(10, 150_000, shape, generator=draws)


def tiny_prompts(tokenizer, split):
    """The split's first 16 examples, and their prompts without the offer of a tag, as token ids."""
    examples = tiny.examples(split)[:16]
    return examples, [tokenizer.encode(tiny.prompt(example, False)) for example in examples]


def tags_fire(model, tokenizer, every, n):
    """From now on one token id in `every` ends a tag of n latents: random weights write no tags by
    themselves. 0: none does."""
    cap = model.config.litereason_max_reasoning_steps
    watch = litereason.tag_table(tokenizer, cap, model.config.vocab_size, model.device)
    watch.next_state = torch.zeros_like(watch.next_state[:2])
    watch.fires = torch.zeros_like(watch.fires[:2])
    watch.classes.zero_()
    if every:
        watch.classes[::every] = 1
        watch.fires[1] = n
    litereason.watcher = lambda *_: watch


def padded_left(rows, device):
    """Lists of token ids -> (ids, mask), (rows, longest) each."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def their_generate(model, prompts, samples, steps):
    """Prompts (lists of ids), each repeated per sample and padded as transformers expects them -> (rows,
    steps) ids."""
    rows = [prompt for prompt in prompts for _ in range(samples)]
    ids, mask = padded_left(rows, model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                         top_p=1.0, eos_token_id=None, pad_token_id=0, max_new_tokens=steps)
    return out[:, ids.shape[1] :]


def their_logprobs(model, prompts, samples, own):
    """Every row with its own copy of the prompt, own parts aligned at the right end; own (rows, S) ids ->
    log-probs (rows, S)."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    rows = [prompt + ids for prompt, ids in zip(repeated, own.tolist())]
    ids, mask = padded_left(rows, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=own.shape[1] + 1)
    logps = out.logits[:, :-1].log_softmax(-1)
    return logps.gather(-1, own.to(model.device)[..., None])[..., 0]


def clock(run, device):
    """Seconds that run() takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ====================================================== the rows: device -> (ours, theirs), to be run in turn
def decode_short(device):
    ours, theirs, tokenizer = models("tiny", device)
    _, prompts = tiny_prompts(tokenizer, "test")
    tags_fire(ours, tokenizer, 0, 0)
    return (lambda: generate(ours, tokenizer, prompts, 8, 64),
            lambda: their_generate(theirs, prompts, 8, 64))


def decode_long(device):
    ours, theirs, tokenizer = models("large", device)
    prompts = random_ids(1, 1024).tolist()
    tags_fire(ours, tokenizer, 50, 3)
    return (lambda: generate(ours, tokenizer, prompts, 8, 64),
            lambda: their_generate(theirs, prompts, 8, 64))


def score(device):
    ours, theirs, _ = models("large", device)
    prompt = random_ids(1024).tolist()
    own = random_ids(8, 64, seed=1)
    rollouts = [Rollout(prompt, slots, torch.zeros(0, WIDTH)) for slots in own.tolist()]

    def our_pass():
        logprobs(ours, rollouts)[0].sum().backward()
        ours.zero_grad(set_to_none=True)

    def their_pass():
        their_logprobs(theirs, [prompt], 8, own).sum().backward()
        theirs.zero_grad(set_to_none=True)

    return our_pass, their_pass


def latents_again(device):
    ours, theirs, _ = models("large", device)
    prompt = random_ids(768).tolist()
    slots = random_ids(1024 - 768 - 18, seed=2).tolist()
    for i in range(6):
        at = 20 + 37 * i
        slots[at:at] = [LATENT] * 3
    rollout = Rollout(prompt, slots, torch.zeros(0, WIDTH))
    ids = torch.tensor([prompt + [max(slot, 0) for slot in slots]], device=device)

    @torch.no_grad()
    def cached():
        return unroll(ours, [rollout])

    @torch.no_grad()
    def prefixes():
        """As the released code does: the whole text before a latent goes through the model for each
        latent."""
        x = theirs.get_input_embeddings()(ids)
        for t, slot in enumerate(slots, len(prompt)):
            if slot == LATENT:
                states = theirs.model(inputs_embeds=x[:, :t], use_cache=False).last_hidden_state
                x[:, t] = ours.reasoning_projector(states[:, -1])[0]
        return theirs.model(inputs_embeds=x, use_cache=False).last_hidden_state

    return cached, prefixes


def grpo_step(device):
    ours, theirs, tokenizer = models("tiny", device)
    _, prompts = tiny_prompts(tokenizer, "train")
    tags_fire(ours, tokenizer, 0, 0)
    rewards = torch.rand(16, 16, generator=torch.Generator().manual_seed(3))
    advantages = group_advantages(rewards).flatten().to(device)
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-7) for model in (ours, theirs)}
    micro_batches = [slice(i, i + 128) for i in range(0, 256, 128)]

    def update(model):
        optimizers[model].step()
        optimizers[model].zero_grad(set_to_none=True)

    def our_step():
        rollouts = generate(ours, tokenizer, prompts, 16, 96)
        for part in micro_batches:
            some = rollouts[part]
            logp, scored = logprobs(ours, some)
            old_logp = torch.stack([rollout.logprobs for rollout in some]).to(logp)
            loss, _ = policy_loss(logp, old_logp, advantages[part], scored, 256)
            loss.backward()
        update(ours)

    def their_step():
        own = their_generate(theirs, prompts, 16, 96)
        for part in micro_batches:
            logp = their_logprobs(theirs, prompts[part.start // 16 : part.stop // 16], 16, own[part])
            scored = torch.ones_like(logp, dtype=torch.bool)
            loss, _ = policy_loss(logp, logp.detach(), advantages[part], scored, 256)
            loss.backward()
        update(theirs)

    return our_step, their_step


def waiting_prompts(device):
    ours, _, tokenizer = models("large", device)
    tags_fire(ours, tokenizer, 0, 0)
    prompts = random_ids(16, 256).tolist()

    def decode(parts):
        """With one token of the vocabulary in 24 as a stop token: random weights draw any with about the same
        odds."""
        never = checkpoint.stop_tokens
        checkpoint.stop_tokens = lambda *_: list(range(0, VOCABULARY, 24))
        draws = torch.Generator().manual_seed(0)
        try:
            for part in parts:
                generate(ours, tokenizer, part, 4, 96, gen_batch_size=16, generator=draws)
        finally:
            checkpoint.stop_tokens = never

    batches = [prompts[i : i + 4] for i in range(0, 16, 4)]
    return lambda: decode([prompts]), lambda: decode(batches)


ROWS = {
    "a": ("decode, short prompts", decode_short),
    "b": ("decode, long prompt", decode_long),
    "c": ("score + backward", score),
    "d": ("latents again", latents_again),
    "e": ("GRPO step, tiny task", grpo_step),
    "t": ("GRPO step, against TRL", None),  # see pairs_with_trl
    "w": ("prompts that wait", waiting_prompts)}


def pairs_of(row, device, repeats):
    """[(our seconds, their seconds)], after one pair that is not counted."""
    ours, theirs = row(device)
    pairs = [(clock(ours, device), clock(theirs, device)) for _ in range(repeats + 1)]
    return pairs[1:]


# ============================================================ (t) TRL's trainer
def our_training(device, lengths):
    """-> step(): one step of train_rl.py on the tiny task, as it runs for --method grpo. The rollouts' mean
    length is appended to `lengths`."""
    model, tokenizer = load("tiny", device)
    examples, prompts = tiny_prompts(tokenizer, "train")
    settings = types.SimpleNamespace(**train_rl.SMALL, method="grpo", recompute_latents=False)
    base = memory.base_parameters(model)
    optimizer = torch.optim.AdamW(base, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step():
        rollouts = generate(model, tokenizer, prompts, settings.group, settings.max_new_tokens,
                            gen_batch_size=settings.rows, latent="none")
        rewards = [tiny.reward(examples[rollout.prompt], rollout.text) for rollout in rollouts]
        tokens = torch.tensor([rollout.n_tokens for rollout in rollouts])
        lengths.append(float(tokens.float().mean()))
        groups = (settings.prompts, settings.group)
        advantages, divisors = litereason.grpo(torch.tensor(rewards).view(groups), tokens.view(groups),
                                               settings.max_new_tokens)
        train_rl.add_gradients(settings, model, rollouts, range(len(rollouts)), advantages.flatten(),
                               divisors.flatten())
        torch.nn.utils.clip_grad_norm_(base, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trl_trainer(device, steps, folder):
    """TRL's GRPOTrainer on the same prompts, with the same reward and settings as `our_training`."""
    import datasets
    import trl

    same = train_rl.SMALL
    rollouts = same["prompts"] * same["group"]
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).to(device)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(TINY, padding_side="left")
    examples = tiny.examples("train")[: same["prompts"]]
    rows = [{"prompt": tiny.prompt(example, False), "number": number}
            for number, example in enumerate(examples)]

    def rewards(completions, number, **_):
        return [tiny.reward(examples[i], completion) for i, completion in zip(number, completions)]

    config = trl.GRPOConfig(
        output_dir=folder, max_steps=steps, learning_rate=same["lr"], lr_scheduler_type="constant",
        adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, num_generations=same["group"],
        max_completion_length=same["max_new_tokens"], temperature=1.0, top_k=0, top_p=1.0, beta=0.0,
        epsilon=same["clip"], loss_type="grpo", use_cpu=device == "cpu", bf16=False,
        gradient_checkpointing=False,
        # Four micro-batches to one optimiser step: faster here than all 256 rollouts at once.
        per_device_train_batch_size=rollouts // 4, gradient_accumulation_steps=4,
        save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True)
    return trl.GRPOTrainer(model=model, args=config, processing_class=tokenizer, reward_funcs=rewards,
                           train_dataset=datasets.Dataset.from_list(rows))


def pairs_with_trl(device, repeats):
    """[(our seconds, TRL's seconds)] of training steps in turn, after one pair that is not counted, and the
    mean lengths of both sides' rollouts, in tokens."""
    pairs, our_lengths = [], []
    our_step = our_training(device, our_lengths)

    class Stopwatch(transformers.TrainerCallback):
        """Times each of TRL's steps, sampling included, and runs one of ours after it."""

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if device == "cuda":
                torch.cuda.synchronize()
            theirs = time.perf_counter() - self.began
            pairs.append((clock(our_step, device), theirs))

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(device, repeats + 1, folder)
        trainer.add_callback(Stopwatch())
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    their_lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history
                     if "completions/mean_length" in entry]
    return pairs[1:], statistics.mean(our_lengths[1:]), statistics.mean(their_lengths[1:])


# ============================================================ growth
def growth(which, device, repeats):
    """How decoding grows: slots per second against rows, prompt length, and latents per tag (the large
    model)."""
    ours, _, tokenizer = models("large", device)
    prompt = random_ids(8192).tolist()
    settings = {  # (the number that grows, prompt, rows, latents per tag)
        "rows": [(n, prompt[:256], n, 0) for n in (1, 4, 16, 64, 256)],
        "prompt": [(n, prompt[:n], 8, 0) for n in (256, 1024, 4096, 8192)],
        "latents": [(n, prompt[:256], 8, n) for n in (0, 1, 3, 5)]}
    lines = []
    for n, ids, rows, latents in settings[which]:
        tags_fire(ours, tokenizer, 20 if latents else 0, latents)

        def seconds(slots):
            run = [clock(lambda: generate(ours, tokenizer, [ids], rows, slots), device)
                   for _ in range(repeats)]
            return statistics.median(run)

        prefill = seconds(1)
        step = (seconds(33) - prefill) / 32
        lines.append({which: n, "prefill_s": prefill, "ms_per_step": 1000 * step, "slots_per_s": rows / step})
        print(f"| {n} | {prefill:.3f} | {1000 * step:.1f} | {rows / step:.0f} |", flush=True)
    return lines


# ============================================================ the script
def describe_machine(device):
    """One line: what computes, with how many threads, in which versions."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{cpu_model()}, {torch.get_num_threads()} threads"
    return f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}"


def cpu_model():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(name, args):
    """One row -> its numbers."""
    title, row = ROWS[name]
    numbers = {"what": title}
    if row is None:
        pairs, our_length, their_length = pairs_with_trl(args.device, args.repeats)
        numbers["our_tokens"] = our_length
        numbers["their_tokens"] = their_length
    else:
        pairs = pairs_of(row, args.device, args.repeats)
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    numbers["ours_s"] = statistics.median(ours for ours, _ in pairs)
    numbers["theirs_s"] = statistics.median(theirs for _, theirs in pairs)
    numbers["ratio"] = statistics.median(ratios)
    numbers["ratios"] = ratios
    return numbers


def table_line(name, numbers):
    title = numbers["what"]
    if "our_tokens" in numbers:
        title += f" ({numbers['our_tokens']:.0f} and {numbers['their_tokens']:.0f} tokens a rollout)"
    ratios = numbers["ratios"]
    return (f"| ({name}) {title} | {numbers['ours_s']:.3f} | {numbers['theirs_s']:.3f} | "
            f"{numbers['ratio']:.1f}x | {ratios[0]:.1f}, {ratios[-1]:.1f} |")


def measure_in_own_process(name, args):
    """The same by this script, called for one row."""
    words = [sys.executable, __file__, "--rows", name, "--growth", "none", "--repeats", str(args.repeats),
             "--device", args.device]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    growths = ["rows", "prompt", "latents"]
    ap.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), help="which comparisons")
    ap.add_argument("--growth", nargs="*", default=growths, choices=[*growths, "none"])
    ap.add_argument("--repeats", type=int, default=5, help="pairs per row, after one that is not counted")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--json", metavar="FILE", help="write the numbers there")
    return ap.parse_args()


def main():
    args = parse_arguments()
    machine = describe_machine(args.device)
    print(f"{machine}; medians of {args.repeats} pairs\n")
    print("| row | ours, s | theirs, s | ratio | lowest, highest |\n|---|---|---|---|---|")
    result = {"machine": machine, "rows": {}, "growth": {}}
    is_alone = len(args.rows) == 1
    for name in args.rows:
        if name == "t" and importlib.util.find_spec("trl") is None:
            print(f"| (t) {ROWS['t'][0]} | needs pip install trl | | | |", flush=True)
            continue
        if name != "t":  # there rollouts end as they do in training
            checkpoint.stop_tokens = lambda *_: [NEVER]
        numbers = measure(name, args) if is_alone else measure_in_own_process(name, args)
        result["rows"][name] = numbers
        print(table_line(name, numbers), flush=True)
        if is_alone:
            print(json.dumps(numbers))
    for which in args.growth:
        if which != "none":
            checkpoint.stop_tokens = lambda *_: [NEVER]
            print(f"\n| {which} | prefill, s | ms per step | slots per s |\n|---|---|---|---|", flush=True)
            result["growth"][which] = growth(which, args.device, max(1, args.repeats // 2))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
