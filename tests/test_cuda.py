"""On a real GPU (skipped without one): decoding, scoring and the roll-out of latents give what the definition
gives.

The pretended device (test_pretend_cuda.py) says what CUDA refuses; kernels, rounding and graphs can only be
tried here."""
import copy
import dataclasses
import warnings

import pytest
import torch
from conftest import close

from lib import decoder, memory
from data import tiny
from litereason import LATENT, generate, load, logprobs, naive_score, policy_loss, projector_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def model_and_tokenizer():
    model, tokenizer = load("tiny", "cuda")
    torch.manual_seed(0)
    with torch.no_grad():  # an untrained projector, at a size where latents matter
        for p in model.reasoning_projector.parameters():
            p.normal_(0.0, 0.05)
    return model, tokenizer


@pytest.fixture
def exact(model_and_tokenizer):
    """The same in float64, where rounding decides nothing."""
    model, tokenizer = model_and_tokenizer
    model.bf16 = False
    return model.double(), tokenizer


def sampled(model, tokenizer, limit=80, **settings):
    prompts = [tiny.prompt(example, True) for example in tiny.examples("val")[:8]]
    draws = torch.Generator().manual_seed(0)
    return generate(model, tokenizer, prompts, 16, limit, generator=draws, **settings)


def largest_difference(model, rows):
    logp, scored = logprobs(model, rows)
    kept = [r.logprobs[[s != LATENT for s in r.slots]] for r in rows]
    return float((logp.detach()[scored].cpu() - torch.cat(kept).cpu()).abs().max())


@torch.no_grad()
def test_sampler_scorer_and_definition_agree_in_recorded_steps_and_fewer_rows_too(exact):
    model, tokenizer = exact
    rows = sampled(model, tokenizer)
    assert sum(r.n_latents for r in rows) > 20 and largest_difference(model, rows) < 1e-6
    for r in rows[::16]:
        _, latents, logps = naive_score(model, r.prompt_ids, r.slots)
        close(r.latents.cpu(), latents.cpu(), 1e-6)
        close(r.logprobs.cpu(), logps.cpu(), 1e-6)
    few = sampled(model, tokenizer, gen_batch_size=16)
    model.graphs = True
    played = sampled(model, tokenizer)
    assert model.graphs, "the step could not be recorded"
    for a, b, c in zip(rows, played, few, strict=True):
        assert a.slots == b.slots == c.slots
        close(a.logprobs, b.logprobs, 1e-6)


def test_between_two_looks_the_host_waits_for_nothing(model_and_tokenizer):
    sampled(*model_and_tokenizer)  # what is made once
    waits = {}  # steps -> how often
    torch.cuda.set_sync_debug_mode("warn")
    for limit in (10, 80):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            rows = sampled(*model_and_tokenizer, limit)
        waits[max(len(r.slots) for r in rows)] = sum("synchroniz" in str(w.message) for w in seen)
    torch.cuda.set_sync_debug_mode("default")
    (short, few), (long, many) = waits.items()
    assert many - few <= 8 * ((long - short) / decoder.LOOK + 1), waits


def test_gradients_are_those_of_a_cpu(exact):
    """The policy's update and the projector's."""
    on_gpu, tokenizer = exact
    rows = [r for r in sampled(on_gpu, tokenizer) if r.n_latents][:12]
    rows = [dataclasses.replace(r, latents=r.latents.cpu(), logprobs=r.logprobs.cpu()) for r in rows]
    gradients = []
    for model in (copy.deepcopy(on_gpu).cpu(), on_gpu):
        advantages = torch.linspace(-1, 1, len(rows), device=model.device)
        logp, scored = logprobs(model, rows)
        policy_loss(logp, logp.detach(), advantages, scored, len(rows))[0].backward()
        projector_loss(model, rows)[0].backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, g in gradients[0].items():
        # Norms and rotary angles are fp32 inside transformers, and this projector multiplies their rounding.
        close(gradients[1][name] / g.abs().max(), g / g.abs().max(), 5e-3)


def test_in_bf16_sampler_and_scorer_agree_and_offloaded_masters_get_the_same_gradients(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = sampled(model, tokenizer)
    assert model.bf16 and largest_difference(model, rows) < 0.5

    def gradients(model, offloads):
        base = memory.base_parameters(model)
        masters = memory.offload(model, base) if offloads else base
        logp, scored = logprobs(model, rows[:32])
        (-logp.sum() / scored.sum()).backward()
        memory.wait_for_gradients(model)
        memory.gradients_to_masters(base, masters)
        return [p.grad.cpu() for p in masters]

    expected = gradients(copy.deepcopy(model), False)
    for a, b in zip(gradients(model, True), expected, strict=True):
        assert (a - b).abs().max() <= 1e-2 * max(1e-6, float(b.abs().max()))
