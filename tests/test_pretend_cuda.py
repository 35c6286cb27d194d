"""The CUDA paths of all scripts on a pretended CUDA device (tests/pretend): what a GPU would refuse, where
the host would wait for it, how much would be in its memory. The numbers are real, bf16 rounding included;
CUDA's kernels and speed are not.

Functions named on_the_card_.. run in a process of their own that has the device; the tests look at what
they return. They import what they need themselves: here, in pytest's process, torch has no such device."""
import json
import os
import shutil
import types

import pytest

import pretend


@pytest.fixture(scope="module", autouse=True)
def the_device():
    if pretend.why_not():
        pytest.skip(pretend.why_not())


# ---------------------------------------------------------------- the device itself
def on_the_card_refusals():
    """-> what it says to each of some actions, and a copy to the host before and after waiting for it."""
    import torch

    x = torch.ones(2, 3, device="cuda")
    ids = torch.arange(3, device="cuda")
    tried = [lambda: x + torch.ones(2, 3), lambda: torch.ones(3)[ids], lambda: ids[None] @ ids[:, None],
             lambda: x @ x.T.bfloat16(), lambda: x.numpy(),
             lambda: torch.rand(2, device="cuda", generator=torch.Generator())]
    refusals = []
    for action in tried:
        with pytest.raises((RuntimeError, TypeError)) as refusal:
            action()
        refusals.append(str(refusal.value))
    buffer = torch.empty(3, pin_memory=True)
    buffer.copy_(torch.arange(3.0, device="cuda") * 2, non_blocking=True)
    before = buffer.tolist()
    torch.cuda.synchronize()
    return refusals, before, buffer.tolist()


def test_the_device_refuses_what_cuda_refuses_and_a_copy_comes_only_when_waited_for():
    """Mixed devices, products of integers or of two types, numpy, draws from a CPU generator."""
    (refusals, before, numbers), _ = pretend.run(on_the_card_refusals)
    assert "same device" in refusals[0] and "generator" in refusals[-1]
    assert before != numbers == [0.0, 2.0, 4.0]


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

    return generate(model, tokenizer, prompts, 2, limit, generator=torch.Generator().manual_seed(0),
                    **settings)


# ---------------------------------------------------------------- memory
def on_the_card_out_of_memory():
    """The slots sampled with room enough, and with room for half of the rows."""
    from pretend import memory
    from pretend.device import BYTES

    model, tokenizer, prompts = tiny_on_the_card()

    def sample(rows):
        return [r.slots for r in sampled(model, tokenizer, prompts, 8, gen_batch_size=rows)]

    slots = sample(8)
    peaks = [memory.peak(lambda: sample(rows))[1] for rows in (8, 4)]
    BYTES.total = sum(peaks) // 2
    return slots, sample(8)


def test_out_of_memory_is_caught_and_changes_no_result():
    (slots, same_slots), printed = pretend.run(on_the_card_out_of_memory)
    assert "out of memory with 8 rows" in printed and slots == same_slots


# ---------------------------------------------------------------- host syncs
VARIANTS = {
    "prompts that wait": {"gen_batch_size": 4},
    "greedy, every tag runs 3": {"temperature": 0, "tag": 3},
    "cut, no tags": {"top_p": 0.8, "top_k": 20, "tag": "forbidden"}}


def on_the_card_decode(variants, limit):
    """-> for each variant of generate's arguments: how many latents ran, and of each step after the first
    where the host waited since the step before, [(place, why)]."""
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
    from lib.decoder import LOOK

    found, _ = pretend.run(on_the_card_decode, VARIANTS, 24)
    for name, (n_latents, waited) in found.items():
        assert len(waited) >= 2 * LOOK and (n_latents > 0 or name == "cut, no tags"), name
        for step, events in enumerate(waited, start=1):
            is_look = step % LOOK == 0
            assert is_look or not events, f"{name}: in step {step} the host waits at {events}"
        looks = [len(events) for events in waited[LOOK - 1 :: LOOK]]
        assert sorted(looks)[len(looks) // 2] <= 4, f"{name}: one look waits so often: {looks}"


def on_the_card_micro_batch():
    """Updates of one micro-batch: of two rollouts, of eight, and with offloaded masters -> where the host
    waited in each, [(place, why)]."""
    import torch
    import train_rl
    from lib import memory
    from pretend import device

    model, tokenizer, prompts = tiny_on_the_card()
    args = types.SimpleNamespace(recompute_latents=False, method="litereason", max_new_tokens=1)
    rollouts = sampled(model, tokenizer, prompts, 16)

    def update(rollouts):
        advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts) // 2)
        loss_norm = torch.tensor([float(r.n_tokens) for r in rollouts])
        state = types.SimpleNamespace(step=0, rollouts=rollouts, micro_batch_tokens=4000)
        device.EVENTS.clear()
        train_rl.add_gradients(args, model, state, range(len(rollouts)), advantages, loss_norm)
        return list(device.EVENTS)

    found = [update(rollouts[:2]), update(rollouts)]
    memory.offload(model, memory.base_parameters(model))
    return [*found, update(rollouts)]


def test_a_micro_batch_waits_as_often_however_many_rollouts_it_has():
    (two, eight, offloaded), _ = pretend.run(on_the_card_micro_batch)
    assert len(eight) == len(two) <= 20, eight
    assert len(offloaded) == len(eight) + 1, offloaded  # for the gradients to be on the host


# ---------------------------------------------------------------- the scripts
TINY_RUN = ("--prompts", 2, "--num-generations", 4, "--train-prompts", 2, "--minibatches", 2, "--steps", 2,
            "--val", 1, "--n", 0, "--max-new-tokens", 26, "--save-every", 1, "--show-every", 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny model, saved as if its projector were trained, and with traces for the anchor."""
    import litereason
    from data import tiny
    from lib import checkpoint
    from test_tiny import trace_of

    path = str(tmp_path_factory.mktemp("pretend") / "small")
    model, tokenizer = litereason.load("tiny", "cpu")
    model.projector_trained = True
    checkpoint.save(model, tokenizer, path)
    traces = [{"example": i, "prompt": tiny.prompt(example, True), "text": trace_of(example)[0]}
              for i, example in enumerate(tiny.examples("train", 40))]
    with open(os.path.join(path, "traces.jsonl"), "w") as f:
        f.write("{}\n" + json.dumps(traces) + "\n")
    return path


def script(*words):
    """Runs it on the card, where the base's matrix products are in bf16 -> what it printed."""
    printed, products = pretend.script(*words)
    assert products["torch.bfloat16"] > 2 * products.get("torch.float32", 0), products
    return printed


def train(out, *words):
    """train_rl.py on the card -> its metrics."""
    from train_rl import DLOGP

    script("train_rl.py", *TINY_RUN, *words, "--out", out)
    steps = metrics(out)
    assert all(step["max_dlogp"] < DLOGP[True] for step in steps)
    return steps


def metrics(out):
    """Without what a clock says."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in step.items() if name not in ("seconds", "peak_memory_gib")}
            for step in steps]


def results(out):
    return json.loads((out / "results.json").read_text())


def test_stages_1_and_2(tmp_path):
    script("train_projector.py", "--prompts", 8, "--samples", 4, "--steps", 2, "--n", 1,
           "--max-new-tokens", 120, "--out", tmp_path / "run")
    found = results(tmp_path / "run")
    assert found["kept"] > 0 and found["losses"]["trained"] != found["losses"]["start"]


def test_rl_plain_and_with_offloaded_masters_and_layers_computed_again_and_its_resume(small, tmp_path):
    plain = train(tmp_path / "plain", "--model", small)
    assert plain[-1]["refresh_loss"] is not None and all(step["anchor_loss"] > 0 for step in plain)
    assert any(step["latent_steps"] > 0 for step in plain) and any(step["grad_norm"] > 0 for step in plain)
    steps = train(tmp_path / "run", "--model", small, "--offload", "--checkpoint-layers")
    for one, other in zip(steps, plain, strict=True):
        assert one["reward"] == other["reward"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)
    # As the run was after its first step, continued.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "copy" / "state-2.pt").unlink()
    assert "resumed from" in script("train_rl.py", "--resume", tmp_path / "copy")
    assert metrics(tmp_path / "copy") == steps
    weights = [tmp_path / run / "model" / "model.safetensors" for run in ("run", "copy")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("method, words", [
    # Of grpo a rollout that stops early is the shorter one.
    ("grpo", ("--num-generations", 16, "--max-new-tokens", 64, "--overlong-buffer", 44, "--minibatches", 1)),
    ("tag", ("--n", 1)),
    ("litereason", ("--task", "tiny.next_chapter", "--recompute-latents", "--refresh-every", -1))])
def test_rl_in_its_other_forms(method, words, small, tmp_path):
    model = small if method == "litereason" else "tiny"
    step, = train(tmp_path / "run", "--method", method, "--model", model, "--steps", 1, "--val", 0, *words)
    assert step["grad_norm"] > 0 or method != "grpo"
    assert method != "tag" or len(results(tmp_path / "run")) == 3


def test_controls_and_answers_shown(small, tmp_path):
    words = ("eval.py", "--model", small, "--max-new-tokens", 16, "--out", tmp_path / "table", "--n", 1)
    script(*words, "--controls")
    assert len(results(tmp_path / "table")) > 12
    assert ">>>" in script(*words, "--show", 1)


REASONING = ("from Mara Otto and from Karl Lena , so Rosa has none of the halves , "
             "go on with Otto and Lena . ") * 2


def on_the_card_baseline(method, out):
    """results/baselines.py on a few stories, with traces that it need not sample."""
    import sys

    from lib import run
    from results import baselines

    def traces(model, tokenizer, task, examples, args):
        return [(task.prompt(example, False), REASONING, r"\boxed{ No }") for example in examples], 0

    baselines.own_traces = traces
    baselines.CHECKED = 1
    sys.argv = ["results/baselines.py", "--method", method, "--n", "1", "--steps", "1", "--stories", "4",
                "--batch", "4", "--stages", "1", "--epochs", "1", "--last-stage", "1", "--prompts", "1",
                "--num-generations", "4", "--max-new-tokens", "12", "--out", out]
    run.run_script(baselines.main)


@pytest.mark.parametrize("method", ["moi", "coconut", "colar", "answer"])
def test_a_baseline(method, tmp_path):
    pretend.run(on_the_card_baseline, method, str(tmp_path / "run"))
    on_test = [row["model"] for row in results(tmp_path / "run") if row["split"] == "test"]
    assert on_test[-2] == method  # the last is at temperature 1
