"""Nothing in the text drives the machine: 100,000 random token sequences against the tag watcher, prompts and stories that carry
tags and delimiters, texts made to be slow, and checkpoints that are damaged or want to run code. All seeded and bounded."""
import bisect
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, close, naive, tag, write
from safetensors.torch import load_file, save_file

from data.flawed_fictions import quotes, reward, verdict
from data.next_chapter import plan_of
from litereason import (CLOSE, DIGITS, LATENT, OPEN, SPACE, TagWatcher, UserError, attach, boxed, insert_latents, load, mask_sentences,
                        parse_tags, perplexity, save)


# ---------------------------------------------------------------- the watcher against the rule, read off the bytes
def pieces_of(tok):
    """What each vocabulary entry stands for, as bytes, without decoding: a byte-level BPE piece need not be valid UTF-8 on its own."""
    texts = tok.convert_ids_to_tokens(list(range(len(tok))))
    if "Ġ" not in texts:
        return [t.encode() for t in texts]  # conftest's: text
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]  # GPT-2's alphabet: these bytes stand
    byte = {chr(b): b for b in shown}                                                       # for themselves, the others
    byte.update((chr(256 + i), b) for i, b in enumerate(b for b in range(256) if b not in byte.values()))  # follow from U+0100 on
    special = set(tok.get_added_vocab())
    return [t.encode() if t in special else bytes(byte[c] for c in t) for t in texts]


def by_reading(pieces, cap):
    """[(token, n)]: the slow definition. From each closing tag read backwards: spaces, digits, spaces, an opening tag that is not
    inside another one. latin-1 gives a character per byte, and none beyond ASCII is a tag's, so no piece needs to be valid UTF-8."""
    text, ends, out = b"".join(pieces).decode("latin-1"), list(itertools.accumulate(map(len, pieces))), []
    at = text.find(CLOSE)
    while at >= 0:
        inside = text[:at].rstrip(SPACE)
        opened = inside.rstrip(DIGITS)
        digits, opened = inside[len(opened):].lstrip("0"), opened.rstrip(SPACE)
        before = opened[: -len(OPEN)].rstrip(SPACE).rstrip(DIGITS).rstrip(SPACE)
        if digits and opened.endswith(OPEN) and not before.endswith(OPEN):
            n = cap if len(digits) > len(str(cap)) else min(int(digits), cap)
            out.append((bisect.bisect_left(ends, at + len(CLOSE)), n))
        at = text.find(CLOSE, at + 1)
    return out


def fired(watch, sequences):
    """[(token, n)] of each sequence, watched 5,000 at a time, those of like length together."""
    out, order = [[] for _ in sequences], sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for part in (order[i : i + 5000] for i in range(0, len(order), 5000)):
        longest = max(len(sequences[i]) for i in part)
        ids = torch.tensor([sequences[i] + [0] * (longest - len(sequences[i])) for i in part])  # (rows, T)
        state = torch.zeros(len(part), dtype=torch.long)
        for t in range(longest):
            state, n = watch.step(state, ids[:, t])
            for row in n.nonzero()[:, 0].tolist():
                if t < len(sequences[part[row]]):
                    out[part[row]].append((t, int(n[row])))
    return out


TEXTS = [OPEN, CLOSE, OPEN, CLOSE, "<implicit_", "thought>", "</implicit_thought", "<", ">", "</", "><", " ", "\n\t", "\r\n", "\f", "\v",
         "0", "3", "12", "007", "0" * 25, "9" * 25, "-", "+", ".", "x", "a story", "٣", "３", "²", "߃", "𝟛", "\u00a0", "\u2003", "\u200b", "\ufeff",
         tag(1), tag(" 4"), tag("5 "), tag("\n2\t"), tag(0), tag("٣"), tag(""), f"{OPEN}3", f"{OPEN} 3", f"3{CLOSE}", tag(2) + tag(3),
         f"{OPEN}{tag(3)}", f"{OPEN}2{tag(3)}{CLOSE}", f"{OPEN}2 {OPEN}", f"{CLOSE}3{OPEN}", f"Then.{tag(3)}\n\nSo", f"({tag(2)})", "{}\"<>'",
         tag("3</implicit_thought"), "<implicit_thought<implicit_thought>", "</implicit_thought</implicit_thought>"]


def fragments(rng, tok, pieces):
    """Lists of token ids to be put one after the other: each text as the tokenizer cuts it and cut at random, pairs of them too, so that
    tokens reach over the seams; the ids that end a turn or stand for nothing; every entry that could touch a tag; any entry at all."""
    ids_of, words = {}, [t.encode() for t in TEXTS]
    for i, p in enumerate(pieces):
        ids_of.setdefault(p, []).append(i)

    @functools.cache
    def fits(text):  # the lengths of the entries that `text` begins with
        return [k for k in range(1, len(text) + 1) if text[:k] in ids_of]

    def cut(text):
        ids = []
        while text:
            k = rng.choice(fits(text[:20]) or [0])
            ids, text = ids + [rng.choice(ids_of[text[:k]])] if k else ids, text[max(k, 1):]
        return ids

    whole = [tok.encode(t, split_special_tokens=True) for t in TEXTS] + [tok.encode(a + b) for a in TEXTS[::3] for b in TEXTS]
    random_cuts = [cut(w) for w in words for _ in range(40)] + [cut(rng.choice(words) + rng.choice(words)) for _ in range(3000)]
    near = [[i] for i, p in enumerate(pieces) if set(p) & set(b"<>") or p and set(p) <= set((SPACE + DIGITS).encode()) or p in OPEN.encode()]
    broken = [[i] for i, p in enumerate(pieces) if "\ufffd" in p.decode("utf-8", "replace")] or [[len(pieces)]]
    end, nothing = [[tok.eos_token_id]], [[len(pieces)], [len(pieces) + 2]]
    return whole, random_cuts, random_cuts, random_cuts, near, broken, end, nothing, [[i] for i in range(len(pieces))]


@pytest.mark.parametrize("which, cap, count", [("tok", 5, 20000), ("tok", 1, 5000), ("tok", 64, 5000), ("real_tok", 5, 70000)])
def test_the_watcher_agrees_with_the_slow_reading_of_100000_random_sequences(request, which, cap, count):
    tok, rng = request.getfixturevalue(which), random.Random(cap)
    pieces = pieces_of(tok)
    kinds = fragments(rng, tok, pieces)
    sequences = [[i for _ in range(rng.randint(1, 12)) for i in rng.choice(rng.choice(kinds))] for _ in range(count)]
    read = pieces + [b"\0"] * 3  # ids that no text has
    expected = [by_reading([read[i] for i in s], cap) for s in sequences]
    hits = sum(map(bool, expected))
    assert count / 4 < hits < 3 * count / 4, hits  # neither all tags nor none
    watch = TagWatcher(tok, cap, len(pieces) + 3, "cpu")
    assert [(s, f, e) for s, f, e in zip(sequences, fired(watch, sequences), expected) if f != e][:1] == []
    for s, e in list(zip(sequences, expected))[:1500]:  # the reference is right about what a reader sees, as far as the tokenizer reads
        s = list(itertools.takewhile(lambda i: i < len(pieces), s))
        seen = parse_tags(tok.decode(s, clean_up_tokenization_spaces=False), cap)
        assert [n for _, _, n in seen] == [n for t, n in e if t < len(s)]


def test_every_merge_of_the_real_vocabulary_around_a_tag_ends_the_tag(real_tok):
    pieces, head, tail = pieces_of(real_tok), OPEN.encode(), CLOSE.encode()
    starts = [(i, k) for i, p in enumerate(pieces) for k in range(1, len(head)) if p.endswith(head[:k])]
    ends = [(i, k) for i, p in enumerate(pieces) for k in range(1, len(tail)) if p.startswith(tail[-k:])]
    assert len(starts) > 90 and len(ends) > 250  # "(<", " <", "\"><", ..; ">\n\n", "></", ">(", ..
    encode = functools.cache(real_tok.encode)
    sequences = [[i, *encode(OPEN[a:] + "3" + CLOSE[:-b]), j] for (i, a), (j, b) in itertools.product(starts, ends)]
    assert fired(TagWatcher(real_tok, 5, len(pieces), "cpu"), sequences) == [[(len(s) - 1, 3)] for s in sequences]


@pytest.mark.parametrize("which", ["tok", "real_tok"])
def test_thousands_of_digits_spaces_or_open_tags_are_read_like_few(request, which):
    tok = request.getfixturevalue(which)
    pieces, watch = pieces_of(tok), TagWatcher(tok, 5, len(tok), "cpu")
    many = [("9" * 5000, [5]), ("0" * 5000, []), ("0" * 5000 + "4", [4]), (" " * 5000 + "3", [3]), ("3" + "\n" * 5000, [3]), ("3" * 5000 + "٣", []),
            ("3" + " " * 5000 + "3", []), (OPEN * 400 + "3", []), (CLOSE * 400 + "3", []), ((OPEN + "3") * 400, [])]
    for inside, expected in many:
        ids = tok.encode(tag(inside))
        assert fired(watch, [ids])[0] == by_reading([pieces[i] for i in ids], 5) == [(len(ids) - 1, n) for n in expected]
        assert [n for _, _, n in parse_tags(tag(inside))] == expected


def test_latents_stand_after_the_token_that_ends_a_tag_and_nowhere_else(model, tok):
    rng, pieces = random.Random(0), pieces_of(tok)
    kinds = fragments(rng, tok, pieces)[:4]
    for _ in range(500):
        ids = [i for _ in range(6) for i in rng.choice(rng.choice(kinds))]
        n_after = dict(by_reading([pieces[i] for i in ids], 5))
        assert insert_latents(model, tok, ids) == [s for t, i in enumerate(ids) for s in [i] + [LATENT] * n_after.get(t, 0)]
