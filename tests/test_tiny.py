"""The tiny world: a plot hole is found by following two chains at once, and by nothing else; and a target for
each latent. With targets RL holds the base to the latents of stage 1's traces (train_projector.add_anchor),
and the refresh learns from such traces (train_rl.rehearse). And the schedules of rates and refreshes."""
import collections
import json
import random
import signal
import types

import pytest
import torch
from conftest import close
from test_real_tasks import one_line, run
from test_resume import metrics, same_weights, stopped
from test_scripts import works

import data
import train_projector
import train_rl
from data import tiny
from lib.memory import base_parameters
from litereason import LATENT, latent_step, load, states
from results import latents
from train_projector import (common_words, fit_to_targets, last_words, mask_runs, sentences_of, split_answer,
                             target_loss, with_noise)


@pytest.fixture(scope="module")
def base():
    return load("tiny", "cpu")


def follow(story, start):
    """To whom a piece goes in the end, read from the events."""
    events = dict(e.split()[1:3] for e in story.split(" .") if e.strip())
    holder = start
    while holder in events:
        holder = events[holder]
    return holder


def test_the_label_follows_from_the_chains_and_from_nothing_else():
    for split in tiny.SIZES:
        examples = tiny.examples(split)
        assert len(examples) == tiny.SIZES[split]
        for example in examples:
            ends = {follow(example["story"], start) for start in example["first"]}
            assert example["label"] == (tiny.NOBODY in ends) and ends <= {tiny.NOBODY, example["asked"]}
            # Counting tells nothing: every story has one lost piece, and two that come to who acts.
            takers = collections.Counter(e.split()[2] for e in example["story"].split(" .") if e.strip())
            assert takers[tiny.NOBODY] == 1 and takers[example["asked"]] == 2
    stories = collections.Counter((e["story"].count("from") // 3, e["label"]) for e in tiny.examples("test"))
    assert stories == {(hops, label): 50 for hops in tiny.LENGTHS for label in (False, True)}


def test_every_word_is_one_token_of_the_shipped_base_and_of_one_that_the_command_makes(base, tmp_path):
    works("data/tiny/prepare.py", "--steps", 1, "--most", 1, "--out", tmp_path / "b")
    for _, tokenizer in (base, load(str(tmp_path / "b"), "cpu")):
        for example in tiny.examples("test")[:50]:
            for text in (tiny.prompt(example, False), tiny.prompt(example, True)):
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())


# ============================================================ targets
def trace_of(example):
    """What a careful reader writes: a sentence a round."""
    rounds = [list(pair) for pair in zip(*example["chains"])]
    sentences = [f"from {a} {c} and from {b} {d} , go on with {c} and {d} ."
                 for (a, b), (c, d) in zip(rounds, rounds[1:])]
    return " ".join(sentences) + " " + tiny.answer(example), rounds


def masked(model, tokenizer, rng, example, share, common=()):
    """A training trace of a careful reader's text."""
    reasoning, answer = split_answer(trace_of(example)[0])
    prompt = tiny.prompt(example, True)
    sentences = sentences_of(reasoning)
    known = [last_words(model, tokenizer, text, common, 2) for text in [prompt, *sentences]]
    return mask_runs(model, tokenizer, rng, tokenizer.encode(prompt), sentences, answer, known, share)


EXAMPLES = tiny.examples("train", n=20)


@pytest.mark.parametrize("cap", [5, 1])
def test_a_skipped_run_has_the_words_of_each_round_as_targets_and_tags_up_to_the_cap(base, monkeypatch, cap):
    model, tokenizer = base
    monkeypatch.setattr(model.config, "litereason_max_reasoning_steps", cap)
    sentences = [s for e in EXAMPLES for s in sentences_of(split_answer(trace_of(e)[0])[0])]
    common = common_words(tokenizer, sentences)
    row = masked(model, tokenizer, random.Random(0), EXAMPLES[0], 1.0, common)
    rounds = trace_of(EXAMPLES[0])[1][cap == 1 :]  # a longer tag begins with where the reader stands
    assert row.n_latents == len(rounds) == len(row.latents) and row.n_tags == (1 if cap > 1 else len(rounds))
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(pair) for pair in rounds])
    close(row.latents, model.get_input_embeddings()(ids).sum(1) / 2**0.5, 1e-5)
    assert masked(model, tokenizer, random.Random(0), EXAMPLES[0], 0.0, common) is None


@pytest.fixture
def rows(base):
    found = [masked(*base, random.Random(i), example, 0.7) for i, example in enumerate(EXAMPLES[:6])]
    return [row for row in found if row is not None]


def loss_of(model, rows, fed, base_learns):
    n_tokens = sum(len(r.slots) - r.slots.index(LATENT) - r.n_latents for r in rows)
    return target_loss(model, rows, fed, n_tokens, sum(r.n_latents for r in rows), base_learns)


def test_the_loss_of_targets_is_that_of_the_definition_and_what_is_fed_is_not_what_is_wanted(base, rows):
    model, _ = base
    fed = with_noise(rows, 0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = loss_of(model, rows, fed, base_learns=False)
        both = loss_of(model, rows, fed, base_learns=True)
        error, cost, n_latents, n_tokens = 0, 0, 0, 0
        for row, own in zip(rows, fed):
            h, slots, _ = states(model, [own])
            z = latent_step(model, h[0][slots[0] == LATENT])
            error += ((z - row.latents) ** 2).mean(1).sum() / model.get_input_embeddings().weight.var()
            n_latents += row.n_latents
            for t in range(row.slots.index(LATENT), len(row.slots)):
                if row.slots[t] != LATENT:
                    cost -= model.lm_head(h[0, t]).log_softmax(-1)[row.slots[t]]
                    n_tokens += 1
    close(loss, error / n_latents, 1e-4 * float(loss))
    close(both, error / n_latents + cost / n_tokens, 1e-4 * float(both))


def test_the_base_learns_only_if_asked_to_and_micro_batches_change_nothing(rows):
    ends = []
    for base_lr, budget in ((0.0, 10_000), (1e-4, 10_000), (1e-4, 200)):
        model, _ = load("tiny", "cpu", torch.float64)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        fit_to_targets(model, rows, 1e-3, batch=4, steps=3, budget=budget, noise=0.5, base_lr=base_lr)
        for name, p in model.named_parameters():
            learns = base_lr > 0 or name.startswith("reasoning_projector")
            assert torch.equal(p, before[name]) != learns, name
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(ends[1], ends[2], 1e-6)


def test_in_bf16_too_a_base_that_learns_is_read_as_it_is_now(rows):
    """Autocast keeps its first cast of a weight that learns, until its outermost context ends."""
    losses = []
    for bf16 in (False, True):
        model, _ = load("tiny", "cpu")
        model.bf16 = bf16
        fit_to_targets(model, rows, 1e-3, batch=4, steps=12, base_lr=2e-3, schedule=False)
        with torch.no_grad():
            losses.append(float(loss_of(model, rows, rows, base_learns=True)))
    assert abs(losses[1] - losses[0]) < 0.3 * losses[0]  # with weights of the first step it is 1,500 times it


def test_each_latent_of_an_answer_of_tags_has_a_round_and_a_reader_says_its_words(base):
    model, tokenizer = base
    example = {"chains": [["Mara", "Otto", "Ida"], ["Karl", "Lena", "nobody"]]}
    rounds = [{"Mara", "Karl"}, {"Otto", "Lena"}, {"Ida", "nobody"}]
    two, three, four = (f"<implicit_thought> {n} </implicit_thought> " for n in (2, 3, 4))
    for said, found in ((three, rounds), (two + two, [*rounds[:2], *rounds[1:]]), (four, None),
                        ("so " + three, None)):
        assert latents.rounds_of_latents(example, said + "\\boxed{ Yes }", 5) == found
    words = [["Mara", "Karl"], ["Ida", "Ida"], ["nobody", "Tom"]]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(pair) for pair in words])
    sums = model.get_input_embeddings()(ids).detach().sum(1) / 2**0.5
    assert latents.nearest_words(model, tokenizer, sums + 0.01) == [set(pair) for pair in words]


def test_words_that_all_sentences_have_tell_nothing(base):
    told = [f"go on with {name} ." for name in ("Karl", "Mara", "Otto", "Lena")]
    common = common_words(base[1], told)
    assert {base[1].decode([i]) for i in common} == {"go", "on", "with", "."}
    assert last_words(*base, told[0], common, 2) is None  # one word tells something
    assert last_words(*base, told[0], common, 1) is not None


# ============================================================ targets in RL
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
    fed = with_noise(rows, 0.2, torch.Generator().manual_seed(3))
    loss = target_loss(model, rows, fed, None, sum(row.n_latents for row in rows))
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
    one_line("there is no .*traces.jsonl, .*: say --targets none", train_rl.copy_traces, args)
