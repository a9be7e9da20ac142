"""What the blocks are made of: Linear, RMSNorm and the SwiGLU MLP, and 16-bit copies of their weights.

Parameters stay in fp32; the activations' dtype decides in which one computes. Where that is a 16-bit type the weights
are rounded: in every forward, or once a step into copies that the model keeps (WeightCopies). mla.py and moe.py build
on this.

Shapes: I input and O output width of a matrix, M rows of everything before them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels import later


class _RoundedLinear(torch.autograd.Function):
    """x times fp32 weights that are rounded to x's 16 bits and stacked. Their gradients do not pass through 16 bits
    where the device's matmul can leave its fp32 sums as they are; PyTorch offers that on CUDA alone."""

    @staticmethod
    def forward(ctx, x, copy_OI, *weights):
        if copy_OI is None:
            rounded = [weight.to(x.dtype) for weight in weights]
            copy_OI = torch.cat(rounded) if len(rounded) > 1 else rounded[0]
        ctx.save_for_backward(x, copy_OI)
        ctx.rows = [len(weight) for weight in weights]
        return F.linear(x.flatten(0, -2), copy_OI).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        x, copy_OI = ctx.saved_tensors
        grad_OM, x_MI = grad.flatten(0, -2).T, x.flatten(0, -2)
        grad_OI = torch.mm(grad_OM, x_MI, out_dtype=torch.float32) if x.is_cuda else (grad_OM @ x_MI).float()
        grad_x = F.linear(grad.flatten(0, -2), copy_OI.T).view_as(x)
        return grad_x, None, *grad_OI.split(ctx.rows)


def linear(x, weights, copy_OI=None):
    """x times the weights (O, I) of a list, stacked, in x's dtype. copy_OI: the same, rounded to that dtype."""
    if x.dtype == weights[0].dtype:  # fp32, or sharded parameters, gathered in 16 bits
        if later.on() and len(weights) == 1 and x.requires_grad:
            return later.SplitLinear.apply(x, weights)
        return F.linear(x, torch.cat(weights) if len(weights) > 1 else weights[0])
    return _RoundedLinear.apply(x, copy_OI, *weights)


class Linear(nn.Linear):
    """No bias; the residual stream's dtype decides the precision."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.weight_copy = None

    def copied(self):
        """{attribute for a rounded copy: the parameters that it stacks}."""
        return {"weight_copy": [self.weight]}

    def forward(self, x):
        return linear(x, [self.weight], self.weight_copy)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x):  # normalised in fp32, scaled in x's dtype: Hugging Face's order
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). In 16 bits gate and up are one matmul, and so is the gradient of x."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.gate_up_copy = None

    def copied(self):
        return {"gate_up_copy": [self.gate_proj.weight, self.up_proj.weight]}

    def forward(self, x):
        if x.dtype == self.gate_proj.weight.dtype:  # fp32, or FSDP2's: what is stacked would be kept
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up = linear(x, [self.gate_proj.weight, self.up_proj.weight], self.gate_up_copy).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


# ----------------------------------------------------------------------------- copies of the weights

class WeightCopies:
    """Rounded weights, made once for all micro-batches of a step: 2 bytes a parameter, which a forward takes anyway
    when it keeps what it rounded for the backward. They are in no state_dict.

    matrices: (module, name of the copy among its attributes, the parameters that it stacks) for each.
    """

    def __init__(self, matrices, dtype):
        self.weights, self.copies, self.seen = [], [], None
        for module, name, weights in matrices:
            copy = torch.cat([torch.empty_like(weight, dtype=dtype) for weight in weights])
            setattr(module, name, copy)
            self.weights += weights
            self.copies += copy.split([len(weight) for weight in weights])

    @torch.no_grad()
    def refresh(self, always=False):
        """Round the weights again if one was written to since: PyTorch counts that on the host. always: what a replayed
        CUDA graph writes is not counted."""
        written = sum(weight._version for weight in self.weights)
        if always or written != self.seen:
            torch._foreach_copy_(self.copies, [weight.detach() for weight in self.weights])
            self.seen = written
