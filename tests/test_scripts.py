"""The scripts do what their command lines say: help, two steps of every stage, one line for a wrong word."""
import contextlib
import io
import json
import os
import runpy
import sys
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT

import litereason
import train_rl
from data import next_chapter
from lib import checkpoint

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


def metrics(out):
    with open(out / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


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
    lines = metrics(whole)
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
