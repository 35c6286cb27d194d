"""Peak memory at real shapes, on the pretended device, in seconds: floats have shapes but no numbers.

    memory.without_numbers()    from now on, in this process
    memory.peak(run)            run() -> bytes on the card at most

Integers and masks keep their numbers, so prompts, rows and slots are what they are; one that follows from
floats is zero (a sampled token) or true (a finite gradient). The bytes are those of live tensors, with what
fused attention keeps; a kernel's own scratch memory and the allocator's gaps are not among them.
"""
import gc

import torch

from pretend import device
from pretend.device import BYTES, aten

LARGE = 2**24  # integers and masks beyond so many elements lose their numbers, too
MANY = 2**20  # from so many on, floats copied to the host take no memory there


def without_numbers():
    device.compute = compute
    torch.nn.functional.scaled_dot_product_attention = attention


def peak(run):
    gc.collect()
    BYTES.reset_peak()
    run()
    return BYTES.peak


# ============================================================ one operation
def compute(op, args, kwargs, is_on_card):
    tensors = []
    _each([*args, *kwargs.values()], tensors.append)
    unknown = any(t.is_meta for t in tensors)
    if not unknown and not is_on_card:
        return op(*args, **kwargs)
    floats = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
    if not tensors and floats and "arange" not in op.name():  # torch.empty(..) and the like
        return op(*args, **{**kwargs, "device": "meta"})
    if not unknown:
        return _each(op(*args, **kwargs), _numbers_forgotten)

    if op is aten._local_scalar_dense.default:
        return 1.0 if tensors[0].is_floating_point() else 0
    if op._schema.is_mutable and not tensors[0].is_meta:  # numbers that are known stay
        return tensors[0]
    to_meta = lambda t: t.to("meta")
    args = _each(_masks_as_indices(op, args), to_meta)
    kwargs = {name: _each(value, to_meta) for name, value in kwargs.items() if name != "generator"}
    if "device" in kwargs:
        kwargs["device"] = "meta"
    return _each(_as_before(op, args, kwargs), _integers_known if is_on_card else _on_the_host)


MADE = {}  # what an operation has made of such shapes: layers are alike, and finding out is slow


def _as_before(op, args, kwargs):
    is_view = op is aten._unsafe_view.default or any(out.alias_info for out in op._schema.returns)
    if is_view:  # or changes what it gets
        return op(*args, **kwargs)
    key = repr((op, _each([args, *kwargs.items()], lambda t: (t.shape, t.stride(), t.dtype))))
    if key not in MADE:
        MADE[key] = op(*args, **kwargs)
    return _each(MADE[key], lambda t: t.new_empty_strided(t.shape, t.stride()))


def _each(x, change):
    """x with every tensor in it changed."""
    if isinstance(x, torch.Tensor):
        return change(x)
    return type(x)([_each(y, change) for y in x]) if isinstance(x, (list, tuple)) else x


def _numbers_forgotten(t):
    """After an operation whose inputs were all known."""
    if t.is_meta or (not t.is_floating_point() and t.numel() <= LARGE):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _integers_known(t):
    """After one whose inputs were not: zeros, or true."""
    if not t.is_meta or t.is_floating_point() or t.numel() > LARGE:
        return t
    return torch.full(t.shape, t.dtype == torch.bool, dtype=t.dtype)


def _on_the_host(t):
    """What is copied to the host: zeros, in no memory where they are many."""
    if not t.is_meta:
        return t
    return torch.zeros(() if t.numel() >= MANY else t.shape, dtype=t.dtype).expand(t.shape)


def _masks_as_indices(op, args):
    """How many rows a mask chooses is known, if the mask is."""
    if op not in device.INDEXING and op not in device.WRITING:
        return args
    indices = []
    for index in args[1]:
        is_known = index is not None and index.dtype == torch.bool and not index.is_meta
        indices += index.nonzero().unbind(1) if is_known else [index]
    return [args[0], indices, *args[2:]]


# ============================================================ fused attention
class Fused(torch.autograd.Function):
    """Keeps queries, keys, values and one number per query, not the weights."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = q.new_empty(q.shape)
        totals = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, totals)
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, _, _, totals = ctx.saved_tensors
        delta = torch.empty_like(totals)  # of the kernel, while it runs
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
        del delta
        return gradients


def attention(q, k, v, attn_mask=None, **_):
    """As CUDA's kernels want it, or they would need more: in 16 bits, with a mask whose rows are aligned."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert attn_mask is None or all(stride % 16 == 0 for stride in attn_mask.stride()[:-1])
    return Fused.apply(q, k, v, attn_mask)
