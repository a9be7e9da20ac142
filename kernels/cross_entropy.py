"""Linear cross-entropy in chunks: the loss of `lm_head` without ever holding the whole (N, V) logits.

At K2's vocabulary of 163,840 the fp32 logits of 8k tokens would be 5.4 GB. Each chunk's logits are made, turned into
loss and gradient, and dropped; the gradients are formed in the forward pass, so nothing is computed twice.

Shapes: N tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F

IGNORE = -100           # target value of padding; counts neither in the loss nor in the gradient
CHUNK_ELEMENTS = {"cpu": 2**21}  # fp32 logits held at once: 8 MiB stay in a CPU's cache, elsewhere
DEFAULT_CHUNK_ELEMENTS = 2**28  # 1 GiB feeds the matmuls


def cross_entropy_twin(hidden_ND, weight_VD, targets_N):
    """The slow twin: whole logits. Sum of the losses over the targets that are not IGNORE, in fp32."""
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(hidden_ND, weight_VD, targets_N):
    """Same value and gradients as the twin. Returns a scalar fp32 sum over the targets that are not IGNORE."""
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N):
        weight = weight_VD.to(hidden_ND.dtype)
        elements = CHUNK_ELEMENTS.get(hidden_ND.device.type, DEFAULT_CHUNK_ELEMENTS)
        rows = max(1, elements // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for hidden, targets, start in zip(hidden_ND.split(rows), targets_N.split(rows), range(0, len(targets_N), rows)):
            logits = F.linear(hidden, weight).float()
            log_probs = torch.log_softmax(logits, dim=-1)
            keep = targets != IGNORE
            index = targets.clamp(min=0).unsqueeze(1)
            total -= (log_probs.gather(1, index).squeeze(1) * keep).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - onehot, zero where ignored
            grad = log_probs.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
            grad = grad.mul_(keep.unsqueeze(1)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start:start + rows])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden
        ctx.grad_hidden, ctx.grad_weight, ctx.spent = grad_hidden, grad_weight, False
        return total

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.spent:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward only")
        ctx.spent = True
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None
        return (grad_hidden.mul_(grad_output.to(grad_hidden.dtype)) if grad_hidden is not None else None,
                grad_weight.mul_(grad_output) if grad_weight is not None else None, None)
