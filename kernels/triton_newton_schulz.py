"""Newton-Schulz's symmetric products in Triton: one half of the tiles is computed, the other half is its mirror image.

Shapes: B matrices, M rows, K columns of each. Next: newton_schulz.py, which decides when this runs.
"""

import torch
import triton
import triton.language as tl

from kernels.backend import INTERPRETED


def pick_blocks(dtype):
    """(rows and columns of a tile, columns of X per step, warps, stages). 16-bit: three stages of two 16 KB operands
    are 96 KB, so that two programs share an SM, one stores while the other multiplies. fp32 has no exact wgmma; its dot
    is FMAs out of registers, which wants small tiles. The interpreter's cost is per operation."""
    if INTERPRETED:
        return 64, 64, 4, 1
    return (128, 64, 8, 3) if dtype.itemsize == 2 else (64, 16, 8, 3)


@triton.jit
def tile_of(t, blocks, GROUP: tl.constexpr):
    """Row and column block (row >= column) of the t-th tile of a lower triangle of blocks x blocks. The triangle is
    folded into a rectangle: short row r and long row blocks-1-r together fill one line of it (for an odd number of
    blocks: row r-1 and row blocks-1-r), so no program is without work. Lines are walked in groups, column by column:
    what runs at one time then touches few rows of X, which L2 keeps."""
    width = blocks | 1
    height = (blocks + 1) // 2
    first = t // (GROUP * width) * GROUP
    lines = tl.minimum(height - first, GROUP)
    place = t % (GROUP * width)
    r = first + place % lines - (blocks & 1)
    c = place // lines
    short = c <= r
    return tl.where(short, r, width - 2 - r), tl.where(short, c, c - r - 1)


# out = alpha X X^T + beta A + gamma I for symmetric A, summed up in fp32. For each matrix M (M + BLOCK) K FLOPs instead
# of 2 M M K; reads M K (and the half of A), writes M M elements. Grid: (B * blocks (blocks+1) / 2), matrix by matrix.
@triton.jit
def symmetric_product_kernel(x, a, out, M, K, x_batch, x_row, x_column, a_batch, a_row, a_column, alpha, beta, gamma,
                             blocks, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    tiles = blocks * (blocks + 1) // 2
    batch = (tl.program_id(0) // tiles).to(tl.int64)  # a stack of experts can pass 2^31 elements
    i, j = tile_of(tl.program_id(0) % tiles, blocks, GROUP)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    ks = tl.arange(0, BLOCK_K)
    x += batch * x_batch
    left = x + rows[:, None] * x_row + ks[None, :] * x_column
    right = x + columns[None, :] * x_row + ks[:, None] * x_column
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    if a is not None:  # before the loop: after it, A and the product would not fit into registers together
        a += batch * a_batch + rows[:, None] * a_row + columns[None, :] * a_column
        product += beta / alpha * tl.load(a, inside, other=0.0).to(tl.float32)
    for k in range(0, K, BLOCK_K):
        left_block = tl.load(left, (rows[:, None] < M) & (ks[None, :] < K - k), other=0.0)
        right_block = tl.load(right, (columns[None, :] < M) & (ks[:, None] < K - k), other=0.0)
        product = tl.dot(left_block, right_block, product, input_precision="ieee")
        left += BLOCK_K * x_column
        right += BLOCK_K * x_column
    product *= alpha
    if i == j:
        product = 0.5 * product + 0.5 * tl.trans(product)  # exactly symmetric, however the dot rounds
        product += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    result = product.to(out.dtype.element_ty)
    out += batch * M * M
    tl.store(out + rows[:, None] * M + columns[None, :], result, inside)
    if i != j:
        mirrored = (columns[:, None] < M) & (rows[None, :] < M)
        tl.store(out + columns[:, None] * M + rows[None, :], tl.trans(result), mirrored)


def symmetric_product(X_BMK, A_BMM=None, alpha=1.0, beta=0.0, gamma=0.0):
    """alpha X X^T + beta A + gamma I of every matrix, contiguous, in X's dtype and exactly symmetric. X may have any
    strides (a transposed view costs nothing); A is None or symmetric, in X's dtype, any strides."""
    B, M, K = X_BMK.shape
    assert A_BMM is None or (A_BMM.shape == (B, M, M) and A_BMM.dtype == X_BMK.dtype)
    assert A_BMM is None or alpha != 0
    span = max(M * M, *(sum((n - 1) * stride for n, stride in zip(t.shape[1:], t.stride()[1:]))
                        for t in (X_BMK, A_BMM) if t is not None))
    assert span < 2**31, "within one matrix offsets have 32 bits"
    out_BMM = torch.empty(B, M, M, dtype=X_BMK.dtype, device=X_BMK.device)
    if out_BMM.numel():
        block, block_k, warps, stages = pick_blocks(X_BMK.dtype)
        blocks = triton.cdiv(M, block)
        grid = (B * blocks * (blocks + 1) // 2,)
        # ptxas takes 168 registers where 128 do without a spill; above 128 one SM has room for only one program
        registers = 128 if A_BMM is not None and X_BMK.dtype.itemsize == 2 and M % 16 == 0 else None
        symmetric_product_kernel[grid](
            X_BMK, A_BMM, out_BMM, M, K, *X_BMK.stride(), *(A_BMM.stride() if A_BMM is not None else (0, 0, 0)), alpha,
            beta, gamma, blocks, BLOCK=block, BLOCK_K=block_k, GROUP=8, num_warps=warps, num_stages=stages,
            maxnreg=registers)
    return out_BMM


# Grid: matrices. The sum of squares is of elements over the largest one so far: it neither under- nor overflows.
@triton.jit
def normalise_kernel(x, out, n, safety, TINY: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * n
    i = tl.arange(0, BLOCK)
    largest, total = TINY, 0.0
    for done in range(0, n, BLOCK):
        values = tl.load(x + first + done + i, mask=i < n - done, other=0).to(tl.float32)
        now = tl.maximum(largest, tl.max(tl.abs(values), 0))
        shrink = largest / now
        scaled = values / now
        total = total * (shrink * shrink) + tl.sum(scaled * scaled, 0)
        largest = now
    norm = tl.maximum(safety * tl.sqrt(total), TINY)
    for done in range(0, n, BLOCK):
        values = tl.load(x + first + done + i, mask=i < n - done, other=0).to(tl.float32)
        tl.store(out + first + done + i, values / largest / norm, mask=i < n - done)


def normalised(G, dtype, safety):
    """Every matrix of G, which is contiguous, over safety times its Frobenius norm."""
    out, n = torch.empty_like(G, dtype=dtype), G.shape[-2:].numel()
    normalise_kernel[G.shape[:-2].numel(),](G, out, n, safety, torch.finfo(torch.float32).tiny,
                                            2**14 if INTERPRETED else 4096, num_warps=8)
    return out
