"""Each of the other methods computes what its paper says, held against a plain way of saying the same in
float64, and results/baselines.py runs them all."""
import json
import sys
import types

import pytest
import torch
from conftest import close
from test_scripts import script

import data
from data import tiny
from litereason import LATENT, attach, generate, load, logprobs, states, unroll
from results import baselines
from results.baselines import (LatentHead, colar, feed_back, mixture_of_inputs, normal_numbers, soft_thinking,
                               train_coconut)

PROMPTS = [" on the mat", "!"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_states(model, prompt, x):
    """States after prompt ids and embeddings x (n, D), without any cache of ours -> (len(prompt) + n, D)."""
    e = torch.cat([model.get_input_embeddings()(torch.tensor(prompt)), x])[None]
    model.set_attn_implementation("sdpa")
    h = model.model(inputs_embeds=e, use_cache=False).last_hidden_state[0]
    model.set_attn_implementation("litereason")
    return h


# ---------------------------------------------------------------- training-free
def test_soft_thinking_over_one_word_is_greedy_decoding_up_to_the_answer(model, tok):
    greedy = generate(model, tok, PROMPTS, max_new_tokens=30, temperature=0, tag=0)
    for r in greedy:
        # any word that greedy decoding says; soft thinking ends where it comes for the first time
        end = r.slots[12]
        at = r.slots.index(end)
        soft = generate(model, tok, [r.prompt_ids], max_new_tokens=30, temperature=0, tag=0, start=30,
                        **soft_thinking(model, end, top_k=1))[0]
        assert soft.slots == [LATENT] * at + r.slots[at:]
        close(soft.latents, model.get_input_embeddings()(torch.tensor(r.slots[:at])))


def test_a_soft_latent_is_the_mean_embedding_of_the_likeliest_words(model, tok):
    r = generate(model, tok, PROMPTS[:1], max_new_tokens=5, start=5, tag=0,
                 **soft_thinking(model, -5, top_k=3))[0]
    h = plain_states(model, r.prompt_ids, r.latents)[len(r.prompt_ids) - 1 : -1]  # before each latent
    p, words = model.lm_head(h).softmax(-1).topk(3)
    p = p / p.sum(-1, keepdim=True)
    close(r.latents, (p[..., None] * model.get_input_embeddings()(words)).sum(1))


def test_soft_thinking_stops_after_certain_steps_in_a_row_counted_for_each_row(model, tok):
    sure = soft_thinking(model, 7, certain=100.0, patience=4)  # everything is certain
    for _ in range(2):  # the count begins again with each batch
        for r in generate(model, tok, PROMPTS, 2, max_new_tokens=12, start=12, tag=0, **sure):
            assert r.slots[:4] == [LATENT] * 3 + [7]
    leave = soft_thinking(model, 7, certain=100.0, patience=4)["leave"]
    h = torch.zeros(2, 32, dtype=torch.float64)
    drawn = torch.zeros(2, dtype=torch.long)
    calls = [  # (numbers of the rollouts, latents they have run, those that end)
        ([0, 1], [0, 0], []), ([0, 1], [1, 1], []), ([1, 5], [2, 0], []), ([1, 5], [3, 1], [1]),
        ([5, 9], [2, 0], []), ([5, 9], [3, 1], [5]), ([0, 9], [0, 2], []), ([0, 9], [1, 3], [9])]
    for row, taken, ends in calls:
        word = leave(h, drawn, torch.tensor(row), torch.tensor(taken))
        assert word.tolist() == [7 if r in ends else LATENT for r in row]


def test_a_mixture_with_an_infinite_weight_on_the_word_is_plain_sampling(model, tok):
    def slots(**method):
        rolls = generate(model, tok, PROMPTS, 2, max_new_tokens=20, generator=seeded(), tag=0, **method)
        return [r.slots for r in rolls]

    assert slots() == slots(**mixture_of_inputs(model, beta=1e15))
    assert slots() != slots(**mixture_of_inputs(model, beta=0.5))


# ---------------------------------------------------------------- Coconut
def test_coconuts_latents_are_the_last_hidden_states_and_it_learns_through_them(model, tok):
    model = attach(type(model)(model.config).double())
    r, = generate(model, tok, PROMPTS[:1], max_new_tokens=12, start=4, tag=0, latent=feed_back)
    assert r.slots[:4] == [LATENT] * 4 and r.n_latents == 4
    close(r.latents, plain_states(model, r.prompt_ids, r.latents)[len(r.prompt_ids) - 1 : -1])
    h, latents = unroll(model, [r], feed_back)
    close(latents[0], r.latents)
    h[0, -1].sum().backward()
    assert latents[0].requires_grad and model.model.embed_tokens.weight.grad.abs().sum() > 0
    before = [p.detach().clone() for p in model.parameters()]
    args = types.SimpleNamespace(seed=0, method="coconut", stages=2, epochs=1, last_stage=2, lr=1e-3, batch=2)
    traces = [("a b", "One. Two. Three.", "\\boxed{1}"), ("b", "One.", "\\boxed{2}")]
    assert train_coconut(model, tok, traces, args) == 5  # a step in each stage but the last
    for was, (name, is_now) in zip(before, model.named_parameters()):  # the base, and not the projector
        assert torch.equal(was, is_now) == name.startswith("reasoning_projector.")


# ---------------------------------------------------------------- CoLaR
def head_of(model):
    torch.manual_seed(1)
    return LatentHead(model.config.hidden_size, spread=0.5).double()


def test_normal_numbers_are_normal_and_a_rows_own():
    u, k = torch.rand(200, generator=seeded(), dtype=torch.float64), torch.arange(200) % 7
    x = normal_numbers(u, k, 500)
    assert (abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01
            and abs(float((x**4).mean()) - 3) < 0.1)
    assert torch.equal(x[17:19], normal_numbers(u[17:19], k[17:19], 500))
    assert float((torch.corrcoef(x) - torch.eye(200)).abs().max()) < 0.25  # 1 / sqrt(500) is 0.045
    assert not torch.equal(normal_numbers(u[:1], k[:1], 5), normal_numbers(u[:1], k[:1] + 1, 5))


def test_colars_latents_follow_its_head_and_end_where_the_head_of_the_lm_draws_the_end(model, tok):
    head, end = head_of(model), tok.encode("e")[0]
    rolls = generate(model, tok, PROMPTS, 8, max_new_tokens=60, start=40, tag=0, generator=seeded(4),
                     **colar(model, head, end))
    assert len({r.n_latents for r in rolls}) > 3
    for r in rolls:
        n = r.n_latents
        assert 1 <= n <= 40 and r.slots[:n] == [LATENT] * n and (n == 40 or r.slots[n] == end)
        mean, std = head(plain_states(model, r.prompt_ids, r.latents)[len(r.prompt_ids) - 1 : -1])
        # draws from that normal distribution
        assert float(((r.latents / 0.5 - mean) / std).detach().abs().max()) < 6
    # sampler and scorer agree on the words, the end of the block included
    logp, scored = logprobs(model, rolls)
    for i, r in enumerate(rolls):
        close(logp[i, : len(r.slots)], r.logprobs)
    h, slots, valid = states(model, rolls)
    is_latent = valid & (slots == LATENT)
    z = torch.cat([r.latents for r in rolls]) / 0.5
    mean, std = head(h[is_latent])
    density = -0.5 * ((z - mean) / std) ** 2 - std.log() - 0.5 * torch.tensor(2 * torch.pi).log()
    close(head.logprob(h[is_latent], z), density.mean(1), 1e-6)


@pytest.mark.parametrize("rule", ["soft", "colar"])
def test_a_row_alone_is_the_same_row_in_a_batch(model, tok, rule):
    end = tok.encode("e")[0]

    def decode(**batch):
        method = soft_thinking(model, end, 4, patience=9)
        if rule == "colar":
            method = colar(model, head_of(model), end)
        return generate(model, tok, [*PROMPTS, "another one"], 1, max_new_tokens=30, start=25, tag=0,
                        generator=seeded(), **batch, **method)

    for a, b in zip(decode(), decode(gen_batch_size=1)):
        assert a.slots == b.slots
        close(a.latents, b.latents)


# ---------------------------------------------------------------- pause tokens in train_rl.py
def test_pause_tokens_run_and_a_trained_projector_is_not_begun_again(tmp_path):
    small = ("--steps", 1, "--train-prompts", 2, "--projector-steps", 1, "--trace-prompts", 24, "--n", 0,
             "--targets", "none", "--val", 0, "--prompts", 2, "--max-new-tokens", 40)
    got = script("train_rl.py", "--projector", "pause", *small, "--out", tmp_path / "pause")
    assert got.returncode == 0, got.stderr
    pause = load(tmp_path / "pause", "cpu")[0].reasoning_projector
    z = pause(torch.randn(3, 2, 128))
    assert torch.equal(z[0, 0], z[2, 1]) and z.abs().sum() > 0  # one vector everywhere
    trained = ("--model", tmp_path / "pause")
    got = script("train_rl.py", "--projector", "random", *small, *trained, "--out", tmp_path / "no")
    assert got.returncode == 2 and "has a trained projector" in got.stderr and "Traceback" not in got.stderr


def test_colars_sft_sums_r_words_over_the_root_of_r_draws_r_from_1_to_5_and_says_it(model, tok, monkeypatch):
    e, learned = model.get_input_embeddings().weight.detach().float(), []
    z = baselines.compress(model, [[5], [7, 9, 7, 11]])
    close(z, torch.stack([e[5], (2 * e[7] + e[9] + e[11]) / 2]), 1e-6)
    monkeypatch.setattr(baselines, "add_sft_gradients", lambda model, head, batch, _: learned.extend(batch))
    args = types.SimpleNamespace(seed=0, method="colar", epochs=100, lr=0.0, batch=1)
    baselines.sft_colar(model, tok, head_of(model), [("a b", "x" * 10, "\\boxed{1}")], args)
    latents = {tok.decode(row.prompt_ids): row.n_latents for row in learned}
    assert latents == {"a b 1": 10, "a b 2": 5, "a b 3": 4, "a b 4": 3, "a b 5": 2}
    task = data.load_task("tiny.next_chapter")  # and so do the prompts of the evaluation
    example = task.examples("val")[0]
    assert baselines.told(task, 2).prompt(example, False) == task.prompt(example, False) + " 2"


def test_the_answer_learns_what_follows_its_opening_and_keeps_the_weights_that_val_likes_best():
    model, tok = load("tiny")
    task = data.load_task("tiny")
    examples = task.examples("train")[:8]
    rows = baselines.answer_rows(model, tok, task, examples)
    row = rows[0]
    assert tok.decode(row.prompt_ids).endswith(" : \\boxed{") and row.n_latents == 0
    assert tok.decode(row.slots[:-1]).split() in (["Yes", "}"], ["No", "}"])

    val = iter([0.5, 0.9, 0.9, *[0.3] * 7])
    seen = []

    def accuracy():
        seen.append(model.model.norm.weight.detach().clone())
        return next(val)

    args = types.SimpleNamespace(seed=0, method="answer", lr=1e-2, steps=10, batch=8)
    baselines.train_answer(model, rows, args, accuracy)
    assert torch.equal(model.model.norm.weight, seen[1]) and not torch.equal(seen[1], seen[2])


# ---------------------------------------------------------------- the script
SFTS = ["colar, r = 1, SFT", "colar, r = 2, SFT", "colar, r = 5, SFT"]


@pytest.mark.parametrize("method", list(baselines.METHODS))
def test_every_method_runs(method, tmp_path, monkeypatch, capsys):
    rows = [*SFTS, "colar"] if method == "colar" else [method]
    task = "tiny" if method in ("moi", "colar", "answer") else "tiny.next_chapter"
    words = ["--method", method, "--task", task, "--n", 1, "--stories", 2, "--steps", 1, "--stages", 1,
             "--last-stage", 1, "--epochs", 1, "--prompts", 1, "--num-generations", 4, "--most-latents", 8,
             "--traces", 4, "--max-new-tokens", 80, "--seed", 1, "--out", tmp_path / "o"]
    monkeypatch.setattr(baselines, "CHECKED", 2)
    monkeypatch.setattr(sys, "argv", ["results/baselines.py", *map(str, words)])
    with torch.random.fork_rng(devices=[]):
        baselines.main()
    found = json.load(open(tmp_path / "o" / "results.json"))
    kinds = [("", "paper", "test"), (", temperature 1", "trained", "test"),
             (", train stories", "paper", "train")]
    assert [(r["model"].strip(), r["sampling"], r["split"], r["n_examples"]) for r in found] == [
        (row + end, *others, 1 + (others[1] == "train")) for row in rows for end, *others in kinds]
    trained = method not in ("soft-thinking", "moi")
    for r in found:
        assert r["stories"] == 2 * trained and (r["optimiser_steps"] > 0) == trained
        assert (r["sampled_tokens"] > 0) == (r["traces"] > 0) == (method in ("coconut", "colar"))
    said = capsys.readouterr().out
    assert f"| model | {data.measure_of(data.load_task(task))} |" in said
    config = json.load(open(tmp_path / "o" / "config.json"))
    assert config["script"] == "results/baselines.py" and config["num_generations"] == 4
    if method == "colar":
        assert found[-1]["optimiser_steps"] == found[0]["optimiser_steps"] + 1
        line = json.loads((tmp_path / "o" / "metrics.jsonl").read_text())
        assert line["zero_variance"] == found[-1]["steps_without_gradient"]  # of one group
        assert found[-1]["r"] in baselines.RATES


@pytest.mark.parametrize("words, complaint", [
    (("coconut", "--max-new-tokens", 1, "--stories", 2), "nothing to train on"),
    (("moi", "--stories", 9000), f"has only {tiny.SIZES['train']} train stories"),
    (("answer", "--task", "tiny.next_chapter"), "tiny.next_chapter has none")])
def test_baselines_say_what_is_wrong_in_one_line(tmp_path, words, complaint):
    got = script("results/baselines.py", "--n", 1, "--out", tmp_path / "o", "--method", *words)
    assert got.returncode == 2 and complaint in got.stderr and "Traceback" not in got.stderr
