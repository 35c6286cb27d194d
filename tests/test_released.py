"""With --tag-rule released tags fire where the released plugin's do: by token ids, not by text."""
import random

import pytest
from conftest import random_qwen2, tag, with_projector, write
from test_tag import PIECES, fired, random_ids

import released
from litereason import CLOSE, LATENT, OPEN, UserError, attach, insert_latents, load, save, tag_table
from lib.checkpoint import token_texts


def by_searching(tok, ids, cap=5):
    """The rule, slowly, from its description: from left to right look for an opening, 1 to 3 tokens that
    say a number above 0, a closing; go on behind it, else one token further."""
    starts, ends = released.patterns(tok, OPEN, CLOSE)
    out, i = [], 0
    while i < len(ids):
        end = None
        for start in [start for start in starts if tuple(ids[i : i + len(start)]) == start]:
            for gap in (1, 2, 3):
                a = i + len(start)
                pieces = tok.batch_decode([[token] for token in ids[a : a + gap]])
                said = "".join(pieces).strip()  # a digit in pieces of bytes is none
                if not said.isdecimal() or int(said) < 1:
                    continue
                for close in sorted(ends, key=len):
                    b = a + gap + len(close)
                    if end is None and tuple(ids[a + gap : b]) == close:
                        end = b
                        out.append((b - 1, min(int(said), cap)))
        i = end or i + 1
    return out


def searched_and_fired(tok, table, cap, count):
    rng = random.Random(1)
    ids_of = {text: [i] for i, text in enumerate(token_texts(tok))
              if text and set(text) <= set("".join(PIECES))}
    longest = min(20, max(map(len, ids_of)))
    sequences = [random_ids(rng, tok, ids_of, longest) for _ in range(count)]
    expected = [by_searching(tok, s, cap) for s in sequences]
    assert sum(map(len, expected)) > count / 10  # the sequences do hold tags
    return expected, fired(table, sequences)


@pytest.mark.parametrize("cap", [5, 13])
def test_a_row_fires_where_a_search_for_the_patterns_finds_a_tag(tok, cap):
    table = released.tag_table(tok, OPEN, CLOSE, cap, len(tok) + 3, "cpu")
    expected, found = searched_and_fired(tok, table, cap, 300)
    assert found == expected


def test_with_real_qwens_tokens_too(real_tok, rules):
    expected, found = searched_and_fired(real_tok, rules["released"], 5, 400)
    assert found == expected


def test_a_tokenizer_that_the_plugin_refuses_is_refused(tok, monkeypatch):
    monkeypatch.setattr(released, "MOST", 10)
    with pytest.raises(UserError, match="cuts a tag into up to 13 tokens, and the released plugin takes no "
                                        "more than 10"):
        released.tag_table(tok, OPEN, CLOSE, 5, len(tok), "cpu")


def test_of_qwens_tokens_it_knows_14_that_open_and_9_that_close(real_tok):
    # The released code's own lists were counted: these are their lengths.
    starts, ends = released.patterns(real_tok, OPEN, CLOSE)
    assert len({ids[0] for ids in starts}) == len(starts) == 14
    assert len({ids[-1] for ids in ends}) == len(ends) == 9


@pytest.fixture(scope="module")
def rules(real_tok):
    return {"text": tag_table(real_tok, 5, 151936, "cpu"),
            "released": released.tag_table(real_tok, OPEN, CLOSE, 5, 151936, "cpu")}


@pytest.mark.parametrize("text, ours, theirs", [
    (f"a {tag(3)} b", 1, 1), (f"a.{tag(3)}\n\nb", 1, 1), (f"({tag(3)}, b", 1, 1),
    (tag(12), 1, 1), (tag(999), 1, 1),
    # only here
    (f"a ({tag(3)} b", 1, 0), (f'a "{tag(3)} b', 1, 0), (f"a{tag(3)}) b", 1, 0), (f"a {tag(3)}: b", 1, 0),
    (f"a {tag(3)}; b", 1, 0), (f"a {tag(3)}.\n", 1, 0), (f"a {tag(3)},\n", 1, 0),
    (f"a {tag(3)}\\boxed{{Yes}}", 1, 0),
    (f"`{tag(3)}`", 1, 0), (tag(" 3 "), 1, 0), (tag(1000), 1, 0), (tag(2) + tag(3), 2, 1),
    # only there
    (f"{OPEN}{tag(3)}", 0, 1), (f"{OPEN}{OPEN} {tag(3)}", 0, 1),
    # neither; of an Arabic digit, which is two tokens of bytes, the released code makes a number
    (tag("٣"), 0, 0),
    (tag(0), 0, 0), (tag("²"), 0, 0), (tag("three"), 0, 0), (tag(""), 0, 0), (f"{OPEN}3", 0, 0),
])
def test_where_the_two_rules_differ(real_tok, rules, text, ours, theirs):
    ids = real_tok.encode(text)
    assert len(fired(rules["text"], [ids])[0]) == ours
    assert fired(rules["released"], [ids])[0] == by_searching(real_tok, ids)
    assert len(fired(rules["released"], [ids])[0]) == theirs


# ---------------------------------------------------------------- the rule in a model
def test_decoding_and_finished_traces_follow_the_models_rule(model, tok):
    text = f"a{OPEN}{tag(3)}b{tag('  2')}<eos>"  # nested, and a number of three tokens
    by_text = insert_latents(model, tok, tok.encode(text))
    model.config.litereason_tag_rule = "released"
    slots = insert_latents(model, tok, tok.encode(text))
    assert (by_text.count(LATENT), slots.count(LATENT)) == (2, 5)
    [rollout] = write(model, tok, ["abc"], [text], limit=60)
    assert rollout.slots == slots and rollout.n_tags == 2


def test_with_the_released_rule_no_tag_can_start_where_tags_are_forbidden(model, tok):
    table = released.tag_table(tok, OPEN, CLOSE, 5, len(tok) + 3, "cpu")
    ids = tok.encode(f"a.{tag(3)}")
    state, starts = 0, []
    _, next_state, _ = table.as_lists
    for token in ids:
        kind = int(table.classes[token])
        starts.append(bool(table.starts[kind, state]))
        state = next_state[kind][state]
    assert starts == [False, False] + [True] * (len(ids) - 2)  # "a" and ".<" may stand in any text


def test_the_rule_goes_with_the_checkpoint(tok, tmp_path):
    model = with_projector(random_qwen2(len(tok) + 3, tok.eos_token_id))
    model.config.litereason_tag_rule = "released"
    save(model, tok, tmp_path / "model")
    again, _ = load(tmp_path / "model", "cpu")
    assert again.config.litereason_tag_rule == "released"
    again.config.litereason_tag_rule = "theirs"
    with pytest.raises(UserError, match="litereason_tag_rule is 'theirs', expected text or released"):
        attach(again)


def test_all_files_of_a_checkpoint_can_be_read_by_the_same_people(model, tok, tmp_path):
    save(model, tok, tmp_path / "model")
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1
