"""The scripts as a user runs them: in a process of their own, for two steps, and with everything spelled wrong."""
import json
import os
import runpy
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ["train_projector.py", "train_rl.py", "eval.py"]


def script(*words, cwd=ROOT):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, os.path.join(ROOT, words[0]), *map(str, words[1:])], cwd=cwd, env=env,
                          capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", SCRIPTS + ["baselines.py", "data/tiny/prepare.py", "results/reproduce.py", "results/needed.py", "tests/bench.py"])
def test_every_script_answers_help(name):
    got = script(name, "--help")
    assert got.returncode == 0 and "usage:" in got.stdout


def test_the_gpu_measurements_are_ready_to_run(tmp_path):
    """On a toy shape and a CPU; nobody has run them on a GPU yet."""
    for row in ("f", "h24", "i"):
        got = script("tests/bench_gpu.py", "--device", "cpu", "--small", "--rows", row, "--json", tmp_path / "g.json")
        assert got.returncode == 0, got.stderr
        assert all(v > 0 for k, v in json.load(open(tmp_path / "g.json"))[row].items() if k.endswith(("_s", "_ms")) and v is not None)


def test_all_three_stages_run_for_two_steps_and_leave_what_they_promise(tmp_path):
    out = tmp_path / "rl"
    got = script("train_rl.py", "--steps", 2, "--train-prompts", 8, "--projector-steps", 2, "--trace-prompts", 16, "--n", 8, "--prompts", 4, "--group", 4, "--out", out)
    assert got.returncode == 0, got.stderr
    assert json.load(open(out / "config.json"))["steps"] == 2
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [m["step"] for m in lines] == [1, 2]
    for key in ("reward", "accuracy", "text_tokens", "latent_steps", "tags", "tag_share", "zero_variance", "truncated", "max_dlogp",
                "grad_norm", "seconds", "peak_memory_gib"):
        assert key in lines[0], key
    assert lines[0]["peak_memory_gib"].keys() == lines[0]["seconds"].keys() >= {"sample", "update", "step"}
    assert lines[0]["refresh_loss"] is None and lines[1]["refresh_loss"] > 0  # 8 prompts, 4 a step: an epoch of two steps
    assert max(m["max_dlogp"] for m in lines) < 1e-3  # fp32, and warm-start latents of length 1,000; exact in test_decode.py
    table = json.load(open(out / "results.json"))
    assert [r["model"] for r in table] == ["base, explicit reasoning", "base, tag prompt", "LiteReason before RL", "LiteReason",
                                          "  its latents taken away"]
    # ... and its output directory is a model for the other scripts, by name
    got = script("eval.py", "--model", out, "tiny:plain", "--n", 4, "--show", 1, "--json", tmp_path / "e.json")
    assert got.returncode == 0, got.stderr
    first, second = json.load(open(tmp_path / "e.json"))
    assert (first["prompt"], second["prompt"]) == ("tag", "plain") and second["latent_steps"] == 0
    for key in ("accuracy", "accuracy_ci95", "tokens", "text_tokens", "latent_steps", "tags", "truncated", "n_examples", "samples", "seconds"):
        assert key in first, key
    got = script("train_rl.py", "--model", out, "--steps", 1, "--n", 4, "--prompts", 2, "--out", tmp_path / "again")
    assert got.returncode == 0 and "stage 1" not in got.stdout, got.stderr  # it has a trained projector already


def test_rl_without_latents_and_with_recomputed_ones_run(tmp_path):
    small = ("--steps", 2, "--n", 0, "--prompts", 4, "--group", 4, "--trace-prompts", 16)
    got = script("train_rl.py", "--method", "grpo", *small, "--out", tmp_path / "grpo")
    assert got.returncode == 0, got.stderr
    assert all(json.loads(line)["latent_steps"] == 0 for line in open(tmp_path / "grpo" / "metrics.jsonl"))
    got = script("train_rl.py", "--recompute-latents", "--overlong-buffer", 40, "--minibatches", 2, "--projector-steps", 1, *small,
                 "--out", tmp_path / "re")
    assert got.returncode == 0, got.stderr
    first = json.loads(open(tmp_path / "re" / "metrics.jsonl").readline())
    assert first["max_dlogp"] < 1e-2  # before the first update recomputed latents are the stored ones


def test_stages_1_and_2_keep_their_traces_for_a_second_run(tmp_path):
    words = ("train_projector.py", "--steps", 2, "--prompts", 12, "--n", 4, "--out", tmp_path / "p")
    got = script(*words)
    assert got.returncode == 0 and "kept" in got.stdout, got.stderr
    for what in ("no latents", "zeros", "warm start", "trained", "accuracy with the tag prompt"):
        assert what in got.stdout
    again = script(*words)
    assert "traces from" in again.stdout


def test_the_second_task_of_the_tiny_world_runs_too(tmp_path):
    got = script("train_rl.py", "--task", "tiny.next_chapter", "--steps", 2, "--projector-steps", 2, "--trace-prompts", 40, "--n", 4, "--prompts", 2,
                 "--group", 4, "--out", tmp_path / "n")
    assert got.returncode == 0, got.stderr


@pytest.mark.parametrize("words, says", [
    (("eval.py", "--model", "nowhere/at/all"), "no model directory"),
    (("eval.py", "--model", "Qwen2.5-1.5B"), "Without a network"),
    (("eval.py", "--task", "nothing"), "no task 'nothing'"),
    (("eval.py", "--split", "dev"), "splits"),
    (("eval.py", "--json", "/nowhere/e.json", "--n", "2"), "/nowhere/e.json"),
    (("train_rl.py", "--group", "1"), "--group"),
    (("train_rl.py", "--steps", "-1"), "--steps"),
    (("train_rl.py", "--out", "/proc/nothing"), "/proc/nothing"),
    (("train_rl.py", "--device", "tpu"), "--device"),
    (("train_projector.py", "--model", "README.md"), "no model directory"),
    (("train_rl.py", "--learning-rate", "1"), "--learning-rate"),
])
def test_a_wrong_word_ends_in_one_line_and_exit_code_2(words, says, tmp_path, capsys, monkeypatch):
    if words[0] != "eval.py" and "--out" not in words:
        words += ("--out", tmp_path / "o")
    # In this process: eleven more interpreters would take most of a minute. What it prints and its exit code are the same.
    monkeypatch.setattr(sys, "argv", [str(w) for w in words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(os.path.join(ROOT, words[0]), run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert "Traceback" not in said and says in said.strip().splitlines()[-1]
