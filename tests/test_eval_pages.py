"""What people are shown is right: FLOPs are those that torch counts, pictures show the numbers they are
given, and the page of answers shows every latent and lets no story's HTML through."""
import html
import json
import re
import types

import pytest
from conftest import LATENTS, PROMPTS, ROOT, TAGS, tag, write
from test_real_tasks import one_line, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
from eval import evaluate, flops, generate as generate_of_eval
from lib import kv_cache
from lib.display import read_out, readable, table
from lib.page import answer, number, section, whole

from results import plots

TASK = types.SimpleNamespace(prompt=lambda e, latent: e, reward=lambda e, text: float(len(text) % 2))
GOLD = types.SimpleNamespace(answer=lambda e: "\\boxed{ gold & co }", reward=lambda e, text: float(e))


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
    monkeypatch.setattr(evaluation, "generate", lambda *a, **k: seen.append(k) or generate_of_eval(*a, **k))
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
