"""What Muon does to every element beside Newton-Schulz: momentum with its look-ahead, and the update with weight decay.

The twins are PyTorch's foreach and in-place operations, a pass over memory each; Triton makes one pass of each of the
two. Next: triton_momentum.py, ../muon.py, which calls both.

Shapes: a parameter as its rows of `columns` elements, R of them here.
"""

import torch

from kernels import backend


def directions_twin(momenta, grads, noise, momentum, nesterov, dtype):
    """The slow twin of directions."""
    for grad, noise_R in zip(grads, noise):
        grad.masked_fill_(noise_R.view(*grad.shape[:-1], 1), 0.0)
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    return [(torch.lerp(grad, moving, momentum) if nesterov else moving).to(dtype).view(-1, grad.shape[-1])
            for grad, moving in zip(grads, momenta)]


def directions(momenta, grads, noise, momentum, nesterov, dtype):
    """Move each momentum (fp32, in place) towards its gradient (fp32), which counts as zero in the rows that noise_R
    (bool) marks, and return what Newton-Schulz is to orthogonalise, (R, columns) in dtype: the momentum, or with
    nesterov its look-ahead. The gradients may be changed."""
    if not backend.triton_runs(momenta[0]):
        return directions_twin(momenta, grads, noise, momentum, nesterov, dtype)
    from kernels import triton_momentum
    return [triton_momentum.direction(moving, grad.contiguous(), noise_R, momentum, nesterov, dtype)
            for moving, grad, noise_R in zip(momenta, grads, noise)]


def update_twin_(part_RC, rows_RC, rate, weight_decay, scale):
    """The slow twin of update_."""
    part_RC.mul_(1 - rate * weight_decay)
    if isinstance(rate, torch.Tensor):
        part_RC.addcmul_(rows_RC, rate * -scale)
    else:
        part_RC.add_(rows_RC, alpha=-rate * scale)


def update_(part_RC, rows_RC, rate, weight_decay, scale):
    """part = (1 - rate * weight_decay) * part - rate * scale * rows, in place; rows may have another dtype. rate is a
    number, or a tensor () in fp32, as Triton needs it."""
    if not (backend.triton_runs(part_RC) and isinstance(rate, torch.Tensor)):
        return update_twin_(part_RC, rows_RC, rate, weight_decay, scale)
    from kernels import triton_momentum
    triton_momentum.update_(part_RC, rows_RC.contiguous(), rate, weight_decay, scale)
    torch.autograd.graph.increment_version(part_RC)  # which PyTorch does for operations of its own
