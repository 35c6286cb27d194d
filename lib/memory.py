"""Less memory for the same numbers; then how much fits: `plan` for RL, `rows_that_fit` and
`positions_that_fit` for everything else. A first reading can skip it."""
import bisect
import contextlib
import copy
import functools
import itertools
import os
import pathlib
import re

import torch
import torch.utils.checkpoint

from lib import kv_cache
from lib.checkpoint import is_small
from lib.scoring import LOGITS

GIB = 2.0**30
USABLE = 0.92  # of the memory: the allocator's gaps, cuBLAS and cuDNN need some
MOST_ROWS = 512  # at once; more would not be faster
MOST_POSITIONS = {"cuda": 2**15, "cpu": 2**13}  # the same of a forward pass
FEW_ROWS, FEW_POSITIONS = 64, 2**13  # with fewer, passes are short: less memory is tried first
CONTAINER = pathlib.Path("/sys/fs/cgroup")  # where Linux says how much a container may use


# ============================================================ less memory
def checkpoint_layers(model):
    """A layer's activations are not kept for the backward pass but computed again: far less memory, a third
    more time. transformers' own switch turns the cache off; ours runs a layer on the cache as it stood."""
    model.checkpointed = True
    for i, layer in enumerate(model.model.layers):
        layer.forward = functools.partial(_recomputed, layer.forward, i)


def _recomputed(layer, i, x, past_key_values=None, **kwargs):
    cache = past_key_values
    if not torch.is_grad_enabled() or not getattr(cache, "packing", None):  # decoding, or no cache of ours
        return layer(x, past_key_values=cache, **kwargs)
    before, layers = copy.copy(cache), list(cache.layers)

    def run(x):
        view = copy.copy(before)
        view.layers = list(layers)
        out = layer(x, past_key_values=view, **kwargs)
        return out, *view.layers[i][-2:]

    out, keys, values = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    cache.layers[i] += (keys, values)
    return out


def base_parameters(model):
    """All weights but the projector's."""
    return [p for name, p in model.named_parameters() if not name.startswith("reasoning_projector.")]


def matrices(model):
    """The weights of the layers' linear maps, which autocast multiplies in 16 bits."""
    return [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]


def _to_16_bits(model):
    """On CUDA, once for all forward passes: the same products in half the memory."""
    for weight in matrices(model) if model.bf16 else ():
        weight.data = weight.data.to(torch.bfloat16)


def freeze(model):
    """For a model that is never trained."""
    _to_16_bits(model.requires_grad_(False))
    return model


@contextlib.contextmanager
def base_frozen(model):
    """Inside, the base gets no gradients."""
    base = base_parameters(model)
    whole = {weight: weight.data for weight in matrices(model)}
    _to_16_bits(model)
    for p in base:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in base:
            p.requires_grad_(True)
        for weight, before in whole.items():
            weight.data = before


def offload(model, parameters):
    """What the optimizer needs of `parameters` moves to the host -> fp32 masters to step on.

    A gradient leaves for the host as soon as it is whole, through a page-locked buffer. It is added to the
    master's, in fp32, during the next backward pass, while the card works; gradients_to_masters adds the
    last. Call wait_for_gradients after each backward pass."""
    masters = [p.detach().to("cpu", torch.float32, copy=True).requires_grad_() for p in parameters]
    model.bf16 = True
    _to_16_bits(model)
    for p, master in zip(parameters, masters):
        p.master = master
        p.on_host = torch.empty(p.shape, dtype=p.dtype, pin_memory=p.device.type == "cuda")
        p.is_sent = False  # whether a gradient is on its way to on_host, or there
        p.register_post_accumulate_grad_hook(_send_gradient)
    return masters


def _send_gradient(p):
    _add_to_master(p)  # that of the micro-batch before
    p.on_host.copy_(p.grad, non_blocking=True)
    p.is_sent = True
    p.grad = None


def _add_to_master(p):
    if p.is_sent:
        if p.master.grad is None:
            p.master.grad = torch.zeros_like(p.master)
        p.master.grad += p.on_host
        p.is_sent = False


def wait_for_gradients(model):
    """After each backward pass, until its gradients are on the host. Without `offload`: nothing."""
    if model.device.type == "cuda" and hasattr(next(model.parameters()), "master"):
        torch.cuda.synchronize(model.device)


def gradients_to_masters(parameters, masters):
    """After a step's last backward pass. Without `offload`: nothing."""
    for p in parameters if masters is not parameters else ():
        _add_to_master(p)


def forget_gradients(model):
    """All gradients so far, wherever they are."""
    for p in model.parameters():
        p.grad = None
        if hasattr(p, "master"):
            p.is_sent = False
            p.master.grad = None


def weights_from_masters(parameters, masters):
    """Brings the stepped weights back. Without `offload`: nothing."""
    for p, master in zip(parameters, masters) if masters is not parameters else ():
        p.on_host.copy_(master.detach())
        p.data.copy_(p.on_host, non_blocking=True)


# ============================================================ what fits
def _count(parameters):
    return sum(p.numel() for p in parameters)


def needs(model, longest, limit=0, prompts=0, rows=0, positions=0, recompute=False, offloaded=False):
    """Bytes at the worst moment of sampling, and of a backward pass, beside weights, gradients and AdamW.

    Texts are prompts of up to `longest` tokens, with up to `limit` slots. Sampling decodes `rows` rows, with
    `prompts` prompts in memory; a backward pass has `positions`, copied keys included (see scoring.pack)."""
    config, layer = model.config, model.model.layers[-1]
    n, D, I, V = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    queries = config.num_attention_heads * layer.self_attn.head_dim
    kv = 2 * config.num_key_value_heads * layer.self_attn.head_dim
    c, copied = (2, 2) if model.bf16 else (4, 0)  # bytes of a number in a product, of a weight's copy for it
    copies = 0 if offloaded else copied * _count(model.model.layers.parameters())
    cached = c * n * kv  # keys and values of one position, in all layers

    # Prompts are read: residual, norm and its copy, three of the MLP's. Then tokens are drawn: five times the
    # logits.
    read = ((8 + c) * D + 3 * c * I) * min(max(kv_cache.PREFILL, longest), prompts * longest)
    sampling = (copied * V * D + copies + cached * (rows * limit + prompts * longest)
                + max(read, (c + 16) * rows * V))

    # One layer keeps of one position: inputs and outputs of its norms (two, in Gemma 3 four), five copies of
    # the latter for five matrices, queries and attention's output, keys and values, the MLP's four; in Qwen3
    # and Gemma 3 what the norms of queries and keys keep.
    norms = sum("norm" in name for name, _ in layer.named_children())
    kept = 8 * norms * D + c * (5 * D + 2 * queries + kv + 4 * I)
    kept += 10 * (queries + kv // 2) * hasattr(layer.self_attn, "q_norm")
    # Logits in a product's type, in fp32, and log-probs; the LM head's copy, its gradient in chunks, and the
    # embedding's, which is the same tensor.
    last = (8 + c) * LOGITS + (copied + 2 * c + 8) * V * D
    mask = c * (longest + limit)
    if recompute:  # each layer's input, keys and values stay; one layer is made again, with gradients
        return sampling, (4 * n * D + cached + mask) * positions + max(1.75 * kept * positions, last)
    return sampling, copies + (n * kept + mask) * positions + last


def free(device):
    """Bytes that nobody uses: on CUDA with the allocator's reserve, on a CPU of the machine or container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        left = 1024 * int(re.search(r"MemAvailable: *(\d+)", pathlib.Path("/proc/meminfo").read_text())[1])
    except OSError:  # no Linux
        left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no container, or "max": no limit
        limit, used = (int(CONTAINER.joinpath(name).read_text()) for name in ("memory.max", "memory.current"))
        left = min(left, limit - used)
    return left


def _is_fixed(model):
    """A small model on a CPU: its run is the same to the last bit, whatever else is in memory."""
    return model.device.type == "cpu" and is_small(model)


def _largest(size, room, most, step):
    """The largest multiple n of `step` up to `most` whose size(n) fits the room; or 0."""
    return step * bisect.bisect(range(step, most + 1, step), USABLE * room, key=size)


def rows_that_fit(model, longest, limit, samples):
    """How many rows can be decoded at once, whole groups, in what is free now: at least one group."""
    if _is_fixed(model):
        return MOST_ROWS
    return max(samples, _largest(lambda n: needs(model, longest, limit, 2 * n // samples, n)[0],
                                 free(model.device), MOST_ROWS, samples))


def positions_that_fit(model, longest, trained=(), otherwise=2**15):
    """How many positions a forward and backward pass can have in what is free now, in texts of up to
    `longest` tokens: at least that many. Of a small model on a CPU: `otherwise`. trained: parameters whose
    gradients and moments must fit, too; without any, a pass takes no more than with checkpointed layers."""
    if _is_fixed(model):
        return otherwise
    n_trained = _count(trained)
    recompute = n_trained == 0 or getattr(model, "checkpointed", False)
    return max(longest, _largest(
        lambda n: 12 * n_trained + needs(model, longest, positions=n, recompute=recompute)[1],
        free(model.device), MOST_POSITIONS[model.device.type], 256))


def plan(model, longest, limit, n_prompts, num_generations, given, scorer=None, room=None):
    """The settings of memory for RL -> ({gen_batch_size, micro_batch_tokens, checkpoint_layers, offload}, the
    peaks to expect, as text). No choice changes a result.

    longest: tokens of the longest prompt. limit: slots per rollout. given: {name: what a flag says, or None}.
    scorer: the reward's frozen model. room: bytes that the run may use; default: what is free, and what the
    models have. A weight takes 16 bytes: itself, AdamW's two moments and, in the update, its gradient. Tried
    from the fastest to the smallest: activations kept, layers checkpointed, and all that is trained on the
    host (not on a CPU, which is the host)."""
    own, reader = (sum(p.nbytes for p in m.parameters()) if m else 0 for m in (model, scorer))
    room = room or free(model.device) + own + reader
    base, layers = _count(base_parameters(model)), _count(model.model.layers.parameters())
    whole = longest + limit  # positions of one rollout with its prompt
    rows, positions = given.get("gen_batch_size"), given.get("micro_batch_tokens")
    least_rows, most_rows = rows or num_generations, rows or n_prompts * num_generations
    least_positions, most_positions = positions or whole, positions or MOST_POSITIONS[model.device.type]
    step = positions or 256
    tries = {"offload": [False] if model.device.type == "cpu" else [False, True],
             "checkpoint_layers": [False, True]}
    tries = [tried if given.get(name) is None else [given[name]] for name, tried in tries.items()]

    def peaks(rows, positions):  # with what is tried below
        prompts = min(n_prompts, 2 * max(1, rows // num_generations))  # see Decoder
        sampling, update = needs(model, longest, limit, prompts, rows, positions, recompute, offloaded)
        held = reader + own + (-2 * layers if offloaded else 8 * base)  # offloaded: layers in 16 bits
        return held + sampling, held + update + (0 if offloaded else 4 * base)

    for offloaded, recompute in itertools.product(*tries):
        rows = _largest(lambda n: peaks(n, 0)[0], room, most_rows, least_rows)
        positions = _largest(lambda n: peaks(0, n)[1], room, most_positions, step)
        if rows >= min(FEW_ROWS, most_rows) and positions >= min(FEW_POSITIONS, 2 * whole, most_positions):
            break
    rows, positions = max(rows, least_rows), max(positions, least_positions)  # also if these may not fit
    sampling, update = peaks(rows, max(positions, whole))
    text = (f"memory: {room / GIB:.1f} GiB can be used; with --gen-batch-size {rows} --micro-batch-tokens "
            f"{positions} --{'' if recompute else 'no-'}checkpoint-layers "
            f"--{'' if offloaded else 'no-'}offload the peaks should be: "
            f"sampling {sampling / GIB:.1f} GiB, update {update / GIB:.1f} GiB")
    if max(sampling, update) > USABLE * room:
        text += "\nthis may not fit: leave the memory flags away, or shorten --max-new-tokens"
    return {"gen_batch_size": rows, "micro_batch_tokens": positions, "checkpoint_layers": recompute,
            "offload": offloaded}, text
