"""The routed experts on a CPU, in fp32 or float64: the operator of experts.py, with a few experts at a time computed
from their rows to their results while these are in the processor's cache.

The functions are those of triton_experts.py. A token's weight is multiplied into the hidden numbers, which are fewer
than the outputs; the sum over its choices is one embedding_bag, in order and without atomics. Next: ../moe.py.

Shapes: N tokens, K choices per token, D model width, F expert width, E experts; S rows, those of the choices that are
experts held here, sorted by expert; n of them are of the experts at hand.
"""

import torch
import torch.nn.functional as F

GROUP = 4096  # rows; one expert at a time is slower by a sixth on two threads, all at once by a third on one


def forward(x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, first=None, second=None):
    """(y_ND with the addends in it, z_S2F: gate and up of every row, for the backward)."""
    width, (token_S, weights_S1) = down_EDF.shape[2], _sorted(weights_NK, order_S)
    z_S2F, y_SD = x_ND.new_empty(len(order_S), 2 * width), _rows(x_ND, order_S)
    matrices = gate_up_E2FD.mT.unbind(), down_EDF.mT.unbind()
    for counts, experts, rows in _groups(counts_E):
        x_nD, z_n2F = x_ND.index_select(0, token_S[rows]), z_S2F[rows]
        gate_up, down = (parts[experts] for parts in matrices)
        _multiply(x_nD, gate_up, z_n2F, counts)
        gate_nF, up_nF = z_n2F.split(width, dim=1)
        hidden_nF = F.silu(gate_nF).mul_(up_nF).mul_(weights_S1[rows])
        _multiply(hidden_nF, down, y_SD[rows], counts)
    y_ND = _sum_choices(y_SD, inverse.view_as(weights_NK))
    for addend in (first, second):
        if addend is not None:
            y_ND += addend.reshape(y_ND.shape)
    return y_ND, z_S2F


def backward(grad_ND, x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F, gate_up_grad,
             down_grad, begun):
    """Gradients of x and weights; those of the two matrices go into gate_up_grad and down_grad, which are added to
    where begun is not 0."""
    kept, grads = int(begun != 0), (gate_up_grad.unbind(), down_grad.unbind())
    return _backward(grad_ND, x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F,
                     lambda *group: _add_weights(x_ND, *grads, kept, *group))


def backward_input(grad_ND, x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F):
    """The same in two: gradients of x and weights, and a function of (gate_up_grad, down_grad, begun) for the rest."""
    groups = []
    found = _backward(grad_ND, x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F,
                      lambda *group: groups.append(group))

    def backward_weights(gate_up_grad, down_grad, begun):
        for group in groups:
            _add_weights(x_ND, gate_up_grad.unbind(), down_grad.unbind(), int(begun != 0), *group)
    return *found, backward_weights


def _backward(grad_ND, x_ND, weights_NK, order_S, inverse, counts_E, gate_up_E2FD, down_EDF, z_S2F, add_weights):
    """Gradients of x and weights. add_weights gets of every group of experts what else _add_weights wants."""
    width, (token_S, weights_S1) = down_EDF.shape[2], _sorted(weights_NK, order_S)
    grad_x_SD, grad_weights_S = _rows(x_ND, order_S), x_ND.new_empty(len(order_S))
    matrices = gate_up_E2FD.unbind(), down_EDF.unbind()
    for counts, experts, rows in _groups(counts_E):
        grad_nD, (gate_up, down) = grad_ND.index_select(0, token_S[rows]), (parts[experts] for parts in matrices)
        gate_nF, up_nF = z_S2F[rows].split(width, dim=1)
        silu_nF, grad_nF = F.silu(gate_nF), torch.empty_like(up_nF)
        _multiply(grad_nD, down, grad_nF, counts)
        hidden_nF = silu_nF * up_nF
        torch.sum(grad_nF * hidden_nF, 1, out=grad_weights_S[rows])
        grad_z_n2F = torch.empty_like(z_S2F[rows])
        grad_gate_nF, grad_up_nF = grad_z_n2F.split(width, dim=1)
        torch.mul(grad_nF.mul_(weights_S1[rows]), silu_nF, out=grad_up_nF)
        torch.ops.aten.silu_backward.grad_input(grad_nF.mul_(up_nF), gate_nF, grad_input=grad_gate_nF)
        _multiply(grad_z_n2F, gate_up, grad_x_SD[rows], counts)
        add_weights(counts, experts, token_S[rows], grad_nD, hidden_nF.mul_(weights_S1[rows]), grad_z_n2F)
    grad_weights = weights_NK.new_zeros(weights_NK.numel()).index_copy_(0, order_S, grad_weights_S.to(weights_NK.dtype))
    return _sum_choices(grad_x_SD, inverse.view_as(weights_NK)), grad_weights.view_as(weights_NK)


def _add_weights(x_ND, gate_up_grads, down_grads, kept, counts, experts, token_n, grad_nD, hidden_nF, grad_z_n2F):
    """Of a group of experts, the gradients of their matrices: added to what they hold if it is kept."""
    _add_products(grad_nD, hidden_nF, down_grads[experts], counts, kept)
    _add_products(grad_z_n2F, x_ND.index_select(0, token_n), gate_up_grads[experts], counts, kept)


def _sorted(weights_NK, order_S):
    """The token of every row, and its weight as a column."""
    return order_S // weights_NK.shape[1], weights_NK.flatten().index_select(0, order_S).unsqueeze(1)


def _groups(counts_E):
    """(counts, slice of experts, slice of rows) of experts that follow each other, about GROUP rows together: few
    enough to stay in the cache, and enough for several threads to share out what is done to every number."""
    first, row, counts = 0, 0, []
    for expert, count in enumerate(counts_E.tolist(), 1):
        counts.append(count)
        if (n := sum(counts)) >= GROUP or expert == len(counts_E):
            yield counts, slice(first, expert), slice(row, row + n)
            first, row, counts = expert, row + n, []


def _multiply(rows_nI, matrices, out_nJ, counts):
    """out = rows @ matrix, for every expert's rows."""
    for rows, matrix, out in zip(rows_nI.split(counts), matrices, out_nJ.split(counts)):
        if len(rows):
            torch.mm(rows, matrix, out=out)


def _add_products(left_nI, right_nJ, sums, counts, kept):
    """sum = sum * kept + left.T @ right, for every expert's rows."""
    for left, right, total in zip(left_nI.split(counts), right_nJ.split(counts), sums):
        if len(left):
            total.addmm_(left.T, right, beta=kept)
        elif not kept:
            total.zero_()


def _rows(x_ND, order_S):
    """Room for a row of D numbers for every choice, and a row of zeros behind them."""
    rows = x_ND.new_empty(len(order_S) + 1, x_ND.shape[1])
    rows[-1] = 0
    return rows


def _sum_choices(rows_SD, place_NK):
    """y_ND = the sum of every token's rows; a place at or beyond the last row, which is zeros, adds nothing."""
    return F.embedding_bag(place_NK.clamp(max=len(rows_SD) - 1), rows_SD, mode="sum")
