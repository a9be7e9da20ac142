"""The experts in Triton against their twins and a per-token loop in float64. Without a GPU the
kernels run in Triton's interpreter, in fp32."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import backend, expert_tiles, experts, routing, triton_experts, triton_routing
from tests.helpers import poisoned_memory

DEVICE = "cpu" if backend.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def triton():
    with backend.running(True):
        yield


@contextlib.contextmanager
def small_blocks(elements, sizes, line=4):
    """Blocks of which even small inputs need several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_routing, "ELEMENTS", elements)
        patch.setattr(triton_routing, "LINE", line)
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
        patch.setattr(triton_experts, "blocks", lambda *_: dict(zip(names, (*sizes, 4, 2))))
        yield


def close(ours, expected, tolerance=1e-5):
    """To the tolerance of the largest element, or of 0.1: gradients may be what is left of terms that cancel."""
    if ours.shape != expected.shape or not expected.numel():
        return ours.shape == expected.shape
    difference = (ours.double() - expected.double()).abs().max().item()
    return difference <= tolerance * max(expected.abs().max().item(), 0.1)


# ---------------------------------------------------------------------- experts


def reference(x, weights, chosen, gate_up, down):
    """Token by token, choice by choice; a choice beyond the last expert is another rank's."""
    rows = []
    for token, ws, es in zip(x, weights, chosen.tolist()):
        outputs = [w * (down[e] @ (F.silu(gate) * up)) for w, e in zip(ws, es) if e < len(down)
                   for gate, up in [(gate_up[e] @ token).chunk(2)]]
        rows.append(sum(outputs, 0 * token))
    return torch.stack(rows)


def run_experts(on, inputs, chosen, n_experts, n_choices, grad):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    x, weights, gate_up, down = leaves
    with backend.running(on):
        y = experts.experts(x, weights, *routing.sort_by_expert(chosen, n_experts, n_choices), gate_up, down)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def random_case(N, D, width, E, K, generator, spread, elsewhere=False):
    inputs = [torch.randn(*shape, generator=generator) / s for shape, s in (
        ((N, D), 1), ((N, K), 1), ((E, 2 * width, D), D**0.5), ((E, D, width), width**0.5))]
    chosen = {"even": torch.rand(N, E + elsewhere, generator=generator).argsort(1)[:, :K],
              "one": torch.full((N, K), E - 1), "first": torch.arange(K).expand(N, K)}[spread].contiguous()
    return inputs, chosen, torch.randn(N, D, generator=generator)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_experts_equal_a_loop_in_float64_with_gradients(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    N, D, width, E, elsewhere = draw(1, 14), draw(1, 20), draw(1, 20), draw(1, 4), data.draw(st.booleans())
    K = draw(1, min(E, 2))
    spread = data.draw(st.sampled_from(["even", "even", "one", "first"]))
    inputs, chosen, grad = random_case(N, D, width, E, K, torch.Generator().manual_seed(draw(0, 99)), spread, elsewhere)
    n_choices = int((chosen < E).sum()) if elsewhere else None
    sizes = data.draw(st.sampled_from([(16, 16, 16), (32, 32, 16), (16, 32, 32), (32, 32, 32)]))
    with poisoned_memory(), small_blocks(4096, sizes):
        ours = run_experts(True, [t.to(DEVICE) for t in inputs], chosen.to(DEVICE), E, n_choices, grad.to(DEVICE))
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    y = reference(leaves[0], leaves[1], chosen, leaves[2], leaves[3])
    grads = torch.autograd.grad(y, leaves, grad.double(), allow_unused=True)
    expected = [y, *(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves))]
    assert all(close(a.cpu(), b.detach()) for a, b in zip(ours, expected))


def test_experts_without_tokens_and_twice_the_same():
    for N in (0, 50):
        inputs, chosen, grad = random_case(N, 8, 12, 4, 2, torch.Generator().manual_seed(0), "even")
        inputs, chosen, grad = [t.to(DEVICE) for t in inputs], chosen.to(DEVICE), grad.to(DEVICE)
        once, again = (run_experts(True, inputs, chosen, 4, None, grad) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again))
        assert all(close(a, b) for a, b in zip(once, run_experts(False, inputs, chosen, 4, None, grad)))


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 5), st.integers(0, 30), st.booleans(), st.integers(0, 99))
def test_combine_equals_its_twin(n, width, J, n_rows, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, 2 * width, generator=generator).to(DEVICE)[:, ::2]
    place = torch.randint(0, n_rows + 3, (n, J + 1), generator=generator).to(DEVICE)[:, :J]  # some beyond the end
    weights = torch.randn(n, J, generator=generator).to(DEVICE) if weighted else None
    with poisoned_memory():
        ours = experts.sum_rows(rows, place, weights)
    with backend.running(False):
        assert close(ours, experts.sum_rows(rows, place, weights))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("n_tokens", [0, 1, 37])
def test_addends_are_added_with_their_gradients(count, n_tokens):
    """To what the operator gives without them; the first may have other dimensions."""
    inputs, chosen, grad = random_case(n_tokens, 20, 12, 4, 2, torch.Generator().manual_seed(0), "even")
    inputs, chosen, grad = [t.to(DEVICE) for t in inputs], chosen.to(DEVICE), grad.to(DEVICE)
    addends = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((1, n_tokens, 20), (n_tokens, 20))]
    sorted_ones = routing.sort_by_expert(chosen, 4)
    for on in (True, False):
        plain, *expected = run_experts(on, inputs, chosen, 4, None, grad)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with backend.running(on), poisoned_memory():
            y = experts.experts(*leaves[:2], *sorted_ones, *leaves[2:], addends=addends[:count])
            *grads, of_first = torch.autograd.grad(y, [*leaves, addends[0]], grad)
        assert close(y, plain + sum(addend.view_as(plain) for addend in addends[:count]))
        assert torch.equal(of_first, grad[None]) and all(close(a, b) for a, b in zip(grads, expected))


def test_products_by_the_library_are_the_same(monkeypatch):
    inputs, chosen, grad = random_case(50, 8, 16, 4, 2, torch.Generator().manual_seed(0), "even")
    inputs, chosen, grad = [t.to(DEVICE) for t in inputs], chosen.to(DEVICE), grad.to(DEVICE)
    ours = run_experts(True, inputs, chosen, 4, None, grad)
    monkeypatch.setattr(triton_experts, "LIBRARY", {"y", "dx", "d_down", "d_gate_up"})
    assert all(close(a, b) for a, b in zip(run_experts(True, inputs, chosen, 4, None, grad), ours))


def test_products_are_given_to_whoever_is_faster_and_right(monkeypatch):
    """A stand-in for a GPU: what each product gives and how long it takes, by Triton and by the library."""
    library = triton_experts.LIBRARY
    def arm(product, theirs, *milliseconds):
        compute = lambda: theirs() if product in library else torch.ones(3)
        return compute, dict(zip((False, True), milliseconds))
    arms = {"y": arm("y", lambda: torch.ones(3), 1.0, 2.0), "dx": arm("dx", lambda: torch.ones(3), 2.0, 1.0),
            "d_down": arm("d_down", lambda: torch.zeros(3), 2.0, 1.0),
            "d_gate_up": arm("d_gate_up", lambda: torch.linalg.cholesky(-torch.ones(1, 1)), 2.0, 1.0)}
    monkeypatch.setattr(triton_experts, "product_arms", lambda *_: {name: arm[0] for name, arm in arms.items()})
    monkeypatch.setattr(backend, "milliseconds", lambda compute, device: next(
        times[name in library] for name, (function, times) in arms.items() if function is compute))
    line = triton_experts.choose_products(16, 2, 4, 8, 16, torch.bfloat16, DEVICE)
    assert library == {"dx"} and "dx 2.00 (1.00), d_down 2.00 (inf), d_gate_up 2.00 (nan)" in line
    assert triton_experts.choose_products(16, 2, 4, 8, 16, torch.float32, DEVICE) == "expert products: triton"
    assert not library


def test_only_the_input_and_the_pre_activation_are_kept():
    (x, weights, gate_up, down), chosen, _ = random_case(20, 16, 24, 4, 2, torch.Generator().manual_seed(0), "even")
    leaves = [t.to(DEVICE).requires_grad_() for t in (x, weights, gate_up, down)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        order, inverse, counts = routing.sort_by_expert(chosen.to(DEVICE), 4)
        experts.experts(leaves[0], leaves[1], order, inverse, counts, leaves[2], leaves[3])
    given = {t.data_ptr() for t in (*leaves, order, inverse, counts)}
    made = [tuple(t.shape) for t in kept if t.data_ptr() not in given]
    assert made == [(40, 48)]


@pytest.mark.parametrize("name", ["route", "experts", "experts with copies"])
def test_operators_meet_the_rules_of_torch_library(name):
    generator = torch.Generator().manual_seed(0)
    if name == "route":
        logits = torch.randn(12, 8, generator=generator).to(DEVICE).requires_grad_()
        arguments = (logits, torch.zeros(8, device=DEVICE), 2, 2, 1, 1, True, 1.5)
    else:
        inputs, chosen, _ = random_case(10, 8, 12, 4, 2, generator, "even")
        x, weights, gate_up, down = (t.to(DEVICE).requires_grad_() for t in inputs)
        arguments = (x, weights, *routing.sort_by_expert(chosen.to(DEVICE), 4), gate_up, down)
    if name == "experts with copies":
        masters = [matrix.detach().double().requires_grad_() for matrix in (gate_up, down)]
        arguments = (*arguments[:-2], *masters, gate_up.detach(), down.detach())
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(getattr(torch.ops.nanok2, name.split()[0]).default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.nanok2.sort_by_expert.default, (torch.randint(0, 5, (9, 2), device=DEVICE), 5))


# ---------------------------------------------------------------------- matrices in another dtype


def masters_case(seed=0):
    """Matrices in float64 for rows in float32, as float32 ones are for bfloat16: the interpreter computes those."""
    inputs, chosen, grad = random_case(50, 8, 24, 5, 2, torch.Generator().manual_seed(seed), "even")
    x, weights, gate_up, down = (t.to(DEVICE) for t in inputs)
    return [x, weights, gate_up.double(), down.double()], chosen.to(DEVICE) % 4, grad.to(DEVICE)


@pytest.mark.parametrize("library", [(), ("y", "dx", "d_down", "d_gate_up")])
def test_gradients_of_matrices_are_in_their_own_dtype(monkeypatch, library):
    monkeypatch.setattr(triton_experts, "LIBRARY", set(library))
    inputs, chosen, grad = masters_case()
    with poisoned_memory():
        ours = run_experts(True, inputs, chosen, 5, None, grad)
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    y = reference(leaves[0], leaves[1], chosen, leaves[2], leaves[3])
    expected = [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]
    assert [t.dtype for t in ours] == [torch.float32] * 3 + [torch.float64] * 2
    assert all(close(a, b) for a, b in zip(ours, expected)) and not ours[3][4].any()  # nobody chose the last


def test_copies_are_what_is_computed_with():
    inputs, chosen, grad = masters_case()
    x, weights, *masters = [tensor.requires_grad_() for tensor in inputs]
    order = routing.sort_by_expert(chosen, 5)
    copies = [2 * master.detach().float() for master in masters]
    y = experts.experts(x, weights, *order, *masters, copies)
    doubled = [(2 * master.detach()).requires_grad_() for master in masters]
    expected = experts.experts(x, weights, *order, *doubled)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, (x, weights, *masters), grad)
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(expected, (x, weights, *doubled), grad)))


def test_only_one_matrix_of_each_is_kept_for_the_backward():
    (x, weights, *masters), chosen, _ = masters_case()
    copies, kept = [master.float() for master in masters], set()
    masters = [master.requires_grad_() for master in masters]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.add(t.data_ptr()), t)[1], lambda t: t):
        experts.experts(x.requires_grad_(), weights, *routing.sort_by_expert(chosen, 5), *masters, copies)
    assert all(copy.data_ptr() in kept for copy in copies) and all(master.data_ptr() not in kept for master in masters)


def test_matrices_in_another_dtype_compile_without_a_break():
    inputs, chosen, grad = masters_case()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    order = routing.sort_by_expert(chosen, 5)
    run = lambda x, weights, gate_up, down: experts.experts(x, weights, *order, gate_up, down)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(*leaves), leaves, grad) for f in (compiled, run))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected))


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize("counts", [[5, 0, 16, 5, 0], [0, 0, 0], [64], [1] * 40, list(range(100))])
def test_experts_by_load_start_with_the_longest(counts):
    counts_E, E = torch.tensor(counts, device=DEVICE), len(counts)
    table = torch.full((E + 1, 3), -7, dtype=torch.int32, device=DEVICE)
    triton_experts.by_load_kernel[-(-E // 8),](counts_E, table, E, 2 ** (E - 1).bit_length(), 8)
    rows = [(e, sum(counts[:e]), sum(counts[:e + 1])) for e in sorted(range(E), key=lambda e: (-counts[e], e))]
    assert table.tolist() == [*map(list, rows), [-7] * 3]


@pytest.mark.parametrize("kilobytes", [99, 163, 227])  # Ada, Ampere, Hopper
@pytest.mark.parametrize("kernel", expert_tiles.PROMISING)
def test_tiles_fit_the_shared_memory(monkeypatch, kernel, kilobytes):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(expert_tiles, "shared_limit", lambda: 1024 * kilobytes)
    for dtype in (torch.bfloat16, torch.float32):
        fitting = expert_tiles.candidates(kernel, dtype, 1024 * kilobytes)
        assert fitting and len(set(fitting)) == len(fitting)
        for width, rows in itertools.product((256, 1408), (4, 4096)):
            tile = tuple(expert_tiles.blocks(kernel, 768, width, rows, dtype).values())
            assert expert_tiles.fits(kernel, tile, dtype, 1024 * kilobytes)
            if dtype == torch.float32 or kilobytes == 227:
                assert tile == expert_tiles.default_tile(kernel, 768, width, rows, dtype)


def test_measured_tiles_run_where_they_were_measured(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(expert_tiles, "TILES", {})
    before = expert_tiles.blocks("dx", 768, 256, 3000, torch.bfloat16)
    expert_tiles.TILES[expert_tiles.tile_key("dx", 768, 256, 2100, torch.bfloat16)] = (64, 64, 32, 4, 2)
    assert tuple(expert_tiles.blocks("dx", 768, 256, 3000, torch.bfloat16).values()) == (64, 64, 32, 4, 2)
    for other in (("dx", 768, 256, 5000), ("y", 768, 256, 3000), ("dx", 768, 512, 3000)):
        assert tuple(expert_tiles.blocks(*other, torch.bfloat16).values()) != (64, 64, 32, 4, 2)
    assert before["BLOCK_M"] == 128


def test_tile_arms_run_every_kernel_with_the_tile_alone(monkeypatch):
    arms = triton_experts.tile_arms(40, 2, 3, 24, 16, torch.float32, torch.device(DEVICE))
    expected = {kernel: run((64, 64, 32, 4, 2)) for kernel, run in arms.items()}
    monkeypatch.setattr(backend, "INTERPRETED", False)
    seen = []
    run_tiles = lambda *key: seen.append(expert_tiles.TILES[expert_tiles.tile_key(*key)]) or expert_tiles.blocks(*key)
    monkeypatch.setattr(triton_experts, "blocks", run_tiles)
    for kernel, run in arms.items():
        with poisoned_memory():
            found = run((16, 32, 16, 4, 2))
        pairs = zip(found, expected[kernel]) if isinstance(found, tuple) else [(found, expected[kernel])]
        assert all(close(a, b) for a, b in pairs), kernel
    assert seen == [(16, 32, 16, 4, 2)] * len(expert_tiles.PROMISING) and not expert_tiles.TILES


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2000, 768, 256, 64, 7), (100, 64, 72, 8, 2)])
def test_gradients_of_fp32_matrices_are_not_rounded(shape):
    inputs, chosen, grad = random_case(*shape, torch.Generator().manual_seed(0), "even")
    x, weights, gate_up, down = (t.cuda() for t in inputs)
    mixed = [x.bfloat16(), weights, gate_up.bfloat16().float(), down.bfloat16().float()]
    low = [x.bfloat16(), weights, gate_up.bfloat16(), down.bfloat16()]
    arguments = (chosen.cuda(), shape[3], None, grad.cuda().bfloat16())
    unrounded, rounded = (run_experts(True, each, *arguments) for each in (mixed, low))
    assert all(torch.equal(a, b) for a, b in zip(unrounded[:3], rounded[:3]))
    for a, b in zip(unrounded[3:], rounded[3:]):
        assert a.dtype == torch.float32 and torch.equal(a.bfloat16(), b) and not torch.equal(a, b.float())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2000, 768, 256, 64, 7), (3000, 512, 384, 16, 2), (100, 64, 72, 8, 2)])
@pytest.mark.parametrize("spread", ["even", "one"])
def test_bf16_experts_err_no_more_than_their_twin(shape, spread):
    inputs, chosen, grad = random_case(*shape, torch.Generator().manual_seed(0), spread)
    x, weights, gate_up, down = (t.cuda() for t in inputs)
    rounded = [x.bfloat16(), weights, gate_up.bfloat16(), down.bfloat16()]
    arguments = (chosen.cuda(), shape[3], None, grad.cuda())
    exact = run_experts(False, [t.double() for t in rounded], *arguments[:3], arguments[3].double())
    ours, twins = (run_experts(on, rounded, *arguments[:3], arguments[3].bfloat16()) for on in (True, False))
    for a, b, e in zip(ours, twins, exact):
        assert (a - e).norm() <= 1.5 * (b - e).norm() + 1e-6 * e.norm()
