"""A stopped run goes on as if it had never stopped; a damaged state, a second process and a full disk end in one line. kill.py is the long form."""
import json
import os
import shutil
import signal
import tempfile
import types

import pytest
import torch
from conftest import tag
from safetensors.torch import load_file
from test_real_tasks import run

import litereason
import train_projector
import train_rl
from litereason import UserError, load, save
from runs import lock, read_state, run_script, saved_states, write_state

SIZES = ("--device", "cpu", "--n", 2, "--train-prompts", 8, "--prompts", 4, "--group", 4, "--minibatches", 2, "--max-new-tokens", 60, "--save-every", 1,
         "--show-every", 0, "--projector-steps", 2, "--trace-prompts", 8, "--val", 4)


def metrics(out):
    """Without what a clock or the operating system says."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory_gib")} for m in rows]


def same(a, b):
    one, two = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    table = lambda out: [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in json.load(open(out / "results.json"))]
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) and metrics(a) == metrics(b) and table(a) == table(b)


def stopped(module, name, call, number, *words):
    """Runs the script whose function `name` is, and sends it a signal at that function's call-th call. -> what it says of the stop"""
    real, calls, former = getattr(module, name), iter(range(1, 1000)), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, lambda *a, **k: (next(calls) == call and os.kill(os.getpid(), number), real(*a, **k))[1])
        with pytest.raises(KeyboardInterrupt) as e:
            run(*words)
    assert former == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert e.value.args[0] == number
    return e.value.args[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """whole: 4 steps, an epoch and a refresh, from the base through all stages. half: the same, stopped in the second of stage 2's two
    steps and within step 4 of stage 3, in a batch's midst."""
    at = tmp_path_factory.mktemp("runs")
    run(train_rl, *SIZES, "--steps", 4, "--out", at / "whole")
    said = stopped(train_projector, "projector_loss", 5, signal.SIGTERM, train_rl, *SIZES, "--steps", 4, "--out", at / "half")
    assert said == f"step 1 of 2 of stage 2 is saved; go on with --resume {at / 'half'}"
    write = litereason._checksum

    def press(path):  # Ctrl-C while the state of step 3 is being written: it is brought to its end
        if path.endswith("half/state-3.writing"):
            os.kill(os.getpid(), signal.SIGINT)
        return write(path)

    litereason._checksum = press
    try:
        with pytest.raises(KeyboardInterrupt) as e:
            run(train_rl, "--resume", at / "half")
    finally:
        litereason._checksum = write
    assert e.value.args[0] == signal.SIGINT and "step 3 of 4 is saved; go on with" in e.value.args[1]
    assert not (at / "half" / "stage-2").exists() and not (at / "half" / "first-rows").exists()
    assert saved_states(at / "half") == [2, 3] and not (at / "half" / "results.json").exists()
    return at


def test_stages_1_and_2_stopped_in_their_midst_go_on_bit_for_bit(tmp_path, capsys):
    words = ("--device", "cpu", "--prompts", 40, "--samples", 1, "--steps", 5, "--batch", 4, "--save-every", 2, "--n", 2, "--max-new-tokens", 80)
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(train_projector, *words, "--out", whole)
    said = stopped(train_projector, "score", 2, signal.SIGINT, train_projector, *words, "--out", half)  # in the second 32 prompts
    assert said == f"the traces sampled so far are kept; go on with --resume {half}"
    done = (half / "traces.jsonl").read_text()
    assert done.count("\n") == 2 and (whole / "traces.jsonl").read_text().startswith(done)
    with open(half / "traces.jsonl", "a") as f:
        f.write('[{"example": 32, "pro')
    capsys.readouterr()
    said = stopped(train_projector, "projector_loss", 3 + 4, signal.SIGTERM, train_projector, "--resume", half)  # 3 losses before the first step
    assert said == f"step 3 of 5 of stage 2 is saved; go on with --resume {half}" and saved_states(half / "stage-2") == [2, 3]
    assert "1 of 2 lines of it" in capsys.readouterr().out
    run(train_projector, "--resume", half)
    assert "resumed from" in capsys.readouterr().out
    for name in ("traces.jsonl", "model/model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (whole / name).read_bytes() == (half / name).read_bytes(), name
    drop = lambda r: {k: drop(v) if isinstance(v, dict) else v for k, v in r.items() if not k.startswith("seconds")}
    a, b = (drop(json.load(open(out / "results.json"))) for out in (whole, half))
    assert a == b and a["losses"]["trained"] != a["losses"]["warm start"]
    with pytest.raises(UserError, match="--lr: a resumed run keeps the settings of .*, save --device"):
        run(train_projector, "--resume", half, "--lr", 1)
    with pytest.raises(UserError, match="no config.json of train_rl.py"):
        run(train_rl, "--resume", half)


def test_a_run_stopped_in_the_midst_of_a_batch_goes_on_bit_for_bit(runs, capsys):
    shutil.copytree(runs / "half", runs / "a")
    with open(runs / "a" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "epo')  # half a line of a step whose state was never written
    run(train_rl, "--resume", runs / "a")
    assert "resumed from" in capsys.readouterr().out
    assert same(runs / "whole", runs / "a") and saved_states(runs / "a") == [3, 4]


def test_a_damaged_newest_state_falls_back_to_the_one_before_and_says_so(runs, capsys):
    shutil.copytree(runs / "half", runs / "b")
    with open(runs / "b" / "state-3" / "tensors.safetensors", "r+b") as f:
        f.seek(100_000)
        f.write(b"\x55\xaa" * 8)
    run(train_rl, "--resume", runs / "b")
    out, err = capsys.readouterr()
    assert "state-3 is damaged (its checksum is wrong)" in err and "resumed from" in out and "state-2" in out
    assert same(runs / "whole", runs / "b")


def test_what_may_stand_beside_resume_and_what_a_stopped_run_is_guarded_against(runs, tmp_path):
    for words, says in (((*SIZES, "--steps", 4, "--out", runs / "half"), "stopped at step 3 of 4: go on with --resume"),
                        (("--resume", runs / "half", "--lr", 1), "--lr: a resumed run keeps the settings"),
                        (("--resume", runs / "half", "--steps", 2), "is at step 3 already"),
                        (("--resume", tmp_path), "nothing to resume")):
        with pytest.raises(UserError, match=says):
            run(train_rl, *words)


def test_a_second_process_on_the_same_directory_is_refused(tmp_path):
    held = lock(str(tmp_path))
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


def test_states_are_complete_or_absent_and_two_are_kept(tmp_path, monkeypatch):
    for step in range(1, 4):
        write_state(tmp_path, step, {"x": torch.tensor([float(step)])}, {"n": step})
    assert saved_states(tmp_path) == [2, 3]
    monkeypatch.setattr(litereason, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device; state-3, written before, is still there"):
        write_state(tmp_path, 4, {"x": torch.zeros(1)}, {})
    assert sorted(os.listdir(tmp_path)) == ["state-2", "state-3"]
    os.remove(tmp_path / "state-3" / "rest.json")
    step, tensors, rest = read_state(tmp_path)
    assert step == 2 and tensors["x"] == 2 and rest == {"n": 2}


# ---------------------------------------------------------------- a disk that is full, a directory that becomes read-only
def in_one_line(capsys, *words):
    """What a script says last when it ends by itself with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(lambda: run(*words))
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "Traceback" not in "".join(said)
    return said[-1]


def test_a_disk_that_is_full_in_the_midst_of_a_run_ends_in_one_line(runs, tmp_path, capsys, monkeypatch):
    for name, script, words in (("metrics.jsonl", train_rl, ("--model", runs / "whole", *SIZES, "--steps", 1)),
                                ("traces.jsonl", train_projector, ("--prompts", 2, "--device", "cpu"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.tmp").symlink_to("/dev/full")
        assert "No space left on device; what was written before is kept" in in_one_line(capsys, script, *words, "--out", tmp_path / name)
    # of a tokenizer's file it is a plain Exception
    model, tokenizer = load("tiny", "cpu")
    save(model, tokenizer, str(tmp_path / "m"))
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(Exception("No space left on device (os error 28)")))
    with pytest.raises(UserError, match="cannot write .*: No space left"):
        save(model, tokenizer, str(tmp_path / "m"))
    assert len(load(str(tmp_path / "m"), "cpu")) == 2 and not [n for n in os.listdir(tmp_path) if "writing" in n]


def test_a_directory_that_becomes_read_only_ends_in_one_line_and_the_run_goes_on_from_there(runs, capsys, monkeypatch):
    real, calls, root = train_rl.policy_loss, iter(range(1, 99)), os.geteuid() == 0
    with tempfile.TemporaryDirectory() as out:

        def forbid(yes):
            os.seteuid(65534 * yes) if root else os.chmod(out, 0o555 if yes else 0o755)  # root may write anywhere, nobody not here

        os.chmod(out, 0o755)
        monkeypatch.setattr(train_rl, "policy_loss", lambda *a: (next(calls) == 2 and forbid(True), real(*a))[1])
        shutil.copytree(runs / "half", out, dirs_exist_ok=True)
        for name in ("state-3", "state-2"):
            shutil.rmtree(os.path.join(out, name))
        try:
            assert "state-2: Permission denied; state-1, written before" in in_one_line(capsys, train_rl, "--resume", out)
        finally:
            forbid(False)
        run(train_rl, "--resume", out)
        assert same(runs / "whole", type(runs)(out))


# ---------------------------------------------------------------- out of memory
def test_out_of_memory_in_the_update_halves_the_budget_once_a_step_and_changes_nothing_else(runs, tmp_path, monkeypatch, capsys):
    words = ("--model", runs / "whole", *SIZES, "--steps", 3, "--train-prompts", 4, "--minibatches", 1, "--save-every", 1)  # an epoch a step
    real, calls, fails = train_rl.logprobs, iter(range(1, 99)), {2}

    def logprobs(*a):
        if next(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*a)

    run(train_rl, *words, "--tokens-per-forward", 450, "--val", 0, "--out", tmp_path / "half")
    monkeypatch.setattr(train_rl, "logprobs", logprobs)
    run(train_rl, *words, "--tokens-per-forward", 900, "--out", tmp_path / "oom")
    assert "step 1: out of memory in the update; from here on --tokens-per-forward is 450\n" in capsys.readouterr().out
    assert read_state(tmp_path / "oom")[2]["carried"]["tokens_per_forward"] == 450
    a, b = metrics(tmp_path / "half"), metrics(tmp_path / "oom")
    assert [m.pop("val_accuracy") for m in a] == [None] * 3 and all(0 <= m.pop("val_accuracy") <= 1 for m in b)  # --val draws from no one else
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("half", "oom"))
    assert a == b and all(torch.equal(one[k], two[k]) for k in one) and max(m["grad_norm"] for m in a) > 0
    calls, fails = iter(range(1, 99)), {1, 2}
    with pytest.raises(UserError, match="step 1: out of memory with --tokens-per-forward 450 too: start with less"):
        run(train_rl, *words, "--tokens-per-forward", 900, "--out", tmp_path / "twice")


# ---------------------------------------------------------------- tripwires
def test_a_reward_that_is_not_finite_ends_the_run_before_any_update(runs, tmp_path, monkeypatch):
    real = train_rl.score
    monkeypatch.setattr(train_rl, "score", lambda *a: [r if i != 5 else float("nan") for i, r in enumerate(real(*a))])
    with pytest.raises(UserError, match=r"step 1: the reward of a rollout of train prompt \d is nan; its text is in .*bad-rollouts.json"):
        run(train_rl, "--model", runs / "whole", *SIZES, "--steps", 1, "--out", tmp_path)
    aside = json.load(open(tmp_path / "bad-rollouts.json"))
    assert [r["rollout"] for r in aside] == [5] and aside[0]["text"] and saved_states(tmp_path) == [0]


def test_all_answers_alike_or_tags_only_is_said(capsys):
    m = {"step": 7, "tag_share": 1.0, "zero_variance": 0.0, "reward": 0.5}
    for texts, says in ((["a", "b"], ""), (["It is so."] * 2, "warning: step 7: all 2 rollouts wrote the same: 'It is so.'\n"),
                        ([f"{tag(1)} ", tag(2) + tag(3)], "warning: step 7: all 2 rollouts wrote tags and nothing else\n"), ([tag(1), tag(2) + "a"], "")):
        train_rl.warn(m, True, 1, texts)
        assert capsys.readouterr().out == says


def test_a_reward_that_rises_while_validation_falls_is_said(capsys):
    rows = [{"reward": r, "val_accuracy": v} for r, v in ((0.1, None), (0.3, 0.8), (0.5, None), (0.6, 0.6))]
    val = lambda accuracy, half: {"accuracy": accuracy, "accuracy_ci95": [accuracy - half, accuracy + half], "n_examples": 50}
    for these, v, says in ((rows[:2], val(0.8, 0.1), False), (rows, val(0.6, 0.1), True), (rows, val(0.6, 0.25), False),
                           ([{**m, "reward": 1 - m["reward"]} for m in rows], val(0.6, 0.1), False)):
        train_rl.warn_of_validation(these, v)
        said = capsys.readouterr().out
        assert says == bool(said)
    train_rl.warn_of_validation(rows, val(0.6, 0.1))
    assert capsys.readouterr().out == ("warning: step 4: since step 2 the train reward rose from 0.200 to 0.550, but the accuracy on 50 val examples fell "
                                       "from 0.800 to 0.600 (plus or minus 0.100)\n")


def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_stop_the_run(runs, monkeypatch, capsys):
    real = train_rl.policy_loss
    monkeypatch.setattr(train_rl, "policy_loss", lambda *a: (real(*a)[0] * float("nan"), None))
    shutil.copytree(runs / "half", runs / "nan")
    with pytest.raises(UserError, match="steps 4 to 6 were not finite"):
        run(train_rl, "--resume", runs / "nan", "--steps", 9)
    assert [m["skipped"] for m in metrics(runs / "nan")] == [0, 0, 0, 1, 2, 3] and metrics(runs / "nan")[-1]["grad_norm"] is None
    assert json.load(open(runs / "nan" / "bad-rollouts.json"))[0]["step"] == 6 and "3 so far" in capsys.readouterr().out
    a, b = (read_state(runs / name)[1] for name in ("half", "nan"))
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("weight "))


def test_a_scorer_that_disagrees_with_the_sampler_stops_the_run(runs, monkeypatch):
    real = train_rl.logprobs
    monkeypatch.setattr(train_rl, "logprobs", lambda *a: (lambda logp, scored: (logp + 0.1, scored))(*real(*a)))
    with pytest.raises(UserError, match="step 1: sampler and scorer differ by 0.1 in a log-prob of rollout"):
        run(train_rl, "--model", runs / "whole", *SIZES, "--minibatches", 1, "--prompts", 8, "--steps", 1, "--out", runs / "off")
    assert len(json.load(open(runs / "off" / "bad-rollouts.json"))) == 1


def test_a_task_whose_label_answer_and_reward_do_not_agree_is_refused():
    task = types.SimpleNamespace(answer=lambda e: "\\boxed{Yes}", reward=lambda e, c: float(e["label"] and "Yes" in c))
    train_rl.check_answers(task, [{"label": True}])
    with pytest.raises(UserError, match="train example 1: its own answer .* earns 0, not 1"):
        train_rl.check_answers(task, [{"label": True}, {"label": False}])
