"""Whether a run fits into memory, told before its first step: what it will need against what is free.

What it will need is peak.py's sum.
"""

import ctypes
import os
import re
from pathlib import Path

import torch

from errors import UserError
from ranks import parallel
from run import peak

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
SURE, TIGHT = 1.0, 0.8  # refused beyond SURE times what is free, warned of beyond TIGHT times


def keep_freed(device):
    """On a CPU let the C library keep what is freed, as PyTorch does on a GPU: it would hand large blocks back to the
    system, and every step take as many again, zeroed page by page (5 % of a step of configs/debug.py). For this process
    and glibc, which alone has the lever."""
    wanted = device.type == "cpu" and os.name == "posix"
    if mallopt := wanted and getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(TOP_PAD, 2**26)
        mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25)  # older ones: 32 MiB at most


def require(config, model, routes, layout, device):
    """Refuse a run that clearly does not fit on some rank, with the levers; warn where it is close. All ranks call it
    together, before the optimizer's state is made, and end alike."""
    size, forwards = parallel.split_batch(config)
    needs = {n: needed(config, model, routes, layout, device, n, size * forwards // n)
             for n in parallel.forward_sizes(config, size)}
    everyone = parallel.from_all((free_bytes(device), needs))
    if any(free is None for free, _ in everyone):
        print(f"how much memory is free cannot be told on this {device.type}: whether the run fits is not checked")
        return
    rank, (free, needs) = max(enumerate(everyone), key=lambda item: item[1][1][size] / max(item[1][0], 1))
    smaller = max((n for n, need in needs.items() if n < size and need <= TIGHT * free), default=None)
    said = (f"about {needs[size] / 2**30:,.1f} GiB of memory are needed{f' on rank {rank}' * (len(everyone) > 1)} with "
            f"micro_batch_size={size}, {free / 2**30:,.1f} GiB are free: "
            + (f"--micro_batch_size={smaller} would fit" if smaller else "take a smaller model or more ranks")
            + f", --dp_replicate=1 needs less than {layout.dp_replicate} copies" * (layout.dp_replicate > 1)
            + ", --activation_checkpointing=full needs less" * (config.activation_checkpointing != "full")
            + ", and so does a shorter --sequence_length")
    # A GPU refuses memory without harm, and the guard then halves the micro-batch: only what never fits is refused.
    if needs[min(needs) if device.type == "cuda" else size] > SURE * free:
        raise UserError(said)
    if needs[size] > TIGHT * free:
        print(f"warning: {said}", flush=True)


# ----------------------------------------------------------------------------- what is free

def free_bytes(device):
    """Bytes that this rank may still take, None where nobody can tell. Ranks of one machine share its memory."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1])
    except (OSError, TypeError):  # no Linux
        return None
    return min([free, *cgroup_bytes()]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cgroup_bytes(root="/sys/fs/cgroup", own="/proc/self/cgroup"):
    """What each control group around this process, those of a container or a batch job, still allows."""
    lines = Path(own).read_text(encoding="utf-8").splitlines() if Path(own).exists() else []
    found = []
    for kind, path in (line.split(":", 2)[1:] for line in lines):
        limit, usage, cache = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file") if kind else \
            ("memory.max", "memory.current", "inactive_file")  # of version 1, where every kind has a tree; of version 2
        inner = Path(root, kind, path.lstrip("/"))
        for group in (inner, *inner.parents):
            try:
                most, used = (int((group / name).read_text(encoding="utf-8")) for name in (limit, usage))
                stat = (group / "memory.stat").read_text(encoding="utf-8")
                found.append(most - used + int(re.search(rf"^{cache} (\d+)", stat, re.M)[1]))
            except (OSError, ValueError, TypeError):  # not there, or "max": no limit
                continue
    return found


# ----------------------------------------------------------------------------- what is needed

def needed(config, model, routes, layout, device, size, forwards):
    """Bytes that a step of `forwards` forwards of `size` sequences will still take at its peak."""
    parts = peak.parts(config, peak.held_of(model, routes), layout, device, size, forwards)
    return sum(parts.values()) - (parts["parameters"] if device.type == "cuda" else 0)  # there they are already
