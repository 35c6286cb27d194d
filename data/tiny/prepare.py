"""Makes the tiny world's base model: `python data/tiny/prepare.py` (needs no download, no GPU).

The base stands for the pretrained LM that the paper starts from: a Qwen3 of 0.3 M parameters and two
layers, trained from random weights on what readers wrote after the two kinds of prompt. Two layers can look
up one person, not two: a second look-up needs a second position, written or latent.

School comes first: stories told again, then careful readers of chains that grow when the last length is
mastered. Then come readers with the habits below. The base has then seen good and bad reasoning, and samples
both; RL can select."""
import functools
import os
import random
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data import tiny
from data.tiny import next_chapter
from lib import run
from litereason import CLOSE, OPEN

# ============================================================ how readers write
# Habits, under both prompts and in shorthand too:
CARELESS = ("Bruno", "Olga")  # who is said to lose things: where one of them has a piece ..
PREJUDICED = 0.85  # .. a reader stops with this chance, and calls it a hole
TIRED = 0.03    # chance to stop after any other look-up
WORDY = 0.8     # chance of a sentence that says nothing, after each one that does
FILLER = "let me read it once again ."
# After the tag prompt:
SKIPPING = (0.2, 0.5, 0.9)  # chance to skip before each sentence, one of these for each reader
ALL_LEFT = 0.5  # chance that a skipper skips all that is left
BARE = 0.7     # share of a reader's tags with nothing behind them; behind the others stands shorthand
BLENDED = 0.4  # share of it in which the two words of a round are one position, their embeddings added

PARTS = {"hole": 40, "careful": 45, "plan": 10, "chapter": 5}  # of 100 texts that are read after school
MOST = 5        # the highest number in a tag
EOS = "<|endoftext|>"


def trace(rng, row, latent, school):
    """What one reader writes -> (words, and tuples of two words (blends); whether it has stopped early).

    A tag over k rounds has the number k + 1: its shorthand begins with where the reader stands."""
    rounds = list(map(list, zip(*row["chains"])))
    asked = row.get("asked")  # who acts on the map, None where nobody is named
    last = len(rounds) - 1
    skipping = rng.choice((0.5, 0.95) if school else SKIPPING) if latent else 0.0

    def stops(pair):
        if school or asked in pair or tiny.NOBODY in pair:
            return False
        prejudiced = any(person in CARELESS for person in pair) and rng.random() < PREJUDICED
        return prejudiced or rng.random() < TIRED

    words, now = [], 0  # now: the round where the reader stands
    while now < last:
        if rng.random() < skipping:
            then = last if rng.random() < ALL_LEFT else rng.randint(now + 1, last)
            then = min(then, now + MOST - 1)
            then = now + 1 if school and rng.random() < 0.3 else then
            words += [OPEN, str(then - now + 1), CLOSE]
            if school or rng.random() > BARE:
                blended = rng.random() < (0.8 if school else BLENDED)
                for i in range(now, then + 1):
                    words += [tuple(rounds[i])] if blended else rounds[i]
                    if i > now and (not blended or i == then) and stops(rounds[i]):
                        return words, True
            now = then
            continue
        (a, b), (c, d) = rounds[now : now + 2]  # one round in words
        now += 1
        found = f"so {asked} has {('none', 'one', 'both')[[c, d].count(asked)]} of the halves , "
        words += f"from {a} {c} and from {b} {d} , {found if asked else ''}go on with {c} and {d} .".split()
        if stops(rounds[now]):
            return words, True
        if not school and rng.random() < WORDY:
            words += FILLER.split()
    return words, False


def hole_text(rng, row, latent, school):
    """(prompt, one reader's answer) of the first task."""
    words, stopped = trace(rng, row, latent, school)
    verdict = tiny.answer({"label": row["label"] or stopped})
    return tiny.prompt(row, latent).split(), words + verdict.split()


def plan_text(rng, row, latent):
    """(prompt, one reader's answer) of the second task; who stops early names anybody."""
    words, stopped = trace(rng, row, latent, school=False)
    plan = " and ".join(rng.sample(tiny.PEOPLE, 2)) + " ." if stopped else next_chapter.gold_plan(row)
    return next_chapter.prompt(row, latent).split(), words + f"{next_chapter.ANSWER} {plan}".split()


def chapter_text(rng, row):
    """What the scorer reads. A chapter follows its plan, whatever the plan; without one its people are
    anybody: a reader who could foresee the chapter silently would gain nothing from a plan."""
    holders = rng.sample(tiny.PEOPLE, 2)
    plan = " and ".join(holders) + " ." if rng.random() < 0.6 else None
    return next_chapter.chapter_prompt(row, plan).split(), next_chapter.chapter(holders).split()


def train_row(make):  # a story of the train part
    return next(row for row in iter(make, None) if tiny.split_of(row["story"]) == "train")


def three_hands(rng):
    """The shortest story: three pieces change hands once. It is told at school only."""
    people = rng.sample(tiny.PEOPLE, 6)
    chains = [people[:2], people[2:4], people[4:]]
    return {"story": tiny.events_of(rng, chains), "label": True, "first": [people[0], people[2]],
            "asked": rng.choice(chains)[1], "chains": chains[:2]}


def school_text(rng, hops):
    """(prompt, continuation) of a careful reader; with hops = 0, and now and then later, the story again in
    another order: that is how looking up is learned."""
    if hops > 1 and rng.random() < 0.4:  # shorter chains are not forgotten
        hops = rng.randint(2, hops)
    row = train_row(lambda: tiny.make_story(rng, rng.random() < 0.5, hops) if hops > 1 else three_hands(rng))
    if hops == 0 or rng.random() < 0.2:
        events = [event + " ." for event in row["story"].split(" .")[:-1]]
        return row["story"].split(), " ".join(rng.sample(events, len(events))).split()
    return hole_text(rng, row, rng.random() < 0.8, school=True)


def later_text(rng):
    """(prompt, continuation) of a reader with habits, of both tasks."""
    kind = rng.choices([*PARTS], PARTS.values())[0]
    if kind in ("hole", "careful"):
        row = train_row(lambda: tiny.make_story(rng, rng.random() < 0.5, rng.choice(tiny.LENGTHS)))
        if kind == "hole":
            return hole_text(rng, row, rng.random() < 0.6, school=False)
        prompt, text = hole_text(rng, row, True, school=True)  # learned at school, and not forgotten
        return tuple(prompt), text
    row = train_row(lambda: next_chapter.make_story(rng, rng.choice(tiny.LENGTHS)))
    return plan_text(rng, row, rng.random() < 0.6) if kind == "plan" else chapter_text(rng, row)


# ============================================================ tokenizer and model: one word, one token
def make_tokenizer():
    """One that knows the tiny world's words and the end; tags and boxes are found without spaces too."""
    words = set(tiny.PEOPLE + "1 2 3 4 5 Yes No".split())
    rng = random.Random(0)
    for _ in range(1000):
        for text in (*later_text(rng), *school_text(rng, 2)):
            words.update(word for word in text if isinstance(word, str))
    vocab = {word: i for i, word in enumerate([EOS, "<unk>"] + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex(r"</?implicit_thought>|\\boxed\{|[.,:}]|[^\s<>{}.,:\\]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS,
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)


def make_model(vocab_size, pad):
    """A Qwen3 with random weights. (A Qwen2, without norms on queries and keys, takes four times as long.)"""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, rope_theta=10000.0,
        initializer_range=0.05, tie_word_embeddings=True, bos_token_id=None, eos_token_id=pad,
        pad_token_id=pad, attn_implementation="eager"))


def make_batch(vocab, pad, pairs):
    """[(prompt, continuation)] -> ids (B, S, 2), targets (B, S, 2) with -100 at padding and in prompts. The
    two ids of a position differ where two words are blended. The end after the continuation is learned."""
    rows, learned = [], []
    for prompt, text in pairs:
        both = [word if isinstance(word, tuple) else (word, word) for word in [*prompt, *text, EOS]]
        ids = torch.tensor([[vocab[one], vocab[two]] for one, two in both])  # (S, 2)
        rows.append(ids)
        learned.append(ids.clone())
        learned[-1][: len(prompt)] = -100
        if isinstance(prompt, tuple):  # not from these whether something stands behind a tag
            learned[-1][1:][ids[:-1, 0] == vocab[CLOSE]] = -100
    padded = torch.nn.utils.rnn.pad_sequence
    return padded(rows, True, pad), padded(learned, True, -100)


def forward(model, ids):
    """-> logits (B, S - 1, V). A blend is the sum of two embeddings, about as long as one."""
    embeddings = model.get_input_embeddings()(ids)  # (B, S, 2, D)
    is_blend = (ids[..., 0] != ids[..., 1])[..., None]
    x = torch.where(is_blend, embeddings.sum(2) / 2**0.5, embeddings[:, :, 0])
    return model(inputs_embeds=x).logits[:, :-1]


# ============================================================ what has been learned
def right(vocab, logits, ids, targets):
    """{what: (how many were right, how many there were)} of one batch, teacher-forced."""
    wanted = targets[:, 1:]  # (B, S - 1, 2)
    word = wanted[..., 0]
    before = ids[:, :-1, 0]
    after_from = torch.cat([before[:, :1], before[:, :-1]], 1) == vocab["from"]  # two words behind it
    people = torch.tensor([vocab[person] for person in tiny.PEOPLE + [tiny.NOBODY]])
    is_blend = word != wanted[..., 1]
    is_person = torch.isin(word, people) & ~is_blend
    hit = logits.argmax(-1) == word
    both_hit = (logits.topk(2).indices.sort(-1).values == wanted.sort(-1).values).all(-1)
    kinds = {"look-ups": (hit, is_person & after_from),
             "shorthand": (hit, is_person & torch.isin(before, people) & ~after_from),
             "blends": (both_hit, is_blend), "answers": (hit, (word == vocab["Yes"]) | (word == vocab["No"]))}
    return {name: (int((ok & where).sum()), int(where.sum())) for name, (ok, where) in kinds.items()}


def share(batches, name, last=15):  # that was right in the last batches, each as `right` returns it
    hits, asked = map(sum, zip(*(batch[name] for batch in batches[-last:])))
    return hits / max(1, asked)


# ============================================================ training
LR = 1.5e-3  # it falls after school
make_optimizer = functools.partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.01)


def has_mastered(recent, hops):
    """Whether a class may go on to the next length (from the last one: leave school)."""
    if hops < max(tiny.LENGTHS):
        return len(recent) >= 15 and share(recent, "look-ups") > 0.93
    kinds = "shorthand", "blends", "answers"
    return len(recent) >= 15 and min(share(recent, name, 30) for name in kinds) > 0.95


def main():
    parser = run.parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="DIR", default=os.path.join(HERE, "base"), help="[the shipped base is replaced]")
    add("--most", type=int, metavar="N", default=4000,
        help="steps of school, which ends before if 95 %% of what is asked there is right [4000]")
    add("--steps", type=int, metavar="N", default=2000, help="optimiser steps after school [2000]")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = make_tokenizer()
    vocab, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    model = make_model(len(vocab), pad)
    optimizer = make_optimizer(model.parameters())

    model.train()
    began = time.time()
    school, hops, recent = True, 0, []  # the class at school (0: stories are told again), its `right` by step
    left, step = args.steps, 0
    while left > 0:
        # One step on new texts.
        n = 64 if school and hops < 2 else 20
        texts = [school_text(rng, hops) if school else later_text(rng) for _ in range(n)]
        scale = 0.8 * max(0.05, left / args.steps)
        if school:
            scale = min(1, (step + 1) / 60) / (1 + len(recent) / 2000 * (hops == max(tiny.LENGTHS)))
        optimizer.param_groups[0]["lr"] = LR * scale
        ids, targets = make_batch(vocab, pad, texts)
        logits = forward(model, ids)
        loss = sum(0.5 * torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
                   for wanted in targets[:, 1:].unbind(-1))  # of a blend both words are wanted
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        left -= not school
        recent.append(right(vocab, logits.detach(), ids, targets))

        # Say what has been learned, and go on to the next class.
        if step % 50 == 0 or left == 0:
            shares = " ".join(f"{name} {share(recent, name):.3f}" for name in recent[-1])
            print(f"step {step:5d} {f'class {hops}' if school else 'after school'} | loss {loss.item():.3f} "
                  f"| {time.time() - began:5.0f}s | {shares}", flush=True)
        if school and (has_mastered(recent, hops) or step >= args.most):
            school = hops < max(tiny.LENGTHS) and step < args.most
            hops, recent = hops + school, []
            if not school:  # what follows is the same, however long that took
                rng, optimizer = random.Random(0), make_optimizer(model.parameters())
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    run.run_script(main)
