"""The CUDA paths of all scripts on a pretended CUDA device (tests/pretend): what a GPU would refuse, where the host would wait for it,
how much would be in its memory. The numbers are real, bf16 rounding included; CUDA's own kernels and its speed are not there.

Functions named on_the_card_.. run in a process of their own that has the device; the tests look at what they return. Before and after
some of them torch has no such device, so they import what they need themselves."""
import collections
import json
import os
import shutil

import pytest

import pretend


@pytest.fixture(scope="module", autouse=True)
def the_device():
    if pretend.why_not():
        pytest.skip(pretend.why_not())


# ---------------------------------------------------------------- the device itself
def on_the_card_refusals():
    """-> {what is tried: the error it ends in, or None}"""
    import torch
    from pretend import device

    x = torch.ones(2, 3, device="cuda")
    ids = torch.arange(3, device="cuda")
    graph = torch.cuda.CUDAGraph()

    def read_while_recording():
        with torch.cuda.graph(graph):
            x.sum().item()

    tried = {
        "a sum with a CPU tensor": lambda: x + torch.ones(2, 3),
        "a sum with a number": lambda: x + torch.tensor(1.0),
        "a CPU tensor indexed from the card": lambda: torch.ones(3)[ids],
        "a product of integers": lambda: ids[None] @ ids[:, None],
        "a product of two types": lambda: x @ x.T.bfloat16(),
        "draws from a CPU generator": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        "numpy": lambda: x.numpy(),
        "a number read while a graph is recorded": read_while_recording}
    ends = {}
    for name, action in tried.items():
        try:
            action()
            ends[name] = None
        except (RuntimeError, TypeError) as e:
            ends[name] = str(e)

    # A graph computes again, on what stands in its memory then.
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        doubled = (x * 2).T
    x.fill_(5.0)
    graph.replay()
    device.EVENTS.clear()
    return ends, doubled.tolist(), device.EVENTS


def test_the_device_refuses_what_cuda_refuses_and_sees_where_the_host_waits():
    (ends, doubled, events), _ = pretend.run(on_the_card_refusals)
    assert [name for name, error in ends.items() if error is None] == ["a sum with a number"], ends
    assert "same device" in ends["a sum with a CPU tensor"] and "generator" in ends["draws from a CPU generator"]
    assert doubled == [[10.0, 10.0]] * 3
    assert [why for _, why in events] == ["copy from the card"]


# ---------------------------------------------------------------- memory
def on_the_card_count_a_product():
    import torch
    from pretend import memory

    memory.without_numbers()
    weight = torch.zeros(2**15, 2**15, device="cuda", requires_grad=True)  # 4 GiB

    def forward_and_backward():
        x = torch.zeros(2**10, 2**15, device="cuda")  # 128 MiB, and so is the product
        (x @ weight).sum().backward()

    return memory.peak(forward_and_backward)


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    counted, _ = pretend.run(on_the_card_count_a_product)
    assert counted["before"] == 2**32
    above = counted["peak"] - counted["before"]
    assert 2**32 + 2**27 <= above <= 2**32 + 2**27 + 2**12, "the weight's gradient and x; the product is gone by then"


def on_the_card_out_of_memory():
    """Sampling and the update on a card that is too small for all at once -> what is to be equal, with and without."""
    import torch
    import train_rl
    from pretend.device import BYTES

    model, tokenizer, prompts = tiny_on_the_card()

    def sample():
        BYTES.reset_peak()
        return sampled(model, tokenizer, prompts, 8, rows=8)

    def update(rollouts, tokens_per_forward):
        BYTES.reset_peak()
        args, state = update_arguments(tokens_per_forward), FakeState(rollouts)
        train_rl.add_gradients_with_one_retry(args, 0, model, state, *what_to_score(rollouts))
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        model.zero_grad(set_to_none=True)
        return args.tokens_per_forward, norm

    all_at_once = sample()
    peak = BYTES.peak
    update(all_at_once, 800)
    BYTES.total = peak - 4096
    halved = sample()
    BYTES.total = 2**40
    enough, norm = update(all_at_once, 800)
    BYTES.total = BYTES.peak - 4096
    less, same_norm = update(all_at_once, 800)
    return [[r.slots for r in some] for some in (all_at_once, halved)], (enough, norm), (less, same_norm)


def test_out_of_memory_is_caught_once_and_changes_no_result():
    (slots, (enough, norm), (less, same_norm)), printed = pretend.run(on_the_card_out_of_memory)
    assert "out of memory with" in printed and slots[0] == slots[1]
    assert (enough, less) == (800, 400) and same_norm == pytest.approx(norm, rel=0.01)


# ---------------------------------------------------------------- what several of them need
def tiny_on_the_card():
    from data import tiny
    from litereason import load

    model, tokenizer = load("tiny")
    prompts = [tokenizer.encode(tiny.prompt(example, True)) for example in tiny.examples("test")[:4]]
    return model, tokenizer, prompts


def sampled(model, tokenizer, prompts, limit, **settings):
    """Two rollouts of each prompt, always the same."""
    import torch
    from litereason import generate

    return generate(model, tokenizer, prompts, 2, limit, generator=torch.Generator().manual_seed(0), **settings)


def update_arguments(tokens_per_forward):
    import argparse

    return argparse.Namespace(tokens_per_forward=tokens_per_forward, recompute_latents=False, method="litereason",
                              clip=0.2)


class FakeState:
    """What an update needs of runs.State."""

    def __init__(self, rollouts):
        self.rollouts = rollouts
        self.carried = {}


def what_to_score(rollouts):
    """All of them, every second one rewarded: (chosen, advantages, divisors)."""
    import torch

    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts) // 2)
    divisors = torch.tensor([float(r.n_tokens) for r in rollouts])
    return range(len(rollouts)), advantages, divisors


# ---------------------------------------------------------------- host syncs
VARIANTS = {
    "prompts that wait": {"rows": 4},
    "greedy, every tag runs 3": {"temperature": 0, "tag": 3},
    "cut, no tags": {"top_p": 0.8, "top_k": 20, "tag": "forbidden"},
    "another latent": {"latent": "zeros"}}


def on_the_card_decode(variants, limit):
    """-> for each variant of generate's arguments: how many latents ran, and of each step after the first where the host waited since
    the step before, [(place, why)]."""
    from pretend import device

    model, tokenizer, prompts = tiny_on_the_card()
    waited = []

    def a_step_begins(*_):
        waited.append(list(device.EVENTS))
        device.EVENTS.clear()

    model.lm_head.register_forward_pre_hook(a_step_begins)  # on CUDA it runs once in each step, for all rows
    found = {}
    for name, settings in variants.items():
        waited.clear()
        rollouts = sampled(model, tokenizer, prompts, limit, **settings)
        found[name] = sum(r.n_latents for r in rollouts), waited[1:]
    return found


def test_between_two_looks_the_host_waits_for_nothing():
    from engine import LOOK

    found, _ = pretend.run(on_the_card_decode, VARIANTS, 24)
    for name, (n_latents, waited) in found.items():
        assert len(waited) >= 23 and (n_latents > 0 or name == "cut, no tags"), name
        for step, events in enumerate(waited, start=1):
            is_look = step % LOOK == 0
            assert is_look or not events, f"{name}: in step {step} the host waits at {events}"
        looks = [len(events) for events in waited[LOOK - 1 :: LOOK]]
        assert sorted(looks)[len(looks) // 2] <= 4, f"{name}: one look waits so often: {looks}"


def on_the_card_update():
    """-> where the host waited in one update of several micro-batches, and how many there were."""
    import engine
    import train_rl
    from pretend import device

    model, tokenizer, prompts = tiny_on_the_card()
    rollouts = sampled(model, tokenizer, prompts, 16)
    args = update_arguments(200)
    n = len(engine.pack(rollouts, args.tokens_per_forward))
    device.EVENTS.clear()
    gap, _ = train_rl.add_gradients(args, model, rollouts, *what_to_score(rollouts))
    return n, list(device.EVENTS), gap, model.bf16


# Where the host may wait in a micro-batch, and how often: (file, function, why).
IN_A_MICRO_BATCH = {
    ("engine.py", "prefill", "copy to the card"): 2,  # prompts and their lengths
    ("engine.py", "slot_table", "copy to the card"): 2,
    ("engine.py", "__init__", "copy to the card"): 2,  # Batch: whose row, and the way back
    ("engine.py", "__init__", "bincount"): 1,  # Groups: how many rows a prompt has
    ("engine.py", "__init__", "copy from the card"): 1,
    ("engine.py", "pad_mask", "_local_scalar_dense"): 1,  # are all prompts as long?
    ("litereason.py", "states", "copy to the card"): 1,  # the latents
    ("litereason.py", "logprobs", "index by a mask"): 2,  # states and tokens that are scored
    ("backward", "index by a mask"): 1,
    ("train_rl.py", "add_gradients", "copy to the card"): 3,  # old log-probs, advantages, divisors
    ("train_rl.py", "add_gradients", "_local_scalar_dense"): 3}  # the gap: is it larger, how large, whose is it


def test_a_micro_batch_waits_only_where_it_must():
    (n, events, gap, is_bf16), _ = pretend.run(on_the_card_update)
    assert n >= 2 and is_bf16
    waited = collections.Counter()
    for place, why in events:
        file, _, function = place.partition(" in ")
        waited[(file.split(":")[0], function, why) if function else (place, why)] += 1
    for place, times in waited.items():
        assert times <= n * IN_A_MICRO_BATCH.get(place, 0), f"{place}: the host waits {times} times in {n} micro-batches"
    from report import DLOGP

    assert 0 < gap < DLOGP[True]
