"""Whether a run fits into memory, told before its first step: what it will need against what is free.

Parameters, gradients and optimizer state are counted; what the forward keeps for the backward is added up from the
shapes that ../model.py, mla.py and moe.py keep (tests/test_memory.py compares the sum with what autograd really saves).
On a CPU the peak of a process is met within a quarter, on an H100 what three arms of bench.step took within a
twentieth. launch/costs.py plans with the same sums.

Shapes: D hidden_size, H heads, Q and U widths of a query and a value, R latent, F width of an MLP, K experts a token.
"""

import collections
import ctypes
import os
import re
from pathlib import Path

import torch

from errors import UserError
from kernels import backend, graphs
from kernels.attention import QUERY_CHUNK
from kernels.cross_entropy import CHUNK_ELEMENTS, DEFAULT_CHUNK_BYTES, chunk_rows
from muon import local_rows
from ranks import parallel

PYTORCH = 80 * 2**20  # what its libraries take when they first run
PIECES = 1.35  # on a CPU, of what activations take: the allocator keeps pieces that it cannot use (measured)
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

def keeps_copies(config, layout, device):
    """Whether the model keeps rounded copies of its weights. A UserError where they are asked for and cannot be."""
    whole, rounded = layout.dense is None, config.dtype != "float32"
    if config.weight_copies and not (whole and rounded):
        why = "a float32 run rounds no weights" if whole else "under torchrun FSDP2 makes them in every forward"
        raise UserError(f"weight_copies: {why}: leave weight_copies=None")
    wanted = device.type == "cuda" and config.activation_checkpointing != "full"
    return whole and rounded and (wanted if config.weight_copies is None else config.weight_copies)


def needed(config, model, routes, layout, device, size, forwards):
    """Bytes that a step of `forwards` forwards of `size` sequences will still take at its peak."""
    sizes = {name: (p.numel(), local_rows(p)[0].numel()) for name, p in model.named_parameters()}
    return sum(parts(config, sizes, routes, layout, device, size, forwards).values())


def parts(config, sizes, routes, layout, device, size, forwards):
    """{what: bytes} of `needed`, from {name: (elements of a parameter, those on this rank)}."""
    local = {name: here for name, (_, here) in sizes.items()}
    dtype = getattr(torch, config.dtype)
    muon = sum(n for name, n in local.items() if routes[name].optimizer == "muon")
    total, wire = sum(local.values()), config.wire_bytes()
    # On a GPU they are allocated already, here not yet touched.
    always = {"parameters": 0 if device.type == "cuda" else 4 * total, "optimizer": 4 * (2 * total - muon)}
    always["average"] = always["parameters"] * bool(config.ema)
    always["copy for a save"] = sum(always.values()) if config.async_save and device.type == "cpu" else 0
    always["libraries"] = PYTORCH
    blocks, gathered = collections.Counter(), collections.Counter()  # by layer: elements, and those that a rank gathers
    for name, (whole, _) in sizes.items():
        if ".layers." in name:
            layer = name.split(".")[2]
            blocks[layer] += whole
            gathered[layer] += whole // (layout.ep if ".experts." in name else 1)
    copies = dtype.itemsize * blocks.total() * keeps_copies(config, layout, device)
    updating = {"gradients": 4 * total, "rounded weights": copies,
                "update": max(muon and wire * (muon + 4 * min(muon, 2**27)), 4 * (total - muon))}
    head = config.vocab_size * config.hidden_size  # the loss makes its gradient in the forward, from chunks of logits
    pieces = PIECES if device.type == "cpu" else 1
    kept, backward = (int(size * pieces * n) for n in activations(config, dtype, device))
    logits = _logits(config, dtype, device, size)
    graphed = graphs.wanted(config, layout, device)
    keeps = graphed and _triton(device)
    gradients = total if forwards > 1 else keeps * sum(n for name, n in local.items() if ".experts." in name)
    computing = {"gradients": 4 * head * (1 + config.mtp_depth) + 4 * gradients,  # those before the backward
                 "rounded weights": copies, "activations": kept, "logits, then a block": max(logits, backward)}
    if graphed:  # which keep all of that for themselves: what a validation takes, a block at a time, comes on top
        computing["validation"] = kept // config.num_hidden_layers + logits
    phases = [computing, updating]
    if layout.dense is not None:  # gathered: a block, the next one, and the gradients of one; both ends all the time
        block = max(gathered.values())
        computing["gathered weights"] = 2 * dtype.itemsize * (block + head)
        computing["gradients"] += 4 * block
        if layout.pp > 1:  # nothing gathered goes before the last micro-batch, and every one has its places to receive
            whole, received = sum(gathered.values()) + head, 2 * forwards * size * config.sequence_length
            computing["gathered weights"] = dtype.itemsize * whole
            computing["gradients"] = 4 * (head + total + whole)
            computing["received"] = dtype.itemsize * received * config.hidden_size
        # At the end both ends' gradients, and their fp32 copy that is reduced.
        phases.append({"gradients": 4 * total + (8 + 2 * dtype.itemsize) * head,
                       "gathered weights": 2 * dtype.itemsize * head})
    elif dtype.itemsize < 4:  # rounded weights are kept for the backward
        once = config.activation_checkpointing == "full"  # one block's at a time
        computing["rounded weights"] = copies or dtype.itemsize * (max(blocks.values()) if once else blocks.total())
    return always | max(phases, key=lambda phase: sum(phase.values()))


def _triton(device):
    return device.type == "cuda" and backend.running_now()


def _logits(config, dtype, device, size):
    """Bytes of the chunk of logits that the loss works on: Triton's kernel in place, the twins with copies in fp32."""
    if device.type == "cpu":
        return CHUNK_ELEMENTS["cpu"] * (8 if dtype.itemsize == 4 else 12)
    rows = chunk_rows(size * config.sequence_length, config.vocab_size, dtype.itemsize, device.type)
    return rows * config.vocab_size * dtype.itemsize if _triton(device) else 2 * DEFAULT_CHUNK_BYTES


def activations(config, dtype, device):
    """Bytes (that autograd keeps of one sequence, that the backward of one block takes beside them)."""
    moe = [config.is_moe_layer(index) for index in range(config.num_hidden_layers + config.mtp_depth)]
    blocks = [block_bytes(config, dtype, device, kind) for kind in moe]
    D, T, s = config.hidden_size, config.sequence_length, dtype.itemsize
    ends = T * (4 * D + 2 * s * D)  # the last norm, and the gradient that the loss has made of its output
    ends += 3 * config.mtp_depth * ends  # the MTPBlock's too, and the norms and the input of its projection
    if config.activation_checkpointing == "none":
        return ends + sum(blocks), max(blocks) // 4
    kept = max(blocks) * 0.6 if config.activation_checkpointing == "selective" else T * s * D  # what goes into a block
    return ends + int(len(blocks) * kept), max(blocks) * 5 // 4


def block_bytes(config, dtype, device, moe):
    """Bytes that the backward of one block needs of one sequence."""
    c, s, T = config, dtype.itemsize, config.sequence_length
    D, H, U, K, F = c.hidden_size, c.num_attention_heads, c.v_head_dim, c.num_experts_per_tok, c.moe_intermediate_size
    operator = _triton(device) or device.type == "cpu" and s == 4  # of the experts
    fused = _triton(device) and c.compile is not False  # compiled blocks keep nothing in fp32, and less in between
    norm = lambda width: (2 * s if fused else 4 + 2 * s) * width  # its input in fp32, the normalised, the scaled
    if c.attention == "mla":
        N, P, R = c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        token = norm(R) + (4 * P if s == 4 else 0) + s * H * (2 * (N + P) + N + 2 * U) + norm(c.q_lora_rank or 0)
    else:
        token = 4 * s * H * U
    token += 2 * norm(D)
    mlp = lambda width: (3 if fused else 4) * s * width  # gate, its silu, up, their product
    if moe:
        rows = (2 * F if operator else 4 * F + D) * s + (0 if operator else 4 * D) + 40
        token += K * (rows + (2 * s * D if c.ep > 1 else 0)) + 4 * c.n_routed_experts + mlp(F * c.n_shared_experts)
        token += 4 * D if s < 4 and not fused else 0  # the router's input in fp32
    else:
        token += mlp(c.intermediate_size)
    scores = 0
    if device.type != "cuda":  # the twin keeps the softmax of every chunk of queries, in fp32 and rounded
        ends = (min(start + QUERY_CHUNK, T) for start in range(0, T, QUERY_CHUNK))
        scores = sum((end - (end - 1) // QUERY_CHUNK * QUERY_CHUNK) * end for end in ends) * H * (4 + s * (s < 4))
    return token * T + scores
