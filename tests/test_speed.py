"""Each fast path gives the values and the gradients of the plain way of doing the same, in float64."""
import pytest
import torch
from conftest import close

from lib import kv_cache, memory, scoring
from litereason import LATENT, Rollout, logprobs, unroll


def test_with_keys_repeated_for_every_query_head_scores_and_gradients_stay(model, rollouts, monkeypatch):
    def scored():
        logp = logprobs(model, rollouts)[0]
        base = [p for name, p in model.named_parameters() if "projector" not in name]
        return [logp, *torch.autograd.grad(logp.sum(), base)]

    shared = scored()
    monkeypatch.setattr(kv_cache, "REPEATS", ("cpu",))  # as on CUDA
    for a, b in zip(scored(), shared, strict=True):
        close(a, b)


def test_unroll_passes_once_for_the_prompt_and_once_per_latent(model, forwards):
    unroll(model, [Rollout([11, 12], [5, 6, LATENT, LATENT, LATENT, 7, 8, LATENT, 9], torch.zeros(0, 32))])
    assert forwards == [(1, 2), (1, 2), (1, 1), (1, 1), (1, 3), (1, 2)]


@pytest.mark.parametrize("bias, temperature, chunk", [(False, 1.0, None), (True, 0.7, 1), (True, 1.0, 5)])
def test_token_logprobs_have_the_values_and_gradients_of_log_softmax(model, bias, temperature, chunk):
    torch.manual_seed(0)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size, dtype=torch.float64))
    h = torch.randn(12, 32, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, model.config.vocab_size - 3, (12,))  # the last three ids are no words
    inputs, g = [h, *model.lm_head.parameters()], torch.randn(12, dtype=torch.float64)
    ours = scoring.token_logprobs(model, h, y, temperature, chunk)
    plain = (model.lm_head(h) / temperature).log_softmax(-1)[torch.arange(12), y]
    close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(plain, inputs, g), strict=True):
        close(a, b)
    assert len(scoring.token_logprobs(model, h[:0], y[:0])) == 0


def test_a_frozen_base_in_bf16_gives_the_gradients_of_one_that_learns_and_its_weights_come_back(
        model, rollouts):
    model = model.float()
    model.bf16 = True
    before = [p.clone() for p in model.parameters()]

    def gradients():
        _, latents = unroll(model, rollouts[:3])
        return torch.autograd.grad(sum((z**2).sum() for z in latents), model.reasoning_projector.parameters())

    learns = gradients()
    with memory.base_frozen(model):
        for a, b in zip(gradients(), learns):
            close(a, b, 1e-5)
    assert all(p.requires_grad and torch.equal(p, old) for p, old in zip(model.parameters(), before))
