"""The controls of eval.py do what their lines say and nothing else, and what people are shown is right: FLOPs
are those that torch counts, pictures show the numbers they are given, and the page of answers shows every
latent and lets no story's HTML through."""
import html
import itertools
import json
import re
import types

import pytest
import torch
from conftest import LATENTS, LIMIT, PROMPTS, ROOT, TAGS, TEXTS, close, project, same, tag, write
from test_hostile import table_of
from test_real_tasks import one_line, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import litereason
from eval import evaluate, flops, latent_of, run_controls
from lib import kv_cache
from lib.display import listed, read_out, readable, table
from lib.page import answer, number, section, whole
from lib.stats import holm
from litereason import LATENT, generate, insert_latents, load, logprobs, save
from results import plots

TASK = types.SimpleNamespace(prompt=lambda e, latent: e, reward=lambda e, text: float(len(text) % 2))
GOLD = types.SimpleNamespace(answer=lambda e: "\\boxed{ gold & co }", reward=lambda e, text: float(e))
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
        one_line("ran none", latent_of, name, model)


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


# ---------------------------------------------------------------- all controls
def test_all_controls_run_on_the_same_examples_and_without_tags_only_the_forced_answer_differs(model, tok):
    task = types.SimpleNamespace(**vars(TASK), ANSWER="answer")
    rows = run_controls(model, tok, task, PROMPTS, PROMPTS[:2], max_new_tokens=12)
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


def test_the_command_runs_them_all_and_writes_them_down(tmp_path, capsys):
    model, tokenizer = load("tiny", "cpu")
    model.projector_trained = True
    save(model, tokenizer, str(tmp_path / "m"))
    run(evaluation, "--controls", "--model", tmp_path / "m", "--n", 2, "--max-new-tokens", 24,
        "--json", tmp_path / "c")
    printed, by = capsys.readouterr().out, {row["control"]: row for row in json.load(open(tmp_path / "c"))}
    assert list(by) == [name for name, _ in evaluation.CONTROLS] and all(name in printed for name in by)
    assert by["plain"]["latent_steps"] > 0 == by["latents: none"]["latent_steps"]
    assert by["tag forbidden"]["latent_steps"] == by["tag forbidden"]["tags"] == 0
    assert by["plain"]["against_plain"]["accuracy_p"] == 1 and by["answer forced at once"]["tokens"] < 10


# ---------------------------------------------------------------- what an answer costs
def test_flops_are_those_that_torch_counts(model, tok, monkeypatch):
    """Exactly, with prompts of one length and rows that all run to the limit (nothing wasted), once the one
    difference in convention is taken off: torch counts the prompts' causal attention as the full square."""
    monkeypatch.setattr(kv_cache, "GROWS", ())  # a cache that grows looks at columns for nothing
    model = model.float()
    prompts, L = [tok.encode("the story of Karl"), tok.encode("a story of Otto !")], 17
    texts = [f"ab{tag(3)}c", "no tag", tag(5), tag(1) + tag(2)]
    # The CPU's fused attention is not in torch's books.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        got = write(model, tok, prompts, texts, limit=30, samples=2)
    assert [(r.n_latents, len(r.slots)) for r in got] == [(3, 30), (0, 30), (5, 30), (3, 30)]
    square = 2 * model.config.num_hidden_layers * 32 * (L * L - L)  # above the diagonal; H * d = D = 32
    assert counter.get_total_flops() == 4 * flops(model, got, samples=2) + 2 * square


def test_a_latent_costs_the_projector_unless_its_function_says_something_else(rollouts, model):
    latents, tokens = (sum(getattr(r, name) for r in rollouts) / 8 for name in ("n_latents", "n_tokens"))
    one = latents * sum(2 * p.numel() for p in model.reasoning_projector.parameters())
    own, feed, plain = lambda h, u, k: h, lambda h, token: h, lambda h, u, k: h
    own.flops, feed.flops = 1000, 10
    base = flops(model, rollouts, 2, "zeros")
    more = [flops(model, rollouts, 2, z) - base for z in ("projector", "none", own, plain)]
    assert more == [one, 0, latents * 1000, one]
    assert flops(model, rollouts, 2, "zeros", feed) - base == 10 * tokens


# ---------------------------------------------------------------- the table
def test_costs_stand_in_the_result_before_the_tasks_own_figures_and_the_table_shows_both(model, tok):
    task = types.SimpleNamespace(report=lambda asked, texts: {"own": 1.0, "own_ci95": [0.5, 2]}, **vars(TASK))
    r, rollouts = evaluate(model, tok, task, PROMPTS, max_new_tokens=12, alone=2)
    assert r["flops"] == flops(model, rollouts)
    assert r["seconds_each"] == r["seconds"] / 4 and r["seconds_alone"] > 0
    assert "seconds_alone" not in evaluate(model, tok, TASK, PROMPTS, max_new_tokens=12)[0]
    said = table([("a", r), ("longer", {**r, "z_size": None})], "reward")
    heading, _, *lines = said.split("\n\n")[0].splitlines()
    assert heading.startswith("| model | reward | 95 % interval | tokens |") and "accuracy" not in said
    assert lines[0].startswith(f"| a      | {r['accuracy']:.3f} |") and lines[1].startswith("| longer |")
    assert {line.count("|") for line in (heading, *lines)} == {12}
    assert said.endswith("\nlonger: own 1.000, own_ci95 0.500 to 2.000")


@pytest.mark.parametrize("words, numbers, named", [
    ((), [[0.7, 0.8, 20]], ["paper"]), (("--sampling", "greedy"), [[0.0, 1.0, 0]], ["greedy"]),
    (("--sampling", "paper", "trained"), [[0.7, 0.8, 20], [1.0, 1.0, 0]], ["paper", "trained"])])
def test_the_papers_sampling_is_the_default_and_two_stand_in_one_table_under_two_names(
        tmp_path, monkeypatch, capsys, words, numbers, named):
    seen = []
    monkeypatch.setattr(evaluation, "generate", lambda *a, **k: seen.append(k) or generate(*a, **k))
    run(evaluation, "--n", 2, "--max-new-tokens", 5, "--json", tmp_path / "r.json", *words)
    assert [[k[name] for name in ("temperature", "top_p", "top_k")] for k in seen] == numbers
    rows = json.load(open(tmp_path / "r.json"))
    rows = rows if named[1:] else [rows]
    assert [row["sampling"] for row in rows] == named
    if named[1:]:
        assert [row["name"] for row in rows] == [f"tiny ({name})" for name in named]
        assert ("paper: temperature 0.7, top-p 0.8, top-k 20; trained: temperature 1, top-p 1, top-k 0"
                in capsys.readouterr().out)


# ---------------------------------------------------------------- pictures
METHODS = {
    "base": {"accuracy": 0.76, "accuracy_ci95": [0.75, 0.78], "tokens": 135, "tokens_ci95": [131, 143]},
    "LiteReason": {"accuracy": 0.99, "accuracy_ci95": [0.98, 1.0], "tokens": 31, "tokens_ci95": [27, 39]}}


def test_pictures_show_the_numbers_they_are_given(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="only pictures need matplotlib: requirements.txt leaves it out")
    kept, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda picture, *said: kept.append(picture) or save(picture, *said))

    def drawn(draw, rows):
        """-> [the (x, y) of each line] of each panel, the legend"""
        draw(rows, str(tmp_path / "picture.svg"))
        return ([[tuple(map(list, line.get_data())) for line in panel.lines] for panel in kept[-1].axes],
                [text.get_text() for text in kept[-1].legends[0].get_texts()])

    (lines,), names = drawn(plots.curve, {name: [row] for name, row in METHODS.items()})
    assert names == list(METHODS)
    for row, up, dot, along in zip(METHODS.values(), *(lines[i::3] for i in range(3))):
        assert dot == ([row["tokens"]], [row["accuracy"]])  # with both intervals
        assert up[1] == row["accuracy_ci95"] and along[0] == row["tokens_ci95"]
    (lines,), _ = drawn(plots.curve, {
        name: [{**row, "length": n} for n in (2, 3)] for name, row in METHODS.items()})
    assert [x for x, y in lines[6::7]] == [[row["tokens"]] * 2 for row in METHODS.values()]  # its dots joined
    rows = json.load(open(f"{ROOT}/results/starts-real.json"))
    panels, _ = drawn(plots.chains, rows)
    assert len(panels) == len({row["model"] for row in rows}) and panels[0][2][1] == rows[1]["chain before"]


# ---------------------------------------------------------------- the page
HOSTILE = '<script>document.title = "x"</script><img src=x onerror="alert(1)"> & </div></details>'
ROW = {"name": "a <b>", "accuracy_ci95": [0.7, 0.9], "accuracy": 0.8, "tokens": 1234.56, "text_tokens": 2.0,
       "latent_steps": 1.0}


def read(page):
    """What a browser makes of a page: its elements and its words."""
    elements = re.findall(r"<(\w+)", page)
    closed = sorted(name for name in elements if name not in ("meta", "br"))
    assert closed == sorted(re.findall(r"</(\w+)", page))
    return elements, html.unescape(re.sub("<[^>]*>", "", page))


def test_every_latent_has_its_line_and_every_word_is_read_off_the_model(model, tok, rollouts):
    for r, latents, tags in zip(rollouts, LATENTS, TAGS):
        elements, words = read(answer(model, tok, GOLD, "", r, 1.0, 7))
        assert elements.count("details") == elements.count("summary") == 1 + tags
        assert elements.count("tr") == tags + latents
        for near, length, said in read_out(model, tok, r.latents):
            assert number(length) in words
            assert all(f"{cosine:.2f}" in words for _, cosine in near)
            assert all(f"{100 * p:.0f} %" in words for _, p in said)


def test_an_answer_is_one_line_until_it_is_unfolded(model, tok, rollouts):
    assert readable(tok, rollouts[0]) == f"ab{tag(3)}[3 latents] cd{tag(2)}[2 latents] .<eos>"
    assert readable(tok, rollouts[1]).endswith(" [cut off]")
    text = answer(model, tok, GOLD, "", rollouts[0], 0.0, 1234)
    line, _, rest = text.partition("</summary>")
    assert (read(line.partition("<summary>")[2])[1] == "1,234 ✗ wrong, gold: \\boxed{ gold & co }, "
            f"{len(rollouts[0].slots)} tokens, 2 tags, 5 latents ab{tag(3)}cd{tag(2)}.")
    assert " open" not in text and rest.index("Asked") < rest.index("Answered")
    assert ", cut off <" in answer(model, tok, GOLD, "", rollouts[1], 1.0, 1)
    graded = answer(model, tok, TASK, "", rollouts[0], 12.5, 1)
    assert "gold" not in graded and "reward 12.5," in graded
    assert [number(x) for x in (7289.7, 36.42, 0.0123, float("nan"))] == ["7,290", "36.4", "0.0123", "nan"]


def test_wrong_answers_come_first_and_are_counted_among_all(model, tok, rollouts):
    four = [rollouts[0]] * 4

    def said(n, task=GOLD, rewards=(1.0, 0.0, 1.0, 0.0)):
        page = section("said <above>", ROW, "accuracy", model, tok, task, rewards, four, rewards, n)
        return read(page)[1]

    words = said(3)
    assert words.index("2 ✗ wrong,") < words.index("\n4 ✗") < words.index("\n1 ✓") and "3 ✓" not in words
    assert words.startswith("a <b>\n✗ 2 wrong, ✓ 2 right of 4 answers. Below are 3, which are no fair")
    assert "said <above>: accuracy 0.8 (95 % interval 0.7 to 0.9); 1,235 tokens per answer" in words
    assert "Below are all of them" in said(9)
    graded = types.SimpleNamespace(reward=lambda e, text: e, MEASURE="reward")
    assert "wrong" not in (words := said(2, graded, (3.0, -1.0, 2.0, 12.0))) and "reward -1," in words


def test_a_story_with_a_script_in_it_is_words_on_the_page_and_nothing_else(model, tok):
    r, = write(model, tok, [HOSTILE], [f"{HOSTILE}{tag(2)} {HOSTILE}<eos>"], limit=400)
    task = types.SimpleNamespace(answer=lambda e: HOSTILE, reward=lambda e, text: 0.0)
    row = {**ROW, "name": HOSTILE}
    page = whole([section(HOSTILE, row, "accuracy", model, tok, task, [HOSTILE], [r], [0.0], 1)])
    elements, words = read(page)
    # Name, line above, gold answer, the answer's first words, what was asked, twice in the answer.
    assert words.count(HOSTILE) == 7
    assert not {"script", "img", "link", "iframe"} & set(elements)
    assert not re.search(r"<[^>]*\s(src|href|on\w+)=", page)
    # Nothing is fetched, nothing is run.
    assert "url(" not in page and "@import" not in page and "default-src 'none'" in page


def test_the_command_writes_the_page_and_prints_the_table_or_says_what_is_wrong(tmp_path, capsys):
    run(evaluation, "--n", 4, "--show", 3, "--max-new-tokens", 60, "--html", tmp_path / "a.html")
    elements, words = read((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert elements.count("article") == 3 and "tiny, test split, 4 examples, temperature 0.7" in words
    said = capsys.readouterr().out
    assert ">>>" not in said and "| tiny |" in said
    for flags, says in ((("--controls", "--latent", "zeros"), "--controls"), (("--hops", 9), "from 2 to 7"),
                        (("--html", "x.html"), "--html needs --show"), (("--n", 0), "--n is 0")):
        one_line(says, run, evaluation, *flags)
