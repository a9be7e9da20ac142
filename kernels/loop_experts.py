"""The routed experts on a CPU, in fp32 or float64: the operator of experts.py with every expert computed from its rows
to its result while they are in the processor's cache.

The functions are those of triton_experts.py. A token's weight is multiplied into the hidden numbers, which are fewer
than the outputs; the sum over its choices is one embedding_bag, in order and without atomics. Next: ../moe.py.

Shapes: N tokens, K choices per token, D model width, F expert width, E experts; S rows, those of the choices that are
experts held here, sorted by expert; n of them are an expert's.
"""

import torch
import torch.nn.functional as F


def forward(x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, first=None, second=None):
    """(y_ND with the addends in it, z_S2F: gate and up of every row, for the backward)."""
    counts, width = counts_E.tolist(), down_EDF.shape[2]
    token_S, weights_S1 = order_S // weights_NK.shape[1], weights_NK.flatten().index_select(0, order_S).unsqueeze(1)
    z_S2F, y_SD = x_ND.new_empty(len(order_S), 2 * width), _rows(x_ND, order_S)
    for token_n, weights_n1, z_n2F, y_nD, gate_up_D2F, down_FD in zip(
            *(rows.split(counts) for rows in (token_S, weights_S1, z_S2F, y_SD[:-1])),
            gate_up_E2FD.mT.unbind(), down_EDF.mT.unbind()):
        if len(token_n):
            torch.mm(x_ND.index_select(0, token_n), gate_up_D2F, out=z_n2F)
            gate_nF, up_nF = z_n2F.split(width, dim=1)
            torch.mm(F.silu(gate_nF).mul_(up_nF).mul_(weights_n1), down_FD, out=y_nD)
    y_ND = _sum_choices(y_SD, inverse.view_as(weights_NK))
    for addend in (first, second):
        if addend is not None:
            y_ND += addend.reshape(y_ND.shape)
    return y_ND, z_S2F


def backward(grad_ND, x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F, gate_up_grad,
             down_grad, begun):
    """Gradients of x and weights; those of the two matrices go into gate_up_grad and down_grad, which are added to
    where begun is not 0."""
    counts, width, kept = counts_E.tolist(), down_EDF.shape[2], int(begun != 0)
    token_S, weights_S1 = order_S // weights_NK.shape[1], weights_NK.flatten().index_select(0, order_S).unsqueeze(1)
    grad_z_S2F, grad_x_SD, grad_weights_S = torch.empty_like(z_S2F), _rows(x_ND, order_S), x_ND.new_empty(len(order_S))
    halves = (half for z in (z_S2F, grad_z_S2F) for half in z.split(width, dim=1))
    for (token_n, weights_n1, grad_weights_n, grad_x_nD, grad_z_n2F, gate_nF, up_nF, grad_gate_nF, grad_up_nF, gate_up,
         down_DF, grad_gate_up, grad_down) in zip(
            *(x.split(counts) for x in (token_S, weights_S1, grad_weights_S, grad_x_SD[:-1], grad_z_S2F, *halves)),
            *(matrices.unbind() for matrices in (gate_up_E2FD, down_EDF, gate_up_grad, down_grad))):
        if len(token_n):
            x_nD, grad_nD = x_ND.index_select(0, token_n), grad_ND.index_select(0, token_n)
            silu_nF, grad_nF = F.silu(gate_nF), grad_nD @ down_DF
            hidden_nF = silu_nF * up_nF
            torch.sum(grad_nF * hidden_nF, 1, out=grad_weights_n)
            grad_down.addmm_(grad_nD.T, hidden_nF.mul_(weights_n1), beta=kept)
            torch.mul(grad_nF.mul_(weights_n1), silu_nF, out=grad_up_nF)
            torch.ops.aten.silu_backward.grad_input(grad_nF.mul_(up_nF), gate_nF, grad_input=grad_gate_nF)
            grad_gate_up.addmm_(grad_z_n2F.T, x_nD, beta=kept)
            torch.mm(grad_z_n2F, gate_up, out=grad_x_nD)
        elif not kept:
            grad_gate_up.zero_(), grad_down.zero_()
    grad_weights = weights_NK.new_zeros(weights_NK.numel())
    grad_weights.index_copy_(0, order_S, grad_weights_S.to(weights_NK.dtype))
    return _sum_choices(grad_x_SD, inverse.view_as(weights_NK)), grad_weights.view_as(weights_NK)


def _rows(x_ND, order_S):
    """Room for a row of D numbers for every choice, and a row of zeros behind them."""
    rows = x_ND.new_empty(len(order_S) + 1, x_ND.shape[1])
    rows[-1] = 0
    return rows


def _sum_choices(rows_SD, place_NK):
    """y_ND = the sum of every token's rows; a place at or beyond the last row, which is zeros, adds nothing."""
    return F.embedding_bag(place_NK.clamp(max=len(rows_SD) - 1), rows_SD, mode="sum")
