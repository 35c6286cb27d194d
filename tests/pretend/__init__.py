"""A pretended CUDA device, so that what runs on a GPU can be tested on a machine without one.

    pretend.why_not()            None, or why there is no such device here: one line, for pytest.skip
    pretend.run(f, *args)        f(*args) in a process that has the device -> (its result, what it printed)
    pretend.device, .memory      in such a process: the device, and peak bytes at real shapes

A tensor on it says that it is on cuda:0 and keeps its numbers on the CPU. It has CUDA's dispatch keys, so
torch itself applies CUDA's autocast rules and runs the backward pass in the device's thread; an operation
that mixes devices is refused, as CUDA refuses it. Not covered: CUDA's kernels and their rounding, which of
them torch chooses, speed.

torch must not have been imported before the device is there, so each f, a function of a test module, runs in
a process of its own: forked from a server that has imported torch, transformers and this project once.
"""
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


@functools.cache
def why_not():
    """None if the device works here, else the reason: it takes Linux, g++, and torch's CPU wheels."""
    from torch.version import cuda

    if cuda:
        return "the pretended CUDA device needs a torch built without CUDA, such as the CPU wheels"
    try:
        run(bool)
    except Exception as e:  # no g++, or whatever of torch's inside has moved
        return f"there is no pretended CUDA device here: {str(e).strip() or type(e).__name__}"
    return None


def compiled_guard():
    """guard.cpp as a library, compiled once for torch's version -> (its path, torch's directory)."""
    torch_at = importlib.util.find_spec("torch").submodule_search_locations[0]
    source = os.path.join(HERE, "guard.cpp")
    library = os.path.join(HERE, "__pycache__", f"guard-{importlib.metadata.version('torch')}.so")
    if not os.path.exists(library) or os.path.getmtime(library) < os.path.getmtime(source):
        os.makedirs(os.path.dirname(library), exist_ok=True)  # Python may have been told to write no bytecode
        new = f"{library}.{os.getpid()}"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-I", f"{torch_at}/include", source, "-o", new,
                   "-L", f"{torch_at}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, capture_output=True, check=True)
        os.rename(new, library)
    return library, torch_at


def run(function, *args):
    """function(*args) in a new process that has the device -> (result, what it printed), or its exception."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=_server(), max_tasks_per_child=1) as pool:
        return pool.submit(_captured, function, args).result()


@functools.cache
def _server():
    """Started once; from then on a process that has imported everything is a fork away."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretend.device", "pretend.memory", "train_rl", "results.baselines"])
    with pytest.MonkeyPatch.context() as patch:  # for those imports
        patch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.path.dirname(HERE), *sys.path]))
        multiprocessing.forkserver.ensure_running()
    return context


def _captured(function, args):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        from pretend import device
        device.install()
        try:
            result = function(*args)
        except SystemExit as e:  # a script's way to end in one line
            raise RuntimeError(f"{printed.getvalue()}\nexit status {e.code}") from None
    return result, printed.getvalue()
