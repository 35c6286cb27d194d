"""A stopped run continues as if it had never stopped; what cannot continue ends in one plain line. kill.py is
the long form: it kills real processes at any moment."""
import json
import os
import shutil
import signal

import pytest
import torch
from conftest import SIZES
from safetensors.torch import load_file
from test_real_tasks import one_line, run

import data
import train_projector
import train_rl
from lib import run as runs
from litereason import UserError


def without_clocks(row):
    """Without what a clock or the operating system says."""
    return {name: value for name, value in row.items() if not name.startswith(("seconds", "peak_memory_gib"))}


def metrics(out):
    return [without_clocks(json.loads(line)) for line in open(out / "metrics.jsonl")]


def same_weights(a, b):
    one, two = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def same(a, b):
    one, two = ([without_clocks(row) for row in json.load(open(out / "results.json"))] for out in (a, b))
    return same_weights(a, b) and metrics(a) == metrics(b) and one == two


def stopped(module, name, call, number, *words):
    """Runs a script and sends it a signal at the call-th call of module.name -> what it says of the stop."""
    real, calls = getattr(module, name), iter(range(1, 1000))
    former = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def function(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, function)
        with pytest.raises(KeyboardInterrupt) as e:
            run(*words)
    assert former == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert e.value.args[0] == number
    return e.value.args[1]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The run `whole`, but stopped in stage 2, and within step 3 of stage 3, in the middle of a batch."""
    out = tmp_path_factory.mktemp("begun") / "half"
    said = stopped(train_projector, "projector_loss", 4, signal.SIGTERM, train_rl, *SIZES, "--out", out)
    assert said == f"go on with --resume {out}"
    with pytest.raises(UserError, match="half holds a run of train_rl.py on tiny: go on with --resume"):
        run(train_rl, *SIZES, "--out", out)
    # Ctrl-C while the state of step 2 is written: that of step 3 is the last.
    said = stopped(train_rl, "learning_rate", 3, signal.SIGINT, train_rl, "--resume", out)
    assert said == f"go on with: python train_rl.py --resume {out}"
    assert not (out / "stage-2").exists()
    assert runs.saved_states(out) == [2, 3] and not (out / "results.json").exists()
    return out


@pytest.fixture
def half(begun, tmp_path):
    """A copy of the stopped run."""
    return shutil.copytree(begun, tmp_path / "copy")


# ---------------------------------------------------------------- stopped and continued
def test_stages_1_and_2_stopped_halfway_continue_bit_for_bit(tmp_path, capsys, monkeypatch):
    """With targets; without them they are stopped in `begun`."""
    monkeypatch.setattr(train_projector, "AT_ONCE", 16)
    words = ("--device", "cpu", "--prompts", 32, "--samples", 1, "--steps", 5, "--batch", 4,
             "--save-every", 2, "--n", 1, "--max-new-tokens", 100)
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(train_projector, *words, "--out", whole)
    said = capsys.readouterr().out
    for what in ("kept", "no latents", "zeros", "start", "trained", "accuracy with the tag prompt"):
        assert what in said
    said = stopped(data, "score", 1, signal.SIGINT, train_projector, *words, "--out", half)  # in the first 16
    assert said == f"the traces sampled so far are kept; go on with --resume {half}"
    done = (half / "traces.jsonl").read_text()
    assert done.count("\n") == 2 and (whole / "traces.jsonl").read_text().startswith(done)
    with open(half / "traces.jsonl", "a") as f:
        f.write('[{"example": 16, "pro')
    capsys.readouterr()
    said = stopped(train_projector, "target_loss", 3, signal.SIGTERM, train_projector, "--resume", half)
    assert said == f"go on with --resume {half}" and runs.saved_states(half / "stage-2") == [2, 3]
    assert "already, 1 of 2 lines" in capsys.readouterr().out
    run(train_projector, "--resume", half)
    assert "resumed from" in capsys.readouterr().out
    for name in ("traces.jsonl", "model/model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (whole / name).read_bytes() == (half / name).read_bytes(), name
    one, two = (json.load(open(out / "results.json")) for out in (whole, half))
    for result in (one, two):
        result.update({row: without_clocks(result[row]) for row in ("before", "after")})
    assert one == two and one["losses"]["trained"] != one["losses"]["start"]


def test_a_run_stopped_within_a_batch_and_in_the_last_step_continues_bit_for_bit(whole, half, capsys):
    with open(half / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "epo')  # half a line of a step whose state was never written
    said = stopped(train_rl, "learning_rate", 1, signal.SIGTERM, train_rl, "--resume", half)
    assert said.startswith("go on with") and runs.saved_states(half) == [3, 4]
    assert not (half / "results.json").exists() and "state-3.pt" in capsys.readouterr().out
    run(train_rl, "--resume", half / "model")  # the run that it is in
    assert same(whole, half)


def end_of_child(action):
    """How a fork of this process ends that does so: 0, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_signal_ends_the_process_at_once():
    def stopped_twice():
        with runs.stops_noted("") as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            if stopped:
                os.kill(os.getpid(), signal.SIGTERM)

    assert end_of_child(stopped_twice) == -signal.SIGTERM


# ---------------------------------------------------------------- what cannot continue
def test_a_damaged_state_is_refused_in_one_line_and_without_it_the_one_before_is_taken(half):
    with open(half / "state-3.pt", "r+b") as f:
        f.seek(100_000)
        f.write(b"\x55\xaa" * 8)
    one_line("state-3.pt is damaged: delete it", run, train_rl, "--resume", half)
    os.truncate(half / "state-3.pt", 100)
    one_line("state-3.pt is damaged", runs.read_state, half)
    os.remove(half / "state-3.pt")
    assert runs.read_state(half)[0] == 2


def test_what_may_stand_beside_resume_and_what_can_not_be_resumed(half, tmp_path, monkeypatch):
    old = tmp_path / "old"
    old.mkdir()
    settings = json.loads((half / "config.json").read_text())
    del settings["num_generations"]
    (old / "config.json").write_text(json.dumps(settings))
    for script, words, says in (
        (train_rl, ("--resume", half, "--lr", 1), "--lr: a resumed run keeps .*, save --steps and"),
        (train_rl, ("--resume", old), "nothing to resume in .* no config.json of this version's train_rl.py"),
        (train_rl, ("--resume", tmp_path), "nothing to resume in .* no config.json of this version's"),
        (train_projector, ("--resume", half), "nothing to resume in .* no config.json of this version's"),
    ):
        one_line(says, run, script, *words)
    monkeypatch.setattr(runs, "digest", lambda examples: "another")
    with pytest.raises(UserError, match="the examples of tiny are not those that the run in .*copy began"):
        run(train_rl, "--resume", half)


@pytest.mark.parametrize("old, new", runs.OLD_FLAGS.items())
def test_an_old_flag_is_answered_by_the_new_one(old, new):
    one_line(f"^{old} is now {new}$", run, train_rl, old, 4)


def test_a_second_process_on_the_same_directory_is_refused(tmp_path):
    def begin():
        one_line("another process is writing to", run, train_rl, "--out", tmp_path)

    with runs.take_directory(str(tmp_path), "tiny"):
        assert end_of_child(begin) == 0


# ---------------------------------------------------------------- a full disk, and out of memory
@pytest.fixture
def again(whole):
    """The flags of one more step of RL, without a table."""
    return ("--model", whole, *SIZES, "--n", 0, "--steps", 1, "--minibatches", 1)


def in_one_line(capsys, *words):
    """What a script says last when it ends by itself with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runs.run_script(lambda: run(*words))
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "Traceback" not in "".join(said)
    return said[-1]


@pytest.mark.parametrize("name", ["metrics.jsonl.tmp", "state.tmp", "traces.jsonl.tmp"])
def test_a_disk_that_is_full_ends_in_one_line(again, tmp_path, capsys, name):
    (tmp_path / name).symlink_to("/dev/full")
    script, words = train_rl, again
    if name == "traces.jsonl.tmp":
        script, words = train_projector, ("--prompts", 2, "--device", "cpu")
    said = in_one_line(capsys, script, *words, "--out", tmp_path)
    assert "No space left on device; what was written before is kept" in said


def test_out_of_memory_in_the_update_halves_the_budget_and_changes_nothing_else(
        again, tmp_path, monkeypatch, capsys):
    words = (*again, "--train-prompts", 4)  # a step is an epoch
    real, calls, fails = train_rl.logprobs, iter(range(1, 99)), {2}

    def logprobs(*args):
        if next(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    run(train_rl, *words, "--micro-batch-tokens", 300, "--val", 0, "--out", tmp_path / "half")
    monkeypatch.setattr(train_rl, "logprobs", logprobs)
    run(train_rl, *words, "--micro-batch-tokens", 600, "--out", tmp_path / "oom")
    said = capsys.readouterr().out
    assert "stage 1" not in said  # the projector of --model has been trained
    assert "out of memory with 600 positions at once; from here on 300\n" in said
    assert runs.read_state(tmp_path / "oom")[1]["state"]["micro_batch_tokens"] == 300
    halved, oom = metrics(tmp_path / "half"), metrics(tmp_path / "oom")
    assert [m.pop("val_accuracy") for m in halved] == [None]
    assert all(0 <= m.pop("val_accuracy") <= 1 for m in oom)  # --val draws from a generator of its own
    assert halved == oom and same_weights(tmp_path / "half", tmp_path / "oom")
    assert max(m["grad_norm"] for m in halved) > 0
    calls, fails = iter(range(1, 99)), set(range(99))
    said = in_one_line(capsys, train_rl, *words, "--micro-batch-tokens", 600, "--out", tmp_path / "never")
    assert "error: out of memory (CUDA out of memory): see --help's flags of memory" in said


# ---------------------------------------------------------------- tripwires
def test_a_reward_that_is_not_finite_ends_the_run_before_any_update(again, tmp_path, monkeypatch):
    real = data.score
    monkeypatch.setattr(data, "score", lambda *args: [*real(*args)[:5], float("nan"), *real(*args)[6:]])
    one_line("step 1: a reward is nan; see .*bad-rollouts.json", run, train_rl, *again, "--out", tmp_path)
    aside = json.load(open(tmp_path / "bad-rollouts.json"))
    assert len(aside) == 1 and aside[0]["text"] and runs.saved_states(tmp_path) == [0]


def test_a_scorer_that_disagrees_with_the_sampler_stops_the_run(again, tmp_path, monkeypatch):
    real = train_rl.logprobs

    def logprobs(*args):
        logp, scored = real(*args)
        return logp + 0.1, scored

    monkeypatch.setattr(train_rl, "logprobs", logprobs)
    with pytest.raises(UserError, match="step 1: sampler and scorer differ by 0.1 in a log-prob"):
        run(train_rl, *again, "--out", tmp_path)
    assert len(json.load(open(tmp_path / "bad-rollouts.json"))) == 16


def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_stop_the_run(half, monkeypatch, capsys):
    before = runs.read_state(half)[1]["weights"]
    real = train_rl.policy_loss
    monkeypatch.setattr(train_rl, "policy_loss",
                        lambda *args, **more: (real(*args, **more)[0] * float("nan"), None))
    # All rollouts are learned from, whatever they earned: a step with nothing to learn from is finite.
    monkeypatch.setitem(train_rl.RULES, "grpo", lambda rewards, tokens, _: (torch.ones_like(rewards), tokens))
    one_line("steps 4 to 6 were not finite", run, train_rl, "--resume", half, "--steps", 9)
    lines = metrics(half)
    assert [m["skipped"] for m in lines] == [0, 0, 0, 1, 2, 3] and lines[-1]["grad_norm"] is None
    assert "3 so far" in capsys.readouterr().out
    step, after = runs.read_state(half)
    assert step == 6 and all(map(torch.equal, before, after["weights"]))
