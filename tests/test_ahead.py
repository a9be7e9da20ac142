"""What other processes compile before a run needs it: the same kernels, found in the cache, or no harm."""

import functools
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

import settings
from kernels import ahead, backend, selfcheck, tuning
from tests.helpers import ROOT
from tests.test_kernel_choice import leave_as_it_was, small_config  # noqa: F401  (a fixture)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
POPEN = subprocess.Popen


@pytest.fixture(autouse=True)
def never_ends(monkeypatch):
    """What a worker reads until the run ends, as the standard input of processes that a test runs."""
    ends = os.pipe()
    monkeypatch.setattr(subprocess, "run", functools.partial(subprocess.run, stdin=ends[0]))
    yield
    for end in ends:
        os.close(end)


def run_on_pretend_driver(code, **environment):
    """A Python process where Triton sees an H100 that is not there."""
    head = """
import sys, types, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
driver.set_active(types.SimpleNamespace(
    launcher_cls=lambda source, metadata: print("launcher of", metadata.name),
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
    get_current_stream=lambda device: 0))
from kernels import selfcheck, triton_ahead as ahead
"""
    return subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "TRITON_INTERPRET": "0", **environment})


def test_workers_share_what_a_check_launches_and_fill_the_cache_for_a_launch(tmp_path):
    """And one that cannot be compiled is told and left out."""
    done = run_on_pretend_driver("""
calls = [*selfcheck.CHECKED, ["attend", 2, 200, 3, 96, 64]]
kinds = [kernel.__name__ for kernel, *_ in ahead.launches(calls, torch.bfloat16)]
print("all", *kinds, flush=True)
launches = ahead.launches([["loss_of_chunk", 128, 512]], torch.bfloat16)
launches.insert(1, (types.SimpleNamespace(__name__="broken", src="", run=lambda *a, **k: 1 / 0), (), {}))
ahead.launches = lambda *_: launches
sys.argv = ["-c", '[[[], "bfloat16"], [[], "bfloat16", 1]]']
ahead.ahead.serve(ahead.compile_in_turn, 0)
""", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert "broken does not compile ahead: ZeroDivisionError" in done.stderr
    kinds, *launchers = done.stdout.splitlines()
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("triton_*.py"))
    assert set(re.findall(r"def (\w+_kernel)\(", sources)) == set(kinds.split()[1:])
    assert sorted(launchers) == ["launcher of cross_entropy_kernel"] * 2 + ["launcher of rescale_kernel"] * 2
    compiled = sorted(tmp_path.rglob("*.cubin"))
    assert len(compiled) == 4
    # A launch finds them: of the same kinds of arguments, on other pointers and sizes.
    done = run_on_pretend_driver("""
from kernels.triton_cross_entropy import cross_entropy_
from triton.runtime.jit import JITFunction
run = JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: run(self, *a, grid=grid, warmup=True, **k)
cross_entropy_(torch.randn(256, 512).bfloat16(), torch.zeros(256, dtype=torch.int64), 0.5, -100, True)
""", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and sorted(tmp_path.rglob("*.cubin")) == compiled, done.stderr


def pretend_workers(monkeypatch, code):
    monkeypatch.setattr(subprocess, "Popen", lambda words, **options: POPEN([sys.executable, "-c", code], **options))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))


def test_workers_that_fail_or_hang_do_not_hold_up_the_run(monkeypatch, capfd):
    pretend_workers(monkeypatch, "import sys; sys.exit('no CUDA')")
    assert ahead.workers() == 2
    ahead.start("kernels", "a:b", [[]] * 3, torch.device("cuda:0"))
    ahead.finish("kernels", 60)
    assert "no CUDA" in capfd.readouterr().err and not ahead._running
    pretend_workers(monkeypatch, "import time; time.sleep(1000)")
    ahead.start("kernels", "a:b", [[]] * 3, torch.device("cuda:0"))
    started, (_, process) = time.monotonic(), ahead._running["kernels"]
    ahead.finish("kernels", 0.2)
    assert time.monotonic() - started < 60 and process.returncode
    assert "for 3 processes that compile kernels; some were not done" in capfd.readouterr().out
    ahead.finish("kernels", 0.2)  # nothing was started


def test_what_is_imported_before_workers_fork_asks_nothing_of_a_device():
    """A fork cannot use CUDA once its parent has."""
    code = """
import torch
for name in ("is_available", "device_count", "_lazy_init", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, lambda *_: 1 / 0)
import kernels.triton_ahead
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "TRITON_INTERPRET": "0"})


def test_what_fails_in_a_worker_is_one_line(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(SystemExit, match="divide in a process of its own failed .ZeroDivisionError"):
        def divide(a, b):
            return a / b
        ahead.work(divide, [1, 0], 1)


def test_each_turn_is_taken_by_one_worker(tmp_path):
    """Three of them, in which every order is carried out too."""
    code = """
import sys, time
from kernels import ahead
def work(order):
    with open(f"{sys.argv[1]}/{order}", "w") as file:
        for turn in ahead.turns():
            if turn >= 300:
                break
            print(turn, file=file)
            time.sleep(0.001)
sys.argv.append("[[1], [2], [3]]")
ahead.serve(work, 0)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True)
    taken = [[int(line) for line in (tmp_path / order).read_text().split()] for order in "123"]
    assert sorted(sum(taken, [])) == list(range(300)) and all(turns == sorted(turns) for turns in taken)


def test_a_worker_ends_with_the_process_that_started_it():
    code = ("import sys, time, torch; from kernels import ahead; torch.cuda.set_device = lambda index: 0\n"
            "sys.argv.append('[[1000], [1000]]'); ahead.serve(time.sleep, 1)")
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    timer = threading.Timer(120, worker.kill)
    timer.start()
    worker.stdin.close()
    assert worker.wait() == 1 and worker.stdout.read() == b""  # which its forks hold open until they end
    timer.cancel()


def test_workers_start_only_for_what_is_not_remembered(monkeypatch):
    started = []
    monkeypatch.setattr(ahead, "start", lambda what, function, orders, _: started.append((what, orders)))
    monkeypatch.setattr(ahead, "wake_inductor", lambda: None)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = settings.Config(**vars(small_config(dtype="bfloat16")))
    selfcheck.compile_ahead(config, 2, CPU)
    assert not started
    selfcheck.compile_ahead(config, 2, CUDA)
    assert [what for what, _ in started] == ["kernels", "tiles"]
    from kernels import triton_ahead
    calls = [{name for name, *_ in orders[0][0]} for _, orders in started]
    assert calls[0] == set(triton_ahead.CALLS) - {"with_tiles", "attend"} and calls[1] == {"with_tiles"}
    tuning.remember(CUDA, {"checked torch.bfloat16": True, selfcheck._name(config, 2, True): {"attention": []}})
    selfcheck.compile_ahead(config, 2, CUDA)
    assert len(started) == 2
    config.kernels_tuning = "full"
    selfcheck.compile_ahead(config, 2, CUDA)
    assert [what for what, _ in started[2:]] == ["kernels", "tiles"]
    assert {name for name, *_ in started[2][1][0][0]} == set(triton_ahead.CALLS) - {"with_tiles"}
