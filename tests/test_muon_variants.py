"""NorMuon and MuonEq-R against their papers' steps by hand in float64, at the ends of the number range, and resumed."""

import pytest
import torch

from muon import Muon
from muon_variants import equilibrate_rows_, normalise_rows_
from routes import Route
from tests.helpers import final_tensors, run_train

SHAPES = {"wide": (6, 20), "tall": (33, 8), "experts": (3, 12, 10)}  # of the last, four matrices of nine rows
ROWS = {"wide": 6, "tall": 33, "experts": 9}


def orthogonalised(matrix):
    """Jordan's five steps, the plain way."""
    X = matrix / matrix.norm()
    for _ in range(5):
        gram = X @ X.T
        X = 3.4445 * X + (-4.7750 * gram + 2.0315 * gram @ gram) @ X
    return X


def by_hand(variant, weight, grads, rows, nesterov=True):
    """The parameter after a step for each gradient, matrix by matrix and row by row."""
    shape, lr, decay = weight.shape, 0.1, 0.1
    matrices = weight.double().reshape(-1, rows, shape[-1])
    for at, W in enumerate(matrices):
        M, v = torch.zeros_like(W), [0.0] * rows
        for grad in grads:
            G = grad.double().reshape(-1, rows, shape[-1])[at]
            M = 0.95 * M + 0.05 * G
            ahead = 0.95 * M + 0.05 * G if nesterov else M
            if variant == "muoneq_r":
                ahead = torch.stack([row / row.norm() for row in ahead])
            O = orthogonalised(ahead)
            if variant == "normuon":
                v = [0.95 * moment + 0.05 * row.square().mean().item() for moment, row in zip(v, O)]
                scaled = torch.stack([row / moment**0.5 for moment, row in zip(v, O)])
                O = scaled * (O.norm() / scaled.norm())
            W = (1 - lr * decay) * W - lr * 0.2 * max(W.shape) ** 0.5 * O
        matrices[at] = W
    return matrices.reshape(shape)


@pytest.mark.parametrize("nesterov, exchange", [(True, "owners"), (True, "all_gather"), (False, "owners")])
@pytest.mark.parametrize("variant", ["normuon", "muoneq_r"])
def test_five_steps_equal_the_paper_by_hand(variant, nesterov, exchange):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    grads = {name: [torch.randn(shape, generator=generator) * torch.rand(shape[:-1], generator=generator).unsqueeze(-1)
                    for _ in range(5)] for name, shape in SHAPES.items()}  # rows of different sizes
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    routes = {name: Route("muon", rows) for name, rows in ROWS.items()}
    optimizer = Muon(parameters.items(), 0.1, routes=routes, variant=variant, exchange=exchange, nesterov=nesterov)
    for step in range(5):
        for name, p in parameters.items():
            p.grad = grads[name][step].clone()
        optimizer.step()
    for name, p in parameters.items():
        expected = by_hand(variant, weights[name], grads[name], ROWS[name], nesterov)
        moved = (expected - weights[name]).norm()
        assert (p.double() - expected).norm() <= 1e-5 * moved, name
        plain = by_hand("muon", weights[name], grads[name], ROWS[name], nesterov)
        assert (plain - expected).norm() > 0.02 * moved, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equilibrated_rows_have_length_1_whatever_they_had(dtype):
    rows = torch.randn(9, 40).to(dtype)
    small = rows.clone()
    equilibrate_rows_([rows])
    assert torch.allclose(rows.float().norm(dim=-1), torch.ones(9), atol=1e-5 if dtype == torch.float32 else 1e-2)
    small *= 2.0 ** torch.arange(0, -108, -12, dtype=dtype)[:, None]  # momenta of idle experts: squares underflow
    small[3] = 0
    equilibrate_rows_([small])
    assert not small[3].any()
    torch.testing.assert_close(small[[0, 1, 2, 4, 5, 6, 7, 8]], rows[[0, 1, 2, 4, 5, 6, 7, 8]])


def test_normalised_rows_leave_a_matrix_as_large_as_it_was_and_zeros_zero():
    updates, moments = [torch.randn(4, 10), torch.zeros(4, 10)], [torch.zeros(4), torch.zeros(4)]
    updates[0][2] = 0
    sizes = [rows.norm() for rows in updates]
    by_matrix = lambda values: values.view(2, 4).sum(1)
    rows_of = lambda values: values.repeat_interleave(4).split([4, 4])
    normalise_rows_(updates, moments, by_matrix, rows_of)
    assert updates[0].norm() == pytest.approx(sizes[0].item(), rel=1e-5)
    lengths = updates[0].norm(dim=-1)
    assert lengths[2] == 0 and torch.allclose(lengths[[0, 1, 3]], lengths[0])  # of a first step all are alike
    assert not updates[1].any() and not moments[1].any()


def test_the_second_moment_is_saved_and_resumed_bitwise(config, tmp_path):
    words = [config, "--muon_variant=normuon", "--max_steps=8", "--save_interval=4", "--keep_checkpoints=9"]
    run_train(*words, f"--out_dir={tmp_path / 'whole'}")
    run_train(*words, f"--out_dir={tmp_path / 'half'}", f"--resume={tmp_path / 'whole'}/checkpoints/step_00000004")
    run_train(config, "--max_steps=1", f"--out_dir={tmp_path / 'plain'}")
    whole, half, plain = (final_tensors(tmp_path / name) for name in ("whole", "half", "plain"))
    assert whole.keys() == half.keys() and all(torch.equal(whole[name], half[name]) for name in whole)
    moments = whole.keys() - plain.keys()
    assert moments and all(name.endswith("second_moment") and whole[name].any() for name in moments)
