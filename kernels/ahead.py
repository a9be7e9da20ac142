"""Compile Triton's kernels before they are needed, in other processes, while the run reads its data. Nothing depends on
it: what no worker has done, the run compiles itself. Next: triton_ahead.py (a worker), selfcheck.py (the orders).
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from errors import said

WORKERS = 8  # of one kind, at most; each may hold a CUDA context
_running, _threads = {}, []  # {name: processes}, of wake_inductor


def shares(calls, dtype):
    """Orders for triton_ahead.compile_share: one for every core but one that is free yet, WORKERS at most."""
    count = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1 - sum(map(len, _running.values()))))
    return [[calls, str(dtype).removeprefix("torch."), part, count] for part in range(count)]


def start(what, function, orders, device):
    """Start a process for each of the orders, unless there are some of that name: it calls function, "module:name",
    with them as arguments, which has the CUDA device then."""
    if what in _running:
        return
    root, (module, name) = str(Path(__file__).resolve().parents[1]), function.split(":")
    index = torch.cuda.current_device() if device.index is None else device.index
    code = (f"import sys; sys.path.insert(0, {root!r}); from kernels import ahead; from {module} import {name}; "
            f"ahead.serve({name}, {index})")
    _running[what] = [subprocess.Popen([sys.executable, "-c", code, json.dumps(order)], stdin=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL) for order in orders]


def serve(function, index):
    """What such a process does. It ends with the one that started it."""
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
    try:
        torch.cuda.set_device(index)
        function(*json.loads(sys.argv[-1]))
    except Exception as error:  # out of memory, or whatever the run will meet and tell in full
        sys.exit(f"kernels: {function.__name__} in a process of its own failed ({said(error)}): the run does it itself")


def finish(what, patience):
    """Wait for the processes of that name, at most so many seconds for all of them, and say how long that was."""
    started, late, processes = time.monotonic(), 0, _running.pop(what, ())
    while _threads:
        _threads.pop().join()
    for process in processes:
        try:
            process.wait(max(0.0, started + patience - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
        process.stdin.close()
    if processes:
        print(f"kernels: waited {time.monotonic() - started:.1f} s for {len(processes)} processes that compile {what}"
              + f"; {late} were not done, the run compiles what is missing" * bool(late), flush=True)


def wake_inductor():
    """Import torch.compile's back end and let it start its own processes before it is needed; `finish` waits for the
    thread: two must not import the same."""
    def wake():
        importlib.import_module("torch._inductor.compile_fx")
        from torch._inductor.async_compile import AsyncCompile
        AsyncCompile.warm_pool()
        AsyncCompile.wakeup()
    _threads.append(threading.Thread(target=wake, daemon=True))
    _threads[-1].start()
