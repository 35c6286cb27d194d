"""What a tag is, and that decoding notices it exactly when the policy's own text completes one (Sec. 3.1)."""
import random

import pytest
import torch
from conftest import reader, tag

from litereason import CAP, CLOSE, LATENT, OPEN, insert_latents, parse_tags, watcher
from lib.checkpoint import token_texts


# ---------------------------------------------------------------- the parser
@pytest.mark.parametrize("text, expected", [
    (tag(1), [1]), (tag(5), [5]), (f"so {tag(3)} then {tag(2)}.", [3, 2]), (tag(2) + tag(4), [2, 4]),
    (tag(" 3 "), [3]), (tag("\n\t3\r\n"), [3]), (tag("003"), [3]),       # ASCII spaces, leading zeros
    (tag(6), [5]), (tag(12345), [5]),                                    # above the cap: clamped
    (tag("9" * 5000), [5]), (tag("0" * 5000 + "2"), [2]),                # thousands of digits
    (tag(0), []), (tag("000"), []), (tag(""), []), (tag(" "), []),
    *[(tag(n), []) for n in ("three", "3 steps", "3 4", "3.0", "-3", "+3")],
    *[(tag(n), []) for n in ("٣", "３", "²", "3²", "\u00a03", "\u20033")],  # of other scripts
    (f"{OPEN}3", []), (f"3{CLOSE}", []), (f"{OPEN}3{OPEN}", []), (f"{CLOSE}3{OPEN}", []),   # unclosed
    (f"{OPEN}{tag(3)}", []), (f"{OPEN}2{tag(3)}{CLOSE}", []), (f"{OPEN} 2 {OPEN} {tag(3)}", []),  # nested
    (f"{OPEN}{tag(3)}{tag(2)}", [2]),                                    # ... which ends with its closing tag
    (f"{OPEN}x{tag(3)}", [3]), (f"{OPEN}3</implicit{tag(2)}", [2]),      # an opening tag that came to nothing
    (f"<{tag(3)}>", [3]), (f"<implicit_{tag(3)}", [3]),
    (tag(3).upper(), []), (f"< implicit_thought>3{CLOSE}", []), (f"{OPEN}3</ implicit_thought>", []),
])
def test_a_valid_tag_has_a_whole_number_of_at_least_one_and_nothing_else(text, expected):
    found = parse_tags(text)
    assert [n for _, _, n in found] == expected
    assert all(text[a:b].startswith(OPEN) and text[a:b].endswith(CLOSE) for a, b, _ in found)


# ------------------------------------------------------- the watcher reads tokens, and agrees with the parser
PIECES = [OPEN, CLOSE, OPEN, CLOSE, "<implicit_", "thought>", "</implicit", "<", ">", "/", ".<", ">\n", "><",
          " ", "\n\t", "\r", "0", "3", "12", "00", "7", "-", "٣", "²", "é", "word", " a story", "x",
          "<eos>", "<|endoftext|>", tag(2), tag(" 4"), tag("5 "), f"{OPEN}3", f"1{CLOSE}"]


def random_ids(rng, tok, ids_of, longest):
    """A text of tag pieces and junk; half the time cut into tokens as the tokenizer does, else at random."""
    text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 14)))
    if rng.random() < 0.5:
        return tok.encode(text)
    ids = []
    while text:
        fit = [k for k in range(1, longest + 1) if text[:k] in ids_of]
        k = rng.choice(fit) if fit else 1
        ids += ids_of.get(text[:k]) or tok.encode(text[:k])
        text = text[k:]
    return ids


def fired(watch, sequences):
    """[(position, n)] of each sequence, all of them watched in one batch."""
    state, out = torch.zeros(len(sequences), dtype=torch.long), [[] for _ in sequences]
    for t in range(max(map(len, sequences))):
        state, n = watch.step(state, torch.tensor([s[t] if t < len(s) else 0 for s in sequences]))
        for i, k in enumerate(n.tolist()):
            if k and t < len(sequences[i]):
                out[i].append((t, k))
    return out


def by_decoding(tok, ids, cap):
    """The slow definition: after each token decode all there is; has one more valid tag been completed?"""
    out, before = [], 0
    for t in range(len(ids)):
        now = parse_tags(tok.decode(ids[: t + 1], clean_up_tokenization_spaces=False), cap)
        out += [(t, n) for _, _, n in now[before:]]
        before = len(now)
    return out


def sequences_with_tags(tok, cap, count):
    """-> (token ids of random texts of PIECES, what by_decoding says of each)"""
    rng, of_a_tag = random.Random(0), set("".join(PIECES))
    ids_of = {text: [i] for i, text in enumerate(token_texts(tok)) if text and set(text) <= of_a_tag}
    longest = min(20, max(map(len, ids_of)))
    sequences = [random_ids(rng, tok, ids_of, longest) for _ in range(count)]
    return sequences, [by_decoding(tok, ids, cap) for ids in sequences]


@pytest.mark.parametrize("which", ["tok", "real_tok"])
def test_the_watcher_fires_where_and_only_where_the_decoded_text_completes_a_tag(request, which):
    tok = request.getfixturevalue(which)
    sequences, expected = sequences_with_tags(tok, CAP, 500)
    assert sum(map(len, expected)) > 100  # the sequences do hold tags
    assert fired(watcher(reader(tok), tok), sequences) == expected


@pytest.mark.parametrize("text, pieces", [
    ("Then." + tag(3) + " so", "Then|.<|implicit|_th|ought|>|3|</|implicit|_th|ought|>| so"),
    ("a " + tag(3) + "\n\nSo", "a| <|implicit|_th|ought|>|3|</|implicit|_th|ought|>\n\n|So"),
    (tag(1) + tag(2), "<|implicit|_th|ought|>|1|</|implicit|_th|ought|><|"
                      "implicit|_th|ought|>|2|</|implicit|_th|ought|>")])
def test_a_token_merged_with_its_neighbour_ends_the_tag(real_tok, text, pieces):
    ids = real_tok.encode(text)
    assert [real_tok.decode([i]) for i in ids] == pieces.split("|")
    slots = insert_latents(reader(real_tok), real_tok, ids)
    ends = [slots[i - 1] for i, s in enumerate(slots) if s == LATENT and slots[i - 1] != LATENT]
    assert [">" in real_tok.decode([i]) for i in ends] == [True] * text.count(OPEN)
    assert slots.count(LATENT) == sum(n for _, _, n in parse_tags(text))


def test_latents_are_inserted_after_each_tag_of_a_finished_trace(tok):
    ids = tok.encode(f"a{tag(2)}.{tag(9)}b<eos>")
    first, second = 1 + 9, 1 + 9 + 9  # the second tag's "<" is merged into ".<"
    expected = ids[:first] + [LATENT] * 2 + ids[first:second] + [LATENT] * 5 + ids[second:]
    assert insert_latents(reader(tok), tok, ids) == expected
