"""What somebody sees who runs a real model for the first time: what is said before a run, the smoke run's
flags, and why stage 1 keeps too little."""
import json
import random
import sys
import types
from collections import Counter

import pytest
import torch

import data
from lib import checkpoint, run
import train_projector
import train_rl
from litereason import Rollout, UserError


# ---------------------------------------------------------------- why stage 1 keeps too little
TASK = types.SimpleNamespace(__name__="task", prompt=lambda example, latent: f"q{example['i']}",
                             verdict=lambda text: text.partition("box ")[2])
ANSWERS = [("He left. box right", True), ("He left. box right", False), ("cut", False), ("No", True),
           ("Yes", True), ("It is. box no", True), ("box no, because", False)]
REASONS = {"cut": 2, "no verdict": 2, "wrong": 2}


@pytest.fixture
def collect(monkeypatch, tmp_path):
    """collect(examples) -> stage 1's result; each example gets ANSWERS, and is a line of the file.
    collect.sampled: how often there was something to sample."""
    made = [Rollout([1], [2], torch.zeros(0, 4), text=text, finished=whole) for text, whole in ANSWERS]
    monkeypatch.setattr(train_projector, "AT_ONCE", 1)
    monkeypatch.setattr(data, "score", lambda task, examples, texts: ["right" in text for text in texts])
    config = types.SimpleNamespace(_name_or_path="m")
    model = types.SimpleNamespace(config=config, named_parameters=lambda: [])

    def generate(*_, **__):
        collect.sampled += 1
        return made

    def collect(n):
        examples = [{"i": i} for i in range(n)]
        return train_projector.collect_traces(model, None, TASK, examples, str(tmp_path / "traces.jsonl"),
                                              len(ANSWERS), 5, 0)

    collect.sampled = 0
    collect.path = tmp_path / "traces.jsonl"
    monkeypatch.setattr(train_projector, "generate", generate)
    return collect


def test_every_sample_that_is_not_kept_has_its_reason(collect, capsys):
    traces, left_out = collect(2)
    assert [(trace["example"], trace["text"]) for trace in traces] == [(i, "He left. box right") for i in (0, 1)]
    assert Counter(trace["left out"] for trace in left_out) == {why: 2 * n for why, n in REASONS.items()}
    others = capsys.readouterr().out.partition("; the others: ")[2]
    assert others.startswith("4 cut by the length limit (a higher --max-new-tokens helps), 4 without an answer")
    assert train_projector.read_traces(collect.path) == traces


def test_the_reasons_survive_a_stop(collect, capsys):
    whole = collect(3)
    text = collect.path.read_text()
    lines = text.splitlines(keepends=True)
    collect.path.write_text("".join(lines[:2]) + lines[2][:20])  # stopped while the second line was written
    assert collect(3) == whole and collect.path.read_text() == text
    assert collect.sampled == 3 + 2 and "1 traces are in " in capsys.readouterr().out


@pytest.mark.parametrize("left_out, texts, says", [
    ({"no verdict": 5, "wrong": 2}, [], "kept 0 of 7 traces, too few: two stories with a sentence to mask are the "
     "least; the others: 5 without an answer in the form that the prompt asks for .*, 2 that earned nothing"),
    ({"cut": 3}, ["It is so. \\boxed{Yes}"], "kept 1 of 4 traces, .* 3 cut by the length limit"),
    ({"wrong": 1}, ["\\boxed{Yes}", "\\boxed{No}"], "2 without a sentence before the answer.*, 1 that earned"),
    ({}, ["It is so. \\boxed{Yes}"], "kept 1 of 1 traces, too few: .* are the least$"),
])
def test_too_few_traces_are_said_with_what_helps(model, tok, left_out, texts, says):
    left_out = [{"left out": why} for why, n in left_out.items() for _ in range(n)]
    traces = [{"example": i, "prompt": "q", "text": text} for i, text in enumerate(texts)]
    rng = random.Random(0)
    rows = train_projector.versions(model, tok, traces, "\\boxed{", rng)
    with pytest.raises(UserError, match=says) as e:
        train_projector.hold_out(rows, traces, left_out, rng)
    assert "\n" not in str(e.value)


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
    run.write_settings(str(tmp_path), "train_rl.py", vars(smoke))
    again = vars(parsed(monkeypatch, "--resume", tmp_path))
    assert {**vars(smoke), "resume": str(tmp_path)} == again
    assert vars(parsed(monkeypatch)) == plain  # nothing of it is left behind


# ---------------------------------------------------------------- what is said before a run
def settled(**changes):
    """The settings of a run of train_rl.py as released."""
    args = types.SimpleNamespace(**{name: None for part in train_rl.SETTINGS.values() for name in part})
    vars(args).update({"method": "litereason", "task": "t", "model": "m", "offload": False, **changes})
    run.fill(args, train_rl.SETTINGS, small=False)
    return args


@pytest.mark.parametrize("changes, said", [
    ({}, "all settings as released"),
    ({"lr": 1e-5, "gen_batch_size": 3, "save_every": 2}, "not as released: lr 1e-05 (released: 5e-07)"),
    ({"targets": "words"}, "not as released: targets words (released: none)"),
    ({"method": "grpo", "targets": "words", "prompts": 4}, "not as released: prompts 4 (released: 48)"),
])
def test_what_runs_is_said_first_with_what_is_not_as_released(model, capsys, changes, said):
    train_rl.say_what_runs(settled(**changes), model, [[1], [1, 2]], "memory")
    lines = capsys.readouterr().out.splitlines()
    assert "on t: m, 0.0 M parameters, cpu, fp32 weights; 2 train prompts of up to 2 tokens" in lines[0]
    assert lines[1].startswith("2880 steps, 16 on each batch of ") and lines[2:] == [said, "memory"]


@pytest.mark.parametrize("earns", [True, False])
def test_a_smoke_run_of_a_model_that_counts_as_real_ends_in_the_table(tmp_path, monkeypatch, capsys, earns):
    """The tiny model, with the settings and the plan of memory of a real one on a CPU."""
    if not earns:
        monkeypatch.setattr(data, "score", lambda task, examples, texts, step=0: [0.0] * len(texts))
        monkeypatch.setattr(train_rl, "check_answers", lambda *_: None)
    monkeypatch.setattr(checkpoint, "is_small", lambda model: False)
    monkeypatch.setattr(train_projector, "VERSIONS", 2)
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "--smoke", "--device", "cpu", "--out", str(tmp_path)])
    train_rl.main()
    said = capsys.readouterr().out
    order = ["M parameters, cpu", "4 steps, 2 on each batch of 8 rollouts", "not as released: steps 4",
             "GiB can be used; with --", "stage 1: kept", "stage 2: validation loss", "step    4/4",
             "| base, tag prompt", "| LiteReason "]
    if not earns:
        order[5:5] = ["warning: stage 1 kept 0 of 40 traces, too few", "goes on with all samples"]
    assert [words for words in order if words not in said] == []
    places = [said.index(words) for words in order]
    assert places == sorted(places) and "time at most" not in said
    config = json.load(open(tmp_path / "config.json"))
    assert config["micro_batch_tokens"] <= train_rl.memory.FEW_POSITIONS and not config["offload"]
    rows = [row["model"] for row in json.load(open(tmp_path / "results.json"))]
    assert rows[:3] == ["base, explicit reasoning", "base, tag prompt", "LiteReason before RL"]
