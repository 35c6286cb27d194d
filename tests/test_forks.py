"""Each of the three forks that the README shows touches one place: a latent step, an RL rule, a task.

Its own code is run, through decoding, the latent roll-out, scoring and training."""
import json
import os
import re
import sys
import types

import pytest
import torch
from conftest import LIMIT, PROMPTS, ROOT, TEXTS, close, random_qwen2, same, scripted, write
from test_real_tasks import one_line, run
from test_resume import metrics
from test_train import close_gradients, gradients

import data
import train_rl
from eval import flops, latent_of, matrix_flops
from litereason import (PROJECTORS, RULES, attach, group_advantages, load, logprobs, naive_generate,
                        policy_loss, projector_dtype, recompute_latents, save, start_projector)


with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    CODE = re.findall(r"```python\n(.*?)```", f.read(), re.DOTALL)
SHOWN = {"torch": torch, "projector_dtype": projector_dtype}
exec("\n".join(CODE), SHOWN)
Gated, rloo = SHOWN["Gated"], SHOWN["rloo"]


# ---------------------------------------------------------------- a latent step: one class and its name
@pytest.fixture
def gated(tok, monkeypatch):
    """A model with that latent step."""
    monkeypatch.setitem(PROJECTORS, "gated", Gated)
    model = attach(random_qwen2(len(tok) + 3, tok.eos_token_id))
    start_projector(model, "gated")
    return model


def test_it_decodes_and_scores_as_the_definition_does(gated, tok):
    written = write(gated, tok, PROMPTS, TEXTS, LIMIT, samples=2)
    with scripted(tok, TEXTS, LIMIT) as draws:
        slow = [naive_generate(gated, tok, tok.encode(PROMPTS[i // 2]), u) for i, u in enumerate(draws)]
    for fast in (written, recompute_latents(gated, written)):
        logp, _ = logprobs(gated, fast)
        for row, a, b in zip(logp, fast, slow, strict=True):
            same(a, b)
            close(row[: len(b.slots)], b.logprobs)


def test_its_cost_its_controls_and_its_file_need_nothing_more(gated, tok, tmp_path, monkeypatch):
    per_latent = 2 * gated.reasoning_projector.gate.weight.numel()
    assert matrix_flops(gated.reasoning_projector) == per_latent
    for name in ("warm", "noise"):  # the controls of eval.py
        written = write(gated, tok, PROMPTS, TEXTS, LIMIT, samples=2, latent=latent_of(name, gated))
    latents = sum(r.n_latents for r in written) / len(written)
    assert flops(gated, written, 2) - flops(gated, written, 2, "zeros") == latents * per_latent
    gated.projector_trained = True
    save(gated, tok, str(tmp_path / "m"))
    again, _ = load(str(tmp_path / "m"), "cpu", torch.float64)
    assert type(again.reasoning_projector) is Gated and again.projector_trained
    close(again.reasoning_projector.gate.weight, gated.reasoning_projector.gate.weight)
    monkeypatch.delitem(PROJECTORS, "gated")
    one_line("litereason_projector is 'gated', not one of mlp, normed", load, str(tmp_path / "m"), "cpu")


SIZES = ("--device", "cpu", "--n", 0, "--val", 0, "--train-prompts", 4, "--prompts", 2, "--show-every", 0,
         "--num-generations", 4, "--max-new-tokens", 60, "--projector-steps", 2, "--trace-prompts", 24)


def choose(monkeypatch, table, name, value):
    """Lets the flag take a value that was not there when the script was read."""
    default, choices, what = table[name]
    monkeypatch.setitem(table, name, (default, [*choices, value], what))


def test_all_stages_train_it_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(PROJECTORS, "gated", Gated)
    choose(monkeypatch, train_rl.SETTINGS["projector"], "projector", "gated")
    run(train_rl, *SIZES, "--projector", "gated", "--steps", 2, "--out", tmp_path)
    assert json.load(open(tmp_path / "model" / "config.json"))["litereason_projector"] == "gated"
    run(train_rl, "--resume", tmp_path, "--steps", 3)
    lines = metrics(tmp_path)
    assert [m["step"] for m in lines] == [1, 2, 3] and all(m["max_dlogp"] < 1e-3 for m in lines)


# ---------------------------------------------------------------- an RL rule: one function and its name
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])


def test_the_gradient_of_a_rule_of_ones_own_is_that_of_its_formula(model, rollouts):
    """On the first update: the sum of advantage * d log p(token) / loss norm, over tokens and rollouts. The
    paper's rule is the loss without any."""
    tokens = torch.tensor([r.n_tokens for r in rollouts]).view(2, 4)
    assert torch.equal(RULES["grpo"](REWARDS, tokens, LIMIT)[0], group_advantages(REWARDS))
    for rule in (rloo, RULES["grpo"]):
        advantages, loss_norm = (x.flatten().double() for x in rule(REWARDS, tokens, LIMIT))
        logp, scored = logprobs(model, rollouts)
        loss, _ = policy_loss(logp, logp.detach(), advantages, scored, 8, loss_norm=loss_norm)
        if rule is RULES["grpo"]:
            close(loss, policy_loss(logp, logp.detach(), advantages, scored, 8)[0])
        by_rule = gradients(model, loss)
        by_hand = -(logprobs(model, rollouts)[0].sum(1) * advantages / loss_norm).sum() / 8
        close_gradients(by_rule, gradients(model, by_hand))


# ---------------------------------------------------------------- a task: one folder, three functions
def test_a_task_of_ones_own_needs_three_functions_and_a_rule_of_ones_own_is_found_by_its_name(
        tmp_path, monkeypatch):
    """Count the words: a task as a folder under data/ would be."""
    task, seen = types.ModuleType("data.length"), []
    task.examples = lambda split: [{"story": f"from Karl {taker} has it ."}
                                   for taker in ("Mara", "Otto", "Lena", "Ivan")]
    task.prompt = lambda example, latent: example["story"] + " answer :"
    task.reward = lambda example, completion: float(len(completion.split()) < 40)
    monkeypatch.setitem(sys.modules, "data.length", task)
    monkeypatch.setattr(data, "length", task, raising=False)
    monkeypatch.setitem(RULES, "rloo", lambda *of: seen.append((of[0].shape, of[2])) or rloo(*of))
    choose(monkeypatch, train_rl.SETTINGS["update of the base"], "rule", "rloo")
    run(train_rl, *SIZES, "--n", 2, "--task", "length", "--method", "tag", "--rule", "rloo", "--steps", 1,
        "--out", tmp_path)
    assert metrics(tmp_path)[0]["grad_norm"] is not None and seen == [((2, 4), 60)]
    rows = json.load(open(tmp_path / "results.json"))
    assert [row["model"] for row in rows][1:] == ["base, tag prompt", "RL with tags, no latents"]
    assert rows[-1]["latent_steps"] == 0
