"""The chunked loss with its Triton kernel, value and gradients, against a naive one in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, cross_entropy, triton_cross_entropy
from kernels.cross_entropy import IGNORE, cross_entropy_twin, linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [True, False]  # Triton, PyTorch


def naive(logits, targets, z_loss):
    """(losses, lse, gradient of losses.sum() + z_loss * (lse^2).sum()) row by row in float64."""
    logits = logits.double().detach().requires_grad_()
    lse, keep = logits.logsumexp(-1), targets != IGNORE
    losses = lse[keep] - logits[keep, targets[keep]]
    (losses.sum() + z_loss * lse[keep].square().sum()).backward()
    return torch.zeros_like(lse).masked_scatter(keep, losses).detach(), lse.detach(), logits.grad


def problem(N, D, V, ignored, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, generator=generator).to(DEVICE, dtype) for size in ((N, D), (V, D)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets.to(DEVICE)


def run(function, hidden, weight, targets, z_loss, factor=0.7, on=False):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    with backend.running(on):
        loss = function(hidden, weight, targets, z_loss)
        (loss * factor).backward()
    return loss.detach(), hidden.grad, weight.grad


def close(ours, expected, tolerance=1e-5, parts=1.0):
    """Within tolerance of the largest result, or of the parts that it is a difference of if those are larger."""
    scale = max([parts, *expected.detach().abs().flatten().tolist()])
    return bool(((ours - expected).abs() <= tolerance * scale).all())


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 150), st.integers(1, 9), st.integers(1, 300), st.sampled_from([0.0, 0.2, 1.0]),
       st.sampled_from([0.0, 1e-4, 0.1]), st.sampled_from([1, 64, 1000, 2**14, 2**21]), st.integers(0, 99))
def test_loss_and_gradients_equal_float64(N, D, V, ignored, z_loss, chunk, seed):
    chunk = max(chunk, N * V // 4)  # few chunks: each costs the interpreter a launch
    hidden, weight, targets = problem(N, D, V, ignored, seed)
    expected = run(cross_entropy_twin, hidden.double(), weight.double(), targets, z_loss)
    logits = hidden.double() @ weight.double().T
    losses, _, grad = naive(logits, targets, z_loss)
    assert close(expected[0], losses.sum(), 1e-6) and close(expected[1], 0.7 * grad @ weight.double(), 1e-6)
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty  # full of NaN, so that an element that nothing writes is found
        patch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
        patch.setattr(torch, "empty_like", lambda other, **options: torch.full_like(other, float("nan"), **options))
        patch.setitem(cross_entropy.CHUNK_ELEMENTS, DEVICE.type, chunk)
        for on in KINDS:
            ours = run(linear_cross_entropy, hidden, weight, targets, z_loss, on=on)
            parts = 1.0, *(t.abs().max().item() if t.numel() else 1 for t in (weight, hidden))  # softmax minus onehot
            assert all(close(a, b, parts=c) for a, b, c in zip(ours, expected, parts)), on


@settings(deadline=None, max_examples=120)
@given(st.integers(0, 70), st.integers(1, 400), st.sampled_from([0, 3, 16]), st.sampled_from([0.0, 0.05]),
       st.sampled_from([1.0, 30.0, 1e4]), st.booleans(), st.integers(0, 99))
def test_kernel_equals_float64_row_by_row(N, V, gap, z_loss, size, write, seed):
    """Logits as they come, in rows with a gap behind each that stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    storage = size * torch.randn(N, V + gap, generator=generator).to(DEVICE)
    targets = torch.randint(-1, V, (N,), generator=generator).to(DEVICE)
    targets[targets == -1] = IGNORE
    before, logits = storage.clone(), storage[:, :V]
    losses, lse, grad = naive(logits, targets, z_loss)
    ours, our_lse = triton_cross_entropy.cross_entropy_(logits, targets, z_loss, IGNORE, write)
    assert close(our_lse, lse) and close(ours, losses, 1e-5 if size == 1 else 3e-5)
    assert torch.equal(storage[:, V:], before[:, V:])
    if write:  # exp of a difference of logits has their rounding
        assert close(logits, grad, max(1e-5, size * 1e-6))
    else:
        assert torch.equal(storage, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
def test_infinite_logits():
    inf, V = float("inf"), 200
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits[0, 3:150] = -inf  # a whole block of them
    logits[1, :] = -inf
    logits[1, 7] = 2.0
    logits[2, 5] = -inf      # the target itself
    logits[3, :] = -inf
    logits[4, 9] = inf
    targets = torch.tensor([1, 7, 5, 0, 0], device=DEVICE)
    losses, lse, grad = naive(logits, targets, 0.0)
    ours, our_lse = triton_cross_entropy.cross_entropy_(logits, targets, 0.0, IGNORE, True)
    assert close(ours[:2], losses[:2]) and close(our_lse[:3], lse[:3]) and close(logits[:3], grad[:3])
    assert ours[1] == 0 and ours[2] == inf and our_lse[3] == -inf and ours[3:].isnan().all() and logits[4].isnan().any()


@pytest.mark.parametrize("on", KINDS)
def test_large_logits_do_not_overflow(on):
    hidden, weight, targets = problem(40, 6, 130, 0.1, 0)
    hidden, weight = hidden * 100, weight * 100
    expected = run(cross_entropy_twin, hidden.double(), weight.double(), targets, 0.0)
    ours = run(linear_cross_entropy, hidden, weight, targets, 0.0, on=on)
    assert all(part.isfinite().all() for part in ours) and ours[0] > 1e4 and close(ours[0], expected[0])
    assert close(ours[1], expected[1], 1e-3) and close(ours[2], expected[2], 1e-3)


def test_a_target_outside_the_vocabulary_stops_the_run():
    hidden, weight, targets = problem(9, 4, 50, 0, 0)
    for bad in (50, -1, 2**40):
        targets[4] = bad
        loss, grad_hidden, grad_weight = run(linear_cross_entropy, hidden, weight, targets, 0.0, on=True)
        assert math.isnan(loss) and grad_hidden[4].isnan().all() and grad_weight.isnan().any()
        assert grad_hidden[:4].isfinite().all() and grad_hidden[5:].isfinite().all()
        if DEVICE.type == "cpu":
            with backend.running(False), pytest.raises((RuntimeError, IndexError)):
                linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("on", KINDS)
def test_z_loss_is_in_the_gradient_alone(on):
    hidden, weight, targets = problem(30, 5, 70, 0.2, 3)
    plain, with_z = (run(linear_cross_entropy, hidden, weight, targets, z, on=on) for z in (0.0, 0.5))
    assert torch.equal(plain[0], with_z[0]) and not torch.allclose(plain[1], with_z[1])
    assert close(run(cross_entropy_twin, hidden, weight, targets, 0.5)[0], plain[0])


def test_without_gradients_and_with_one_of_them():
    hidden, weight, targets = problem(30, 5, 70, 0.2, 3)
    loss, grad_hidden, grad_weight = run(linear_cross_entropy, hidden, weight, targets, 0.0, factor=1.0, on=True)
    with backend.running(True):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), loss)
        for leaf, expected in ((hidden, grad_hidden), (weight, grad_weight)):
            leaf.requires_grad_()
            grad, = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), leaf)
            assert torch.equal(grad, expected)
            leaf.requires_grad_(False)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 200), st.sampled_from([1.0, 0.7, 2.0**-19, 1 / 3000]),
       st.sampled_from([1.0, 0.7, 1 / 3000]), st.sampled_from(KINDS), st.integers(0, 99))
def test_gradients_are_right_whatever_scale_was_announced(N, V, announced, factor, on, seed):
    hidden, weight, targets = problem(N, 5, V, 0.1, seed)
    function = lambda *inputs: linear_cross_entropy(*inputs, announced)
    ours = run(function, hidden, weight, targets, 0.1, factor, on)
    expected = run(cross_entropy_twin, hidden.double(), weight.double(), targets, 0.1, factor)
    assert close(ours[0], expected[0])
    assert all(close(a / factor, b / factor) for a, b in zip(ours[1:], expected[1:]))


def test_gradients_made_with_the_right_scale_are_not_touched_again(monkeypatch):
    written = []
    rescale = triton_cross_entropy.rescale_

    def watched(gradient, *scales):
        before = gradient.clone()
        rescale(gradient, *scales)
        written.append(not torch.equal(gradient, before))

    monkeypatch.setattr(triton_cross_entropy, "rescale_", watched)
    hidden, weight, targets = problem(30, 5, 70, 0.2, 3)
    for announced, factor in ((0.7, 0.7), (1 / 3000, 1 / 3000), (1.0, 0.7)):
        run(lambda *inputs, scale=announced: linear_cross_entropy(*inputs, scale), hidden, weight, targets, 0.0, factor,
            on=True)
    assert written == [False] * 4 + [True] * 2
    tensor = torch.ones(5, device=DEVICE)
    rescale(tensor, torch.tensor(math.nan, device=DEVICE), 1.0)
    assert tensor.isnan().all()


def test_chunks_are_equal_whole_tiles_and_within_bounds():
    assert cross_entropy.chunk_rows(8192, 163840, 2, "cuda") == 2816  # three of them, not 3,200 twice and a rest
    for N in (0, 1, 127, 5000, 65536):
        for V in (97, 50304, 163840, 2**28):
            rows = cross_entropy.chunk_rows(N, V, 2, "cuda")
            assert rows >= 1 and (rows == 1 or rows * V <= 2**29) and (rows % 128 == 0 or V == 2**28)


def test_the_operator_is_a_proper_one():
    if DEVICE.type == "cpu":
        logits, targets = torch.randn(5, 30), torch.tensor([1, 2, IGNORE, 4, 5])
        torch.library.opcheck(cross_entropy.cross_entropy_rows_, (logits, targets, 0.1, True))


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, D, V", [(300, 64, 1000), (77, 40, 257), (4096, 768, 50304), (1024, 512, 163840)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_16_bit_loss_is_as_accurate_as_the_twin(N, D, V, dtype, z_loss):
    hidden, weight, targets = problem(N, D, V, 0.1, 0, dtype)
    weight = weight.float() * 0.1  # as the optimizer has it
    expected = run(cross_entropy_twin, hidden.double(), weight.to(dtype).double(), targets, z_loss)
    errors = []
    for on in KINDS:
        ours = run(linear_cross_entropy, hidden, weight, targets, z_loss, on=on)
        errors.append([(a.double() - b).norm() / b.norm() for a, b in zip(ours, expected)])
    assert errors[0][0] <= max(1.5 * errors[1][0], 1e-5)
    assert all(ours <= 1.5 * twin for ours, twin in zip(errors[0][1:], errors[1][1:]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradients_add_up_in_fp32(dtype):
    grad, hidden = (torch.randn(size, device="cuda", dtype=dtype) for size in ((512, 300), (512, 200)))
    total = torch.randn(300, 200, device="cuda")
    product = grad.T.double() @ hidden.double()
    for before, expected in ((total, total.double() + product), (None, product)):
        ours = cross_entropy._add_weight_gradient(None if before is None else before.clone(), grad, hidden)
        assert ours.dtype == torch.float32 and (ours - expected).norm() / expected.norm() < 1e-5
