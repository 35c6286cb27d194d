"""Each fast path gives the values and the gradients of the plain way of doing the same, in float64."""
import pytest
import torch
from conftest import close, naive

from lib import kv_cache, scoring
from lib.kv_cache import FewRows
from litereason import LATENT, Rollout, generate, logprobs, unroll
from torch.utils._python_dispatch import TorchDispatchMode


# ---------------------------------------------------------------- few rows times a large matrix
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (3, 1), (5,), (2, 3), (7, 1), (8,), (9,), (0,)])
def test_few_rows_the_other_way_round_give_the_plain_products(shape, bias):
    torch.manual_seed(0)
    fast = FewRows(256, 512, bias=bias, dtype=torch.float64)
    x = torch.randn(*shape, 256, dtype=torch.float64, requires_grad=True)
    plain = torch.nn.functional.linear(x, fast.weight, fast.bias)
    close(fast(x), plain)
    assert fast(x).shape == plain.shape
    g, inputs = torch.randn_like(plain), [x, *fast.parameters()]
    for a, b in zip(torch.autograd.grad(fast(x), inputs, g), torch.autograd.grad(plain, inputs, g)):
        close(a, b)


def test_every_product_of_an_attached_model_takes_it(model):
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert (model.lm_head in linear and model.reasoning_projector[0].up_proj in linear
            and {type(m) for m in linear} == {FewRows})


# ---------------------------------------------------------------- the decoding cache on a CPU
def test_a_cache_that_grows_has_the_columns_it_looks_at_and_changes_no_rollout(model, tok, monkeypatch):
    """Rows that leave and prompts that join among them."""
    widths = set()
    set_reach = kv_cache.DecodingCache.set_reach

    def watched(cache, rounded):
        changed = set_reach(cache, rounded)
        assert all(t.shape[2] == (cache.reach if cache.grows else cache.room)
                   for pair in cache.layers for t in pair)
        widths.add(cache.reach)
        return changed

    def decoded():
        draws = torch.Generator().manual_seed(0)
        return generate(model, tok, ["abc", "de", "fghij"], 2, 40, gen_batch_size=4, generator=draws)

    monkeypatch.setattr(kv_cache.DecodingCache, "set_reach", watched)
    growing = decoded()
    assert widths >= {16, 32} and widths <= {16, 32, 40}
    monkeypatch.setattr(kv_cache, "GROWS", ())  # as on CUDA: all columns from the start
    fixed = decoded()
    assert [r.slots for r in growing] == [r.slots for r in fixed]
    for a, b in zip(growing, fixed):
        close(a.logprobs, b.logprobs)
        close(a.latents, b.latents)


# ---------------------------------------------------------------- fused attention in scoring
def gradients(model, loss):
    return torch.autograd.grad(loss, [p for n, p in model.named_parameters() if "projector" not in n])


@pytest.mark.parametrize("choice", [range(8), [0, 1], [7, 3, 0]])
def test_fused_attention_scores_like_the_shared_products(model, rollouts, choice, monkeypatch):
    """Prompts of unequal lengths, ragged groups and rows of unequal lengths among them."""
    rows = [rollouts[i] for i in choice]
    assert max(len(r.slots) for r in rows) > 8
    fused = logprobs(model, rows)[0]
    calls, joint = [], kv_cache.ScoringCache.joint_bias
    monkeypatch.setattr(kv_cache.ScoringCache, "joint_bias", lambda *a: calls.append(1) or joint(*a))
    monkeypatch.setattr(kv_cache.ScoringCache, "FUSED", 8)
    again = logprobs(model, rows)[0]
    monkeypatch.setattr(kv_cache, "REPEATS", ("cpu",))  # as on CUDA
    repeated = logprobs(model, rows)[0]
    monkeypatch.setattr(kv_cache.ScoringCache, "FUSED", 10**9)
    shared = logprobs(model, rows)[0]
    close(repeated, shared)
    for a, b in zip(gradients(model, repeated.sum()), gradients(model, shared.sum())):
        close(a, b)
    shared = logprobs(model, rows)[0]
    assert calls == [1, 1], "the mask is made once a pass, not once a layer"
    close(fused, again)
    close(fused, shared)
    for a, b in zip(gradients(model, fused.sum()), gradients(model, shared.sum())):
        close(a, b)


# ------------------------------------ latents made again: the last one of a block goes with the text after it
BLOCKS = [[LATENT] * 2 + [9, 8] + [LATENT], [7, 7] + [LATENT] * 3 + [9], [9, 8, 7], [LATENT] * 4,
          [9, LATENT, 8, LATENT, 7, LATENT, LATENT]]


@pytest.mark.parametrize("choice", [[0], [2], [3], [4], [0, 1, 2, 3, 4]])
def test_unroll_is_the_naive_definition_wherever_the_blocks_are(model, choice):
    rows = [Rollout([11, 12, 13][: 1 + i % 3], BLOCKS[i], torch.zeros(0, 32)) for i in choice]
    _, latents = unroll(model, rows)
    plain = [naive(model, r.prompt_ids, r.slots)[1] for r in rows]
    for a, b in zip(latents, plain):
        close(a, b)
    if any(len(z) for z in plain):
        wanted = list(model.reasoning_projector.parameters())
        ours, theirs = (torch.autograd.grad(sum((z**2).sum() for z in some), wanted)
                        for some in (latents, plain))
        for a, b in zip(ours, theirs):
            close(a, b)


def test_unroll_passes_once_for_the_prompt_and_once_per_latent(model, monkeypatch):
    shapes, forward = [], kv_cache.forward
    monkeypatch.setattr(kv_cache, "forward",
                        lambda m, x, *rest: shapes.append(tuple(x.shape[:2])) or forward(m, x, *rest))
    unroll(model, [Rollout([11, 12], [5, 6, LATENT, LATENT, LATENT, 7, 8, LATENT, 9], torch.zeros(0, 32))])
    assert shapes == [(1, 2), (1, 2), (1, 1), (1, 1), (1, 3), (1, 2)]


# ------------------------------------------------------- the scored tokens' log-probs, their gradient by hand
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 5])
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


def test_token_logprobs_computes_no_gradient_that_nobody_wants(model, monkeypatch):
    h, y = torch.randn(12, 32, dtype=torch.float64, requires_grad=True), torch.arange(12)
    model.lm_head.weight.requires_grad_(False)  # stage 2
    scoring.token_logprobs(model, h, y).sum().backward()
    assert h.grad is not None and model.lm_head.weight.grad is None
    model.lm_head.weight.requires_grad_(True)
    scoring.token_logprobs(model, h.detach(), y).sum().backward()
    assert model.lm_head.weight.grad is not None
    assert len(scoring.token_logprobs(model, h[:0], y[:0])) == 0


def test_a_second_backward_pass_through_the_same_logits_is_refused_not_wrong(model):
    h, y = torch.randn(12, 32, dtype=torch.float64, requires_grad=True), torch.arange(12)
    loss = scoring.token_logprobs(model, h, y).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- bf16 compute: a weight is cast once
class Casts(TorchDispatchMode):
    """Counts how often a weight of the base's linear maps is copied into bf16."""

    def __init__(self, model):
        super().__init__()
        self.shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, FewRows)}
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation == torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.count += args[0].dtype == torch.float32 and tuple(args[0].shape) in self.shapes
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_each_weight_is_cast_once_however_many_steps_there_are_frozen_or_not(model, tok, frozen):
    model = model.float()
    model.requires_grad_(not frozen)
    plain = generate(model, tok, ["abc"], 2, 12, generator=torch.Generator().manual_seed(0))
    model.bf16 = True
    linear = [m for m in model.model.modules() if isinstance(m, FewRows)] + [model.lm_head]
    with Casts(model) as casts:
        rows = generate(model, tok, ["abc"], 2, 12, generator=torch.Generator().manual_seed(0))
    assert casts.count == len(linear)
    assert all(m.cast is None for m in linear), "kept after the call"
    with Casts(model) as casts, kv_cache.autocast(model), torch.no_grad():
        for _ in range(3):
            logp, _ = logprobs(model, rows)
    assert casts.count <= len(linear) + 3  # the head's own, once a call
    assert (logp[0, : len(rows[0].slots)] - rows[0].logprobs).abs().max() < 0.1 and len(plain) == 2


def test_a_frozen_base_under_bf16_gives_the_gradients_of_one_that_is_not(model, tok):
    model = model.float()
    model.bf16 = True
    rows = [Rollout([11, 12, 13], BLOCKS[i], torch.zeros(0, 32)) for i in (0, 1, 4)]
    wanted = list(model.reasoning_projector.parameters())
    both = []
    for frozen in (False, True):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("reasoning_projector.") or not frozen)
        _, latents = unroll(model, rows)
        both.append(torch.autograd.grad(sum((z**2).sum() for z in latents), wanted))
    for a, b in zip(*both):
        close(a, b, 1e-5)
