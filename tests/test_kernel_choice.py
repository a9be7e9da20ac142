"""Which kernels run: the decision, the check that auto makes first, what is remembered of it and compiled ahead of it,
the search for tiles, and a whole run by either kind."""

import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import types

import pytest
import torch

from errors import UserError
from kernels import attention, backend, expert_tiles, selfcheck, tuning
from tests.helpers import ROOT, losses, run_train, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
POPEN = subprocess.Popen
interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="about Triton's interpreter")


@pytest.fixture(autouse=True)
def leave_as_it_was(monkeypatch, tmp_path):
    """And a machine with a pretend GPU whose choices are remembered in a folder of the test's own."""
    monkeypatch.setenv("NANOK2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "machine", lambda device: "a pretend GPU, sources 1")
    monkeypatch.setattr(attention, "ARM", {})
    tuning._say.cache_clear()
    with backend.running(False):
        yield
    expert_tiles.TILES.clear()


def test_torch_and_auto_run_the_twins_on_a_cpu():
    for choice in ("torch", "auto"):
        assert selfcheck.use(choice, CPU, torch.float32) is False and not backend.triton_runs(torch.ones(1))


@interpreted
def test_triton_on_a_cpu_is_the_interpreter_in_fp32():
    assert selfcheck.use("triton", CPU, torch.float32) and backend.triton_runs(torch.ones(1))
    assert not backend.triton_runs(torch.ones(1, dtype=torch.float64))
    with pytest.raises(UserError, match="16-bit"):
        selfcheck.use("triton", CPU, torch.bfloat16)
    assert not backend.triton_runs(torch.ones(1))


@pytest.mark.parametrize("missing", ["gpu", "triton"])
def test_triton_where_it_cannot_run_is_an_error_that_says_what_can(monkeypatch, missing):
    monkeypatch.setattr(backend, "INTERPRETED", missing != "gpu")
    if missing == "triton":
        monkeypatch.setattr(selfcheck, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="kernels='auto'"):
        selfcheck.use("triton", CPU, torch.float32)


def test_auto_on_a_gpu_trusts_the_check(monkeypatch):
    monkeypatch.setattr(selfcheck, "failures", lambda device, dtype: ["experts: differs"])
    with pytest.warns(UserWarning, match="experts: differs"):
        assert not selfcheck.use("auto", CUDA, torch.bfloat16)
    monkeypatch.setattr(selfcheck, "failures", lambda device, dtype: [])
    assert selfcheck.use("auto", CUDA, torch.bfloat16, again=False)  # a failure is not remembered


def test_a_check_that_passed_is_not_made_again_for_the_same_machine_and_dtype(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(selfcheck, "failures", lambda device, dtype: made.append(dtype) or [])
    for _ in range(2):
        assert selfcheck.use("auto", CUDA, torch.bfloat16, again=False)
    assert made == [torch.bfloat16] and str(tuning.path()) in capsys.readouterr().out
    assert selfcheck.use("auto", CUDA, torch.float16, again=False) and made == [torch.bfloat16, torch.float16]
    assert selfcheck.use("auto", CUDA, torch.bfloat16, again=True) and len(made) == 3
    monkeypatch.setattr(tuning, "machine", lambda device: "a pretend GPU, sources 2")
    assert selfcheck.use("auto", CUDA, torch.bfloat16, again=False) and len(made) == 4


@interpreted
def test_the_check_passes_here_and_names_what_is_broken(monkeypatch):
    assert selfcheck.failures(CPU, torch.float32) == []
    from kernels import triton_experts, triton_newton_schulz
    combine = triton_experts.combine
    monkeypatch.setattr(triton_experts, "combine", lambda *args: combine(*args) * 1.01)
    monkeypatch.setattr(triton_newton_schulz, "symmetric_product", lambda *args: 1 / 0)
    few = "experts", "sum of rows", "decoding", "Newton-Schulz", "momentum"  # all of them were right above
    monkeypatch.setattr(selfcheck, "CASES", {name: selfcheck.CASES[name] for name in few})
    found = selfcheck.failures(CPU, torch.float32)
    assert [line.split(":")[0] for line in found] == ["experts", "sum of rows", "Newton-Schulz"]
    assert "differs" in found[0] and "ZeroDivisionError" in found[2]


# ----------------------------------------------------------------------------- what is remembered

def test_the_memory_knows_the_machine_by_what_a_measurement_depends_on(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    monkeypatch.setattr(tuning, "sources", lambda: "abc")
    assert re.fullmatch(r"NVIDIA X1, driver \S+, torch \S+, cuDNN \S+, triton \S+, sources abc",
                        tuning.machine.__wrapped__(CUDA))
    monkeypatch.undo()
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "kernels/tuning.py"))
    found = set()
    for text in ("BLOCK = 64", "BLOCK = 128"):
        (tmp_path / "kernels/a.py").write_text(text)
        found.add(tuning.sources())
    assert len(found) == 2


def test_the_memory_lies_where_the_environment_says(monkeypatch):
    monkeypatch.delenv("NANOK2_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(tuning.path()) == "/x/nanok2/kernels.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tuning.path()) == "/home/someone/.cache/nanok2/kernels.json"


@pytest.mark.parametrize("damage", ["", "{\"a\": {\"da", "[1, 2]", "{\"a\": 1}", "{\"a\": {\"facts\": {}}}", "\xff"])
def test_a_damaged_or_foreign_memory_is_told_and_written_anew(capsys, damage):
    tuning.path().parent.mkdir()
    tuning.path().write_bytes(damage.encode("latin-1"))
    assert tuning.recall(CUDA, "a fact") is None and tuning.recall(CUDA, "a fact") is None
    assert capsys.readouterr().out.count("is ignored") == 1
    tuning.remember(CUDA, {"a fact": [1]})
    assert tuning.recall(CUDA, "a fact") == [1] and tuning.recall(CUDA, "another") is None


def test_the_memory_keeps_the_newest_machines(monkeypatch):
    for n in range(tuning.KEPT + 3):
        monkeypatch.setattr(tuning, "machine", lambda device, n=n: f"GPU {n}")
        tuning.remember(CUDA, {"n": n})
        if n == 10:
            monkeypatch.setattr(tuning, "machine", lambda device: "GPU 0")  # used again: not old any more
            tuning.remember(CUDA, {"more": True})
    kept = json.loads(tuning.path().read_text())
    assert len(kept) == tuning.KEPT and kept["GPU 0"]["facts"] == {"n": 0, "more": True} and "GPU 1" not in kept


def test_a_memory_that_cannot_be_written_is_told_once(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOK2_CACHE", str(tmp_path / "file/inside"))
    for _ in range(2):
        tuning.remember(CUDA, {"a fact": 1})
    assert capsys.readouterr().out.count("cannot be kept") == 1


def _write(writer):
    for n in range(25):
        tuning.remember(CUDA, {f"{writer} {n}": n})


def test_processes_that_write_at_once_lose_nothing():
    writers = [multiprocessing.get_context("fork").Process(target=_write, args=(w,)) for w in range(3)]
    for step in ("start", "join"):
        for writer in writers:
            getattr(writer, step)()
    assert all(tuning.recall(CUDA, f"{w} {n}") == n for w in range(3) for n in range(25))
    assert sorted(path.name for path in tuning.path().parent.iterdir()) == ["kernels.json", "kernels.lock"]


# ----------------------------------------------------------------------------- how time is measured

class PretendDevice:
    """torch.cuda with a device of a clock of its own, in milliseconds, on which what is queued waits for its turn."""

    def __init__(self, python):
        self.python, self.host, self.device = python, 0.0, 0.0

    def queue(self, milliseconds):
        self.device = max(self.device, self.host) + milliseconds

    def call(self):
        """Three kernels of 0.1 ms, each of which Python takes a while to launch."""
        for _ in range(3):
            self.host += self.python
            self.queue(0.1)

    def synchronize(self):
        self.host = self.device = max(self.host, self.device)

    def event(self, enable_timing):
        event = types.SimpleNamespace(elapsed_time=lambda later: later.at - event.at)
        event.record = lambda: setattr(event, "at", max(self.device, self.host))
        return event


@pytest.mark.parametrize("python", [0.0, 0.05, 2.0])
def test_what_python_takes_to_launch_does_not_count_on_a_gpu(monkeypatch, python):
    pretend = PretendDevice(python)
    monkeypatch.setattr(backend, "synchronize", pretend.synchronize)
    monkeypatch.setattr(backend.time, "perf_counter", lambda: pretend.host / 1000)
    monkeypatch.setattr(torch.cuda, "Event", pretend.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: pretend.queue(cycles / 2e6))
    assert backend.milliseconds(pretend.call, CUDA) == pytest.approx(0.3)


def test_the_median_time_on_a_cpu(monkeypatch):
    seconds = iter([0, 1, 0, 1, 0, 1, 0, 2, 0, 9, 0, 3])
    monkeypatch.setattr(backend.time, "perf_counter", lambda: next(seconds))
    assert backend.milliseconds(lambda: None, CPU, rounds=3, warmup=3) == 3000.0


@pytest.mark.gpu
def test_time_on_a_gpu_is_that_of_its_kernels():
    x = torch.ones(2**26, device="cuda")

    def slow_to_launch(times):
        for _ in range(times):
            time.sleep(1e-3)
            x.add_(1.0)
    once, twice = (backend.milliseconds(functools.partial(slow_to_launch, times), CUDA) for times in (10, 20))
    assert once < 10 and 1.8 < twice / once < 2.2


# ----------------------------------------------------------------------------- choices

def small_config(**changes):
    config = tiny_config()
    values = dict(sequence_length=16, dtype="float32", ep=1, document_mask=False, kernels="auto", kernels_tuning="auto",
                  compile=None)
    for name, value in (values | changes).items():
        setattr(config, name, value)
    return config


def test_choices_made_on_another_rank_are_adopted(monkeypatch):
    monkeypatch.setattr(backend, "milliseconds", lambda *_, **__: 1.0)
    lines, choices = selfcheck.fastest(small_config(), 2, CPU)
    assert "attention 12/8" in lines[0] and not tuning.path().exists()  # nothing is remembered of a CPU
    key, tile = ("up", 32, 16, 5, "torch.float32"), (64, 32, 32, 4, 2)
    choices["tiles"].append((key, tile))
    attention.ARM = {}
    selfcheck.adopt(json.loads(json.dumps(choices)))
    assert list(attention.ARM) == [attention.arm_key((2, 4, 16, 12), 8, torch.float32, False)]
    assert expert_tiles.TILES == {key: tile}


@pytest.fixture
def measured(monkeypatch):
    """Names of what is measured on a pretend GPU, where nothing runs."""
    made = []

    def choose_arm(q_shape, value_width, dtype, device, documents, how):
        made.append("attention")
        attention.ARM[attention.arm_key(q_shape, value_width, dtype, documents)] = "cudnn"
        return "attention: cudnn"
    monkeypatch.setattr(attention, "choose_arm", choose_arm)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.ones(0))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    return made


def test_choices_are_made_once_for_the_same_sizes(measured):
    _, first = selfcheck.fastest(small_config(), 2, CUDA)
    lines, again = selfcheck.fastest(small_config(), 2, CUDA)
    assert measured == ["attention"] and lines == [] and again == json.loads(json.dumps(first))
    selfcheck.adopt(again)
    assert list(attention.ARM.values()) == ["cudnn"]
    for changes in ({"kernels_tuning": "full"}, {"kernels_tuning": "off"}, {"document_mask": True},
                    {"moe_intermediate_size": 24}, {"sequence_length": 32}):
        before = len(measured)
        selfcheck.fastest(small_config(**changes), 2, CUDA)
        assert len(measured) == before + 1, changes


@pytest.mark.parametrize("capability, documents, how, asked", [
    ((9, 0), False, "auto", {"sdpa"}), ((9, 0), False, "full", {"triton", "sdpa"}),
    ((8, 9), False, "off", {"triton", "sdpa"}), ((9, 0), True, "auto", {"triton", "flex"})])
def test_arms_that_never_win_on_a_gpu_are_the_last_to_be_asked(monkeypatch, capability, documents, how, asked):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "compile", lambda arm, dynamic: arm)
    monkeypatch.setattr(attention, "sample", lambda *_: ([torch.ones(1)], None))
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: None)
    monkeypatch.setattr(backend, "triton_runs", lambda tensor: True)
    monkeypatch.setattr(backend, "milliseconds", lambda *_: 1.0)
    broken, made = {attention.ARMS["cudnn"], attention.ARMS["flash"]}, []
    monkeypatch.setattr(attention, "wrong", lambda arm, *_: made.append(arm) or ("broken" if arm in broken else None))

    def right():
        made.clear()
        attention.choose_arm((2, 4, 16, 12), 8, torch.bfloat16, CUDA, documents, how)
        return {name for name, arm in attention.ARMS.items() if arm in made and arm not in broken}
    assert right() == asked
    broken |= {attention.ARMS[name] for name in asked}
    rest = right()
    assert len(rest) == 1 and rest <= {"triton", "flex", "math"} - asked


# ----------------------------------------------------------------------------- the search for tiles

def arms_with(times, wrong=(), failing=()):
    """An arm that takes as long as `times` says of its tile, with what backend.milliseconds has to be for that."""
    def arm(tile):
        if tile in failing:
            raise RuntimeError("out of resource: shared memory")
        arm.took = times[tile]
        return torch.ones(3) * (1.1 if tile in wrong else 1), torch.tensor(7)
    return {"up": arm}, lambda function, device, **_: function() and arm.took


def test_the_fastest_right_tile_wins_if_it_is_more_than_noise(monkeypatch):
    arms, milliseconds = arms_with({"a": 1.0, "b": 0.99, "c": 0.5, "d": 0.2, "e": 0.8}, wrong="d", failing="c")
    monkeypatch.setattr(backend, "milliseconds", milliseconds)
    best, line = tuning.search(arms, {"up": list("abcde")}, 60, CPU)
    assert best == {"up": "e"} and "up d is wrong" in line and "up c fails (RuntimeError: out of resource" in line
    assert tuning.search(arms, {"up": ["a", "b"]}, 60, CPU)[0] == {"up": "a"}
    assert tuning.search(arms, {"up": ["c", "e"]}, 60, CPU)[0] == {"up": "e"}  # the default does not run here
    assert tuning.search(arms, {"up": ["c"]}, 60, CPU)[0] == {}


def test_the_search_ends_with_its_seconds_but_measures_every_default(monkeypatch):
    arms, milliseconds = arms_with({"a": 1.0, "b": 0.5})
    monkeypatch.setattr(backend, "milliseconds", milliseconds)
    arms = {"up": arms["up"], "y": arms["up"]}
    assert tuning.search(arms, {"up": ["a", "b"], "y": ["a", "b"]}, 0, CPU)[0] == {"up": "a", "y": "a"}


@pytest.mark.parametrize("shared", [99 * 1024, 164 * 1024, 227 * 1024])
def test_only_tiles_that_fit_are_tried_and_the_one_in_use_is_first(monkeypatch, shared):
    monkeypatch.setattr(expert_tiles, "shared_limit", lambda: shared)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    routed = 32768, 7, 64, 768, 256, torch.bfloat16
    for kernel, tiles in tuning.tiles_to_try(routed, "full").items():
        assert len(set(tiles)) == len(tiles) > 1
        assert all(expert_tiles.fits(kernel, tile, torch.bfloat16, shared) for tile in tiles)
        assert tiles[0] == tuple(expert_tiles.blocks(kernel, 768, 256, 3584, torch.bfloat16).values())
        assert tuning.tiles_to_try(routed, "auto")[kernel] == tiles[:4]


@interpreted
@pytest.mark.slow
def test_a_run_with_triton_kernels_equals_one_with_torch(tmp_path, data):
    """Two steps of configs/debug.py, made smaller in everything, to one layer, but for sequences of two tokens more
    than a tile: the interpreter takes a millisecond for every operation of every tile."""
    found = {}
    for kernels in ("torch", "triton"):
        run_train(ROOT / "configs/debug.py", f"--kernels={kernels}", f"--data={data}",
                  f"--out_dir={tmp_path / kernels}", "--max_steps=2", "--global_batch_size=2", "--micro_batch_size=1",
                  "--sequence_length=130", "--vocab_size=257", "--num_hidden_layers=1", "--n_routed_experts=4",
                  "--first_k_dense_replace=0",
                  "--num_attention_heads=2", "--hidden_size=72", "--intermediate_size=96", "--n_shared_experts=1",
                  "--ns_steps=2", "--num_experts_per_tok=2", "--eval_interval=0", "--log_interval=1",
                  "--save_interval=0", "--sample_interval=0", "--warmup_steps=0", "--decay_steps=0", "--wandb=off")
        found[kernels] = [loss for _, loss in losses(tmp_path / kernels)]
    assert len(found["torch"]) == 2 and found["torch"] == pytest.approx(found["triton"], abs=1e-4)


def test_every_kernel_compiles_for_an_h200_without_spilling():
    """In a process of its own: where the interpreter is on, kernels cannot be compiled. The sizes of configs/small.py
    only: all of them take minutes (python -m bench.compiled)."""
    done = subprocess.run([sys.executable, "-m", "bench.compiled", "_small", "decode"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("triton_*.py"))
    assert set(re.findall(r"def (\w+_kernel)\(", sources)) == set(re.findall(r"(\w+_kernel) ", done.stdout))
    assert done.stdout.count("wgmma") > 8
