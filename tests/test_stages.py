"""What stage 1 keeps, and what stage 2 begins with: latents as long as embeddings, and a base that writes
tags."""
import json
import math
import types

import pytest
import torch
from conftest import close, random_qwen2, tag
from test_real_tasks import one_line, run
from test_resume import same_weights, stopped

import data
import litereason
import train_projector
from lib import checkpoint, run as runs
from litereason import (LATENT, NormedProjector, Rollout, attach, embedding_size, insert_latents,
                        load, save, start_projector, without_latents, z_size)
from results import starts
from train_projector import fit_projector, imitate


# ---------------------------------------------------------------- what stage 1 keeps
ANSWERS = [("He left. box right", True), ("He left. box right", False), ("cut", False), ("No", True),
           ("Yes", True), ("It is. \\boxed{no}", True), ("box no, because", False)]


@pytest.fixture
def collect(monkeypatch, tmp_path):
    """collect() -> what stage 1 samples for three examples, each with ANSWERS in a line of the file.
    collect.sampled: how often there was something to sample; collect.weights: of the model."""
    made = [Rollout([1], [2], torch.zeros(0, 4), text=text, finished=whole) for text, whole in ANSWERS]
    monkeypatch.setattr(train_projector, "AT_ONCE", 1)
    monkeypatch.setattr(data, "score", lambda task, examples, texts: ["right" in text for text in texts])
    config = types.SimpleNamespace(_name_or_path="m")
    model = types.SimpleNamespace(config=config, named_parameters=lambda: [("w", collect.weights)])

    def generate(*_, **__):
        collect.sampled += 1
        return made

    def collect(question="q"):
        task = types.SimpleNamespace(__name__="task", prompt=lambda example, latent: question + example)
        return train_projector.collect_traces(model, None, task, list("012"), str(collect.path), len(ANSWERS),
                                              5, 0)

    collect.sampled, collect.path, collect.weights = 0, tmp_path / "traces.jsonl", torch.zeros(3)
    monkeypatch.setattr(train_projector, "generate", generate)
    return collect


def test_rewarded_whole_samples_are_kept_and_it_is_said_why_others_are_not(collect, capsys):
    traces = [sample for sample in collect() if "left out" not in sample]
    assert [(trace["example"], trace["prompt"], trace["text"]) for trace in traces] == [
        (i, f"q{i}", "He left. box right") for i in range(3)]
    assert (f"kept 3 of 21 traces (reward > 0), in {collect.path}; 9 were cut by --max-new-tokens, "
            "6 without an answer, 3 wrong") in capsys.readouterr().out
    assert train_projector.kept(train_projector.lines_of(collect.path)[1:]) == traces


def test_traces_of_other_prompts_or_other_weights_are_not_taken_for_ones_own(collect):
    for question, weights, sampled in (("q", 0, 3), ("q", 0, 3), ("another q", 0, 6), ("another q", 1, 9)):
        collect.weights = torch.full((3,), float(weights))
        collect(question)
        assert collect.sampled == sampled


@pytest.mark.parametrize("texts", [[], ["It is so. \\boxed{Yes}"], ["\\boxed{Yes}", "\\boxed{No}"]])
def test_too_few_traces_are_said_in_one_line_with_what_helps(model, tok, monkeypatch, capsys, texts):
    samples = [{"example": i, "prompt": "q", "text": text} for i, text in enumerate(texts)]
    monkeypatch.setattr(train_projector, "collect_traces", lambda *_: samples)
    task = types.SimpleNamespace(examples=lambda split: [])
    settings = train_projector.settings_of(model, targets="none")
    one_line("too few traces: .*; .* higher --max-new-tokens", train_projector.run_stage_1,
             model, tok, task, "", settings)
    # --smoke takes what was left out, too
    samples[:] = [{"example": i, "prompt": "q", "text": "It is.", "left out": "cut"} for i in (0, 1)]
    train, held, _ = train_projector.run_stage_1(model, tok, task, "", settings, smoke=True)
    assert train and held and all(r.n_latents for r in train + held)
    assert "warning: too few traces were kept; --smoke goes on with all samples" in capsys.readouterr().out


# ---------------------------------------------------------------- the normed start
def test_a_normed_latent_is_as_long_as_an_embedding_however_long_the_state(model):
    start_projector(model, "normed")
    z = h = torch.randn(5, 32).double()
    for size in (1e-2, 1, 1e3, 1e6):
        made = model.reasoning_projector(size * h)
        close(made.norm(dim=-1), torch.full((5,), embedding_size(model)).double(), 1e-6)
    for mlp in model.reasoning_projector:
        z = mlp(z)
        z = z / z.square().mean(-1, keepdim=True).sqrt()
    close(model.reasoning_projector(h), model.reasoning_projector.size * z, 1e-8)


def test_a_model_begins_with_the_start_of_its_size_and_a_checkpoint_with_its_own(tok, tmp_path, monkeypatch):
    def begun(*projector):
        model = attach(random_qwen2(len(tok), tok.eos_token_id), *projector)
        return model, type(model.reasoning_projector), model.projector_trained

    small, *start = begun()
    assert start == [litereason.ReasoningProjector, False]
    monkeypatch.setattr(checkpoint, "is_small", lambda model: False)
    # a checkpoint of the released code names no projector
    assert begun(small.reasoning_projector.state_dict())[1:] == (litereason.ReasoningProjector, True)
    real, *start = begun()
    assert start == [NormedProjector, False]
    real.projector_trained = True
    with torch.no_grad():
        real.reasoning_projector.size.mul_(1.5)
    save(real, tok, tmp_path / "normed")
    again, _ = load(tmp_path / "normed", dtype=torch.float64)
    assert type(again.reasoning_projector) is NormedProjector and again.projector_trained
    assert torch.equal(again.reasoning_projector.size, real.reasoning_projector.size)


# ---------------------------------------------------------------- the size of latents
def test_the_size_of_latents_is_their_median_norm_in_sizes_of_an_embedding(model):
    one = embedding_size(model)
    latents = torch.zeros(3, 32)
    latents[:, 0] = torch.tensor([one, 4 * one, 2 * one])
    assert z_size(model, latents) == pytest.approx(2)
    assert z_size(model, latents[:0]) is None
    latents[:2] = math.nan
    assert math.isnan(z_size(model, latents))
    assert [runs.if_finite(x) for x in (None, math.nan, math.inf, 2.0)] == [None, None, None, 2.0]


@pytest.fixture
def rows(model, tok):
    """A trace with two tags."""
    slots = insert_latents(model, tok, tok.encode(f"ab{tag(3)}cd{tag(2)}.<eos>"))
    return [Rollout(tok.encode("the story"), slots, torch.zeros(0, 32))]


def test_each_step_of_stage_2_says_how_large_latents_are_and_which_it_skips(model, rows, tmp_path, capsys):
    start_projector(model, "normed")
    fit_projector(model, rows, 1e-3, 1, 3, states=str(tmp_path / "stage-2"))
    lines = [json.loads(line) for line in open(tmp_path / "stage-2.jsonl")]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["z_size"] == pytest.approx(1, abs=0.1) and line["grad_norm"] > 0 for line in lines)

    start_projector(model, "mlp")
    with torch.no_grad():
        model.reasoning_projector[2].down_proj.weight.fill_(math.inf)
    before = model.reasoning_projector[0].up_proj.weight.clone()
    capsys.readouterr()
    loss = fit_projector(model, rows, 1e-3, 1, 2)
    assert math.isnan(loss) and torch.equal(before, model.reasoning_projector[0].up_proj.weight)
    assert "2 of 2 steps of the refresh were skipped" in capsys.readouterr().out


# ---------------------------------------------------------------- imitation
def test_the_base_learns_to_write_the_tags_of_the_traces_and_the_projector_does_not_move(model, rows):
    assert without_latents(rows[0]).slots == [slot for slot in rows[0].slots if slot != LATENT]

    def chance_of_the_text():
        return float(litereason.logprobs(model, [without_latents(rows[0])])[0].detach().sum())

    before, projector = chance_of_the_text(), [p.clone() for p in model.reasoning_projector.parameters()]
    imitate(model, rows, 1, 5, seed=0, lr=1e-3, schedule=False)
    assert chance_of_the_text() > before + 1
    assert all(map(torch.equal, projector, model.reasoning_projector.parameters()))
    assert not model.projector_trained


def test_an_imitation_of_given_traces_that_is_stopped_continues_bit_for_bit_and_none_is_sampled(tmp_path):
    rows = [{"example": i, "text": "look at the map . go on . \\boxed{Yes}"} for i in range(12)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, half = tmp_path / "whole", tmp_path / "half"
    words = ("--device", "cpu", "--prompts", 12, "--traces", tmp_path / "traces.jsonl", "--imitate", 3,
             "--steps", 2, "--batch", 4, "--n", 1, "--save-every", 2, "--max-new-tokens", 20,
             "--targets", "none")
    run(train_projector, *words, "--out", whole)
    stopped(train_projector, "logprobs", 2, 15, train_projector, *words, "--out", half)
    # and again in stage 2, before which the imitated base has to come back
    stopped(train_projector, "projector_loss", 4, 15, train_projector, "--resume", half)
    run(train_projector, "--resume", half)
    assert same_weights(whole, half)
    for name in ("imitation.jsonl", "stage-2.jsonl"):
        assert (whole / name).read_text() == (half / name).read_text()
    assert json.load(open(whole / "results.json"))["sampled"] == 0 and not (whole / "traces.jsonl").exists()


def test_all_starts_that_are_compared_run_and_are_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "tales.jsonl").write_text(json.dumps({"sections": ["the man has a key . " * 200]}))
    (tmp_path / "kept.json").write_text("[]")
    monkeypatch.setattr(starts, "PATH", str(tmp_path / "kept.json"))
    monkeypatch.setattr(starts, "HELD", 4)
    monkeypatch.setattr(starts, "STEPS", 1)
    run(starts, "--text", tmp_path / "tales.jsonl", "--models", "tiny")
    rows, said = json.loads((tmp_path / "kept.json").read_text()), capsys.readouterr().out
    assert [row["start"] for row in rows] == list(starts.STARTS)
    for row in rows:
        assert len(row["chain before"]) == 5 and row["no latents"] > 0
        assert f"| tiny | {row['start']} | 0.0001 | 0 |" in said
    assert rows[1]["chain before"] == pytest.approx([1] * 5, rel=0.01)  # normed
