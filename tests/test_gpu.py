"""What only a CUDA device can show; skipped everywhere else. bench/gpu.sh runs this file first."""

import socket

import pytest
import torch

import train
from kernels import attention, backend, experts, graphs, selfcheck, triton_experts
from muon import Muon
from ranks import parallel
from ranks.dispatch import ExpertParallel
from run import guard
from tests.helpers import losses, make_config, run_script, run_train, tiny_model, tokens
from tests.test_model import CHEAP, recomputed

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch):
    """But nothing is compiled ahead in others: several of these tests run at once, on tiny models."""
    monkeypatch.setattr(selfcheck, "compile_ahead", lambda *_, **__: None)
    monkeypatch.setattr(train, "compile_ahead", lambda *_, **__: None)
    torch._dynamo.reset()
    with backend.running(False):
        yield
    attention.ARM.clear()
    triton_experts.LIBRARY.clear()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_attention_on_cuda_equals_its_twin(dtype, tolerance):
    q, k, v = (torch.randn(2, 4, 300, width, device="cuda", dtype=dtype) for width in (96, 96, 64))
    ours, maximum = attention.causal_attention(q, k, v, 0.1)
    expected, expected_maximum = attention.attention_math(q.double(), k.double(), v.double(), 0.1)
    assert (ours - expected).abs().max() < tolerance and (maximum - expected_maximum).abs().max() < 10 * tolerance


def test_grouped_matmul_on_cuda_equals_the_loop():
    rows = torch.randn(500, 64, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([100, 0, 350, 50], device="cuda")
    gate_up, down = (torch.randn(4, *size, device="cuda", dtype=torch.bfloat16) / 8 for size in ((64, 64), (64, 32)))
    difference = experts.mlp_grouped(rows, counts, gate_up, down) - experts.mlp_loop(rows, counts, gate_up, down)
    assert difference.abs().max() < 0.05


@pytest.mark.parametrize("triton, replay", [(False, False), (True, False), (True, True)])
def test_optimizer_on_cuda_equals_the_cpu(triton, replay):
    """Rates in tensors, PyTorch's fused AdamW, our passes, and all of it as a graph whose rate changes."""
    def trained(device):
        model = tiny_model().to(device)
        optimizer = Muon(model.named_parameters(), 0.02)
        grads = [torch.zeros_like(p) for p in model.parameters()]
        state = [*model.parameters(), *optimizer.named_state().values()]
        told = []
        update = graphs.Update(lambda: optimizer.update(), model.parameters(), state, replay and device == "cuda",
                               tell=told.append)
        for step in range(6):
            for p, grad in zip(model.parameters(), grads):
                grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
                p.grad = grad
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + step)
            optimizer.begin_step()
            with backend.running(triton and device == "cuda"):
                update()
        assert not told and bool(update.graph) == (replay and device == "cuda")
        return [tensor.detach().cpu() for tensor in state]
    for ours, expected in zip(trained("cuda"), trained("cpu")):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=3e-4)


def test_model_on_cuda_equals_the_cpu():
    model, x = tiny_model(q_lora_rank=24, balance="quantile", router_z_loss=1e-3), tokens(3, 33)
    loss, balance = model(x[:, :-1], x[:, 1:])
    counts, histograms, z = (total.clone() for total in model.routing.buffers())
    model.reset_statistics()
    model.cuda()
    other, other_balance = model(x[:, :-1].cuda(), x[:, 1:].cuda())
    assert abs(loss.item() / other.item() - 1) < 1e-4 and abs(balance.item() / other_balance.item() - 1) < 1e-4
    there, other_histograms, other_z = (total.cpu() for total in model.routing.buffers())
    assert torch.equal(counts, there) and abs(z / other_z - 1) < 1e-4
    assert (histograms.sum(-1) == 3 * 32).all() and torch.equal(histograms.sum(-1), other_histograms.sum(-1))
    assert (histograms - other_histograms).abs().sum() < 0.02 * histograms.sum()  # a few at the edges of bins


@pytest.mark.parametrize("arm", ["triton", "cudnn", "flash", "sdpa", "math"])  # flex runs compiled only
def test_a_selective_block_computes_nothing_dear_again(arm):
    with backend.running(True):
        again = recomputed("selective", arm, "cuda", torch.bfloat16, qk_nope_head_dim=48, qk_rope_head_dim=16,
                           v_head_dim=32, hidden_size=64)
    assert again["silu"] and set(again) <= CHEAP, set(again) - CHEAP


# Two layers, one of each kind: most of the time goes into compiling them.
SHORT = dict(device="cuda", dtype="bfloat16", num_hidden_layers=2, moe_intermediate_size=32, kernels_tuning="off")


@pytest.mark.parametrize("words", [(), ("--no-compile",), ("--dtype=float16",), ("--dtype=float32",),
                                   ("--activation_checkpointing=selective",), ("--activation_checkpointing=full",)])
def test_a_run_on_cuda_learns(tmp_path, data, words, capsys):
    """With graphs, all of them. The default and the uncompiled run validate, sample and are continued, too."""
    whole = words in ((), ("--no-compile",))
    config = make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"), **SHORT,
                         sample_interval=20 * whole, eval_interval=20 * whole)
    run_train(config, *words)
    found, said = losses(tmp_path / "run"), capsys.readouterr().out
    assert found[-1][1] < 0.9 * found[0][1]
    assert "CUDA graphs: a micro-batch is one launch" in said and "CUDA graph: not used" not in said
    if whole:
        assert "## step 20" in (tmp_path / "run/samples.md").read_text(encoding="utf-8")
        run_train(config, *words, "--max_steps=22", "--resume")
        assert losses(tmp_path / "run")[-1][0] == 22


def test_a_run_with_graphs_is_the_run_without(tmp_path, data):
    config = make_config(tmp_path / "c.py", data=str(data), **SHORT, max_steps=8)
    for name, word in (("replayed", "--cuda_graph"), ("called", "--no-cuda_graph")):
        run_train(config, word, "--no-compile", "--dtype=float32", f"--out_dir={tmp_path / name}")
    replayed, called = losses(tmp_path / "replayed"), losses(tmp_path / "called")
    assert len(called) == 8 and [loss for _, loss in replayed] == pytest.approx([loss for _, loss in called], abs=1e-3)


def test_one_rank_over_nccl_equals_the_plain_run(tmp_path, data):
    """torchrun with FSDP2, its collectives and compile, against no process group at all."""
    config = make_config(tmp_path / "tiny.py", data=str(data), **SHORT, max_steps=6)
    run_train(config, f"--out_dir={tmp_path / 'plain'}", "--compile")
    run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", config, "--compile",
               f"--out_dir={tmp_path / 'nccl'}", "--async_save", "--save_interval=5", check=0)
    plain, nccl = losses(tmp_path / "plain"), losses(tmp_path / "nccl")
    assert len(plain) == len(nccl) == 6
    for (_, one), (_, other) in zip(plain, nccl):
        assert one == pytest.approx(other, abs=0.02)


@pytest.mark.parametrize("triton", [True, False])
def test_dispatch_over_nccl_equals_local_dispatch_with_one_sync(monkeypatch, triton):
    monkeypatch.setattr(backend, "_on", triton)
    with socket.socket() as free:  # other processes run this test at the same time
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    parallel.start()
    try:
        moe = tiny_model().layers[1].mlp.cuda()
        x = torch.randn(4, 24, 32, device="cuda", requires_grad=True)
        results = []
        for dispatch in (moe.dispatch, ExpertParallel(torch.distributed.group.WORLD, 8)):
            moe.dispatch = dispatch
            y = moe(x)[0]
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *moe.parameters()])))
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        weights, chosen, *_ = moe.gate(x.flatten(0, 1))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning) as warned:
            handle = moe.dispatch.send(x.flatten(0, 1), weights, chosen)
            rows = moe.dispatch.receive(handle)
            moe.dispatch.collect(rows[0], handle)
        torch.cuda.set_sync_debug_mode("default")
        assert len([w for w in warned if "synchronizing" in str(w.message)]) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.distributed.destroy_process_group()


LITTLE = """import os, runpy, sys, torch
if "NANOK2_STARTS" not in os.environ:
    torch.cuda.set_per_process_memory_fraction(0.02)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("launch", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]],
                         ids=["alone", "torchrun"])
def test_a_gpu_that_is_too_small_starts_again_with_less(tmp_path, data, launch):
    """A process with a fiftieth of the memory becomes another one, which may have all of it: one restart is enough."""
    config = make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"), device="cuda", max_steps=2,
                         hidden_size=64, sequence_length=64, global_batch_size=8192, micro_batch_size=8192,
                         num_hidden_layers=2, kernels="torch", compile=False)
    (tmp_path / "little.py").write_text(LITTLE)
    words = [*launch, tmp_path / "little.py"] if launch else ["-c", LITTLE]
    done = run_script(*words, config, check=0, env={"PYTHONPATH": "."})
    assert done.stderr.count("out of memory in step 1 with 8192 sequences a forward: starting again with 4096") == 1
    assert "starting again with 2048" not in done.stderr
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def test_the_guard_on_cuda():
    tensors = [torch.randn(100), torch.randn(7, 3).bfloat16(), torch.tensor(3), torch.empty(0, 4)]
    for tensor in tensors:
        assert guard._bit_sum(tensor.cuda()).item() == guard._bit_sum(tensor).item()
    assert 0 < guard._probe(torch.device("cuda")) < 0.1
