"""Less memory for the update, and how much fits; a first reading can skip it.

    checkpoint_layers, offload    less memory for the update
    fit                           the plan of a run
"""
import copy
import functools
import itertools
import os
import re
import types

import torch
import torch.utils.checkpoint

from lib import kv_cache
from lib.checkpoint import is_small
from lib.scoring import LOGITS


# ============================================================ training: less memory
def checkpoint_layers(model):
    """From now on a layer's activations are not kept for the backward pass but computed again: far less
    memory, a third more time.

    transformers' own switch turns the cache off; ours hands each layer the cache as it stood, so running it
    twice is harmless."""
    model.checkpointed = True
    for i, layer in enumerate(model.model.layers):
        layer.forward = functools.partial(_recomputed, layer.forward, i)


def _recomputed(layer, i, x, past_key_values=None, **kwargs):
    cache = past_key_values
    if not torch.is_grad_enabled() or not isinstance(cache, (kv_cache.PromptCache, kv_cache.ScoringCache)):
        return layer(x, past_key_values=cache, **kwargs)

    def copied(cache):
        copy_of_it = copy.copy(cache)
        copy_of_it.layers = list(cache.layers)
        return copy_of_it

    before = copied(cache)

    def run(x):
        view = copied(before)
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


def freeze(model):
    """For a model that is never trained: on CUDA its matrices are kept only as autocast would cast them, half
    the memory and the same numbers."""
    model.requires_grad_(False)
    if model.bf16:
        for weight in matrices(model):
            weight.data = weight.data.to(torch.bfloat16)
    return model


def offload(model, parameters):
    """What the optimizer needs of `parameters` moves to the host: -> fp32 masters to step on.

    On the card the matrices stay as autocast would cast them, so that all products are those of fp32 weights.
    A gradient is sent to the host as soon as it is whole, through a page-locked buffer and without waiting
    for it. Call wait_for_gradients after each backward pass; the next one adds what has come to the masters'
    gradients, in fp32, while the card works, and gradients_to_masters adds the last."""
    masters = [p.detach().to("cpu", torch.float32, copy=True).requires_grad_() for p in parameters]
    model.bf16 = True
    for weight in matrices(model):
        weight.data = weight.data.to(torch.bfloat16)
    for p, master in zip(parameters, masters):
        p.master = master
        p.on_host = torch.empty(p.shape, dtype=p.dtype, pin_memory=p.device.type == "cuda")
        p.is_sent = False  # a gradient is on its way to on_host, or there
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
    is_offloaded = any(hasattr(p, "master") for p in model.parameters())
    if is_offloaded and model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def gradients_to_masters(parameters, masters):
    """After the last backward pass of a step; nothing to do without `offload`."""
    if masters is not parameters:
        for p in parameters:
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
    if masters is parameters:
        return
    for p, master in zip(parameters, masters):
        p.on_host.copy_(master.detach())
        p.data.copy_(p.on_host, non_blocking=True)

GIB = 2.0**30
USABLE = 0.92  # of the memory: the allocator's gaps, cuBLAS and cuDNN need some
AGAIN = 1.75  # a layer's activations made again, and their gradients, in units of the former
MOST_POSITIONS = 2**15  # per forward pass; more would not be faster
# Fewer make passes short: checkpointed layers or the host's memory are taken first. A CPU gains nothing by
# more.
FEW_POSITIONS = 2**13
FEW_ROWS = 64  # the same of sampling


# ============================================================ shapes
def shape(model):
    """The sizes that the counts below are made of."""
    config = model.config
    s = types.SimpleNamespace()
    s.layers = config.num_hidden_layers
    s.D = config.hidden_size
    s.I = config.intermediate_size
    s.V = config.vocab_size
    d = getattr(config, "head_dim", None) or s.D // config.num_attention_heads
    s.H = config.num_attention_heads
    s.heads = s.H * d
    s.kv = 2 * config.num_key_value_heads * d
    s.c = 2 if model.bf16 else 4
    s.copied = 2 if model.bf16 else 0  # of a weight
    s.most_positions = MOST_POSITIONS if model.device.type == "cuda" else FEW_POSITIONS
    s.projector = _parameters(model.reasoning_projector)
    s.base = _parameters(model) - s.projector
    s.in_layers = _parameters(model.model.layers)
    s.cached = s.layers * s.kv * s.c  # bytes of one position's keys and values, in all layers
    # One layer's activations of one position. Kept for the backward pass: inputs and outputs of its norms
    # (two, in Gemma 3 four), five copies of the latter for five matrices, queries and attention's output,
    # keys and values, the MLP's four; in Qwen3 and Gemma 3 what the norms of queries and keys keep, as
    # counted.
    layer = model.model.layers[-1]
    norms = sum("norm" in name for name, _ in layer.named_children())
    s.kept = 8 * norms * s.D + s.c * (5 * s.D + 2 * s.heads + s.kv + 4 * s.I)
    if hasattr(layer.self_attn, "q_norm"):
        s.kept += 10 * (s.heads + s.kv // 2)
    # Without gradients, at the worst moment: residual, norm and its copy, three of the MLP's.
    s.passing = (8 + s.c) * s.D + 3 * s.c * s.I
    return s


def _parameters(module):
    return sum(p.numel() for p in module.parameters())


def weights(s, offload=False):
    """Bytes of the weights on the card; offloaded, the layers' are there in 16 bits."""
    per_weight = s.c if offload else 4
    return per_weight * s.in_layers + 4 * (s.base - s.in_layers + s.projector)


def casts(s, offload=False):
    """Bytes of the matrices' copies in the type in which they are multiplied; in fp32 there are none."""
    head = s.copied * s.V * s.D
    return head if offload else head + s.copied * s.in_layers


def _logits(s, positions):
    """Bytes while log-probs are computed, LOGITS numbers at a time."""
    return (4 + s.c) * min(LOGITS, positions * s.V)


# ============================================================ what is there at a peak
def resident(s, offload=False, scorer=None):
    """What train_rl.py holds all the time; with the reward's frozen reader, if there is one."""
    held = {"weights": weights(s, offload), "AdamW": 0 if offload else 8 * s.base}
    if scorer is not None:
        held["reader"] = weights(shape(scorer), offload=True)
    return held


def sampling(s, rows, prompts, longest, limit, offload=False):
    """While `rows` rows are decoded, up to `limit` slots each, with `prompts` prompts of `longest` tokens in
    memory."""
    prefill = s.passing * min(max(kv_cache.PREFILL, longest), prompts * longest)
    logits = (s.c + 16) * rows * s.V  # and four tensors of that size to draw from them
    attention = 5 * s.c * rows * (s.H * longest + 2 * s.heads)
    return {
        "16-bit copies": casts(s, offload),
        "keys and values": s.cached * (rows * limit + prompts * longest),
        "one step": max(prefill, logits + attention)}


def update(s, positions, longest, checkpoint=False, offload=False):
    """While gradients are added up: `positions` in one forward and backward pass, rows of up to `longest`.

    A row's copies of its prompt's keys count as positions, see scoring.pack."""
    mask = s.c * positions * longest
    head = s.V * s.D
    # The LM head's 16-bit copy, its gradient in chunks, and the embedding's, which is the same tensor.
    logits = (s.copied + 2 * s.c + 8) * head + _logits(s, positions)
    if checkpoint:  # each layer's input, keys and values; one layer's activations are made again
        kept = s.layers * (4 * s.D + s.c * s.kv) * positions
        working = max(logits, AGAIN * s.kept * positions)
        copies = s.copied * s.in_layers // s.layers
    else:
        kept = s.layers * s.kept * positions
        working = logits
        copies = 0 if offload else s.copied * s.in_layers
    return {
        "gradients": 0 if offload else 4 * s.base,  # offloaded, each goes to the host when it is whole
        "16-bit copies": copies,
        "activations": kept + mask,
        "one layer or logits": working}


def latent_update(s, positions, longest, checkpoint=False, offload=False, own=None, base_learns=False):
    """The same for the projector (stage 2, refresh): the base is frozen, but with --train-base, and prompts
    leave nothing but keys and values.

    own: of the positions those that are no prompt's; at most, and by default, all."""
    own = positions if own is None else own
    like_update = update(s, own, longest, checkpoint, offload)
    logits = _logits(s, own)
    working = max(logits, AGAIN * s.kept * own) if checkpoint else logits
    return {
        "AdamW and gradients": 12 * (s.projector + base_learns * s.base),
        "16-bit copies": casts(s, offload),
        "keys and values": s.cached * (positions - own),
        "activations": like_update["activations"],
        "one layer or logits": working}


def while_scoring(s, positions, longest, own=None):
    """While a frozen model scores texts without gradients, `positions` in one forward pass of the prompts and
    one of what follows. own: as above."""
    own = positions if own is None else own
    layers = s.cached * positions + s.passing * max(own, positions - own) + s.c * own * longest
    head = s.copied * s.V * s.D + _logits(s, own)  # then keys and values are gone
    return {"keys and values and a layer, or logits": max(layers, head)}


def total(*sizes):
    return sum(sum(own.values()) for own in sizes)


# ============================================================ what fits
def largest(fits, most, step=1):
    """The largest multiple of `step` up to `most` for which fits(n) is true; 0 if there is none."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle - 1
    return low * step


def has_fixed_numbers(model):
    """A small model on a CPU: its rows and positions are fixed, so that a run is the same to the last bit,
    whatever else is in memory."""
    return model.device.type == "cpu" and is_small(model)


def free(device):
    """Bytes on a device that nobody uses; on CUDA the allocator's own reserve included."""
    if device.type == "cpu":
        return min([_available(), *_left_in_control_groups()])
    try:
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    except (AttributeError, RuntimeError):  # a driver that does not say
        return torch.cuda.get_device_properties(device).total_memory - torch.cuda.max_memory_allocated(device)


def _available():
    """Bytes that this machine can give without swapping."""
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", _text("/proc/meminfo"))[1])
    except OSError:  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_control_groups(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """-> [bytes] that the limits on this process's control groups leave, of both versions; [] without any.
    Files that can be read again do not count."""
    try:
        paths = {line.split(":", 2)[2] for line in _text(own).splitlines()}
    except OSError:
        return []
    left = []
    for folder, limit, used in ((root, "memory.max", "memory.current"),
                                (f"{root}/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        for path in paths | {"/"}:  # in a container the root is its own group
            try:
                most, now, stat = (_text(f"{folder}{path}/{name}") for name in (limit, used, "memory.stat"))
                files = int(re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)[1])
                left.append(int(most) - int(now) + files)
            except (OSError, ValueError):  # no such group, or "max": no limit
                pass
    return left


def _text(path):
    with open(path) as f:
        return f.read()


def rows_that_fit(model, longest, limit, samples, otherwise=512):
    """How many rows can be decoded at once, whole groups, in what is free now: at least one group. Of a small
    model on a CPU: `otherwise`."""
    if has_fixed_numbers(model):
        return otherwise
    s = shape(model)
    room = USABLE * free(model.device)

    def fits(rows):
        prompts = 2 * (rows // samples)
        return total(sampling(s, rows, prompts, longest, limit)) <= room

    return max(samples, largest(fits, max(otherwise, samples), samples))


def positions_that_fit(model, longest, of=while_scoring, otherwise=2**15, **settings):
    """How many positions one forward pass of scoring (or latent_update) can have in what is free now; at
    least the longest text. Of a small model on a CPU: `otherwise`."""
    if has_fixed_numbers(model):
        return otherwise
    s = shape(model)
    room = USABLE * free(model.device)
    positions = largest(lambda n: total(of(s, n, longest, **settings)) <= room, s.most_positions, 256)
    return max(longest, positions)


# ============================================================ the plan of a run
def fit(args, model, longest, scorer=None, room=None):
    """Sets what no flag gave of args.rows, tokens_per_forward, checkpoint_layers and offload
    -> what to print.

    longest: tokens of the longest prompt. scorer: the reward's frozen model, or None. room: bytes that the
    run may use; default: what is free, and what the models have already. From the fastest to the smallest:
    activations kept, layers checkpointed, masters and moments on the host (not on a CPU, which is the host).
    No choice changes a result."""
    if room is None:
        held = sum(p.numel() * p.element_size() for m in (model, scorer) if m for p in m.parameters())
        room = free(model.device) + held
    s = shape(model)
    whole = longest + args.max_new_tokens  # positions of one rollout with its prompt
    usable = USABLE * room
    if model.device.type == "cpu" and args.offload is None:
        args.offload = False
    offloads, checkpoints = ((False, True) if flag is None else (flag,)
                             for flag in (args.offload, args.checkpoint_layers))
    for offload, checkpoint in itertools.product(offloads, checkpoints):
        chosen = _numbers(args, s, longest, whole, usable, scorer, checkpoint, offload)
        positions_enough = chosen.tokens_per_forward >= min(FEW_POSITIONS, 2 * whole)
        rows_enough = chosen.rows >= min(FEW_ROWS, args.prompts * args.group)
        if positions_enough and rows_enough:
            break
    for name, value in vars(chosen).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    # What fits in no setting is tried in the smallest.
    args.tokens_per_forward = max(args.tokens_per_forward, 1) if args.tokens_per_forward else whole
    args.rows = args.rows or args.group
    return forecast(args, model, longest, scorer, room)


def _numbers(args, s, longest, whole, usable, scorer, checkpoint, offload):
    """The most rows and positions that fit beside this choice; 0 for none."""
    held = resident(s, offload, scorer)

    def can_update(positions):
        size = update(s, positions, whole, checkpoint, offload)
        return total(held, size) <= usable and positions >= whole

    def can_sample(rows):
        prompts = min(args.prompts, 2 * rows // args.group)
        return total(held, sampling(s, rows, prompts, longest, args.max_new_tokens, offload)) <= usable

    positions = args.tokens_per_forward
    if positions is None:
        own = args.max_new_tokens + whole // 16  # of a rollout, as scoring.pack counts
        batch = args.prompts * (longest + args.group * own)
        most = max(min(s.most_positions, batch), whole)
        positions = largest(lambda n: n < whole or can_update(n), most, min(256, most))
        positions = positions if can_update(positions) else 0
    rows = args.rows
    if rows is None:
        rows = largest(can_sample, args.prompts * args.group, args.group)
    return types.SimpleNamespace(rows=rows, tokens_per_forward=positions, checkpoint_layers=checkpoint,
                                 offload=offload)


def peaks(args, model, longest, scorer=None):
    """{phase: {what: bytes}} of a run of train_rl.py with these settings, everything included."""
    s = shape(model)
    held = resident(s, args.offload, scorer)
    whole = longest + args.max_new_tokens
    positions = max(args.tokens_per_forward, whole)
    prompts = min(args.prompts, 2 * max(1, args.rows // args.group))
    rows = min(args.rows, args.prompts * args.group)
    lean = (args.checkpoint_layers, args.offload)
    found = {
        "sampling": sampling(s, rows, prompts, longest, args.max_new_tokens, args.offload),
        "update": update(s, positions, whole, *lean)}
    if args.method == "litereason":
        own = positions * args.max_new_tokens // whole
        found["refresh"] = latent_update(s, positions, whole, *lean, own)
    return {phase: {**held, **sizes} for phase, sizes in found.items()}


def forecast(args, model, longest, scorer, room):
    """The settings of memory and the expected peaks, as text; with a line of advice if they do not fit."""
    flags = [f"--rows {args.rows}", f"--tokens-per-forward {args.tokens_per_forward}"]
    flags.append("--checkpoint-layers" if args.checkpoint_layers else "--no-checkpoint-layers")
    flags.append("--offload" if args.offload else "--no-offload")
    lines = [f"memory: {room / GIB:.1f} GiB can be used; with {' '.join(flags)} the peaks should be:"]
    highest = 0
    for phase, sizes in peaks(args, model, longest, scorer).items():
        highest = max(highest, total(sizes))
        parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in sizes.items() if size >= 0.05 * GIB)
        lines.append(f"  {phase:9s} {total(sizes) / GIB:5.1f} GiB: {parts}")
    if highest > USABLE * room:
        is_smallest = args.checkpoint_layers and (args.offload or model.device.type == "cpu")
        lines.append("this may not fit: shorten --max-new-tokens, or take a smaller --model"
                     if is_smallest and args.rows <= args.group else
                     "this may not fit: leave the memory flags away, or lower --rows and "
                     "--tokens-per-forward")
    return "\n".join(lines)
