"""The README's tables are made by scripts from results/*.json; nobody has typed a number there."""
import json
import os

import pytest

from results import needed, reproduce

README = open(os.path.join(reproduce.ROOT, "README.md"), encoding="utf-8").read()


def block(name):
    return README.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def figures(name):
    with open(os.path.join(reproduce.HERE, f"{name}.json")) as f:
        return json.load(f)


@pytest.mark.parametrize("task", list(reproduce.TASKS))
def test_the_comparisons_in_the_readme_are_those_in_results(task):
    rows = figures(f"methods-{task}")
    assert block(f"methods-{task}") == reproduce.table_of(task, rows)
    if task == "tiny":
        assert block("headline") == reproduce.headline(rows)
        assert block("controls-tiny") == reproduce.controls_table(figures("controls-tiny"))


def test_the_probe_in_the_readme_is_the_one_in_results():
    assert block("needed") == needed.table_of(figures("needed"))


def test_a_table_is_put_between_its_marks_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", str(tmp_path))
    (tmp_path / "README.md").write_text("a\n<!-- t -->\nold\n<!-- /t -->\nb\n")
    for text in ("new", "| x |\n|---|"):
        reproduce.into_readme("t", text)
        assert (tmp_path / "README.md").read_text() == f"a\n<!-- t -->\n{text}\n<!-- /t -->\nb\n"
    reproduce.into_readme("unknown", "x")
    assert "x\n" not in (tmp_path / "README.md").read_text().replace("| x |", "")


def test_runs_are_found_named_and_averaged(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ROOT", str(tmp_path))
    row = {"accuracy_ci95": [0, 1], "tokens": 10.0, "text_tokens": 8.0, "latent_steps": 2.0, "tags": 1.0,
           "truncated": 0.0, "forward_positions": 5.0, "flops": 1e9,
           "seconds_each": 0.1, "seconds_alone": 0.2}
    accuracies = {"base, explicit reasoning": 0.5, "LiteReason before RL": 0.7, "LiteReason": 1.0,
                  "  its latents taken away": 0.9}
    for seed, right in ((0, 1), (1, 0)):
        out = tmp_path / "out" / "results" / "tiny" / f"litereason-{seed}"
        out.mkdir(parents=True)
        rows = []
        for model, accuracy in accuracies.items():
            own = {"accuracy": right * accuracy, "per_example": {"score": [right * accuracy] * 4}}
            rows.append({"model": model, **own, **row})
        (out / "results.json").write_text(json.dumps(rows))
        (out / "config.json").write_text(json.dumps({"prompts": 2, "group": 4}))
        (out / "metrics.jsonl").write_text(json.dumps({"text_tokens": 8, "latent_steps": 2}) + "\n")
        (out / "seconds.json").write_text("30")
    means = {name: reproduce.summary(rows) for name, rows in reproduce.rows_of("tiny", [0, 1, 2]).items()}
    assert list(means) == ["base, explicit reasoning", "LiteReason before RL", "LiteReason",
                           "LiteReason, its latents taken away"]
    expected = {"accuracy": 0.5, "by_seed": [1.0, 0.0], "runs": 2, "sampled": 80.0, "run_seconds": 30.0}
    assert {name: means["LiteReason"][name] for name in expected} == expected
    assert means["base, explicit reasoning"]["sampled"] is None
    assert "`python train_rl.py`" in reproduce.table_of("tiny", means)
