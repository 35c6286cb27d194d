"""A stopped run continues as if it had never stopped; what cannot continue ends in one plain line.

The disk may be full or read-only, the newest state damaged, memory used up, another process may be writing.
kill.py is the long form: it kills real processes at any moment."""
import functools
import json
import os
import pathlib
import shutil
import signal
import tempfile
import types

import pytest
import torch
from conftest import tag
from safetensors.torch import load_file
from test_real_tasks import run

import data
from lib import display, run as runs
import train_projector
import train_rl
from data import tiny
from litereason import UserError, load, save

SIZES = ("--device", "cpu", "--n", 1, "--train-prompts", 8, "--prompts", 4, "--group", 4, "--minibatches", 2,
         "--max-new-tokens", 60, "--save-every", 1, "--show-every", 0, "--projector-steps", 2,
         "--trace-prompts", 24, "--targets", "none", "--val", 2)
NO_TABLE = ("--n", 0)  # for tests that do not read it
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module", autouse=True)
def stories_made_once():
    """Every run makes the same stories; they take a third of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "examples", functools.cache(tiny.examples))
        yield


def without_clocks(row):
    """Without what a clock or the operating system says."""
    return {name: value for name, value in row.items() if not name.startswith(("seconds", "peak_memory_gib"))}


def metrics(out):
    return [without_clocks(json.loads(line)) for line in open(out / "metrics.jsonl")]


def table(out):
    return [without_clocks(row) for row in json.load(open(out / "results.json"))]


def same_weights(a, b):
    one, two = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def same(a, b):
    return same_weights(a, b) and metrics(a) == metrics(b) and table(a) == table(b)


def stopped(module, name, call, number, *words):
    """Runs a script and sends it a signal at the call-th call of module.name -> what it says of the stop."""
    real, calls = getattr(module, name), iter(range(1, 1000))
    former = [signal.getsignal(s) for s in SIGNALS]

    def function(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, function)
        with pytest.raises(KeyboardInterrupt) as e:
            run(*words)
    assert former == [signal.getsignal(s) for s in SIGNALS]
    assert e.value.args[0] == number
    return e.value.args[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """whole: 4 steps, an epoch and a refresh, from the base through all stages. half: the same, stopped in
    the second of stage 2's two steps and within step 4 of stage 3, in the middle of a batch."""
    at = tmp_path_factory.mktemp("pair")
    run(train_rl, *SIZES, "--steps", 4, "--out", at / "whole")
    words = (*SIZES, "--steps", 4, "--out", at / "half")
    said = stopped(train_projector, "projector_loss", 5, signal.SIGTERM, train_rl, *words)
    assert said == f"step 1 of 2 of stage 2 is saved; go on with --resume {at / 'half'}"
    with pytest.raises(UserError, match="stopped in stage 2 or soon after it: go on with --resume"):
        run(train_rl, *words)
    checksum = runs._checksum

    def press(path):  # Ctrl-C while the state of step 3 is being written: it is written to its end
        if path.endswith("half/state-3.writing"):
            os.kill(os.getpid(), signal.SIGINT)
        return checksum(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_checksum", press)
        with pytest.raises(KeyboardInterrupt) as e:
            run(train_rl, "--resume", at / "half")
    assert e.value.args[0] == signal.SIGINT and "step 3 of 4 is saved; go on with" in e.value.args[1]
    assert not (at / "half" / "stage-2").exists() and not (at / "half" / "first-rows").exists()
    assert runs.saved_states(at / "half") == [2, 3] and not (at / "half" / "results.json").exists()
    return at


@pytest.mark.parametrize("aim", ["none", "words"])  # the paper's loss; ours, with the base learning too
def test_stages_1_and_2_stopped_halfway_continue_bit_for_bit(tmp_path, capsys, monkeypatch, aim):
    monkeypatch.setattr(train_projector, "AT_ONCE", 32)
    words = ("--device", "cpu", "--prompts", 40, "--samples", 1, "--steps", 5, "--batch", 4,
             "--save-every", 2, "--n", 1, "--max-new-tokens", 100, "--targets", aim)
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(train_projector, *words, "--out", whole)
    # in the second 32 prompts
    said = stopped(data, "score", 2, signal.SIGINT, train_projector, *words, "--out", half)
    assert said == f"the traces sampled so far are kept; go on with --resume {half}"
    done = (half / "traces.jsonl").read_text()
    assert done.count("\n") == 2 and (whole / "traces.jsonl").read_text().startswith(done)
    with open(half / "traces.jsonl", "a") as f:
        f.write('[{"example": 32, "pro')
    capsys.readouterr()
    words = ("--resume", half)
    loss = (train_projector, "projector_loss", 3 + 4)  # 3 of them before the first step
    if aim == "words":
        loss = (train_projector, "target_loss", 4)
    said = stopped(*loss, signal.SIGTERM, train_projector, *words)
    assert said == f"step 3 of 5 of stage 2 is saved; go on with --resume {half}"
    assert runs.saved_states(half / "stage-2") == [2, 3]
    assert "1 of 2 lines of it" in capsys.readouterr().out
    run(train_projector, "--resume", half)
    assert "resumed from" in capsys.readouterr().out
    for name in ("traces.jsonl", "model/model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (whole / name).read_bytes() == (half / name).read_bytes(), name
    one, two = (json.load(open(out / "results.json")) for out in (whole, half))
    for result in (one, two):
        for row in ("before", "after"):
            result[row] = without_clocks(result[row])
    assert one == two and one["losses"]["trained"] != one["losses"]["start"]
    with pytest.raises(UserError, match="--lr: a resumed run keeps the settings of .*, save --device"):
        run(train_projector, "--resume", half, "--lr", 1)
    with pytest.raises(UserError, match="no config.json of train_rl.py"):
        run(train_rl, "--resume", half)


def test_a_run_stopped_in_the_middle_of_a_batch_continues_bit_for_bit(pair, capsys):
    shutil.copytree(pair / "half", pair / "a")
    with open(pair / "a" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "epo')  # half a line of a step whose state was never written
    run(train_rl, "--resume", pair / "a")
    assert "resumed from" in capsys.readouterr().out
    assert same(pair / "whole", pair / "a") and runs.saved_states(pair / "a") == [3, 4]


def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(pair, capsys):
    shutil.copytree(pair / "half", pair / "b")
    with open(pair / "b" / "state-3" / "tensors.safetensors", "r+b") as f:
        f.seek(100_000)
        f.write(b"\x55\xaa" * 8)
    run(train_rl, "--resume", pair / "b")
    out, err = capsys.readouterr()
    assert "state-3 is damaged (its checksum is wrong)" in err and "resumed from" in out and "state-2" in out
    assert same(pair / "whole", pair / "b")


def test_what_may_stand_beside_resume_and_what_a_stopped_run_is_guarded_against(pair, tmp_path):
    half = pair / "half"
    shutil.copytree(half, tmp_path / "cosine")
    settings = json.loads((half / "config.json").read_text())
    (tmp_path / "cosine" / "config.json").write_text(json.dumps({**settings, "lr_schedule": "cosine"}))
    for words, says in (
        ((*SIZES, "--steps", 4, "--out", half), "stopped at step 3 of 4: go on with --resume"),
        (("--resume", half, "--lr", 1), "--lr: a resumed run keeps the settings"),
        (("--resume", half, "--steps", 2), "is at step 3 already"),
        (("--resume", tmp_path / "cosine", "--steps", 6), "--steps: with --lr-schedule cosine"),
        (("--resume", tmp_path), "nothing to resume"),
    ):
        with pytest.raises(UserError, match=says):
            run(train_rl, *words)


def test_a_second_process_on_the_same_directory_is_refused(tmp_path):
    held = runs.lock(str(tmp_path))
    for script in (train_projector, train_rl):
        child = os.fork()
        if not child:
            try:
                run(script, "--out", tmp_path)
            except UserError as e:
                os._exit(7 if "another process is writing to" in str(e) else 1)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    held.close()


def raises(error):
    """A function that does nothing but raise the error."""

    def function(*_, **__):
        raise error

    return function


def test_states_are_complete_or_absent_and_two_are_kept(tmp_path, monkeypatch):
    for step in range(1, 4):
        runs.write_state(tmp_path, step, {"x": torch.tensor([float(step)])}, {"n": step})
    assert runs.saved_states(tmp_path) == [2, 3]
    monkeypatch.setattr(runs, "save_file", raises(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device; state-3, written before, is still there"):
        runs.write_state(tmp_path, 4, {"x": torch.zeros(1)}, {})
    assert sorted(os.listdir(tmp_path)) == ["state-2", "state-3"]
    os.remove(tmp_path / "state-3" / "rest.json")
    step, tensors, rest = runs.read_state(tmp_path)
    assert step == 2 and tensors["x"] == 2 and rest == {"n": 2}


# ---------------------------------------------------- a disk that is full, a directory that becomes read-only
def in_one_line(capsys, *words):
    """What a script says last when it ends by itself with exit code 2."""
    capsys.readouterr()
    with runs.signals_restored(), pytest.raises(SystemExit) as end:
        runs.run_script(lambda: run(*words))
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "Traceback" not in "".join(said)
    return said[-1]


def test_a_disk_that_is_full_during_a_run_ends_in_one_line(pair, tmp_path, capsys, monkeypatch):
    one_step = ("--model", pair / "whole", *SIZES, *NO_TABLE, "--steps", 1)
    for name, script, words in (("metrics.jsonl", train_rl, one_step),
                                ("traces.jsonl", train_projector, ("--prompts", 2, "--device", "cpu"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.tmp").symlink_to("/dev/full")
        said = in_one_line(capsys, script, *words, "--out", tmp_path / name)
        assert "No space left on device; what was written before is kept" in said
    # of a tokenizer's file it is a plain Exception
    model, tokenizer = load("tiny", "cpu")
    save(model, tokenizer, str(tmp_path / "m"))
    full = Exception("No space left on device (os error 28)")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", raises(full))
    with pytest.raises(UserError, match="cannot write .*: No space left"):
        save(model, tokenizer, str(tmp_path / "m"))
    assert len(load(str(tmp_path / "m"), "cpu")) == 2
    assert not [name for name in os.listdir(tmp_path) if "writing" in name]


def test_a_directory_that_becomes_read_only_ends_in_one_line_and_the_run_continues_from_there(
        pair, capsys, monkeypatch):
    real, calls, root = train_rl.policy_loss, iter(range(1, 99)), os.geteuid() == 0
    with tempfile.TemporaryDirectory() as out:

        def forbid(yes):
            if root:  # root may write anywhere, nobody may not write here
                os.seteuid(65534 * yes)
            else:
                os.chmod(out, 0o555 if yes else 0o755)

        def policy_loss(*args):
            if next(calls) == 2:
                forbid(True)
            return real(*args)

        os.chmod(out, 0o755)
        monkeypatch.setattr(train_rl, "policy_loss", policy_loss)
        shutil.copytree(pair / "half", out, dirs_exist_ok=True)
        for name in ("state-3", "state-2"):
            shutil.rmtree(os.path.join(out, name))
        try:
            assert ("state-2: Permission denied; state-1, written before"
                    in in_one_line(capsys, train_rl, "--resume", out))
        finally:
            forbid(False)
        run(train_rl, "--resume", out)
        assert same(pair / "whole", pathlib.Path(out))


# ---------------------------------------------------------------- out of memory
def test_out_of_memory_in_the_update_halves_the_budget_once_a_step_and_changes_nothing_else(
        pair, tmp_path, monkeypatch, capsys):
    words = ("--model", pair / "whole", *SIZES, *NO_TABLE, "--steps", 2)
    words += ("--train-prompts", 4, "--minibatches", 1)  # a step is an epoch
    real, calls, fails = train_rl.logprobs, iter(range(1, 99)), {2}

    def logprobs(*args):
        if next(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    run(train_rl, *words, "--tokens-per-forward", 450, "--val", 0, "--out", tmp_path / "half")
    monkeypatch.setattr(train_rl, "logprobs", logprobs)
    run(train_rl, *words, "--tokens-per-forward", 900, "--out", tmp_path / "oom")
    assert ("step 1: out of memory in the update; from here on --tokens-per-forward is 450\n"
            in capsys.readouterr().out)
    assert runs.read_state(tmp_path / "oom")[2]["carried"]["tokens_per_forward"] == 450
    halved, oom = metrics(tmp_path / "half"), metrics(tmp_path / "oom")
    assert [m.pop("val_accuracy") for m in halved] == [None] * 2
    assert all(0 <= m.pop("val_accuracy") <= 1 for m in oom)  # --val draws from a generator of its own
    assert halved == oom and same_weights(tmp_path / "half", tmp_path / "oom")
    assert max(m["grad_norm"] for m in halved) > 0
    calls, fails = iter(range(1, 99)), {1, 2}
    with pytest.raises(UserError,
                       match="step 1: out of memory with --tokens-per-forward 450 too: start with less"):
        run(train_rl, *words, "--tokens-per-forward", 900, "--out", tmp_path / "twice")


# ---------------------------------------------------------------- tripwires
def test_a_reward_that_is_not_finite_ends_the_run_before_any_update(pair, tmp_path, monkeypatch):
    real = data.score

    def score(*args):
        return [float("nan") if i == 5 else reward for i, reward in enumerate(real(*args))]

    monkeypatch.setattr(data, "score", score)
    says = r"step 1: the reward of a rollout of train prompt \d is nan; its text is in .*bad-rollouts.json"
    with pytest.raises(UserError, match=says):
        run(train_rl, "--model", pair / "whole", *SIZES, *NO_TABLE, "--steps", 1, "--out", tmp_path)
    aside = json.load(open(tmp_path / "bad-rollouts.json"))
    assert [r["rollout"] for r in aside] == [5] and aside[0]["text"] and runs.saved_states(tmp_path) == [0]


def test_all_answers_alike_or_tags_only_is_said(capsys):
    m = {"step": 7, "tag_share": 1.0, "zero_variance": 0.0, "reward": 0.5}
    for texts, says in (
        (["a", "b"], ""),
        (["It is so."] * 2, "warning: step 7: all 2 rollouts wrote the same: 'It is so.'\n"),
        ([f"{tag(1)} ", tag(2) + tag(3)], "warning: step 7: all 2 rollouts wrote tags and nothing else\n"),
        ([tag(1), tag(2) + "a"], ""),
    ):
        display.warn(m, True, 1, texts)
        assert capsys.readouterr().out == says


def test_a_reward_that_rises_while_validation_falls_is_said(capsys):
    rows = [{"reward": r, "val_accuracy": v} for r, v in ((0.1, None), (0.3, 0.8), (0.5, None), (0.6, 0.6))]

    def val(accuracy, half):
        return {"accuracy": accuracy, "accuracy_ci95": [accuracy - half, accuracy + half], "n_examples": 50}

    falling = [{**m, "reward": 1 - m["reward"]} for m in rows]
    for these, result, is_said in ((rows[:2], val(0.8, 0.1), False), (rows, val(0.6, 0.1), True),
                                   (rows, val(0.6, 0.25), False), (falling, val(0.6, 0.1), False)):
        display.warn_of_validation(these, result)
        assert is_said == bool(capsys.readouterr().out)
    display.warn_of_validation(rows, val(0.6, 0.1))
    assert capsys.readouterr().out == (
        "warning: step 4: since step 2 the train reward rose from 0.200 to 0.550, but the accuracy on "
        "50 val examples fell from 0.800 to 0.600 (plus or minus 0.100)\n")


def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_stop_the_run(pair, monkeypatch, capsys):
    real = train_rl.policy_loss
    monkeypatch.setattr(train_rl, "policy_loss",
                        lambda *args, **more: (real(*args, **more)[0] * float("nan"), None))
    # All rollouts are learned from, whatever they earned: a step with nothing to learn from is finite.
    monkeypatch.setitem(train_rl.RULES, "grpo",
                        lambda rewards, tokens, *_, **more: (torch.ones_like(rewards), tokens))
    out = pair / "nan"
    shutil.copytree(pair / "half", out)
    with pytest.raises(UserError, match="steps 4 to 6 were not finite"):
        run(train_rl, "--resume", out, "--steps", 9)
    lines = metrics(out)
    assert [m["skipped"] for m in lines] == [0, 0, 0, 1, 2, 3] and lines[-1]["grad_norm"] is None
    assert json.load(open(out / "bad-rollouts.json"))[0]["step"] == 6
    assert "3 so far" in capsys.readouterr().out
    before, after = (runs.read_state(pair / name)[1] for name in ("half", "nan"))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("weight "))


def test_a_scorer_that_disagrees_with_the_sampler_stops_the_run(pair, monkeypatch):
    real = train_rl.logprobs

    def logprobs(*args):
        logp, scored = real(*args)
        return logp + 0.1, scored

    monkeypatch.setattr(train_rl, "logprobs", logprobs)
    words = (*SIZES, *NO_TABLE, "--minibatches", 1, "--prompts", 8, "--steps", 1)
    with pytest.raises(UserError, match="step 1: sampler and scorer differ by 0.1 in a log-prob of rollout"):
        run(train_rl, "--model", pair / "whole", *words, "--out", pair / "off")
    assert len(json.load(open(pair / "off" / "bad-rollouts.json"))) == 1


def test_a_task_whose_label_answer_and_reward_do_not_agree_is_refused():
    task = types.SimpleNamespace(answer=lambda e: "\\boxed{Yes}",
                                 reward=lambda e, c: float(e["label"] and "Yes" in c))
    display.check_answers(task, [{"label": True}])
    with pytest.raises(UserError, match="train example 1: its own answer .* earns 0, not 1"):
        display.check_answers(task, [{"label": True}, {"label": False}])
