"""What people are shown is right: FLOPs are those that torch counts, curves show the numbers of the files,
and the page of answers shows every latent and lets no story's HTML through."""
import html.parser
import importlib
import json
import math
import re
import sys
import types

import numpy as np
import pytest
from conftest import LATENTS, PROMPTS, TAGS, tag, write
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib import kv_cache
from results import plots
import eval as evaluation
from eval import evaluate, flops, generate as evaluation_generate
from litereason import UserError
from results import findings
from lib.page import answer, percent, plainly, section, whole
from lib.display import pieces, read_out, readable

TASK = types.SimpleNamespace(prompt=lambda e, latent: e, reward=lambda e, text: float(len(text) % 2))


# ---------------------------------------------------------------- what an answer costs
def test_flops_are_those_that_torch_counts(model, tok, monkeypatch):
    """Exactly, with prompts of one length and rows that all run to the limit (nothing wasted), once the one
    difference in convention is taken off: torch counts the prompts' causal attention as the full square."""
    monkeypatch.setattr(kv_cache, "GROWS", ())  # a cache that grows looks at columns for nothing
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
ROW = {"accuracy": 0.8, "accuracy_ci95": [0.7, 0.9], "tokens": 100.0, "text_tokens": 90.0,
       "latent_steps": 10.0, "seconds": 5.0, "n_examples": 50, "samples": 1, "forward_positions": 200.0}


def results(tmp_path):
    """Three files of the three shapes that --json, train_rl.py and --collect --json write."""
    one = {"model": "out/rl", **ROW, "flops": 3e8, "seconds_alone": 0.2}
    many = [{"model": "base", **ROW, "accuracy": a, "tokens": 130.0} for a in (0.6, 0.7)]
    named = {"collected": {**ROW, "runs": 3, "spread": [0.5, 0.95], "tokens": 101.0}}
    for name, value in (("one", one), ("many", many), ("named", named)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return [str(tmp_path / f"{name}.json") for name in ("one", "many", "named")]


def test_results_of_every_shape_are_read_and_runs_of_one_name_averaged(tmp_path):
    rows = dict(plots.collect(results(tmp_path)))
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
    kept, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda out, path: kept.append(out) or save(out, path))
    main(monkeypatch, *words)
    return kept[0]


@pytest.mark.parametrize("end", ["svg", "png"])
def test_the_curve_has_a_panel_for_each_cost_that_is_known_and_names_every_row_once(
        end, tmp_path, monkeypatch):
    files, path = results(tmp_path), tmp_path / f"c.{end}"
    costs = ("--costs", *plots.COSTS)
    out = drawn(monkeypatch, "--curve", *files, "--plot", path, *costs)
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    axes = out.axes
    assert [a.get_xlabel().split()[0] for a in axes] == ["tokens", "forward", "seconds", "seconds"]
    names = [[t.get_text() for t in a.texts] for a in axes]  # from the right
    assert names == [["base", "collected", "out/rl"], ["out/rl"], ["out/rl", "base", "collected"], ["out/rl"]]
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


def test_the_papers_sampling_is_the_default_and_both_stand_in_one_table_under_two_names(
        tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(evaluation, "generate",
                        lambda *a, **k: seen.append(k) or evaluation_generate(*a, **k))
    words = ("--n", 2, "--max-new-tokens", 5, "--json", tmp_path / "r.json")

    def sampled(*more):
        del seen[:]
        main(monkeypatch, *words, *more)
        rows = json.load(open(tmp_path / "r.json"))
        numbers = [[k[name] for name in ("temperature", "top_p", "top_k")] for k in seen]
        return numbers, rows if isinstance(rows, list) else [rows]

    numbers, (row,) = sampled()
    assert (numbers == [[0.7, 0.8, 20]]
            and (row["sampling"], row["split"], row["name"]) == ("paper", "test", "tiny"))
    numbers, rows = sampled("--sampling", "paper", "trained")
    assert numbers == [[0.7, 0.8, 20], [1.0, 1.0, 0]]
    assert [row["name"] for row in rows] == ["tiny (paper)", "tiny (trained)"]
    said = capsys.readouterr().out
    assert "paper: temperature 0.7, top-p 0.8, top-k 20; trained: temperature 1, top-p 1, top-k off" in said
    assert len(plots.collect([str(tmp_path / "r.json")])) == 2  # never averaged
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
                 "--costs", *plots.COSTS).axes
    for at in axes:
        boxes = [words_of(note) for note in at.texts]
        assert len(boxes) == 16 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert not any(a.overlaps(line.get_window_extent()) for a in boxes for line in at.lines)


def words_of(note):
    """The pixels of an annotation's words, without the line to its dot."""
    from matplotlib.text import Text
    return Text.get_window_extent(note)


def made_run(path, method, rewards, minibatches=1, **more):
    """What is read of a run of train_rl.py, in a directory -> its path."""
    path.mkdir(parents=True)
    config = {"script": "train_rl.py", "method": method, "prompts": 2, "group": 4, "minibatches": minibatches}
    lines = [{"step": i + 1, "reward": reward, "text_tokens": 25.0, "latent_steps": 5.0,
              "tag_share": 0.5, **more} for i, reward in enumerate(rewards)]
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    return str(path)


def test_training_curves_stand_against_steps_and_against_the_tokens_sampled(tmp_path, monkeypatch):
    rewards = [0.25, 0.5, 0.75, 1]
    made = [made_run(tmp_path / "a", "litereason", rewards), made_run(tmp_path / "b", "grpo", rewards, 2)]
    panels = drawn(monkeypatch, "--training", *made, "--plot", tmp_path / "t.svg").axes
    assert len(panels) == 5
    for panel in panels:
        assert [t.get_text() for t in panel.texts].count("LiteReason") == 1  # a name for each line, no path
        assert sorted(t.get_text() for t in panel.texts) == ["LiteReason", "RL without latents"]
        assert len(panel.lines) == 4 and panel.get_legend() is None
    x = [[round(v * 1e6) for v in line.get_xdata()] for line in panels[4].lines[::2]]
    # 30 tokens, 8 rollouts; two optimiser steps share them in b.
    assert x == [[240, 480, 720, 960], [120, 240, 360, 480]]
    assert list(panels[1].lines[0].get_ydata()) == [30.0] * 4
    assert list(panels[0].lines[0].get_xdata()) == [1, 2, 3, 4]
    single, mean = panels[0].lines[:2]
    assert list(single.get_ydata()) == rewards
    # of up to five steps around, of three at the ends
    assert list(mean.get_ydata()) == [0.5, 0.625, 0.625, 0.75]


def test_runs_are_called_by_their_method_and_by_their_directory_only_where_two_are_alike(tmp_path):
    one = made_run(tmp_path / "x" / "rl-0", "grpo", [1])
    alike = [made_run(tmp_path / "x" / "lr-0", "litereason", [1]),
             made_run(tmp_path / "x" / "lr-1", "litereason", [1])]
    far = made_run(tmp_path / "y" / "lr-1", "litereason", [1])
    assert plots.names_of([one, alike[0], "MoI"]) == ["RL without latents", "LiteReason", "MoI"]
    assert plots.names_of([one, *alike])[1:] == ["LiteReason (lr-0)", "LiteReason (lr-1)"]
    names = plots.names_of([*alike, far])
    assert names == ["LiteReason (lr-0)", f"LiteReason ({alike[1]})", f"LiteReason ({far})"]
    assert plots.names_of([f"{one} (paper)"]) == ["RL without latents (paper)"]


# The README's five at most, as near to each other as they come.
README = {"base, explicit reasoning": (0.763, 135), "RL without latents": (0.988, 148),
          "LiteReason": (0.991, 36), "LiteReason, its latents taken away": (0.987, 38),
          "RL with tags, no latents": (0.992, 31)}


def readme_rows():
    return [(name, {"runs": 3, "spread": [y, y], "accuracy": y, "accuracy_ci95": [y - 0.01, y + 0.01],
                    "tokens": x, "tokens_ci95": [x - 4, x + 4]}) for name, (y, x) in README.items()]


def kept_figure(monkeypatch, draw, *arguments, **more):
    """-> the figure that a function of report saves"""
    needs_matplotlib()
    kept, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda out, path: kept.append(out) or save(out, path))
    draw(*arguments, **more)
    return kept[0]


def drawn_curve(tmp_path, monkeypatch):
    return kept_figure(monkeypatch, plots.curve, readme_rows(), str(tmp_path / "c.svg"), score="accuracy")


def drawn_lengths(tmp_path, monkeypatch):
    rows = [{"method": name, "length": length, "accuracy": y, "accuracy_ci95": [y - 0.01, 1], "tokens": x,
             "tokens_ci95": [x - 1, x + 1]} for name, (y, x) in README.items() for length in (2, 3, 5)]
    return kept_figure(monkeypatch, plots.by_length, rows, str(tmp_path / "l.svg"))


def drawn_training(tmp_path, monkeypatch):
    methods = ("litereason", "grpo", "tag", "litereason")
    made = [made_run(tmp_path / f"{m}-{i}", m, [0.9 + 0.001 * i] * 9) for i, m in enumerate(methods)]
    return kept_figure(monkeypatch, plots.training, made, str(tmp_path / "t.svg"))


@pytest.mark.parametrize("draw", [drawn_curve, drawn_lengths, drawn_training])
def test_a_picture_is_900_px_wide_and_its_names_are_readable_apart_and_inside(draw, tmp_path, monkeypatch):
    picture = draw(tmp_path, monkeypatch)
    picture.draw_without_rendering()
    assert picture.get_size_inches()[0] * 96 == 900  # as in CSS
    assert picture.get_facecolor() == (1, 1, 1, 1)  # a white card, on a dark page too
    for panel in picture.axes:
        boxes = [words_of(note) for note in panel.texts]
        assert len(boxes) >= 4
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(np.all(box.min >= 0) and np.all(box.max <= picture.bbox.max) for box in boxes)
    texts = picture.findobj(lambda artist: hasattr(artist, "get_fontsize") and artist.get_text())
    sizes = [text.get_fontsize() * 96 / 72 for text in texts]
    assert 11 <= min(sizes) and max(sizes) <= 13
    assert not any("/" in text.get_text() for text in texts)  # no paths


def test_colours_are_dark_enough_for_text_on_white_and_a_method_keeps_its_own():
    for colour in [*plots.COLOURS.values(), *plots.OTHER_COLOURS, plots.DARK, plots.SOFT]:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5, colour  # WCAG AA
    assert (plots.colours_of(["x", "LiteReason"])["LiteReason"]
            == plots.colours_of(["LiteReason"])["LiteReason"])
    drawn = plots.colours_of(findings.HEADLINE)
    assert set(drawn.values()) == set(plots.COLOURS.values()) and len(drawn) <= 5
    assert (plots.colours_of(["LiteReason", "LiteReason + length penalty"])["LiteReason"]
            == drawn["LiteReason + length penalty"])


def test_the_axis_of_tokens_begins_at_zero_unless_one_method_needs_many_times_more(tmp_path, monkeypatch):
    rows = readme_rows()
    panel = kept_figure(monkeypatch, plots.curve, rows, str(tmp_path / "c.svg"), score="accuracy").axes[0]
    assert panel.get_xscale() == "linear" and panel.get_xlim()[0] == 0
    assert panel.get_title(loc="left") == "accuracy"
    rows.append(("slow", {**rows[0][1], "tokens": 1500.0}))
    picture = kept_figure(monkeypatch, plots.curve, rows, str(tmp_path / "c.svg"))
    assert picture.axes[0].get_xscale() == "log"
    picture.draw_without_rendering()
    ticks = picture.axes[0].xaxis.get_ticklabels(which="both")
    assert {"50", "100", "1,000"} <= {tick.get_text() for tick in ticks}  # numbers, no powers


def test_names_at_the_ends_of_lines_stay_within_the_panel():
    assert plots.spread([1, 50], 10, 0, 100) == [1, 50]
    assert plots.spread([50, 50, 50], 10, 0, 100) == [50, 60, 70]
    assert plots.spread([95, 99, 99], 10, 0, 100) == [80, 90, 100]
    assert plots.spread([-5, -5], 10, 0, 100) == [0, 10]


@pytest.mark.parametrize("words, says", [
    (("--curve", "nowhere.json"), "nowhere.json"),
    (("--curve", "one.json", "--plot", "x.doc"), "must end in"),
    (("--curve", "one.json", "--plot", "no/where.svg"), "cannot write"),
    (("--training", "nowhere"), "nowhere"),
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
           "tokens": 1234.56, "text_tokens": 2.0, "latent_steps": 1.0, "samples": 1}


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


GOLD = types.SimpleNamespace(answer=lambda e: "gold & co", reward=lambda e, text: 1.0)


def test_every_latent_has_its_line_and_every_word_is_read_off_the_model(model, tok, rollouts):
    for r, latents, tags in zip(rollouts, LATENTS, TAGS):
        got = Reader(answer(model, tok, GOLD, "", r, 1.0, 7))
        assert got.elements.count("details") == got.elements.count("summary") == 1 + tags
        assert got.elements.count("tr") == tags + latents
        for near, length, said in read_out(model, tok, r.latents):
            assert len(near) == len(said) == 3
            assert f"{plainly(length)} times" in got.words
            assert all(f"{cosine:.2f}" in got.words for _, cosine in near)
            assert all(percent(p) in got.words for _, p in said)
            assert all(1 >= a[1] >= b[1] for words in (near, said) for a, b in zip(words, words[1:]))
        assert "right" in got.words and "gold & co" in got.words


def test_an_answer_is_one_line_until_it_is_unfolded(model, tok, rollouts):
    lines = []
    for r in rollouts:
        text = answer(model, tok, GOLD, "", r, 0.0, 1234)
        line, _, rest = text.partition("</summary>")
        lines.append(Reader(line.partition("<summary>")[2]).words)
        assert " open" not in text  # folded
        assert rest.index('class="asked"') < rest.index("Answered")  # the story first, or at the left
    assert lines[0].startswith("1,234✗ wronggold: gold & co") and lines[0].endswith("ab cd .")
    assert f"{len(rollouts[0].slots)} tokens2 tags5 latents" in lines[0] and "cut off" not in lines[0]
    assert "cut off" in lines[1]


def test_the_gold_answer_is_shown_without_its_box(model, tok, rollouts):
    task = types.SimpleNamespace(answer=lambda e: "\\boxed{ No }")
    assert "gold: No<" in answer(model, tok, task, "", rollouts[0], 1.0, 1)
    assert "gold" not in answer(model, tok, TASK, "", rollouts[0], 12.5, 1)  # a task without one
    assert "reward 12.5<" in answer(model, tok, TASK, "", rollouts[0], 12.5, 1)


def numbers_of_answers(text):
    return [int(number) for number in re.findall(r'<span class="number soft">(\d+)<', text)]


def test_wrong_answers_come_first_and_are_counted_among_all(model, tok, rollouts):
    four = [rollouts[0]] * 4

    def made(n, task=GOLD, rewards=(1.0, 0.0, 1.0, 0.0), **more):
        return section("said <above>", {**SUMMARY, **more}, model, tok, task, [""] * 4, four,
                       list(rewards), n)

    text = made(3)
    assert numbers_of_answers(text) == [2, 4, 1]
    words = Reader(text).words
    assert ("✗ 2 wrong, ✓ 2 right of 4 answers. Below are 3 of them, wrong ones first: they are no fair"
            in words)
    assert words.startswith("a <b>") and words.index("2 wrong") < words.index("✗ wrong")
    assert "said <above>: 80.0 % right (95 % interval 70.0 to 90.0 %); 1,234.6 tokens per answer" in words
    assert "All of them are below" in made(9) and numbers_of_answers(made(9)) == [2, 4, 1, 3]
    assert "the first" not in words and "this page has the first" in Reader(made(3, samples=5)).words
    rewards = Reader(made(2, TASK, (3.0, -1.0, 2.0, 12.0), accuracy=4.0, accuracy_ci95=[-1.5, 12.0])).words
    assert "wrong" not in rewards and "the lowest rewards first" in rewards
    assert "mean reward 4.00 (95 % interval -1.50 to 12.0)" in rewards


@pytest.mark.parametrize("number, text", [
    (7289.7, "7,290"), (7.29e6, "7,290,000"), (999.6, "1,000"),
    (36.42, "36.4"), (1.0, "1.00"), (9.996, "10.00"),
    (0.0123, "0.012"), (1e-5, "below 0.001"), (0.0, "0"), (-3.456, "-3.46"), (-1e-9, "above -0.001"),
    (math.inf, "inf"), (math.nan, "nan")])
def test_a_number_is_written_without_an_exponent(number, text):
    assert plainly(number) == text


def test_a_share_is_nought_or_all_only_where_it_is():
    assert ([percent(p) for p in (0, 1e-9, 0.014, 0.5, 0.999, 1)]
            == ["0 %", "<1 %", "1 %", "50 %", ">99 %", "100 %"])


def test_a_story_with_a_script_in_it_is_words_on_the_page_and_nothing_else(model, tok):
    r, = write(model, tok, [HOSTILE], [f"{HOSTILE}{tag(2)} {HOSTILE}<eos>"], limit=400)
    task = types.SimpleNamespace(answer=lambda e: HOSTILE)
    text = whole([section(HOSTILE, SUMMARY, model, tok, task, [HOSTILE], [r], [0.0], 1)])
    got = Reader(text)
    # What was asked, the line above, the gold answer, twice in the answer and in its first words.
    assert got.words.count(HOSTILE) == 7 and "a <b>" in got.words
    assert not {"script", "img", "link", "iframe"} & set(got.elements)
    assert not [a for a, _ in got.attributes if a in ("src", "href") or a.startswith("on")]
    # Nothing is fetched, nothing is run.
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_the_command_writes_the_page_and_prints_the_table(tmp_path, monkeypatch, capsys):
    main(monkeypatch, "--n", 4, "--show", 3, "--max-new-tokens", 60, "--html", tmp_path / "a.html")
    said, got = capsys.readouterr().out, Reader((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert got.elements.count("article") == 3 and "tiny, test split, 4 examples, temperature 0.7" in got.words
    assert ">>>" not in said and "| tiny |" in said
    with pytest.raises(UserError, match="--show"):
        main(monkeypatch, "--n", 4, "--html", tmp_path / "b.html")
    with pytest.raises(UserError, match="cannot write"):
        main(monkeypatch, "--n", 1, "--show", 1, "--max-new-tokens", 5, "--html", tmp_path / "no" / "b.html")
