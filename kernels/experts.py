"""The routed experts: gather rows into expert order, a SwiGLU MLP per expert, weighted sum back into token order.

Two twins compute the MLPs: a Python loop over experts (clear) and F.grouped_mm (one call for all experts). Everything
around them is shared. One operator has it all: triton_experts.py in six launches, and loop_experts.py on a CPU, where
the weights have the rows' dtype. Next: ../moe.py, which calls `experts`.

Shapes: N tokens, K choices per token, D model width, F expert width, E experts; S = N*K sorted rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend, later, loop_experts


def sum_rows(rows_SD, from_NJ, weights_NJ=None):
    """y_ND = sum over j of weights_NJ * rows_SD[from_NJ] in fp32, always in the same order; a place at or beyond the
    end of the rows adds nothing. Returned in the rows' dtype."""
    if backend.triton_runs(rows_SD):
        from kernels import triton_experts
        return triton_experts.combine(rows_SD, from_NJ, weights_NJ)
    total_ND = torch.zeros(len(from_NJ), rows_SD.shape[1], device=rows_SD.device)
    if len(rows_SD) == 0:
        return total_ND.to(rows_SD.dtype)
    factor_NJ = (from_NJ < len(rows_SD)).float()
    if weights_NJ is not None:
        factor_NJ = factor_NJ * weights_NJ
    for from_N, factor_N in zip(from_NJ.clamp(max=len(rows_SD) - 1).unbind(1), factor_NJ.unbind(1)):
        total_ND.addcmul_(rows_SD.index_select(0, from_N).float(), factor_N.unsqueeze(1))
    return total_ND.to(rows_SD.dtype)


class TakeRows(torch.autograd.Function):
    """x_ND -> rows x[token_S]; from_NJ has the places of each token's rows, for a backward without atomics."""

    @staticmethod
    def forward(ctx, x_ND, token_S, from_NJ):
        ctx.save_for_backward(from_NJ)
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SD):
        (from_NJ,) = ctx.saved_tensors
        return sum_rows(grad_SD, from_NJ), None, None


class SumRows(torch.autograd.Function):
    """rows_SD -> y_ND, the way back of TakeRows: every token's rows added up in fp32, weighted by weights_NK if there
    are any; then the rows' places in weights_NK.flatten() are order_S."""

    @staticmethod
    def forward(ctx, rows_SD, token_S, from_NJ, weights_NJ=None, order_S=None):
        ctx.save_for_backward(rows_SD if weights_NJ is not None else None, token_S, weights_NJ, order_S)
        return sum_rows(rows_SD, from_NJ, weights_NJ)

    @staticmethod
    def backward(ctx, grad_ND):
        rows_SD, token_S, weights_NJ, order_S = ctx.saved_tensors
        grad_SD = grad_ND.index_select(0, token_S)
        if weights_NJ is None:
            return grad_SD, None, None, None, None
        products_S = (grad_SD.float() * rows_SD.float()).sum(1)
        grad_weights = torch.zeros_like(weights_NJ).flatten().index_copy(0, order_S, products_S).view_as(weights_NJ)
        weights_S = weights_NJ.flatten()[order_S].unsqueeze(1)
        return (grad_SD.float() * weights_S).to(rows_SD.dtype), None, None, grad_weights, None


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.compiler.disable  # reads counts on the host: a compiled caller would recompile for every set of counts
def mlp_loop(rows_SD, counts_E, gate_up_E2FD, down_EDF):
    """The slow twin: one pair of matmuls for every expert that has rows. Syncs once to read the counts."""
    outputs = [F.linear(swiglu(F.linear(rows, gate_up)), down)
               for rows, gate_up, down in zip(rows_SD.split(counts_E.tolist()), gate_up_E2FD, down_EDF)]
    return torch.cat(outputs)


def mlp_grouped(rows_SD, counts_E, gate_up_E2FD, down_EDF):
    """All experts in two grouped matmuls, no host sync. F.grouped_mm wants the groups' ends as int32."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden = swiglu(F.grouped_mm(rows_SD, gate_up_E2FD.mT, offs=ends_E))
    return F.grouped_mm(hidden, down_EDF.mT, offs=ends_E)


def experts(x_ND, weights_NK, order, inverse, counts_E, gate_up_E2FD, down_EDF, copies=None, addends=(), into=None):
    """Weighted sum of the chosen experts' outputs for every token, accumulated in fp32.

    order, inverse, counts_E come from routing.sort_by_expert; gate_up_E2FD stacks gate over up (Hugging Face's order).
    Where some choices are experts of another rank, order is shorter and has the rest. Returns y_ND in x's dtype, plus
    the addends, at most two of as many numbers, which Triton's kernel adds before it rounds.
    The matrices may be in another dtype than x, fp32 with bf16: what is computed with is then `copies`, both matrices
    in x's dtype, if the caller keeps them, and else made here. Gradients are in the matrices' own dtype; Triton's
    kernels write them from their fp32 sums, unrounded, the twins round them to x's dtype first.

    into: (gate_up_grad, down_grad, begun) where the caller keeps the matrices' gradients; the operator alone can.
    The backward adds to both itself, or writes them anew, whatever they held, where begun, a tensor of one number, is
    0; autograd then gets no gradient of the matrices. It saves a later micro-batch of a step 8 of 16 bytes a weight.
    """
    top_k, matrices = weights_NK.shape[1], (gate_up_E2FD, down_EDF)
    if backend.triton_runs(x_ND) or _operator_is_best(x_ND, gate_up_E2FD):
        if copies is None:
            copies = [None if m.dtype == x_ND.dtype else m.detach().to(x_ND.dtype) for m in matrices]
        first, second = (*addends, None, None)[:2]
        if later.on() and torch.is_grad_enabled():
            return _SplitExperts.apply(x_ND, weights_NK, (order, inverse, counts_E), matrices, copies or (None, None),
                                       first, second)
        return _experts(x_ND, weights_NK, order, inverse, counts_E, *matrices, *copies, first, second, *(into or ()))[0]
    if into is not None and torch.is_grad_enabled():
        raise RuntimeError("Triton's kernels ran when K2.keep_gradients() was called, and they are off now: "
                           "their twins would lose the experts' gradients")
    gate_up_E2FD, down_EDF = (m.to(x_ND.dtype) for m in matrices)
    mlp = mlp_grouped if _grouped_is_best(x_ND, gate_up_E2FD) else mlp_loop
    token_S, from_NK = order // top_k, inverse.view_as(weights_NK)
    outputs_SD = mlp(TakeRows.apply(x_ND, token_S, from_NK), counts_E, gate_up_E2FD, down_EDF)
    return add_all(SumRows.apply(outputs_SD, token_S, from_NK, weights_NK, order), addends)


def add_all(y_ND, addends):
    """y_ND plus every addend, in order."""
    return sum((addend.reshape(y_ND.shape) for addend in addends), y_ND)


def _grouped_is_best(x_ND, gate_up_E2FD):
    # bf16 only: torch.compile knows grouped_mm in nothing else. It wants strides that are multiples of 16 bytes, and
    # does not exist on MPS.
    aligned = x_ND.shape[1] % 8 == 0 and gate_up_E2FD.shape[1] % 16 == 0
    return aligned and x_ND.dtype == torch.bfloat16 and x_ND.device.type in ("cpu", "cuda")


def _operator_is_best(x_ND, gate_up_E2FD):  # where Triton does not run
    return x_ND.device.type == "cpu" and x_ND.dtype == gate_up_E2FD.dtype in (torch.float32, torch.float64)


# ----------------------------------------------------------------------------- the operator

# The matrices come twice: for autograd as the parameters that they are, and in x's dtype, None where that is the same.

@torch.library.custom_op("nanok2::experts", mutates_args=())
def _experts(x_ND: Tensor, weights_NK: Tensor, order: Tensor, inverse: Tensor, counts_E: Tensor, gate_up_E2FD: Tensor,
             down_EDF: Tensor, gate_up_copy: Tensor | None = None, down_copy: Tensor | None = None,
             first: Tensor | None = None, second: Tensor | None = None, gate_up_grad: Tensor | None = None,
             down_grad: Tensor | None = None, begun: Tensor | None = None) -> tuple[Tensor, Tensor]:
    gate_up, down = _computed_with(gate_up_E2FD, down_EDF, gate_up_copy, down_copy)
    return _kernels(x_ND).forward(x_ND.contiguous(), weights_NK.contiguous(), order, inverse, counts_E,
                                  gate_up.contiguous(), down.contiguous(), first, second)


@_experts.register_fake
def _(x_ND, weights_NK, order, inverse, counts_E, gate_up_E2FD, down_EDF, *others):
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(len(order), gate_up_E2FD.shape[1])


def _kernels(x_ND):
    if x_ND.device.type == "cpu" and not backend.triton_runs(x_ND):
        return loop_experts
    from kernels import triton_experts
    return triton_experts


def _computed_with(gate_up, down, gate_up_copy, down_copy):
    return gate_up if gate_up_copy is None else gate_up_copy, down if down_copy is None else down_copy


@torch.library.custom_op("nanok2::experts_backward", mutates_args=("gate_up_grad", "down_grad"))
def _experts_backward(grad_ND: Tensor, x_ND: Tensor, weights_NK: Tensor, order: Tensor, inverse: Tensor,
                      counts_E: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, z_S2F: Tensor, gate_up_grad: Tensor,
                      down_grad: Tensor, begun: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels(x_ND).backward(grad_ND.contiguous(), x_ND.contiguous(), weights_NK.contiguous(), order, inverse,
                                   counts_E, gate_up_E2FD.contiguous(), down_EDF.contiguous(), z_S2F, gate_up_grad,
                                   down_grad, begun)


@_experts_backward.register_fake
def _(grad_ND, x_ND, weights_NK, *others):
    return x_ND.new_empty(x_ND.shape), weights_NK.new_empty(weights_NK.shape)


def _keep_for_backward(ctx, inputs, output):
    *rows, gate_up, down, gate_up_copy, down_copy, first, second, gate_up_grad, down_grad, begun = inputs
    ctx.save_for_backward(*rows, *_computed_with(gate_up, down, gate_up_copy, down_copy), output[1], gate_up_grad,
                          down_grad, begun)
    ctx.dtype, ctx.shapes = gate_up.dtype, [None if addend is None else addend.shape for addend in (first, second)]
    ctx.set_materialize_grads(False)  # z has no gradient


def _backward(ctx, grad_ND, _):
    if grad_ND is None:
        return (None,) * 14
    *saved, gate_up_grad, down_grad, begun = ctx.saved_tensors
    if begun is None:
        grads = made = [torch.empty(m.shape, dtype=ctx.dtype, device=m.device) for m in saved[5:7]]
        begun = grad_ND.new_zeros(())
    else:
        grads, made = (gate_up_grad, down_grad), (None, None)
    grad_x, grad_weights = _experts_backward(grad_ND, *saved, *grads, begun)
    grad_addends = [None if shape is None else grad_ND.view(shape) for shape in ctx.shapes]
    return grad_x, grad_weights, None, None, None, *made, None, None, *grad_addends, None, None, None


_experts.register_autograd(_backward, setup_context=_keep_for_backward)


class _SplitExperts(torch.autograd.Function):
    """The operator, whose matrices get their gradients later (kernels/later.py): a tuple, or autograd would want them
    here."""

    @staticmethod
    def forward(ctx, x_ND, weights_NK, sorted_, matrices, copies, first, second):
        computed_with = [m.detach() for m in _computed_with(*matrices, *copies)]
        y_ND, z_S2F = _experts(x_ND, weights_NK, *sorted_, *computed_with, None, None, first, second)
        ctx.save_for_backward(x_ND, weights_NK, *sorted_, *computed_with, z_S2F)
        ctx.matrices, ctx.shapes = matrices, [None if addend is None else addend.shape for addend in (first, second)]
        return y_ND

    @staticmethod
    def backward(ctx, grad_ND):
        saved, matrices = ctx.saved_tensors, ctx.matrices
        grad_x, grad_weights, backward_weights = _kernels(grad_ND).backward_input(grad_ND.contiguous(), *saved)

        def gradients():
            grads = [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in matrices]
            backward_weights(*grads, torch.zeros((), device=grad_ND.device))
            return grads
        later.put_off(matrices, gradients)
        grad_addends = [None if shape is None else grad_ND.view(shape) for shape in ctx.shapes]
        return grad_x, grad_weights, None, None, None, *grad_addends
