"""Cross-entropy in Triton: logits in, their gradients out, in the same memory. Only losses and log-sum-exps are new.

Shapes: N rows (tokens), V vocabulary. Next: cross_entropy.py, which makes the logits chunk by chunk.
"""

import torch
import triton
import triton.language as tl

from kernels.backend import INTERPRETED


def pick_blocks(V):
    """(rows, columns, warps) of a tile. A program has one row, or several where the vocabulary is small; a pass goes
    along it with 16 elements a thread, two 16-byte loads in 16 bits. Three rows at a time on every SM are 40 MB at a
    vocabulary of 50k, so that the second pass reads from L2. The interpreter's cost is per operation."""
    columns = triton.next_power_of_2(V)
    if INTERPRETED:
        return 64, min(columns, 128), 4
    return max(1, min(16, 4096 // columns)), min(columns, 8192), 16 if columns >= 8192 else 8


# loss = lse - logit[target] and lse = log sum exp(logits) of every row, fp32; with WRITE then, over the logits,
# gradient = scale * (softmax * (1 + 2 z_loss lse) - onehot). A row whose target is `ignore` gets loss and gradient 0,
# one whose target is no row of the vocabulary NaN in both. Traffic: the logits read twice, the second time from L2 at
# best, and written once. So that L2 keeps them until then, what is done with is marked to go first, and the second pass
# begins where the first has ended. Grid: blocks of ROWS rows.
@triton.jit
def cross_entropy_kernel(logits, targets, losses, lses, N, V, row_stride, z_loss, scale, ignore: tl.constexpr,
                         WRITE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    WAITS: tl.constexpr = "evict_last" if WRITE else "evict_first"
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = rows < N
    logits += rows.to(tl.int64)[:, None] * row_stride
    target = tl.load(targets + rows, there, other=ignore)
    valid = (target >= 0) & (target < V)
    chosen = tl.load(logits + tl.where(valid, target, 0)[:, None], (there & valid)[:, None], other=float("nan"))
    chosen = tl.sum(chosen.to(tl.float32), 1)
    tl.debug_barrier()  # all have read their target's logit before any thread overwrites logits
    top = tl.where(there, float("-inf"), 0.0)
    total = tl.where(there, 0.0, 1.0)
    for start in range(0, V, BLOCK):
        inside = there[:, None] & (columns[None, :] < V - start)
        x = tl.load(logits + start + columns[None, :], inside, other=float("-inf"), eviction_policy=WAITS)
        x = x.to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf minus -inf is no number
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        top = new_top
    lse = top + tl.log(total)
    keep = target != ignore
    tl.store(losses + rows, tl.where(keep, lse - chosen, 0.0), there)
    tl.store(lses + rows, lse, there)
    if WRITE:
        factor = tl.where(valid, 1.0 + 2.0 * z_loss * lse, float("nan"))
        n_blocks = tl.cdiv(V, BLOCK)
        for i in range(n_blocks):
            start = (n_blocks - 1 - i) * BLOCK
            inside = there[:, None] & (columns[None, :] < V - start)
            place = logits + start + columns[None, :]
            x = tl.load(place, inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(x - lse[:, None]) * factor[:, None]
            gradient -= tl.where(start + columns[None, :] == target[:, None], 1.0, 0.0)
            gradient = tl.where(keep[:, None], scale * gradient, 0.0)
            tl.store(place, gradient.to(logits.dtype.element_ty), inside, eviction_policy="evict_first")


@triton.jit
def rescale_kernel(x, wanted, made, n, BLOCK: tl.constexpr):
    # x *= wanted / made, unless that is 1. Grid: blocks of x.
    factor = tl.load(wanted)
    if factor != made:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = place < n
        tl.store(x + place, (tl.load(x + place, there).to(tl.float32) * (factor / made)).to(x.dtype.element_ty), there)


def rescale_(gradient, wanted, made):
    """gradient *= wanted / made, in place. gradient is contiguous; wanted a scalar on its device, made a number."""
    assert gradient.is_contiguous()
    if n := gradient.numel():
        rescale_kernel[(triton.cdiv(n, 8192),)](gradient, wanted.float(), made, n, BLOCK=8192, num_warps=8)


def cross_entropy_(logits_NV, targets_N, z_loss, ignore, write, scale=1.0):
    """(losses_N, lse_N) in fp32; with `write` the logits become scale times their gradients. Rows may lie at any
    stride."""
    (N, V), stride = logits_NV.shape, logits_NV.stride()
    assert stride[1] == 1 or V == 1
    targets_N = targets_N.contiguous()
    losses_N, lse_N = (torch.empty(N, dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    if N:
        rows, columns, warps = pick_blocks(V)
        cross_entropy_kernel[(triton.cdiv(N, rows),)](
            logits_NV, targets_N, losses_N, lse_N, N, V, stride[0], z_loss, scale, ignore=ignore, WRITE=write,
            ROWS=rows, BLOCK=columns, num_warps=warps)
    return losses_N, lse_N
