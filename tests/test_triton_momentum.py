"""Muon's elementwise passes in Triton against their twins and float64, in the interpreter or on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, momentum
from muon import Muon
from tests.helpers import poisoned_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_directions(shapes, nesterov, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    momenta, grads = ([torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes] for _ in range(2))
    noise = [(torch.rand(grad.shape[:-1].numel(), generator=generator) < 0.3).to(DEVICE) for grad in grads]
    exact = []
    for moving, grad, rows in zip(momenta, grads, noise):
        grad = grad.double() * ~rows.view(*grad.shape[:-1], 1)
        moved = 0.95 * moving.double() + 0.05 * grad
        exact.append((moved, 0.95 * moved + 0.05 * grad if nesterov else moved))
    with backend.running(True), poisoned_memory():
        ours = momentum.directions(momenta, grads, noise, 0.95, nesterov, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for direction, moving, (moved, ahead) in zip(ours, momenta, exact):
        assert direction.dtype == dtype and direction.is_contiguous()
        torch.testing.assert_close(moving.double(), moved, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(direction.double().view_as(ahead), ahead, rtol=tolerance, atol=tolerance)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=3), min_size=1, max_size=3), st.booleans(),
       st.integers(0, 99))
def test_directions_are_the_momentum_ahead(shapes, nesterov, seed):
    check_directions(shapes, nesterov, torch.float32, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_on_a_gpu(dtype):
    check_directions([(64, 129, 48), (1, 1), (3000, 77)], True, dtype, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_is_the_twins(dtype):
    part, rate = torch.randn(300, 77, device=DEVICE), torch.tensor(0.3, device=DEVICE)
    rows = torch.randn(77, 300, device=DEVICE).to(dtype).mT
    expected = (1 - 0.3 * 0.1) * part.double() - 0.3 * 0.7 * rows.double()
    for number in (0.3, rate):
        twin = part.clone()
        momentum.update_twin_(twin, rows, number, 0.1, 0.7)
        torch.testing.assert_close(twin.double(), expected, rtol=1e-6, atol=1e-6)
    version = part._version
    with backend.running(True):
        momentum.update_(part[:], rows, rate, 0.1, 0.7)
    assert part._version > version, "or copies of the weights would not be made again"
    torch.testing.assert_close(part.double(), expected, rtol=1e-6, atol=1e-6)


def test_steps_with_the_kernels_are_steps_with_the_twins():
    def trained(triton):
        generator = torch.Generator().manual_seed(0)
        named = [(f"experts.{name}", torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)))
                 for name, shape in (("gate_up_proj", (3, 16, 8)), ("down_proj", (3, 8, 8)))]
        optimizer = Muon(named, 0.02)
        optimizer.rates = [torch.zeros((), device=DEVICE)] if triton else []
        with backend.running(triton):
            for _ in range(3):
                for _, p in named:
                    p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
                named[0][1].grad[1] = 1e-9  # rounding noise
                optimizer.step()
        return [p for _, p in named] + list(optimizer.named_state().values())
    for ours, expected in zip(trained(True), trained(False)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
