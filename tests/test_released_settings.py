"""Settings of the released code that a flag asks for: each does what its help says, the defaults stay ours,
and a run with all of them resumes exactly."""
import json
import signal
import types

import pytest
import torch
from test_real_tasks import run
from test_resume import SIZES, same_weights, stopped

import data
import train_projector
import train_rl
from litereason import Rollout, UserError

FLAGS = ("--lr-schedule", "cosine", "--recompute-latents", "--refresh-every", 0)
STAGES_1_AND_2 = ("--device", "cpu", "--prompts", 16, "--samples", 2, "--targets", "none", "--batch", 2,
                  "--n", 1, "--max-new-tokens", 60)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run that RL can start from: its projector has made a step."""
    out = tmp_path_factory.mktemp("start")
    run(train_projector, *STAGES_1_AND_2, "--steps", 1, "--out", out / "projector")
    return out / "projector"


def test_a_run_with_all_of_them_that_was_stopped_continues_bit_for_bit(start, tmp_path):
    words = ("--model", start, *SIZES, "--num-generations", 8, "--max-new-tokens", 120, "--n", 0, *FLAGS,
             "--steps", 4)
    run(train_rl, *words, "--out", tmp_path / "whole")
    stopped(train_rl, "learning_rate", 3, signal.SIGTERM, train_rl, *words, "--out", tmp_path / "half")
    run(train_rl, "--resume", tmp_path / "half")
    assert same_weights(tmp_path / "whole", tmp_path / "half")
    one, two = ([json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
                for name in ("whole", "half"))
    assert [m["refresh_loss"] for m in one] == [m["refresh_loss"] for m in two] and one[-1]["refresh_loss"]


def test_the_default_rate_is_constant_and_the_released_one_warms_up_and_falls_to_a_tenth():
    constant = types.SimpleNamespace(lr=5e-7, steps=200, lr_schedule="constant")
    cosine = types.SimpleNamespace(lr=5e-7, steps=200, lr_schedule="cosine")
    assert {train_rl.learning_rate(constant, step) for step in range(200)} == {5e-7}
    rates = [train_rl.learning_rate(cosine, step) / 5e-7 for step in range(201)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])  # 3 % of 200
    assert rates[6:] == sorted(rates[6:], reverse=True) and rates[103] == pytest.approx(0.55)
    assert rates[200] == pytest.approx(0.1)
    for steps in (1, 2):
        cosine.steps = steps
        assert all(0 < train_rl.learning_rate(cosine, step) <= 5e-7 for step in range(steps))


def test_the_projector_is_refreshed_every_so_many_batches_and_at_each_epochs_end(start, tmp_path,
                                                                                monkeypatch):
    def refreshed(*flags):
        """The numbers of the batches with a refresh, of 6; an epoch has 2, of 2 minibatches each."""
        batches = []
        monkeypatch.setattr(train_rl, "refresh", lambda *args: batches.append(args[-1] + 1))
        run(train_rl, "--model", start, *SIZES, "--n", 0, "--val", 0, "--steps", 12, *flags,
            "--out", tmp_path / str(len(list(tmp_path.iterdir()))))
        return batches

    assert refreshed("--refresh-every", 3) == [2, 3, 4, 6]
    assert refreshed("--refresh-every", 0) == [2, 4, 6]
    assert refreshed("--refresh-every", -1) == []


# ---------------------------------------------------------------- stages 1 and 2
def test_cut_traces_are_kept_only_if_asked_for(monkeypatch, tmp_path):
    made = [Rollout([1], [2], torch.zeros(0, 4), text=text, finished=text == "whole")
            for text in ("whole", "cut")]
    monkeypatch.setattr(train_projector, "generate", lambda *_, **__: made)
    monkeypatch.setattr(data, "score", lambda *_: [1.0, 1.0])
    task = types.SimpleNamespace(__name__="task", prompt=lambda example, latent: "q")
    config = types.SimpleNamespace(_name_or_path="m")
    model = types.SimpleNamespace(config=config, named_parameters=lambda: [])

    def kept(**more):
        path = str(tmp_path / "traces.jsonl")
        traces, _ = train_projector.collect_traces(model, None, task, [{}], 2, 5, 0, path, **more)
        return [trace["text"] for trace in traces]

    assert kept() == ["whole"]
    assert kept(keep_cut=True) == ["whole", "cut"]  # sampled again: the file says how it was made
    assert kept(keep_cut=False) == ["whole"]


def test_traces_of_other_prompts_or_other_weights_are_not_taken_for_ones_own(monkeypatch, tmp_path, capsys):
    made = [Rollout([1], [2], torch.zeros(0, 4), text="t", finished=True)]
    monkeypatch.setattr(train_projector, "generate", lambda *_, **__: made)
    monkeypatch.setattr(data, "score", lambda *_: [1.0])
    weights = torch.zeros(3)
    config = types.SimpleNamespace(_name_or_path="m")
    model = types.SimpleNamespace(config=config, named_parameters=lambda: [("w", weights)])

    def said(prompt):
        task = types.SimpleNamespace(__name__="task", prompt=lambda example, latent: prompt)
        train_projector.collect_traces(model, None, task, [{}], 1, 5, 0, str(tmp_path / "traces.jsonl"))
        return capsys.readouterr().out

    assert "already" not in said("q") and "already" in said("q")
    assert "other settings" in said("another q")
    weights += 1
    assert "other settings" in said("another q")


def test_long_traces_are_left_out_only_if_asked_for():
    rows = [Rollout([1] * n, [2, 2, -1, -1], torch.zeros(2, 4)) for n in (3, 4, 5)]
    assert train_projector.short_enough(rows, None) == rows
    assert train_projector.short_enough(rows, 6) == rows[:2]  # latents do not count


def test_stage_2_with_other_betas_and_lengths(tmp_path):
    words = (*STAGES_1_AND_2, "--steps", 2)
    run(train_projector, *words, "--out", tmp_path / "a")
    run(train_projector, *words, "--out", tmp_path / "b", "--betas", 0.9, 0.999)
    assert not same_weights(tmp_path / "a", tmp_path / "b")
    for flags, says in ((("--max-length", 5),
                         "no masked trace has 5 tokens or fewer, prompt included: raise "),
                        (("--betas", 0.9, 1), "--betas are .*; each must be at least 0 and below 1")):
        with pytest.raises(UserError, match=says):
            run(train_projector, *words, *flags, "--out", tmp_path / "c")
