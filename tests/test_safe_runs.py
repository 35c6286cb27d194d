"""A finished run is never replaced by accident, leaves nothing stale when it is meant to be, and is
evaluated as what it is. A model comes from a hub that speaks the hub's protocol."""
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, SIZES
from test_real_tasks import one_line, run
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eval as evaluation
import litereason
import train_projector
import train_rl
from lib import UserError
from lib.checkpoint import TINY
from lib.run import base_of, default_out, run_settings
from litereason import load, save
from results import baselines

@pytest.fixture
def copy(whole, tmp_path):
    """Of a finished run of train_rl.py."""
    return shutil.copytree(whole, tmp_path / "run")


# ---------------------------------------------------------------- where runs go
def test_a_default_directory_names_model_task_and_method(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"base": "Qwen2.5-1.5B"}))  # a run is named by its base
    for words, out in ((("tiny", "tiny", "litereason"), "tiny-litereason"),
                       (("tiny", "tiny.next_chapter", "grpo"), "tiny.next_chapter-grpo"),
                       (("Qwen/Qwen2.5-1.5B", "plots", "tag"), "Qwen2.5-1.5B-plots-tag"),
                       ((tmp_path, "plots", "projector"), "Qwen2.5-1.5B-plots-projector")):
        assert default_out(*words) == f"out/{out}"


@pytest.mark.parametrize("script, words", [
    (train_rl, SIZES), (train_projector, ("--device", "cpu", "--prompts", 2, "--steps", 1)),
    (baselines, ("--method", "moi", "--device", "cpu", "--n", 2))])
def test_a_finished_run_is_refused_in_one_line_before_a_model_is_loaded(copy, script, words, monkeypatch):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(script, "load", lambda *_: pytest.fail("a model was loaded"))
    one_line("holds a run of train_rl.py on tiny: go on with --resume .*, choose another --out, or .* "
             "--overwrite", run, script, *words, "--out", copy)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_overwrite_leaves_no_file_of_the_earlier_run(copy):
    (copy / "bad-rollouts.json").write_text("[]")
    words = (*SIZES, "--method", "tag", "--n", 0, "--val", 0, "--steps", 1, "--overwrite", "--seed", 1)
    run(train_rl, *words, "--out", copy)
    left = {"config.json", "lock", "metrics.jsonl", "model", "state-0.pt", "state-1.pt"}
    assert set(os.listdir(copy)) == {*left, "before-rl.json", "traces.jsonl"}  # traces say what they are of
    made = json.load(open(copy / "config.json"))
    assert made["seed"] == 1 and "overwrite" not in made
    one_line("holds a run", run, train_rl, *SIZES, "--out", copy)  # without a table, too


def test_a_run_is_neither_continued_in_its_own_directory_nor_replaced_by_an_evaluation(copy):
    for source in (copy, copy / "model"):
        with pytest.raises(UserError, match="--out .* holds --model .*: choose another --out"):
            run(train_rl, *SIZES, "--model", source, "--out", copy, "--overwrite")
    before = (copy / "model" / "config.json").read_bytes()
    with pytest.raises(UserError, match="or what no run wrote: choose another --out"):
        run(train_rl, *SIZES, "--out", copy / "model", "--overwrite")
    assert (copy / "model" / "config.json").read_bytes() == before
    with pytest.raises(UserError, match="is a run: the results of eval.py would replace its own"):
        run(evaluation, "--model", copy, "--device", "cpu", "--n", 1, "--out", copy)


# ---------------------------------------------------------------- what a run is evaluated as
def results(out):
    return json.load(open(out))


def fake_run(tmp_path, name, **settings):
    """A directory that looks like a run of train_rl.py, with the tiny model in it."""
    at = tmp_path / name
    shutil.copytree(TINY, at / "model")
    settings = {"script": "train_rl.py", "base": "tiny", "method": "litereason", "task": "tiny", **settings}
    (at / "config.json").write_text(json.dumps(settings))
    return at


def test_task_length_and_method_come_from_the_run_and_flags_override_them(tmp_path, capsys):
    words = ("--device", "cpu", "--n", 3, "--json", tmp_path / "r.json")
    a = fake_run(tmp_path, "a", task="tiny.next_chapter", max_new_tokens=7)
    assert run_settings(str(a / "model")) == run_settings(str(a)) and base_of(str(a / "model")) == "tiny"
    run(evaluation, "--model", a, *words)
    assert results(tmp_path / "r.json")["tokens"] <= 7
    said = capsys.readouterr().out
    assert "tiny.next_chapter, test split, 3 examples, temperature 0.7, top-p 0.8, top-k 20, seed 0" in said
    assert "| model | reward |" in said  # a plan is not right or wrong
    run(evaluation, "--model", a, "--task", "tiny", "--max-new-tokens", 5, *words)
    assert results(tmp_path / "r.json")["task"] == "tiny" and results(tmp_path / "r.json")["tokens"] <= 5
    b = fake_run(tmp_path, "b")
    with pytest.raises(UserError, match="these runs differ in their task .*: choose one with --task"):
        run(evaluation, "--model", a, b, *words)
    run(evaluation, "--model", "tiny", b, "tiny:plain", *words)  # what is no run goes with the others
    assert [r["task"] for r in results(tmp_path / "r.json")] == ["tiny"] * 3


def test_a_checkpoint_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    model, tokenizer = load("tiny", "cpu")
    path = str(tmp_path / "m")
    save(model, tokenizer, path)

    def fail(path):
        os.mkdir(path)
        raise OSError("no more")

    monkeypatch.setattr(model, "save_pretrained", fail)
    one_line("cannot write", save, model, tokenizer, path)
    assert os.listdir(tmp_path) == ["m"] and load(path, "cpu")


def test_a_checkpoint_keeps_its_own_tokenizer(tmp_path):
    """Of a Qwen2 transformers would take Qwen's class, whatever the checkpoint says."""
    save(*load("tiny", "cpu"), str(tmp_path / "m"))
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.BPE({**letters, "ab": 27, "<|endoftext|>": 28}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # so nothing merges
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    own.save_pretrained(tmp_path / "m")
    assert load(str(tmp_path / "m"), "cpu")[1].encode("ab cab") == own.encode("ab cab") == [0, 1, 26, 2, 0, 1]
    # without it transformers would make one of special tokens alone
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(tmp_path / "m" / name)
    one_line("cannot load the model", load, str(tmp_path / "m"), "cpu")


def test_an_untrained_projector_is_never_run(tmp_path, monkeypatch):
    """The base has none; runs of --method tag and grpo carry theirs in the checkpoint all the same."""
    monkeypatch.setattr(litereason.ReasoningProjector, "forward", lambda *_: pytest.fail("the projector ran"))
    model, tokenizer = load("tiny", "cpu")
    tag, grpo = (fake_run(tmp_path, name, method=name) for name in ("tag", "grpo"))
    for at, is_trained in ((grpo, False), (tag, True)):  # the second began after stage 2
        model.projector_trained = is_trained
        save(model, tokenizer, str(at / "model"))
        again, _ = load(str(at), "cpu")
        assert again.projector_trained == is_trained
        save(again, tokenizer, str(at / "model"))
        assert load(str(at), "cpu")[0].projector_trained == is_trained
    words = ("--device", "cpu", "--n", 4, "--max-new-tokens", 60, "--json", tmp_path / "r.json")
    run(evaluation, "--model", "tiny", "tiny:plain", tag, grpo, *words)
    assert [r["latent_steps"] for r in results(tmp_path / "r.json")] == [0.0] * 4
    for name in ("tiny", tag):
        with pytest.raises(UserError, match="--controls asks what latents do, and .* runs none"):
            run(evaluation, "--model", name, "--controls", *words)


# ---------------------------------------------------------------- a model from the hub
SCRIPT = """
import sys
from lib import UserError
from litereason import load
for name in sys.argv[1:]:
    try:
        model, tokenizer = load(name, "cpu")
        print(name, "loaded", model.config.hidden_size, model.projector_trained)
    except UserError as e:
        print(name, "refused", str(e).count(chr(10)), e)
"""


class Hub(http.server.SimpleHTTPRequestHandler):
    """It has me/tiny, a gate before me/gated, and no me/typo."""

    def translate_path(self, path):
        name, _, file = path.strip("/").partition("/resolve/main/")
        return os.path.join(TINY, file.partition("?")[0] or "nothing") if name == "me/tiny" else "nothing"

    def end_headers(self):
        name = self.path.strip("/").partition("/resolve/")[0]
        error = {"me/gated": "GatedRepo", "me/typo": "RepoNotFound"}.get(name, "EntryNotFound")
        self.send_header("X-Error-Code", error)  # of what is not there
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
        super().end_headers()


def test_what_a_hub_has_is_loaded_and_what_it_has_not_ends_in_one_line(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE") and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ROOT}
    words = [sys.executable, "-c", SCRIPT, "me/tiny", "me/typo", "me/gated"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, *refused = [line for line in done.stdout.splitlines() if line.startswith("me/")]
    assert loaded == "me/tiny loaded 128 False"
    for name, says, line in zip(words[-2:], ("is not a valid model identifier", "gated repo"), refused):
        assert line.startswith(f"{name} refused 0 cannot load {name!r} from the hub: ") and says in line
        assert "if gated, accept its terms there, then `hf auth login`" in line
