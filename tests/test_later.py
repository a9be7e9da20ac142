"""Weight gradients that wait (kernels/later.py), against the same backward of autograd in one go."""

import pytest
import torch

from kernels import backend, experts, later, routing
from model import build
from tests.helpers import tiny_config
from tests.test_triton_experts import DEVICE, random_case


@pytest.fixture(autouse=True)
def nothing_waits():
    yield
    later.stop()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_backward_in_two_halves_is_the_backward(recompute):
    """Two micro-batches of which the weights' halves come last: no Linear's and no expert's weight has a gradient
    before, and all gradients are the same at the end."""
    model = build(tiny_config(q_lora_rank=16, n_shared_experts=1), torch.device("cpu")).init_weights(0)
    for layer in model.layers:
        layer.recompute = recompute
    tokens = torch.randint(0, 97, (2, 3, 33), generator=torch.Generator().manual_seed(0))

    def gradients(split):
        model.zero_grad()
        waiting = []
        for micro in tokens:
            if split:
                later.start() if not waiting else None
            loss, balance = model.train()(micro[:, :-1], micro[:, 1:])
            (loss + balance).backward()
            if split:
                late = {name for name, p in model.named_parameters() if p.grad is None}
                assert late == {name for name, p in model.named_parameters() if p.ndim > 1 and not any(
                    part in name for part in ("embed", "lm_head", "mlp.gate.weight"))}
                waiting.append(later.take())
        for run in reversed(waiting):
            run()
        return {name: p.grad for name, p in model.named_parameters()}
    expected, found = gradients(False), gradients(True)
    assert len(expected) == len(found) > 30
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("on", [False, True], ids=["cpu", "triton"])
def test_the_halves_of_the_experts_backward(on):
    """Of the loop on a CPU and of Triton, bit by bit; an expert without rows gets zeros, an addend its gradient."""
    inputs, chosen, grad = random_case(24, 16, 16, 4, 2, torch.Generator().manual_seed(0), "first")
    device = DEVICE if on else "cpu"
    inputs, chosen, grad = [t.to(device) for t in inputs], chosen.to(device), grad.to(device)

    def run(split):
        x, weights, gate_up, down, addend = (t.clone().requires_grad_() for t in (*inputs, inputs[0]))
        if split:
            later.start()
        y = experts.experts(x, weights, *routing.sort_by_expert(chosen, 4, None), gate_up, down, addends=(addend,))
        y.backward(grad)
        if split:
            assert gate_up.grad is down.grad is None
            later.take()()
        return [y.detach(), *(leaf.grad for leaf in (x, weights, gate_up, down, addend))]
    with backend.running(on):
        whole, halves = run(False), run(True)
    assert not halves[3][2:].any() and halves[3][:2].any()
    for one, other in zip(whole, halves):
        assert torch.equal(one, other)
