"""lib/memory.py: what it expects against a count of all live tensors at the shape of Qwen2.5-1.5B (on a
pretended device, tests/pretend), and its choices on cards of four sizes and on a CPU."""
import itertools
import os
import re
import types

import pretend
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib import checkpoint, memory, scoring
from litereason import ReasoningProjector, Rollout, attach, generate, logprobs

QWEN = {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 32_768, "eos_token_id": 151_643}
GIB = 2.0**30
# The released settings: the longest prompt, slots, prompts per batch, rollouts per prompt.
RELEASED = (1700, 2048, 48, 16)


def plan(model, gib, scorer=None, **given):
    return memory.plan(model, *RELEASED, given, scorer, gib * GIB)


def peaks_in(text):
    return {phase: float(gib) for phase, gib in re.findall(r"(\w+) ([\d.]+) GiB", text)}


# ============================================================ in a process that has the device
def count_everything():
    """-> {what: (GiB counted, GiB expected)} on cards with their plans. One model for all: building it takes
    seconds."""
    from pretend import memory as pretended
    pretended.without_numbers()
    with torch.device("cuda"):
        model = attach(Qwen2ForCausalLM(Qwen2Config(**QWEN)))
    tokenizer = checkpoint.read_checkpoint("tiny", torch.float32)[1]
    base = memory.base_parameters(model)
    L, S, n_prompts, n = RELEASED
    chosen = {gib: plan(model, gib) for gib in (80, 40, 16)}  # on 24 GiB as on 16
    prompts = [[10 + (7 * p + i) % 150_000 for i in range(L)] for p in range(n_prompts)]
    rollouts = [Rollout(ids, list(range(10, 10 + S)), torch.zeros(0, QWEN["hidden_size"]))
                for ids in prompts[:2] for _ in range(n)]
    found = {}

    def sample(rows):
        steps = itertools.count()

        def third_step(*_):  # the first steps need as much as any
            if next(steps) == 2:
                raise InterruptedError

        hook = model.lm_head.register_forward_pre_hook(third_step)
        with pytest.raises(InterruptedError):
            generate(model, tokenizer, prompts, n, S, gen_batch_size=rows)
        hook.remove()

    for gib, (settings, text) in chosen.items():
        if settings["checkpoint_layers"] and not getattr(model, "checkpointed", False):
            memory.checkpoint_layers(model)
        if settings["offload"]:
            memory.offload(model, base)
        adamw = 0 if settings["offload"] else 8 * sum(p.numel() for p in base) / GIB
        peak = pretended.peak(lambda: sample(settings["gen_batch_size"])) / GIB  # noqa: B023
        found[f"{gib} sampling"] = peak + adamw, peaks_in(text)["sampling"]
        if not settings["offload"]:  # the gradients of earlier micro-batches
            for p in base:
                p.grad = torch.zeros_like(p)
        some = [rollouts[i] for i in scoring.pack(rollouts, settings["micro_batch_tokens"])[0]]
        peak = pretended.peak(lambda: logprobs(model, some)[0].sum().backward()) / GIB  # noqa: B023
        found[f"{gib} update"] = peak + adamw, peaks_in(text)["update"]
        model.zero_grad(set_to_none=True)
    return found


def test_on_each_card_the_forecast_is_within_15_percent_of_a_count_of_all_tensors():
    if pretend.why_not():
        pytest.skip(pretend.why_not())
    found, _ = pretend.run(count_everything)
    assert len(found) == 6
    for what, (counted, expected) in found.items():
        assert counted / 1.15 < expected < counted * 1.15, (what, counted, expected)


# ============================================================ the plan
@pytest.fixture(scope="module")
def real():
    """device -> the real model's shapes there, without weights; on a CPU fp32."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN))
    model.reasoning_projector = ReasoningProjector.start(model)
    names = ("config", "model", "reasoning_projector", "parameters", "named_parameters")
    return lambda device: types.SimpleNamespace(**{name: getattr(model, name) for name in names},
                                                bf16=device == "cuda", device=torch.device(device))


@pytest.mark.parametrize("device, gib, offload, checkpoint_layers", [
    ("cuda", 80, False, False), ("cuda", 40, False, True), ("cuda", 24, True, True), ("cuda", 16, True, True),
    ("cpu", 200, False, False), ("cpu", 48, False, True)])
def test_the_plan_fits_without_what_costs_time_where_that_is_not_needed(
        real, device, gib, offload, checkpoint_layers):
    settings, text = plan(real(device), gib)
    rows, positions = settings["gen_batch_size"], settings["micro_batch_tokens"]
    assert (settings["offload"], settings["checkpoint_layers"]) == (offload, checkpoint_layers)
    assert rows >= 16 and rows % 16 == 0 and positions >= 1700 + 2048
    assert max(peaks_in(text).values()) <= memory.USABLE * gib + 0.05 and "may not fit" not in text
    assert f"--gen-batch-size {rows} --micro-batch-tokens {positions}" in text


def test_flags_override_the_plan_and_a_reader_leaves_less_room(real):
    real = real("cuda")
    given = {"gen_batch_size": 32, "micro_batch_tokens": 5000, "offload": False, "checkpoint_layers": True}
    assert plan(real, 80, **given)[0] == given
    alone, beside = (plan(real, 40, scorer)[0]["micro_batch_tokens"] for scorer in (None, real))
    assert beside < alone


def test_a_card_that_is_too_small_is_said_with_what_to_change(real):
    settings, text = plan(real("cuda"), 5)
    assert settings == {"gen_batch_size": 16, "micro_batch_tokens": 3748, "checkpoint_layers": True,
                        "offload": True}
    assert "this may not fit: leave the memory flags away, or shorten --max-new-tokens" in text
    assert "may not fit" in plan(real("cpu"), 24)[1]  # a CPU has nowhere to offload to


# ============================================================ what is free now
def test_rows_and_positions_follow_from_what_is_free(real, model, monkeypatch):
    real, found = real("cpu"), []
    for gib in (0.3, 8, 30, 1000):
        monkeypatch.setattr(memory, "free", lambda device: gib * GIB)  # noqa: B023
        found.append((memory.rows_that_fit(real, 1700, 2048, 4),
                      memory.positions_that_fit(real, 3748, real.parameters())))
        # Of a small model they are fixed, so that its runs repeat to the last bit.
        assert memory.rows_that_fit(model, 100, 100, 4) == 512
        assert memory.positions_that_fit(model, 100, model.parameters(), otherwise=12_000) == 12_000
    assert found[0] == (4, 3748) and found[-1] == (512, 2**13)
    assert 4 < found[1][0] < found[2][0] < 512


def test_what_is_free_on_a_cpu_is_the_least_that_machine_and_container_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    machine = memory.free(torch.device("cpu"))
    assert 0 < machine <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, left in (("1000", 300), ("max", machine)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        (tmp_path / "memory.current").write_text("700\n")
        assert memory.free(torch.device("cpu")) == pytest.approx(left, rel=0.5)
