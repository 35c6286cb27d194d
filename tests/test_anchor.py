"""With targets RL holds the base to the latents of stage 1's traces (train_projector.add_anchor), and the
refresh learns from such traces (train_rl.rehearse). And the schedules of rates and refreshes."""
import json
import random
import signal
import types

import pytest
import torch
from conftest import close
from test_real_tasks import run
from test_resume import metrics, same_weights, stopped

import data
import train_projector
import train_rl
from data import tiny
from lib import UserError
from lib.memory import base_parameters
from litereason import load

RL = ("--device", "cpu", "--n", 0, "--val", 0, "--train-prompts", 4, "--prompts", 2, "--num-generations", 4,
      "--max-new-tokens", 60, "--save-every", 1, "--show-every", 0)
SHORT = (*RL, "--num-generations", 2, "--max-new-tokens", 4, "--save-every", 9)  # where no answer is read
STAGES = ("--device", "cpu", "--prompts", 24, "--samples", 1, "--steps", 2, "--batch", 4, "--n", 1,
          "--max-new-tokens", 100)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of stages 1 and 2 with targets."""
    out = tmp_path_factory.mktemp("start") / "projector"
    run(train_projector, *STAGES, "--out", out)
    return out


@pytest.fixture
def loaded(start):
    """(model, tokenizer, the traces of stage 1 as RL reads them)"""
    model, tokenizer = load(str(start), "cpu")
    _, *lines = train_rl.lines_of(str(start / "traces.jsonl"))
    return model, tokenizer, train_rl.pieces_of(tokenizer, train_rl.kept(lines), data.opening_of(tiny))


def gradients(model):
    found = [p.grad.clone() for p in base_parameters(model)]
    model.zero_grad(set_to_none=True)
    return found


def test_the_anchor_is_the_error_of_true_targets_and_moves_the_base_alone(loaded):
    model, tokenizer, stage_1 = loaded
    error = train_projector.add_anchor(*loaded, 3, 1.0, noise=0.2, seed=0, budget=10**6)
    assert all(p.grad is None and p.requires_grad for p in model.reasoning_projector.parameters())
    whole = gradients(model)

    rows = train_projector.masked_again(*loaded, train_projector.ANCHORED, random.Random("0 3 anchor"))
    fed = train_projector.with_noise(rows, 0.2, torch.Generator().manual_seed(3))
    loss = train_projector.target_loss(model, rows, fed, None, sum(row.n_latents for row in rows))
    close(torch.tensor(error), loss.detach(), 1e-5 * error)
    loss.backward()
    for a, b in zip(whole, gradients(model)):
        close(a, b, 1e-5)

    # twice the weight, in micro-batches
    again = train_projector.add_anchor(*loaded, 3, 2.0, noise=0.2, seed=0, budget=300)
    close(torch.tensor(again), torch.tensor(error), 1e-5)
    for a, b in zip(whole, gradients(model)):
        close(2 * a, b, 1e-4)


def test_a_run_with_an_anchor_stands_alone_and_continues_bit_for_bit(start, tmp_path):
    """With the released settings that are no defaults."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    words = ("--model", start, *RL, "--steps", 3, "--lr-schedule", "cosine", "--recompute-latents")
    run(train_rl, *words, "--out", whole)
    stopped(train_rl, "learning_rate", 2, signal.SIGTERM, train_rl, *words, "--out", half)
    run(train_rl, "--resume", half)
    assert same_weights(whole, half) and metrics(whole) == metrics(half)
    assert all(m["anchor_loss"] > 0 for m in metrics(whole)) and metrics(whole)[1]["refresh_loss"] > 0
    assert (whole / "traces.jsonl").read_text() == (start / "traces.jsonl").read_text()


@pytest.mark.parametrize("every, batches", [(3, [2, 3, 4, 6]), (0, [2, 4, 6]), (-1, [])])
def test_the_projector_is_refreshed_every_so_many_batches_and_at_each_epochs_end(
        start, tmp_path, monkeypatch, every, batches):
    """Of 6 batches; an epoch has 2."""
    refreshed = []
    monkeypatch.setattr(train_rl, "rehearse", lambda *args: refreshed.append(args[-1] + 1))
    run(train_rl, "--model", start, *SHORT, "--steps", 6, "--refresh-every", every, "--out", tmp_path)
    assert refreshed == batches


def test_the_default_rate_is_constant_and_the_released_one_warms_up_and_falls_to_a_tenth():
    def rates(schedule, steps):
        args = types.SimpleNamespace(lr=5e-7, steps=steps, lr_schedule=schedule)
        return [train_rl.learning_rate(args, step) / 5e-7 for step in range(steps + 1)]

    assert set(rates("constant", 200)) == {1}
    cosine = rates("cosine", 200)
    assert cosine[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])  # 3 % of 200
    assert cosine[6:] == sorted(cosine[6:], reverse=True)
    assert (cosine[103], cosine[200]) == pytest.approx((0.55, 0.1))
    assert all(0 < rate <= 1 for steps in (1, 2) for rate in rates("cosine", steps)[:steps])


def test_rl_takes_over_what_stage_2_has_taught_the_latents(start, tmp_path):
    """Another target than that which the projector has learned would pull the base away from it."""
    run(train_projector, *STAGES, "--targets", "none", "--out", tmp_path / "paper")
    for model, out in ((tmp_path / "paper", tmp_path / "a"), (tmp_path / "paper" / "model", tmp_path / "b")):
        run(train_rl, "--model", model, *SHORT, "--steps", 1, "--out", out)
        assert json.load(open(out / "config.json"))["targets"] == "none"
        assert metrics(out)[0]["anchor_loss"] is None


def test_without_traces_for_targets_the_run_says_what_to_do(tmp_path):
    args = types.SimpleNamespace(model=str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="there is no .*traces.jsonl, .*: say --targets none"):
        train_rl.copy_traces(args)
