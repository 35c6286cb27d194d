"""The CUDA paths of all scripts on a pretended CUDA device (tests/pretend): what a GPU would refuse, where
the host would wait for it (test_memory.py: how much would be in its memory). The numbers are real, bf16
rounding included; CUDA's kernels and speed are not.

Functions named on_the_card_.. run in a process of their own that has the device; the tests look at what
they return. They import what they need themselves: here, in pytest's process, torch has no such device."""
import functools
import importlib
import json
import shutil
import sys
import types
import zlib

import pytest
from test_resume import metrics, same_weights

import pretend


@pytest.fixture(scope="module", autouse=True)
def the_device():
    if pretend.why_not():
        pytest.skip(pretend.why_not())


# ---------------------------------------------------------------- the device itself
def on_the_card_refusals():
    """-> a copy to the host before and after waiting for it"""
    import torch

    x, ids = torch.ones(2, 3, device="cuda"), torch.arange(3, device="cuda")
    for refused in (lambda: x + torch.ones(2, 3), lambda: torch.ones(3)[ids],
                    lambda: x.numpy(), lambda: torch.rand(2, device="cuda", generator=torch.Generator())):
        with pytest.raises((RuntimeError, TypeError)):
            refused()
    buffer = torch.empty(3, pin_memory=True)
    buffer.copy_(ids * 2, non_blocking=True)
    before = buffer.tolist()
    torch.cuda.synchronize()
    return before, buffer.tolist()


def test_the_device_refuses_what_cuda_refuses_and_a_copy_comes_only_when_waited_for():
    """Mixed devices, numpy, draws from a CPU generator."""
    (before, numbers), _ = pretend.run(on_the_card_refusals)
    assert before != numbers == [0.0, 2.0, 4.0]


# ---------------------------------------------------------------- host syncs
def tiny_on_the_card():
    """-> (model, sample(limit, ..): two rollouts of each of four prompts, always the same)"""
    import torch
    from data import tiny
    from litereason import generate, load

    model, tokenizer = load("tiny")
    prompts = [tokenizer.encode(tiny.prompt(example, True)) for example in tiny.examples("test")[:4]]
    return model, lambda limit, **settings: generate(
        model, tokenizer, prompts, 2, limit, generator=torch.Generator().manual_seed(0), **settings)


VARIANTS = {
    "prompts that wait": {"gen_batch_size": 4},
    "greedy, every tag runs 3": {"temperature": 0, "tag": 3},
    "cut, no tags": {"top_p": 0.8, "top_k": 20, "tag": "forbidden"}}


def on_the_card_decode():
    """-> for each variant of generate's arguments: how many latents ran, and of each step after the first
    where the host waited since the step before, [(place, why)]."""
    from pretend import device

    model, sample = tiny_on_the_card()
    waited, found = [], {}

    def a_step_begins(*_):
        waited.append(list(device.EVENTS))
        device.EVENTS.clear()

    model.lm_head.register_forward_pre_hook(a_step_begins)  # on CUDA it runs once in each step, for all rows
    for name, settings in VARIANTS.items():
        waited.clear()
        rollouts = sample(24, **settings)
        found[name] = sum(r.n_latents for r in rollouts), waited[1:]
    return found


def test_between_two_looks_the_host_waits_for_nothing():
    from lib.decoder import LOOK

    found, _ = pretend.run(on_the_card_decode)
    for name, (n_latents, waited) in found.items():
        assert len(waited) >= 2 * LOOK and (n_latents > 0 or name == "cut, no tags"), name
        for step, events in enumerate(waited, start=1):
            assert step % LOOK == 0 or not events, f"{name}: in step {step} the host waits at {events}"
        looks = [len(events) for events in waited[LOOK - 1 :: LOOK]]
        assert sorted(looks)[len(looks) // 2] <= 4, f"{name}: one look waits so often: {looks}"


def on_the_card_micro_batch():
    """Updates of one micro-batch: of four rollouts, of eight, of eight and eight shorter ones, of eight with
    offloaded masters -> where the host waited in each, [(place, why)]."""
    import torch
    import train_rl
    from lib import memory
    from pretend import device

    model, sample = tiny_on_the_card()
    args = types.SimpleNamespace(recompute_latents=False, method="litereason", max_new_tokens=1)
    eight, shorter = sample(8), sample(3)

    def update(rollouts):
        advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts) // 2)
        loss_norm = torch.tensor([float(r.n_tokens) for r in rollouts])
        state = types.SimpleNamespace(step=0, rollouts=rollouts, micro_batch_tokens=4000)
        device.EVENTS.clear()
        train_rl.add_gradients(args, model, state, range(len(rollouts)), advantages, loss_norm)
        return list(device.EVENTS)

    found = [update(rollouts) for rollouts in (eight[2:6], eight, eight + shorter)]
    memory.offload(model, memory.base_parameters(model))
    return [*found, update(eight)]


def test_a_micro_batch_waits_as_often_however_many_rollouts_it_has():
    (four, eight, two_lengths, offloaded), _ = pretend.run(on_the_card_micro_batch)
    assert len(eight) == len(four) <= 28, eight
    assert len(two_lengths) <= len(eight) + 12, two_lengths  # rows of like lengths: once
    assert len(offloaded) == len(eight) + 1, offloaded  # for the gradients to be on the host


# ---------------------------------------------------------------- the scripts
def on_the_card_script(words):
    """A script's main; every answer earns something, and a baseline's traces are there already."""
    from data import tiny
    from lib import run
    from results import baselines

    def traces(model, tokenizer, task, examples, args):
        said = "from Mara Otto and from Karl Lena , so Rosa has none of the halves , go on with Otto . " * 2
        return [(task.prompt(example, False), said, r"\boxed{ No }") for example in examples], 0

    tiny.examples = functools.cache(tiny.examples)
    tiny.reward = lambda example, text: 0.5 + zlib.crc32(text.encode()) % 100 / 100
    baselines.own_traces, baselines.CHECKED = traces, 1
    sys.argv = words
    run.run_script(importlib.import_module(words[0].removesuffix(".py").replace("/", ".")).main)


def script(*words):
    """-> what it printed"""
    return pretend.run(on_the_card_script, [str(word) for word in words])[1]


SIZES = ("--steps", 2, "--prompts", 2, "--num-generations", 4, "--minibatches", 2, "--train-prompts", 2,
         "--projector-steps", 1, "--val", 0, "--n", 0, "--save-every", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all stages, with targets and all that saves memory."""
    out = tmp_path_factory.mktemp("pretend") / "run"
    script("train_rl.py", *SIZES, "--offload", "--checkpoint-layers", "--trace-prompts", 8,
           "--max-new-tokens", 110, "--out", out)
    return out


def test_a_run_learns_on_the_card_and_its_resume_is_the_run(trained, tmp_path):
    steps = metrics(trained)
    assert steps[-1]["refresh_loss"] > 0 and all(step["anchor_loss"] > 0 for step in steps)
    assert all(step["grad_norm"] > 0 and step["latent_steps"] > 0 for step in steps)
    assert steps[0]["max_dlogp"] < 2.0  # train_rl.DLOGP
    # As the run was after its first step, continued.
    shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "copy" / "state-2.pt").unlink()
    assert "resumed from" in script("train_rl.py", "--resume", tmp_path / "copy")
    assert metrics(tmp_path / "copy") == steps and same_weights(trained, tmp_path / "copy")


def test_the_papers_recipe_learns_too(tmp_path):
    script("train_rl.py", *SIZES, "--smoke", "--targets", "none", "--recompute-latents", "--trace-prompts", 4,
           "--max-new-tokens", 14, "--out", tmp_path)
    assert all(step["grad_norm"] > 0 for step in metrics(tmp_path))


def test_controls_and_answers_shown(trained, tmp_path):
    words = ("eval.py", "--model", trained, "--max-new-tokens", 10, "--out", tmp_path / "table", "--n", 1)
    script(*words, "--controls")
    assert len(json.loads((tmp_path / "table" / "results.json").read_text())) > 12
    assert ">>>" in script(*words, "--show", 1)


@pytest.mark.parametrize("method", ["moi", "coconut", "colar", "answer"])
def test_a_baseline(method, tmp_path):
    script("results/baselines.py", "--method", method, "--n", 1, "--steps", 1, "--stories", 2, "--stages", 1,
           "--epochs", 1, "--last-stage", 1, "--prompts", 1, "--num-generations", 4, "--r", 2,
           "--most-latents", 8, "--max-new-tokens", 12, "--out", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    on_test = [row["model"] for row in rows if row["split"] == "test"]
    assert on_test[-2] == method  # the last is at temperature 1
