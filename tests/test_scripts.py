"""The scripts do what their command lines say: help, two steps of every stage, one line for a wrong word, the
smoke run's flags, and what somebody sees before the first run of a real model. And the house stays small."""
import contextlib
import io
import json
import os
import pathlib
import runpy
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT
from test_real_tasks import run
from test_resume import metrics

import litereason
import train_projector
import train_rl
from data import next_chapter
from lib import checkpoint, memory, run as runs

SCRIPTS = ["train_projector.py", "train_rl.py", "eval.py", "results/baselines.py", "data/tiny/prepare.py",
           "results/reproduce.py", "tests/bench.py"]
SHORT = ("--steps", 2, "--prompts", 4, "--num-generations", 4, "--train-prompts", 8, "--val", 2, "--n", 0,
         "--max-new-tokens", 60)


def script(*words):
    """python SCRIPT .. in this process, which it leaves as it found it -> what came of it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        # The benchmarks put functions of their own into litereason and checkpoint.
        for names in (os.environ, next_chapter.settings, vars(litereason), vars(checkpoint)):
            stack.enter_context(mock.patch.dict(names))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", [str(word) for word in words])
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(ROOT)
        try:
            runpy.run_path(os.path.join(ROOT, words[0]), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def works(*words):
    """-> stdout of a script that must end well"""
    done = script(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- help
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_answers_help_and_those_at_the_top_on_one_screen(name):
    said = works(name, "--help")
    lines = said.splitlines()
    assert "usage:" in said
    assert "/" in name or 20 < len(lines) <= 50 and max(map(len, lines)) <= 110


# ---------------------------------------------------------------- runs
@pytest.mark.parametrize("row", ["f", "g"])
def test_the_gpu_measurements_run_on_a_toy_shape_and_a_cpu(tmp_path, row):
    works("tests/bench_gpu.py", "--device", "cpu", "--rows", row, "--json", tmp_path / "g.json")
    times = [value for name, value in json.load(open(tmp_path / "g.json"))[row].items()
             if name.endswith(("_s", "_ms"))]
    assert all(value > 0 for value in times if value is not None)


@pytest.mark.parametrize("own, most", [({}, 1), ({"PENALTY": 400}, 400)])
def test_the_length_penalty_falls_from_where_it_begins_to_the_limit(own, most):
    rollouts = [types.SimpleNamespace(slots=[0] * n) for n in (0, 6, 7, 10)]
    for buffer, expected in ((4, [0, 0, -most / 4, -most]), (0, [0, 0, 0, 0])):
        args = types.SimpleNamespace(max_new_tokens=10, overlong_buffer=buffer)
        assert train_rl.length_penalty(args, types.SimpleNamespace(**own), rollouts).tolist() == expected


def test_the_second_task_of_the_tiny_world_runs_too(tmp_path):
    words = ("--task", "tiny.next_chapter", "--projector-steps", 2, "--trace-prompts", 16, *SHORT, "--n", 1)
    said = works("train_rl.py", *words, "--max-new-tokens", 100, "--minibatches", 99, "--out", tmp_path)
    settings = json.load(open(tmp_path / "config.json"))
    assert "| model | reward |" in said
    assert settings["minibatches"] == settings["prompts"]  # each has a prompt at least


# ---------------------------------------------------------------- wrong words
@pytest.mark.parametrize("words, says", [
    (("eval.py", "--task", "nothing"), "no task 'nothing'"),
    (("eval.py", "--json", "/nowhere/e.json", "--n", "2"), "/nowhere/e.json"),
    (("eval.py", "--model", "tiny:plian"), "behind a colon may stand plain"),
    (("train_projector.py", "--targets", "none", "--train-base", "1e-4"), "--train-base goes with"),
    (("train_rl.py", "--num-generations", "1"), "--num-generations is 1; it must be at least 2"),
    (("train_rl.py", "--out", "/proc/nothing"), "/proc/nothing"),
    (("train_rl.py", "--device", "tpu"), "--device"),
    (("train_rl.py", "--learning-rate", "1"), "--learning-rate"),
])
def test_a_wrong_word_ends_in_one_line_and_exit_code_2(words, says, tmp_path):
    if words[0] != "eval.py" and "--out" not in words:
        words += ("--out", tmp_path / "o")
    done = script(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and says in done.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------- what a run leaves
def test_a_run_of_all_three_stages_says_and_leaves_what_it_promises(whole):
    said = (whole.parent / "said").read_text()
    assert "drowns the words around it; those of --projector normed do not" in said  # the paper's start
    assert json.load(open(whole / "config.json"))["steps"] == 4
    lines = [json.loads(line) for line in open(whole / "metrics.jsonl")]
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    assert "no verdict" not in train_rl.step_line({**lines[0], "no_verdict": 0.0}, 2)
    assert " | no verdict 0.750" in train_rl.step_line({**lines[0], "no_verdict": 0.75}, 2)
    assert lines[0]["peak_memory_gib"].keys() == lines[0]["seconds"].keys() >= {"sample", "update", "step"}
    # an epoch of four steps
    assert [m["refresh_loss"] for m in lines[:3]] == [None] * 3 and lines[3]["refresh_loss"] > 0
    # Before a batch's first update; fp32, and warm-start latents of length 1,000; exact in test_decode.py.
    assert max(m["max_dlogp"] for m in lines[::2]) < 1e-3
    table = json.load(open(whole / "results.json"))
    assert [row["model"] for row in table] == [
        "base, explicit reasoning", "base, tag prompt", "LiteReason before RL", "LiteReason",
        "  its latents taken away", "  shuffled latents"]


def test_rl_without_latents_runs_and_leaves_a_model_without_a_trained_projector(tmp_path):
    works("train_rl.py", "--method", "grpo", *SHORT, "--out", tmp_path)
    assert all(m["latent_steps"] == 0 for m in metrics(tmp_path))
    assert not litereason.load(tmp_path, "cpu")[0].projector_trained


# ---------------------------------------------------------------- --smoke
def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *map(str, words)])
    return train_rl.parse_arguments()


def test_smoke_changes_defaults_flags_win_and_a_resumed_run_needs_nothing(monkeypatch, tmp_path):
    plain = vars(parsed(monkeypatch))
    smoke = parsed(monkeypatch, "--smoke", "--num-generations", 6, "--n", 0, "--out", tmp_path)
    changed = {name for name, value in vars(smoke).items() if plain[name] != value}
    assert changed == {*train_rl.SMOKE, "smoke", "out"}  # --num-generations and --n among them
    assert {name: getattr(smoke, name) for name in train_rl.SMOKE} == {**train_rl.SMOKE, "num_generations": 6,
                                                                       "n": 0}
    runs.begin(str(tmp_path), "train_rl.py", vars(smoke))
    assert {**vars(smoke), "resume": str(tmp_path)} == vars(parsed(monkeypatch, "--resume", tmp_path))
    assert vars(parsed(monkeypatch)) == plain  # nothing of it is left behind


def test_a_smoke_run_of_a_model_that_counts_as_real_ends_in_the_table(tmp_path, monkeypatch, capsys):
    """The tiny model, with the settings and the plan of memory of a real one on a CPU."""
    for module in (checkpoint, memory):
        monkeypatch.setattr(module, "is_small", lambda model: False)
    monkeypatch.setattr(train_projector, "VERSIONS", 2)
    run(train_rl, "--smoke", "--device", "cpu", "--n", 1, "--max-new-tokens", 64, "--out", tmp_path)
    said = capsys.readouterr().out
    order = ["M parameters, cpu", "4 steps, 2 on each batch of 8 rollouts", "not as released: steps 4",
             "GiB can be used; with --", "| base, tag prompt", "stage 1: kept", "stage 2: validation loss",
             "step    4/4", "| LiteReason "]
    places = [said.index(words) for words in order]
    assert places == sorted(places)
    config = json.load(open(tmp_path / "config.json"))
    assert config["micro_batch_tokens"] <= memory.FEW_POSITIONS and not config["offload"]
    rows = [row["model"] for row in json.load(open(tmp_path / "results.json"))]
    assert rows[:3] == ["base, explicit reasoning", "base, tag prompt", "LiteReason before RL"]


# ---------------------------------------------------------------- what is said before a run
@pytest.mark.parametrize("changes, said", [
    ({}, "all settings as released"),
    ({"lr": 1e-5, "gen_batch_size": 3, "save_every": 2}, "not as released: lr 1e-05 (released: 5e-07)"),
    ({"method": "grpo", "targets": "words", "prompts": 4}, "not as released: prompts 4 (released: 48)"),
    ({"targets": "words"}, "not as released: targets words (released: none)")])
def test_what_runs_is_said_first_with_what_is_not_as_released(model, capsys, monkeypatch, changes, said):
    args = types.SimpleNamespace(**{name: None for part in train_rl.SETTINGS.values() for name in part})
    vars(args).update({"method": "litereason", "task": "t", "model": "m", "offload": False, **changes})
    runs.fill(args, train_rl.SETTINGS, small=False)
    train_rl.say_what_runs(args, model, [[1], [1, 2]], "memory")
    first, *lines = capsys.readouterr().out.splitlines()
    assert "on t: m, 0.0 M parameters, cpu, fp32 weights; 2 train prompts of up to 2 tokens" in first
    assert lines[0].startswith("2880 steps, 16 on each batch of ") and lines[1:] == [said, "memory"]
    monkeypatch.setattr(checkpoint, "is_small", lambda model: False)
    train_rl.say_what_runs(args, model, [[1]], "")
    assert "on a CPU this takes days: --smoke shows in minutes whether all works" in capsys.readouterr().out


# ---------------------------------------------------------------- nine names at the top, a budget of lines
FRONT = ["litereason.py", "train_projector.py", "train_rl.py", "eval.py"]
TOP = {*FRONT, "data", "tests", "README.md", "lib", "results"}
# What every project has, and what no reader of the method meets.
BESIDE = {"findings", "requirements.txt", "CHANGELOG.md", "CITATION.cff", "LICENSE", ".ci", ".gitignore"}

BUDGETS = {  # lines of one file, or of all Python files in a folder
    "litereason.py": 720, "train_projector.py": 650, "train_rl.py": 550, "eval.py": 430,
    "lib": 2200, "results": 1750, "data": 1700, "tests": 6500, "README.md": 150}


def lines_of(name):
    path = pathlib.Path(ROOT, name)
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def test_nothing_new_stands_at_the_top_level():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no git checkout")
    names = {name.split("/")[0] for name in found.stdout.splitlines()}
    assert names - BESIDE == TOP


@pytest.mark.parametrize("name", BUDGETS)
def test_no_file_outgrows_its_budget_by_a_twentieth(name):
    assert lines_of(name) <= 1.05 * BUDGETS[name]


def test_the_front_and_all_code_outside_the_tests_are_within_theirs():
    assert sum(map(lines_of, FRONT)) <= 2360
    assert sum(map(lines_of, [*FRONT, "lib", "results", "data"])) <= 8000
