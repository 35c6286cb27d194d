"""What people are shown is right: FLOPs are those that torch counts, curves show the numbers of the files,
and the page of answers shows every latent and lets no story's HTML through."""
import html.parser
import importlib
import json
import sys
import types

import pytest
from conftest import LATENTS, PROMPTS, TAGS, tag, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import engine
import eval as evaluation
import report
from eval import evaluate, flops, generate as evaluation_generate
from litereason import UserError
from report import answer_on_page, page, pieces, read_out, readable

TASK = types.SimpleNamespace(prompt=lambda e, latent: e, reward=lambda e, text: float(len(text) % 2))


# ---------------------------------------------------------------- what an answer costs
def test_flops_are_those_that_torch_counts(model, tok, monkeypatch):
    """Exactly, with prompts of one length and rows that all run to the limit (nothing wasted), once the one
    difference in convention is taken off: torch counts the prompts' causal attention as the full square."""
    monkeypatch.setattr(engine, "GROWS", ())  # a cache that grows looks at columns for nothing
    model = model.float()
    prompts, limit = [tok.encode("the story of Karl"), tok.encode("a story of Otto !")], 30
    assert len(prompts[0]) == len(prompts[1]) > 10
    texts = [f"ab{tag(3)}c", "no tag", tag(5), tag(1) + tag(2)]
    # The CPU's fused attention is not in torch's books.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        got = write(model, tok, prompts, texts, limit, samples=2)
    assert [r.n_latents for r in got] == [3, 0, 5, 3] and all(len(r.slots) == limit for r in got)
    L, config = len(prompts[0]), model.config
    above_the_diagonal = L * L - L
    square = 2 * config.num_hidden_layers * config.hidden_size * above_the_diagonal  # H * d = D here
    ours = 4 * flops(model, got, samples=2) + 2 * square
    assert counter.get_total_flops() == ours


def test_a_latent_costs_the_projector_unless_its_function_says_something_else(rollouts, model):
    one = sum(2 * p.numel() for p in model.reasoning_projector.parameters())
    latents = sum(r.n_latents for r in rollouts) / len(rollouts)
    tokens = sum(r.n_tokens for r in rollouts) / len(rollouts)
    own = lambda h, u, k: h
    own.flops = 1000
    base = flops(model, rollouts, 2, "zeros")
    more = [flops(model, rollouts, 2, z) - base for z in ("projector", "none", own, lambda h, u, k: h)]
    assert more == [latents * one, 0, latents * 1000, latents * one]
    feed = lambda h, token: h
    feed.flops = 10
    assert flops(model, rollouts, 2, "zeros", feed) - base == 10 * tokens


def test_costs_stand_in_the_result_before_the_tasks_own_figures(model, tok):
    task = types.SimpleNamespace(report=lambda asked, texts: {"own": 1.0}, **vars(TASK))
    r, rollouts = evaluate(model, tok, task, PROMPTS, max_new_tokens=12, alone=2)
    assert r["flops"] == flops(model, rollouts)
    assert r["seconds_each"] == r["seconds"] / 4 and r["seconds_alone"] > 0
    assert list(r)[-2:] == ["seconds", "own"]  # `table` reads what comes after the seconds as the task's own
    assert "seconds_alone" not in evaluate(model, tok, TASK, PROMPTS, max_new_tokens=12)[0]


# ---------------------------------------------------------------- pictures
ROW = {"accuracy": 0.8, "accuracy_ci95": [0.7, 0.9], "tokens": 100.0, "text_tokens": 90.0, "latent_steps": 10.0,
       "seconds": 5.0, "n_examples": 50, "samples": 1, "forward_positions": 200.0}


def results(tmp_path):
    """Three files of the three shapes that --json, train_rl.py and --collect --json write."""
    one = {"model": "out/rl", **ROW, "flops": 3e8, "seconds_alone": 0.2}
    many = [{"model": "base", **ROW, "accuracy": a, "tokens": 130.0} for a in (0.6, 0.7)]
    named = {"collected": {**ROW, "runs": 3, "spread": [0.5, 0.95], "tokens": 101.0}}
    for name, value in (("one", one), ("many", many), ("named", named)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return [str(tmp_path / f"{name}.json") for name in ("one", "many", "named")]


def test_results_of_every_shape_are_read_and_runs_of_one_name_averaged(tmp_path):
    rows = dict(report.collect(results(tmp_path)))
    assert list(rows) == ["out/rl", "base", "collected"]
    assert rows["base"]["runs"] == 2 and rows["base"]["spread"] == [0.6, 0.7]
    assert rows["base"]["accuracy"] == pytest.approx(0.65)
    assert rows["collected"]["runs"] == 3 and rows["collected"]["spread"] == [0.5, 0.95]
    assert rows["out/rl"]["flops"] == 3e8


def main(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    evaluation.main()


@pytest.mark.parametrize("words", [("--curve", "one.json"), ("--training", "run")])
def test_without_matplotlib_one_line_says_how_to_get_it(words, tmp_path, monkeypatch):
    results(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install matplotlib") as e:
        main(monkeypatch, *words)
    assert "\n" not in str(e.value)


def test_nothing_else_needs_matplotlib(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.json").write_text(json.dumps([{"tags": 1.0, "truncated": 0.0, "model": "m", **ROW}]))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    for name in ("eval", "report"):
        monkeypatch.delitem(sys.modules, name)  # imported again, without it
    monkeypatch.setattr("sys.argv", ["eval.py", "--collect", str(tmp_path / "one.json")])
    importlib.import_module("eval").main()
    assert sys.modules["eval"] is not evaluation and "| m" in capsys.readouterr().out


def needs_matplotlib():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements.txt leaves it out: "
                        "only the curves need it)")


def drawn(monkeypatch, *words):
    """main() of --curve or --training -> the figure of matplotlib that was saved."""
    needs_matplotlib()
    kept, save = [], report.save_figure
    monkeypatch.setattr(report, "save_figure", lambda out, path: kept.append(out) or save(out, path))
    main(monkeypatch, *words)
    return kept[0]


@pytest.mark.parametrize("end", ["svg", "png"])
def test_the_curve_has_a_panel_for_each_cost_that_is_known_and_names_every_row_once(end, tmp_path, monkeypatch):
    files, path = results(tmp_path), tmp_path / f"c.{end}"
    costs = ("--costs", *report.COSTS)
    out = drawn(monkeypatch, "--curve", *files, "--plot", path, *costs)
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    axes = out.axes
    assert [a.get_xlabel().split()[0] for a in axes] == ["tokens", "forward", "seconds", "seconds"]
    names = [[t.get_text() for t in a.texts] for a in axes]  # from the left
    assert names == [["out/rl", "collected", "base"], ["out/rl"], ["out/rl", "base", "collected"], ["out/rl"]]
    bars = [tuple(line.get_ydata()) for line in axes[0].lines[::2]]
    assert bars == [(0.7, 0.9), (0.6, 0.7), (0.5, 0.95)]  # the interval of one run, the spread of several
    out = drawn(monkeypatch, "--curve", files[1], "--plot", path, *costs)
    assert len(out.axes) == 2  # no FLOPs and no seconds alone in this file: no panel
    out = drawn(monkeypatch, "--curve", *files, "--plot", path)
    assert [a.get_xlabel() for a in out.axes] == ["tokens per answer (text + latents)"]


def test_intervals_that_count_seeds_are_bars_in_both_directions(tmp_path, monkeypatch):
    row = {**ROW, "runs": 3, "spread": [0.79, 0.81], "tokens_ci95": [90.0, 120.0]}
    (tmp_path / "s.json").write_text(json.dumps({"a": row}))
    out = drawn(monkeypatch, "--curve", tmp_path / "s.json", "--plot", tmp_path / "s.svg")
    vertical, horizontal, dot = out.axes[0].lines
    assert list(vertical.get_ydata()) == [0.7, 0.9] and list(horizontal.get_xdata()) == [90, 120]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (100, 0.8)
    assert "over seeds and stories" in out._supxlabel.get_text()


def test_the_papers_sampling_is_the_default_and_both_stand_in_one_table_under_two_names(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(evaluation, "generate", lambda *a, **k: seen.append(k) or evaluation_generate(*a, **k))
    words = ("--n", 2, "--max-new-tokens", 5, "--json", tmp_path / "r.json")

    def sampled(*more):
        del seen[:]
        main(monkeypatch, *words, *more)
        rows = json.load(open(tmp_path / "r.json"))
        numbers = [[k[name] for name in ("temperature", "top_p", "top_k")] for k in seen]
        return numbers, rows if isinstance(rows, list) else [rows]

    numbers, (row,) = sampled()
    assert numbers == [[0.7, 0.8, 20]] and (row["sampling"], row["split"], row["name"]) == ("paper", "test", "tiny")
    numbers, rows = sampled("--sampling", "paper", "trained")
    assert numbers == [[0.7, 0.8, 20], [1.0, 1.0, 0]]
    assert [row["name"] for row in rows] == ["tiny (paper)", "tiny (trained)"]
    said = capsys.readouterr().out
    assert "paper: temperature 0.7, top-p 0.8, top-k 20; trained: temperature 1, top-p 1, top-k off" in said
    assert len(report.collect([str(tmp_path / "r.json")])) == 2  # never averaged
    numbers, (row,) = sampled("--temperature", 1, "--top-p", 1, "--top-k", 0)
    assert numbers == [[1.0, 1.0, 0]] and row["sampling"] == "trained"
    numbers, (row,) = sampled("--temperature", 0)
    assert numbers == [[0.0, 0.8, 20]] and row["sampling"] == "greedy"
    with pytest.raises(UserError, match="--top-p is 0.0"):
        sampled("--top-p", 0)


def test_names_cover_neither_each_other_nor_a_dot_where_all_rows_stand_together(tmp_path, monkeypatch):
    name = "a method of a rather long name"
    rows = [{**ROW, "model": f"{name}, {i}", "tokens": 100 + i % 3, "accuracy": 0.8 + 0.001 * i}
            for i in range(15)]
    rows.append({**ROW, "model": "far", "tokens": 180, "accuracy": 0.2})
    (tmp_path / "m.json").write_text(json.dumps(rows))
    axes = drawn(monkeypatch, "--curve", tmp_path / "m.json", "--plot", tmp_path / "m.png",
                 "--costs", *report.COSTS).axes
    for at in axes:
        boxes = [words_of(note) for note in at.texts]
        assert len(boxes) == 16 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert not any(a.overlaps(line.get_window_extent()) for a in boxes for line in at.lines)


def words_of(note):
    """The pixels of an annotation's words, without the line to its dot."""
    from matplotlib.text import Text
    return Text.get_window_extent(note)


def test_training_curves_stand_against_steps_and_against_the_tokens_sampled(tmp_path, monkeypatch):
    for name, minibatches in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        config = {"prompts": 2, "group": 4, "minibatches": minibatches}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        lines = [{"step": i, "reward": i / 4, "text_tokens": 25.0, "latent_steps": 5.0, "tag_share": 0.5}
                 for i in (1, 2, 3, 4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    axes = drawn(monkeypatch, "--training", tmp_path / "a", tmp_path / "b", "--plot", tmp_path / "t.svg").axes
    assert len(axes) == 8 and [len(a.lines) for a in axes] == [2] * 8
    x = [[round(v * 1e6) for v in line.get_xdata()] for line in axes[4].lines]
    # 30 tokens, 8 rollouts; two optimiser steps share them in b.
    assert x == [[240, 480, 720, 960], [120, 240, 360, 480]]
    assert list(axes[1].lines[0].get_ydata()) == [30.0] * 4
    assert list(axes[0].lines[0].get_xdata()) == [1, 2, 3, 4]


@pytest.mark.parametrize("words, says", [
    (("--curve", "nowhere.json"), "nowhere.json"), (("--curve", "one.json", "--plot", "x.doc"), "must end in"),
    (("--curve", "one.json", "--plot", "no/where.svg"), "cannot write"), (("--training", "nowhere"), "nowhere"),
    (("--curve", "one.json", "--training", "x"), "choose one")])
def test_what_cannot_be_drawn_ends_in_one_line(words, says, tmp_path, monkeypatch):
    needs_matplotlib()
    results(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as e:
        main(monkeypatch, *words)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- the page
HOSTILE = '<script>document.title = "x"</script><img src=x onerror="alert(1)"> & </div></details>'
SUMMARY = {"model": "a <b>", "task": "tiny", "accuracy_ci95": [0.7, 0.9], "accuracy": 0.8, "n_examples": 5,
           "tokens": 3.0, "text_tokens": 2.0, "latent_steps": 1.0}


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: its elements, and its words with and without those of the tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.words, self.open = [], [], "", []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attributes):
        self.elements.append(name)
        self.attributes += attributes
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, words):
        self.words += words


def test_a_rollout_in_pieces_is_its_text_and_its_latents_in_order(rollouts, tok):
    for r, latents, tags in zip(rollouts, LATENTS, TAGS):
        numbers = [p for p in pieces(tok, r) if isinstance(p, int)]
        assert sum(numbers) == latents and len(numbers) == tags
    assert readable(tok, rollouts[0]) == f"ab{tag(3)}[3 latents] cd{tag(2)}[2 latents] .<eos>"
    assert readable(tok, rollouts[1]).endswith(" [cut off]")


def test_every_latent_has_its_line_and_every_word_is_read_off_the_model(model, tok, rollouts):
    task = types.SimpleNamespace(answer=lambda e: "gold & co", reward=lambda e, text: 1.0)
    for r, latents, tags in zip(rollouts, LATENTS, TAGS):
        text = answer_on_page(model, tok, task, "", r, 1)
        got = Reader(text)
        assert got.elements.count("details") == got.elements.count("summary") == 1 + tags
        assert got.elements.count("tr") == tags + latents
        for near, length, said in read_out(model, tok, r.latents):
            assert len(near) == len(said) == 3
            assert f"{length:,.3g}" in got.words and all(f"{p:.2f}" in got.words for _, p in near + said)
            assert all(1 >= a[1] >= b[1] for words in (near, said) for a, b in zip(words, words[1:]))
        assert "right" in got.words and "gold & co" in got.words


def test_a_story_with_a_script_in_it_is_words_on_the_page_and_nothing_else(model, tok):
    r, = write(model, tok, [HOSTILE], [f"{HOSTILE}{tag(2)} {HOSTILE}<eos>"], limit=400)
    text = page([(SUMMARY, [answer_on_page(model, tok, TASK, HOSTILE, r, 1)])])
    got = Reader(text)
    assert got.words.count(HOSTILE) == 3 and "a <b>, task tiny" in got.words
    assert not {"script", "img", "link", "iframe"} & set(got.elements)
    assert not [a for a, _ in got.attributes if a in ("src", "href") or a.startswith("on")]
    # Nothing is fetched, nothing is run.
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_the_command_writes_the_page_and_prints_the_table(tmp_path, monkeypatch, capsys):
    main(monkeypatch, "--n", 4, "--show", 3, "--max-new-tokens", 60, "--html", tmp_path / "a.html")
    said, got = capsys.readouterr().out, Reader((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert got.elements.count("article") == 3 and "tiny, task tiny" in got.words
    assert ">>>" not in said and "| tiny |" in said
    with pytest.raises(UserError, match="--show"):
        main(monkeypatch, "--n", 4, "--html", tmp_path / "b.html")
    with pytest.raises(UserError, match="cannot write"):
        main(monkeypatch, "--n", 1, "--show", 1, "--max-new-tokens", 5, "--html", tmp_path / "no" / "b.html")
