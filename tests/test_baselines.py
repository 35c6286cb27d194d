"""Each of the other methods computes what its paper says, held against a plain way of saying the same in
float64, and results/baselines.py runs them all."""
import json
import types

import pytest
import torch
from conftest import SIZES, close
from test_real_tasks import one_line, run

import data
import train_rl
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
def test_a_soft_latent_is_the_mean_embedding_of_likely_words_until_the_answers_word_is_the_likeliest(
        model, tok):
    greedy, = generate(model, tok, PROMPTS[:1], max_new_tokens=30, temperature=0, tag=0)
    # Over one word it is greedy decoding up to the word that ends it, any that greedy decoding says.
    end = greedy.slots[12]
    at = greedy.slots.index(end)
    soft, = generate(model, tok, PROMPTS[:1], max_new_tokens=30, temperature=0, tag=0, start=30,
                     **soft_thinking(model, end, top_k=1))
    assert soft.slots == [LATENT] * at + greedy.slots[at:]
    close(soft.latents, model.get_input_embeddings()(torch.tensor(greedy.slots[:at])))
    r, = generate(model, tok, PROMPTS[:1], max_new_tokens=5, start=5, tag=0,
                  **soft_thinking(model, -5, top_k=3))
    h = plain_states(model, r.prompt_ids, r.latents)[len(r.prompt_ids) - 1 : -1]  # before each latent
    p, words = model.lm_head(h).softmax(-1).topk(3)
    p = p / p.sum(-1, keepdim=True)
    close(r.latents, (p[..., None] * model.get_input_embeddings()(words)).sum(1))


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
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1
    assert torch.equal(x[17:19], normal_numbers(u[17:19], k[17:19], 500))
    assert (torch.corrcoef(x) - torch.eye(200)).abs().max() < 0.25  # 1 / sqrt(500) is 0.045
    assert not torch.equal(normal_numbers(u[:1], k[:1], 5), normal_numbers(u[:1], k[:1] + 1, 5))


def test_colars_latents_follow_its_head_and_end_where_the_head_of_the_lm_draws_the_end(model, tok):
    head, end = head_of(model), tok.encode("e")[0]
    rolls = generate(model, tok, PROMPTS, 8, max_new_tokens=60, start=40, tag=0, generator=seeded(4),
                     **colar(model, head, end))
    assert len({r.n_latents for r in rolls}) > 3
    for r in rolls:
        n = r.n_latents
        assert 1 <= n <= 40 and r.slots[:n] == [LATENT] * n and (n == 40 or r.slots[n] == end)
    # sampler and scorer agree on the words, the end of the block included
    for row, r in zip(logprobs(model, rolls)[0], rolls):
        close(row[: len(r.slots)], r.logprobs)
    h, slots, valid = states(model, rolls)
    is_latent = valid & (slots == LATENT)
    z = torch.cat([r.latents for r in rolls]) / 0.5
    mean, std = head(h[is_latent])
    assert ((z - mean) / std).abs().max() < 6  # draws from that normal distribution
    density = -0.5 * ((z - mean) / std) ** 2 - std.log() - 0.5 * torch.tensor(2 * torch.pi).log()
    close(head.logprob(h[is_latent], z), density.mean(1), 1e-6)


def test_a_row_alone_is_the_same_row_in_a_batch(model, tok):
    def decode(**batch):
        return generate(model, tok, [*PROMPTS, "another one"], 2, max_new_tokens=30, start=25, tag=0,
                        generator=seeded(), **batch, **colar(model, head_of(model), tok.encode("e")[0]))

    rows = decode()
    assert len({r.n_latents for r in rows}) > 1
    for a, b in zip(rows, decode(gen_batch_size=1)):
        assert a.slots == b.slots
        close(a.latents, b.latents)


def test_pause_tokens_run_and_a_trained_projector_is_not_begun_again(tmp_path):
    words = (*SIZES, "--n", 0, "--steps", 1, "--minibatches", 1)
    run(train_rl, "--projector", "pause", *words, "--out", tmp_path / "pause")
    pause = load(tmp_path / "pause", "cpu")[0].reasoning_projector
    z = pause(torch.randn(3, 2, 128))
    assert torch.equal(z[0, 0], z[2, 1]) and z.abs().sum() > 0  # one vector everywhere
    one_line("has a trained projector", run, train_rl, "--projector", "random", *words,
             "--model", tmp_path / "pause", "--out", tmp_path / "no")


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
    rows = baselines.answer_rows(model, tok, task, task.examples("train")[:8])
    assert tok.decode(rows[0].prompt_ids).endswith(" : \\boxed{") and rows[0].n_latents == 0
    assert tok.decode(rows[0].slots[:-1]).split() in (["Yes", "}"], ["No", "}"])
    seen = []

    def accuracy():
        seen.append(model.model.norm.weight.detach().clone())
        return [0.5, 0.9, 0.9, *[0.3] * 7][len(seen) - 1]

    args = types.SimpleNamespace(seed=0, method="answer", lr=1e-2, steps=10, batch=8)
    baselines.train_answer(model, rows, args, accuracy)
    assert torch.equal(model.model.norm.weight, seen[1]) and not torch.equal(seen[1], seen[2])


# ---------------------------------------------------------------- the script
SFTS = [f"colar, r = {r}, SFT" for r in baselines.RATES]


@pytest.mark.parametrize("method", list(baselines.METHODS))
def test_every_method_runs(method, tmp_path, monkeypatch, capsys):
    rows = [*SFTS, "colar"] if method == "colar" else [method]
    task = "tiny" if method in ("moi", "colar", "answer") else "tiny.next_chapter"
    monkeypatch.setattr(baselines, "CHECKED", 2)
    with torch.random.fork_rng(devices=[]):
        run(baselines, "--method", method, "--task", task, "--n", 1, "--stories", 2, "--steps", 1,
            "--stages", 1, "--last-stage", 1, "--epochs", 1, "--prompts", 1, "--num-generations", 4,
            "--most-latents", 8, "--traces", 4, "--max-new-tokens", 80, "--seed", 1, "--out", tmp_path / "o")
    found = json.load(open(tmp_path / "o" / "results.json"))
    kinds = [("", "paper", "test"), (", temperature 1", "trained", "test"),
             (", train stories", "paper", "train")]
    assert [(r["model"].strip(), r["sampling"], r["split"], r["n_examples"]) for r in found] == [
        (row + end, *others, 1 + (others[1] == "train")) for row in rows for end, *others in kinds]
    trained = method not in ("soft-thinking", "moi")
    for r in found:
        assert r["stories"] == 2 * trained and (r["optimiser_steps"] > 0) == trained
        assert (r["sampled_tokens"] > 0) == (r["traces"] > 0) == (method in ("coconut", "colar"))
    assert f"| model | {data.measure_of(data.load_task(task))} |" in capsys.readouterr().out
    assert json.load(open(tmp_path / "o" / "config.json"))["script"] == "results/baselines.py"
    if method == "colar":
        assert found[-1]["optimiser_steps"] == found[0]["optimiser_steps"] + 1
        line = json.loads((tmp_path / "o" / "metrics.jsonl").read_text())
        assert line["zero_variance"] == found[-1]["steps_without_gradient"]  # of one group


@pytest.mark.parametrize("words, complaint", [
    (("coconut", "--max-new-tokens", 1, "--stories", 2), "nothing to train on"),
    (("moi", "--stories", 9000), f"has only {tiny.SIZES['train']} train stories"),
    (("answer", "--task", "tiny.next_chapter"), "tiny.next_chapter has none")])
def test_baselines_say_what_is_wrong_in_one_line(tmp_path, words, complaint):
    one_line(complaint, run, baselines, "--n", 1, "--out", tmp_path / "o", "--method", *words)
