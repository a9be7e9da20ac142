"""Muon's elementwise passes in Triton: bytes in, bytes out, nothing between. Shapes and twins: momentum.py."""

import torch
import triton
import triton.language as tl

from kernels.backend import INTERPRETED

BLOCK = 2**16 if INTERPRETED else 2048  # elements of a program


@triton.jit
def direction_kernel(momentum, grad, noise, out, n, columns, share, NESTEROV: tl.constexpr, BLOCK: tl.constexpr):
    # momentum += share (grad - momentum); out = momentum + share (grad - momentum) again, or the momentum itself.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i, first_row = first + tl.arange(0, BLOCK), first // columns
    row = first_row + ((first - first_row * columns).to(tl.int32) + tl.arange(0, BLOCK)) // columns  # in 32 bits
    inside = i < n
    old = tl.load(momentum + i, mask=inside, other=0)
    new = tl.load(grad + i, mask=inside, other=0)
    new = tl.where(tl.load(noise + row, mask=inside, other=0) != 0, 0.0, new)
    moved = old + share * (new - old)
    tl.store(momentum + i, moved, mask=inside)
    tl.store(out + i, moved + share * (new - moved) if NESTEROV else moved, mask=inside)


@triton.jit
def update_kernel(part, rows, rate, n, weight_decay, scale, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    step = tl.load(rate)
    old = tl.load(part + i, mask=inside, other=0)
    new = (1 - step * weight_decay) * old - step * scale * tl.load(rows + i, mask=inside, other=0).to(tl.float32)
    tl.store(part + i, new, mask=inside)


def direction(momentum, grad, noise_R, momentum_share, nesterov, dtype):
    """Moves momentum in place; returns the direction, (R, columns)."""
    n, columns = momentum.numel(), momentum.shape[-1]
    out_RC = torch.empty(n // columns, columns, dtype=dtype, device=momentum.device)
    if n:
        direction_kernel[triton.cdiv(n, BLOCK),](momentum, grad, noise_R, out_RC, n, columns, 1 - momentum_share,
                                                 nesterov, BLOCK)
    return out_RC


def update_(part_RC, rows_RC, rate, weight_decay, scale):
    """part = (1 - rate * weight_decay) * part - rate * scale * rows, in place."""
    if n := part_RC.numel():
        update_kernel[triton.cdiv(n, BLOCK),](part_RC, rows_RC, rate, n, weight_decay, scale, BLOCK)
