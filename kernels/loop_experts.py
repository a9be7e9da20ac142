"""The routed experts on a CPU, in fp32 or float64: the operator of experts.py with every expert computed from its rows
to its result while they are in the processor's cache.

The functions take and return what those of triton_experts.py do. Each token's weight is multiplied into its expert's
hidden numbers, which are fewer than its outputs; the sum over a token's choices is one embedding_bag, in order and
without atomics. tests/test_moe.py holds them against a double loop. Next: ../moe.py.

Shapes: N tokens, K choices per token, D model width, F expert width, E experts; S rows, those of the choices that are
experts held here, sorted by expert; n of them are an expert's.
"""

import torch
import torch.nn.functional as F


def forward(x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, first=None, second=None):
    """(y_ND with the addends in it, z_S2F: gate and up of every row, for the backward)."""
    top_k, width = weights_NK.shape[1], down_EDF.shape[2]
    token_S, weights_S1 = order_S // top_k, weights_NK.flatten().index_select(0, order_S).unsqueeze(1)
    z_S2F, y_SD = x_ND.new_empty(len(order_S), 2 * width), _rows(x_ND, order_S)
    for expert, part in _parts(counts_E):
        z_n2F = torch.mm(x_ND.index_select(0, token_S[part]), gate_up_E2FD[expert].T, out=z_S2F[part])
        hidden_nF = F.silu(z_n2F[:, :width]).mul_(z_n2F[:, width:]).mul_(weights_S1[part])
        torch.mm(hidden_nF, down_EDF[expert].T, out=y_SD[part])
    y_ND = _sum_choices(y_SD, inverse.view_as(weights_NK))
    for addend in (first, second):
        if addend is not None:
            y_ND += addend.reshape(y_ND.shape)
    return y_ND, z_S2F


def backward(grad_ND, x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F, gate_up_grad,
             down_grad, begun):
    """Gradients of x and weights; those of the two matrices go into gate_up_grad and down_grad, which are added to
    where begun is not 0."""
    top_k, width, kept = weights_NK.shape[1], down_EDF.shape[2], float(begun != 0)
    token_S, weights_S1 = order_S // top_k, weights_NK.flatten().index_select(0, order_S).unsqueeze(1)
    grad_x_SD, grad_weights_S = _rows(x_ND, order_S), x_ND.new_empty(len(order_S))
    if not kept:
        empty = (counts_E == 0).nonzero().flatten()
        gate_up_grad.index_fill_(0, empty, 0.0)
        down_grad.index_fill_(0, empty, 0.0)
    for expert, part in _parts(counts_E):
        x_nD, grad_nD = (rows.index_select(0, token_S[part]) for rows in (x_ND, grad_ND))
        gate_nF, up_nF = z_S2F[part].split(width, dim=1)
        silu_nF = F.silu(gate_nF)
        hidden_nF, grad_nF = silu_nF * up_nF, grad_nD @ down_EDF[expert]
        torch.sum(grad_nF * hidden_nF, 1, out=grad_weights_S[part])
        down_grad[expert].addmm_(grad_nD.T, hidden_nF.mul_(weights_S1[part]), beta=kept)
        grad_nF.mul_(weights_S1[part])
        grad_z = torch.empty_like(z_S2F[part])
        torch.mul(grad_nF, silu_nF, out=grad_z[:, width:])
        torch.ops.aten.silu_backward.grad_input(grad_nF.mul_(up_nF), gate_nF, grad_input=grad_z[:, :width])
        gate_up_grad[expert].addmm_(grad_z.T, x_nD, beta=kept)
        torch.mm(grad_z, gate_up_E2FD[expert], out=grad_x_SD[part])
    grad_weights = weights_NK.new_zeros(weights_NK.numel()).index_copy_(0, order_S, grad_weights_S)
    return _sum_choices(grad_x_SD, inverse.view_as(weights_NK)), grad_weights.view_as(weights_NK)


def _parts(counts_E):
    """(expert, slice of its rows) of every expert that has any."""
    end = 0
    for expert, count in enumerate(counts_E.tolist()):
        start, end = end, end + count
        if count:
            yield expert, slice(start, end)


def _rows(x_ND, order_S):
    """Room for a row of D numbers for every choice, and a row of zeros behind them."""
    rows = x_ND.new_empty(len(order_S) + 1, x_ND.shape[1])
    rows[-1] = 0
    return rows


def _sum_choices(rows_SD, place_NK):
    """y_ND = the sum of every token's rows; a place at or beyond the last row, which is zeros, adds nothing."""
    return F.embedding_bag(place_NK.clamp(max=len(rows_SD) - 1), rows_SD, mode="sum")
