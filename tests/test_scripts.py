"""The scripts do what their command lines say: help, two steps of every stage, one line for a wrong word."""
import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT

import litereason
from lib import checkpoint, display, run as runs
import train_rl
from data import next_chapter

SCRIPTS = ["train_projector.py", "train_rl.py", "eval.py", "results/baselines.py", "data/tiny/prepare.py",
           "results/reproduce.py", "results/check_tiny.py", "tests/bench.py"]
PEOPLE_RUN = ["train_rl.py", "train_projector.py", "eval.py", "results/baselines.py", "results/reproduce.py"]
# A run of train_rl.py that is as short as it can be and still has groups with a winner and a loser.
SHORT = ("--steps", 2, "--prompts", 4, "--group", 4, "--n", 0, "--max-new-tokens", 100)


def start(*words):
    """python SCRIPT .. -> a process of its own, under way. Importing torch there takes 4 s."""
    command = [sys.executable, os.path.join(ROOT, words[0]), *map(str, words[1:])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def script(*words):
    """python SCRIPT .. in this process, which it leaves as it found it -> what came of it."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(runs.signals_restored())
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


def metrics(out):
    with open(out / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module", autouse=True)
def processes(tmp_path_factory):
    """The two real processes, which run beside the tests in this one: --help, and the README's first command,
    all three stages, cut to two steps."""
    out = tmp_path_factory.mktemp("trained") / "rl"
    words = ("--steps", 2, "--train-prompts", 8, "--projector-steps", 2, "--trace-prompts", 8, "--n", 1,
             "--val", 2, "--prompts", 4, "--group", 4, "--max-new-tokens", 100, "--out", out)
    started = {"help": start("train_rl.py", "--help"), "train": start("train_rl.py", *words)}
    yield types.SimpleNamespace(**started, out=out)
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def trained(processes):
    """The directory that the README's first command leaves."""
    _, err = processes.train.communicate(timeout=300)
    assert processes.train.returncode == 0, err
    return processes.out


# ---------------------------------------------------------------- help
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_answers_help(name):
    done = script(name, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout


@pytest.mark.parametrize("name", [*PEOPLE_RUN, "data/flawed_fictions/prepare.py",
                                  "data/next_chapter/prepare.py"])
def test_help_begins_with_what_people_use_and_says_every_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text = script(name, "--help").stdout
    assert text.startswith(f"usage: {os.path.basename(name)} [flags]\n") and f"python {name}" in text
    flags = re.findall(r"\n  (--.+(?:\n    .+)*)", text)
    assert len(flags) > 4 and not [flag for flag in flags if "default" not in flag]
    groups = re.split(r"\n(?=\S[^\n]*:\n)", text)
    assert max(group.count("\n") for group in groups) < 45


# ---------------------------------------------------------------- runs
def test_the_gpu_measurements_are_ready_to_run(tmp_path):
    """On a toy shape and a CPU; nobody has run them on a GPU yet."""
    for row in ("f", "g", "i"):
        words = ("--device", "cpu", "--small", "--rows", row, "--json", tmp_path / "g.json")
        done = script("tests/bench_gpu.py", *words)
        assert done.returncode == 0, done.stderr
        numbers = json.load(open(tmp_path / "g.json"))[row]
        times = [value for name, value in numbers.items() if name.endswith(("_s", "_ms"))]
        assert all(value > 0 for value in times if value is not None)


def test_stages_1_and_2_keep_their_traces_for_a_second_run(tmp_path):
    words = ("--steps", 2, "--prompts", 8, "--samples", 2, "--n", 4, "--out", tmp_path / "p")
    done = script("train_projector.py", *words)
    assert done.returncode == 0 and "kept" in done.stdout, done.stderr
    for what in ("no latents", "zeros", "start", "trained", "accuracy with the tag prompt"):
        assert what in done.stdout
    again = script("train_projector.py", *words, "--overwrite")
    assert "traces are in" in again.stdout


@pytest.mark.parametrize("penalty", [1.0, 400.0])
def test_the_length_penalty_falls_from_where_it_begins_to_the_limit(penalty):
    args = types.SimpleNamespace(max_new_tokens=10, overlong_buffer=4, overlong_penalty=penalty)
    rollouts = [types.SimpleNamespace(slots=[0] * n) for n in (0, 6, 7, 10)]
    assert train_rl.length_penalty(args, rollouts).tolist() == [0, 0, -penalty / 4, -penalty]
    args.overlong_buffer = 0
    assert train_rl.length_penalty(args, rollouts).tolist() == [0, 0, 0, 0]


def test_the_second_task_of_the_tiny_world_runs_too(tmp_path):
    words = ("--task", "tiny.next_chapter", "--projector-steps", 2, "--trace-prompts", 16, *SHORT, "--n", 1)
    done = script("train_rl.py", *words, "--minibatches", 99, "--out", tmp_path / "n")
    assert done.returncode == 0, done.stderr
    assert "| model | reward |" in done.stdout
    settings = json.load(open(tmp_path / "n" / "config.json"))
    assert settings["minibatches"] == settings["prompts"]  # each has a prompt at least
    done = script("eval.py", "--collect", tmp_path / "n", tmp_path / "n")
    assert "| model | reward |" in done.stdout and ": 2 runs, reward " in done.stdout, done.stderr


# ---------------------------------------------------------------- wrong words
@pytest.mark.parametrize("words, says", [
    (("eval.py", "--model", "nowhere/at/all"), "no model directory"),
    (("eval.py", "--model", "Qwen2.5-1.5B", "--task", "tiny"), "Without a network"),
    (("eval.py", "--task", "nothing"), "no task 'nothing'"),
    (("eval.py", "--split", "dev"), "splits"),
    (("eval.py", "--json", "/nowhere/e.json", "--n", "2"), "/nowhere/e.json"),
    (("eval.py", "--model", "tiny:plian"), "behind a colon may stand plain"),
    (("train_rl.py", "--method", "tag", "--anchor", "3"), "--anchor holds the base"),
    (("train_rl.py", "--targets", "none", "--train-base", "1e-4"), "--train-base goes with --targets words"),
    (("train_rl.py", "--group", "1"), "--group"),
    (("train_rl.py", "--steps", "-1"), "--steps"),
    (("train_rl.py", "--out", "/proc/nothing"), "/proc/nothing"),
    (("train_rl.py", "--device", "tpu"), "--device"),
    (("train_projector.py", "--model", "README.md"), "no model directory"),
    (("train_rl.py", "--learning-rate", "1"), "--learning-rate"),
])
def test_a_wrong_word_ends_in_one_line_and_exit_code_2(words, says, tmp_path):
    if words[0] != "eval.py" and "--out" not in words:
        words += ("--out", tmp_path / "o")
    done = script(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and says in done.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------- what waits for the real processes
def test_a_script_answers_help_in_a_process_of_its_own(processes):
    out, err = processes.help.communicate(timeout=300)
    assert processes.help.returncode == 0 and "usage:" in out, err


def test_all_three_stages_run_for_two_steps_and_leave_what_they_promise(trained):
    assert json.load(open(trained / "config.json"))["steps"] == 2
    lines = metrics(trained)
    assert [m["step"] for m in lines] == [1, 2]
    for key in ("reward", "accuracy", "text_tokens", "latent_steps", "tags", "tag_share", "zero_variance",
                "truncated", "no_verdict", "max_dlogp", "grad_norm", "seconds", "peak_memory_gib"):
        assert key in lines[0], key
    assert "no verdict" not in display.step_line({**lines[0], "no_verdict": 0.0}, 2)
    assert " | no verdict 0.75" in display.step_line({**lines[0], "no_verdict": 0.75}, 2)
    assert lines[0]["peak_memory_gib"].keys() == lines[0]["seconds"].keys() >= {"sample", "update", "step"}
    # 8 prompts, 4 a step: an epoch of two steps
    assert lines[0]["refresh_loss"] is None and lines[1]["refresh_loss"] > 0
    # fp32, and warm-start latents of length 1,000; exact in test_decode.py
    assert max(m["max_dlogp"] for m in lines) < 1e-3
    table = json.load(open(trained / "results.json"))
    assert [row["model"] for row in table] == [
        "base, explicit reasoning", "base, tag prompt", "LiteReason before RL", "LiteReason",
        "  its latents taken away", "  another story's latents"]


def test_a_runs_directory_is_a_model_for_the_other_scripts(trained, tmp_path):
    words = ("--n", 4, "--show", 1, "--json", tmp_path / "e.json")
    done = script("eval.py", "--model", trained, "tiny:plain", *words)
    assert done.returncode == 0, done.stderr
    first, second = json.load(open(tmp_path / "e.json"))
    assert (first["prompt"], second["prompt"]) == ("tag", "plain") and second["latent_steps"] == 0
    for key in ("accuracy", "accuracy_ci95", "tokens", "text_tokens", "latent_steps", "tags", "truncated",
                "n_examples", "samples", "seconds"):
        assert key in first, key
    words = ("--steps", 1, "--n", 1, "--prompts", 2, "--group", 4, "--out", tmp_path / "again")
    done = script("train_rl.py", "--model", trained, *words)
    assert done.returncode == 0, done.stderr
    assert "stage 1" not in done.stdout  # it has a trained projector already


def test_rl_without_latents_and_with_recomputed_ones_run(trained, tmp_path):
    done = script("train_rl.py", "--method", "grpo", *SHORT, "--out", tmp_path / "grpo")
    assert done.returncode == 0, done.stderr
    assert all(m["latent_steps"] == 0 for m in metrics(tmp_path / "grpo"))
    small = ("--projector-steps", 1, "--trace-prompts", 16, *SHORT)
    done = script("train_rl.py", "--model", tmp_path / "grpo", *small, "--out", tmp_path / "after")
    assert "stage 1: kept" in done.stdout, done.stderr  # that run has a projector, but stage 2 was not run
    words = ("--model", trained, "--recompute-latents", "--overlong-buffer", 40, "--minibatches", 2)
    done = script("train_rl.py", *words, *SHORT, "--out", tmp_path / "re")
    assert done.returncode == 0, done.stderr
    first = metrics(tmp_path / "re")[0]
    assert first["latent_steps"] > 0
    assert first["max_dlogp"] < 1e-2  # before the first update recomputed latents are the stored ones
