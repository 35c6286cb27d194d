"""What a tag is, and that decoding notices it exactly when the policy's own text completes one (Sec. 3.1).
The mixed decoding loop gives what the definition gives, and the scorer agrees with it up to rounding.

The rows are in conftest.py (TEXTS): several tags, adjacent tags, tags cut by the limit, early ends.
"""
import random

import pytest
import torch
from conftest import LATENTS, LIMIT, PROMPTS, TAGS, TEXTS, close, naive, reader, same, scripted, tag, write

from data import improvement, perplexity
from lib import checkpoint
from lib.checkpoint import token_texts
from litereason import (CAP, CLOSE, LATENT, OPEN, UserError, generate, insert_latents, load, logprobs,
                        naive_generate, parse_tags, sample, watcher)


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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- what is decoded
def test_every_row_holds_its_text_with_n_latents_after_each_tag_and_they_count_toward_the_limit(
        model, tok, rollouts):
    for r, text in zip(rollouts, TEXTS):
        ids = tok.encode(text) + tok.encode("x") * LIMIT * (not text.endswith("<eos>"))
        assert r.slots == insert_latents(model, tok, ids)[:LIMIT]
        assert r.finished == text.endswith("<eos>") == (len(r.slots) < LIMIT)
        assert r.text == tok.decode([s for s in r.slots if s not in (LATENT, tok.eos_token_id)])
        assert len(r.slots) == r.n_tokens + r.n_latents == len(r.logprobs)
        assert all((logp == 0) == (s == LATENT) for logp, s in zip(r.logprobs, r.slots))
    assert [r.n_latents for r in rollouts] == LATENTS == [len(r.latents) for r in rollouts]
    assert [r.n_tags for r in rollouts] == TAGS
    assert [r.prompt for r in rollouts] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_definition_decodes_the_same_rollouts_one_row_and_one_prefix_at_a_time(model, tok, rollouts):
    with scripted(tok, TEXTS, LIMIT) as draws:
        for row, r in zip(draws, rollouts, strict=True):
            same(naive_generate(model, tok, r.prompt_ids, row), r)


@pytest.mark.parametrize("rows, settings", [(1, {}), (5, {"temperature": 0.7}),
                                            (512, {"temperature": 0.9, "top_k": 20, "top_p": 0.8})])
def test_the_seed_alone_decides_what_is_sampled_and_as_in_the_definition(model, tok, rows, settings):
    """Not the batch size: each row has its own draws."""
    draws = torch.rand(8, 25, generator=seeded(7), dtype=torch.float64)
    fast = generate(model, tok, PROMPTS, 2, 25, generator=seeded(7), gen_batch_size=rows, **settings)
    for row, r in zip(draws, fast, strict=True):
        same(naive_generate(model, tok, r.prompt_ids, row, **settings), r)


# ---------------------------------------------------------------- decoding = scoring
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scoring_gives_the_log_probs_of_sampling_in_any_batch(model, tok, temperature):
    rollouts = write(model, tok, PROMPTS, TEXTS, LIMIT, samples=2, temperature=temperature)
    for choice in (range(8), [0], [5, 0], [7, 3, 3, 0, 6]):
        rows = [rollouts[i] for i in choice]
        for row, mask, r in zip(*logprobs(model, rows, temperature), rows, strict=True):
            close(row[: len(r.slots)], r.logprobs)
            assert mask.tolist() == [s != LATENT for s in r.slots] + [False] * (len(mask) - len(r.slots))
            assert not row[~mask].any()
    # If latents did not matter, most of this file would prove nothing.
    zeros = write(model, tok, PROMPTS, TEXTS, LIMIT, samples=2, temperature=temperature, latent="zeros")
    assert len(zeros[0].latents) == 5 and not zeros[0].latents.any()
    assert (zeros[0].logprobs[-2:] - rollouts[0].logprobs[-2:]).abs().min() > 1e-3
    assert (rollouts[0].latents[0] - rollouts[0].latents[1]).abs().max() > 1e-2


def test_perplexity_is_that_of_the_plain_model_and_no_tag_fires(model, tok):
    texts = ["a chapter", f"with a {tag(3)} in it", "z"]
    for rows in (2, 64):
        ours = perplexity(model, tok, PROMPTS[:3], texts, rows)
        for context, text, found in zip(PROMPTS[:3], texts, ours, strict=True):
            a, b = tok.encode(context), tok.encode(text)
            logp = model(torch.tensor([a + b])).logits[0, len(a) - 1 : -1].log_softmax(-1)
            expected = (-logp[torch.arange(len(b)), b].mean()).exp()
            assert abs(found / expected - 1) < 1e-6
    assert improvement(8.0, 6.0) == 25.0


# ---------------------------------------------------------------- what does not fire
def test_without_tags_greedy_decoding_is_that_of_transformers(model, tok):
    for r in generate(model, tok, PROMPTS, max_new_tokens=25, temperature=0):
        ids = torch.tensor([r.prompt_ids])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25,
                                pad_token_id=0)
        assert r.slots == theirs[0, ids.shape[1]:].tolist()


def test_latent_none_leaves_tags_as_text_and_never_runs_the_projector(model, tok, monkeypatch):
    monkeypatch.setattr(model.reasoning_projector, "forward", lambda h: pytest.fail("the projector ran"))
    for r, text in zip(write(model, tok, PROMPTS, TEXTS, LIMIT, samples=2, latent="none"), TEXTS):
        ids = tok.encode(text)[:LIMIT]
        assert r.slots[: len(ids)] == ids and r.n_latents == r.n_tags == 0
        # the plain base model
        logits = model(torch.tensor([r.prompt_ids + r.slots])).logits[0, len(r.prompt_ids) - 1 : -1]
        close(r.logprobs, logits.log_softmax(-1).gather(-1, torch.tensor(r.slots)[:, None])[:, 0].detach())


def test_a_checkpoint_has_its_own_cap(model, tok):
    model.config.litereason_max_reasoning_steps = 7
    r, = write(model, tok, ["abc"], [f"{tag(6)}a{tag(8)}<eos>"])
    assert r.n_latents == 6 + 7


def test_nothing_leaks_from_the_generation_config_but_the_stop_ids(model, tok):
    before = generate(model, tok, PROMPTS, 2, 20, generator=seeded(0))
    model.generation_config.update(temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=9.0,
                                   max_new_tokens=2, no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7])
    for a, b in zip(generate(model, tok, PROMPTS, 2, 20, generator=seeded(0)), before):
        same(a, b)
    model.generation_config.eos_token_id = [tok.encode("q")[0], tok.eos_token_id]
    r, = write(model, tok, ["abc"], ["abqcd"])
    assert (r.slots, r.finished, r.text) == (tok.encode("abq"), True, "ab")


# ---------------------------------------------------------------- cost
def test_the_prompt_of_a_group_is_read_once_and_a_slot_costs_one_position(model, tok, forwards):
    stats = {}
    rows = write(model, tok, PROMPTS, TEXTS, LIMIT, samples=2, stats=stats)
    assert forwards[0] == (4, max(len(r.prompt_ids) for r in rows)) and {s for _, s in forwards[1:]} == {1}
    decoded = sum(n for n, _ in forwards[1:])
    assert stats["positions"] == sum(len(r.prompt_ids) for r in rows[::2]) + decoded
    needed = sum(len(r.slots) - 1 for r in rows)  # nothing is predicted from a row's last slot
    assert needed <= decoded <= needed + 0.25 * LIMIT * len(rows)  # rows that ended leave soon
    scored = []  # shapes: one pass for prompts and rows, without any padding
    model.model.register_forward_pre_hook(
        lambda *args: scored.append(args[2]["inputs_embeds"].shape[:2]), with_kwargs=True)
    logprobs(model, rows)
    assert scored == [(1, sum(len(r.prompt_ids) for r in rows[::2]) + sum(len(r.slots) for r in rows))]


# ---------------------------------------------------------------- sampling
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9, -3.0, 1.9, 0.0, 0.5, -0.2])


def wanted(temperature, top_k, top_p):
    """The distribution by hand: the most probable first, cut after top_k of them or once top_p is reached."""
    p = (LOGITS.double() / temperature).softmax(-1)
    p[p.argsort(descending=True)[top_k or len(p) :]] = 0
    ranked = (p / p.sum()).sort(descending=True)
    p[ranked.indices[ranked.values.cumsum(0) - ranked.values >= top_p]] = 0
    return (p / p.sum()).tolist()


@pytest.mark.parametrize("temperature, top_k, top_p", [(1, 0, 1), (0.6, 0, 1), (1, 4, 1), (1, 0, 0.7),
                                                       (1.5, 6, 0.8), (1, 0, 0.01)])
def test_sampling_follows_temperature_top_k_and_top_p(temperature, top_k, top_p):
    n, p = 20000, wanted(temperature, top_k, top_p)
    token, logp = sample(LOGITS.repeat(n, 1), torch.rand(n, generator=seeded(0), dtype=torch.float64),
                         temperature, top_k, top_p)
    count = torch.bincount(token, minlength=len(p)).tolist()
    assert all(c == 0 for c, q in zip(count, p) if q == 0), "a token outside the cut"
    chi_square = sum((c - n * q) ** 2 / (n * q) for c, q in zip(count, p) if q)
    assert chi_square < 28  # 9 degrees of freedom: exceeded once in a thousand seeds
    close(logp, (LOGITS / temperature).log_softmax(-1)[token], 1e-6)  # of the uncut distribution
    greedy, _ = sample(LOGITS.repeat(3, 1), torch.tensor([0.0, 0.5, 0.999]), 0, top_k, top_p)
    assert greedy.tolist() == [1, 1, 1]


@pytest.mark.parametrize("settings", [{"top_k": 20, "top_p": 0.8}, {"top_k": 10**6}, {"tag": "forbidden"}],
                         ids=str)
def test_an_id_that_is_no_word_is_neither_sampled_nor_has_a_share_in_what_is_scored(model, tok, settings):
    """Real matrices are larger than the vocabulary (conftest's by 3 rows), and the rows are not trained."""
    V, weight = len(tok), model.lm_head.weight
    with torch.no_grad():
        weight[V:] = 20 * weight[5]  # without the mask they would be common
    fast = generate(model, tok, PROMPTS, 2, max_new_tokens=30, generator=seeded(0), **settings)
    assert all(s < V for r in fast for s in r.slots)
    if settings.get("tag") != "forbidden":
        for row, r in zip(torch.rand(8, 30, generator=seeded(0), dtype=torch.float64), fast):
            same(naive_generate(model, tok, r.prompt_ids, row, **settings), r)
    # Scored alike, and as if the matrix had no such rows; gradients, too.
    logp, scored = logprobs(model, fast[:2])
    h, _, slow = map(torch.cat, zip(*(naive(model, r.prompt_ids, r.slots) for r in fast[:2])))
    close(logp[scored], slow)
    words = torch.tensor([s for r in fast[:2] for s in r.slots])
    close(slow, (h @ weight[:V].T).log_softmax(-1)[torch.arange(len(words)), words])
    for a, b in zip(*(torch.autograd.grad(x.sum(), [weight, model.model.embed_tokens.weight])
                      for x in (logp, slow)), strict=True):
        close(a, b)
        assert (a[V:] == 0).all()


def test_no_words_are_what_neither_the_tokenizer_nor_the_stop_ids_know(model, tok, tmp_path):
    V = len(tok)
    assert model.lm_head.no_words.tolist() == [V, V + 1, V + 2]
    model.generation_config.eos_token_id = [0, V + 1]
    checkpoint.save(model, tok, tmp_path / "m")
    assert load(tmp_path / "m", "cpu")[0].lm_head.no_words.tolist() == [V, V + 2]
    assert "lm_head.no_words" not in model.state_dict()  # a checkpoint is as it was


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_no_draw_however_close_to_0_or_1_gives_a_token_outside_the_cut(dtype):
    logits = torch.cat([torch.tensor([-40.0]), LOGITS, torch.tensor([-torch.inf])]).to(dtype)
    u = torch.tensor([0.0, 1e-300, 1 - 2**-24, 1 - 2**-30, 1 - 2**-53], dtype=torch.float64)
    for top_k, top_p, allowed in ((3, 1.0, {2, 7, 4}), (0, 0.5, {2, 7, 4}), (0, 1.0, set(range(11)))):
        token, logp = sample(logits.repeat(len(u), 1), u, 1.0, top_k, top_p)
        assert set(token.tolist()) <= allowed and logp.isfinite().all()


# ---------------------------------------------------------------- the edges
@pytest.mark.parametrize("prompts, message", [([""], "prompt 0 is empty"), (["abc", []], "prompt 1 is empty"),
                                              (["ab", "z" * 490], "prompt 1 has 490 tokens")])
def test_a_prompt_that_is_empty_or_too_long_is_refused_in_one_line(model, tok, prompts, message):
    with pytest.raises(UserError, match=message) as e:
        generate(model, tok, prompts, max_new_tokens=40)
    assert "\n" not in str(e.value)
    just_fits, = generate(model, tok, [tok.encode("z" * 508)], max_new_tokens=4, temperature=0)
    assert len(just_fits.slots) == 4
