"""What somebody sees who runs a real model for the first time: what is said before a run, the smoke run's
flags, and what stage 1 keeps."""
import json
import sys
import types

import pytest
import torch

import data
from lib import UserError, checkpoint, memory, run
import train_projector
import train_rl
from litereason import Rollout


# ---------------------------------------------------------------- what stage 1 keeps
ANSWERS = [("He left. box right", True), ("He left. box right", False), ("cut", False), ("No", True),
           ("Yes", True), ("It is. \\boxed{no}", True), ("box no, because", False)]


@pytest.fixture
def collect(monkeypatch, tmp_path):
    """collect() -> what stage 1 samples for three examples, each with ANSWERS in a line of the file.
    collect.sampled: how often there was something to sample; collect.weights: of the model."""
    made = [Rollout([1], [2], torch.zeros(0, 4), text=text, finished=whole) for text, whole in ANSWERS]
    monkeypatch.setattr(train_projector, "AT_ONCE", 1)
    monkeypatch.setattr(data, "score", lambda task, examples, texts: ["right" in text for text in texts])
    config = types.SimpleNamespace(_name_or_path="m")
    model = types.SimpleNamespace(config=config, named_parameters=lambda: [("w", collect.weights)])

    def generate(*_, **__):
        collect.sampled += 1
        return made

    def collect(question="q"):
        task = types.SimpleNamespace(__name__="task", prompt=lambda example, latent: question + example)
        return train_projector.collect_traces(model, None, task, list("012"), str(collect.path), len(ANSWERS),
                                              5, 0)

    collect.sampled, collect.path, collect.weights = 0, tmp_path / "traces.jsonl", torch.zeros(3)
    monkeypatch.setattr(train_projector, "generate", generate)
    return collect


def test_rewarded_whole_samples_are_kept_and_it_is_said_why_others_are_not(collect, capsys):
    traces = [sample for sample in collect() if "left out" not in sample]
    assert [(trace["example"], trace["prompt"], trace["text"]) for trace in traces] == [
        (i, f"q{i}", "He left. box right") for i in range(3)]
    assert (f"kept 3 of 21 traces (reward > 0), in {collect.path}; 9 were cut by --max-new-tokens, "
            "6 without an answer, 3 wrong") in capsys.readouterr().out
    assert train_projector.kept(train_projector.lines_of(collect.path)[1:]) == traces


def test_traces_of_other_prompts_or_other_weights_are_not_taken_for_ones_own(collect):
    for question, weights, sampled in (("q", 0, 3), ("q", 0, 3), ("another q", 0, 6), ("another q", 1, 9)):
        collect.weights = torch.full((3,), float(weights))
        collect(question)
        assert collect.sampled == sampled


@pytest.mark.parametrize("texts", [[], ["It is so. \\boxed{Yes}"], ["\\boxed{Yes}", "\\boxed{No}"]])
def test_too_few_traces_are_said_in_one_line_with_what_helps(model, tok, monkeypatch, capsys, texts):
    samples = [{"example": i, "prompt": "q", "text": text} for i, text in enumerate(texts)]
    monkeypatch.setattr(train_projector, "collect_traces", lambda *_: samples)
    task = types.SimpleNamespace(examples=lambda split: [])
    settings = train_projector.settings_of(model, targets="none")
    with pytest.raises(UserError, match="too few traces: .*; .* higher --max-new-tokens") as e:
        train_projector.run_stage_1(model, tok, task, "", settings)
    assert "\n" not in str(e.value)
    # --smoke takes what was left out, too
    samples[:] = [{"example": i, "prompt": "q", "text": "It is.", "left out": "cut"} for i in (0, 1)]
    train, held, _ = train_projector.run_stage_1(model, tok, task, "", settings, smoke=True)
    assert train and held and all(r.n_latents for r in train + held)
    assert "warning: too few traces were kept; --smoke goes on with all samples" in capsys.readouterr().out


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
    run.begin(str(tmp_path), "train_rl.py", vars(smoke))
    assert {**vars(smoke), "resume": str(tmp_path)} == vars(parsed(monkeypatch, "--resume", tmp_path))
    assert vars(parsed(monkeypatch)) == plain  # nothing of it is left behind


def test_a_smoke_run_of_a_model_that_counts_as_real_ends_in_the_table(tmp_path, monkeypatch, capsys):
    """The tiny model, with the settings and the plan of memory of a real one on a CPU."""
    for module in (checkpoint, memory):
        monkeypatch.setattr(module, "is_small", lambda model: False)
    monkeypatch.setattr(train_projector, "VERSIONS", 2)
    words = ["train_rl.py", "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--n", "1", "--max-new-tokens", "64"])
    train_rl.main()
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
    run.fill(args, train_rl.SETTINGS, small=False)
    train_rl.say_what_runs(args, model, [[1], [1, 2]], "memory")
    first, *lines = capsys.readouterr().out.splitlines()
    assert "on t: m, 0.0 M parameters, cpu, fp32 weights; 2 train prompts of up to 2 tokens" in first
    assert lines[0].startswith("2880 steps, 16 on each batch of ") and lines[1:] == [said, "memory"]
    monkeypatch.setattr(checkpoint, "is_small", lambda model: False)
    train_rl.say_what_runs(args, model, [[1]], "")
    assert "on a CPU this takes days: --smoke shows in minutes whether all works" in capsys.readouterr().out
