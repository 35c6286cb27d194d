"""The device of pretend/__init__.py. Import before torch."""
import ctypes
import functools
import gc
import os
import sys
import weakref

import pretend

TESTS = os.path.dirname(pretend.HERE)

# torch's C++ side: it answers what torch asks of a CUDA device, and must be there when torch is imported.
if "torch" in sys.modules:
    raise RuntimeError("torch has been imported before the pretended device")
library, torch_at = pretend.compiled_guard()
for below in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(os.path.join(torch_at, "lib", below), ctypes.RTLD_GLOBAL)
ctypes.CDLL(library)

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CARD = torch.device("cuda:0")
CPU = torch.device("cpu")


# ============================================================ what is counted
class Bytes:
    """Of the storages that are alive on the card, in the allocator's steps of 512."""

    now = peak = 0
    alive = {}  # of each storage what tells us of its end

    def born(self, t):
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = -(-storage.nbytes() // 512) * 512
        self.alive[key] = weakref.ref(storage, functools.partial(self.died, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def died(self, key, size, _):
        del self.alive[key]
        self.now -= size

    def reset_peak(self, *_):
        self.peak = self.now


BYTES = Bytes()
UNDER_WAY = []  # copies to the host that nobody has waited for: (where to, what)
EVENTS = []  # (the project's line, why), in order: the host waited for the device


def project_line():
    """FILE:LINE in FUNCTION of the project, tests aside; "backward" in the device's own thread."""
    frame = sys._getframe(1)
    while frame:
        code = frame.f_code
        if code.co_filename.startswith(pretend.ROOT) and not code.co_filename.startswith(TESTS):
            return f"{os.path.relpath(code.co_filename, pretend.ROOT)}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return "backward"


def waits(why):
    """The host stands still until the device has done all that was asked before."""
    EVENTS.append((project_line(), why))
    while UNDER_WAY:
        to_host, from_card = UNDER_WAY.pop(0)
        to_host.copy_(from_card)


# ============================================================ the tensor
class OnCard(torch.Tensor):
    """Says that it is on cuda:0; `inner` is a CPU tensor (or, see memory.py, one without numbers)."""

    @staticmethod
    def __new__(cls, inner):
        BYTES.born(inner)
        t = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=CARD)
        t.inner = inner
        return t

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})

    def __deepcopy__(self, memo):
        same = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        same._is_param = isinstance(self, torch.nn.Parameter)
        return same

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    def __reduce_ex__(self, protocol):  # in a file it is a plain tensor, as CUDA's are
        return self.inner.__reduce_ex__(protocol)

    # What saving a checkpoint compares, to find tied weights.
    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()


# ============================================================ one operation
def dispatch(op, args, kwargs):
    """Every operation of torch that reaches a device comes here."""
    if op is aten._pin_memory.default:
        return args[0].clone()
    if op is aten.is_pinned.default:
        return False
    on, off = [], []  # the tensors that it gets: on the card, and not
    inner_args = [_unwrapped(x, on, off) for x in args]
    inner_kwargs = {name: _unwrapped(x, on, off) for name, x in kwargs.items()}
    is_on_card = result_is_on_card(op, args, kwargs, on, off)
    waits_for_nobody = op is aten.copy_.default and on and not is_on_card and len(args) > 2 and args[2]
    if waits_for_nobody and not args[1].inner.is_meta:
        UNDER_WAY.append((args[0], args[1].inner.clone()))
        return args[0]
    if "device" in kwargs:
        inner_kwargs["device"] = CPU
    if kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    out = compute(op, inner_args, inner_kwargs, is_on_card)
    return _wrapped(out, on, is_on_card)


def compute(op, args, kwargs, is_on_card):
    """The operation on what the wrappers hold; memory.py has its own."""
    return op(*args, **kwargs)


def _unwrapped(x, on, off):
    """x with what the wrappers in it hold; lists the tensors."""
    kind = type(x)
    if kind is OnCard:
        on.append(x)
        return x.inner
    if kind is list or kind is tuple:
        return [_unwrapped(y, on, off) for y in x]
    if isinstance(x, torch.Tensor):
        off.append(x)
    return x


def _wrapped(x, on, is_on_card):
    if isinstance(x, torch.Tensor):
        for wrapper in on:
            if wrapper.inner is x:  # changed in place
                return wrapper
        return OnCard(x) if is_on_card else x
    if isinstance(x, (list, tuple)):
        return type(x)([_wrapped(y, on, is_on_card) for y in x])
    return x


INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
WRITING = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
           aten._unsafe_index_put.default}
# How many rows come out depends on the numbers, or a number goes to the host.
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
           aten._unique2.default, aten.bincount.default, aten.equal.default, aten.repeat_interleave.Tensor}
# A number of Python's is lifted on the host, as in torch.tensor(..).
LIFTING = {aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default}


def result_is_on_card(op, args, kwargs, on, off):
    """Whether the result is; raises what CUDA raises, and counts where the host waits."""
    asked = kwargs.get("device")
    asked_for_card = asked is not None and torch.device(asked).type == "cuda"
    if kwargs.get("generator") is not None and (asked_for_card or on):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if op is aten._to_copy.default:
        to_card = bool(on) if asked is None else asked_for_card
        _count_copy(bool(on), to_card, kwargs.get("non_blocking"))
        return to_card
    if asked is not None:
        return asked_for_card
    if not on:
        return False
    if op is aten.copy_.default:
        to_card = isinstance(args[0], OnCard)
        _count_copy(isinstance(args[1], OnCard), to_card, len(args) > 2 and args[2])
        return to_card
    if op in INDEXING or op in WRITING:
        return _check_indices(op, args)
    if off and op not in LIFTING:
        _check_mixture(op, args, on, off)
    if op in WAITING:
        waits(op.name().split("::")[1])
    return True


def _check_mixture(op, args, on, off):
    """A CPU tensor beside one on the card must be a single number, in an operation that takes numbers."""
    by_name = ("aten::_foreach", "aten::where", "aten::fill")
    takes_numbers = torch.Tag.pointwise in op.tags or op.name().startswith(by_name)
    writes_to_host = op._schema.is_mutable and any(args[0] is t for t in off)
    if writes_to_host or not takes_numbers or any(t.dim() for t in off):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op} found {on + off}")


def _count_copy(from_card, to_card, non_blocking):
    if from_card != to_card and not non_blocking:
        waits("copy from the card" if from_card else "copy to the card")


def _check_indices(op, args):
    if not isinstance(args[0], OnCard):
        raise RuntimeError(f"{op} of a CPU tensor with indices or values on the card")
    for index in args[1]:
        if index is None:
            continue
        if not isinstance(index, OnCard):
            _count_copy(False, True, False)
        elif index.dtype in (torch.bool, torch.uint8):
            waits("index by a mask")
    if op in WRITING and not isinstance(args[2], OnCard) and args[2].dim():
        raise RuntimeError(f"{op} of a tensor on the card with values on the CPU")
    return True


class Everywhere(TorchDispatchMode):
    """Operations without an argument on the card, such as torch.zeros(2, device="cuda")."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


# ============================================================ torch.cuda
def install():
    """From now on, in this process, torch has the device."""
    gc.freeze()  # what has been imported need not be searched each time garbage is collected
    answers = {
        "_lazy_init": None, "is_available": True, "is_initialized": True, "is_bf16_supported": True,
        "device_count": 1, "current_device": 0, "get_device_capability": (9, 0), "empty_cache": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.mem_get_info = lambda *_: (80 * 2**30 - BYTES.now, 80 * 2**30)
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = lambda *_: BYTES.now
    torch.cuda.max_memory_allocated = lambda *_: BYTES.peak
    torch.cuda.reset_peak_memory_stats = BYTES.reset_peak
    torch.cuda.synchronize = lambda *_: waits("synchronize")
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # A module that is moved keeps its parameters, and so its ties.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    Everywhere().__enter__()
