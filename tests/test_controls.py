"""The controls of eval.py do what their lines say and nothing else, and the paired tests agree with examples
worked out by hand."""
import itertools
import json
import math
import types

import pytest
import torch
from conftest import LIMIT, PROMPTS, TEXTS, close, project, same, tag, write
from test_hostile import table_of

import eval as evaluation
import litereason
from eval import latent_of, run_controls
from lib.stats import against, bootstrap, holm
from litereason import LATENT, UserError, generate, insert_latents, load, logprobs, save
from lib.display import listed, read_out, table

OTHERS = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
          for n in (2, 7, 1, 4)]


def decoded(model, tok, name="projector", seed=0, **settings):
    """The rows of TEXTS with the latent step of that name."""
    latent = latent_of(name, model, OTHERS, seed)
    return write(model, tok, PROMPTS, TEXTS, LIMIT, samples=2, latent=latent, **settings)


# ---------------------------------------------------------------- what a latent step feeds
@pytest.mark.parametrize("name", ["zeros", "noise", "mean", "shuffled", "warm"])
def test_a_control_changes_what_a_latent_is_and_nothing_of_where_it_stands_in_any_batch(
        model, tok, rollouts, name):
    rows = decoded(model, tok, name)
    for a, b in zip(rows, decoded(model, tok, name, gen_batch_size=3), strict=True):
        same(a, b)
    for r, plain, row, mask in zip(rows, rollouts, *logprobs(model, rows)):
        assert r.slots == plain.slots and r.text == plain.text  # the texts are scripted
        close(row[mask], r.logprobs[r.logprobs != 0])  # decoding as usual: scored, it has the same log-probs
        assert not r.n_latents or (r.latents - plain.latents).abs().max() > 1e-3


def test_noise_has_the_projectors_length_and_a_direction_of_its_own_and_warm_is_the_last_mlp_again(
        model, tok):
    h = z = torch.randn(200, 32, dtype=torch.float64)
    u, k = torch.rand(200, dtype=torch.float64), torch.arange(200) % 5
    noise, made = latent_of("noise", model, seed=1)(h, u, k), project(model, h)
    close(noise.norm(dim=-1), made.norm(dim=-1))
    cosines = torch.nn.functional.cosine_similarity(noise, made, dim=-1)
    assert abs(cosines.mean()) < 0.05 and cosines.abs().max() < 0.8  # of 32 dimensions: 0.18 is typical
    block = torch.nn.functional.normalize(decoded(model, tok, "noise")[2].latents, dim=-1)
    assert (block @ block.T - torch.eye(10)).max() < 0.9  # ten latents of one row
    for _ in range(3):
        z = model.model.layers[-1].mlp(z)
    close(latent_of("warm", model)(h), z)


def test_mean_is_the_mean_of_all_latents_and_shuffled_those_of_one_story_in_their_order(model, tok):
    for r in decoded(model, tok, "mean"):
        close(r.latents, torch.cat(OTHERS).mean(0).expand_as(r.latents))
    found = set()
    for seed in range(4):
        for r in decoded(model, tok, "shuffled", seed=seed):
            if r.n_latents:
                story, = [i for i, z in enumerate(OTHERS) if torch.equal(z[0], r.latents[0])]
                close(r.latents, OTHERS[story].repeat(10, 1)[: r.n_latents])
                found.add(story)
    assert found == {0, 1, 2, 3}
    for name in ("mean", "shuffled"):
        with pytest.raises(UserError, match="ran none"):
            latent_of(name, model)


@pytest.mark.parametrize("k", [0, 1, 8])
def test_every_tag_runs_k_latents_whatever_it_says_the_cap_or_the_text(model, tok, k):
    for r, text in zip(decoded(model, tok, tag=k), TEXTS):
        filler = [] if text.endswith("<eos>") else tok.encode("x") * LIMIT
        plain = insert_latents(model, tok, tok.encode(text) + filler)
        slots = []
        for is_latent, block in itertools.groupby(plain, LATENT.__eq__):
            slots += [LATENT] * k if is_latent else list(block)
        assert r.slots == slots[:LIMIT] and len(r.latents) == r.slots.count(LATENT)
    # k as the tags say it: the plain run
    same(*(write(model, tok, ["abc"], [f"a{tag(3)}b{tag(3)}c<eos>"], tag=k)[0] for k in (None, 3)))


@pytest.mark.parametrize("text, without", [
    (f"ab{tag(3)}c", ["implicit_"]), (f"a<{tag(2)}", ["implicit_"]),
    ("a <b> < i </p> <i>implicit_thought 3>", []), (f".{tag(1)}><imp", ["implicit_", "m"])])
def test_forbidden_lets_no_tag_begin_and_leaves_all_other_text_alone(model, tok, monkeypatch, text, without):
    banned, script, x = [], iter(tok.encode(text)), tok.encode("x")[0]

    def sample(logits, *_):
        """Writes the text, but x where a token is not allowed."""
        token = next(script, x)
        if logits[0, token] == -torch.inf:
            banned.append(tok.decode([token]))
            token = x
        return torch.tensor([token]), logits.log_softmax(-1)[:, token]

    monkeypatch.setattr(litereason, "sample", sample)
    r, = generate(model, tok, ["abc"], max_new_tokens=LIMIT, tag="forbidden")
    assert r.n_latents == 0 and banned == without and "<im" not in r.text
    assert without or r.text.startswith(text)


def test_a_vocabulary_of_whole_words_and_the_real_one_are_covered(real_tok):
    tiny = litereason.load("tiny", "cpu")[1]
    watch = table_of(tiny)
    starts = watch.starts[watch.classes, 0].nonzero()[:, 0]
    assert [tiny.decode([i]) for i in starts] == ["<implicit_thought>"]
    watch = table_of(real_tok)
    after, _ = watch.step(torch.tensor([0]), torch.tensor(real_tok.encode("<")))
    # No token of Qwen2 begins with "<im" and continues like the tag.
    assert not watch.starts[watch.classes, 0].any()
    starts = {real_tok.decode([i]) for i in watch.starts[watch.classes, after].nonzero()[:, 0]}
    assert starts == {"im", "imp", "impl", "implicit"}


# ---------------------------------------------------------------- the paired tests
def test_the_paired_tests_agree_with_the_textbook_and_with_examples_by_hand():
    d = [1.0] * 30 + [0.0] * 60 + [-1.0] * 10
    half = 1.96 * math.sqrt(sum((x - 0.2) ** 2 for x in d)) / len(d)
    low, high = bootstrap(d)
    assert abs(low - (0.2 - half)) < 0.02 and abs(high - (0.2 + half)) < 0.02
    assert bootstrap(d) == [low, high] and bootstrap([0.5] * 7) == [0.5, 0.5]  # it is seeded
    got = against({"per_example": {"score": [1, 0, 1], "tokens": [9, 9, 9]}},
                  {"per_example": {"score": [0, 0, 0], "tokens": [10, 11, 12]}})
    assert [got[key] for key in ("accuracy", "accuracy_p")] == [2 / 3, 0.5]
    assert (got["tokens"], got["tokens_p"]) == (-2, 0.25)  # 2 of the 8 ways to set 3 signs


# ---------------------------------------------------------------- all of them
TASK = types.SimpleNamespace(prompt=lambda e, latent: e, reward=lambda e, text: float(len(text) % 2),
                             ANSWER="answer")


def test_all_controls_run_on_the_same_examples_and_without_tags_only_the_forced_answer_differs(model, tok):
    rows = run_controls(model, tok, TASK, PROMPTS, PROMPTS[:2], max_new_tokens=12)
    without = ("latents: mean", "latents: shuffled")  # nothing to take them from
    assert [name for name, _ in rows] == [n for n, _ in evaluation.CONTROLS if n not in without]
    for name, r in rows:
        d, scores, tokens = r["against_plain"], r["per_example"]["score"], r["per_example"]["tokens"]
        assert len(scores) == len(tokens) == r["n_examples"] == 4
        assert sum(scores) / 4 == r["accuracy"] and sum(tokens) / 4 == r["tokens"]
        if name != "answer forced at once":
            assert d["accuracy"] == 0 and d["accuracy_p"] == 1 and d["tokens_ci95"] == [0, 0]
            assert name == "plain" or not (d["accuracy_differs"] or d["tokens_differs"])
    tests, corrected = ([row["against_plain"][f"{what}_{which}"] for _, row in rows[1:]
                         for what in ("accuracy", "tokens")] for which in ("p", "holm"))
    assert corrected == holm(tests)
    said = table(rows)
    lines = said.split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len(rows) and {line.count("|") for line in lines} == {16}
    assert f"corrected for all {len(tests)} tests" in said and "| nothing |" in said
    assert table(rows, "reward") == said.replace("accuracy", "reward")


def test_the_nearest_words_of_an_embedding_are_that_word_first_and_what_the_head_says_of_it(model, tok):
    z = model.get_input_embeddings().weight[tok.encode("q")].detach()
    (words, length, said), = read_out(model, tok, z)
    assert listed(words).startswith("'q' 1.00, ") and 0.3 < length < 3 and len(said) == 3
    best = model.lm_head(model.model.norm(z)).softmax(-1).max(-1)
    assert said[0][0] == tok.decode(best.indices) and said[0][1] == pytest.approx(best.values.item(), 1e-4)


def test_the_command_runs_them_all_and_writes_them_down(tmp_path, monkeypatch, capsys):
    model, tokenizer = load("tiny", "cpu")
    model.projector_trained = True
    save(model, tokenizer, str(tmp_path / "m"))
    words = f"eval.py --controls --model {tmp_path}/m --n 2 --max-new-tokens 24 --json {tmp_path}/c"
    monkeypatch.setattr("sys.argv", words.split())
    evaluation.main()
    printed, by = capsys.readouterr().out, {row["control"]: row for row in json.load(open(tmp_path / "c"))}
    assert list(by) == [name for name, _ in evaluation.CONTROLS] and all(name in printed for name in by)
    assert by["plain"]["latent_steps"] > 0 == by["latents: none"]["latent_steps"]
    assert by["tag forbidden"]["latent_steps"] == by["tag forbidden"]["tags"] == 0
    assert by["plain"]["against_plain"]["accuracy_p"] == 1 and by["answer forced at once"]["tokens"] < 10
