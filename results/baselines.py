"""The other methods of the paper's table, each in its smallest honest form: same data, same loop, same
counting of tokens.

    method         fed where no token is sampled       a block ends when                     training
    soft-thinking  the mean embedding of likely words  the answer's first word is likeliest  none
    moi            (every token, mixed with rivals)    (there are no blocks)                 none
    coconut        the last hidden state itself        a fixed number has been run           SFT in stages
    colar          a draw from N(mu(h), sigma(h))      the LM head draws the answer's word   SFT, then GRPO
    answer         (the answer is forced at once)      (nothing is reasoned)                 SFT, gold answers

All of them are `generate` of litereason.py with another latent step and other rules for where a block begins
and ends (its arguments latent, start, leave, feed); a block begins in the first slot that the model fills.
They get the plain prompt, no tags. `answer` is the floor: what the task gives without reasoning. The rest of
the table is train_rl.py: RL without latents (--method grpo), with a length penalty (--overlong-buffer), the
tag without a projector (--method tag), pause tokens (--projector pause), a projector from random numbers
(--projector random) and one that is never refreshed (--no-refresh).

Every row of results.json says what it took (stories, traces, sampled_tokens, optimiser_steps) and how the
same model does on train_stories it has learned from (train_accuracy): memorising shows as a gap. The main row
is sampled as the paper samples, the indented one below it at temperature 1.

The size of what is fed stands in each row (z_size: in sizes of an embedding). Coconut's state is fed as it is,
as in its paper: 7 times an embedding in the tiny world, 4 times in gemma-3-270m, 15 times in SmolLM2-135M, 360
times in Qwen2.5-Coder-0.5B, where the words around it are hardly read before it is trained. What Soft Thinking,
MoI and CoLaR feed is about as long as an embedding by construction.

Left out, and why: (1) special tokens around a block: the tiny world has no room for new words, and the
answer's first word (of task.ANSWER) ends a block as well. (2) Each method's own sampling: all are compared
under the same two. (3) LoRA: the base is trained whole, as the paper's author did.

    python results/baselines.py --method soft-thinking    # training-free: half a minute on a core
    python results/baselines.py --method coconut          # SFT on own traces
    python results/baselines.py --method colar            # SFT on own traces, then GRPO
    python results/baselines.py --method answer           # SFT on gold answers; --stories 100: on fewer
"""
import itertools
import json
import math
import os
import random
import sys
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
from tqdm import tqdm

import data
import train_rl
from eval import PAPER, TRAINED, evaluate
from litereason import LATENT, Rollout, UserError, generate, group_advantages, load, logprobs, policy_loss, projector_loss, states, word_embeddings
from train_projector import SENTENCE, split_answer

from lib import checkpoint, display, memory, run, scoring
# The papers' settings (Coconut and CoLaR as LiteReason's author ran them on plot holes; the answer's are
# ours), and what a small model trained from scratch needs. stories: None is all there are;
# traces: sampled per story.
RELEASED = {
    "stories": None, "traces": 5, "batch": 128, "max_new_tokens": checkpoint.SLOTS_RELEASED,
    "answer_lr": 5e-5, "answer_steps": 200,
    "coconut_lr": 5e-5, "stages": 5, "per_stage": 2, "last_stage": 2,  # epochs per stage, and of the last
    "colar_lr": 1e-4, "colar_epochs": 50, "most_latents": 64,
    "rl_lr": 5e-7, "rl_steps": 180, "rl_prompts": 48}
# Chosen on 200 val stories of plot holes in the tiny world before this one (at commit 7a68d78: 16 events, 8
# look-ups), seed 0, one run each, sampled as the paper samples, on all 480 train stories (2,390 traces). Val
# accuracy, in brackets on 200 train stories:
#
#   answer     lr 1e-3 at a constant rate 0.575 (0.590) at best of 300 steps; with warm-up 0.970 after 96 (run
#              no further); lr 3e-4 with warm-up 0.915 after 48 steps, 1.000 (1.000) from 72 on
#   coconut    25 steps in every stage: lr 3e-4 at a constant rate 0.540 (0.635), lr 1e-3 with warm-up 0.560
#              (0.575); lr 3e-4 with warm-up and 200 steps in the last stage 0.995 (1.000)
#   colar, SFT for r = 1, 2, 5: lr 1e-3 at a constant rate, 150 steps 0.500, 0.500, 0.500 (0.500 each: every
#              answer is the same, GRPO has no gradient); lr 1e-3 with warm-up, 74 steps 0.480, 0.525, 0.500
#              (0.545, 0.505, 0.440; all of 4 GRPO steps had a gradient); lr 3e-4 with warm-up, 200 steps
#              0.490, 0.485, 0.500 (0.500, 0.495, 0.535): a coin everywhere. The last is taken, as its
#              answers differ and its rate is the other methods'
#
# CoLaR's GRPO has the steps, prompts and learning rate of train_rl.py.
SMALL = {
    "stories": None, "traces": 1, "batch": 32, "max_new_tokens": checkpoint.SLOTS_SMALL,
    "answer_lr": 3e-4, "answer_steps": 240,
    "coconut_lr": 3e-4, "stages": 8, "per_stage": 1 / 3, "last_stage": 8 / 3,
    "colar_lr": 3e-4, "colar_epochs": 8 / 3, "most_latents": 150,
    "rl_lr": train_rl.SMALL["lr"], "rl_steps": train_rl.SMALL["steps"],
    "rl_prompts": train_rl.SMALL["prompts"]}
GROUP = 16  # rollouts per prompt in CoLaR's GRPO
RATES = (1, 2, 5)  # reasoning tokens per latent with which CoLaR is tested after its SFT
CHECKED = 200  # val stories by which something is chosen, and train stories evaluated beside the test
# What a row's name ends in: how its answers are sampled.
SAMPLINGS = {"": PAPER, ", temperature 1": TRAINED}


# ============================================================ Soft Thinking (arXiv 2505.15778)
def predicted(model, h):
    """log p of the next word for states h (n, D) -> (n, V), in fp32 or better."""
    logits = model.lm_head(h)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = logits.log_softmax(-1)
    return logp.clamp(min=torch.finfo(logp.dtype).min)  # no -inf: p log p of what is no word is 0


def soft_thinking(model, end, top_k=10, certain=0.01, patience=256, temperature=1.0):
    """Thinking in mixtures of words, without training -> arguments for `generate`.

    The paper: while the model thinks, the next input is sum_i p_i E[i] over the top_k likeliest words. It
    stops thinking when the likeliest word is </think>, or when the entropy (nats) has been below `certain`
    for `patience` steps in a row ("cold stop"). Ours: the word `end` stands for </think>, which the models
    here never write; in either case `end` is the word that follows the block."""
    embed = model.get_input_embeddings()
    certain_steps = torch.zeros(0, dtype=torch.long, device=model.device)  # in a row, of each rollout so far

    def step(h, *_):
        n_words = min(top_k, model.config.vocab_size)
        logp, word = predicted(model, h).topk(n_words)  # (n, top_k) each
        p = (logp / temperature).softmax(-1)
        return (p.to(h.dtype)[..., None] * embed(word)).sum(1)  # (n, D)

    def leave(h, drawn, row, taken):
        nonlocal certain_steps
        logp = predicted(model, h)  # (n, V)
        entropy = -(logp.exp() * logp).sum(-1)  # (n,)

        # Rollouts may begin late, so the list of counts grows.
        lacking = max(0, int(row.max()) + 1 - len(certain_steps))
        certain_steps = torch.cat([certain_steps, certain_steps.new_zeros(lacking)])
        before = certain_steps[row]  # (n,)
        before = torch.where(taken > 0, before, 0)  # taken = 0: a rollout begins, maybe of another call
        certain_steps[row] = torch.where(entropy < certain, before + 1, 0)

        is_likeliest = logp.argmax(-1) == end  # (n,)
        is_certain = certain_steps[row] >= patience  # (n,)
        return torch.where(is_likeliest | is_certain, end, LATENT)

    step.flops = 2 * model.lm_head.weight.numel()  # for eval.flops
    return {"latent": step, "leave": leave}


# ============================================================ Mixture of Inputs (arXiv 2505.14827)
def mixture_of_inputs(model, beta=1.0):
    """Every sampled word is fed mixed with its rivals, without training -> arguments for `generate`.

    The paper: a word is sampled as usual from p, but what is fed is the mean embedding under the posterior
    of a Dirichlet prior that follows p: w_i = (H p_i + (beta + 1 - H) [i is the word]) / (beta + 1), with H
    the entropy of p, 0 to 1. Ours is the same."""
    embed = model.get_input_embeddings()
    V = embed.num_embeddings
    n_words = V - len(model.lm_head.no_words)
    with torch.no_grad():
        all_words = embed(torch.arange(V, device=model.device))  # (V, D), scaled where the model scales
    if model.bf16:  # once, not in every step
        all_words = all_words.to(torch.bfloat16)

    def feed(h, token):
        logp = predicted(model, h)  # (n, V)
        p = logp.exp()
        entropy = -(p * logp).sum(-1, keepdim=True)  # (n, 1)
        H = entropy / math.log(n_words)  # 1 if all words are equally likely
        expected = p.to(all_words.dtype) @ all_words  # (n, D)
        mixed = H.to(h.dtype) * expected.to(h.dtype) + (beta + 1 - H).to(h.dtype) * embed(token)
        return mixed / (beta + 1)

    feed.flops = 2 * embed.weight.numel()  # beside the LM head, which is counted for every word
    return {"feed": feed}


# ============================================================ what the trained methods share
def own_traces(model, tokenizer, task, examples, k, max_new_tokens, seed):
    """Stage 1 of LiteReason with the plain prompt: k samples per prompt, those with a reward are kept.

    -> ([(prompt as text, reasoning, answer)], tokens sampled). UserError if no sample earned a reward."""
    marker = data.opening_of(task)
    generator = torch.Generator().manual_seed(seed)
    traces = []
    spent = 0
    for i in tqdm(range(0, len(examples), 32), desc="traces", leave=False):
        some = examples[i : i + 32]
        prompts = [task.prompt(example, False) for example in some]
        rollouts = generate(model, tokenizer, prompts, k, max_new_tokens, latent="none", generator=generator,
                            **PAPER)
        spent += sum(len(rollout.slots) for rollout in rollouts)
        for rollout, reward in zip(rollouts, rewards_of(task, some, rollouts)):
            reasoning, answer = split_answer(rollout.text, marker)
            if reward > 0 and rollout.finished and reasoning.strip():
                traces.append((prompts[rollout.prompt], reasoning, answer))
    if not traces:
        raise UserError("no sampled answer earned a reward: there is nothing to train on (give more "
                        "--stories, or a stronger --model)")
    print(f"kept {len(traces)} of {k * len(examples)} traces (reward > 0), {spent:,} tokens sampled",
          flush=True)
    return traces, spent


def answers_first_word(tokenizer, task):
    return checkpoint.encode_text(tokenizer, data.opening_of(task))[0]


def rewards_of(task, examples, rollouts, step=0):
    """The rewards of rollouts of these examples' prompts -> list of floats. step: of the training."""
    asked = [examples[rollout.prompt] for rollout in rollouts]
    texts = [rollout.text for rollout in rollouts]
    return data.score(task, asked, texts, step)


def epochs(rows, batch, seed):
    """Whole batches of rows, shuffled again for each epoch, without end."""
    rng = random.Random(seed)
    n = len(rows)
    while True:
        order = rng.sample(range(n), n)
        for start in range(0, max(1, n - batch + 1), batch):
            yield [rows[i] for i in order[start : start + batch]]


def sft_rate(highest, step, steps):
    """The learning rate of an SFT's step: up for 30 steps or the first fifth, all the way down to 5 %."""
    warm_up = min(30, steps / 5)
    return highest * min(1, (step + 1) / warm_up, 0.05 + 0.95 * (steps - step) / steps)


def descend(optimizer, lr=None):
    """One step with the gradient clipped at 1, by default at the optimiser's own rate; a gradient that is not
    finite is dropped."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if torch.nn.utils.clip_grad_norm_(parameters, 1.0).isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ============================================================ Coconut (arXiv 2412.06769)
def feed_back(h, *_):
    """Coconut's latent step: the next input is the last hidden state."""
    return h


feed_back.flops = 0


def train_coconut(model, tokenizer, traces, cfg, budget, seed):
    """Trains the base to think in its own hidden states, cfg["stages"] of them -> optimiser steps.

    The paper: in stage s the first s reasoning sentences of each trace are deleted and latents put at the
    answer's beginning; after the last stage all reasoning is deleted. Cross-entropy on the text that is
    left, back-propagated through the latents; a new optimiser per stage.
    Ours: one latent per sentence (the paper's maths has two, the author's plot-hole runs one), and the last
    stage, which has most epochs in the paper, has 2 of 14 as in the author's runs (a small model's: under
    half). budget: positions per forward pass."""
    taken = 0
    for stage in tqdm(range(cfg["stages"] + 2), desc="coconut, stages", leave=False):
        rows = coconut_rows(model, tokenizer, traces, stage, cfg["stages"])
        optimizer = torch.optim.AdamW(memory.base_parameters(model), lr=cfg["coconut_lr"], weight_decay=0.01)
        batches = epochs(rows, cfg["batch"], f"{seed} {stage}")
        is_last = stage > cfg["stages"]
        n_epochs = cfg["last_stage"] if is_last else cfg["per_stage"]
        steps = max(1, int(n_epochs * len(rows) / cfg["batch"]))
        for step, batch in enumerate(itertools.islice(batches, steps)):
            add_text_gradients(model, batch, budget)
            descend(optimizer, sft_rate(cfg["coconut_lr"], step, steps))
        taken += steps
    return taken


def coconut_rows(model, tokenizer, traces, stage, last_stage):
    """The traces as a stage trains on them: latents, the sentences that are left, the answer, its end."""
    end = checkpoint.end_of_answer(model, tokenizer)
    no_latents = torch.zeros(0, model.config.hidden_size)  # they are made in the forward pass
    rows = []
    for prompt, reasoning, answer in traces:
        sentences = SENTENCE.findall(reasoning)
        sentences = [sentence for sentence in sentences if sentence.strip()]
        left = sentences[stage:] if stage <= last_stage else []
        text = ("".join(left) + " " + answer).strip()
        slots = [LATENT] * min(stage, last_stage) + checkpoint.encode_text(tokenizer, text) + [end]
        rows.append(Rollout(checkpoint.encode_prompt(model, tokenizer, prompt), slots, no_latents))
    return rows


def add_text_gradients(model, batch, budget):
    """Cross-entropy on the text of the rows, mean over the batch's tokens; all begin with equally many of
    Coconut's latents."""
    tokens = sum(row.n_tokens for row in batch)
    for part in scoring.pack(batch, budget, unrolled=batch[0].n_latents > 0):
        some = [batch[i] for i in part]
        if some[0].n_latents:
            loss, _ = projector_loss(model, some, feed_back)
        else:
            logp, _ = logprobs(model, some)  # (b, S)
            loss = -logp.sum()
        (loss / tokens).backward()


# ============================================================ the answer at once
def train_answer(model, rows, cfg, accuracy, budget, seed):
    """SFT on rows of answer_rows -> optimiser steps.

    Ten times on the way accuracy() is asked, on val stories; the best weights of these are kept."""
    steps = cfg["answer_steps"]
    optimizer = torch.optim.AdamW(memory.base_parameters(model), lr=cfg["answer_lr"], weight_decay=0.01)
    every = max(1, steps // 10)
    best = -math.inf
    kept = model.state_dict()  # with no steps these
    batches = epochs(rows, cfg["batch"], seed)
    for step, batch in enumerate(itertools.islice(batches, steps)):
        add_text_gradients(model, batch, budget)
        descend(optimizer, sft_rate(cfg["answer_lr"], step, steps))
        if (step + 1) % every == 0:
            val = accuracy()
            print(f"answer: after {step + 1} steps {val:.3f} on val", flush=True)
            if val > best:
                best = val
                kept = {name: weights.clone() for name, weights in model.state_dict().items()}
    model.load_state_dict(kept)
    return steps


def answer_rows(model, tokenizer, task, examples):
    """The gold answers of the examples, from what follows the opening, in which nothing can be learned."""
    end = checkpoint.end_of_answer(model, tokenizer)
    opening = data.opening_of(task)
    no_latents = torch.zeros(0, model.config.hidden_size)
    rows = []
    for example in examples:
        prompt = checkpoint.encode_prompt(model, tokenizer, task.prompt(example, False), opening)
        rest = task.answer(example).removeprefix(opening)
        rows.append(Rollout(prompt, checkpoint.encode_text(tokenizer, rest) + [end], no_latents))
    return rows


# ============================================================ CoLaR (arXiv 2505.16552): its latents
class LatentHead(torch.nn.Module):
    """The last hidden state h (n, D) -> mean and deviation of the next latent, (n, D) each.

    They are in units of `spread`, the standard deviation of the model's embeddings."""

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
    """(n, D) standard normal numbers that depend on a row's u and k (n,) only, hence not on its batch.

    u: 0 to 1, k: whole numbers. A hash (splitmix64) of (u, k, place) gives two uniform numbers each,
    Box-Muller a normal one."""
    seed = (u * 2**40).long() * 65_537 + k  # (n,)
    place = torch.arange(2 * D, device=u.device)
    x = seed[:, None] * 1_000_003 + place  # (n, 2 D)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        mask = (1 << 64 - shift) - 1  # makes >> a shift of unsigned numbers
        x = x ^ (x >> shift & mask)
        x = x * factor
    bits = x >> 11 & (1 << 53) - 1
    uniform = (bits.double() + 0.5).div(2**53)
    a, b = uniform.split(D, 1)
    radius = (-2 * a.log()).sqrt()
    return radius * (2 * math.pi * b).cos()


def colar(model, head, end):
    """How CoLaR decodes: latents until the LM head draws `end`, the answer's first word.

    -> arguments for `generate`."""

    def step(h, u, k):
        with torch.autocast(h.device.type, enabled=False):  # in the head's own precision, as in training
            mean, std = head(h)
        z = mean + std * normal_numbers(u, k, h.shape[1]).to(mean)
        return (z * head.spread).to(h.dtype)

    def leave(h, drawn, row, taken):
        return torch.where((drawn == end) & (taken > 0), drawn, LATENT)

    weights = sum(p.numel() for p in head.parameters())
    step.flops = 2 * (model.lm_head.weight.numel() + weights)
    return {"latent": step, "leave": leave}


# ============================================================ CoLaR: supervised
def say_rate(prompt, r):
    """The prompt that says r. The released one says "(Thinking speed: r)"; the tiny world has digits only."""
    return f"{prompt} {r}"


def told(task, r):
    """The task with r said in its prompts."""

    def prompt(example, latent):
        return say_rate(task.prompt(example, latent), r)

    return types.SimpleNamespace(**{**vars(task), "prompt": prompt})


def sft_colar(model, tokenizer, head, traces, cfg, budget, seed):
    """Trains base and head to reason in latents that stand for several tokens each -> optimiser steps.

    The paper: each r reasoning tokens become one latent, the sum of their embeddings / sqrt(r); r is drawn
    from 1 to 5 and said in the prompt. At a latent's place the LM head learns one of its tokens, drawn by
    chance, and the latent head the latent itself. Ours: latents are constants for the embeddings. budget:
    positions per forward pass."""
    rows = colar_rows(model, tokenizer, traces)
    parameters = memory.base_parameters(model) + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg["colar_lr"], weight_decay=0.01)
    batches = epochs(rows, cfg["batch"], seed)
    rng = random.Random(seed)
    costs = []  # nats of the latest words of answers
    steps = max(1, int(cfg["colar_epochs"] * len(rows) / cfg["batch"]))
    for step in tqdm(range(steps), desc="colar, SFT", leave=False):
        batch = []
        targets = []  # what the LM head learns, for each slot of a row
        for prompt, reasoning, answer in next(batches):
            r = rng.randint(1, max(RATES))
            thought = [reasoning[at : at + r] for at in range(0, len(reasoning), r)]
            slots = [LATENT] * len(thought) + answer
            ids = checkpoint.encode_prompt(model, tokenizer, say_rate(prompt, r))
            batch.append(Rollout(ids, slots, compress(model, thought)))
            drawn = [rng.choice(tokens) for tokens in thought]
            targets.append(drawn + answer)
        costs += add_sft_gradients(model, head, batch, targets, budget)
        costs = costs[-2000:]
        descend(optimizer, sft_rate(cfg["colar_lr"], step, steps))
    mean = sum(costs) / len(costs)
    print(f"colar, SFT: after the latents of its own trace a word of the answer costs {mean:.4f} nats at the "
          f"end", flush=True)
    return steps


def colar_rows(model, tokenizer, traces):
    """The traces as [(prompt as text, the tokens of the reasoning, those of the answer and its end)]."""
    end = checkpoint.end_of_answer(model, tokenizer)
    rows = []
    for prompt, reasoning, answer in traces:
        thought = checkpoint.encode_text(tokenizer, reasoning.strip())
        rows.append((prompt, thought, checkpoint.encode_text(tokenizer, answer.strip()) + [end]))
    return rows


@torch.no_grad()
def compress(model, thought):
    """A latent for each list of tokens: the sum of their embeddings / sqrt(their number) -> (latents, D)."""
    embed = model.get_input_embeddings()
    n = len(thought)
    tokens = torch.tensor(list(itertools.chain(*thought)), device=model.device)  # (tokens,)
    sizes = torch.tensor([len(own) for own in thought], device=model.device)  # (latents,)
    owner = torch.arange(n, device=model.device)
    owner = owner.repeat_interleave(sizes)  # (tokens,) the latent of each
    sums = torch.zeros(n, embed.embedding_dim, device=model.device)
    sums = sums.index_add(0, owner, embed(tokens).float())
    return sums / sizes.sqrt()[:, None]


def add_sft_gradients(model, head, batch, targets, budget):
    """Cross-entropy of the LM head at all slots, mean over the batch, and the latent head's squared error,
    mean over its latents -> nats of each word of the answers.

    The squared error is that of a draw: E (mu + sigma e - z)^2 = (mu - z)^2 + sigma^2."""
    n_slots = sum(map(len, targets))
    n_latents = sum(row.n_latents for row in batch)
    costs = []
    for part in scoring.pack(batch, budget):
        some = [batch[i] for i in part]
        h, slots, valid = states(model, some)  # (b, S, D), (b, S), (b, S)

        # The latent head, at the latents.
        is_latent = valid & (slots == LATENT)
        mean, std = head(h[is_latent])  # (latents, D) each
        z = torch.cat([row.latents for row in some])
        z = z.to(mean) / head.spread
        squared_error = (mean - z).square() + std.square()
        squared_error = squared_error.mean(-1)  # (latents,)

        # The LM head, at all slots, row by row.
        words = list(itertools.chain(*[targets[i] for i in part]))
        words = torch.tensor(words, device=model.device)  # (slots,)
        logp = scoring.token_logprobs(model, h[valid], words)
        loss = -logp.sum() / n_slots + squared_error.sum() / n_latents
        loss.backward()
        is_answer = slots[valid] != LATENT
        costs += (-logp[is_answer]).tolist()
    return costs


# ============================================================ CoLaR: GRPO
def rl_colar(model, tokenizer, task, head, examples, cfg, decoding, budget, seed, log):
    """GRPO in which latents are actions: their log-densities count beside the log-probs of the answer.

    decoding: arguments for `generate`; budget: positions per forward pass; log: a file that gets a line of
    JSON per step. -> (tokens sampled, steps in which every group earned the same)."""
    prompts = [checkpoint.encode_prompt(model, tokenizer, task.prompt(example, False)) for example in examples]
    parameters = memory.base_parameters(model) + list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg["rl_lr"], betas=(0.9, 0.95), weight_decay=0.0)
    spent = 0
    without_gradient = 0
    for step in range(cfg["rl_steps"]):
        start = time.time()
        epoch, batch_in_epoch = divmod(step, max(1, len(examples) // cfg["rl_prompts"]))
        index = train_rl.prompts_of_batch(seed, len(examples), cfg["rl_prompts"], epoch, batch_in_epoch)

        # Sample a group of rollouts for each prompt.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        some = [prompts[i] for i in index]
        rollouts = generate(model, tokenizer, some, GROUP, generator=generator, **decoding)
        spent += sum(len(rollout.slots) for rollout in rollouts)

        # Reward them, and compare each with the other rollouts of its prompt.
        rewards = rewards_of(task, [examples[i] for i in index], rollouts, step + 1)
        rewards = torch.tensor(rewards)  # (B,)
        groups = rewards.view(len(index), GROUP)
        advantages = group_advantages(groups).flatten()  # (B,)

        # One update per batch.
        add_policy_gradients(model, head, rollouts, advantages, budget)
        descend(optimizer)
        share = tell_step(log, step, cfg["rl_steps"], epoch, rollouts, groups, start)
        without_gradient += share == 1
    print(f"colar, GRPO: in {without_gradient} of {cfg['rl_steps']} steps all groups had zero variance and "
          f"no gradient", flush=True)
    return spent, without_gradient


def add_policy_gradients(model, head, rollouts, advantages, budget):
    """CoLaR adds two policy losses, over the latents and over the words of a rollout, each a mean of its own.

    Rollouts without an advantage (B,) have no gradient and are not run; they count in the means."""
    batch = [b for b in range(len(rollouts)) if advantages[b] != 0]
    for part in scoring.pack([rollouts[b] for b in batch], budget):
        micro = [batch[i] for i in part]
        some = [rollouts[b] for b in micro]
        h, slots, valid = states(model, some)  # (b, S, D), (b, S), (b, S)
        is_latent = valid & (slots == LATENT)
        is_word = valid & (slots != LATENT)

        # Log-probs: of latents under the head, of words under the LM head.
        z = torch.cat([rollout.latents for rollout in some])
        z = z.to(h.device) / head.spread
        of_latents = head.logprob(h[is_latent], z)
        of_words = scoring.token_logprobs(model, h[is_word], slots[is_word])
        logp = torch.zeros(slots.shape, device=h.device)  # (b, S)
        logp = logp.masked_scatter(is_latent, of_latents.float())
        logp = logp.masked_scatter(is_word, of_words.float())

        # With one update per batch the old log-probs are these: the ratio is 1.
        own_advantages = advantages[micro].to(logp)  # (b,)
        loss = 0
        for scored in (is_latent, is_word):
            own_loss, _ = policy_loss(logp, logp.detach(), own_advantages, scored, len(rollouts))
            loss = loss + own_loss
        loss.backward()


def tell_step(log, step, n_steps, epoch, rollouts, groups, start):
    """The step's figures, to the log (as train_rl.py writes them) and in one line, with report's warnings.

    groups: the rewards (P, G). -> the share of groups with nothing to learn from."""
    n = len(rollouts)
    text = sum(rollout.n_tokens for rollout in rollouts) / n
    latents = sum(rollout.n_latents for rollout in rollouts) / n
    reward = float(groups.mean())
    zero_variance = float((groups.amax(1) == groups.amin(1)).float().mean())
    seconds = time.time() - start
    metrics = {
        "step": step + 1,
        "epoch": epoch,
        "reward": reward,
        "accuracy": reward,
        "text_tokens": text,
        "latent_steps": latents,
        "tags": 1.0,  # as in train_rl.py's file, for plots.training: the block with which all answers begin
        "tag_share": 1.0,
        "zero_variance": zero_variance,
        "seconds": {"all": round(seconds, 3)},
    }
    log.write(json.dumps(metrics) + "\n")
    log.flush()
    print(f"step {step + 1:4d}/{n_steps} | reward {reward:6.3f} | text {text:6.1f} | latent {latents:5.1f} | "
          f"{seconds:5.1f}s", flush=True)
    display.warn(metrics, False, len(groups), [rollout.text for rollout in rollouts])
    return zero_variance


# ============================================================ the script
def by_size(name):
    return run.default_text(SMALL[name], RELEASED[name])


def parse_arguments():
    parser = run.parser(__doc__)
    group = parser.add_argument_group("what")
    group.add_argument("--method", required=True, choices=list(METHODS),
                       help="see above (required, so no default)")
    group.add_argument("--model", default="tiny",
                       help="the base: tiny, a directory, or a hub name such as Qwen2.5-1.5B (default tiny)")
    data.task_flags(group)
    run.out_flags(group, "settings, the table and what was trained", "out/MODEL-TASK-METHOD")
    group.add_argument("--n", type=int, default=500, help="test examples (default 500)")
    group.add_argument("--seed", type=int, default=0, help="of all random draws (default 0)")
    group = parser.add_argument_group("training (a small model has less than 50 M parameters)")
    group.add_argument("--stories", type=int, metavar="N", default=None, help="train stories (default all)")
    group.add_argument("--traces", type=int, metavar="N", default=None,
                       help=f"coconut and colar: traces sampled per train story ({by_size('traces')})")
    group.add_argument("--lr", type=float, default=None,
                       help=f"learning rate of the SFT (answer: {by_size('answer_lr')}; coconut: "
                            f"{by_size('coconut_lr')}; colar: {by_size('colar_lr')})")
    group.add_argument("--rl-lr", type=float, default=None,
                       help=f"colar: learning rate of GRPO ({by_size('rl_lr')})")
    group.add_argument("--steps", type=int, metavar="N", default=None,
                       help=f"colar: GRPO steps, 0 is SFT only ({by_size('rl_steps')}); answer: SFT steps "
                            f"({by_size('answer_steps')})")
    group.add_argument("--epochs", type=float, default=None,
                       help=f"colar: of the SFT ({by_size('colar_epochs')}); coconut: of each stage but the "
                       f"last ({by_size('per_stage')})")
    group.add_argument("--stages", type=int, metavar="N", default=None,
                       help=f"coconut: latents of its last stage ({by_size('stages')})")
    group.add_argument("--r", type=int, default=None, choices=RATES,
                       help="colar: reasoning tokens per latent in GRPO and in the test (default: all three "
                       "in the test of the SFT, then the best on val)")
    group = parser.add_argument_group("decoding")
    group.add_argument("--max-new-tokens", type=int, metavar="N", default=None,
                       help=f"slots per answer, latents included ({by_size('max_new_tokens')})")
    group.add_argument("--top", type=int, metavar="N", default=10,
                       help="soft-thinking: words in a mixture (default 10)")
    group.add_argument("--patience", type=int, metavar="N", default=256,
                       help="soft-thinking: certain steps in a row that stop it (default 256)")
    group.add_argument("--beta", type=float, default=1.0,
                       help="moi: weight of the sampled word; its paper: 0.5 to 2 (default 1)")
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--tokens-per-forward", type=int, metavar="N", default=12_000,
                       help="positions per forward pass; changes no result (default 12000)")
    run.device_flags(group)
    return parser.parse_args()


def settings(args, model):
    """RELEASED or SMALL, with what the command line says instead."""
    cfg = dict(SMALL if checkpoint.is_small(model) else RELEASED)
    said = {
        "stories": args.stories,
        "traces": args.traces,
        "max_new_tokens": args.max_new_tokens,
        "stages": args.stages,
        f"{args.method}_lr": args.lr,
        "rl_lr": args.rl_lr,
        "per_stage" if args.method == "coconut" else "colar_epochs": args.epochs,
        "answer_steps" if args.method == "answer" else "rl_steps": args.steps,
    }
    cfg.update({name: value for name, value in said.items() if value is not None})
    return cfg


def new_head(model, seed):
    """CoLaR's latent head, from random numbers."""
    torch.manual_seed(seed)
    spread = float(word_embeddings(model).float().std())
    head = LatentHead(model.config.hidden_size, spread)
    return head.to(model.device)


def best_rate(rates, accuracy):
    """The r with the best accuracy(r), on val; of equals the largest, which has the fewest latents."""
    found = {}
    for r in rates:
        found[r] = accuracy(r)
        print(f"colar, SFT: r = {r}: {found[r]:.3f} on val", flush=True)
    return max(rates, key=lambda r: (found[r], r))


# What each method does before its rows of the table, each of which it yields as (name, task, decoding).
# decoding: arguments of evaluate, or a function of the temperature that makes them. on_val(task, decoding):
# accuracy. took: what it has learned from so far, filled in here.
def run_soft_thinking(args, cfg, model, tokenizer, task, examples, on_val, took):
    end = answers_first_word(tokenizer, task)

    def decoding(temperature):
        method = soft_thinking(model, end, args.top, patience=args.patience, temperature=temperature)
        return {**method, "start": cfg["max_new_tokens"]}

    yield "soft-thinking", task, decoding


def run_moi(args, cfg, model, tokenizer, task, examples, on_val, took):
    yield "moi", task, mixture_of_inputs(model, args.beta)


def run_answer(args, cfg, model, tokenizer, task, examples, on_val, took):
    if not hasattr(task, "answer"):
        raise UserError(f"--method answer trains on gold answers, and {args.task} has none: give the task a "
                        "function answer, or choose another --method")
    display.check_answers(task, examples[:8])
    decoding = {"at_once": True, "latent": "none"}
    rows = answer_rows(model, tokenizer, task, examples)
    took["optimiser_steps"] = train_answer(model, rows, cfg, lambda: on_val(task, decoding),
                                           args.tokens_per_forward, args.seed)
    yield "answer", task, decoding


def traces_of(args, cfg, model, tokenizer, task, examples, took):
    """own_traces, counted in took."""
    traces, took["sampled_tokens"] = own_traces(model, tokenizer, task, examples, cfg["traces"],
                                                cfg["max_new_tokens"], args.seed)
    took["traces"] = len(traces)
    return traces


def run_coconut(args, cfg, model, tokenizer, task, examples, on_val, took):
    traces = traces_of(args, cfg, model, tokenizer, task, examples, took)
    took["optimiser_steps"] = train_coconut(model, tokenizer, traces, cfg, args.tokens_per_forward, args.seed)
    decoding = {"latent": feed_back, "start": cfg["stages"]}
    print(f"coconut: {on_val(task, decoding):.3f} on val", flush=True)
    yield "coconut", task, decoding


def run_colar(args, cfg, model, tokenizer, task, examples, on_val, took):
    traces = traces_of(args, cfg, model, tokenizer, task, examples, took)
    head = new_head(model, args.seed)
    budget = args.tokens_per_forward
    took["optimiser_steps"] = sft_colar(model, tokenizer, head, traces, cfg, budget, args.seed)
    decoding = {**colar(model, head, answers_first_word(tokenizer, task)), "start": cfg["most_latents"]}
    rates = [args.r] if args.r else RATES
    took["r"] = best_rate(rates, lambda r: on_val(told(task, r), decoding))
    for r in rates:
        yield f"colar, r = {r}, SFT", told(task, r), decoding
    if cfg["rl_steps"]:
        in_rl = {**decoding, "max_new_tokens": cfg["max_new_tokens"], "tag": 0}
        task = told(task, took["r"])
        with open(os.path.join(args.out, "metrics.jsonl"), "w") as log:
            sampled, took["steps_without_gradient"] = rl_colar(model, tokenizer, task, head, examples, cfg,
                                                               in_rl, budget, args.seed, log)
        took["sampled_tokens"] += sampled
        took["optimiser_steps"] += cfg["rl_steps"]
        yield "colar", task, decoding


METHODS = {"soft-thinking": run_soft_thinking, "moi": run_moi, "coconut": run_coconut, "colar": run_colar,
           "answer": run_answer}


def main():
    args = parse_arguments()
    args.task, task = data.choose_task(args.task, args.model, args.reward, args.scorer)
    args.out = args.out or run.default_out(args.model, args.task, args.method)
    args.resume = None  # a baseline cannot be resumed
    run.check_arguments(args)
    held = run.lock(args.out)  # noqa: F841, until the process ends
    run.check_what_is_there(args)
    examples = task.examples("train")
    if (args.stories or 1) > len(examples):
        raise UserError(f"--stories is {args.stories}; {args.task} has only {len(examples)} train stories")
    vals = task.examples("val")[:CHECKED]
    tests = task.examples("test")[: args.n]
    model, tokenizer = load(args.model, args.device)
    run.use_graphs(model, args.graphs)
    cfg = settings(args, model)
    examples = examples[: cfg["stories"]]
    data.start_task(task, args.model, args.reward, args.scorer, args.seed, args.device)
    run.delete_earlier_run(args.out)
    run.write_json(os.path.join(args.out, "config.json"), {
        "script": "results/baselines.py",
        "base": run.base_of(args.model),
        **vars(args),
        "settings": cfg,
        "prompts": cfg["rl_prompts"],  # this and the next as in train_rl.py, for results/reproduce.py
        "group": GROUP,
    })
    start = last_row_at = time.time()
    seconds = 0.0  # of training, without the rows' evaluations
    is_trained = args.method not in ("soft-thinking", "moi")
    took = {"stories": len(examples) * is_trained, "traces": 0, "sampled_tokens": 0, "optimiser_steps": 0}
    rows, on_train_stories = [], []

    def figures(asked, some, decoding, sampling, **more):
        """evaluate's result on some examples of the task `asked`."""
        if callable(decoding):
            decoding = decoding(sampling["temperature"])
        result, _ = evaluate(model, tokenizer, asked, some, latent_prompt=False, seed=args.seed,
                             max_new_tokens=cfg["max_new_tokens"],
                             tag=0, **sampling, **decoding, **more)  # tag=0: to these methods a tag is text
        return result

    def on_val(asked, decoding):
        return figures(asked, vals, decoding, PAPER)["accuracy"]

    method = METHODS[args.method](args, cfg, model, tokenizer, task, examples, on_val, took)
    for name, asked, decoding in method:
        seconds += time.time() - last_row_at
        for suffix, sampling in SAMPLINGS.items():
            label = f"  {name}{suffix}" if suffix else name
            on_train = figures(asked, examples[:CHECKED], decoding, sampling, progress=f"{label}, train")
            result = figures(asked, tests, decoding, sampling, progress=label, alone=8)
            # As in eval.py's results.
            of_row = {"model": label, "sampling": "trained" if suffix else "paper"}
            rows.append((label, {
                **of_row,
                "split": "test",
                **took,
                "training_seconds": seconds,
                "train_accuracy": on_train["accuracy"],
                "train_stories": on_train["n_examples"],
                **result}))
            if not suffix:
                on_train_stories.append({**of_row, "split": "train", **took, **on_train})
        last_row_at = time.time()

    if is_trained:
        checkpoint.save(model, tokenizer, os.path.join(args.out, "model"))
    results = [result for _, result in rows] + on_train_stories
    run.write_json(os.path.join(args.out, "results.json"), results)
    tell(args, task, rows, took, len(tests), time.time() - start)


def tell(args, task, rows, took, n_tests, seconds):
    """The table, and under it how each row does on train stories and what the method got."""
    print(display.table(rows, data.measure_of(task)) + "\n")
    for name, row in rows:
        print(f"{name}: {row['train_accuracy']:.3f} on {row['train_stories']} train stories")
    print(f"{args.method}: {took['stories']} stories, {took['traces']:,} traces, "
          f"{took['sampled_tokens']:,} tokens sampled, {took['optimiser_steps']:,} optimiser steps")
    print(f"\n{n_tests} test examples, seed {args.seed}, {seconds:.0f}s; numbers in {args.out}/results.json")


if __name__ == "__main__":
    run.run_script(main)
