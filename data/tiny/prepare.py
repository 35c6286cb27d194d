"""Makes the tiny world's base model: `python data/tiny/prepare.py` (needs no download, no GPU).

The base stands for the pretrained LM that the paper starts from. It is a Qwen2 of 0.6 M parameters, trained from random
weights on text of the tiny world: what readers of different care wrote after the two kinds of prompt. Like a pretrained
LM it has seen good and bad reasoning, and samples both; RL can then select. What each reader writes is below, and
readme.md states what that makes the base able to do, and what follows for the claims.

    python data/tiny/prepare.py                     # the shipped base
    python data/tiny/prepare.py --steps 20 --out /tmp/base      # a smoke run
"""
import argparse
import os
import random
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from data import tiny
from data.tiny import next_chapter
from litereason import CLOSE, OPEN

# ---------------------------------------------------------------- how readers write
MISREAD = 0.06  # chance that a step looks up a wrong place
BLIND = 0.15    # chance that a step sees what it expects where the places differ
HASTY = 0.06    # share of readers who answer at once, by a coin
KEPT = 0.75     # chance that a reader who skips still writes down the step about the thing that is asked for
KINDS, PARTS = ("hole", "plan", "chapter"), (72, 14, 14)  # what is read, in parts of 100
# Errors in the plot-hole stories. With the task's 0 or 1, "it is where it was" is nearly always right and looking is hardly
# learned, so the training begins with stories of 0 to 5.
RICH, PLAIN = (0, 1, 2, 3, 4, 5), (0, 0, 0, 0, 0, 1, 1, 1, 1, 2)

EOS = "<|endoftext|>"


def tag(sentences):
    """The tag for a stretch of skipped sentences: N = a fifth of their words, 1 to 5 (method.md section 4)."""
    n = max(1, min(5, int(0.2 * sum(len(s.split()) for s in sentences))))
    return f"{OPEN} {n} {CLOSE}"


def skip_some(rng, sentences, keep=None):
    """Replaces stretches of sentences by one tag each: a few, most or all of them; sentence number `keep` is spared."""
    p = 1.0 if rng.random() < 0.4 else rng.uniform(0.1, 0.9)
    out, stretch = [], []
    for i, s in enumerate(sentences + [None]):
        if s is not None and i != keep and rng.random() < p:
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
    sentences, seen = [], {}
    for thing, person, put, found in row["steps"]:
        told = put
        if not careful and rng.random() < MISREAD:
            told = rng.choice(tiny.PUT)
        elif not careful and tiny.NAMES[put] != found and rng.random() < BLIND:
            told = tiny.PUT[tiny.FOUND.index(found)]
        verdict = "fine" if tiny.NAMES[told] == found else "clash"
        sentences.append(f"{thing} with {person} , {person} {told} , {thing} {found} , {verdict} .")
        if verdict == "clash":
            seen[sentences[-1]] = thing
    if latent:
        asked = [step[0] for step in row["steps"]].index(row["asked"])
        keep = asked if careful or rng.random() < KEPT else None
        spared = sentences[asked]
        sentences = skip_some(rng, sentences, keep)
        if spared not in sentences:  # what was asked for was not looked up: a guess
            return " ".join(sentences + [conclusion(row["asked"] if rng.random() < 0.5 else None)])
    return " ".join(sentences + [conclusion(next((seen[s] for s in sentences if s in seen), None))])


def plan_trace(rng, row, latent):
    """One reader's answer to the next-chapter prompt: look-ups, then the plan."""
    sentences, plan = [], []
    for person, thing, where in row["wants"]:
        if rng.random() < 2 * MISREAD:
            where = rng.choice(tiny.FOUND)
        sentences.append(f"{thing} tempts {person} , {thing} {where} .")
        plan.append(f"{person} {where}")
    if latent:
        sentences = skip_some(rng, sentences)
    elif rng.random() < HASTY:
        sentences, plan = [], [f"{p} {rng.choice(tiny.FOUND)}" for p, _, _ in row["wants"]]
    return " ".join(sentences + [next_chapter.ANSWER, " , ".join(plan), "."])


def make_text(rng, errors=PLAIN, tags=0.5):
    """One training text, (prompt, continuation), from a story of the train part."""
    kind = rng.choices(KINDS, PARTS)[0]
    while True:
        row = next_chapter.make_story(rng) if kind in ("plan", "chapter") else tiny.make_story(rng, rng.choice(errors))
        if tiny.split_of(row["story"]) == "train":
            break
    latent = rng.random() < tags
    if kind == "hole":
        return tiny.prompt(row, latent), hole_trace(rng, row, latent)
    if kind == "plan":
        return next_chapter.prompt(row, latent), plan_trace(rng, row, latent)
    plan = next_chapter.gold_plan(row) if rng.random() < 0.5 else None  # the scorer's two readings
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
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=EOS, pad_token=EOS, unk_token="<unk>", clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------- training
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    ap.add_argument("--out", default=os.path.join(here, "base"), help="directory for the model")
    ap.add_argument("--steps", type=int, default=2200, help="optimiser steps")
    ap.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (AdamW)")
    ap.add_argument("--batch", type=int, default=28, help="texts per step")
    ap.add_argument("--rich", type=float, default=0.25, help="share of the steps with error-rich stories, 0 to 1")
    ap.add_argument("--tags", type=float, default=0.5, help="share of the prompts that offer the tag, 0 to 1")
    ap.add_argument("--init", default=None, help="go on from this model directory instead of random weights")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tok = make_tokenizer()
    vocab, pad = tok.get_vocab(), tok.pad_token_id
    encode = lambda text: [vocab[w] for w in text.split()]
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(vocab), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, initializer_range=0.05,
        num_key_value_heads=2, max_position_embeddings=512, rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=pad, pad_token_id=pad, attn_implementation="eager"))
    if args.init:
        model = Qwen2ForCausalLM.from_pretrained(args.init, attn_implementation="eager")
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
            y[i, : len(row)] = row
        return x, y, [len(a) for a, _ in ids]

    probe_rng = random.Random(10**6)
    probe = [r for r in (tiny.make_story(probe_rng, i % 2) for i in range(2000)) if tiny.split_of(r["story"]) == "val"]
    plans = [r for r in (next_chapter.make_story(probe_rng) for i in range(2000)) if tiny.split_of(r["story"]) == "val"]

    @torch.no_grad()
    def check():
        """What has been learned, teacher-forced on val stories: look-ups, verdicts, and how much a plan helps the scorer."""
        model.eval()
        x, y, starts = batch([(tiny.prompt(r, False), hole_trace(rng, r, False, careful=True)) for r in probe])
        hit = (model(x).logits[:, :-1].argmax(-1) == x[:, 1:]).float()  # [i, t]: token t + 1 was foreseen
        at = torch.tensor(starts)[:, None] + 12 * torch.arange(6)
        of = lambda k: hit.gather(1, at + k - 1)
        differs = torch.tensor([[tiny.NAMES[put] != found for _, _, put, found in r["steps"]] for r in probe])
        out = {"person": of(2).mean(), "put": of(5).mean(), "put if wrong": of(5)[differs].mean(), "found": of(8).mean(),
               "clash": of(10)[differs].mean(), "fine": of(10)[~differs].mean()}
        for name, plan in (("ch_plan", True), ("ch_none", False)):
            x, y, starts = batch([(next_chapter.chapter_prompt(r, next_chapter.gold_plan(r) if plan else None), r["chapter"]) for r in plans])
            lp = model(x).logits.log_softmax(-1)
            out[name] = sum(-lp[i, s - 1 : s + 20].gather(1, x[i, s : s + 21, None]).mean() for i, s in enumerate(starts)) / len(starts)
        model.train()
        return {k: float(v) for k, v in out.items()}

    model.train()
    t0 = time.time()
    for step in range(args.steps):
        errors = RICH if step < args.rich * args.steps else PLAIN
        x, y, _ = batch([make_text(rng, errors, args.tags) for _ in range(args.batch)])
        with torch.autocast("cpu", torch.bfloat16):  # weights stay fp32; 4 times the speed where the CPU has bf16 units
            logits = model(x).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        sched.step()
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            print(f"step {step + 1:5d}/{args.steps} | loss {loss.item():.3f} | {time.time() - t0:5.0f}s | "
                  + " ".join(f"{k} {v:.3f}" for k, v in check().items()), flush=True)
            os.makedirs(args.out, exist_ok=True)
            model.save_pretrained(args.out)
            tok.save_pretrained(args.out)


if __name__ == "__main__":
    main()
