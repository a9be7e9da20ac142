"""Expert dispatch over ranks against the same layer on one device, with gradients; odd loads; who sends what."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from kernels import backend, routing
from kernels import experts as expert_kernels
from ranks.dispatch import ExpertParallel
from tests.helpers import tiny_model

N, D, K, E = 24, 32, 2, 8


def layer(seed=0):
    """A MoE layer and tokens of two ranks' worth; every rank makes the same."""
    torch.manual_seed(seed)
    moe = tiny_model(seed).layers[1].mlp
    return moe, torch.randn(4, N, D)


def run_layer(moe, x_BTD, grad_BTD):
    x = x_BTD.clone().requires_grad_()
    y, (balance, counts, *_) = moe(x)
    (y * grad_BTD).sum().backward()
    return y.detach(), x.grad, counts, balance.detach()


def spread(moe, ranks, rank):
    """Keep this rank's experts only and dispatch over the world."""
    here = E // ranks
    for name, p in list(moe.experts.named_parameters()):
        setattr(moe.experts, name, torch.nn.Parameter(p.detach()[rank * here : (rank + 1) * here].clone()))
    moe.dispatch = ExpertParallel(dist.group.WORLD, E)


def bias_for(kind):
    """A selection bias that makes the routing as uneven as it gets."""
    bias = torch.zeros(E)
    if kind == "two experts":
        bias[5] = bias[7] = 10.0  # one rank gets everything, the others nothing
    elif kind == "one in each half":
        bias[0] = bias[E // 2] = 10.0
    return bias


def against_one_device(kind, ranks):
    rank = dist.get_rank()
    moe, x = layer()
    moe.gate.e_score_correction_bias.copy_(bias_for(kind))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    reference = run_layer(moe, x[:ranks], grad[:ranks])
    whole = {name: p.grad.clone() for name, p in moe.named_parameters()}
    moe.zero_grad()
    spread(moe, ranks, rank)
    y, x_grad, counts, balance = run_layer(moe, x[[rank]], grad[[rank]])
    close = dict(rtol=0, atol=2e-6)
    torch.testing.assert_close(y, reference[0][[rank]], **close)
    torch.testing.assert_close(x_grad, reference[1][[rank]], **close)
    dist.all_reduce(counts)
    assert torch.equal(counts, reference[2])
    for name, p in moe.named_parameters():
        if ".experts." in f".{name}" and "shared" not in name:
            here = E // ranks
            torch.testing.assert_close(p.grad, whole[name][rank * here : (rank + 1) * here], rtol=0, atol=1e-5)
        else:
            total = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, whole[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["random", "two experts", "one in each half"])
def test_experts_over_ranks_equal_experts_on_one(pool, kind, ranks):
    pool.run(ranks, against_one_device, kind, ranks)


def with_triton(function, *args):
    with backend.running(True):
        function(*args)


@pytest.mark.skipif(not backend.INTERPRETED, reason="test_gpu.py has it on a GPU")
def test_experts_over_ranks_by_triton(pool):
    pool.run(2, with_triton, against_one_device, "random", 2)


def rows_sent():
    """Rows that one dispatch sends, and the number that a row for every choice would be."""
    moe, x = layer()
    spread(moe, 4, dist.get_rank())
    weights, chosen, *_ = moe.gate(x[dist.get_rank()])
    sizes, original = [], dist.all_to_all_single

    def counting(output, input, *splits, **options):
        sizes.append(tuple(input.shape))
        return original(output, input, *splits, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        moe.dispatch.receive(moe.dispatch.send(x[dist.get_rank()], weights, chosen))
    distinct = sum(len(set(row)) for row in (chosen // 2).tolist())
    return sizes, distinct


def test_a_token_travels_once_to_each_rank(pool):
    for sizes, distinct in pool.run(4, rows_sent):
        assert sizes == [(4, 2), (distinct, D), (distinct, 2 * K)] and distinct < N * K


def order_of_events():
    """When the shared expert runs between the start and the end of the rows' trips."""
    moe, x = layer()
    spread(moe, 2, dist.get_rank())
    events, all_to_all, shared = [], dist.all_to_all_single, moe.shared_experts.forward

    class Noted:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            return self.work.wait()

    def noted(*args, async_op=False, **options):
        events.append("start" if async_op else "sizes")
        work = all_to_all(*args, async_op=async_op, **options)
        return Noted(work) if async_op else work

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.view_as(y)

        @staticmethod
        def backward(ctx, grad):
            events.append("shared backward")
            return grad

    moe.shared_experts.forward = lambda x: (events.append("shared"), Mark.apply(shared(x)))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", noted)
        run_layer(moe, x[:1], torch.ones(1, N, D))
    return events


def test_the_shared_expert_runs_while_rows_are_under_way(pool):
    for events in pool.run(2, order_of_events):
        forward = ["sizes", "start", "start", "shared", "wait", "wait", "start", "wait"]
        assert events[: len(forward)] == forward
        backward = events[len(forward) :]
        assert backward[:2] == ["start", "wait"]  # the gradient of what came home
        assert sorted(backward[2:]) == ["shared backward", "start", "start", "wait", "wait"]
        assert backward.index("shared backward") < len(backward) - 1 - backward[::-1].index("wait")


def rows_left(recompute):
    """(How often rows came from other ranks, how many of these are still there after the backward)."""
    moe, x = layer()
    spread(moe, 2, dist.get_rank())
    arrived, receive = [], moe.dispatch.receive

    def noted(handle):
        rows, *rest = receive(handle)
        arrived.append(weakref.ref(rows.untyped_storage()))
        return rows, *rest

    moe.dispatch.receive = noted
    compute = lambda x: checkpoint(lambda x: moe(x)[0], x, use_reentrant=False) if recompute else moe(x)[0]
    compute(x[:1].requires_grad_()).sum().backward()
    gc.collect()
    return len(arrived), sum(storage() is not None for storage in arrived)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_rows_are_left_after_the_backward(pool, recompute):
    """A recomputation sends and receives, and no backward follows it."""
    assert pool.run(2, rows_left, recompute) == [(1 + recompute, 0)] * 2


def test_absent_choices_are_left_out():
    """Experts with choices that live elsewhere: the partial sums of two halves make the whole."""
    torch.manual_seed(0)
    x, weights = torch.randn(30, 16), torch.rand(30, 3)
    chosen = torch.stack([torch.randperm(6)[:3] for _ in range(30)])
    gate_up, down = torch.randn(6, 16, 16) / 4, torch.randn(6, 16, 8) / 4
    leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    whole = expert_kernels.experts(x, weights, *routing.sort_by_expert(chosen, 6), gate_up, down)
    grad = torch.randn(whole.shape)
    expected = torch.autograd.grad(whole, leaves, grad)
    parts = []
    for half in (0, 1):
        local = torch.where(chosen // 3 == half, chosen % 3, 3)
        order, inverse, counts = routing.sort_by_expert(local, 3, int((local < 3).sum()))
        assert len(order) < len(inverse) and counts.tolist() == [int((local == e).sum()) for e in range(3)]
        mine = slice(3 * half, 3 * half + 3)
        parts.append(expert_kernels.experts(x, weights, order, inverse, counts, gate_up[mine], down[mine]))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(parts[0] + parts[1], leaves, grad), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
