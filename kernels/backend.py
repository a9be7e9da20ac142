"""Which kernels run: Triton's or their PyTorch twins. `use` decides once, before anything is compiled; every public
function of this folder then asks `triton_runs`.

Triton itself is imported by the triton_*.py files alone, and those only when they run: a machine without it has the
twins. Under TRITON_INTERPRET=1 the same kernels run on the CPU, slowly, for tests. Next: selfcheck.py, ../train.py.
"""

import contextlib
import importlib.util
import os
import statistics
import time
import warnings

import torch

from errors import UserError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_on = False


def use(choice, device, dtype, again=True):
    """Decide for this process: "torch", "triton", or "auto", which is Triton on CUDA if a short check against the twins
    passes (or has passed on this machine, if it need not be made again), and the twins elsewhere. Returns whether
    Triton's kernels will run."""
    global _on
    _on = False
    possible = importlib.util.find_spec("triton") is not None and (device.type == "cuda" or INTERPRETED)
    if choice == "triton":
        if not possible:
            raise UserError("kernels='triton' needs Triton and a CUDA device, or TRITON_INTERPRET=1 on a CPU "
                            "(slow, for tests); use kernels='auto'")
        if INTERPRETED and dtype != torch.float32:
            raise UserError("Triton's interpreter computes matmuls of 16-bit numbers wrongly: use --dtype=float32")
        _on = True
    elif choice == "auto" and possible and device.type == "cuda":
        from kernels import selfcheck, tuning
        passed = f"checked {dtype}"
        _on = not again and tuning.recall(device, passed) is True
        if not _on:
            found = selfcheck.failures(device, dtype)
            _on = not found
            if found:
                warnings.warn("Triton kernels failed their check, PyTorch runs instead: " + "; ".join(found),
                              stacklevel=2)
            else:
                tuning.remember(device, {passed: True})
    return _on


@contextlib.contextmanager
def running(on):
    """Within it Triton's kernels run, or do not, whatever was decided."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def running_now():
    """What was decided, for `running`."""
    return _on


def triton_runs(tensor):
    """Whether a Triton kernel should compute this tensor."""
    return _on and (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64


def milliseconds(function, device, rounds=8, warmup=3):
    """Median time of function(). On CUDA that of the device alone: the calls are queued while it is kept busy. Or the
    time would count that Python takes to launch small kernels, which a compiled or replayed model does not spend."""
    times = []
    for _ in range(warmup):
        synchronize()
        started = time.perf_counter()
        function()
        launched = time.perf_counter() - started
    for _ in range(rounds):
        synchronize()
        if torch.device(device).type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(4e9 * launched) + 1_000_000)  # cycles, of 2 GHz at most: twice the time to launch
            start.record()
            function()
            end.record()
            synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def synchronize():
    """Wait for what the GPU, if there is one, has been told so far."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
