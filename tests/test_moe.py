"""Routing and experts against literal, per-token references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import experts as expert_kernels
from kernels import routing
from moe import Experts, MoE, Router, default_scaling_factor
from tests.helpers import tiny_model, tokens


def reference_route(logits, bias, top_k, n_group, topk_group, normalise, scale):
    """One token at a time, as the papers say it; ties to the lowest index."""
    scores = logits.sigmoid()
    choice = (scores + bias).tolist()
    size = len(choice) // n_group
    groups = range(n_group)
    if n_group > 1:
        best_two = [sorted(choice[g * size : (g + 1) * size])[-2:] for g in groups]
        value = [torch.tensor(pair).sum().item() for pair in best_two]  # in fp32, where two groups may tie
        groups = sorted(groups, key=lambda g: -value[g])[:topk_group]
    allowed = sorted(e for g in groups for e in range(g * size, (g + 1) * size))
    chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
    weights = [scores[e].item() for e in chosen]
    total = sum(weights) if normalise else 1
    return chosen, [scale * w / total for w in weights]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([(8, 1), (8, 2), (8, 4), (6, 3), (12, 4)]), st.data())
def test_route_equals_the_literal_reference(shape, data):
    n_experts, n_group = shape
    topk_group = data.draw(st.integers(1, n_group))
    top_k = data.draw(st.integers(1, n_experts // n_group * topk_group))
    normalise, ties, seed = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(9, n_experts, generator=generator), torch.randn(n_experts, generator=generator) * 0.3
    if ties:
        logits, bias = logits.round(), torch.zeros(n_experts)
    weights, chosen, _ = routing.choose(logits, bias, top_k, n_group, topk_group, normalise, 1.5)
    for t in range(9):
        expected, expected_weights = reference_route(logits[t], bias, top_k, n_group, topk_group, normalise, 1.5)
        assert chosen[t].tolist() == expected
        assert weights[t].tolist() == pytest.approx(expected_weights, rel=1e-5)


def test_the_choice_on_a_cpu_is_that_of_a_stable_sort():
    values = torch.randn(200, 33, generator=torch.Generator().manual_seed(0)).mul(2).round() / 4 + 0.1  # many ties
    values[5], values[6, ::2], values[7, 3], values[8, 4] = -7.0, float("-inf"), float("nan"), float("inf")
    values[9, 5:9], values[9, 7] = float("nan"), -torch.tensor(float("nan"))  # with the sign bit
    for k in (1, 4, 33):
        expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(routing._lowest_index_topk(values, k), expected)


def test_bias_selects_but_does_not_weigh():
    logits = torch.randn(20, 6)
    weights, chosen, _ = routing.choose(logits, torch.tensor([0, 0, 0, 9.0, 9.0, 0]), 2)
    assert (chosen.sort(-1).values == torch.tensor([3, 4])).all()
    assert torch.allclose(weights.sum(-1), torch.ones(20))
    assert torch.allclose(weights[:, 0], logits.sigmoid().gather(1, chosen)[:, 0] / logits.sigmoid()[:, 3:5].sum(-1))


def test_all_negative_biased_scores_still_choose_inside_the_groups():
    _, chosen, _ = routing.choose(torch.randn(50, 8), torch.full((8,), -5.0), 3, 4, 2)
    groups = (chosen // 2).tolist()
    assert all(len(set(row)) <= 2 for row in groups) and all(len(set(row)) == 3 for row in chosen.tolist())


def test_sort_is_stable_and_counts_every_row():
    chosen = torch.randint(0, 5, (40, 3))
    chosen[chosen == 2] = 4  # an expert without tokens
    order, inverse, counts = routing.sort_by_expert(chosen, 5)
    assert order.tolist() == sorted(range(120), key=lambda row: (chosen.flatten()[row].item(), row))
    assert torch.equal(order[inverse], torch.arange(120))
    assert counts.tolist() == [(chosen == e).sum().item() for e in range(5)] and counts[2] == 0


def make_moe(n_experts=6, top_k=2, shared=None):
    moe = MoE(Router(16, n_experts, top_k, 1, 1, True, 1.7), Experts(n_experts, 16, 8), shared)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return moe


@pytest.mark.parametrize("shared", [None, torch.nn.Linear(16, 16)])
def test_the_residual_is_added_bit_by_bit_as_it_was(shared):
    moe, (x, residual) = make_moe(shared=shared), torch.randn(2, 3, 7, 16)
    plain, routed = moe(x)
    ours, same = moe(x, residual)
    assert torch.equal(ours, residual + plain)
    assert torch.equal(same.balance, routed.balance) and torch.equal(same.counts_E, routed.counts_E)


def double_loop(moe, x_ND):
    """Every token, every chosen expert, one matrix-vector product at a time."""
    weights, chosen, *_ = moe.gate(x_ND)
    rows = []
    for t, x in enumerate(x_ND):
        row = torch.zeros_like(x)
        for k, e in enumerate(chosen[t].tolist()):
            gate, up = (moe.experts.gate_up_proj[e] @ x).chunk(2)
            row = row + weights[t, k] * (moe.experts.down_proj[e] @ (gate * gate.sigmoid() * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("mlp", ["operator", "mlp_loop", "mlp_grouped"])
@pytest.mark.parametrize("bias", [0.0, 5.0])  # 5: one expert takes a choice of every token, others may be empty
def test_experts_equal_the_double_loop_with_gradients(monkeypatch, mlp, bias):
    monkeypatch.setattr(expert_kernels, "_grouped_is_best", lambda *_: mlp == "mlp_grouped")
    monkeypatch.setattr(expert_kernels, "_operator_is_best", lambda *_: mlp == "operator")
    results = []
    for compute in (lambda moe, x: moe(x)[0], lambda moe, x: double_loop(moe, x.flatten(0, 1)).view_as(x)):
        moe = make_moe()
        moe.gate.e_score_correction_bias[2] = bias
        moe.gate.e_score_correction_bias[5] = -bias
        x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = compute(moe, x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in moe.parameters())])
    for ours, expected in zip(*results):
        assert torch.allclose(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("begun", [0.0, 1.0])
def test_the_operator_on_some_of_the_experts_equals_float64_and_adds_to_gradients(begun):
    """Expert parallelism: choices of experts that another rank holds (number 4) have no row here; expert 2 has none."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.tensor([[0, 1], [4, 3], [3, 0], [4, 4], [1, 3], [0, 4]])
    random = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    inputs = random(6, 16), random(6, 2), random(4, 16, 16), random(4, 16, 8)
    addends, grad, kept = (random(6, 16), random(2, 3, 16)), random(6, 16), (random(4, 16, 16), random(4, 16, 8))
    x, weights, gate_up, down = (t.clone().requires_grad_() for t in inputs)
    expected = []
    for n in range(6):
        held = [(k, e) for k, e in enumerate(chosen[n].tolist()) if e < 4]
        parts = [weights[n, k] * (down[e] @ expert_kernels.swiglu(gate_up[e] @ x[n])) for k, e in held]
        expected.append(sum(parts, torch.zeros(16)))
    expected = torch.stack(expected) + addends[0] + addends[1].flatten(0, 1)
    grads = torch.autograd.grad(expected, (x, weights, gate_up, down), grad)
    rows = routing.sort_by_expert(chosen, 4, int((chosen < 4).sum()))
    x, weights, gate_up, down = (t.float().requires_grad_() for t in inputs)
    into = [t.float() for t in kept]
    y = expert_kernels.experts(x, weights, *rows, gate_up, down, None, [a.float() for a in addends],
                               (*into, torch.tensor(begun)))
    y.backward(grad.float())
    assert torch.allclose(y.double(), expected, atol=1e-4)
    ours = x.grad, weights.grad, *(after - begun * before.float() for after, before in zip(into, kept))
    for got, wanted in zip(ours, grads):
        assert torch.allclose(got.double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_model_in_float64_has_the_weights_of_its_router_in_float32():
    results = []
    for dtype in (torch.float32, torch.float64):
        moe = make_moe().to(dtype)
        x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        moe(x)[0].square().sum().backward()
        results.append([x.grad, *(p.grad for p in moe.parameters())])
    assert all(torch.allclose(a.double(), b, rtol=1e-3, atol=1e-4) for a, b in zip(*results))


def test_a_token_does_not_depend_on_the_others():
    moe, x = make_moe(), torch.randn(2, 9, 16)
    assert torch.allclose(moe(x)[0][:, :4], moe(x[:, :4])[0], atol=1e-6)


def test_only_chosen_rows_are_computed(monkeypatch):
    rows = []
    for name in ("mlp_loop", "mlp_grouped"):
        original = getattr(expert_kernels, name)
        monkeypatch.setattr(expert_kernels, name, lambda x, *rest, f=original: (rows.append(len(x)), f(x, *rest))[1])
    monkeypatch.setattr(expert_kernels, "_operator_is_best", lambda *_: False)
    make_moe()(torch.randn(2, 50, 16))
    assert rows == [2 * 50 * 2]


def test_what_the_backward_keeps_grows_linearly_with_the_tokens():
    kept = []
    for n in (64, 256):
        elements = 0

        def note(tensor):
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            make_moe(n_experts=32)(torch.randn(1, n, 16, requires_grad=True))
        kept.append(elements)
    weights = 32 * 3 * 8 * 16
    assert (kept[1] - weights) / (kept[0] - weights) < 4.2


def test_grouped_matmul_and_loop_agree_in_bf16():
    x = torch.randn(40, 16, dtype=torch.bfloat16)
    counts = torch.tensor([10, 0, 25, 5])
    gate_up, down = torch.randn(4, 16, 16, dtype=torch.bfloat16), torch.randn(4, 16, 8, dtype=torch.bfloat16)
    loop = expert_kernels.mlp_loop(x, counts, gate_up, down)
    assert torch.allclose(loop, expert_kernels.mlp_grouped(x, counts, gate_up, down), rtol=0.05, atol=0.2)


# ---------------------------------------------------------------------- balance


def test_balance_loss_by_hand_and_its_gradient_balances():
    logits = torch.randn(2 * 8, 4, requires_grad=True)
    _, chosen, scores = routing.choose(logits, torch.zeros(4), 2)
    expected = 0.0
    for sequence in range(2):
        rows = slice(sequence * 8, sequence * 8 + 8)
        share = scores[rows] / scores[rows].sum(-1, keepdim=True)
        for e in range(4):
            fraction = 4 / (2 * 8) * (chosen[rows] == e).sum()
            expected = expected + fraction * share[:, e].mean()
    loss = routing.sequence_balance(scores, chosen, 2)
    assert torch.allclose(loss, expected)
    skewed = torch.zeros(8, 4)
    skewed[:, 0], skewed.requires_grad = 3.0, True
    _, chosen, scores = routing.choose(skewed, torch.zeros(4), 1)
    loss = routing.sequence_balance(scores, chosen, 1)
    loss.backward()
    assert loss > 1.5 and (skewed.grad[:, 0] > 0).all() and (skewed.grad[:, 1:] < 0).all()


def test_even_router_has_balance_loss_one():
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    assert routing.sequence_balance(torch.full((8, 4), 0.5), chosen, 1).item() == pytest.approx(1.0)


def test_scores_that_underflow_do_not_look_balanced():
    scores = torch.tensor([[1e-30, 1e-33, 1e-33, 1e-33]] * 4)
    assert routing.sequence_balance(scores, torch.zeros(4, 1, dtype=torch.int64), 1) > 3.9


def test_bias_update_moves_against_the_load_and_keeps_the_mean():
    gate = make_moe().gate
    gate.update_bias_(torch.tensor([10, 0, 5, 5, 5, 5]), 0.1)
    assert gate.e_score_correction_bias.tolist() == pytest.approx([-0.1, 0.1, 0, 0, 0, 0])
    gate.update_bias_(torch.tensor([10, 1, 1, 1, 1, 1]), 0.1)
    assert gate.e_score_correction_bias.mean().item() == pytest.approx(0, abs=1e-7)
    before = gate.e_score_correction_bias.clone()
    gate.update_bias_(torch.tensor([9, 0, 0, 0, 0, 0]), 0.0)
    assert torch.equal(before, gate.e_score_correction_bias) and before.dtype == torch.float32


def test_every_moe_layer_learns_its_own_bias():
    model, x = tiny_model(), tokens(4, 33)
    before = model.routing.biases().clone()
    model(x[:, :-1], x[:, 1:])
    model.routing.balance_(0.01)
    assert ((model.routing.biases() - before).abs().amax(-1) > 0).all() and len(before) == 2


@pytest.mark.parametrize("shape, expected", [((64, 6), 2.446), ((384, 8), 2.827), ((256, 8), 2.827), ((8, 2), 1.409)])
def test_default_scaling_factor_is_the_published_one(shape, expected):
    assert default_scaling_factor(*shape) == pytest.approx(expected, abs=0.01)
