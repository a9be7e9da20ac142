"""The router and the sort in Triton against their twins, in the interpreter or on a GPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, routing, triton_routing
from tests.helpers import poisoned_memory
from tests.test_triton_experts import DEVICE, close, small_blocks, triton  # noqa: F401  (triton: a fixture)


def route_both(logits, bias, batch, options, generator):
    """All results of the router and the gradient of the logits: Triton's, the twin's."""
    grad = torch.randn(len(logits), options[0], generator=generator).to(logits.device)
    results = []
    for on in (True, False):
        leaf = logits.clone().requires_grad_()
        with backend.running(on):
            weights, chosen, balance, counts = routing.route(leaf, bias, batch, *options)
            (d_logits,) = torch.autograd.grad((weights * grad).sum() + 0.7 * balance, leaf)
        results.append((weights.detach(), chosen, balance.detach(), counts, d_logits))
    return results


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_route_equals_its_twin(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    n_group = data.draw(st.sampled_from([1, 1, 2, 3]))
    n_experts = n_group * draw(2, 20)
    topk_group = draw(1, n_group)
    top_k = draw(1, min(8, n_experts // n_group * topk_group))
    options = (top_k, n_group, topk_group, data.draw(st.booleans()), 2.5)
    batch, length = draw(1, 3), draw(1, 30)
    generator = torch.Generator().manual_seed(draw(0, 99))
    logits = torch.randn(batch * length, n_experts, generator=generator) * data.draw(st.sampled_from([0.5, 3, 30]))
    bias = torch.randn(n_experts, generator=generator) * 0.1
    if data.draw(st.booleans()):  # few different values: ties everywhere
        logits, bias = logits.round(), torch.zeros(n_experts)
    elements, line = data.draw(st.sampled_from([(256, 2), (256, 64), (4096, 4)]))
    with poisoned_memory(), small_blocks(elements, (16, 16, 16), line):
        ours, twins = route_both(logits.to(DEVICE), bias.to(DEVICE), batch, options, generator)
    assert torch.equal(ours[1], twins[1]) and torch.equal(ours[3], twins[3])
    assert all(close(a, b) for a, b in zip(ours, twins))


def test_route_takes_not_a_number_first_and_keeps_it():
    logits = torch.randn(4, 6)
    logits[1, 4] = logits[1, 2] = logits[2, 5] = math.nan
    bias, options = torch.zeros(6, device=DEVICE), (3, 2, 1, True, 1.0)
    ours, twins = route_both(logits.to(DEVICE), bias, 1, options, torch.Generator())
    assert torch.equal(ours[1], twins[1]) and ours[1][1].tolist()[:2] != [0, 1]
    torch.testing.assert_close(ours[0], twins[0], equal_nan=True, rtol=1e-5, atol=1e-6)
    assert ours[2].isnan() and twins[2].isnan()


def test_route_of_scores_that_all_underflow():
    logits = torch.full((5, 8), -200.0, device=DEVICE)
    ours, twins = route_both(logits, torch.zeros(8, device=DEVICE), 1, (2, 1, 1, True, 1.0), torch.Generator())
    assert all(torch.isfinite(t).all() for t in ours) and all(close(a, b) for a, b in zip(ours, twins))


def check_router(function, device):
    """The errors of the router's logits, dx and dweight, from float64 of the same rounded operands."""
    generator = torch.Generator().manual_seed(0)
    sizes = (512, 96), (24, 96), (512, 24)
    x, weight, grad = (torch.randn(size, generator=generator).to(device) for size in sizes)
    leaves = [x.bfloat16().requires_grad_(), weight.requires_grad_()]
    logits = function(*leaves)
    ours = [logits.detach(), *torch.autograd.grad(logits, leaves, grad)]
    x, weight, grad = leaves[0].double(), weight.bfloat16().double(), grad.double()
    expected = [x @ weight.T, grad @ weight, grad.T @ x]
    error = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.float32]
    assert error(ours[0], expected[0]) < 3e-6 and error(ours[2], expected[2]) < 2e-5
    # dx has the one rounding to bf16 that its dtype asks for; the gradient of the logits was not rounded before
    assert error(ours[1], expected[1]) < 1.05 * error(expected[1].bfloat16(), expected[1])


@pytest.mark.parametrize("compiled", [False, True])
def test_router_logits_lose_nothing_in_bf16(monkeypatch, compiled):
    """With a stand-in for the product that CUDA alone has."""
    monkeypatch.setattr(routing, "_wide_product", lambda a, b: a.float() @ b.float())
    function = lambda x, weight: routing.WideLogits.apply(x, weight)
    check_router(torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function, DEVICE)


def test_router_logits_in_fp32_and_without_triton_are_the_twins():
    wide, weight = torch.randn(40, 12), torch.randn(6, 12)
    for x, on in ((wide, True), (wide.bfloat16(), False)):
        with backend.running(on):
            logits = routing.router_logits(x, weight)
        assert torch.equal(logits, F.linear(x.float(), weight.to(x.dtype).float())) and logits.dtype == torch.float32


@pytest.mark.gpu
def test_router_logits_lose_nothing_on_a_gpu():
    check_router(routing.router_logits, "cuda")


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 150), st.integers(1, 40), st.integers(1, 4), st.integers(0, 99), st.booleans(),
       st.sampled_from([1024, 4096]))
def test_sort_equals_its_twin(n, n_experts, top_k, seed, some_elsewhere, elements):
    generator = torch.Generator().manual_seed(seed)
    highest = n_experts + some_elsewhere  # n_experts marks a choice that is computed on another rank
    chosen = (torch.rand(n, top_k, generator=generator) ** 3 * highest).long().to(DEVICE)
    n_choices = int((chosen < n_experts).sum()) if some_elsewhere else None
    with poisoned_memory(), small_blocks(elements, (16, 16, 16)):
        ours = routing.sort_by_expert(chosen, n_experts, n_choices)
    with backend.running(False):
        twins = routing.sort_by_expert(chosen, n_experts, n_choices)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, twins))


@pytest.mark.parametrize("counts", [[5, 0, 16, 17], [0, 0, 0], [0, 64], [1] * 40, [90, 3, 0, 200, 17, 64, 33]])
def test_tile_map_covers_every_row_once(counts):
    with poisoned_memory():
        tiles, n_tiles = triton_routing.tile_map(torch.tensor(counts, device=DEVICE), sum(counts), 16)
    found = [(e, row) for e, start, end in tiles[:n_tiles].tolist() for row in range(start, min(start + 16, end))]
    starts = [sum(counts[:e]) for e in range(len(counts))]
    assert found == [(e, starts[e] + i) for e, count in enumerate(counts) for i in range(count)]
    there = [tile for tile in tiles.tolist() if tile[1] < tile[2]]
    assert there == sorted(there) and all(row == [0, 0, 0] for row in tiles[len(there):].tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("n_experts, options", [(64, (7, 1, 1, True, 2.6)), (256, (8, 8, 4, True, 2.5)),
                                                (384, (8, 1, 1, True, 2.8))])
def test_router_on_cuda_equals_its_twin(n_experts, options):
    logits = torch.randn(4 * 1024, n_experts, device="cuda")
    ours, twins = route_both(logits, torch.randn(n_experts, device="cuda") / 10, 4, options, torch.Generator())
    same = (ours[1] == twins[1]).all(1)
    assert same.float().mean() > 0.999 and close(ours[0][same], twins[0][same]) and close(ours[2], twins[2], 1e-4)
    assert close(ours[4][same], twins[4][same], 1e-4)
