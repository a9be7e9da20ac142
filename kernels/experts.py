"""The routed experts: gather rows into expert order, a SwiGLU MLP per expert, weighted sum back into token order.

Two twins compute the MLPs: a Python loop over experts (clear, and level with the other in fp32 on a CPU) and
F.grouped_mm (one call for all experts). Everything around them is shared. Next: ../moe.py, which calls `experts`.

Shapes: N tokens, K choices per token, D model width, F expert width, E experts; S = N*K sorted rows.
"""

import torch
import torch.nn.functional as F


class PermuteRows(torch.autograd.Function):
    """x_ND -> rows x[order // K]. The backward is a gather through `inverse` and a sum over K, so that no atomics are
    needed and the gradient is deterministic (plain indexing would scatter-add). index_select is five times as fast as
    x[...] on a CPU."""

    @staticmethod
    def forward(ctx, x_ND, order, inverse, top_k):
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x_ND.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad_SD):
        (inverse,) = ctx.saved_tensors
        grad_ND = grad_SD.index_select(0, inverse).unflatten(0, (-1, ctx.top_k)).sum(1)
        return grad_ND, None, None, None


class WeightedSum(torch.autograd.Function):
    """outputs_SD -> y_ND with y[token_S] += weights_S * outputs_SD, in fp32. For tokens of which only some choices are
    here: a padded (N, K, D) would be mostly empty."""

    @staticmethod
    def forward(ctx, outputs_SD, weights_S, token_S, n_tokens):
        ctx.save_for_backward(outputs_SD, weights_S, token_S)
        y_ND = torch.zeros(n_tokens, outputs_SD.shape[1], device=outputs_SD.device)
        return y_ND.index_add_(0, token_S, outputs_SD.float() * weights_S.unsqueeze(1)).to(outputs_SD.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        outputs_SD, weights_S, token_S = ctx.saved_tensors
        grad_SD = grad_ND.float().index_select(0, token_S)
        grad_outputs = (grad_SD * weights_S.unsqueeze(1)).to(outputs_SD.dtype)
        return grad_outputs, (grad_SD * outputs_SD.float()).sum(1), None, None


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


def experts(x_ND, weights_NK, order, inverse, counts_E, gate_up_E2FD, down_EDF):
    """Weighted sum of the chosen experts' outputs for every token, accumulated in fp32.

    order, inverse, counts_E come from routing.sort_by_expert; gate_up_E2FD stacks gate over up (Hugging Face's order).
    inverse is None where some choices are experts of another rank; then order has the rest. Returns y_ND in x's dtype.
    """
    top_k = weights_NK.shape[1]
    gate_up_E2FD, down_EDF = gate_up_E2FD.to(x_ND.dtype), down_EDF.to(x_ND.dtype)
    mlp = mlp_grouped if _grouped_is_best(x_ND, gate_up_E2FD) else mlp_loop
    if inverse is None:
        token_S = order // top_k
        outputs_SD = mlp(x_ND.index_select(0, token_S), counts_E, gate_up_E2FD, down_EDF)
        return WeightedSum.apply(outputs_SD, weights_NK.flatten()[order], token_S, len(x_ND))
    rows_SD = PermuteRows.apply(x_ND, order, inverse, top_k)
    outputs_SD = mlp(rows_SD, counts_E, gate_up_E2FD, down_EDF)
    outputs_NKD = PermuteRows.apply(outputs_SD, inverse, order, 1).unflatten(0, (-1, top_k))
    return torch.bmm(weights_NK.unsqueeze(1), outputs_NKD.float()).squeeze(1).to(x_ND.dtype)


def _grouped_is_best(x_ND, gate_up_E2FD):
    # bf16 only: on a CPU in fp32 the two are level (python -m bench.experts), and torch.compile knows grouped_mm in
    # nothing else. It wants strides that are multiples of 16 bytes, and does not exist on MPS.
    aligned = x_ND.shape[1] % 8 == 0 and gate_up_E2FD.shape[1] % 16 == 0
    return aligned and x_ND.dtype == torch.bfloat16 and x_ND.device.type in ("cpu", "cuda")
