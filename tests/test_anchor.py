"""With targets RL holds the base to the latents of stage 1's traces (targets.add_anchor), and the
refresh learns from such traces (train_rl.rehearse)."""
import json
import signal
import types

import pytest
import torch
from conftest import close
from test_real_tasks import run
from test_resume import same_weights, stopped

import targets
import train_projector
import train_rl
from data import tiny
from lib.memory import base_parameters
from litereason import UserError, load

RL = ("--device", "cpu", "--n", 0, "--val", 0, "--train-prompts", 8, "--prompts", 4, "--num-generations", 4,
      "--max-new-tokens", 60, "--save-every", 1, "--show-every", 0)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run of stages 1 and 2 with targets."""
    out = tmp_path_factory.mktemp("start") / "projector"
    run(train_projector, "--device", "cpu", "--prompts", 40, "--samples", 1, "--steps", 2, "--batch", 4,
        "--n", 1, "--out", out)
    return out


@pytest.fixture
def stage_1(start):
    model, tokenizer = load(str(start), "cpu")
    args = types.SimpleNamespace(out=str(start), seed=0, noise=0.2, words=2)
    return args, model, tokenizer, train_rl.traces_of_stage_1(args, tokenizer, tiny)


def gradients(model):
    found = [p.grad.clone() for p in base_parameters(model)]
    model.zero_grad(set_to_none=True)
    return found


def test_the_anchor_is_the_error_of_true_targets_and_moves_the_base_alone(stage_1):
    args, model, tokenizer, traces = stage_1
    error = targets.add_anchor(args, model, tokenizer, traces, step=3)
    assert all(p.grad is None and p.requires_grad for p in model.reasoning_projector.parameters())
    whole = gradients(model)

    rows = targets.masked_again(args, model, tokenizer, traces, targets.ANCHORED, "3 anchor")
    fed = targets.with_noise(rows, 0.2, torch.Generator().manual_seed(3))
    loss = targets.target_loss(model, rows, fed, None, sum(row.n_latents for row in rows))
    close(torch.tensor(error), loss.detach(), 1e-5 * error)
    loss.backward()
    for a, b in zip(whole, gradients(model)):
        close(a, b, 1e-5)

    args.tokens_per_forward, args.anchor = 300, 2.0
    again = targets.add_anchor(args, model, tokenizer, traces, step=3)
    close(torch.tensor(again), torch.tensor(error), 1e-5)
    for a, b in zip(whole, gradients(model)):
        close(2 * a, b, 1e-4)


def test_the_traces_of_a_step_follow_from_its_number(stage_1):
    args, model, tokenizer, traces = stage_1

    def slots(step):
        rows = targets.masked_again(args, model, tokenizer, traces, 8, f"{step} anchor")
        return [row.slots for row in rows]

    assert slots(1) == slots(1) != slots(2)


def test_the_refresh_with_targets_moves_the_projector_alone(stage_1):
    args, model, tokenizer, traces = stage_1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = train_rl.State([], micro_batch_tokens=10**6)
    assert train_rl.rehearse(args, model, tokenizer, state, traces, batch=1) > 0
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("reasoning_projector"), name


def test_a_run_with_an_anchor_stands_alone_and_continues_bit_for_bit(start, tmp_path):
    words = ("--model", start, *RL, "--steps", 4)
    run(train_rl, *words, "--out", tmp_path / "whole")
    stopped(train_rl, "learning_rate", 3, signal.SIGTERM, train_rl, *words, "--out", tmp_path / "half")
    run(train_rl, "--resume", tmp_path / "half")
    assert same_weights(tmp_path / "whole", tmp_path / "half")
    one, two = ([json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
                for name in ("whole", "half"))
    assert [m["anchor_loss"] for m in one] == [m["anchor_loss"] for m in two]
    assert all(m["anchor_loss"] > 0 for m in one)
    assert [m["refresh_loss"] is not None for m in one] == [False, True, False, True]  # an epoch is 2 batches
    assert (tmp_path / "whole" / "traces.jsonl").read_text() == (start / "traces.jsonl").read_text()


def test_rl_takes_over_what_stage_2_has_taught_the_latents(start, tmp_path):
    """Another target than that which the projector has learned would pull the base away from it."""
    run(train_projector, "--device", "cpu", "--prompts", 40, "--samples", 1, "--steps", 2, "--batch", 4,
        "--n", 1, "--targets", "none", "--out", tmp_path / "paper")
    run(train_rl, "--model", tmp_path / "paper", *RL, "--steps", 1, "--out", tmp_path / "a")
    run(train_rl, "--model", tmp_path / "paper" / "model", *RL, "--steps", 1, "--out", tmp_path / "b")
    run(train_rl, "--model", start, *RL, "--steps", 1, "--out", tmp_path / "c")

    def of(name):
        with open(tmp_path / name / "config.json") as config, open(tmp_path / name / "metrics.jsonl") as log:
            return {**json.load(config), **json.loads(log.readline())}

    assert of("a")["targets"] == of("b")["targets"] == "none" and of("a")["anchor_loss"] is None
    assert of("c")["targets"] == "words" and of("c")["noise"] == 0.2 and of("c")["anchor_loss"] > 0


def test_a_pause_token_has_nothing_that_an_anchor_could_hold(tmp_path):
    run(train_rl, "--projector", "pause", *RL, "--steps", 1, "--projector-steps", 1, "--trace-prompts", 40,
        "--out", tmp_path)
    with open(tmp_path / "metrics.jsonl") as f:
        assert json.loads(f.readline())["anchor_loss"] > 0


def test_without_the_traces_the_run_says_what_to_do(start, tmp_path):
    (tmp_path / "bare").mkdir()
    (start / "model").rename(tmp_path / "bare" / "model")
    try:
        words = ("--model", tmp_path / "bare" / "model", *RL, "--steps", 1)
        with pytest.raises(UserError, match="--targets none, or --anchor 0 --refresh-every -1"):
            run(train_rl, *words, "--out", tmp_path / "a")
        run(train_rl, *words, "--out", tmp_path / "b", "--anchor", 0, "--refresh-every", -1)
        with pytest.raises(UserError, match="--targets none, or --anchor 0 --refresh-every -1"):
            run(train_rl, *words, "--out", tmp_path / "b", "--overwrite")
        assert (tmp_path / "b" / "model" / "model.safetensors").exists()  # refused before anything is deleted
    finally:
        (tmp_path / "bare" / "model").rename(start / "model")


def test_traces_that_may_hold_tags_are_no_targets(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "traces.jsonl").write_text(json.dumps({"tag": None}) + "\n")
    args = types.SimpleNamespace(model=str(tmp_path / "run"), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="may hold tags"):
        train_rl.copy_traces(args)
