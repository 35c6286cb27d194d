"""Gradients are those of the definition: back through the latents into the projector (stage 2), and of GRPO
into the base (stage 3)."""
import copy
import dataclasses

import pytest
import torch
from conftest import PROMPTS, TEXTS, close, naive, tag

from lib import kv_cache
from lib.memory import (base_frozen, base_parameters, checkpoint_layers, freeze, gradients_to_masters,
                        matrices, offload, wait_for_gradients, weights_from_masters)
from lib.scoring import pack, token_logprobs
from litereason import (LATENT, generate, group_advantages, insert_latents, logprobs, policy_loss,
                        projector_loss, recompute_latents, Rollout, unroll, without_latents)
from train_projector import fit_projector


def gradients(model, loss, part=""):
    """{name: gradient} of the weights whose name has `part` and that the loss reaches."""
    named = [(n, p) for n, p in model.named_parameters() if part in n]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: g for (n, _), g in zip(named, found) if g is not None}


def close_gradients(a, b, tol=1e-10):
    assert a.keys() == b.keys() and a
    for name in a:
        close(a[name], b[name], tol)


def some_number(h, latents, seed=0):
    """A fixed random weighting of all outputs, so that an error in any entry, or in its gradient, shows."""
    g = torch.Generator().manual_seed(seed)
    return sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in (h, latents))


def traces(tok, model, texts=TEXTS):
    """Finished texts as stage 2 has them: tags written, latents still to be made."""
    none = torch.zeros(0, 32).double()
    return [Rollout(tok.encode(PROMPTS[i // 2]), insert_latents(model, tok, tok.encode(t)), none)
            for i, t in enumerate(texts)]


# ---------------------------------------------------------------- the roll-out with gradient
def test_a_mixed_batch_equals_each_row_alone_and_uncached_in_states_latents_and_all_gradients(
        model, rollouts):
    h, latents = unroll(model, rollouts)
    for i, r in enumerate(rollouts):
        slow_h, slow_latents, _ = naive(model, r.prompt_ids, r.slots)
        close(h[i, : len(r.slots)], slow_h)
        close(latents[i], slow_latents)
    fast, slow = 0, 0
    for i in (0, 2, 4, 7):  # two tags; three in a row; the limit in a block; one late
        n = len(rollouts[i].slots)
        fast = fast + some_number(h[i, :n], latents[i], i)
        slow = slow + some_number(*naive(model, rollouts[i].prompt_ids, rollouts[i].slots)[:2], i)
    close_gradients(gradients(model, fast), gradients(model, slow))


def test_latents_made_again_are_those_of_the_weights_of_now(model, rollouts):
    for changed in (False, True):
        for r, again in zip(rollouts, recompute_latents(model, rollouts)):
            gap = (again.latents - r.latents).abs().max() if r.n_latents else None
            assert gap is None or (gap > 1e-3 if changed else gap < 1e-12)
            assert again.slots == r.slots and not again.latents.requires_grad
        with torch.no_grad():
            model.reasoning_projector[0].up_proj.weight.mul_(1.1)


# ---------------------------------------------------------------- stage 2: the projector's loss
@pytest.mark.parametrize("latent", ["projector", "none"])
def test_the_loss_is_the_cross_entropy_of_the_text_after_the_first_tag_however_traces_are_batched(
        model, tok, latent):
    """The stop token among it, though it pads. latent="none": of the same tokens, by the plain model."""
    assert tok.pad_token_id == tok.eos_token_id
    rows, total, count = traces(tok, model, TEXTS[:5]), 0.0, 0
    for r in rows:
        start = (r.slots + [LATENT]).index(LATENT)
        fed = r.slots if latent == "projector" else without_latents(r).slots
        _, _, logp = naive(model, r.prompt_ids, fed)
        total, count = total - logp[start:].sum(), count + sum(s != LATENT for s in fed[start:])
    expected = gradients(model, total)
    for batch in (len(rows), 3):
        parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        losses, counts = zip(*(projector_loss(model, part, latent=latent) for part in parts))
        assert sum(counts) == count
        close(sum(losses), total)
        close_gradients(gradients(model, sum(losses)), expected)
    assert projector_loss(model, rows[3:], latent=latent) == (0, 0)  # no tag, and a tag at the very end


def test_stage_2_moves_the_projector_and_leaves_the_base_as_it_is(model, tok):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit_projector(model, traces(tok, model, TEXTS[:3]), 1e-3, 2, steps=2)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("reasoning_projector."), name


# ---------------------------------------------------------------- scoring
def test_the_bases_gradient_treats_latents_as_constants_but_flows_through_attention_over_them(
        model, rollouts):
    rows = rollouts[:3]
    logp, scored = logprobs(model, rows)
    slow = 0
    for r in rows:  # naive, but with the stored vectors instead of the projector
        latents, x = iter(r.latents), []
        for s in r.slots:
            x.append(next(latents) if s == LATENT else model.get_input_embeddings().weight[s])
        x = torch.cat([model.get_input_embeddings().weight[r.prompt_ids], torch.stack(x)])
        h = model.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        out = model.lm_head(h).log_softmax(-1)
        slow = slow + sum(out[len(r.prompt_ids) + i - 1, s] * (i + 1)
                          for i, s in enumerate(r.slots) if s != LATENT)
    weight = torch.arange(1, logp.shape[1] + 1, dtype=torch.float64)
    close_gradients(gradients(model, (logp * weight).sum()), gradients(model, slow))


# ---------------------------------------------------------------- stage 3: GRPO
def old_logprobs(rows):
    return torch.nn.utils.rnn.pad_sequence([r.logprobs for r in rows], batch_first=True)


def loss_of(model, rows, advantages, n_rollouts):
    logp, scored = logprobs(model, rows)
    return policy_loss(logp, old_logprobs(rows), advantages, scored, n_rollouts)


def test_on_the_first_update_every_ratio_is_one_and_only_unequal_rewards_give_a_gradient(model, rollouts):
    for rows in (rollouts, recompute_latents(model, rollouts), rollouts[2:5]):
        loss, ratio = loss_of(model, rows, torch.ones(len(rows)).double(), len(rows))
        assert (ratio - 1).abs().max() < 1e-12
        assert abs(loss + 1) < 1e-12  # every rollout counts the same, however long
    for rewards, moves in ((torch.ones(4, 2), False), (torch.tensor([[1.0, 0.0]] * 4), True)):
        loss, _ = loss_of(model, rollouts, group_advantages(rewards).flatten().double(), 8)
        assert any(g.any() for g in gradients(model, loss).values()) == moves


def test_the_policy_gradient_reaches_the_base_and_never_the_projector(model, rollouts):
    """Not even if the latents have a graph."""
    with_graph = [dataclasses.replace(r, latents=z) for r, z in zip(rollouts, unroll(model, rollouts)[1])]
    for rows in (rollouts, with_graph):
        loss, _ = loss_of(model, rows, torch.tensor([1.0, -1.0] * 4).double(), 8)
        found = gradients(model, loss)
        assert all(found[name].any() != name.startswith("reasoning_projector.") for name in found)
        assert len(found) == sum("reasoning_projector" not in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("run", [logprobs, unroll])
def test_padding_goes_through_no_layer(model, rollouts, run):
    computed = []
    model.model.layers[0].register_forward_pre_hook(lambda _, x: computed.append(x[0].shape[:2].numel()))
    run(model, rollouts)
    prompts = {tuple(r.prompt_ids) for r in rollouts}
    assert sum(computed) == sum(map(len, prompts)) + sum(len(r.slots) for r in rollouts)


@pytest.mark.parametrize("budget", [1, 250, 10**6])
def test_a_token_budget_splits_into_neighbours_within_it_and_changes_no_gradient(model, rollouts, budget):
    parts = pack(rollouts, budget)
    assert [i for part in parts for i in part] == list(range(8))
    for part in parts:
        rows = [rollouts[i] for i in part]
        prompts = {tuple(r.prompt_ids) for r in rows}
        needed = sum(map(len, prompts)) + sum(len(r.slots) for r in rows)  # padding is not computed
        assert len(part) == 1 or needed <= budget
    assert len(parts) == {1: 8, 10**6: 1}.get(budget, len(parts))
    a = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 0.0, -1.0, 0.3]).double()
    whole = gradients(model, loss_of(model, rollouts, a, 8)[0])
    some = [gradients(model, loss_of(model, [rollouts[i] for i in part], a[part], 8)[0]) for part in parts]
    close_gradients({n: sum(g[n] for g in some) for n in whole}, whole)


@pytest.fixture
def bf16(model, tok):
    """(a model that computes in bf16 from fp32 weights, as on CUDA; rollouts of it)"""
    model = model.float()
    model.bf16 = True
    return model, sampled(model, tok)


def sampled(model, tok, seed=0):
    return generate(model, tok, PROMPTS, 2, 20, generator=torch.Generator().manual_seed(seed))


def test_bf16_compute_keeps_fp32_weights_gradients_and_projector_and_scores_what_it_sampled(bf16, tok):
    model, rows = bf16
    logp, scored = logprobs(model, rows)
    assert logp.dtype == torch.float32
    assert 0 < (logp - old_logprobs(rows))[scored].abs().max() < 0.1  # 8 bits; sums in another order
    assert all(g.dtype == torch.float32 for g in gradients(model, logp.sum()).values())
    seen = []
    model.reasoning_projector[0].register_forward_hook(lambda module, x, z: seen.append(z.dtype))
    unroll(model, traces(tok, model, [tag(2) + "a"]))
    assert set(seen) == {torch.float32}


def test_offload_with_recomputed_layers_gives_the_gradients_and_the_next_rollouts_bit_for_bit(tok, bf16):
    model, rollouts = bf16
    with_offload = copy.deepcopy(model)
    checkpoint_layers(with_offload)

    def two_micro_batches_and_a_step(model, offloads):
        base = base_parameters(model)
        masters = offload(model, base) if offloads else base
        for some in (rollouts[:3], rollouts[3:]):
            logprobs(model, some)[0].sum().backward()
            wait_for_gradients(model)
        gradients_to_masters(base, masters)
        assert not offloads or all(p.grad is None for p in base)
        gradients = [p.grad.clone() for p in masters]
        torch.optim.SGD(masters, lr=1e-2).step()
        weights_from_masters(base, masters)
        return gradients, sampled(model, tok, seed=1)

    plain, next_rollouts = two_micro_batches_and_a_step(model, False)
    sent, again = two_micro_batches_and_a_step(with_offload, True)
    assert all(g.dtype == torch.float32 for g in sent) and all(map(torch.equal, plain, sent))
    for one, other in zip(next_rollouts, again):
        assert one.slots == other.slots and torch.equal(one.logprobs, other.logprobs)


@torch.no_grad()
def test_a_frozen_model_scores_the_same_bit_for_bit_in_half_the_memory(bf16):
    model, rollouts = bf16
    before, _ = logprobs(model, rollouts)
    after, _ = logprobs(freeze(model), rollouts)
    assert torch.equal(before, after)
    assert {w.dtype for w in matrices(model)} == {torch.bfloat16}
    assert next(model.reasoning_projector.parameters()).dtype == torch.float32


# ---------------------------------------------------------------- fast paths give what the plain way does
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
    ours = token_logprobs(model, h, y, temperature, chunk)
    plain = (model.lm_head(h) / temperature).log_softmax(-1)[torch.arange(12), y]
    close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(plain, inputs, g), strict=True):
        close(a, b)
    assert len(token_logprobs(model, h[:0], y[:0])) == 0


def test_a_frozen_base_in_bf16_gives_the_gradients_of_one_that_learns_and_its_weights_come_back(
        model, rollouts):
    model = model.float()
    model.bf16 = True
    before = [p.clone() for p in model.parameters()]

    def gradients():
        _, latents = unroll(model, rollouts[:3])
        return torch.autograd.grad(sum((z**2).sum() for z in latents), model.reasoning_projector.parameters())

    learns = gradients()
    with base_frozen(model):
        for a, b in zip(gradients(), learns):
            close(a, b, 1e-5)
    assert all(p.requires_grad and torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_clipping_on_a_worked_example():
    ratio = torch.tensor([[1.5, 1.1, 0.5, 9.0], [1.5, 0.5, 9.0, 9.0]]).double()
    logp = ratio.log().requires_grad_()
    scored = torch.tensor([[True, True, True, False], [True, True, False, False]])
    loss, seen = policy_loss(logp, 0 * ratio, torch.tensor([1.0, -2.0]).double(), scored, 2, clip=0.2)
    # gains, a = 1: min(1.5, 1.2), 1.1, min(0.5, 0.8); a = -2: min(-3, -2.4), min(-1, -1.6)
    assert abs(loss + ((1.2 + 1.1 + 0.5) / 3 + (-3.0 - 1.6) / 2) / 2) < 1e-6
    close(seen, torch.where(scored, ratio, 1.0))
    loss.backward()
    # a clipped gain has no slope; elsewhere d gain / d logp = ratio * a
    close(logp.grad.float(), -torch.tensor([[0, 1.1 / 3, 0.5 / 3, 0], [-3.0 / 2, 0, 0, 0]]) / 2, 1e-6)


def test_advantages_are_normalised_within_a_group_and_rounding_noise_is_not_blown_up():
    a = group_advantages(torch.tensor([[1.0, 0, 0, 0], [3.0, 5, 7, 9], [2.0, 2, 2, 2]]), eps=0.0)
    close(a[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), 1e-6)      # mean 1/4, standard deviation (n - 1) 1/2
    close(a[1], torch.tensor([-3.0, -1, 1, 3]) / (20 / 3) ** 0.5, 1e-6)
    assert a[2].tolist() == [0, 0, 0, 0]
    assert group_advantages(torch.tensor([[0.7, 0.7 + 1e-7, 0.7, 0.7]])).abs().max() < 1e-2
    # the mean of three 0.1 is not exactly 0.1; a group of one
    assert group_advantages(torch.tensor([[0.1] * 3])).tolist() == [[0, 0, 0]]
    assert group_advantages(torch.tensor([[1.0]])).tolist() == [[0]]
