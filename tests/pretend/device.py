"""The device of pretend/__init__.py. Import before torch."""
import collections
import contextlib
import ctypes
import functools
import gc
import os
import sys
import types
import weakref

import pretend

ROOT = pretend.ROOT
TESTS = os.path.dirname(pretend.HERE)


# ============================================================ torch's C++ side
def load_guard():
    """Loads guard.cpp below torch: what it answers is asked for when torch is imported."""
    if "torch" in sys.modules:
        raise RuntimeError("torch has been imported before the pretended device")
    library, torch_at = pretend.compiled_guard()
    for below in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(os.path.join(torch_at, "lib", below), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


load_guard()

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CARD = torch.device("cuda:0")
CPU = torch.device("cpu")


# ============================================================ what is counted
class Bytes:
    """Of the storages that are alive on the card; a step of the allocator is 512 bytes."""

    def __init__(self):
        self.now = 0
        self.peak = 0
        self.peak_at = "?"  # the project's line
        self.total = 80 * 2**30  # of the card
        self.alive = {}  # of each storage: (its size, what tells us of its end)

    def born(self, t):
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = -(-storage.nbytes() // 512) * 512
        if self.now + size > self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**30:.2f} GiB (pretended)")
        self.alive[key] = size, weakref.ref(storage, functools.partial(self._died, key))
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self.peak_at = project_line()

    def _died(self, key, _):
        size, _ = self.alive.pop(key)
        self.now -= size

    def reset_peak(self, *_):
        self.peak = self.now


BYTES = Bytes()
UNDER_WAY = []  # copies to the host that nobody has waited for: (where to, what); read too early, the old numbers are there
EVENTS = []  # (the project's line, what happened there), in order: the host waited for the device, or sent it a copy
PRODUCTS = collections.Counter()  # type -> matrix products on the card


def project_line():
    """FILE:LINE in FUNCTION of the project, tests aside, that is running; "backward" in the device's own thread."""
    frame = sys._getframe(1)
    while frame:
        code = frame.f_code
        if code.co_filename.startswith(ROOT) and not code.co_filename.startswith(TESTS):
            return f"{os.path.relpath(code.co_filename, ROOT)}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back
    return "backward"


def waits(why):
    """The host needs a number from the device, or its memory: it stands still until all that was asked before is done."""
    if RECORDING:
        raise RuntimeError(f"operation not permitted when stream is capturing ({why})")
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
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CARD)
        t.inner = inner
        return t

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})

    def __repr__(self):
        return f"OnCard({self.inner!r})"

    def __deepcopy__(self, memo):
        same = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            same._is_param = True
        memo[id(self)] = same
        return same

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, new):
        if not isinstance(new, OnCard):
            raise RuntimeError("incompatible tensor type: .data of a tensor on the card is set to one that is not")
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    # What saving a checkpoint compares, to find tied weights.
    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def record_stream(self, stream):
        pass

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
    if op is aten.copy_.default and on and not is_on_card and len(args) > 2 and args[2] and not args[1].inner.is_meta:
        UNDER_WAY.append((args[0], args[1].inner.clone()))
        return args[0]
    if "device" in kwargs:
        inner_kwargs["device"] = CPU
    if kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    out = compute(op, inner_args, inner_kwargs, is_on_card)
    return _wrapped(out, on, is_on_card)


def compute(op, args, kwargs, is_on_card):
    """The operation on what the wrappers hold."""
    out = op(*args, **kwargs)
    if RECORDING and is_on_card:
        RECORDING[-1].append((op, args, kwargs, out))
    return out


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
                if wrapper.shape != x.shape:
                    raise NotImplementedError("pretended device: an operation changes a shape in place")
                return wrapper
        return OnCard(x) if is_on_card else x
    if isinstance(x, (list, tuple)):
        return type(x)([_wrapped(y, on, is_on_card) for y in x])
    return x


INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
WRITING = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
           aten._unsafe_index_put.default}
MATRIX_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default,
                   aten.addmv.default, aten.dot.default}
# How many rows come out depends on the numbers, or a number goes to the host.
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
           aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
           aten.bincount.default, aten.equal.default, aten.repeat_interleave.Tensor}
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
    if op in MATRIX_PRODUCTS:
        kinds = {t.dtype for t in on}
        if len(kinds) > 1 or not on[0].is_floating_point():
            raise RuntimeError(f'"{op}" is not implemented on CUDA for {kinds}')
        PRODUCTS[on[0].dtype] += 1
    elif op in WAITING:
        waits(op.name().split("::")[1])
    return True


def _check_mixture(op, args, on, off):
    """A CPU tensor beside one on the card must be a single number, in an operation that takes numbers."""
    takes_numbers = torch.Tag.pointwise in op.tags or op.name().startswith(("aten::_foreach", "aten::where", "aten::fill"))
    writes_to_host = op._schema.is_mutable and any(args[0] is t for t in off)
    if writes_to_host or not takes_numbers or any(t.dim() for t in off):
        found = [(str(t.device), tuple(t.shape)) for t in on + off]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op} found {found}")


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

    @classmethod
    def _should_skip_dynamo(cls):  # else torch wraps what follows, which takes a tenth of the time
        return False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatch(op, args, kwargs or {})


# ============================================================ streams, events, graphs
# All that is asked of the device is done at once: there is nothing to wait for.
RECORDING = []  # while a graph is recorded: its operations


class Stream:
    device = CARD

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    def synchronize(self):
        waits("synchronize")


class Event:
    def __init__(self, *_, **__):
        pass

    def record(self, stream=None):
        pass

    wait = record

    def query(self):
        return True

    def synchronize(self):
        waits("synchronize")

    def elapsed_time(self, end):
        return 0.0


class Graph:
    """A recording of operations on tensors that stay where they are; `replay` computes them again into the same memory."""

    replays = 0  # of all graphs

    def __init__(self, *_, **__):
        self.operations = []

    def replay(self):
        Graph.replays += 1
        for op, args, kwargs, out in self.operations:
            again = op(*args, **kwargs)
            for old, new in zip(_listed(out), _listed(again)):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:  # a view sees the new numbers by itself
                    old.copy_(new)

    def reset(self):
        self.operations = []


def _listed(out):
    return out if isinstance(out, (list, tuple)) else [out]


@contextlib.contextmanager
def recording(graph, *_, **__):
    RECORDING.append(graph.operations)
    try:
        yield
    finally:
        RECORDING.pop()


@contextlib.contextmanager
def inside(*_, **__):
    yield


# ============================================================ torch.cuda
def install():
    """From now on, in this process, torch has the device."""
    gc.freeze()  # what has been imported need not be searched each time garbage is collected
    cuda = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.get_device_name = lambda *_: "pretended card"
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        name="pretended card", total_memory=BYTES.total, major=9, minor=0, multi_processor_count=132)
    cuda.mem_get_info = lambda *_: (BYTES.total - BYTES.now, BYTES.total)
    cuda.memory_allocated = cuda.memory_reserved = lambda *_: BYTES.now
    cuda.max_memory_allocated = cuda.max_memory_reserved = lambda *_: BYTES.peak
    cuda.memory_stats = lambda *_: {"allocated_bytes.all.current": BYTES.now, "allocated_bytes.all.peak": BYTES.peak}
    cuda.reset_peak_memory_stats = BYTES.reset_peak
    cuda.empty_cache = lambda: None
    cuda.synchronize = lambda *_: waits("synchronize")
    cuda.Stream, cuda.Event, cuda.CUDAGraph = Stream, Event, Graph
    cuda.current_stream = cuda.default_stream = lambda *_: Stream()
    cuda.stream = cuda.device = inside
    cuda.set_stream = lambda stream: None
    cuda.graph_pool_handle = lambda: (0, 0)
    cuda.graph = recording
    cuda.is_current_stream_capturing = lambda: bool(RECORDING)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # A module that is moved keeps its parameters, and so its ties.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    Everywhere().__enter__()
