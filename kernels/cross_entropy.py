"""Linear cross-entropy in chunks: the loss of `lm_head` without ever holding the whole (N, V) logits.

At K2's vocabulary of 163,840 the fp32 logits of 8k tokens would be 5.4 GB. Each chunk's logits are made, turned into
loss and gradient, and dropped; the gradients are formed in the forward pass, so nothing is computed twice. PyTorch's
twin makes fp32 copies of a chunk; Triton's kernel works in place, on the matmul's own output.

The z-loss (ST-MoE, arXiv 2202.08906, equation 5, of the logits of the vocabulary, as in PaLM) keeps the log-sum-exp of
the logits near 0. It is in the gradient alone, so that logged losses stay comparable.

Shapes: N tokens, D model width, V vocabulary. Next: triton_cross_entropy.py.
"""

import math

import torch
import torch.nn.functional as F

from kernels import backend

IGNORE = -100           # target value of padding; counts neither in the loss nor in the gradient
CHUNK_ELEMENTS = {"cpu": 2**21}  # fp32 logits held at once: 8 MiB stay in a CPU's cache, elsewhere
# 1 GiB of logits. Every chunk of n rows reads and writes the weight's fp32 gradient once, 8 V D bytes, which from some
# 730 rows on hide behind the 2 n V D FLOPs of the same matmul (H200); Triton has 3,200 rows at V = 163,840. Chunks
# whose logits stay in L2 would spare 8 bytes a logit, but have 150 rows there.
DEFAULT_CHUNK_BYTES = 2**30


def cross_entropy_twin(hidden_ND, weight_VD, targets_N, z_loss=0.0):
    """The slow twin: whole logits. Sum of the losses over the targets that are not IGNORE, in fp32; z_loss times the
    sum of their squared log-sum-exp is added to the gradient, not to the value."""
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).float()
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
    if z_loss:
        squares = z_loss * logits_NV[targets_N != IGNORE].logsumexp(-1).square().sum()
        loss = loss + (squares - squares.detach())
    return loss


def linear_cross_entropy(hidden_ND, weight_VD, targets_N, z_loss=0.0, scale=1.0):
    """Same value and gradients as the twin: a scalar, the fp32 sum of the losses over the targets that are not IGNORE.
    A target that is no row of the weight is an error in PyTorch; in Triton the loss and the row's gradient are NaN.

    scale: what the caller will multiply the sum by before the backward, where it is known. Triton's gradients are made
    with that factor, and need no other pass then; with any other they are multiplied by what is missing."""
    if not torch.is_grad_enabled():  # which the function does not see: it would make gradients that nobody wants
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_loss, scale)


def _rows_torch(logits_NV, targets_N, z_loss, write, _):
    """(losses_N in fp32, gradient_NV of the logits in their dtype or None without `write`)."""
    logits = logits_NV.float()
    log_probs = torch.log_softmax(logits, dim=-1)
    keep = targets_N != IGNORE
    index = targets_N.where(keep, 0).unsqueeze(1)
    losses = (-log_probs.gather(1, index).squeeze(1)).where(keep, 0)
    if not write:
        return losses, None
    # d loss / d logits = softmax - onehot, zero where ignored
    grad = log_probs.exp_()
    if z_loss:
        grad.mul_(1 + 2 * z_loss * logits.logsumexp(-1, keepdim=True))
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
    return losses, grad.mul_(keep.unsqueeze(1)).to(logits_NV.dtype)


@torch.library.custom_op("nanok2::cross_entropy_rows_", mutates_args=("logits_NV",))
def cross_entropy_rows_(logits_NV: torch.Tensor, targets_N: torch.Tensor, z_loss: float, write: bool,
                        scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses_N, lse_N) in fp32 of a chunk; with `write` the logits become scale times the gradient. In Triton."""
    from kernels import triton_cross_entropy
    return triton_cross_entropy.cross_entropy_(logits_NV, targets_N, z_loss, IGNORE, write, scale)


@cross_entropy_rows_.register_fake
def _(logits_NV, targets_N, z_loss, write, scale=1.0):
    return tuple(logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(2))


def _rows_triton(logits_NV, targets_N, z_loss, write, scale):
    losses_N, _ = cross_entropy_rows_(logits_NV, targets_N, z_loss, write, scale)
    return losses_N, logits_NV if write else None


@torch.library.custom_op("nanok2::rescale_", mutates_args=("gradient",))
def rescale_(gradient: torch.Tensor, wanted: torch.Tensor, made: float) -> None:
    """gradient *= wanted / made, by Triton; if they are equal, as only the device knows, it is not touched."""
    from kernels import triton_cross_entropy
    triton_cross_entropy.rescale_(gradient, wanted, made)


def chunk_rows(N, V, itemsize, device_type):
    """Rows of a chunk: as many as may be held, in chunks of equal size, on a GPU in whole tiles of a matmul."""
    most = max(1, CHUNK_ELEMENTS.get(device_type, DEFAULT_CHUNK_BYTES // itemsize) // V)
    tile = 128 if device_type == "cuda" and most >= 128 else 1
    most -= most % tile
    rows = math.ceil(N / math.ceil(N / most)) if N else 1
    return math.ceil(rows / tile) * tile


def _add_weight_gradient(total_VD, grad_NV, hidden_ND):
    """total + grad^T hidden in fp32, over the total; None is no total yet."""
    if grad_NV.dtype == torch.float32:
        return grad_NV.T @ hidden_ND if total_VD is None else total_VD.addmm_(grad_NV.T, hidden_ND)
    if hidden_ND.is_cuda:  # where 16-bit products add up in fp32, unrounded
        if total_VD is None:
            return torch.mm(grad_NV.T, hidden_ND, out_dtype=torch.float32)
        return torch.addmm(total_VD, grad_NV.T, hidden_ND, out_dtype=torch.float32, out=total_VD)
    product_VD = grad_NV.T @ hidden_ND  # rounded to 16 bits once a chunk
    return product_VD.float() if total_VD is None else total_VD.add_(product_VD)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, z_loss, scale):
        weight, N = weight_VD.to(hidden_ND.dtype), len(targets_N)
        on_triton = backend.triton_runs(hidden_ND)
        rows_of = _rows_triton if on_triton else _rows_torch
        scale = scale if on_triton and hidden_ND.dtype != torch.float16 else 1.0  # float16 would underflow
        rows = chunk_rows(N, len(weight), hidden_ND.element_size() if on_triton else 4, hidden_ND.device.type)
        losses_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = hidden_ND.new_empty(hidden_ND.shape) if ctx.needs_input_grad[0] else None
        grad_weight = None
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            hidden = hidden_ND[part]
            logits = F.linear(hidden, weight)
            losses_N[part], grad = rows_of(logits, targets_N[part], z_loss, any(ctx.needs_input_grad[:2]), scale)
            if ctx.needs_input_grad[0]:
                torch.mm(grad, weight, out=grad_hidden[part])
            if ctx.needs_input_grad[1]:
                grad_weight = _add_weight_gradient(grad_weight, grad, hidden)
            del logits, grad  # or the next chunk's logits would be made beside these
        if ctx.needs_input_grad[1] and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.grad_hidden, ctx.grad_weight, ctx.spent = grad_hidden, grad_weight, False
        ctx.scale, ctx.on_triton = scale, on_triton
        return losses_N.sum()

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.spent:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward only")
        ctx.spent = True
        gradients = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None
        for gradient in gradients:
            if gradient is not None and ctx.on_triton:
                rescale_(gradient, grad_output, ctx.scale)
            elif gradient is not None:
                gradient.mul_(grad_output.to(gradient.dtype))
        return *gradients, None, None, None
