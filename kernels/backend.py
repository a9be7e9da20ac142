"""Which kernels run: Triton's or their PyTorch twins. selfcheck.use decides once, before anything is compiled; every
public function of this folder then asks `triton_runs`.

Triton itself is imported by the triton_*.py files alone, and those only when they run: a machine without it has the
twins. Under TRITON_INTERPRET=1 the same kernels run on the CPU, slowly, for tests. Next: selfcheck.py, ../train.py.
"""

import contextlib
import os
import statistics
import time

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_on = False


def decide(on):
    """From now on Triton's kernels run, or do not; returns `on`."""
    global _on
    _on = on
    return on


@contextlib.contextmanager
def running(on):
    """Within it Triton's kernels run, or do not, whatever was decided."""
    before = _on
    decide(on)
    try:
        yield
    finally:
        decide(before)


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
