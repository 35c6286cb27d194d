"""Settings of the released code that a flag asks for: each does what its help says, the defaults stay ours,
and a run with all of them resumes exactly."""
import signal
import types

import pytest
from test_real_tasks import run
from test_resume import SIZES, metrics, same_weights, stopped

import train_projector
import train_rl

FLAGS = ("--lr-schedule", "cosine", "--recompute-latents", "--refresh-every", 0)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run that RL can start from: its projector has made a step."""
    out = tmp_path_factory.mktemp("start") / "projector"
    run(train_projector, "--device", "cpu", "--prompts", 16, "--samples", 2, "--targets", "none",
        "--batch", 2, "--n", 1, "--max-new-tokens", 60, "--steps", 1, "--out", out)
    return out


def test_a_run_with_all_of_them_that_was_stopped_continues_bit_for_bit(start, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    words = ("--model", start, *SIZES, "--num-generations", 8, "--max-new-tokens", 120, "--n", 0, *FLAGS,
             "--steps", 4)
    run(train_rl, *words, "--out", whole)
    stopped(train_rl, "learning_rate", 3, signal.SIGTERM, train_rl, *words, "--out", half)
    run(train_rl, "--resume", half)
    assert same_weights(whole, half)
    assert metrics(whole) == metrics(half) and metrics(whole)[-1]["refresh_loss"]


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


@pytest.mark.parametrize("every, batches", [(3, [2, 3, 4, 6]), (0, [2, 4, 6]), (-1, [])])
def test_the_projector_is_refreshed_every_so_many_batches_and_at_each_epochs_end(start, tmp_path, monkeypatch,
                                                                                every, batches):
    """Of 6 batches; an epoch has 2, of 2 minibatches each."""
    refreshed = []
    monkeypatch.setattr(train_rl, "refresh", lambda *args: refreshed.append(args[-1] + 1))
    run(train_rl, "--model", start, *SIZES, "--n", 0, "--val", 0, "--steps", 12, "--refresh-every", every,
        "--out", tmp_path / "run")
    assert refreshed == batches
