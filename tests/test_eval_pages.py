"""What eval.py counts and draws: FLOPs against torch's own counter, the curves, and the page on which answers are read."""
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import PROMPTS, TEXTS, write
from test_scripts import ROOT, script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import litereason
from eval import evaluate, flops
from litereason import OPEN, UserError

TASK = types.SimpleNamespace(prompt=lambda e, latent: e, reward=lambda e, text: float(len(text) % 2))


# ---------------------------------------------------------------- what an answer costs
def test_flops_are_those_that_torch_counts(model, tok):
    """Exactly, with prompts of one length and rows that all run to the limit (nothing wasted), once the one difference in convention is
    taken off: torch counts the prompts' causal attention as the full square."""
    model = model.float()
    prompts, limit = [tok.encode("the story of Karl"), tok.encode("a story of Otto !")], 30
    assert len(prompts[0]) == len(prompts[1]) > 10
    texts = [f"ab{OPEN}3</implicit_thought>c", "no tag", f"{OPEN}5</implicit_thought>", f"{OPEN}1</implicit_thought>{OPEN}2</implicit_thought>"]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is not in torch's books
        got = write(model, tok, prompts, texts, limit, samples=2)
    assert [r.n_latents for r in got] == [3, 0, 5, 3] and all(len(r.slots) == limit for r in got)
    L, config = len(prompts[0]), model.config
    square = 2 * config.num_hidden_layers * config.hidden_size * (L * L - L)  # what lies above the diagonal; H * d = D here
    ours = 4 * flops(model, got, samples=2) + 2 * square
    assert counter.get_total_flops() == ours


def test_a_latent_costs_the_projector_unless_its_function_says_something_else(rollouts, model):
    one, latents = sum(2 * p.numel() for p in model.reasoning_projector.parameters()), sum(r.n_latents for r in rollouts) / len(rollouts)
    own = lambda h, u, k: h
    own.flops = 1000
    base = flops(model, rollouts, 2, "zeros")
    assert [flops(model, rollouts, 2, z) - base for z in ("projector", "none", own, lambda h, u, k: h)] == [latents * one, 0, latents * 1000, latents * one]
    feed = lambda h, token: h
    feed.flops = 10
    assert flops(model, rollouts, 2, "zeros", feed) - base == 10 * sum(r.n_tokens for r in rollouts) / len(rollouts)


def test_costs_stand_in_the_result_before_the_tasks_own_figures(model, tok):
    task = types.SimpleNamespace(report=lambda asked, texts: {"own": 1.0}, **vars(TASK))
    r, rollouts = evaluate(model, tok, task, PROMPTS, max_new_tokens=12, alone=2)
    assert r["flops"] == flops(model, rollouts) and r["seconds_each"] == r["seconds"] / 4 and r["seconds_alone"] > 0
    assert list(r)[-2:] == ["seconds", "own"]  # `table` reads what comes after the seconds as the task's own
    assert "seconds_alone" not in evaluate(model, tok, TASK, PROMPTS, max_new_tokens=12)[0]
