"""All stages run on the paper's two real tasks: real stories and the real Qwen2 tokenizer.

The model is random and made to write; no number here says anything about a trained one. What is in ../shared
is looked for there; where it is absent these tests skip."""
import json
import os

import pytest
import torch
from conftest import ROOT, random_qwen2, tag
from test_real_tasks import data_folder, jsonl, one_line, run, stories  # noqa: F401 (a fixture)

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


def shared(*names):
    paths = [os.path.normpath(os.path.join(ROOT, "..", "shared", "data", name)) for name in names]
    lacking = [path for path in paths if not os.path.exists(path)]
    return pytest.skip(f"there is no {lacking[0]}") if lacking else paths


def run_all_stages(tmp_path, monkeypatch, tok, text, pair, *words):
    """train_rl.py on a random model which writes this text, with one of the pair for its {}
    -> (metrics, {row: result})"""
    before, after = map(tok.encode, text.split("{}"))
    drawn = [tok.encode(word)[0] for word in pair]
    tokens = [*([i] for i in before), drawn, *([i] for i in [*after, EOS[0]])]  # place by place
    decode, rest = litereason._decode, []

    def decode_from_the_start(*args):
        rest[:] = [iter(tokens)]
        return decode(*args)

    def sample(logits, u, temperature, top_k, top_p):
        choice = next(rest[0], EOS[:1])
        token = torch.tensor([choice[int(x * len(choice))] for x in u.tolist()])
        return token, (logits / temperature).log_softmax(-1).gather(-1, token[:, None])[:, 0]

    monkeypatch.setattr(litereason, "_decode", decode_from_the_start)
    monkeypatch.setattr(litereason, "sample", sample)
    monkeypatch.setattr(checkpoint, "_read_tokenizer", lambda *_, **__: tok)  # one tag table for all
    monkeypatch.setattr(train_projector, "VERSIONS", 1)
    # Saved as a hub checkpoint is: no projector.
    base = random_qwen2(151936, EOS[0], tie_word_embeddings=True).float()
    base.config.max_position_embeddings, base.generation_config.eos_token_id = 4096, EOS
    save(base, tok, tmp_path / "base")
    run(train_rl, *words, "--model", tmp_path / "base", "--device", "cpu", "--targets", "none", "--n", 1,
        "--projector-steps", 1, "--trace-prompts", 6, "--max-new-tokens", 60, "--out", tmp_path / "rl")
    metrics = [json.loads(line) for line in open(tmp_path / "rl" / "metrics.jsonl")]
    return metrics, {r["model"]: r for r in json.load(open(tmp_path / "rl" / "results.json"))}


def test_all_stages_of_the_plot_hole_task_run_on_real_stories(tmp_path, data_folder, real_tok, monkeypatch):
    files = shared("flawed_fictions_subset.jsonl")
    run(ff_prepare, "--from", *files, "--out", data_folder / "flawed_fictions")
    everything = [r for split in SPLITS for r in ff.examples(split)]
    assert len(everything) == 213 and sum(r["label"] for r in everything) == 108
    assert not any("<p>" in r["story"] or r["story"].endswith("--") for r in everything)
    assert all("\n\n" in r["story"] for r in everything if r["story"].count(" ") > 500)
    text = "He left at noon. " + tag(2) + " She waited for him. \\boxed{{}}"
    metrics, rows = run_all_stages(tmp_path, monkeypatch, real_tok, text, ("Yes", "No"),
                                   "--task", "flawed_fictions", "--smoke")
    assert all(m["latent_steps"] == 2 and m["tags"] == 1 and m["truncated"] == 0 for m in metrics)
    assert (metrics[0]["max_dlogp"] < 1e-3 and metrics[3]["refresh_loss"] > 0
            and max(m["grad_norm"] for m in metrics) > 0)
    assert rows["base, tag prompt"]["latent_steps"] == 0
    assert rows["LiteReason"]["latent_steps"] == 2 and "f1" in rows["LiteReason"]


def test_all_stages_of_the_next_chapter_task_run_on_a_real_book(
        tmp_path, data_folder, real_tok, monkeypatch, capsys):
    files = shared("fairytales_val.jsonl", "hound_of_the_baskervilles.jsonl")
    run(nc_prepare, "--from", *files, "--out", data_folder / "next_chapter", "--story-tokens", 150,
        "--chapter-tokens", 20)
    books = {split: {r["book"] for r in nc.examples(split)} for split in SPLITS}
    assert len(set().union(*books.values())) == 24 == sum(map(len, books.values()))
    text = f"The king was old. {tag(1)} His son was not.\nIn summary: the{{}} comes."
    metrics, _ = run_all_stages(tmp_path, monkeypatch, real_tok, text, (" king", " son"), "--task",
                                "next_chapter", "--train-prompts", 4, "--prompts", 2, "--num-generations", 3,
                                "--steps", 2, "--reward", "vrcli", "--val", 2)
    assert all(m["latent_steps"] == 1 for m in metrics) and metrics[0]["zero_variance"] < 1
    assert nc.settings["reward"] == "vrcli"
    run(evaluation, "--model", tmp_path / "rl", "--task", "next_chapter", "--device", "cpu", "--n", 2,
        "--max-new-tokens", 60)
    assert "improvement_other_plan" in capsys.readouterr().out
    models = nc.settings["scorer"][0], *(load(tmp_path / name, "cpu")[0] for name in ("base", "rl"))
    a, b, c = (model.model.layers[0].mlp.up_proj.weight for model in models)
    assert torch.equal(a, b) and not torch.equal(a, c)  # a run is read by the base that it was trained from


# ---------------------------------------------------------------- the hooks, with small models
def test_the_default_task_is_the_tiny_world_for_a_model_that_reads_it_whatever_its_size(
        model, tok, whole, tmp_path):
    save(model, tok, tmp_path / "other")
    for path, task in (("tiny", "tiny"), (whole, "tiny"), (tmp_path / "other", "flawed_fictions"),
                       ("Qwen2.5-1.5B", "flawed_fictions")):
        assert data.choose_task(None, str(path)) == (task, data.load_task(task))


def test_reward_scorer_and_step_go_to_tasks_with_a_scorer_only(
        model, tok, tmp_path, data_folder, monkeypatch):
    for flags in (("vrcli", None), (None, "tiny")):
        one_line("--reward and --scorer are for tasks with a scorer .*; flawed_fictions has none",
                 data.choose_task, "flawed_fictions", "tiny", *flags)
    data.start_task(nc, "tiny", "thresholded", None, 3, "cpu")
    assert (nc.settings["reward"], nc.settings["seed"]) == ("thresholded", 3)
    tiny = nc.settings["scorer"][0]
    assert not any(p.requires_grad for p in tiny.parameters())
    save(model, tok, tmp_path / "other")
    data.start_task(nc, "tiny", None, str(tmp_path / "other"), 3, "cpu")
    assert nc.settings["scorer"][0].config.vocab_size == model.config.vocab_size != tiny.config.vocab_size
    monkeypatch.setattr(nc, "rewards", lambda e, c: [nc.settings["step"]])
    assert data.score(nc, [{}], ["x"], 7) == [7.0] and data.score(nc, [{}], ["x"]) == [0.0]  # 0 in evaluation


def test_unprepared_data_and_stories_that_do_not_fit_end_in_one_line(tmp_path, data_folder):
    words, out = ("--task", "flawed_fictions", "--device", "cpu"), ("--out", tmp_path / "o")
    one_line("flawed_fictions/train.jsonl is not there yet; make it with: "
             "python data/flawed_fictions/prepare.py", run, train_rl, *words, *out)
    one_line("flawed_fictions/test.jsonl is not there yet", run, evaluation, *words)
    other = ("--task", "next_chapter")
    one_line("next_chapter/train.jsonl is not there yet", run, train_projector, *other, *out)
    source = jsonl(tmp_path / "a.jsonl", stories(40))
    run(ff_prepare, "--from", source, "--out", data_folder / "flawed_fictions")
    one_line("prompt 0 has [0-9]+ tokens; with 4000 new ones that is more than the model's [0-9]+ positions: "
             "lower --max-new-tokens", run, train_rl, *words, "--max-new-tokens", 4000, *out)
    assert not (tmp_path / "o" / "traces.jsonl").exists()
