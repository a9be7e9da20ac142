"""Attention, the chunked loss and Newton-Schulz against naive versions in float64, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention, cross_entropy
from kernels.cross_entropy import IGNORE, cross_entropy_twin, linear_cross_entropy
from kernels.newton_schulz import COEFFICIENTS, SAFETY, newton_schulz


def naive_attention(q, k, v, scale):
    scores = q @ k.mT * scale
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v, scores.amax(dim=(0, 2, 3))


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
def test_attention_and_its_maximum(length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(2, 3, length, width, generator=generator, dtype=torch.float64, requires_grad=True)
        for width in (12, 12, 8)
    )
    ours, maximum = attention.attention_math(q, k, v, 0.3)  # scores in fp32 inside
    expected, expected_maximum = naive_attention(q, k, v, 0.3)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert torch.allclose(ours, expected, atol=1e-5) and not maximum.requires_grad
    assert torch.allclose(maximum.double(), expected_maximum, atol=1e-5)
    assert torch.allclose(attention.max_logit(q, k, 0.3), maximum)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, expected_grads))


def test_maximum_ignores_what_the_mask_hides():
    q, k = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)
    q[..., 0, 0], k[..., 4, 0], k[..., 0, 0] = 1, 100, -3  # the first query meets the last key only behind the mask
    assert attention.max_logit(q, k, 1.0).item() == 0.0


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 70), st.integers(1, 9), st.integers(2, 50), st.integers(0, 99), st.sampled_from([1, 64, 1000, 2**21])
)
def test_chunked_cross_entropy_equals_its_twin(n, width, vocab, seed, chunk):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, generator=generator) for size in ((n, width), (vocab, width)))
    targets = torch.randint(0, vocab, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < 0.2] = IGNORE
    results = []
    before, cross_entropy.CHUNK_ELEMENTS["cpu"] = cross_entropy.CHUNK_ELEMENTS["cpu"], chunk
    for function in (linear_cross_entropy, cross_entropy_twin):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, targets)
        (loss * 0.7).backward()
        results.append((loss, h.grad, w.grad))
    cross_entropy.CHUNK_ELEMENTS["cpu"] = before
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(*results))


def test_chunked_cross_entropy_without_gradients_and_in_bf16():
    hidden, weight, targets = torch.randn(50, 16), torch.randn(200, 16), torch.randint(0, 200, (50,))
    exact = cross_entropy_twin(hidden, weight, targets)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, weight, targets), exact)
    loss = linear_cross_entropy(hidden.bfloat16(), weight.requires_grad_(), targets)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 0.02 and weight.grad.dtype == torch.float32


def test_logits_are_never_whole(monkeypatch):
    largest = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: (largest.append((out := original(*args)).numel()), out)[1])
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 1000)
    linear_cross_entropy(torch.randn(100, 4), torch.randn(50, 4), torch.randint(0, 50, (100,)))
    assert max(largest) <= 1000


# ---------------------------------------------------------------------- Newton-Schulz


def singular_values(X):
    return torch.linalg.svdvals(X.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "table, low, high", [("jordan", 0.65, 1.25), ("you", 0.95, 1.06), ("polar_express", 0.84, 1.16)]
)
def test_singular_values_of_wide_gaussians(table, low, high, dtype):
    X = torch.randn(3, 64, 512, generator=torch.Generator().manual_seed(0))
    values = singular_values(newton_schulz(X, dtype=dtype, coefficients=table))
    slack = 0.03 if dtype == torch.bfloat16 else 0
    assert low - slack <= values.min() and values.max() <= high + slack


def test_singular_values_of_square_gaussians():
    values = singular_values(newton_schulz(torch.randn(256, 256, generator=torch.Generator().manual_seed(0))))
    assert values.max() <= 1.25 and ((values > 0.7) & (values < 1.2)).double().mean() >= 0.8


def test_orthogonal_equivariance_in_float64():
    X = torch.randn(20, 50, dtype=torch.float64)
    Q, P = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (20, 50))
    assert (newton_schulz(Q @ X @ P) - Q @ newton_schulz(X) @ P).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "factor, exact", [(2.0**-30, True), (2.0**12, True), (1e-8, False), (1e-4, False), (1e4, False)]
)
def test_scale_invariance(factor, exact):
    X = torch.randn(16, 40)
    a, b = newton_schulz(X), newton_schulz(X * factor)
    assert torch.equal(a, b) if exact else (a - b).norm() / a.norm() <= 1e-5


def test_transpose_batch_padding_and_zero():
    X = torch.randn(4, 24, 60)
    assert (newton_schulz(X.mT) - newton_schulz(X).mT).norm() / 24**0.5 <= 1e-5
    assert torch.equal(newton_schulz(X), torch.stack([newton_schulz(x) for x in X]))
    assert torch.allclose(newton_schulz(F.pad(X, (0, 7, 0, 5)))[:, :24, :60], newton_schulz(X), atol=1e-6)
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert newton_schulz(torch.full((3, 5), 1e-30)).norm() > 0.5  # no additive epsilon swallows small gradients
    assert newton_schulz(torch.randn(2, 3, 5, 7)).shape == (2, 3, 5, 7)


@pytest.mark.parametrize("table", ["jordan", "you", "polar_express"])
@pytest.mark.parametrize("shape", [(9, 32, 128), (3, 128, 48), (2, 20, 40)])
def test_the_steps_in_the_space_of_the_gram_matrix_are_those_one_after_another(table, shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    G[0] = G[0, :, :1] * G[0, :1]  # of rank one
    G[1] *= torch.logspace(0, -6, shape[2])
    X = G.double() / G.double().norm(dim=(-2, -1), keepdim=True) / SAFETY[table]
    rows = COEFFICIENTS[table]
    for step in range(5):
        a, b, c = rows[min(step, len(rows) - 1)]
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    assert (newton_schulz(G.double(), coefficients=table) - X).abs().max() < 1e-10
    assert ((newton_schulz(G, coefficients=table) - X).norm(dim=(1, 2)) < 2e-4 * X.norm(dim=(1, 2))).all()
