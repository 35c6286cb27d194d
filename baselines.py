"""The other methods of the paper's table, each in its smallest honest form: same data, same loop, same counting of tokens.

    method          what is fed where no token is sampled     begins     ends                                   training
    soft-thinking   the mean embedding of the likeliest words  at once    the answer's first word is likeliest    none
    moi             (every token is fed mixed with its rivals) never                                              none
    coconut         the last hidden state itself               at once    after a fixed number                    SFT in stages
    colar           a draw from N(mu(h), sigma(h))             at once    the LM head draws the answer's word     SFT, then GRPO

All of them are `generate` of litereason.py with another latent step and another rule for where a block begins and ends (its arguments
latent, start, leave, feed). They get the plain prompt, no tags. The rest of the table is train_rl.py: RL without latents (--method grpo),
with a length penalty (--overlong-buffer), the tag without a projector (--method tag), pause tokens (--projector pause), a
projector from random numbers (--projector random) and one that is never refreshed (--no-refresh).

Left out, and why: (1) special tokens around a block: the tiny world has no room for new words, and the answer's first word (of
task.ANSWER) ends a block as well. (2) Each method's own sampling: all are compared at temperature 1, nothing cut, as the policy that RL
trains; --temperature changes it. (3) LoRA: the base is trained whole, as the paper's author did.

    python baselines.py --method soft-thinking --out out/soft-thinking      # training-free: 10 seconds on one core
    python baselines.py --method coconut --out out/coconut                  # SFT on own traces
    python baselines.py --method colar --out out/colar                      # SFT on own traces, then GRPO
"""
import argparse
import json
import math
import os
import random
import time

import torch
from tqdm import tqdm

from data import score, start_task, task_flags
from engine import pack, token_logprobs
from eval import evaluate
from litereason import LATENT, Rollout, UserError, generate, group_advantages, load, logprobs, policy_loss, projector_loss, states
from report import table
from runs import base_of, chat_parts, check_arguments, device_flags, encode_prompt, is_small, lock, run_script, save, write_json
from train_projector import SENTENCE, split_answer

# The papers' settings (Coconut and CoLaR as LiteReason's author ran them on plot holes), and what a small model trained from scratch wants.
RELEASED = {"prompts": None, "batch": 128, "coconut_lr": 5e-5, "stages": 5, "per_stage": 2, "colar_lr": 1e-4, "colar_epochs": 50, "rl_lr": 5e-7,
            "rl_steps": 180, "rl_prompts": 48, "max_new_tokens": 2048}
SMALL = {"prompts": 160, "batch": 32, "coconut_lr": 3e-4, "stages": 8, "per_stage": 2, "colar_lr": 1e-3, "colar_epochs": 12, "rl_lr": 1.5e-4,
         "rl_steps": 48, "rl_prompts": 16, "max_new_tokens": 160}


# ============================================================================ without training
def predicted(model, h):
    """log p of the next word for states h (n, D) -> (n, V), in fp32 or better."""
    logits = model.lm_head(h)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def soft_thinking(model, end, top_k=10, certain=0.01, patience=256, temperature=1.0):
    """Soft Thinking (arXiv 2505.15778): while it thinks, the next input is sum_i p_i E[i] over the top_k likeliest words. It stops thinking
    when the likeliest word is `end`, or when the entropy (nats) has been below `certain` for `patience` steps ("cold stop").

    Ours: `end` stands for </think>, which the models here never write; it is put down in either case."""
    table, calm = model.get_input_embeddings(), {}

    def step(h, *_):
        logp, word = predicted(model, h).topk(min(top_k, model.config.vocab_size))  # (n, top_k) each
        p = (logp / temperature).softmax(-1)
        return (p.to(h.dtype)[..., None] * table(word)).sum(1)  # (n, D)

    step.flops = 2 * model.lm_head.weight.numel()  # for eval.flops

    def leave(h, drawn, row, taken):
        logp = predicted(model, h)  # (n, V)
        sure = -(logp.exp() * logp).sum(-1) < certain  # (n,)
        steps = calm.get("steps", row[:0])  # sure steps in a row, of every rollout so far; rows may begin late, so it grows
        calm["steps"] = steps = torch.cat([steps, steps.new_zeros(max(0, int(row.max()) + 1 - len(steps)))])
        steps[row] = torch.where(sure, torch.where(taken > 0, steps[row], 0) + 1, 0)  # taken = 0: a rollout begins, maybe of another call
        return torch.where((logp.argmax(-1) == end) | (steps[row] >= patience), end, LATENT)

    return {"latent": step, "leave": leave}


def mixture_of_inputs(model, beta=1.0):
    """MoI (arXiv 2505.14827): a word is sampled as ever, but what is fed is the mean embedding under the posterior of a Dirichlet prior
    that follows the distribution p it was drawn from: w_i = (H p_i + (beta + 1 - H) [i is the word]) / (beta + 1), H in 0..1."""
    table = model.get_input_embeddings()

    def feed(h, token):
        logp = predicted(model, h)  # (n, V)
        p = logp.exp()
        H = -(p * logp).sum(-1, keepdim=True) / math.log(p.shape[-1])  # (n, 1) entropy, 1 if all words are alike
        every = table(torch.arange(p.shape[-1], device=h.device))  # (V, D)
        return (H.to(h.dtype) * (p.to(h.dtype) @ every) + (beta + 1 - H).to(h.dtype) * table(token)) / (beta + 1)

    feed.flops = 2 * table.weight.numel()  # beside the LM head, which is counted for every word
    return {"feed": feed}


# ============================================================================ what the trained ones share
def own_traces(model, tokenizer, task, examples, k, max_new_tokens, seed):
    """Stage 1 of the paper with the plain prompt: the base's own rewarded answers -> [(prompt ids, reasoning, answer)], tokens sampled."""
    traces, spent, generator = [], 0, torch.Generator().manual_seed(seed)
    for i in tqdm(range(0, len(examples), 32), desc="traces", leave=False):
        part = examples[i : i + 32]
        prompts = [encode_prompt(model, tokenizer, task.prompt(e, False)) for e in part]
        got = generate(model, tokenizer, prompts, k, max_new_tokens, temperature=0.7, top_p=0.8, top_k=20, latent="none", generator=generator)
        spent += sum(len(r.slots) for r in got)
        for r, reward in zip(got, score(task, [part[r.prompt] for r in got], [r.text for r in got])):
            reasoning, answer = split_answer(r.text, getattr(task, "ANSWER", "\\boxed{"))
            if reward > 0 and r.finished and reasoning.strip():
                traces.append((r.prompt_ids, reasoning, answer))
    if not traces:
        raise UserError("no sampled answer earned a reward: there is nothing to train on (give more --prompts, or a stronger --model)")
    print(f"kept {len(traces)} of {k * len(examples)} traces (reward > 0), {spent:,} tokens sampled", flush=True)
    return traces, spent


def epochs(rows, batch, seed):
    """Whole batches of rows, anew shuffled for each epoch, for ever."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for i in range(0, max(1, len(rows) - batch + 1), batch):
            yield [rows[j] for j in order[i : i + batch]]


def descend(optimizer):
    """One step with the gradient clipped at 1; a gradient that is not finite is dropped."""
    if torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0).isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def base_parameters(model):
    return [p for n, p in model.named_parameters() if not n.startswith("reasoning_projector.")]


# ============================================================================ Coconut (arXiv 2412.06769)
def feed_back(h, *_):
    """Coconut's latent step: the next input is the last hidden state."""
    return h


feed_back.flops = 0

def train_coconut(model, tokenizer, traces, cfg, budget, seed):
    """Stage s: the first s reasoning sentences of each trace are deleted and s latents put at the answer's beginning; after the last
    stage all reasoning goes. Cross-entropy on the text that is left, back-propagated through the latents; a fresh optimiser per stage.

    Ours: one latent per sentence (the paper's maths has two, the author's plot-hole runs one). -> the number of latents to begin with."""
    end = chat_parts(model, tokenizer)[2]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    none = torch.zeros(0, model.config.hidden_size)
    for stage in tqdm(range(cfg["stages"] + 2), desc="coconut, stages", leave=False):
        rows, latents = [], min(stage, cfg["stages"])
        for prompt, reasoning, answer in traces:
            sentences = [s for s in SENTENCE.findall(reasoning) if s.strip()]
            left = "" if stage > cfg["stages"] else "".join(sentences[stage:])
            rows.append(Rollout(prompt, [LATENT] * latents + encode((left + " " + answer).strip()) + [end], none))
        optimizer = torch.optim.AdamW(base_parameters(model), lr=cfg["coconut_lr"], weight_decay=0.01)
        batches = epochs(rows, cfg["batch"], f"{seed} {stage}")
        for _ in range(cfg["per_stage"] * max(1, len(rows) // cfg["batch"])):
            batch = next(batches)
            tokens = sum(r.n_tokens for r in batch)
            for part in pack(batch, budget):
                some = [batch[i] for i in part]
                loss = projector_loss(model, some, feed_back)[0] if latents else -logprobs(model, some)[0].sum()
                (loss / tokens).backward()
            descend(optimizer)
    return cfg["stages"]


# ============================================================================ CoLaR (arXiv 2505.16552)
class LatentHead(torch.nn.Module):
    """From the last hidden state h (n, D) the mean and the deviation, (n, D) each, of the next latent, in units of the embeddings' spread."""

    def __init__(self, D):
        super().__init__()
        linear = torch.nn.Linear
        self.trunk = torch.nn.Sequential(linear(D, D), torch.nn.GELU(), linear(D, D), torch.nn.LayerNorm(D))
        self.mean, self.log_std = linear(D, D), linear(D, D)

    def forward(self, h):
        h = self.trunk(h.to(self.mean.weight.dtype))
        return self.mean(h), self.log_std(h).exp()

    def logprob(self, h, z):
        """Of latents z (n, D), per dimension (CoLaR's average) -> (n,)."""
        mean, std = self(h)
        return torch.distributions.Normal(mean, std).log_prob(z.to(mean.dtype)).mean(-1)


def normal_numbers(u, k, D):
    """(n, D) standard normal numbers that depend on a row's u and k (n,) only, hence not on its batch: a hash (splitmix64) and Box-Muller."""
    x = ((u * 2**40).long() * 65_537 + k)[:, None] * 1_000_003 + torch.arange(2 * D, device=u.device)  # (n, 2 D)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    a, b = ((x >> 11 & (1 << 53) - 1).double() + 0.5).div(2**53).split(D, 1)
    return (-2 * a.log()).sqrt() * (2 * math.pi * b).cos()


def colar(model, head, spread, end):
    """How CoLaR decodes: latents from the first position on, until the LM head draws the answer's first word."""

    def step(h, u, k):
        mean, std = head(h)
        return ((mean + std * normal_numbers(u, k, h.shape[1]).to(mean)) * spread).to(h.dtype)

    step.flops = 2 * (model.lm_head.weight.numel() + sum(p.numel() for p in head.parameters()))
    return {"latent": step, "leave": lambda h, drawn, row, taken: torch.where((drawn == end) & (taken > 0), drawn, LATENT)}


def sft_colar(model, tokenizer, head, spread, traces, cfg, budget, seed, r=5):
    """Each r reasoning tokens become one latent, the sum of their embeddings / sqrt(r). At a latent's place the LM head learns a random one
    of its tokens, and the latent head the latent itself: the squared error of a draw, E (mu + sigma e - z)^2 = (mu - z)^2 + sigma^2.

    Ours: r is always 5 (the paper draws it from 1 to 5 and says it in the prompt), and latents are constants for the embeddings."""
    end, embed = chat_parts(model, tokenizer)[2], model.get_input_embeddings()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    rows = [(prompt, encode(reasoning.strip()), encode(answer.strip()) + [end]) for prompt, reasoning, answer in traces]
    optimizer = torch.optim.AdamW(base_parameters(model) + list(head.parameters()), lr=cfg["colar_lr"], weight_decay=0.01)
    batches, rng, said = epochs(rows, cfg["batch"], seed), random.Random(seed), []
    for _ in tqdm(range(cfg["colar_epochs"] * max(1, len(rows) // cfg["batch"])), desc="colar, SFT", leave=False):
        batch, members = [], []
        for prompt, thought, answer in next(batches):
            groups = [thought[i : i + r] for i in range(0, len(thought), r)]
            with torch.no_grad():
                flat, owner = torch.tensor(thought, device=model.device), torch.arange(len(thought), device=model.device) // r
                z = torch.zeros(len(groups), embed.embedding_dim, device=model.device).index_add(0, owner, embed(flat).float())  # (groups, D)
                z = z / torch.tensor([[len(g) ** 0.5] for g in groups], device=model.device)
            batch.append(Rollout(prompt, [LATENT] * len(groups) + answer, z))
            members.append([rng.choice(g) for g in groups] + answer)
        words, latents = sum(map(len, members)), sum(r.n_latents for r in batch)
        for part in pack(batch, budget):
            some = [batch[i] for i in part]
            h, slots, valid = states(model, some)  # (b, S, D), (b, S), (b, S)
            targets = torch.tensor([t for i in part for t in members[i]], device=model.device)  # of all valid slots, row by row
            mean, std = head(h[valid & (slots == LATENT)])
            gold = torch.cat([r.latents for r in some]).to(mean) / spread
            logp = token_logprobs(model, h[valid], targets)
            loss = -logp.sum() / words + ((mean - gold).square() + std.square()).mean(-1).sum() / latents
            loss.backward()
            said += (-logp[slots[valid] != LATENT]).tolist()  # the words of the answers
        descend(optimizer)
        said = said[-2000:]
    print(f"colar, SFT: after the latents of its own trace a word of the answer costs {sum(said) / len(said):.4f} nats at the end", flush=True)


def rl_colar(model, tokenizer, task, head, spread, examples, cfg, decode, budget, seed, log):
    """GRPO in which latents are actions: their Gaussian log-prob counts, beside the answer's. -> tokens sampled."""
    prompts = [encode_prompt(model, tokenizer, task.prompt(e, False)) for e in examples]
    optimizer = torch.optim.AdamW(base_parameters(model) + list(head.parameters()), lr=cfg["rl_lr"], betas=(0.9, 0.95), weight_decay=0.0)
    per_epoch, G, spent = max(1, len(examples) // cfg["rl_prompts"]), 16, 0
    for step in range(cfg["rl_steps"]):
        start, (epoch, at) = time.time(), divmod(step, per_epoch)
        order = random.Random(f"{seed} {epoch}").sample(range(len(examples)), len(examples))
        index = order[at * cfg["rl_prompts"] :][: cfg["rl_prompts"]]
        rollouts = generate(model, tokenizer, [prompts[i] for i in index], G, generator=torch.Generator().manual_seed(seed * 1_000_003 + step), **decode)
        earned = torch.tensor(score(task, [examples[index[r.prompt]] for r in rollouts], [r.text for r in rollouts], step + 1))  # (B,)
        advantages = group_advantages(earned.view(len(index), G)).flatten()  # (B,)
        batch = [b for b in range(len(rollouts)) if advantages[b] != 0]
        for part in pack([rollouts[b] for b in batch], budget):
            some = [rollouts[batch[i]] for i in part]
            h, slots, valid = states(model, some)
            of_latents, of_words = valid & (slots == LATENT), valid & (slots != LATENT)
            z = torch.cat([r.latents for r in some]).to(h.device) / spread
            logp = torch.zeros(slots.shape, device=h.device).masked_scatter(of_latents, head.logprob(h[of_latents], z).float())
            logp = logp.masked_scatter(of_words, token_logprobs(model, h[of_words], slots[of_words]).float())
            a = advantages[[batch[i] for i in part]].to(logp)
            # One update per batch, so the old log-probs are these: the ratio is 1. CoLaR adds the two losses, each a mean of its own.
            loss = sum(policy_loss(logp, logp.detach(), a, of, len(rollouts))[0] for of in (of_latents, of_words))
            loss.backward()
        descend(optimizer)
        mean = lambda f: sum(map(f, rollouts)) / len(rollouts)
        spent += sum(len(r.slots) for r in rollouts)
        m = {"step": step + 1, "epoch": epoch, "reward": float(earned.mean()), "accuracy": float(earned.mean()), "text_tokens": mean(lambda r: r.n_tokens),
             "latent_steps": mean(lambda r: r.n_latents), "tags": 1.0, "tag_share": 1.0, "seconds": {"all": round(time.time() - start, 3)}}
        log.write(json.dumps(m) + "\n")
        log.flush()
        print(f"step {step + 1:4d}/{cfg['rl_steps']} | reward {m['reward']:6.3f} | text {m['text_tokens']:6.1f} | latent {m['latent_steps']:5.1f} | "
              f"{time.time() - start:5.1f}s", flush=True)
    return spent


# ============================================================================ the script
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = ap.add_argument_group("what")
    g.add_argument("--method", required=True, choices=["soft-thinking", "moi", "coconut", "colar"])
    g.add_argument("--model", default="tiny", help="the base: tiny, a directory, or a hub name such as Qwen2.5-1.5B")
    task_flags(g)
    g.add_argument("--out", default=None, metavar="DIR", help="settings, the table and what was trained go there (default out/METHOD)")
    g = ap.add_argument_group("decoding")
    g.add_argument("--temperature", type=float, default=1.0, help="of the sampled words, and of Soft Thinking's mixture")
    g.add_argument("--max-new-tokens", type=int, default=None, help="slots per answer, latents included (default: 160 for a small model, else 2048)")
    g.add_argument("--top", type=int, default=10, help="soft-thinking: words in a mixture")
    g.add_argument("--patience", type=int, default=256, help="soft-thinking: certain steps in a row that stop it")
    g.add_argument("--beta", type=float, default=1.0, help="moi: weight of the sampled word (its paper: 0.5 to 2)")
    g = ap.add_argument_group("training (default: set by the model's size, see RELEASED and SMALL)")
    g.add_argument("--prompts", type=int, default=None, help="train prompts to sample traces for, 5 each")
    g.add_argument("--steps", type=int, default=None, help="colar: GRPO steps; 0 is SFT only")
    g.add_argument("--tokens-per-forward", type=int, default=12_000, help="positions per forward pass: the memory dial; changes no result")
    g = ap.add_argument_group("run")
    g.add_argument("--n", type=int, default=500, help="test examples")
    g.add_argument("--seed", type=int, default=0)
    device_flags(g)
    args = ap.parse_args()
    args.out = args.out or os.path.join("out", args.method)
    check_arguments(args)
    held = lock(args.out)  # until the process ends
    model, tokenizer = load(args.model, args.device)
    model.graphs = args.graphs
    task = start_task(args, model, args.model)
    cfg = dict(SMALL if is_small(model) else RELEASED)
    for name, value in (("prompts", args.prompts), ("rl_steps", args.steps), ("max_new_tokens", args.max_new_tokens)):
        cfg[name] = cfg[name] if value is None else value
    write_json(os.path.join(args.out, "config.json"), {"script": "baselines.py", "base": base_of(args.model), **vars(args), "settings": cfg,
                                                       "prompts": cfg["rl_prompts"], "group": 16})
    end = tokenizer.encode(getattr(task, "ANSWER", "\\boxed{"), add_special_tokens=False)[0]  # the answer's first word
    examples, tests, start, spent, steps = task.examples("train"), task.examples("test")[: args.n], time.time(), 0, cfg["max_new_tokens"]
    if args.method == "soft-thinking":
        decode = {**soft_thinking(model, end, args.top, patience=args.patience, temperature=args.temperature or 1.0), "start": steps}
    elif args.method == "moi":
        decode = mixture_of_inputs(model, args.beta)
    else:
        traces, spent = own_traces(model, tokenizer, task, examples[: cfg["prompts"]], 5, steps, args.seed)
        if args.method == "coconut":
            decode = {"latent": feed_back, "start": train_coconut(model, tokenizer, traces, cfg, args.tokens_per_forward, args.seed)}
        else:
            torch.manual_seed(args.seed)
            head, spread = LatentHead(model.config.hidden_size).to(model.device), float(model.get_input_embeddings().weight.detach().float().std())
            sft_colar(model, tokenizer, head, spread, traces, cfg, args.tokens_per_forward, args.seed)
            decode = {**colar(model, head, spread, end), "start": 64}  # at most 64 latents, as released
    rows, say = [], dict(seed=args.seed, max_new_tokens=steps, temperature=args.temperature, tag=0)  # tag=0: a tag is text to these methods

    def note(name, **how):
        began = time.time()
        result = evaluate(model, tokenizer, task, tests, latent_prompt=False, progress=name, alone=8, **say, **how)[0]
        rows.append((name, {"model": name, "training_tokens": spent, "training_seconds": began - start, **result}))

    note(args.method + (", SFT" if args.method == "colar" else ""), **decode)
    if args.method == "colar" and cfg["rl_steps"]:
        with open(os.path.join(args.out, "metrics.jsonl"), "w") as log:
            spent += rl_colar(model, tokenizer, task, head, spread, examples, cfg, {**decode, "max_new_tokens": steps, "tag": 0},
                              args.tokens_per_forward, args.seed, log)
        note("colar", **decode)
    if args.method in ("coconut", "colar"):
        save(model, tokenizer, os.path.join(args.out, "model"))
    write_json(os.path.join(args.out, "results.json"), [r for _, r in rows])
    print(f"{table(rows)}\n\n{len(tests)} test examples, seed {args.seed}, {time.time() - start:.0f}s; numbers in {args.out}/results.json")


if __name__ == "__main__":
    run_script(main)
