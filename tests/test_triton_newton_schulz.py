"""Newton-Schulz in Triton: the symmetric product against float64 at random shapes and strides, then all of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import owners
from kernels import backend, newton_schulz, triton_newton_schulz
from kernels.newton_schulz import newton_schulz_replayed, symmetric_product_twin
from muon import Muon
from tests.helpers import poisoned_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_on():
    with backend.running(True):
        yield


@pytest.fixture
def poisoned():
    with poisoned_memory():
        yield


def exact(X, A, alpha, beta, gamma):
    X = X.double()
    addend = 0 if A is None else beta * A.double()
    return alpha * X @ X.mT + addend + gamma * torch.eye(X.shape[1], dtype=torch.float64, device=X.device)


def matrices(B, M, K, layout, generator, dtype=torch.float32):
    """(B, M, K) in rows, transposed, or as every second element of something larger."""
    randn = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return {"rows": lambda: randn(B, M, K), "columns": lambda: randn(B, K, M).mT,
            "gaps": lambda: randn(B, 2 * M, 2 * K + 1)[:, ::2, 1::2], "same": lambda: randn(1, M, K).expand(B, M, K),
            "batch inside": lambda: randn(M, B, K).transpose(0, 1)}[layout]()


def check(B, M, K, layout, addend, alpha, beta, gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    X = matrices(B, M, K, layout, generator)
    A = None
    if addend == "symmetric":
        A = torch.randn(B, M, M, generator=generator).to(DEVICE)
        A = (A + A.mT).mT
    elif addend == "gram":  # as Newton-Schulz calls it
        A = X = triton_newton_schulz.symmetric_product(X)
    ours, expected = triton_newton_schulz.symmetric_product(X, A, alpha, beta, gamma), exact(X, A, alpha, beta, gamma)
    assert ours.shape == (B, M, M) and ours.is_contiguous() and torch.equal(ours, ours.mT)
    largest = max([1.0, *expected.abs().flatten().tolist()])
    assert ((ours - expected).abs() <= 1e-5 * largest).all()
    assert ((symmetric_product_twin(X, A, alpha, beta, gamma) - expected).abs() <= 1e-5 * largest).all()


LAYOUTS = ["rows", "columns", "gaps", "same", "batch inside"]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 3), st.integers(0, 150), st.integers(0, 100), st.sampled_from(LAYOUTS),
       st.sampled_from(["none", "symmetric", "gram"]), st.sampled_from([0.1, 1.0, 3.0]), st.floats(-5, 5),
       st.sampled_from([0.0, 3.4]), st.integers(0, 99))
def test_symmetric_product_equals_float64(B, M, K, layout, addend, alpha, beta, gamma, seed):
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
        check(B, M, K, layout, addend, alpha, beta, gamma, seed)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 8, 9, 17])
def test_every_tile_of_the_triangle_is_one_program(monkeypatch, poisoned, blocks):
    """With tiles of 16, so that there are many, and groups of lines that end early."""
    monkeypatch.setattr(triton_newton_schulz, "pick_blocks", lambda dtype: (16, 16, 4, 1))
    check(2 if blocks < 9 else 1, 16 * blocks - 3, 5, "rows", "none", 1.0, 0.0, 1.0, blocks)


def test_offsets_pass_32_bits():
    """A stack whose third matrix begins beyond 2^31 elements; of the storage only what is used is ever touched."""
    M, K, far = 3, 5, 2**30 + 8
    storage = torch.empty(2 * far + M * K, dtype=torch.float16, device=DEVICE)
    X = storage.as_strided((3, M, K), (far, K, 1))
    X.copy_(torch.randn(3, M, K, generator=torch.Generator().manual_seed(0)))
    ours = triton_newton_schulz.symmetric_product(X)
    assert torch.allclose(ours.double(), exact(X, None, 1, 0, 0), rtol=1e-2, atol=1e-2)


def test_a_matrix_is_the_same_in_any_batch():
    X = torch.randn(4, 70, 33, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(triton_newton_schulz.symmetric_product(X)[1:2], triton_newton_schulz.symmetric_product(X[1:2]))


@pytest.mark.parametrize("shape, table", [
    ((64, 128), "jordan"), ((100, 70), "jordan"), ((2, 3, 30, 50), "you"), ((1, 1, 40), "polar_express"),
    ((2, 65, 65), "polar_express"), ((0, 4, 5), "you"), ((2, 130, 6), "polar_express"), ((40, 140), "you")])
def test_newton_schulz_equals_float64(triton_on, poisoned, monkeypatch, shape, table):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    twin = newton_schulz.newton_schulz(G.double(), coefficients=table)
    calls = []
    original = newton_schulz.symmetric_product
    monkeypatch.setattr(newton_schulz, "symmetric_product", lambda *a, **o: (calls.append(1), original(*a, **o))[1])
    monkeypatch.setattr(newton_schulz, "triton_pays", lambda X: True)
    ours = newton_schulz.newton_schulz(G, coefficients=table)
    with backend.running(False):
        fp32_twin = newton_schulz.newton_schulz(G, coefficients=table)
    assert len(calls) == 10 and ours.shape == G.shape and ours.dtype == G.dtype
    # one singular value at 1 is where Polar Express's first step is steep: 20 times every rounding, the twin's too
    assert (ours - twin).norm() <= max(1e-5 * twin.norm(), 2 * (fp32_twin - twin).norm())


def test_zero_scale_and_padding_on_triton(triton_on):
    X = torch.randn(2, 24, 60, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ns = newton_schulz.newton_schulz
    assert torch.equal(ns(torch.zeros_like(X)), torch.zeros_like(X))
    assert torch.equal(ns(X), ns(X * 2**-20))
    assert torch.allclose(ns(torch.nn.functional.pad(X, (0, 7, 0, 5)))[:, :24, :60], ns(X), atol=1e-6)


def test_symmetric_product_is_a_proper_operator():
    if DEVICE.type == "cpu":
        X = torch.randn(2, 5, 7)
        torch.library.opcheck(newton_schulz._symmetric_product, (X, None, 1.0, 0.0, 2.0))
        torch.library.opcheck(newton_schulz._symmetric_product, (X[..., :5], X[..., :5] + X[..., :5].mT, 1.0, 0.5, 0.0))


def test_replay_is_the_plain_function_off_cuda():
    G = torch.randn(3, 8, 20)
    assert torch.equal(newton_schulz_replayed(G, steps=3, dtype=torch.bfloat16),
                       newton_schulz.newton_schulz(G, steps=3, dtype=torch.bfloat16)) and not newton_schulz._graphs


def muon_steps(device):
    """Parameters after three steps: jobs of one shape that follow each other, wide, tall, square and stacked ones."""
    shapes = {"a.q_proj.weight": (40, 64), "b.q_proj.weight": (40, 64), "c.o_proj.weight": (64, 64),
              "d.experts.down_proj": (5, 32, 48), "e.up_proj.weight": (80, 32)}
    generator = torch.Generator().manual_seed(0)
    named = {name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
             for name, shape in shapes.items()}
    optimizer = Muon(named.items(), ns_dtype=torch.float32)
    for _ in range(3):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer.step()
    return named


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, M, K", [(3, 33, 77), (40, 256, 768), (12, 768, 1152), (4, 768, 768), (2, 2048, 7168),
                                     (1, 1408, 2048), (5, 129, 1000)])
def test_16_bit_products_are_as_accurate_as_the_twin(B, M, K, dtype):
    for layout in ("rows", "columns"):
        X = matrices(B, M, K, layout, torch.Generator().manual_seed(0), dtype) / K**0.5
        for A, alpha, beta, gamma in ((None, 1.0, 0.0, 0.0), ("gram", 2.0, -4.8, 3.4)):
            if A is not None:
                A = X = triton_newton_schulz.symmetric_product(X)
            expected = exact(X, A, alpha, beta, gamma)
            ours = triton_newton_schulz.symmetric_product(X, A, alpha, beta, gamma)
            twin = symmetric_product_twin(X, A, alpha, beta, gamma)
            assert torch.equal(ours, ours.mT) and not ours.isnan().any()
            assert (ours - expected).norm() <= 1.5 * (twin - expected).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("table", ["jordan", "polar_express"])
@pytest.mark.parametrize("shape", [(64, 256, 768), (64, 768, 256), (768, 768), (12, 96, 768), (2048, 7168)])
def test_16_bit_newton_schulz_is_as_accurate_as_the_twin(shape, table):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cuda()
    expected = newton_schulz.newton_schulz(G.double(), coefficients=table)
    errors = []
    for on in (True, False):
        with backend.running(on):
            errors.append((newton_schulz.newton_schulz(G, dtype=torch.bfloat16, coefficients=table) - expected).norm())
    assert errors[0] <= 1.5 * errors[1]


@pytest.mark.gpu
@pytest.mark.parametrize("on", [True, False])
def test_replayed_graphs_equal_plain_calls(monkeypatch, on):
    """Shapes in turn, several times, all results used after the last call; then no room for graphs."""
    monkeypatch.setattr(newton_schulz, "_graphs", {})
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(6, 256, 768), (3, 768, 128), (512, 512), (6, 256, 768), (2, 40, 70)]
    with backend.running(on):
        for _ in range(4):
            pairs = []
            for shape in shapes:
                for dtype in (torch.bfloat16, torch.float32):
                    G = torch.randn(shape, generator=generator, device="cuda")
                    replayed = newton_schulz_replayed(G, steps=5, dtype=dtype, coefficients="you")
                    pairs.append((replayed, newton_schulz.newton_schulz(G, 5, dtype, "you")))
            for replayed, plain in pairs:
                tolerance = 1e-5 if plain.dtype == torch.float32 else 1e-2
                torch.testing.assert_close(replayed, plain, rtol=1e-2, atol=tolerance)
        assert len(newton_schulz._graphs) == 8
        G = torch.randn(4, 64, 96, device="cuda")
        for limit, value in (("REPLAY_GRAPHS", 8), ("REPLAY_ELEMENTS", 10)):
            monkeypatch.setattr(newton_schulz, limit, value)
            assert torch.equal(newton_schulz_replayed(G), newton_schulz.newton_schulz(G))
        assert len(newton_schulz._graphs) == 8


@pytest.mark.gpu
def test_replayed_steps_of_muon_equal_plain_ones(monkeypatch):
    monkeypatch.setattr(owners, "BATCH_ELEMENTS", 1)
    results = []
    for limit in (newton_schulz.REPLAY_ELEMENTS, 0):
        monkeypatch.setattr(newton_schulz, "_graphs", {})
        monkeypatch.setattr(newton_schulz, "REPLAY_ELEMENTS", limit)
        results.append(muon_steps("cuda"))
        assert len(newton_schulz._graphs) == (4 if limit else 0)
    for name, p in results[0].items():
        torch.testing.assert_close(p, results[1][name], rtol=1e-5, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 500), st.sampled_from([1e-30, 1.0, 1e30]),
       st.integers(0, 99))
def test_normalised_is_exact_at_any_scale(B, M, K, scale, seed):
    G = torch.randn(B, M, K, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * scale
    G[0, 0, 0] = 0
    with backend.running(True), poisoned_memory():
        ours = newton_schulz.normalised(G, torch.float32, 1.02)
    norm = G.double().norm(dim=(-2, -1), keepdim=True)
    expected = torch.where(norm > 0, G.double() / (1.02 * norm), 0.0)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(newton_schulz.normalised_twin(G, torch.float32, 1.02), ours, rtol=1e-5, atol=1e-7)


def test_a_zero_matrix_stays_zero_and_a_bad_one_stays_bad():
    G = torch.ones(3, 20, 30, device=DEVICE)
    G[0], G[1, 3, 4] = 0, torch.nan
    with backend.running(True):
        ours = newton_schulz.normalised(G, torch.float32, 1.0)
    assert not ours[0].any() and ours[1].isnan().any() and torch.allclose(ours[2], torch.tensor(600.0).rsqrt())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(7, 256, 768), (2, 768, 2048), (1, 2048, 7168)])
def test_normalised_in_bf16(shape):
    G = torch.randn(shape, device=DEVICE).bfloat16()
    with backend.running(True):
        ours = newton_schulz.normalised(G, torch.bfloat16, 1.0)
    expected = G.double() / G.double().norm(dim=(-2, -1), keepdim=True)
    assert (ours.double() - expected).norm() < 3e-3 * expected.norm()
