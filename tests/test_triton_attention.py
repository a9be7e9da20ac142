"""Attention's Triton kernels against naive versions in float64: through the interpreter in fp32 at sizes that divide
nothing, with outputs poisoned beforehand; on a GPU at the models' own sizes."""

import math
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention, backend
from tests.helpers import poisoned_memory, tiny_model, tokens

interpreted = pytest.mark.skipif(not backend.INTERPRETED, reason="needs TRITON_INTERPRET=1; the gpu tests are below")
SCALE = 0.3


def naive(q, k, v, scale, first=None):
    """Output, maximum per head and log-sum-exp from the whole matrix of scores, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    t = torch.arange(q.shape[2], device=q.device)
    visible = (t <= t[:, None])[None]
    if first is not None:
        visible = visible & (t >= first[:, :, None])
    scores = (q @ k.mT * scale).masked_fill(~visible[:, None], float("-inf"))
    return scores.softmax(-1) @ v, scores.amax(dim=(0, 2, 3)), scores.logsumexp(-1)


def inputs(B, H, T, Q, V, seed=0, device="cpu", dtype=torch.float32):
    """q, k, v, grad laid out as the model has them: q and k as (B, T, H, Q), v a slice of something wider."""
    generator = torch.Generator(device).manual_seed(seed)
    make = lambda width: torch.randn(B, T, H, width, generator=generator, device=device).to(dtype)
    return [x.transpose(1, 2) for x in (make(Q), make(Q), make(V + 3)[..., 3:], make(V))]


def documents(B, T, seed=0, density=0.1, device="cpu"):
    """first_BT of documents that begin at random."""
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(begins, torch.arange(T), 0).cummax(1).values.to(torch.int32).to(device)


def close(ours, expected, tolerance=1e-5):
    """Relative to the largest element, or to 1: a gradient that is a difference of equal terms may be all zeros."""
    return (ours - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@contextmanager
def poisoned(small, large):
    """Tiles of these sizes, and NaN in everything that torch.empty gives: what is not written shows."""
    from kernels import triton_attention

    def blocks(kernel, T, Q, V, dtype):
        BM, BN = (small, large) if kernel == "dkdv" else (large, small)
        return {"BM": BM, "BN": BN, "EVEN": T % large == 0, "num_warps": 4, "num_stages": 1}
    with patch.object(triton_attention, "blocks", blocks), poisoned_memory():
        yield triton_attention


@pytest.fixture
def triton_on(monkeypatch):
    monkeypatch.setattr(backend, "_on", True)


# ---------------------------------------------------------------------- kernels


@interpreted
@settings(deadline=None, max_examples=70)
@given(
    st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]),
    st.integers(1, 40),
    st.sampled_from([(24, 16), (48, 32), (96, 64), (192, 128), (16, 16), (13, 5), (70, 40), (40, 48)]),
    st.sampled_from([(16, 16), (16, 32), (32, 32), (16, 32)]),
    st.sampled_from([None, 0.03, 0.1, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_attention_forward_backward_and_maximum(heads, T, widths, tiles, density, seed):
    q, k, v, grad = inputs(*heads, T, *widths, seed)
    first = None if density is None else documents(heads[0], T, seed, density)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected, maximum, lse = naive(*leaves, SCALE, first)
    expected_grads = torch.autograd.grad((expected * grad).sum(), leaves)
    with torch.no_grad(), poisoned(*tiles) as kernels:
        ours, our_lse, our_maximum = kernels.forward(q, k, v, SCALE, first)
        grads = kernels.backward(grad, q, k, v, ours, our_lse, SCALE, first)
        alone = kernels.max_logits(q, k, SCALE, first)
    assert close(ours, expected) and close(our_lse, lse) and close(our_maximum, maximum) and close(alone, maximum)
    assert all(close(*pair) for pair in zip(grads, expected_grads))
    assert ours.transpose(1, 2).is_contiguous() and all(x.transpose(1, 2).is_contiguous() for x in grads)


@interpreted
@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 2), st.integers(1, 20), st.integers(1, 150), st.sampled_from([(16, 4), (64, 32), (20, 9), (48, 16)]),
    st.integers(0, 99),
)
def test_latent_decode(B, H, S, widths, seed):
    R, P = widths
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, R + P, generator=generator)
    cache = torch.randn(B, S + 3, R + P, generator=generator)[:, :S]
    expected = naive_decode(q, cache, R)
    assert close(attention.latent_decode_math(q, cache, SCALE, R), expected)
    with poisoned(16, 16):
        from kernels import triton_decode

        assert close(triton_decode.latent_decode(q, cache, SCALE, R), expected)


def naive_decode(q, cache, R):
    return (q.double() @ cache.double().mT * SCALE).softmax(-1) @ cache[..., :R].double()


@interpreted
def test_whole_tiles_and_their_real_sizes():  # no row is masked at T = 128 or 256, and loops have several turns
    from kernels import triton_attention
    for T in (128, 256, 150):
        for first in (None, documents(1, T, density=0.02)):
            q, k, v, grad = inputs(1, 1, T, 24, 16)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            expected, maximum, _ = naive(*leaves, SCALE, first)
            expected_grads = torch.autograd.grad((expected * grad).sum(), leaves)
            with torch.no_grad():
                ours, lse, our_maximum = triton_attention.forward(q, k, v, SCALE, first)
                grads = triton_attention.backward(grad, q, k, v, ours, lse, SCALE, first)
                again = triton_attention.backward(grad, q, k, v, ours, lse, SCALE, first)
            assert close(ours, expected) and close(our_maximum, maximum)
            assert all(close(*pair) for pair in zip(grads, expected_grads))
            assert all(torch.equal(*pair) for pair in zip(grads, again))


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_a_number_and_infinity_reach_the_outputs_and_the_maximum(triton_on):
    q, k, v, _ = inputs(2, 2, 40, 24, 16)
    for value in (math.nan, math.inf, -math.inf):
        broken = q.clone()
        broken[1, 1, 20, 3] = value
        ours, maximum = attention.causal_attention(broken, k, v, SCALE)
        twin, expected = attention.attention_math(broken, k, v, SCALE)
        assert not ours[1, 1, 20].isfinite().any() and torch.equal(ours.isfinite(), twin.isfinite())
        assert maximum[0].isfinite() and not maximum[1].isfinite() and not expected[1].isfinite()
        assert not attention.max_logit(broken, k, SCALE)[1].isfinite()


@interpreted
def test_masked_pairs_do_not_count(triton_on):
    q, k = torch.zeros(1, 1, 5, 16), torch.zeros(1, 1, 5, 16)
    q[..., 0, 0], k[..., 4, 0], k[..., 0, 0] = 1, 100, -3  # the first query meets the last key only behind the mask
    q[..., 3, 1], k[..., 1, 1] = 1, 50  # and the fourth meets the second across a document's border
    first = torch.tensor([[0, 0, 2, 2, 2]], dtype=torch.int32)
    for function in (attention.max_logit, lambda *args: attention.causal_attention(args[0], args[1], k, *args[2:])[1]):
        assert function(q, k, 1.0, first).item() == 0.0 and function(q, k, 1.0, None).item() == 50.0
    assert attention.max_logit(-q[:, :, :1], -q[:, :, :1] * -2, 1.0).item() == -2.0  # signed


# ---------------------------------------------------------------------- twins


@pytest.mark.parametrize("T", [1, 130, 300])
def test_the_twin_knows_documents(T):
    first = documents(2, T, density=0.02)
    q, k, v, grad = (x.double().requires_grad_() for x in inputs(2, 3, T, 12, 8))
    expected, maximum, _ = naive(q, k, v, SCALE, first)
    ours, our_maximum = attention.attention_math(q, k, v, SCALE, first)
    pairs = zip(*(torch.autograd.grad((x * grad).sum(), (q, k, v)) for x in (ours, expected)))
    assert close(ours, expected) and close(our_maximum, maximum) and all(close(*pair) for pair in pairs)
    assert torch.allclose(attention.max_logit_math(q, k, SCALE, first), our_maximum)


@interpreted
@pytest.mark.parametrize("B, T", [(0, 4), (2, 0)])
def test_nothing_to_do(triton_on, B, T):
    q, k, v, _ = (x.requires_grad_() for x in inputs(B, 3, T, 24, 16))
    for function in (attention.causal_attention, attention.attention_math):
        output, maximum = function(q, k, v, SCALE)
        grads = torch.autograd.grad(output.sum(), (q, k, v))
        assert output.shape == v.shape and [x.shape for x in grads] == [q.shape, k.shape, v.shape]
        assert maximum.tolist() == attention.max_logit(q, k, SCALE).tolist() == [-math.inf] * 3


# ---------------------------------------------------------------------- ops and the choice


@interpreted
@pytest.mark.parametrize("with_documents", [False, True])
def test_ops_are_well_formed(with_documents):
    q, k, v, grad = inputs(2, 2, 20, 24, 16)
    first = documents(2, 20) if with_documents else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.nanok2.causal_attention, (*leaves, SCALE, first))
    q, k, v = (x.detach() for x in leaves)
    output, lse, _ = torch.ops.nanok2.causal_attention(q, k, v, SCALE, first)
    torch.library.opcheck(torch.ops.nanok2.causal_attention_backward, (grad, q, k, v, output, lse, SCALE, first))
    torch.library.opcheck(torch.ops.nanok2.max_logits, (q, k, SCALE, first))
    torch.library.opcheck(torch.ops.nanok2.latent_decode, (torch.randn(2, 3, 20), torch.randn(2, 9, 20), SCALE, 16))


@interpreted
@pytest.mark.parametrize("with_documents", [False, True])
def test_compiles_without_a_graph_break(triton_on, with_documents):
    first = documents(2, 20) if with_documents else None

    def function(q, k, v):
        output, maximum = attention.causal_attention(q * 2, k, v, SCALE, first)
        return output.transpose(1, 2).flatten(-2) * 3, maximum
    results, compiler = [], "aot_eager_decomp_partition"  # the graphs of inductor without its C++
    for run in (function, torch.compile(function, backend=compiler, fullgraph=True, dynamic=False)):
        q, k, v, _ = (x.requires_grad_() for x in inputs(2, 2, 20, 24, 16))
        output, maximum = run(q, k, v)
        assert not maximum.requires_grad
        results.append((output, maximum, *torch.autograd.grad(output.sum(), (q, k, v))))  # an expanded gradient
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))
    q, k, v, _ = (x.requires_grad_() for x in inputs(2, 2, 20, 24, 16))
    expected = naive(q * 2, k, v, SCALE, first)[0].transpose(1, 2).flatten(-2) * 3
    assert close(results[0][0], expected)
    assert all(close(*pair) for pair in zip(results[0][2:], torch.autograd.grad(expected.sum(), (q, k, v))))


@interpreted
def test_the_choice_of_an_arm(triton_on, monkeypatch):
    shape, dtype = (1, 2, 20, 24), torch.float32
    monkeypatch.setattr(attention, "ARM", {})
    monkeypatch.setattr(attention, "REASONS", {})
    wrong = lambda q, k, v, scale, first, _=None: attention.attention_math(q, k, v, scale * 1.01, first)
    monkeypatch.setattr(attention, "ARMS", {**attention.ARMS, "sdpa": wrong})
    key = attention.arm_key(shape, 16, dtype, False)
    line = attention.choose_arm(shape, 16, dtype, "cpu")
    assert attention.ARM[key] == "math" and line.startswith("attention 24/16: math, ms: triton ") and "sdpa -" in line
    reasons = attention.REASONS[key]
    assert set(reasons) == {"cudnn", "flash", "flex", "sdpa"} and "is off" in reasons["sdpa"]
    assert "with documents" in attention.choose_arm(shape, 16, dtype, "cpu", documents=True)
    assert attention.REASONS[attention.arm_key(shape, 16, dtype, True)]["cudnn"] == "no documents"
    q, k, v, _ = inputs(1, 2, 20, 24, 16)
    called = []
    monkeypatch.setitem(attention.ARMS, "flex", lambda *args: called.append(1) or attention.attention_math(*args))
    attention.ARM[key] = "flex"  # as another rank says
    assert close(attention.causal_attention(q, k, v, SCALE)[0], naive(q, k, v, SCALE)[0]) and called
    attention.causal_attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], SCALE)  # another length: not chosen, the default
    assert len(called) == 1


@interpreted
def test_the_model_and_its_generation_are_the_same_with_the_kernels(monkeypatch):
    model, x = tiny_model(num_hidden_layers=2), tokens(2, 21)
    results = []
    for on in (False, True):
        monkeypatch.setattr(attention.backend, "_on", on)
        model.zero_grad()
        loss, balance = model(x[:, :-1], x[:, 1:])
        (loss / 40 + balance).backward()
        with torch.no_grad():
            cache = model.new_cache(2, 21)
            steps = torch.cat([model(part, cache=cache) for part in x.split([18, 1, 1, 1], dim=1)], dim=1)
        results.append((loss, model.max_logits.clone(), steps, *[p.grad for p in model.parameters()]))
    assert all(close(*pair, tolerance=1e-4) for pair in zip(*results))


# ---------------------------------------------------------------------- on a GPU

SHAPES = [(32, 6, 1024, 192, 128), (8, 12, 1024, 96, 64), (1, 64, 4096, 192, 128), (2, 16, 2048, 192, 128),
          (2, 3, 1, 48, 32), (2, 4, 1000, 96, 64), (1, 3, 333, 192, 128), (2, 2, 130, 24, 16), (2, 4, 777, 64, 64),
          (1, 2, 513, 70, 40)]


def no_worse(ours, twin, exact):
    """An error of at most 1.5 times the twin's, against float64."""
    slack = 1e-5 + 1e-6 * exact.abs().max()  # at T = 1 the gradients of q and k are exactly 0
    return (ours - exact).abs().max() <= 1.5 * (twin - exact).abs().max() + slack


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_on_cuda(shape, with_documents):
    from kernels import triton_attention
    B, H, T, Q, V = shape
    first = documents(B, T, density=4 / T, device="cuda") if with_documents else None
    q, k, v, grad = inputs(*shape, device="cuda", dtype=torch.bfloat16)
    ours, lse, maximum = triton_attention.forward(q, k, v, Q**-0.5, first)
    grads = triton_attention.backward(grad, q, k, v, ours, lse, Q**-0.5, first)
    alone = triton_attention.max_logits(q, k, Q**-0.5, first)
    for limit in (None, maximum.median()):  # what may be left out changes no maximum that is asked for
        ours_above = triton_attention.max_logits(q, k, Q**-0.5, first, lse, attention.skip_below(lse, first, limit))
        asked = alone > (-math.inf if limit is None else limit)
        assert torch.equal(ours_above[asked], alone[asked]) and (ours_above >= alone).all()
        assert limit is None or (ours_above[~asked] <= limit).all()
    for head in {0, H - 1}:  # float64 scores are large
        pick = lambda x, head=head: x[:1, head:head + 1]
        results = []
        for dtype, function in ((torch.bfloat16, attention.attention_math), (torch.float64, naive)):
            leaves = [pick(x).to(dtype).requires_grad_() for x in (q, k, v)]
            output = function(*leaves, Q**-0.5, None if first is None else first[:1])[0]
            results.append((output, *torch.autograd.grad(output, leaves, pick(grad).to(output.dtype))))
        assert all(no_worse(pick(a), b, c) for a, b, c in zip((ours, *grads), *results))
    exact = torch.stack([attention.max_logit_math(q[:, h:h + 1].double(), k[:, h:h + 1].double(), Q**-0.5, first)[0]
                         for h in range(H)])
    assert close(maximum, exact) and close(alone, exact)
    again = triton_attention.backward(grad, q, k, v, ours, lse, Q**-0.5, first)
    assert all(torch.equal(*pair) for pair in zip(grads, again))


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 200, 96, 64), (1, 2, 256, 192, 128), (2, 2, 75, 24, 16)], ids=str)
def test_fp32_on_cuda(shape, with_documents):
    from kernels import triton_attention
    first = documents(shape[0], shape[2], density=0.02, device="cuda") if with_documents else None
    q, k, v, grad = inputs(*shape, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected, maximum, _ = naive(*leaves, SCALE, first)
    expected_grads = torch.autograd.grad((expected * grad).sum(), leaves)
    with torch.no_grad():
        ours, lse, our_maximum = triton_attention.forward(q, k, v, SCALE, first)
        grads = triton_attention.backward(grad, q, k, v, ours, lse, SCALE, first)
    assert close(ours, expected) and close(our_maximum, maximum)
    assert all(close(*pair) for pair in zip(grads, expected_grads))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 4096, 512, 64), (8, 12, 1000, 256, 32), (3, 20, 1, 16, 4)], ids=str)
def test_latent_decode_on_cuda(shape, dtype):
    from kernels import triton_decode
    B, H, S, R, P = shape
    q, cache = torch.randn(B, H, R + P, device="cuda"), torch.randn(B, S + 7, R + P, device="cuda")
    q, cache = (q / R**0.5 / SCALE).to(dtype), cache[:, :S].to(dtype)
    ours = triton_decode.latent_decode(q, cache, SCALE, R)
    twin = attention.latent_decode_math(q, cache, SCALE, R)
    assert no_worse(ours, twin, naive_decode(q, cache, R)) or close(ours, naive_decode(q, cache, R))


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
def test_every_arm_that_is_kept_is_right(monkeypatch, with_documents):
    monkeypatch.setattr(backend, "_on", True)
    shape = (2, 4, 512, 96)
    print(attention.choose_arm(shape, 64, torch.bfloat16, "cuda", with_documents))
    key = attention.arm_key(shape, 64, torch.bfloat16, with_documents)
    reasons, chosen = attention.REASONS.pop(key), attention.ARM.pop(key)
    print(reasons)
    assert "triton" not in reasons and "math" not in reasons and chosen not in reasons
    tensors, first = attention.sample(2, 4, 512, 96, 64, torch.bfloat16, "cuda", with_documents)
    for name in set(attention.ARMS) - set(reasons) - set(attention.COMPILED_ALONE):
        results = attention.forward_and_backward(attention.ARMS[name], tensors, 0.1, first)
        expected = attention.forward_and_backward(attention.attention_math, [t.double() for t in tensors], 0.1, first)
        assert all(close(a, b, tolerance=3e-2) for a, b in zip(results, expected)), name
