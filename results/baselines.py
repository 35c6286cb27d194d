"""Runs the other methods of the paper's table, each in its smallest honest form: same data, same loop, same
counting of tokens.

    method         fed where no token is sampled       a block ends when                     training
    soft-thinking  the mean embedding of likely words  the answer's first word is likeliest  none
    moi            (every token, mixed with rivals)    (there are no blocks)                 none
    coconut        the last hidden state itself        a fixed number has been run           SFT in stages
    colar          a draw from N(mu(h), sigma(h))      the LM head draws the answer's word   SFT, then GRPO
    answer         (the answer is forced at once)      (nothing is reasoned)                 SFT, gold answers

All of them are `generate` of litereason.py with another latent step and other rules for where a block begins
and ends (its arguments latent, start, leave, feed), on the plain prompt, without tags. `answer` is the floor:
what the task gives without reasoning.

Every row of results.json says what it took. The main row is sampled as the paper samples; indented below it
are temperature 1, and the stories that were learned from: memorising shows as a gap.

Left out: special tokens around a block (the tiny world has no room for new words; the answer's first word
ends a block as well), each method's own sampling, and LoRA (the base is trained whole, as the paper's author
did). Coconut's state is fed as it is, as in its paper: 7 times an embedding in the tiny world, 15 times in
SmolLM2-135M, 360 times in Qwen2.5-Coder-0.5B, where the words around it are hardly read before training.

    python results/baselines.py --method soft-thinking                # half a minute on a core
    python results/baselines.py --method answer --stories 100         # SFT on a hundred gold answers
"""
import itertools
import json
import math
import os
import random
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
from tqdm import tqdm

import data
from eval import PAPER, TRAINED, evaluate
from lib import UserError, checkpoint, display, memory, run, scoring
from lib.run import BySize
from litereason import (LATENT, Rollout, generate, group_advantages, load, logprobs, policy_loss,
                        projector_loss, states, word_embeddings)
from train_projector import SENTENCE, split_answer

METHODS = ["soft-thinking", "moi", "coconut", "colar", "answer"]
RATES = (1, 2, 5)  # reasoning tokens per latent with which CoLaR is tested after its SFT
POSITIONS = 12_000  # in a forward pass of training; changes no result
CHECKED = 200  # val stories by which something is chosen, and train stories evaluated beside the test
SAMPLINGS = {"paper": PAPER, "trained": TRAINED}

# {title: {flag: (default, the least, what it is)}}. The papers' settings (Coconut and CoLaR as LiteReason's
# author ran them on plot holes; the answer's are ours), and what a small model trained from scratch needs.
SETTINGS = {
    "what": {
        "method": ("soft-thinking", METHODS, "see above"),
        "model": ("tiny", str, "the base: tiny, a directory, or a hub name such as Qwen2.5-1.5B"),
        "task": (None, str, "a folder under data/, or tiny.next_chapter [by the model]"),
        "out": (None, str, "the run's directory [out/MODEL-TASK-METHOD]"),
        "overwrite": (False, bool, "replace the run that --out holds"),
        "n": (500, 1, "test examples"),
        "max_new_tokens": (run.SLOTS, 1, "slots per answer, latents included"),
        "seed": (0, 0, "of all random draws"),
        "r": (None, 1, "colar: tokens per latent, 1, 2 or 5 [all in the SFT's test, then the best on val]"),
        "device": (None, str, "cpu or cuda [cuda if there is one]"),
    },
    "training (of two defaults the first is for less than 50 M parameters)": {
        "stories": (None, 1, "train stories (default all)"),
        "traces": (BySize(1, 5), 1, "coconut, colar: traces sampled per train story"),
        "batch": (BySize(32, 128), 1, "of an SFT"),
        "lr": (None, 0.0, "of the SFT (default by method, see SFT)"),
        "epochs": (None, 0.0, "colar: of the SFT; coconut: of each stage but the last (default by method)"),
        "steps": (None, 0, "colar: GRPO steps, 0 is SFT only; answer: SFT steps (default by method)"),
        "stages": (BySize(8, 5), 1, "coconut: latents of its last stage"),
        "last_stage": (BySize(8 / 3, 2), 0.0, "coconut: epochs of the last stage"),
        "most_latents": (BySize(150, 64), 1, "colar: latents of an answer"),
        "rl_lr": (BySize(1.2e-4, 5e-7), 0.0, "colar: of GRPO"),
        "prompts": (BySize(16, 48), 1, "colar: stories per GRPO step"),
        "num_generations": (16, 2, "colar: rollouts per story in GRPO"),
    },
}
# Chosen on 200 val stories of the tiny world before this one (commit 7a68d78), of 1e-3 and 3e-4, constant or
# with warm-up: the best for answer (1.000) and coconut (0.995, with 200 steps in its last stage). For colar
# all are a coin (0.48 to 0.53); at 3e-4 answers differ, which GRPO needs.
SFT = {
    "answer": {"lr": BySize(3e-4, 5e-5), "steps": BySize(240, 200)},
    "coconut": {"lr": BySize(3e-4, 5e-5), "epochs": BySize(1 / 3, 2)},
    "colar": {"lr": BySize(3e-4, 1e-4), "epochs": BySize(8 / 3, 50), "steps": BySize(24, 180)},
}


# ============================================================ Soft Thinking (arXiv 2505.15778)
def predicted(model, h):
    """log p of the next word for states h (n, D) -> (n, V), in fp32 or better."""
    logits = model.lm_head(h)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = logits.log_softmax(-1)
    return logp.clamp(min=torch.finfo(logp.dtype).min)  # no -inf: p log p of what is no word is 0


def soft_thinking(model, end, top_k=10, temperature=1.0):
    """Thinking in mixtures of words, without training -> arguments for `generate`.

    The paper: while the model thinks, the next input is sum_i p_i E[i] over the top_k likeliest words. It
    stops when the likeliest word is </think>. Ours: the word `end`, which follows the block, stands for it,
    and there is no second stop, after 256 certain steps in a row: small models' answers end before."""
    embed = model.get_input_embeddings()

    def step(h, *_):
        logp, word = predicted(model, h).topk(min(top_k, model.config.vocab_size))  # (n, top_k) each
        p = (logp / temperature).softmax(-1)
        return (p.to(h.dtype)[..., None] * embed(word)).sum(1)  # (n, D)

    def leave(h, drawn, taken):
        return torch.where(predicted(model, h).argmax(-1) == end, end, LATENT)

    step.flops = 2 * model.lm_head.weight.numel()  # for eval.flops
    return {"latent": step, "leave": leave}


# ============================================================ Mixture of Inputs (arXiv 2505.14827)
def mixture_of_inputs(model, beta=1.0):
    """Every sampled word is fed mixed with its rivals, without training -> arguments for `generate`.

    As in the paper: a word is sampled as usual from p, but what is fed is the mean embedding under the
    posterior of a Dirichlet prior that follows p: w_i = (H p_i + (beta + 1 - H) [i is the word]) /
    (beta + 1), with H the entropy of p, 0 to 1. Its beta: 0.5 to 2."""
    embed = model.get_input_embeddings()
    n_words = embed.num_embeddings - len(model.lm_head.no_words)
    with torch.no_grad():  # (V, D), scaled where the model scales
        all_words = embed(torch.arange(embed.num_embeddings, device=model.device))
    if model.bf16:  # once, not in every step
        all_words = all_words.to(torch.bfloat16)

    def feed(h, token):
        logp = predicted(model, h)  # (n, V)
        p = logp.exp()
        H = -(p * logp).sum(-1, keepdim=True) / math.log(n_words)  # (n, 1), 1 if all are equally likely
        expected = p.to(all_words.dtype) @ all_words  # (n, D)
        mixed = H.to(h.dtype) * expected.to(h.dtype) + (beta + 1 - H).to(h.dtype) * embed(token)
        return mixed / (beta + 1)

    feed.flops = 2 * embed.weight.numel()  # beside the LM head, which is counted for every word
    return {"feed": feed}


# ============================================================ what the trained methods share
def own_traces(model, tokenizer, task, examples, args):
    """Stage 1 of LiteReason with the plain prompt: of args.traces samples per prompt those with a reward ->
    ([(prompt as text, reasoning, answer)], tokens sampled). UserError if there is none."""
    generator = torch.Generator().manual_seed(args.seed)
    traces, spent = [], 0
    for i in tqdm(range(0, len(examples), 32), desc="traces", leave=False):
        some = examples[i : i + 32]
        prompts = [task.prompt(example, False) for example in some]
        rollouts = generate(model, tokenizer, prompts, args.traces, args.max_new_tokens, latent="none",
                            generator=generator, **PAPER)
        spent += sum(len(rollout.slots) for rollout in rollouts)
        for rollout, reward in zip(rollouts, rewards_of(task, some, rollouts, 0)):
            reasoning, answer = split_answer(rollout.text, data.opening_of(task))
            if reward > 0 and rollout.finished and reasoning.strip():
                traces.append((prompts[rollout.prompt], reasoning, answer))
    if not traces:
        raise UserError("no sampled answer earned a reward: there is nothing to train on")
    print(f"kept {len(traces)} of {args.traces * len(examples)} traces (reward > 0)", flush=True)
    return traces, spent


def rewards_of(task, examples, rollouts, step):
    """The rewards of rollouts of these examples' prompts -> list of floats. step: of the training."""
    asked = [examples[rollout.prompt] for rollout in rollouts]
    return data.score(task, asked, [rollout.text for rollout in rollouts], step)


def sft(parameters, rows, args, steps, seed, add_gradients):
    """Yields after each of so many steps with a new AdamW, whose rate goes up for 30 steps or the first fifth
    and then all the way down to 5 %. Batches are whole, and shuffled again for each epoch."""
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
    warm_up = min(30, steps / 5)
    rng, left = random.Random(seed), []
    for step in tqdm(range(steps), desc=f"{args.method}, SFT", leave=False):
        if len(left) < args.batch:
            left = rng.sample(rows, len(rows))
        add_gradients(left[: args.batch])
        left = left[args.batch :]
        descend(optimizer, args.lr * min(1, (step + 1) / warm_up, 0.05 + 0.95 * (steps - step) / steps))
        yield step + 1


def steps_in(epochs, rows, args):
    return max(1, int(epochs * len(rows) / args.batch))


def descend(optimizer, lr):
    """One step with the gradient clipped at 1; one that is not finite is dropped."""
    group, = optimizer.param_groups
    group["lr"] = lr
    if torch.nn.utils.clip_grad_norm_(group["params"], 1.0).isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ============================================================ Coconut (arXiv 2412.06769)
def feed_back(h, *_):
    """Coconut's latent step: the next input is the last hidden state."""
    return h


feed_back.flops = 0


def train_coconut(model, tokenizer, traces, args):
    """Trains the base to think in its own hidden states, args.stages of them -> optimiser steps.

    The paper: in stage s the first s reasoning sentences of each trace are deleted and latents put at the
    answer's beginning; after the last stage all reasoning is deleted. Cross-entropy on the text that is
    left, back-propagated through the latents; a new optimiser per stage. Ours: one latent per sentence (the
    paper's maths has two, the author's plot-hole runs one), and fewer epochs in the last stage."""
    taken = 0
    for stage in range(args.stages + 2):
        is_last = stage > args.stages
        rows = []  # latents, the sentences that are left, the answer, its end
        for prompt, reasoning, answer in traces:
            sentences = [sentence for sentence in SENTENCE.findall(reasoning) if sentence.strip()]
            left = "" if is_last else "".join(sentences[stage:])
            text = f"{left} {answer}".strip()
            rows.append(row_of(model, tokenizer, prompt, text, n_latents=min(stage, args.stages)))
        steps = steps_in(args.last_stage if is_last else args.epochs, rows, args)
        taken += len(list(sft(memory.base_parameters(model), rows, args, steps, f"{args.seed} {stage}",
                              lambda batch: add_text_gradients(model, batch))))
    return taken


def row_of(model, tokenizer, prompt, text, begins="", n_latents=0):
    """A Rollout that writes the text, with its end, behind latents that are made in the forward pass. begins:
    how the answer begins already."""
    prompt = checkpoint.encode_prompt(model, tokenizer, prompt, begins)
    words = checkpoint.encode_text(tokenizer, text) + [checkpoint.end_of_answer(model, tokenizer)]
    return Rollout(prompt, [LATENT] * n_latents + words, torch.zeros(0, model.config.hidden_size))


def add_text_gradients(model, batch):
    """Cross-entropy on the text of the rows, mean over the batch's tokens. All begin with as many latents."""
    tokens = sum(row.n_tokens for row in batch)
    for part in scoring.pack(batch, POSITIONS, unrolled=batch[0].n_latents > 0):
        some = [batch[i] for i in part]
        if some[0].n_latents:
            loss, _ = projector_loss(model, some, feed_back)
        else:
            logp, _ = logprobs(model, some)  # (b, S)
            loss = -logp.sum()
        (loss / tokens).backward()


# ============================================================ the answer at once
def train_answer(model, rows, args, accuracy):
    """SFT on rows of answer_rows. Ten times on the way accuracy() is asked, of val stories; the weights that
    did best are kept."""
    best, kept = -math.inf, model.state_dict()  # with no steps these
    for step in sft(memory.base_parameters(model), rows, args, args.steps, args.seed,
                    lambda batch: add_text_gradients(model, batch)):
        if step % max(1, args.steps // 10) == 0 and (val := accuracy()) > best:
            best, kept = val, {name: weights.clone() for name, weights in model.state_dict().items()}
    model.load_state_dict(kept)


def answer_rows(model, tokenizer, task, examples):
    """The gold answers of the examples, from what follows the opening, in which nothing can be learned."""
    opening = data.opening_of(task)
    return [row_of(model, tokenizer, task.prompt(own, False), task.answer(own).removeprefix(opening), opening)
            for own in examples]


# ============================================================ CoLaR (arXiv 2505.16552): its latents
class LatentHead(torch.nn.Module):
    """The last hidden state h (n, D) -> mean and deviation of the next latent, (n, D) each, in units of
    `spread`, the standard deviation of the model's embeddings."""

    def __init__(self, D, spread):
        super().__init__()
        linear = torch.nn.Linear
        self.spread = spread
        self.trunk = torch.nn.Sequential(linear(D, D), torch.nn.GELU(), linear(D, D), torch.nn.LayerNorm(D))
        self.mean = linear(D, D)
        self.log_std = linear(D, D)

    def forward(self, h):
        h = self.trunk(h.to(self.mean.weight.dtype))
        return self.mean(h), self.log_std(h).exp()

    def logprob(self, h, z):
        """log-density of z (n, D), in units of the spread, mean over dimensions (as in CoLaR) -> (n,)."""
        mean, std = self(h)
        return torch.distributions.Normal(mean, std).log_prob(z.to(mean.dtype)).mean(-1)


def normal_numbers(u, k, D):
    """(n, D) standard normal numbers that depend on a row's u (0 to 1) and k (a whole number) only, hence not
    on its batch: a hash (splitmix64) of (u, k, place) gives two uniform numbers, Box-Muller a normal one."""
    seed = (u * 2**40).long() * 65_537 + k  # (n,)
    place = torch.arange(2 * D, device=u.device)
    x = seed[:, None] * 1_000_003 + place  # (n, 2 D)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        mask = (1 << 64 - shift) - 1  # makes >> a shift of unsigned numbers
        x = (x ^ (x >> shift & mask)) * factor
    bits = x >> 11 & (1 << 53) - 1
    uniform = (bits.double() + 0.5).div(2**53)
    a, b = uniform.split(D, 1)
    return (-2 * a.log()).sqrt() * (2 * math.pi * b).cos()


def colar(model, head, end):
    """Latents until the LM head draws `end`, the answer's first word -> arguments for `generate`."""

    def step(h, u, k):
        with torch.autocast(h.device.type, enabled=False):  # in the head's own precision, as in training
            mean, std = head(h)
        z = mean + std * normal_numbers(u, k, h.shape[1]).to(mean)
        return (z * head.spread).to(h.dtype)

    def leave(h, drawn, taken):
        return torch.where((drawn == end) & (taken > 0), drawn, LATENT)

    step.flops = 2 * (model.lm_head.weight.numel() + sum(p.numel() for p in head.parameters()))
    return {"latent": step, "leave": leave}


# ============================================================ CoLaR: supervised
def told(task, r):
    """The task with r said in its prompts. The released prompt says "(Thinking speed: r)"; the tiny world has
    digits only."""
    prompt = lambda example, latent: f"{task.prompt(example, latent)} {r}"
    return types.SimpleNamespace(**{**vars(task), "prompt": prompt})


def sft_colar(model, tokenizer, head, traces, args):
    """Trains base and head to reason in latents that stand for several tokens each -> optimiser steps.

    The paper: each r reasoning tokens become one latent, the sum of their embeddings / sqrt(r); r is drawn
    from 1 to 5 and said in the prompt. At a latent's place the LM head learns one of its tokens, drawn by
    chance, and the latent head the latent itself. Ours: latents are constants for the embeddings."""
    end = checkpoint.end_of_answer(model, tokenizer)
    rows = [(prompt, *(checkpoint.encode_text(tokenizer, text.strip()) for text in texts))
            for prompt, *texts in traces]
    rng = random.Random(args.seed)

    def add_gradients(rows):
        batch, targets = [], []  # targets: what the LM head learns, for each slot of a row
        for prompt, reasoning, answer in rows:
            r = rng.randint(1, max(RATES))
            thought = [reasoning[at : at + r] for at in range(0, len(reasoning), r)]
            slots = [LATENT] * len(thought) + answer + [end]
            ids = checkpoint.encode_prompt(model, tokenizer, f"{prompt} {r}")
            batch.append(Rollout(ids, slots, compress(model, thought)))
            targets.append([rng.choice(tokens) for tokens in thought] + answer + [end])
        add_sft_gradients(model, head, batch, targets)

    parameters = memory.base_parameters(model) + list(head.parameters())
    return len(list(sft(parameters, rows, args, steps_in(args.epochs, rows, args), args.seed, add_gradients)))


@torch.no_grad()
def compress(model, thought):
    """A latent for each list of tokens: the sum of their embeddings / sqrt(their number) -> (latents, D)."""
    embed = model.get_input_embeddings()
    return torch.stack([embed(torch.tensor(tokens, device=model.device)).float().sum(0) / len(tokens) ** 0.5
                        for tokens in thought])


def add_sft_gradients(model, head, batch, targets):
    """Cross-entropy of the LM head at all slots, mean over the batch, and the latent head's squared error,
    mean over its latents: that of a draw, E (mu + sigma e - z)^2 = (mu - z)^2 + sigma^2."""
    n_slots = sum(map(len, targets))
    n_latents = sum(row.n_latents for row in batch)
    for part in scoring.pack(batch, POSITIONS):
        some = [batch[i] for i in part]
        h, slots, valid = states(model, some)  # (b, S, D), (b, S), (b, S)

        # The latent head, at the latents.
        is_latent = valid & (slots == LATENT)
        mean, std = head(h[is_latent])  # (latents, D) each
        z = torch.cat([row.latents for row in some]).to(mean) / head.spread
        squared_error = ((mean - z).square() + std.square()).mean(-1)  # (latents,)

        # The LM head, at all slots, row by row.
        words = list(itertools.chain(*[targets[i] for i in part]))
        logp = scoring.token_logprobs(model, h[valid], torch.tensor(words, device=model.device))  # (slots,)
        (-logp.sum() / n_slots + squared_error.sum() / n_latents).backward()


# ============================================================ CoLaR: GRPO
def rl_colar(model, tokenizer, task, head, examples, args, decoding, took):
    """GRPO in which latents are actions: their log-densities count beside the log-probs of the answer.
    metrics.jsonl gets a line per step, and took what it took: see decodings."""
    parameters = memory.base_parameters(model) + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    took["steps_without_gradient"] = 0  # in which every group earned the same
    took["optimiser_steps"] += args.steps
    per_epoch = max(1, len(examples) // args.prompts)
    for step in range(args.steps):
        epoch, batch = divmod(step, per_epoch)
        order = random.Random(f"{args.seed} {epoch}").sample(examples, len(examples))
        some = order[batch * args.prompts :][: args.prompts]

        # Sample a group of rollouts for each prompt, and compare each with the others of its own.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rollouts = generate(model, tokenizer, [task.prompt(example, False) for example in some],
                            args.num_generations, args.max_new_tokens, tag=0, generator=generator, **decoding)
        took["sampled_tokens"] += sum(len(rollout.slots) for rollout in rollouts)
        rewards = rewards_of(task, some, rollouts, step + 1)
        groups = torch.tensor(rewards).view(len(some), args.num_generations)

        # One update per batch.
        add_policy_gradients(model, head, rollouts, group_advantages(groups).flatten())
        descend(optimizer, args.rl_lr)
        # The step's figures, as train_rl.py has them. A group that earned the same has nothing to learn from.
        zero_variance = float((groups.amax(1) == groups.amin(1)).float().mean())
        line = {"step": step + 1, "reward": float(groups.mean()),
                "text_tokens": sum(rollout.n_tokens for rollout in rollouts) / len(rollouts),
                "latent_steps": sum(rollout.n_latents for rollout in rollouts) / len(rollouts),
                "zero_variance": zero_variance}
        with open(os.path.join(args.out, "metrics.jsonl"), "a" if step else "w") as log:
            log.write(json.dumps(line) + "\n")
        print(" | ".join(f"{name} {figure:.5g}" for name, figure in line.items()), flush=True)
        took["steps_without_gradient"] += zero_variance == 1


def add_policy_gradients(model, head, rollouts, advantages):
    """CoLaR adds two policy losses, over the latents and over the words of a rollout, each a mean of its own.
    Rollouts whose advantage (B,) is 0 have no gradient and are not run; they count in the means."""
    batch = [b for b in range(len(rollouts)) if advantages[b] != 0]
    for part in scoring.pack([rollouts[b] for b in batch], POSITIONS):
        micro = [batch[i] for i in part]
        some = [rollouts[b] for b in micro]
        h, slots, valid = states(model, some)  # (b, S, D), (b, S), (b, S)
        is_latent = valid & (slots == LATENT)
        is_word = valid & (slots != LATENT)

        # Log-probs: of latents under the head, of words under the LM head.
        z = torch.cat([rollout.latents for rollout in some]).to(h.device) / head.spread
        of_latents = head.logprob(h[is_latent], z)
        of_words = scoring.token_logprobs(model, h[is_word], slots[is_word])
        logp = torch.zeros(slots.shape, device=h.device).masked_scatter(is_latent, of_latents.float())
        logp = logp.masked_scatter(is_word, of_words.float())  # (b, S)

        # With one update per batch the old log-probs are these: the ratio is 1.
        own = advantages[micro].to(logp)  # (b,)
        sum(policy_loss(logp, logp.detach(), own, scored, len(rollouts))[0]
            for scored in (is_latent, is_word)).backward()


# ============================================================ the script
def parse_arguments():
    return run.parser(__doc__, SETTINGS).parse_args()


def decodings(args, model, tokenizer, task, examples, on_val, took):
    """Trains the model as the method does; yields (name, task, decoding) for each of its rows of the table.

    decoding: arguments of evaluate, or a function of the temperature that makes them. on_val(task, decoding):
    accuracy. took: what it has learned from so far, filled in here."""
    end = checkpoint.encode_text(tokenizer, data.opening_of(task))[0]
    if args.method in ("coconut", "colar"):
        traces, took["sampled_tokens"] = own_traces(model, tokenizer, task, examples, args)
        took["traces"] = len(traces)
    if args.method == "soft-thinking":
        decoding = lambda temperature: {**soft_thinking(model, end, temperature=temperature),
                                        "start": args.max_new_tokens}
    elif args.method == "moi":
        decoding = mixture_of_inputs(model)
    elif args.method == "coconut":
        took["optimiser_steps"] = train_coconut(model, tokenizer, traces, args)
        decoding = {"latent": feed_back, "start": args.stages}
    elif args.method == "answer":
        if not hasattr(task, "answer"):
            raise UserError(f"--method answer trains on gold answers, and {args.task} has none")
        decoding = {"at_once": True, "latent": "none"}
        rows = answer_rows(model, tokenizer, task, examples)
        train_answer(model, rows, args, lambda: on_val(task, decoding))
        took["optimiser_steps"] = args.steps
    if args.method != "colar":
        yield args.method, task, decoding
        return

    torch.manual_seed(args.seed)
    spread = float(word_embeddings(model).float().std())
    head = LatentHead(model.config.hidden_size, spread).to(model.device)
    took["optimiser_steps"] = sft_colar(model, tokenizer, head, traces, args)
    decoding = {**colar(model, head, end), "start": args.most_latents}
    rates = [args.r] if args.r else RATES
    vals = {r: on_val(told(task, r), decoding) for r in rates}
    print(f"colar, SFT: accuracy on val for each r: {vals}", flush=True)
    took["r"] = max(vals, key=lambda r: (vals[r], r))  # of equals the largest, which has the fewest latents
    for r in rates:
        yield f"colar, r = {r}, SFT", told(task, r), decoding
    if args.steps:
        task = told(task, took["r"])
        rl_colar(model, tokenizer, task, head, examples, args, decoding, took)
        yield "colar", task, decoding


def main():
    args = parse_arguments()
    args.task, task = data.choose_task(args.task, args.model)
    args.out = args.out or run.default_out(args.model, args.task, args.method)
    run.check_arguments(args, SETTINGS)
    held = run.take_directory(args.out, args.model, overwrite=args.overwrite)  # noqa: F841
    examples = task.examples("train")
    if (args.stories or 1) > len(examples):
        raise UserError(f"--stories is {args.stories}; {args.task} has only {len(examples)} train stories")
    examples = examples[: args.stories]
    vals = task.examples("val")[:CHECKED]
    tests = task.examples("test")[: args.n]
    model, tokenizer = load(args.model, args.device)
    model.graphs = model.device.type == "cuda"
    of_method = {name: (default, None, None) for name, default in SFT.get(args.method, {}).items()}
    run.fill(args, {**SETTINGS, "of the method": of_method}, checkpoint.is_small(model))
    data.start_task(task, args.model, None, None, args.seed, args.device)
    run.begin(args.out, "results/baselines.py", vars(args))
    is_trained = args.method in SFT
    took = {"stories": len(examples) * is_trained, "traces": 0, "sampled_tokens": 0, "optimiser_steps": 0}
    rows = []

    def figures(asked, some, decoding, sampling, **more):
        """evaluate's result on some examples of the task `asked`. To these methods a tag is text: tag=0."""
        decoding = decoding(sampling["temperature"]) if callable(decoding) else decoding
        return evaluate(model, tokenizer, asked, some, latent_prompt=False, seed=args.seed, tag=0,
                        max_new_tokens=args.max_new_tokens, **sampling, **decoding, **more)[0]

    on_val = lambda asked, decoding: figures(asked, vals, decoding, PAPER)["accuracy"]
    for name, asked, decoding in decodings(args, model, tokenizer, task, examples, on_val, took):
        for label, sampling, split, some, alone in (
                (name, "paper", "test", tests, 8),
                (f"  {name}, temperature 1", "trained", "test", tests, 8),
                (f"  {name}, train stories", "paper", "train", examples[:CHECKED], 0)):
            result = figures(asked, some, decoding, SAMPLINGS[sampling], progress=label, alone=alone)
            rows.append((label, {"model": label, "sampling": sampling, "split": split, **took, **result}))

    if is_trained:
        checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
    run.write_json(os.path.join(args.out, "results.json"), [result for _, result in rows])
    print(display.table(rows, data.measure_of(task)))
    print(f"\n{len(tests)} test examples, seed {args.seed}; numbers in {args.out}/results.json, and what was "
          f"learned from: {took}")


if __name__ == "__main__":
    run.run_script(main)
