"""The maximum of the logits where the log-sum-exp is known: what is left out changes no number that is asked for."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention, backend
from tests.helpers import tiny_model, tokens
from tests.test_triton_attention import SCALE, close, documents, inputs, interpreted, naive, poisoned


@interpreted
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.sampled_from([(16, 16), (16, 32), (32, 32)]),
    st.sampled_from([None, 0.05, 0.3]), st.sampled_from([None, -3.0, 4.0, 20.0, 1e9]), st.integers(0, 99),
)
def test_scores_that_cannot_matter_are_left_out(B, H, T, tiles, density, exact_above, seed):
    q, k, v, _ = inputs(B, H, T, 24, 16, seed)
    peaks = torch.rand(B, H, T, 1, generator=torch.Generator().manual_seed(seed)) < 0.05
    q = torch.where(peaks, 12 * q, q)
    first = None if density is None else documents(B, T, seed, density)
    _, maximum, lse = naive(q, k, v, SCALE, first)
    limit = None if exact_above is None else torch.tensor(exact_above)
    below = attention.skip_below(lse.float(), first, limit)
    with poisoned(*tiles) as kernels, patch.object(attention, "QUERY_CHUNK", max(tiles)):
        exact = kernels.max_logits(q, k, SCALE, first)
        ours = kernels.max_logits(q, k, SCALE, first, lse.float(), below)
        twin = attention.max_logit_math(q, k, SCALE, first, lse.float(), below)
    assert close(ours, twin)
    if exact_above is None:
        assert torch.equal(ours, exact)
        return
    act = exact > exact_above  # where QK-clip would act: the same decision on the same number
    assert torch.equal(act, ours > exact_above) and torch.equal(ours[act], exact[act])
    bounds, largest = ours[~act], lse.amax((0, 2))[~act]
    assert (bounds >= maximum[~act] - 1e-5).all() and (bounds <= largest.clamp(max=exact_above) + 1e-5).all()


@interpreted
def test_what_is_left_out_is_not_read():
    q, k, v, _ = inputs(2, 3, 48, 24, 16)
    q[:, :, 40] *= 50
    _, maximum, lse = naive(q, k, v, SCALE)
    q[:, :, :32] = math.nan  # not there when the log-sum-exp was made
    with poisoned(16, 16) as kernels:
        below = attention.skip_below(lse.float())
        assert close(kernels.max_logits(q, k, SCALE, None, lse.float(), below), maximum)
        everything = attention.skip_below(lse.float(), None, torch.tensor(1e9))
        assert close(kernels.max_logits(q, q, SCALE, None, lse.float(), everything), lse.amax((0, 2)))


def test_nothing_is_left_out_beside_a_log_sum_exp_that_is_not_finite():
    for value in (math.nan, math.inf):
        lse = torch.zeros(2, 3, 9)
        lse[1, 1, 4] = value
        for limit in (None, torch.tensor(5.0)):
            assert attention.skip_below(lse, None, limit).isfinite().tolist() == [True, False, True]
            assert not (torch.tensor(-1e9) < attention.skip_below(lse, None, limit)[1])


def with_lse(change=lambda lse: lse):
    """An arm as cudnn and flash are, of the one library kernel on the CPU that gives its log-sum-exp."""
    def arm(q, k, v, scale, first, exact_above=None):
        V = v.shape[3]
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, torch.nn.functional.pad(v, (0, q.shape[3] - V)), 0.0, True, scale=scale)
        return output[..., :V], attention.max_logit(q, k, scale, None, change(lse), exact_above)
    return arm


@interpreted
@pytest.mark.parametrize("kernels_on", [False, True])
def test_a_log_sum_exp_that_is_not_one_is_found(kernels_on, monkeypatch):
    monkeypatch.setattr(backend, "_on", kernels_on)
    changes = {"right": lambda lse: lse, "a dimension more": lambda lse: lse.unsqueeze(3), "unset": torch.zeros_like,
               "base 2": lambda lse: lse / math.log(2), "unscaled": lambda lse: lse / 24**-0.5,
               "negative": lambda lse: -lse}
    reasons = {}
    for name, change in changes.items():
        arm = with_lse(change)
        monkeypatch.setattr(attention, "HAVE_LSE", (arm,))
        reasons[name] = attention.wrong(arm, 4, 256, 24, 16, torch.float32, "cpu", False)
    assert reasons.pop("right") is reasons.pop("a dimension more") is None
    assert all("maximum" in reason for reason in reasons.values())


@interpreted
def test_qk_clip_acts_the_same_on_exact_maxima_and_on_bounds(monkeypatch):
    monkeypatch.setattr(backend, "_on", True)
    monkeypatch.setitem(attention.ARMS, "cudnn", with_lse())
    q, k, v, _ = inputs(2, 6, 150, 24, 16)
    q = q * torch.tensor([1, 30, 5, 60, 10, 20]).view(6, 1, 1)  # maxima on both sides of tau
    monkeypatch.setattr(attention, "ARM", {attention.arm_key(q.shape, 16, q.dtype, False): "cudnn"})
    tau = 100.0
    exact, ours = (attention.causal_attention(q, k, v, SCALE, None, limit)[1] for limit in (None, torch.tensor(tau)))
    assert close(exact, naive(q, k, v, SCALE)[1]) and 0 < (exact > tau).sum() < 6 and not torch.equal(exact, ours)
    factors = [torch.where(maxima > tau, tau / maxima, 1.0) for maxima in (exact, ours)]
    assert torch.equal(*factors) and (ours >= exact).all()


@pytest.mark.parametrize("kind", ["mla", "mha"])
def test_a_model_makes_exact_maxima_where_it_was_asked_to(kind, monkeypatch):
    model, x = tiny_model(num_hidden_layers=2, attention=kind), tokens(2, 21)
    found = []
    for arm, exact_above in (("math", -math.inf), ("library", -math.inf), ("library", 1e9), ("library", -math.inf)):
        monkeypatch.setitem(attention.ARMS, "math", with_lse() if arm == "library" else attention.attention_math)
        model.reset_statistics(exact_above)
        model(x[:, :-1], x[:, 1:])
        found.append(model.max_logits.clone())
    exact, same, bounds, again = found
    assert close(same, exact) and torch.equal(again, same)
    assert not any("exact_above" in name for name in model.state_dict())
    assert (bounds > exact).all() and (bounds <= exact + math.log(20)).all()


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_an_arm_of_the_library_compiles_without_a_graph_break(name, monkeypatch):
    monkeypatch.setattr(backend, "_on", True)
    q, k, v, grad = (torch.empty(2, 16, 3, width, device="meta", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
                     for width in (24, 24, 16, 16))
    run = torch.compile(attention.ARMS[name], fullgraph=True, dynamic=False, backend="aot_eager")
    output, maximum = run(q, k, v, SCALE, None, torch.empty((), device="meta"))
    assert output.shape == grad.shape and maximum.shape == (3,) and not maximum.requires_grad
    assert [x.shape for x in torch.autograd.grad(output, (q, k, v), grad)] == [q.shape, k.shape, v.shape]
