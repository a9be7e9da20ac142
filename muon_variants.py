"""Two published variants of Muon, a function each on this rank's rows; muon.py calls the one that muon_variant names.

Shapes: of each of Muon's parameters, R rows of logical matrices here, of C elements each; M matrices of all parameters.
"""

import torch

BETA2 = 0.95  # of NorMuon's second moment, as its paper has it
TINY = torch.finfo(torch.float32).tiny


def equilibrate_rows_(directions):
    """MuonEq-R (Chang et al., arXiv 2603.28254): every row of what Newton-Schulz is to orthogonalise gets length 1, in
    place; a zero row stays zero. directions: (R, C) tensors. No rank needs another: ranks hold whole rows."""
    for rows_RC in directions:
        peak_R1 = rows_RC.abs().amax(-1, keepdim=True).float()
        scaled_RC = rows_RC / peak_R1.clamp(min=TINY)  # or the squares of an idle expert's rows underflow
        rows_RC.copy_(scaled_RC / scaled_RC.norm(dim=-1, keepdim=True).clamp(min=1))


def normalise_rows_(updates, moments, sum_by_matrix, rows_of):
    """NorMuon (Li et al., arXiv 2510.05491, algorithm 1): every row of an orthogonal update over the root of its second
    moment, the moving average of the row's mean square; then the matrix is made as large as it was, as in the authors'
    code (the paper makes every matrix one size). A zero matrix stays zero.

    updates: (R, C) tensors, and moments: (R,), both changed in place. sum_by_matrix: from a value for every row of all
    to the sums (M,) over all ranks; rows_of: from (M,) to a value for every row of each parameter."""
    squares = [rows_RC.float().square().mean(-1) for rows_RC in updates]
    torch._foreach_lerp_(moments, squares, 1 - BETA2)
    gains = [moment_R.clamp(min=TINY).rsqrt() for moment_R in moments]
    before_M = sum_by_matrix(torch.cat(squares))
    after_M = sum_by_matrix(torch.cat([square_R * gain_R.square() for square_R, gain_R in zip(squares, gains)]))
    sizes = rows_of((before_M / after_M.clamp(min=TINY)).sqrt())
    for rows_RC, gain_R, size_R in zip(updates, gains, sizes):
        rows_RC.mul_((gain_R * size_R).unsqueeze(-1))
