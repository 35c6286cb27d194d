"""Less memory for the update, and how much fits; a first reading can skip it.

    checkpoint_layers, freeze, offload    less memory, the same numbers
    base_frozen                           the same for stage 2, for a while
    needs                                 bytes at the worst moment of each phase, from shapes
    plan                                  the settings of memory for RL, and its peaks
    rows_that_fit, positions_that_fit     for everything else, in what is free now
"""
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
from lib.scoring import COPIED, LOGITS

GIB = 2.0**30
USABLE = 0.92  # of the memory: the allocator's gaps, cuBLAS and cuDNN need some
MOST_POSITIONS = {"cuda": 2**15, "cpu": 2**13}  # per forward pass; more would not be faster
FEW_POSITIONS = 2**13  # with fewer, passes are short: less memory is tried first
FEW_ROWS = 64  # the same of sampling


# ============================================================ less memory
def checkpoint_layers(model):
    """A layer's activations are not kept for the backward pass but computed again: far less memory, a third
    more time. transformers' own switch turns the cache off; ours runs a layer on the cache as it stood."""
    model.checkpointed = True
    for i, layer in enumerate(model.model.layers):
        layer.forward = functools.partial(_recomputed, layer.forward, i)


def _recomputed(layer, i, x, past_key_values=None, **kwargs):
    cache = past_key_values
    if not torch.is_grad_enabled() or not isinstance(cache, (kv_cache.PromptCache, kv_cache.ScoringCache)):
        return layer(x, past_key_values=cache, **kwargs)
    before, layers = copy.copy(cache), list(cache.layers)

    def run(x):
        view = copy.copy(before)
        view.layers = list(layers)
        out = layer(x, past_key_values=view, **kwargs)
        return out, *view.newest(i)

    out, keys, values = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    cache.add(i, keys, values)
    return out


def base_parameters(model):
    """The base's weights: all but the projector's."""
    return [p for name, p in model.named_parameters() if not name.startswith("reasoning_projector.")]


def matrices(model):
    """The weights of the layers' linear maps, which autocast multiplies in 16 bits."""
    return [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]


def _to_16_bits(model):
    for weight in matrices(model):
        weight.data = weight.data.to(torch.bfloat16)


def freeze(model):
    """For a model that is never trained: on CUDA half the memory, and the same products."""
    if model.requires_grad_(False).bf16:
        _to_16_bits(model)
    return model


@contextlib.contextmanager
def base_frozen(model):
    """Inside, the base gets no gradients. On CUDA it is cast to bf16 here, once for all forward passes."""
    base = base_parameters(model)
    whole = {weight: weight.data for weight in matrices(model)}
    if model.bf16:
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
    """After each backward pass: until its gradients are on the host; nothing to do without `offload`."""
    if model.device.type == "cuda" and hasattr(next(model.parameters()), "master"):
        torch.cuda.synchronize(model.device)


def gradients_to_masters(parameters, masters):
    """After the last backward pass of a step; nothing to do without `offload`."""
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
    """Brings the stepped weights back; nothing to do without `offload`."""
    for p, master in zip(parameters, masters) if masters is not parameters else ():
        p.on_host.copy_(master.detach())
        p.data.copy_(p.on_host, non_blocking=True)


# ============================================================ what each phase needs
def _weights(parameters):
    return sum(p.numel() for p in parameters)


def needs(model, longest, prompts=0, rows=0, limit=0, positions=0, recompute=False, offloaded=False):
    """{phase: {what: bytes}} at the worst moment of each phase, beside weights and AdamW.

    Texts are prompts of up to `longest` tokens, with up to `limit` slots. sampling: `rows` rows are decoded,
    `prompts` prompts are in memory. The others: `positions` in one forward pass, copied keys included (see
    scoring.pack). recompute: layers are checkpointed."""
    config, layer = model.config, model.model.layers[-1]
    n, D, I, V = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
    heads = config.num_attention_heads
    d = getattr(config, "head_dim", None) or D // heads
    kv = 2 * config.num_key_value_heads * d
    c, copied = (2, 2) if model.bf16 else (4, 0)  # bytes of a number in a product, of a weight's copy for it
    copies = 0 if offloaded else copied * _weights(model.model.layers.parameters())

    # One layer's activations of one position. Kept for the backward pass: inputs and outputs of its norms
    # (two, in Gemma 3 four), five copies of the latter for five matrices, queries and attention's output,
    # keys and values, the MLP's four; in Qwen3 and Gemma 3 what the norms of queries and keys keep.
    norms = sum("norm" in name for name, _ in layer.named_children())
    kept = 8 * norms * D + c * (5 * D + 2 * heads * d + kv + 4 * I)
    if hasattr(layer.self_attn, "q_norm"):
        kept += 10 * (heads * d + kv // 2)
    passing = (8 + c) * D + 3 * c * I  # without gradients: residual, norm and its copy, three of the MLP's
    cached = n * c * kv  # keys and values, in all layers

    mask = c * (longest + limit) * positions
    activations, again = n * kept * positions, 0
    if recompute:  # each layer's input, keys and values stay; one layer's are made again, with gradients
        activations, again = (4 * n * D + cached) * positions, 1.75 * kept * positions
    logits = (8 + c) * LOGITS  # as the product gives them, in fp32, and log-probs
    # The LM head's 16-bit copy, its gradient in chunks, and the embedding's, which is the same tensor.
    of_head = (copied + 2 * c + 8) * V * D
    prefill = passing * min(max(kv_cache.PREFILL, longest), prompts * longest)
    draw = (c + 16) * rows * V + 5 * c * rows * heads * (longest + 2 * d)  # five times the logits; attention
    return {
        "sampling": {
            "16-bit copies": copied * V * D + copies,
            "keys and values": cached * (rows * limit + prompts * longest),
            "one step": max(prefill, draw)},
        "update": {
            "gradients": 0 if offloaded else 4 * _weights(base_parameters(model)),
            "16-bit copies": copies // n if recompute else copies,
            "activations": activations + mask,
            "one layer or logits": max(again, logits + of_head)},
        "stage 2": {  # and the refresh; most where prompts are short
            "AdamW and gradients": 12 * _weights(model.reasoning_projector.parameters()),
            "16-bit copies": copied * V * D + copies,
            "activations": activations + mask,
            "one layer or logits": max(again, logits)},
        "scoring": {  # by a frozen model; keys and values are gone before the logits
            "a layer or logits": max((cached + passing) * positions + mask, copied * V * D + logits)}}


# ============================================================ what is free
def has_fixed_numbers(model):
    """A small model on a CPU: its rows and positions are fixed, so that a run is the same to the last bit,
    whatever else is in memory."""
    return model.device.type == "cpu" and is_small(model)


def free(device):
    """Bytes on a device that nobody uses; on CUDA the allocator's own reserve included, on a CPU the least
    that the machine and the control groups leave."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        stat = pathlib.Path("/proc/meminfo").read_text()
        machine = 1024 * int(re.search(r"MemAvailable: *(\d+)", stat)[1])
    except OSError:  # no Linux
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_left_in_control_groups()])


def _left_in_control_groups(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """[bytes] that the limits on this process's control groups leave, of both versions; [] without any."""
    paths = {"/"}  # in a container the root is its own group
    with contextlib.suppress(OSError):  # no Linux
        paths |= {line.split(":", 2)[2] for line in pathlib.Path(own).read_text().splitlines()}
    versions = ((f"{root}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
                (root, "memory.max", "memory.current"))
    left = []
    for (folder, *names), path in itertools.product(versions, paths):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
            group = pathlib.Path(folder + path)
            limit, used, stat = ((group / name).read_text() for name in (*names, "memory.stat"))
            files = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)[1]  # they can be read again
            left.append(int(limit) - int(used) + int(files))
    return left


# ============================================================ what fits
def largest(sizes, room, most, step):
    """The largest multiple n of `step` up to `most` whose sizes(n), {what: bytes}, fit in `room`; or 0."""
    return step * bisect.bisect(range(step, most + 1, step), room, key=lambda n: sum(sizes(n).values()))


def rows_that_fit(model, longest, limit, samples, most=512):
    """How many rows can be decoded at once, whole groups, in what is free now: at least one group. Of a small
    model on a CPU: `most`."""
    if has_fixed_numbers(model):
        return most
    fit = largest(lambda rows: needs(model, longest, 2 * rows // samples, rows, limit)["sampling"],
                  USABLE * free(model.device), most, samples)
    return max(samples, fit)


def positions_that_fit(model, longest, phase="scoring", otherwise=2**15, base_learns=False):
    """How many positions one forward pass of scoring or stage 2 can have in what is free now, in texts of up
    to `longest` tokens: at least that many. Of a small model on a CPU: `otherwise`. base_learns: AdamW on the
    base, too."""
    if has_fixed_numbers(model):
        return otherwise
    room = USABLE * free(model.device) - base_learns * 12 * _weights(base_parameters(model))
    recompute = getattr(model, "checkpointed", False)
    fit = largest(lambda n: needs(model, longest, positions=n, recompute=recompute)[phase],
                  room, MOST_POSITIONS[model.device.type], 256)
    return max(longest, fit)


def plan(model, longest, limit, n_prompts, num_generations, given, scorer=None, room=None):
    """The settings of memory for RL -> ({gen_batch_size, micro_batch_tokens, checkpoint_layers, offload}, the
    peaks to expect, as text). No choice changes a result.

    longest: tokens of the longest prompt. limit: slots per rollout. given: {name: what a flag says, or None}.
    scorer: the reward's frozen model. room: bytes that the run may use; default: what is free, and what the
    models have already. Tried from the fastest to the smallest: activations kept, layers checkpointed,
    masters and moments on the host (not on a CPU, which is the host)."""
    own, reader = (sum(p.nbytes for p in m.parameters()) if m else 0 for m in (model, scorer))
    room = room or free(model.device) + own + reader
    tries = {"offload": (False,) if model.device.type == "cpu" else (False, True),
             "checkpoint_layers": (False, True)}
    tries = [tried if given.get(name) is None else [given[name]] for name, tried in tries.items()]
    rows, positions = given.get("gen_batch_size"), given.get("micro_batch_tokens")
    group = rows or num_generations
    most_rows = rows or n_prompts * num_generations
    whole = longest + limit  # positions of one rollout with its prompt
    all_positions = n_prompts * (longest + num_generations * (limit + whole // COPIED))  # see scoring.pack
    most_positions = positions or min(MOST_POSITIONS[model.device.type], -(-all_positions // 256) * 256)

    def peaks(rows=0, positions=0):  # with what is tried below
        prompts = min(n_prompts, 2 * max(1, rows // num_generations))  # see Decoder
        phases = needs(model, longest, prompts, rows, limit, positions, recompute, offloaded)
        return {phase: {**held, **phases[phase]} for phase in ("sampling", "update")}

    for offloaded, recompute in itertools.product(*tries):
        held = {"weights": own - offloaded * 2 * _weights(model.model.layers.parameters()),
                "AdamW": 0 if offloaded else 8 * _weights(base_parameters(model)), "reader": reader}
        rows = largest(lambda n: peaks(rows=n)["sampling"], USABLE * room, most_rows, group)
        fit = largest(lambda n: peaks(positions=n)["update"], USABLE * room, most_positions, positions or 256)
        if rows >= min(FEW_ROWS, most_rows) and fit >= min(FEW_POSITIONS, 2 * whole, most_positions):
            break
    rows, positions = max(rows, group), max(fit, positions or whole)  # also if these may not fit
    settings = {"gen_batch_size": rows, "micro_batch_tokens": positions, "checkpoint_layers": recompute,
                "offload": offloaded}
    used = peaks(min(rows, n_prompts * num_generations), max(positions, whole))
    return settings, _forecast(*settings.values(), used, room)


def _forecast(rows, positions, recompute, offloaded, peaks, room):
    lines = [f"memory: {room / GIB:.1f} GiB can be used; with --gen-batch-size {rows} "
             f"--micro-batch-tokens {positions} --{'' if recompute else 'no-'}checkpoint-layers "
             f"--{'' if offloaded else 'no-'}offload the peaks should be:"]
    for phase, sizes in peaks.items():
        parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in sizes.items() if size >= 0.05 * GIB)
        lines.append(f"  {phase:9s} {sum(sizes.values()) / GIB:5.1f} GiB: {parts}")
    if any(sum(sizes.values()) > USABLE * room for sizes in peaks.values()):
        lines.append("this may not fit: leave the memory flags away, or shorten --max-new-tokens")
    return "\n".join(lines)
