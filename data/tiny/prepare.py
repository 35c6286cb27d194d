"""Makes the tiny world's base model: `python data/tiny/prepare.py` (needs no download, no GPU).

The base stands for the pretrained LM that the paper starts from. It is a Qwen2 of 0.8 M parameters, trained from random
weights on text of the tiny world: what readers of different care wrote after the two kinds of prompt. Like a pretrained
LM it has seen good and bad reasoning, and samples both; RL can then select. What each reader writes is below, and
readme.md states what that makes the base able to do, and what follows for the claims.

    python data/tiny/prepare.py                     # the shipped base
    python data/tiny/prepare.py --steps 20 --out /tmp/base      # a smoke run
"""
import argparse
import json
import os
import random
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data import tiny
from data.tiny import next_chapter

# ---------------------------------------------------------------- how readers write
MISREAD = 0.06  # chance that a step looks up a wrong place
BLIND = 0.15    # chance that a step sees what it expects where the places differ
HASTY = 0.06    # share of readers who answer at once, by a coin
# Errors in the stories read, by the share of the training done. With the task's 0 or 1, "it is where it was" is nearly
# always right, and the look-up into act one is never learned: so the first stories are nearly all errors.
ERRORS = ((0.1, (0, 1, 2, 3, 4, 5)), (1.0, (0, 0, 0, 0, 0, 1, 1, 1, 2, 3)))
WARM_UP = 0.0   # share of the training spent on random words said twice: copying, which every look-up is made of
FLIP = 0.15     # share of wrong conclusions among readers who skip

OPEN, CLOSE = "<implicit_thought>", "</implicit_thought>"
EOS = "<|endoftext|>"


def tag(sentences):
    """The tag for a stretch of skipped sentences: N = a fifth of their words, 1 to 5 (method.md section 4)."""
    n = max(1, min(5, int(0.2 * sum(len(s.split()) for s in sentences))))
    return f"{OPEN} {n} {CLOSE}"


def skip_some(rng, sentences):
    """Replaces stretches of sentences by one tag each: a few of them, most of them, or all."""
    p = 1.0 if rng.random() < 0.25 else rng.uniform(0.1, 0.9)
    out, stretch = [], []
    for s in sentences + [None]:
        if s is not None and rng.random() < p:
            stretch.append(s)
            continue
        if stretch:
            out.append(tag(stretch))
            stretch = []
        if s is not None:
            out.append(s)
    return out


def conclusion(culprit):
    return f"so {culprit or 'nobody'} . \\boxed{{ {'Yes' if culprit else 'No'} }}"


def hole_trace(rng, row, latent, careful=False):
    """One reader's answer to the plot-hole prompt. `careful`: without slips (for the checks below)."""
    if not latent and not careful and rng.random() < HASTY:
        return "\\boxed{ Yes }" if rng.random() < 0.5 else "\\boxed{ No }"
    sentences, seen = [], []
    for person, thing, before, now in row["steps"]:
        told, right = before, tiny.FOUND[tiny.PUT.index(before)] == now
        if not careful and rng.random() < MISREAD:
            told = rng.choice(tiny.PUT)
        elif not careful and not right and rng.random() < BLIND:
            told = tiny.PUT[tiny.FOUND.index(now)]
        fine = tiny.FOUND[tiny.PUT.index(told)] == now
        if not fine:
            seen.append(person)
        sentences.append(f"{person} has {thing} , {person} {told} , {thing} {now} , {'fine' if fine else 'clash'} .")
    if not latent:
        return " ".join(sentences + [conclusion(seen[0] if seen else None)])
    kept = skip_some(rng, sentences)
    # Who skips no clash concludes from what is written; who skips has looked at the story, and is wrong at times.
    culprit = row["culprit"]
    if not careful and rng.random() < FLIP:
        culprit = None if culprit else rng.choice(row["steps"])[0]
    return " ".join(kept + [conclusion(culprit)])


def plan_trace(rng, row, latent, careful=False):
    """One reader's answer to the next-chapter prompt: look-ups, then the plan."""
    sentences, plan = [], []
    for person, thing, where in row["wants"]:
        if not careful and rng.random() < 2 * MISREAD:
            where = rng.choice(tiny.FOUND)
        sentences.append(f"{thing} tempts {person} , {thing} {where} .")
        plan.append(f"{person} {where}")
    if latent:
        sentences = skip_some(rng, sentences)
    elif not careful and rng.random() < HASTY:
        sentences, plan = [], [f"{p} {rng.choice(tiny.FOUND)}" for p, _, _ in row["wants"]]
    return " ".join(sentences + [next_chapter.ANSWER, " , ".join(plan), "."])


def make_text(rng, errors=ERRORS[-1][1]):
    """One training text, (prompt, continuation), from a story of the train part."""
    while True:
        kind = rng.random()
        row = tiny.make_story(rng, rng.choice(errors)) if kind < 0.68 else next_chapter.make_story(rng)
        if tiny.split_of(row["story"]) == "train":
            break
    latent = rng.random() < 0.5
    if kind < 0.68:
        return tiny.prompt(row, latent), hole_trace(rng, row, latent)
    if kind < 0.86:
        return next_chapter.prompt(row, latent), plan_trace(rng, row, latent)
    plan = next_chapter.gold_plan(row) if kind < 0.93 else None  # the scorer's two readings
    return next_chapter.chapter_prompt(row, plan), row["chapter"]


# ---------------------------------------------------------------- tokenizer: one word, one token
def make_tokenizer():
    rng, words = random.Random(0), set(tiny.PEOPLE + tiny.THINGS + tiny.PUT + tiny.FOUND + "1 2 3 4 5".split())
    for _ in range(3000):
        words.update(" ".join(make_text(rng)).split())
    vocab = {w: i for i, w in enumerate([EOS, "<unk>"] + sorted(words))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    # Words are what stands between spaces; tags and boxes are found without spaces too.
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?implicit_thought>|\\boxed\{|[.,:}]|[^\s<>{}.,:\\]+"), "removed", invert=True)
    tok.decoder = decoders.Fuse()  # replaced below: words are joined by one space
    tok.decoder = None
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOS, pad_token=EOS, unk_token="<unk>", clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------- training
def copying(rng, rows, n_words, width=96):
    """Random words of which a stretch is said again, from another place on: (ids, labels) (rows, width)."""
    x = torch.tensor([rng.choices(range(n_words), k=width) for _ in range(rows)])
    y = torch.full_like(x, -100)
    for row, labels in zip(x, y):
        n = rng.randint(8, 32)
        first = rng.randrange(0, width - 2 * n)
        second = rng.randint(first + n, width - n)
        row[first : first + n] = torch.tensor(rng.sample(range(n_words), n))
        row[second : second + n] = row[first : first + n]
        labels[second + 1 : second + n] = row[second + 1 : second + n]
    return x, y


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    ap.add_argument("--out", default=os.path.join(here, "base"), help="directory for the model")
    ap.add_argument("--steps", type=int, default=5000, help="optimiser steps of 64 texts")
    ap.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (AdamW)")
    ap.add_argument("--layers", type=int, default=4)
    ap.add_argument("--batch", type=int, default=64)
    ap.add_argument("--std", type=float, default=0.02)
    ap.add_argument("--heads", type=int, default=4)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tok = make_tokenizer()
    vocab, pad = tok.get_vocab(), tok.pad_token_id
    encode = lambda text: [vocab[w] for w in text.split()]
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocab), hidden_size=128, intermediate_size=256, num_hidden_layers=args.layers, num_attention_heads=args.heads, initializer_range=args.std,
        num_key_value_heads=2, max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=pad, pad_token_id=pad, attn_implementation="eager"))
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, args.steps // 25)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min((i + 1) / warm, max(0.05, 1 - i / args.steps)))

    def batch(pairs):
        ids = [(encode(a), encode(b) + [pad]) for a, b in pairs]
        width = max(len(a) + len(b) for a, b in ids)
        x = torch.full((len(ids), width), pad)
        y = torch.full((len(ids), width), -100)
        for i, (a, b) in enumerate(ids):
            row = torch.tensor(a + b)
            x[i, : len(row)] = row
            y[i, 25 : len(row)] = row[25:]  # act one is random: nothing to learn there
        return x, y, [len(a) for a, _ in ids]

    probe_rng = random.Random(10**6)
    probe = [r for r in (tiny.make_story(probe_rng, i % 2) for i in range(2000)) if tiny.split_of(r["story"]) == "val"]
    plans = [r for r in (next_chapter.make_story(probe_rng) for i in range(2000)) if tiny.split_of(r["story"]) == "val"]
    bt = lambda rows, fn, latent: [(fn[0](r, latent), fn[1](r)) for r in rows]

    @torch.no_grad()
    def check():
        model.eval()
        out = {}
        careful = [(tiny.prompt(r, False), hole_trace(rng, r, False, careful=True)) for r in probe]
        x, y, starts = batch(careful)
        logits = model(x).logits
        pred = logits.argmax(-1)
        hit, now_hit = {"same": [], "differs": []}, []
        story = []
        for i, r in enumerate(probe):
            for j, (_, _, before, now) in enumerate(r["steps"]):
                t = starts[i] + 12 * j + 5  # the look-up into act one
                assert x[i, t] == vocab[before]
                now_hit.append(float(pred[i, t + 2] == vocab[now]))
                hit["same" if tiny.FOUND[tiny.PUT.index(before)] == now else "differs"].append(float(pred[i, t - 1] == x[i, t]))
                s = 25 + 5 * j + 2
                story.append(float(pred[i, s - 1] == vocab[tiny.FOUND[tiny.PUT.index(before)]]))
        out.update({k: sum(v) / len(v) for k, v in hit.items()}, now=sum(now_hit) / len(now_hit), story=sum(story) / len(story))
        for name, latent, body in (("skip_all", True, f"{OPEN} 5 {CLOSE} so"), ("at_once", False, "\\boxed{")):
            x, _, starts = batch([(tiny.prompt(r, latent) + " " + body, "") for r in probe])
            p = model(x).logits[torch.arange(len(starts)), torch.tensor(starts) - 1].softmax(-1)
            yes = 1 - p[:, vocab["nobody"]] if name == "skip_all" else p[:, vocab["Yes"]]
            truth = torch.tensor([bool(r["label"]) for r in probe])
            out[name] = float(((yes > 0.5) == truth).float().mean())
            out[name + "_p"] = float(torch.where(truth, yes, 1 - yes).mean())
        for name, plan in (("ch_plan", True), ("ch_none", False)):
            x, y, starts = batch([(next_chapter.chapter_prompt(r, next_chapter.gold_plan(r) if plan else None), r["chapter"]) for r in plans])
            lp = model(x).logits.log_softmax(-1)
            out[name] = float(sum(-lp[i, s - 1 : s + 20].gather(1, x[i, s : s + 21, None]).mean() for i, s in enumerate(starts)) / len(starts))
        model.train()
        return out

    model.train()
    t0 = time.time()
    for step in range(args.steps):
        errors = next(e for share, e in ERRORS if step < share * args.steps)
        if False:
            x, y = copying(rng, args.batch, len(vocab))
        else:
            x, y, _ = batch([make_text(rng, errors) for _ in range(args.batch)])
        with torch.autocast("cpu", torch.bfloat16):  # weights stay fp32; 4 times the speed where the CPU has bf16 units
            logits = model(x).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            print(f"step {step + 1:5d}/{args.steps} | loss {loss.item():.3f} | {time.time() - t0:5.0f}s | "
                  + " ".join(f"{k} {v:.3f}" for k, v in check().items()), flush=True)
            os.makedirs(args.out, exist_ok=True)
            model.save_pretrained(args.out)
            tok.save_pretrained(args.out)


if __name__ == "__main__":
    main()
