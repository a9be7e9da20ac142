"""Compile Triton's kernels before they are needed, in other processes, while the run reads its data. Nothing depends on
it: what no worker has done, the run compiles itself. Next: triton_ahead.py (a worker), selfcheck.py (the orders).
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from errors import said

WORKERS = 14  # that compile kernels, at most
_running, _threads = {}, []  # {name: (how many, the process that they are forks of)}, of wake_inductor
_turns = None  # of a worker: a pipe with numbers, of which each takes the next


def workers():
    """How many compile at once, where the cores allow it: two are the run's and torch.compile's."""
    return max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 2))


def start(what, function, orders, device):
    """For each of the orders start a process that calls function, "module:name", with them as arguments, unless some
    of that name run."""
    if what in _running:
        return
    root, (module, name) = str(Path(__file__).resolve().parents[1]), function.split(":")
    index = torch.cuda.current_device() if device.index is None else device.index
    code = (f"import sys; sys.path.insert(0, {root!r}); from kernels import ahead; from {module} import {name}; "
            f"ahead.serve({name}, {index})")
    _running[what] = len(orders), subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(orders)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True)  # Ctrl-C is the run's: they end with it


def serve(function, index):
    """What the started process does: it has imported all, which takes longer than to compile a kernel, and forks
    before a device is touched. All end with the process that started it."""
    global _turns
    _turns, numbers = os.pipe()
    os.write(numbers, b"".join(turn.to_bytes(2, "big") for turn in range(2**14)))
    os.close(numbers)
    orders = json.loads(sys.argv[-1])
    for order in orders:
        if not os.fork():
            return work(function, order, index)
    _end_with_the_run()
    for _ in orders:
        os.wait()


def work(function, order, index):
    """One worker."""
    _end_with_the_run()
    try:
        if index:  # the first is current anyway, and to say so would make a context on it
            torch.cuda.set_device(index)
        function(*order)
    except Exception as error:  # out of memory, or whatever the run will meet and tell in full
        sys.exit(f"kernels: {function.__name__} in a process of its own failed ({said(error)}): the run does it itself")


def _end_with_the_run():
    threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()


def turns():
    """Numbers from 0 on, each for one of a process's workers: whoever asks gets the next."""
    while turn := os.read(_turns, 2):
        yield int.from_bytes(turn, "big")


def finish(what, patience):
    """Wait for the processes of that name, at most so many seconds, and say how long that was."""
    while _threads:
        _threads.pop().join()
    if what not in _running:
        return
    started, late, (count, process) = time.monotonic(), False, _running.pop(what)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        late = True
    process.stdin.close()  # which ends those that are left
    print(f"kernels: waited {time.monotonic() - started:.1f} s for {count} processes that compile {what}"
          + "; some were not done, the run compiles what is missing" * late, flush=True)


def wake_inductor():
    """Import torch.compile's back end and let it start its own processes before it is needed; `finish` waits for the
    thread: two must not import the same."""
    def wake():
        import torch._inductor.compile_fx  # noqa: F401  (takes seconds)
        from torch._inductor.async_compile import AsyncCompile
        AsyncCompile.warm_pool()
        AsyncCompile.wakeup()
    _threads.append(threading.Thread(target=wake, daemon=True))
    _threads[-1].start()
