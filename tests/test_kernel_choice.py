"""Which kernels run: the decision, the check that auto makes first, and a whole run by either kind."""

import os
import re
import subprocess
import sys

import pytest
import torch

from errors import UserError
from kernels import attention, backend, selfcheck
from tests.helpers import ROOT, losses, run_train, tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="about Triton's interpreter")


@pytest.fixture(autouse=True)
def leave_as_it_was():
    with backend.running(False):
        yield


def test_torch_and_auto_run_the_twins_on_a_cpu():
    for choice in ("torch", "auto"):
        assert backend.use(choice, CPU, torch.float32) is False and not backend.triton_runs(torch.ones(1))


@interpreted
def test_triton_on_a_cpu_is_the_interpreter_in_fp32():
    assert backend.use("triton", CPU, torch.float32) and backend.triton_runs(torch.ones(1))
    assert not backend.triton_runs(torch.ones(1, dtype=torch.float64))
    with pytest.raises(UserError, match="16-bit"):
        backend.use("triton", CPU, torch.bfloat16)
    assert not backend.triton_runs(torch.ones(1))


@pytest.mark.parametrize("missing", ["gpu", "triton"])
def test_triton_where_it_cannot_run_is_an_error_that_says_what_can(monkeypatch, missing):
    monkeypatch.setattr(backend, "INTERPRETED", missing != "gpu")
    if missing == "triton":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="kernels='auto'"):
        backend.use("triton", CPU, torch.float32)


def test_auto_on_a_gpu_trusts_the_check(monkeypatch):
    monkeypatch.setattr(selfcheck, "failures", lambda device, dtype: [])
    assert backend.use("auto", CUDA, torch.bfloat16)
    monkeypatch.setattr(selfcheck, "failures", lambda device, dtype: ["experts: differs"])
    with pytest.warns(UserWarning, match="experts: differs"):
        assert not backend.use("auto", CUDA, torch.bfloat16)


@interpreted
def test_the_check_passes_here_and_names_what_is_broken(monkeypatch):
    assert selfcheck.failures(CPU, torch.float32) == []
    from kernels import triton_experts, triton_newton_schulz
    combine = triton_experts.combine
    monkeypatch.setattr(triton_experts, "combine", lambda *args: combine(*args) * 1.01)
    monkeypatch.setattr(triton_newton_schulz, "symmetric_product", lambda *args: 1 / 0)
    found = selfcheck.failures(CPU, torch.float32)
    assert [line.split(":")[0] for line in found] == ["experts", "sum of rows", "Newton-Schulz"]
    assert "differs" in found[0] and "ZeroDivisionError" in found[2]


def test_choices_made_on_another_rank_are_adopted(monkeypatch):
    monkeypatch.setattr(attention, "ARM", {})
    monkeypatch.setattr(backend, "milliseconds", lambda *_: 1.0)
    config = tiny_config()
    config.sequence_length, config.dtype, config.ep, config.document_mask = 16, "float32", 1, False
    lines, choices = selfcheck.fastest(config, 2, CPU)
    assert "attention 12/8" in lines[0] and choices[0]
    attention.ARM = {}
    selfcheck.adopt(choices)
    assert list(attention.ARM) == [attention.arm_key((2, 4, 16, 12), 8, torch.float32, False)]


@interpreted
@pytest.mark.slow
def test_a_run_with_triton_kernels_equals_one_with_torch(tmp_path, data):
    """Three steps of configs/debug.py with fewer and shorter sequences (two tokens more than a tile), fewer layers
    and fewer steps of Newton-Schulz than it says: the interpreter is slow."""
    found = {}
    for kernels in ("torch", "triton"):
        run_train(ROOT / "configs/debug.py", f"--kernels={kernels}", f"--data={data}",
                  f"--out_dir={tmp_path / kernels}", "--max_steps=3", "--global_batch_size=2", "--micro_batch_size=1",
                  "--sequence_length=130", "--num_hidden_layers=2", "--n_routed_experts=6", "--ns_steps=2",
                  "--num_experts_per_tok=2", "--eval_interval=0", "--log_interval=1", "--save_interval=0",
                  "--sample_interval=0", "--warmup_steps=0", "--decay_steps=0", "--wandb=off")
        found[kernels] = [loss for _, loss in losses(tmp_path / kernels)]
    assert len(found["torch"]) == 3 and found["torch"] == pytest.approx(found["triton"], abs=1e-4)


def test_every_kernel_compiles_for_an_h200_without_spilling():
    """In a process of its own: where the interpreter is on, kernels cannot be compiled. The sizes of configs/small.py
    only: all of them take minutes (python -m bench.compiled)."""
    done = subprocess.run([sys.executable, "-m", "bench.compiled", "_small", "decode"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("triton_*.py"))
    assert set(re.findall(r"def (\w+_kernel)\(", sources)) == set(re.findall(r"(\w+_kernel) ", done.stdout))
    assert done.stdout.count("wgmma") > 8
