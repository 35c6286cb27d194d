"""Each of the three forks that the README shows touches one place: a new latent step, a new RL rule,
a new task.

The latent step is the README's GRU, whose memory goes from latent to latent within a block; the rules are
RLOO and Dr. GRPO; the task is a module with three functions. Each is run through decoding, the latent
roll-out, scoring and training."""
import json
import os
import sys
import types

import pytest
import torch
from conftest import LIMIT, PROMPTS, ROOT, TEXTS, close, naive, random_qwen2, scripted, write
from test_train import close_gradients, gradients, some_number

import data
import litereason
import targets
import train_rl
from eval import flops, latent_of, matrix_flops
from litereason import (LATENT, PROJECTORS, RULES, attach, generate, load, logprobs, naive_generate,
                        policy_loss, projector_loss, recompute_latents, save, start_projector, states, unroll)
from lib import UserError


# ---------------------------------------------------------------- a latent step: one class and its name
README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def shown(begins, ends):
    """The README's own lines from the one that begins so to the one that begins so,
    run -> the names that they define."""
    code = begins + README.split("\n" + begins)[1].split("\n" + ends)[0]
    names = {"torch": torch, "projector_dtype": litereason.projector_dtype}
    exec(code.replace("memory_size=256", "memory_size=24"), names)
    return names


GRU = shown("class GRU", "PROJECTORS")["GRU"]


@pytest.fixture
def gru(tok, monkeypatch):
    """A model with that latent step, at a size where it matters."""
    monkeypatch.setitem(PROJECTORS, "gru", GRU)
    model = attach(random_qwen2(len(tok) + 3, tok.eos_token_id))
    torch.manual_seed(0)
    start_projector(model, "gru")
    with torch.no_grad():
        for p in model.reasoning_projector.parameters():
            p.normal_(0.0, 0.4)
    return model


@pytest.mark.parametrize("rows", [1, 4, 512])
def test_a_recurrent_projector_decodes_as_the_definition_does_in_any_batch(gru, tok, rows):
    fast = write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2, rows=rows)
    with scripted(tok, TEXTS, LIMIT) as draws:
        slow = [naive_generate(gru, tok, tok.encode(PROMPTS[i // 2]), u) for i, u in enumerate(draws)]
    for a, b in zip(fast, slow, strict=True):
        assert a.slots == b.slots and a.text == b.text
        close(a.latents, b.latents)
        close(a.logprobs, b.logprobs)


def test_under_bf16_compute_it_keeps_its_own_precision(gru, tok):
    """As on CUDA; there the GRU's cell would otherwise compute in bf16,
    which its fp32 memory does not fit."""
    gru = gru.float()
    gru.bf16 = True
    seen = []
    gru.reasoning_projector.register_forward_hook(lambda module, given, made: seen.append(made[1].dtype))
    rollouts = write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2)
    unroll(gru, rollouts)
    assert set(seen) == {torch.float32} and sum(r.n_latents for r in rollouts) == 25


def test_its_memory_goes_from_latent_to_latent_and_not_from_block_to_block(gru, tok):
    r = write(gru, tok, ["abc"], TEXTS[:1])[0]
    h = naive(gru, r.prompt_ids, r.slots)[0]  # (S, D)
    starts = [i for i, s in enumerate(r.slots) if s == LATENT and r.slots[i - 1] != LATENT]
    assert len(starts) == 2
    blocks = [r.latents[:3], r.latents[3:]]
    for start, block in zip(starts, blocks):
        memory = None
        for k, z in enumerate(block):
            without, _ = gru.reasoning_projector(h[None, start + k])
            expected, memory = gru.reasoning_projector(h[None, start + k], memory)
            close(z, expected[0])
            assert k == 0 or (z - without[0]).abs().max() > 1e-3, "the memory does nothing"


@pytest.mark.parametrize("waits", [(), ("cpu",)])
def test_rows_that_need_not_project_do_not_disturb_it(gru, tok, waits, monkeypatch):
    """As on CUDA, where the projector also runs on rows outside a block."""
    plain = write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2)
    place = {u: slot
             for r, line in zip(plain, torch.rand(8, LIMIT, generator=torch.Generator().manual_seed(0),
                                                  dtype=torch.float64).tolist())
             for u, slot in zip(line, r.slots + [0] * LIMIT)}

    def sample(logits, u, *_):
        token = torch.tensor([max(0, place[x]) for x in u.tolist()])
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]

    monkeypatch.setattr(litereason.engine, "WAITS", waits)
    monkeypatch.setattr(litereason, "sample", sample)
    again = generate(gru, tok, PROMPTS, 2, LIMIT, generator=torch.Generator().manual_seed(0))
    for a, b in zip(again, plain, strict=True):
        assert a.slots == b.slots
        close(a.latents, b.latents)


def test_the_latent_roll_out_and_all_its_gradients_are_the_definitions(gru, tok):
    rollouts = write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2)
    h, latents = unroll(gru, rollouts)
    fast = slow = 0
    for i, r in enumerate(rollouts):
        slow_h, slow_latents, _ = naive(gru, r.prompt_ids, r.slots)
        close(h[i, : len(r.slots)], slow_h)
        close(latents[i], slow_latents)
        close(latents[i], r.latents)
        if i in (0, 2):
            fast = fast + some_number(h[i, : len(r.slots)], latents[i], i)
            slow = slow + some_number(slow_h, slow_latents, i)
    close_gradients(gradients(gru, fast), gradients(gru, slow))


def test_scoring_replays_its_latents_and_the_policy_gradient_never_reaches_it(gru, tok):
    rollouts = write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2)
    for rows in (rollouts, recompute_latents(gru, rollouts)):
        logp, _ = logprobs(gru, rows)
        for row, r in zip(logp, rollouts):
            close(row[: len(r.slots)], r.logprobs)
    assert gradients(gru, logp.sum(), "projector") == {}
    loss, _ = projector_loss(gru, rollouts)
    assert all(g.abs().max() > 0 for g in gradients(gru, loss, "projector").values())


def test_with_targets_it_hands_its_memory_on_within_a_block_too(gru, tok):
    """Fed with what the sampler made, it makes that again, and its gradients are the definition's."""
    rollouts = write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2)

    def outputs():
        h, slots, valid = states(gru, rollouts)
        return h, valid & (slots == LATENT)

    fast = targets.projected(gru, *outputs())
    close(fast, torch.cat([r.latents for r in rollouts]))
    slow = []
    memory = None
    for of_row, marked in zip(*outputs()):
        for s, is_latent in enumerate(marked.tolist()):
            if not is_latent:
                memory = None
                continue
            z, memory = gru.reasoning_projector(of_row[s : s + 1], memory)
            slow.append(z)
        memory = None
    weights = torch.randn(fast.shape, dtype=fast.dtype, generator=torch.Generator().manual_seed(0))
    close_gradients(gradients(gru, (fast * weights).sum()), gradients(gru, (torch.cat(slow) * weights).sum()))


def test_its_cost_its_start_and_its_file_need_nothing_more(gru, tok, tmp_path):
    rollouts = write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2)
    cell, out = gru.reasoning_projector.cell, gru.reasoning_projector.out
    per_latent = 2 * (cell.weight_ih.numel() + cell.weight_hh.numel() + out.weight.numel())
    assert matrix_flops(gru.reasoning_projector) == per_latent
    latents = sum(r.n_latents for r in rollouts) / len(rollouts)
    assert flops(gru, rollouts, 2) - flops(gru, rollouts, 2, "zeros") == latents * per_latent
    for name in ("warm", "noise"):  # the controls of eval.py
        write(gru, tok, PROMPTS, TEXTS, LIMIT, samples=2, latent=latent_of(name, gru))
    gru.projector_trained = True
    save(gru, tok, str(tmp_path / "m"))
    again, _ = load(str(tmp_path / "m"), "cpu", torch.float64)
    assert type(again.reasoning_projector) is GRU and again.projector_trained
    for a, b in zip(again.reasoning_projector.parameters(), gru.reasoning_projector.parameters(),
                    strict=True):
        close(a, b)
    del PROJECTORS["gru"]
    with pytest.raises(UserError, match="litereason_projector is 'gru', expected one of mlp, normed, pause"):
        load(str(tmp_path / "m"), "cpu")
    PROJECTORS["gru"] = GRU


SIZES = ("--device", "cpu", "--n", 2, "--val", 2, "--train-prompts", 4, "--prompts", 2, "--num-generations", 4,
         "--max-new-tokens", 120, "--projector-steps", 2, "--trace-prompts", 12, "--show-every", 0)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *map(str, words)])
    train_rl.main()


def test_all_stages_train_it_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(PROJECTORS, "gru", GRU)
    run(monkeypatch, *SIZES, "--projector", "gru", "--steps", 2, "--out", tmp_path)
    assert json.load(open(tmp_path / "model" / "config.json"))["litereason_projector"] == "gru"
    run(monkeypatch, "--resume", tmp_path, "--steps", 3)
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [m["step"] for m in lines] == [1, 2, 3] and all(m["max_dlogp"] < 1e-3 for m in lines)


# ---------------------------------------------------------------- an RL rule: one function and its name
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
TOKENS = torch.tensor([[3, 5, 2, 4], [1, 1, 2, 10]])


def test_rloo_compares_each_rollout_with_the_mean_of_the_others():
    advantages, divisors = RULES["rloo"](REWARDS, TOKENS, 40)
    close(advantages, torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [-4.0, -4 / 3, 4 / 3, 4.0]]), 1e-6)
    # a whole rollout is one action: its tokens' log-probs are summed
    assert divisors.tolist() == [[1] * 4] * 2
    rloo = shown("def rloo", "RULES")["rloo"](REWARDS, TOKENS, 40)
    assert all(torch.equal(a, b) for a, b in zip(rloo, (advantages, divisors)))


def test_dr_grpo_divides_neither_by_the_deviation_nor_by_a_rollouts_own_length():
    advantages, divisors = RULES["dr-grpo"](REWARDS, TOKENS, 40)
    close(advantages, torch.tensor([[0.75, -0.25, -0.25, -0.25], [-3.0, -1.0, 1.0, 3.0]]), 1e-6)
    assert divisors.tolist() == [[40] * 4] * 2


def test_the_papers_rule_is_the_loss_without_any(model, rollouts):
    advantages, divisors = RULES["grpo"](
        REWARDS, torch.tensor([[r.n_tokens for r in rollouts]]).view(2, 4), LIMIT)
    logp, scored = logprobs(model, rollouts)
    plain = policy_loss(logp, logp.detach(), advantages.flatten().double(), scored, 8)[0]
    close(policy_loss(logp, logp.detach(), advantages.flatten().double(), scored, 8,
                      divisors=divisors.flatten())[0], plain)


@pytest.mark.parametrize("rule", ["rloo", "dr-grpo"])
def test_the_gradient_of_a_rule_is_that_of_its_formula(model, rollouts, rule):
    """On the first update: the sum of advantage * d log p(token) / divisor, over tokens and rollouts."""
    tokens = torch.tensor([r.n_tokens for r in rollouts]).view(2, 4)
    advantages, divisors = (x.flatten().double() for x in RULES[rule](REWARDS, tokens, LIMIT))
    logp, scored = logprobs(model, rollouts)
    loss, _ = policy_loss(logp, logp.detach(), advantages, scored, 8, divisors=divisors)
    by_rule = gradients(model, loss)
    by_hand = -(logprobs(model, rollouts)[0].sum(1) * advantages / divisors).sum() / 8
    close_gradients(by_rule, gradients(model, by_hand))


def test_a_rule_of_ones_own_is_found_by_its_name(tmp_path, monkeypatch):
    seen = []

    def only_the_best(rewards, tokens, limit):
        seen.append((tuple(rewards.shape), limit))
        best = rewards == rewards.amax(1, keepdim=True)
        return best.float(), tokens

    monkeypatch.setitem(RULES, "best", only_the_best)
    for rule in ("best", "rloo", "dr-grpo"):
        run(monkeypatch, *SIZES, "--method", "tag", "--rule", rule, "--steps", 1, "--n", 0, "--val", 0,
            "--out", tmp_path / rule)
        m = json.loads(open(tmp_path / rule / "metrics.jsonl").readline())
        assert m["grad_norm"] is not None and json.load(open(tmp_path / rule / "config.json"))["rule"] == rule
    assert seen == [((2, 4), 120)]


# ---------------------------------------------------------------- a task: one folder, three functions
def test_a_task_of_ones_own_needs_three_functions(tmp_path, monkeypatch):
    """Count the words: a task as a folder under data/ would be."""
    task = types.ModuleType("data.length")
    task.examples = lambda split: [{"story": f"from Karl {taker} has it ."}
                                   for taker in ("Mara", "Otto", "Lena", "Ivan")]
    task.prompt = lambda example, latent: example["story"] + " answer :"
    task.reward = lambda example, completion: float(len(completion.split()) < 40)
    monkeypatch.setitem(sys.modules, "data.length", task)
    monkeypatch.setattr(data, "length", task, raising=False)
    run(monkeypatch, *SIZES, "--task", "length", "--method", "tag", "--steps", 1, "--out", tmp_path)
    assert len(json.load(open(tmp_path / "results.json"))) == 3
