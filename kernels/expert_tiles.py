"""Tiles of the experts' kernels: which are worth measuring, which fit, which run. A tile is (BLOCK_M, BLOCK_N, BLOCK_K,
num_warps, num_stages). A search measures them with triton_experts.tile_arms and keeps the best in TILES.

D model width, F expert width.   Next: triton_experts.py.
"""

import functools

import torch

from kernels import backend

TILES = {}  # tile_key: tile, for kernels that were measured; the others have `default_tile`

# What was fast on an H100, most promising first, with some for the 99 KB of smaller GPUs. "up" has two sums a tile.
_ROWS = ((128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 32, 8, 4), (64, 128, 64, 4, 3),
         (64, 128, 64, 8, 2), (64, 256, 64, 4, 3))
_GRADIENT = ((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (256, 128, 64, 8, 3), (128, 256, 64, 8, 3),
             (128, 256, 64, 8, 4), (64, 256, 64, 4, 3), (128, 128, 32, 8, 4))
PROMISING = {
    "up": ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 3), (128, 128, 32, 8, 3)),
    "down_backward": ((128, 128, 64, 8, 3), (64, 128, 64, 8, 4), (64, 128, 32, 8, 4), (64, 128, 64, 4, 3),
                      (128, 64, 64, 8, 3)),
    "y": _ROWS, "dx": _ROWS, "d_down": _GRADIENT, "d_gate_up": _GRADIENT}
# And what runs unmeasured, if not the first of those: at any expert width, and at narrow ones (F <= 512), whose sums
# are short or whose matrices are small.
DEFAULT = {"y": (128, 256, 32, 8, 4), "d_down": (128, 128, 64, 4, 3)}
NARROW = {"up": (128, 64, 64, 8, 3), "y": (128, 128, 64, 4, 3), "down_backward": (64, 128, 64, 8, 4),
          "d_gate_up": (256, 128, 64, 8, 3)}


def tile_key(kernel, D, F, rows_per_expert, dtype):
    """What a measured tile holds for; rows count by powers of two."""
    return kernel, D, F, max(rows_per_expert, 1).bit_length(), str(dtype)


def default_tile(kernel, D, F, rows_per_expert, dtype):
    """The tile that runs where nothing was measured, if it fits."""
    if dtype == torch.float32 or D % 16 or F % 16:  # such rows are read element by element: an address for each
        return (64, 32, 32, 4, 2) if kernel in ("up", "down_backward") else (64, 64, 32, 4, 2)
    if rows_per_expert < 96 and not kernel.startswith("d_"):
        return (64, 256, 64, 4, 3) if kernel in ("y", "dx") else (64, 128, 64, 4, 3)
    tile = DEFAULT.get(kernel, PROMISING[kernel][0])
    return NARROW.get(kernel, tile) if F <= 512 else tile


def fits(kernel, tile, dtype, shared):
    """Whether the operands of all stages, and then the results on their way to wide stores, fit `shared` bytes, and the
    sums the registers: before Hopper, which has 227 KB of shared memory, no more than 64 a thread do."""
    block_m, block_n, block_k, warps, stages = tile
    factors = 2 if kernel == "up" else 1
    operands = stages * (block_m + factors * block_n) * block_k * dtype.itemsize
    results = block_m * block_n * (4 if kernel.startswith("d_") else dtype.itemsize)
    few_sums = factors * block_m * block_n <= 64 * 32 * warps or shared >= 227 * 1024
    return max(operands, results) + 1024 <= shared and few_sums


def candidates(kernel, dtype, shared):
    """Tiles of a kernel that are worth measuring and fit, most promising first."""
    tiles = (default_tile(kernel, 0, 0, 0, dtype),) if dtype == torch.float32 else PROMISING[kernel]
    return [tile for tile in tiles if fits(kernel, tile, dtype, shared)]


@functools.cache
def shared_limit():
    """Bytes of shared memory that one block may have here; an H100's without a GPU."""
    if not torch.cuda.is_available():
        return 227 * 1024
    return torch.cuda.get_device_properties().shared_memory_per_block_optin


def blocks(kernel, D, F, rows_per_expert, dtype):
    """Tile sizes and launch options of one kernel, as keyword arguments."""
    shape = (kernel, D, F, rows_per_expert, dtype)
    tile = TILES.get(tile_key(*shape)) or default_tile(*shape)
    if backend.INTERPRETED:  # which pays for operations, not for elements
        tile = (128, 128, 128, 4, 1)
    elif not fits(kernel, tile, dtype, shared_limit()):
        tile = next(iter(candidates(kernel, dtype, shared_limit())), tile)  # where none fits, the check will say so
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tile))
