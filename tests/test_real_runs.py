"""All stages run on the paper's two real tasks: real stories and the real Qwen2 tokenizer.

The model is random and made to write; no number here says anything about a trained one. What is in ../shared
is looked for there; where it is absent these tests skip."""
import json
import os
import shutil

import pytest
import torch
from conftest import ROOT, random_qwen2, tag
from test_real_tasks import jsonl, one_line, run, stories

import data
import eval as evaluation
import litereason
import train_projector
import train_rl
from data import SPLITS, flawed_fictions as ff, next_chapter as nc
from data.flawed_fictions import prepare as ff_prepare
from data.next_chapter import prepare as nc_prepare
from lib import checkpoint
from litereason import load, save

EOS = [151645, 151643]  # a chat model: it ends at <|im_end|>


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """A new LITEREASON_DATA, and what a script puts into the task's settings is taken out again."""
    monkeypatch.setenv("LITEREASON_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(nc, "settings", dict(nc.settings))
    return tmp_path / "data"


def shared(*names):
    paths = [os.path.normpath(os.path.join(ROOT, "..", "shared", "data", name)) for name in names]
    for path in paths:
        if not os.path.exists(path):
            pytest.skip(f"there is no {path}")
    return paths


def random_model(path, tokenizer, vocab, eos):
    """Saved as a hub checkpoint is: no projector. -> its path"""
    model = random_qwen2(vocab, eos[0], tie_word_embeddings=True).float()
    model.config.max_position_embeddings = 4096
    model.generation_config.eos_token_id = eos
    save(model, tokenizer, path)
    return path


@pytest.fixture
def force(monkeypatch, real_tok):
    """force(text, pair): from now on every rollout writes this text, with one of the pair for its {}."""
    tokens, rest = [], []  # what may come next, place by place; those of the decoding that is under way

    def write(text, pair):
        before, after = map(real_tok.encode, text.split("{}"))
        drawn = [real_tok.encode(word)[0] for word in pair]
        tokens[:] = [*([i] for i in before), drawn, *([i] for i in [*after, EOS[0]])]

    def sample(logits, u, temperature, top_k, top_p):
        choice = next(rest[0], EOS[:1])
        token = torch.tensor([choice[int(x * len(choice))] for x in u.tolist()])
        return token, (logits / temperature).log_softmax(-1).gather(-1, token[:, None])[:, 0]

    decode = litereason._decode

    def decode_from_the_start(*args):
        rest[:] = [iter(list(tokens))]
        return decode(*args)

    monkeypatch.setattr(litereason, "_decode", decode_from_the_start)
    monkeypatch.setattr(litereason, "sample", sample)
    monkeypatch.setattr(checkpoint, "_read_tokenizer", lambda *_, **__: real_tok)  # one tag table for all
    monkeypatch.setattr(train_projector, "VERSIONS", 1)
    return write


def test_all_stages_of_the_plot_hole_task_run_on_real_stories(tmp_path, data_folder, real_tok, force, capsys):
    files = shared("flawed_fictions_subset.jsonl")
    run(ff_prepare, "--from", *files, "--out", data_folder / "flawed_fictions")
    everything = [r for split in SPLITS for r in ff.examples(split)]
    assert len(everything) == 213 and sum(r["label"] for r in everything) == 108
    assert not any("<p>" in r["story"] or r["story"].endswith("--") for r in everything)
    assert all("\n\n" in r["story"] for r in everything if r["story"].count(" ") > 500)
    base = random_model(tmp_path / "base", real_tok, 151936, EOS)
    force("He left at noon. " + tag(2) + " She waited for him. \\boxed{{}}", ("Yes", "No"))
    run(train_rl, "--model", base, "--task", "flawed_fictions", "--device", "cpu", "--smoke",
        "--max-new-tokens", 60, "--trace-prompts", 6, "--targets", "none", "--projector-steps", 1, "--n", 1,
        "--out", tmp_path / "rl")
    said = capsys.readouterr().out
    for what in ("4 steps, 2 on each batch of 8 rollouts of up to 60 tokens, 4 for each of 2 prompts",
                 "num_generations 4 (released: 16)", "lr 0.00012 (released: 5e-07)", "pace: ",
                 "steps 1 (released: None), batch 32", "stage 2: validation loss", "precision"):
        assert what in said
    metrics = [json.loads(line) for line in open(tmp_path / "rl" / "metrics.jsonl")]
    assert all(m["latent_steps"] == 2 and m["tags"] == 1 and m["truncated"] == 0 for m in metrics)
    assert (metrics[0]["max_dlogp"] < 1e-3 and metrics[3]["refresh_loss"] > 0
            and max(m["grad_norm"] for m in metrics) > 0)
    assert json.load(open(tmp_path / "rl" / "config.json"))["base"] == str(base)
    rows = {r["model"]: r for r in json.load(open(tmp_path / "rl" / "results.json"))}
    assert rows["base, tag prompt"]["latent_steps"] == 0
    assert rows["LiteReason"]["latent_steps"] == 2 and "f1" in rows["LiteReason"]
    # the answer forced at once: its opening stands after the header of the answer
    force("{}}", ("Yes", "No"))
    model, tokenizer = load(tmp_path / "rl", "cpu")
    row, rollouts = evaluation.evaluate(model, tokenizer, ff, ff.examples("test")[:4], at_once=True,
                                        max_new_tokens=5, **evaluation.PAPER)
    assert tokenizer.decode(rollouts[0].prompt_ids).endswith("assistant\n\\boxed{")
    assert row["no_verdict"] == 0 and row["text_tokens"] == 3 and row["truncated"] == 0


def test_all_stages_of_the_next_chapter_task_run_on_a_real_book(
        tmp_path, data_folder, real_tok, force, capsys):
    files = shared("fairytales_val.jsonl", "hound_of_the_baskervilles.jsonl")
    run(nc_prepare, "--from", *files, "--out", data_folder / "next_chapter", "--story-tokens", 150,
        "--chapter-tokens", 20)
    books = {split: {r["book"] for r in nc.examples(split)} for split in SPLITS}
    assert len(set().union(*books.values())) == 24 == sum(map(len, books.values()))
    base = random_model(tmp_path / "base", real_tok, 151936, EOS)
    force(f"The king was old. {tag(1)} His son was not.\nIn summary: the{{}} comes.", (" king", " son"))
    common = ("--task", "next_chapter", "--device", "cpu", "--max-new-tokens", 60)
    run(train_rl, "--model", base, *common, "--train-prompts", 4, "--prompts", 2, "--num-generations", 3,
        "--steps", 2, "--trace-prompts", 6, "--targets", "none", "--reward", "vrcli", "--projector-steps", 1,
        "--n", 1, "--val", 2, "--out", tmp_path / "rl")
    metrics = [json.loads(line) for line in open(tmp_path / "rl" / "metrics.jsonl")]
    assert all(m["latent_steps"] == 1 for m in metrics) and metrics[0]["zero_variance"] < 1
    assert nc.settings["reward"] == "vrcli"
    run(evaluation, "--model", tmp_path / "rl", *common, "--n", 2)
    assert "improvement_other_plan" in capsys.readouterr().out
    reader, policy = nc.settings["scorer"][0], load(tmp_path / "rl", "cpu")[0]
    a, b, c = (m.model.layers[0].mlp.up_proj.weight for m in (reader, load(base, "cpu")[0], policy))
    assert torch.equal(a, b) and not torch.equal(a, c)  # a run is read by the base that it was trained from


# ---------------------------------------------------------------- the hooks, with the small tokenizer
@pytest.fixture
def small(tmp_path, tok):
    return random_model(tmp_path / "small", tok, len(tok), [tok.eos_token_id])


def test_the_default_task_is_the_tiny_world_for_a_model_that_reads_it_whatever_its_size(small, tmp_path):
    shutil.copytree(checkpoint.TINY, tmp_path / "run" / "model")
    for model, task in (("tiny", "tiny"), (small, "flawed_fictions"), ("Qwen2.5-1.5B", "flawed_fictions"),
                        (tmp_path / "run", "tiny")):
        assert data.choose_task(None, str(model)) == (task, data.load_task(task))


def test_reward_scorer_and_step_go_to_tasks_with_a_scorer_only(small, data_folder, monkeypatch):
    model = load(small, "cpu")[0]
    for flags in (("vrcli", None), (None, "tiny")):
        one_line("--reward and --scorer are for tasks with a scorer .*; flawed_fictions has none",
                 data.choose_task, "flawed_fictions", str(small), *flags)
    data.start_task(nc, str(small), "thresholded", None, 3, "cpu")
    assert (nc.settings["reward"], nc.settings["seed"]) == ("thresholded", 3)
    assert not any(p.requires_grad for p in nc.settings["scorer"][0].parameters())
    data.start_task(nc, str(small), None, "tiny", 3, "cpu")
    assert nc.settings["scorer"][0].config.vocab_size != model.config.vocab_size
    monkeypatch.setattr(nc, "rewards", lambda e, c: [nc.settings["step"]])
    assert data.score(nc, [{}], ["x"], 7) == [7.0] and data.score(nc, [{}], ["x"]) == [0.0]  # 0 in evaluation


# ---------------------------------------------------------------- bad input
def test_unprepared_data_and_stories_that_do_not_fit_end_in_one_line(tmp_path, data_folder, small, tok):
    words = ("--model", small, "--task", "flawed_fictions", "--device", "cpu")
    out = ("--out", tmp_path / "o")
    one_line("flawed_fictions/train.jsonl is not there yet; make it with: "
             "python data/flawed_fictions/prepare.py", run, train_rl, *words, *out)
    one_line("flawed_fictions/test.jsonl is not there yet", run, evaluation, *words)
    other = (*words, "--task", "next_chapter")
    one_line("next_chapter/train.jsonl is not there yet", run, train_projector, *other, *out)
    source = jsonl(tmp_path / "a.jsonl", stories(40))
    run(ff_prepare, "--from", source, "--out", data_folder / "flawed_fictions")
    one_line("prompt 0 has [0-9]+ tokens; with 4000 new ones that is more than the model's 4096 positions: "
             "lower --max-new-tokens", run, train_rl, *words, "--max-new-tokens", 4000, *out)
    assert not (tmp_path / "o" / "traces.jsonl").exists()
