"""Gradients of experts that the kernels add up themselves, against what autograd adds up: the operator, the model's
blocks, compiled too, and replayed micro-batches on the pretend device of test_graphs.py."""

import pytest
import torch

from kernels import backend, experts, graphs, routing, triton_experts
from tests import test_graphs
from tests.helpers import poisoned_memory, tiny_model, tokens
from tests.test_graphs import pretend  # noqa: F401
from tests.test_triton_experts import DEVICE, close, random_case


@pytest.fixture(autouse=True)
def triton():
    torch._dynamo.reset()
    with backend.running(True):
        yield


def three_micro_batches(into, compiled=False, dtype=torch.float32):
    """What three backwards leave in `into`, or in the matrices' gradients, and each one's gradients of x and weights.
    Nobody chooses the last of the experts."""
    run = lambda x, weights, chosen, gate_up, down: experts.experts(
        x, weights, *routing.sort_by_expert(chosen, 5), gate_up, down, into=into)
    run = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    (_, _, *matrices), _, _ = random_case(1, 8, 24, 5, 2, torch.Generator().manual_seed(9), "even")
    matrices, others = [m.to(DEVICE, dtype).requires_grad_() for m in matrices], []
    for seed in range(3):
        (x, weights, *_), chosen, grad = random_case(20, 8, 24, 5, 2, torch.Generator().manual_seed(seed), "even")
        x, weights = (t.to(DEVICE).requires_grad_() for t in (x, weights))
        if into:
            into[-1].fill_(float(seed > 0))
        with poisoned_memory():
            run(x, weights, chosen.to(DEVICE) % 4, *matrices).backward(grad.to(DEVICE))
        others += [x.grad, weights.grad]
    if into:
        assert all(matrix.grad is None for matrix in matrices), "autograd has nothing to add"
    return [*(into[:2] if into else [matrix.grad for matrix in matrices]), *others]


def nowhere(dtype=torch.float32):
    """Where a step that was skipped has left NaN."""
    grads = [torch.full(shape, torch.nan, device=DEVICE, dtype=dtype) for shape in ((5, 48, 8), (5, 8, 24))]
    return *grads, torch.ones((), device=DEVICE)


@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_add_up_what_autograd_adds_up(compiled):
    into = nowhere()
    places = [t.data_ptr() for t in into]
    ours, expected = three_micro_batches(into, compiled), three_micro_batches(None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))  # the same sums in the same order
    assert places == [t.data_ptr() for t in ours[:2]] + [into[2].data_ptr()]
    assert not ours[0][4].any() and not ours[1][4].any() and ours[0][0].any()
    with backend.running(False):
        assert all(close(a, b) for a, b in zip(ours, three_micro_batches(None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_the_library_are_added_too(monkeypatch, dtype):
    expected = three_micro_batches(None, dtype=dtype)
    monkeypatch.setattr(triton_experts, "LIBRARY", {"y", "dx", "d_down", "d_gate_up"})
    assert all(close(a, b) for a, b in zip(three_micro_batches(nowhere(dtype), dtype=dtype), expected))
    assert all(close(a, b) for a, b in zip(three_micro_batches(None, dtype=dtype), expected))


def test_the_operators_meet_the_rules_of_torch_library():
    inputs, chosen, grad = random_case(10, 8, 24, 5, 2, torch.Generator().manual_seed(0), "even")
    x, weights, gate_up, down = (t.to(DEVICE).requires_grad_() for t in inputs)
    *grads, begun = (t.zero_() for t in nowhere())
    rows = (x, weights, *routing.sort_by_expert(chosen.to(DEVICE), 5))
    forward = (*rows, gate_up, down, None, None, None, None, *grads, begun)
    torch.library.opcheck(torch.ops.nanok2.experts.default, forward, test_utils=("test_schema", "test_faketensor"))
    z = torch.ops.nanok2.experts(*forward)[1]
    arguments = [t.detach() for t in (grad.to(DEVICE), *rows, gate_up, down, z, *grads, begun)]
    torch.library.opcheck(torch.ops.nanok2.experts_backward.default, arguments,
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


def test_twins_refuse_what_they_would_lose(monkeypatch):
    monkeypatch.setattr(experts, "_operator_is_best", lambda *_: False)
    with backend.running(False), pytest.raises(RuntimeError, match="their twins would lose the experts' gradients"):
        three_micro_batches(nowhere())


SMALL = dict(num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=4)  # each is a program of every kernel


@pytest.fixture
def experts_alone(monkeypatch):
    """Only they run in Triton, on their rows; attention and the rest by their twins: what is interpreted takes time."""
    monkeypatch.setattr(backend, "triton_runs", lambda tensor: tensor.shape[-1:] == (32,))


@pytest.mark.parametrize("recompute, compiled", [("none", False), ("selective", True), ("full", False)])
def test_blocks_leave_the_same_gradients(experts_alone, recompute, compiled):
    found = []
    for keeps in (False, True):
        model = tiny_model(**SMALL)
        model.layers[0].recompute = recompute
        kept, begun = model.keep_gradients() if keeps else ({}, torch.zeros(()))
        if compiled:
            model.layers[0].compile(backend="aot_eager", dynamic=False, fullgraph=True)
        for seed in range(2):
            begun.fill_(float(seed))
            loss, balance = model(tokens(2, 9, seed=seed), tokens(2, 9, seed=seed + 5))
            (loss + balance).backward()
        assert len(kept) == 2 * keeps
        found.append([kept.get(p, p.grad) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_without_triton_autograd_goes_on():
    with backend.running(False):
        assert tiny_model().keep_gradients() == ({}, None)


# ---------------------------------------------------------------------- replayed micro-batches


@pytest.mark.parametrize("poisoned, fails", [(1, None), (None, 1)])
def test_replays_skipped_steps_and_failed_captures_leave_what_calls_leave(
        pretend, experts_alone, monkeypatch, poisoned, fails):  # noqa: F811
    """One block with experts."""
    def fail(number):
        if number == fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
    pretend["capture"] = fail
    monkeypatch.setattr(test_graphs, "tiny_model", lambda: tiny_model(**SMALL))
    kept, call = [], graphs.MicroBatch._call
    monkeypatch.setattr(graphs.MicroBatch, "_call", lambda self, *rest: (kept.append(self.kept), call(self, *rest))[1])
    left, told = test_graphs.steps(True, 2, 3, poisoned)
    assert len(told) == 1 and ("not used" in told[0]) == (fails is not None) and len(kept[-1]) == 2
    test_graphs.assert_same(left, test_graphs.steps(False, 2, 3, poisoned)[0])
