"""What a step takes at its fullest moment on a rank, by arithmetic: what it holds all the time, and the largest of what
comes and goes. memory.py asks it before a run, launch/costs.py of ranks that are not there.

What the forward keeps for the backward is added up from the shapes that ../model.py, mla.py and moe.py keep
(tests/test_memory.py compares the sum with what autograd really saves). On a CPU the peak of a process is met within a
quarter, on an H100 what three arms of bench.step took within a twentieth. Under torchrun FSDP2 gathers weights for a
block at a time, or with stages once for all of them: tests/test_plan.py holds that against what PyTorch's allocator
counted on gloo ranks. Next: memory.py.

Shapes: N tokens of a forward, M of them and of other ranks that have experts here, K choices a token, S = N K rows, D
hidden_size, F expert width, H heads, Q and U widths of a query and a value, R latent, V vocabulary, P ranks of a group.
"""

import collections
import math
from typing import NamedTuple

import torch

from errors import UserError
from kernels import backend, graphs
from kernels.attention import QUERY_CHUNK
from kernels.cross_entropy import CHUNK_ELEMENTS, DEFAULT_CHUNK_BYTES, chunk_rows
from kernels.loop_experts import GROUP
from muon import local_rows
from owners import BATCH_ELEMENTS, BUCKET_ELEMENTS

PYTORCH = 80 * 2**20  # what its libraries take when they first run
PIECES = 1.35  # on a CPU, of what activations take: the allocator keeps pieces that it cannot use (measured)
NCCL = 2**30  # its buffers, assumed


class Held(NamedTuple):
    """The part of a model that a rank has."""
    shapes: dict  # {name: shape} of all parameters of its blocks and ends, as they are on all ranks together
    local: dict  # {name: elements of it on this rank}, or of all that are like it
    routes: dict
    kinds: list  # of its blocks: whether they have experts
    place: int = 0  # of its stage among pp
    has_head: bool = True


def held_of(model, routes):
    """Held of a model as it is on this rank."""
    named, stages = dict(model.named_parameters()), model.stages
    return Held({name: p.shape for name, p in named.items()}, {name: local_rows(p)[0].numel() for name, p in
                named.items()}, routes, [model.config.is_moe_layer(index) for index in model.here],
                *(stages[0].index, stages[-1].last) if stages else ())


def keeps_copies(config, layout, device):
    """Whether the model keeps rounded copies of its weights. A UserError where they are asked for and cannot be."""
    whole, rounded = layout.dense is None, config.dtype != "float32"
    if config.weight_copies and not (whole and rounded):
        why = "a float32 run rounds no weights" if whole else "under torchrun FSDP2 makes them in every forward"
        raise UserError(f"weight_copies: {why}: leave weight_copies=None")
    wanted = device.type == "cuda" and config.activation_checkpointing != "full"
    return whole and rounded and (wanted if config.weight_copies is None else config.weight_copies)


def parts(config, held, layout, device, size, forwards):
    """{what: bytes} at the peak of a step of `forwards` forwards of `size` sequences."""
    total = sum(held.local.values())
    muon = sum(n for name, n in held.local.items() if held.routes[name].optimizer == "muon")
    always = {"parameters": 4 * total, "optimizer": 4 * (2 * total - muon)}
    if device.type == "cpu":  # else in the host's memory
        always["average"] = 4 * total * bool(config.ema)
        always["copy for a save"] = sum(always.values()) * config.async_save
    always["libraries"] = PYTORCH
    phases = _of_one if layout.dense is None else _of_many
    return always | max(phases(config, held, layout, device, size, forwards, total, muon),
                        key=lambda phase: sum(phase.values()))


# ----------------------------------------------------------------------------- one process

def _of_one(config, held, layout, device, size, forwards, total, muon):
    """[{what: bytes} that a moment takes beside what is always there]."""
    dtype = getattr(torch, config.dtype)
    blocks = collections.Counter()  # elements by layer
    for name, shape in held.shapes.items():
        if ".layers." in name:
            blocks[name.split(".")[2]] += shape.numel()
    copies = dtype.itemsize * blocks.total() * keeps_copies(config, layout, device)
    updating = {"gradients": 4 * total, "rounded weights": copies,
                "update": max(muon and config.wire_bytes() * (muon + 4 * min(muon, 2**27)), 4 * (total - muon))}
    head = config.vocab_size * config.hidden_size  # the loss makes its gradient in the forward, from chunks of logits
    pieces = PIECES if device.type == "cpu" else 1
    kept, backward = (int(size * pieces * n) for n in activations(config, dtype, device))
    logits = _logits(config, dtype, device, size)
    graphed = graphs.wanted(config, layout, device)
    experts = sum(n for name, n in held.local.items() if ".experts." in name) * (graphed and _triton(device))
    computing = {"gradients": 4 * head * (1 + config.mtp_depth) + 4 * (total if forwards > 1 else experts),  # before
                 "rounded weights": copies, "activations": kept, "logits, then a block": max(logits, backward)}
    if graphed:  # which keep all of that for themselves: what a validation takes, a block at a time, comes on top
        computing["validation"] = kept // config.num_hidden_layers + logits
    elif dtype.itemsize < 4:  # rounded weights are kept for the backward
        once = config.activation_checkpointing == "full"  # one block's at a time
        computing["rounded weights"] = copies or dtype.itemsize * (max(blocks.values()) if once else blocks.total())
    return computing, updating


# ----------------------------------------------------------------------------- many ranks

def _of_many(c, held, layout, device, size, forwards, total, muon):
    """The same of a rank under torchrun, in FSDP2's hands."""
    dtype, stays = getattr(torch, c.dtype), {}
    s = dtype.itemsize
    if device.type == "cuda":
        rows = 2 * size * c.sequence_length * sent_rows(c, layout.ep) * c.hidden_size
        stays["communication"] = int(NCCL + s * rows + 8 * c.wire_bytes() * BUCKET_ELEMENTS)
    ends, blocks, own = _gathered(held.shapes, layout.ep)
    head = c.vocab_size * c.hidden_size * held.has_head
    kept, again, working = _activations_of_many(c, held, layout, device, size)
    most = (8 if s == 4 else 12) * size * c.sequence_length * c.vocab_size  # if one chunk is all
    logits = min(_logits(c, dtype, device, size), most) if held.has_head else 0
    if layout.pp > 1:  # PipelineStage has room for what comes in of every micro-batch, from both sides
        comes = s * size * c.sequence_length * c.hidden_size * c.stages_a_rank()
        kept = int(kept * in_flight(c, held.place, forwards))
        stays["stages' inputs"] = forwards * comes * ((held.place > 0) + (held.place < c.pp - 1))
    left = 4 * total * (forwards > 1)  # gradients of earlier micro-batches
    # A block's weights, and the next one's on their way, but from no other rank.
    gathers, grads, ahead = (1 + (layout.dp_shard > 1)) * max(blocks), s * max(blocks), 0
    if layout.pp > 1:  # gathered once, and gradients added up in fp32 where they are, until the last micro-batch
        whole = sum(blocks)
        left, gathers, grads, ahead = 0, whole, 4 * (whole + ends), whole
    elif c.activation_checkpointing != "none" and len(blocks) > 1:
        grads += 4 * own  # the last that FSDP2 reduces of the block before is still under way, in fp32
    left += 4 * head * (1 + c.mtp_depth)  # the loss makes its gradient in the forward
    losing = {"gradients": left, "activations": kept, "logits or a block": logits,
              "gathered weights": s * (ends + ahead)}
    computing = {"gradients": left + grads, "activations": kept + again, "logits or a block": working,
                 "gathered weights": s * (ends + gathers)}
    reducing = {"gradients": 4 * total + (4 + s) * ends, "gathered weights": s * ends}  # both ends, at last, in fp32
    if layout.pp > 1:
        reducing = {"gradients": 4 * total + grads + 4 * max(blocks), "gathered weights": s * (ends + gathers)}
    ranks = layout.dp_replicate * layout.dp_shard
    updating = {"gradients": 4 * total, "update": max(_update(c, held, muon, ranks), 4 * (total - muon))}
    return [stays | phase for phase in (losing, computing, reducing, updating)]


def sent_rows(config, ep):
    """To how many other ranks a token goes, if every choice is as likely: a rank that has any of its K experts gets
    it once. (P - 1) (1 - C(E - E / P, K) / C(E, K))."""
    E, K = config.n_routed_experts, config.num_experts_per_tok
    return (ep - 1) * (1 - math.comb(E - E // ep, K) / math.comb(E, K)) if ep > 1 else 0.0


def _gathered(shapes, ep):
    """Elements that a rank gathers (of the ends, [of every block], of a block at most without experts that have ranks
    of their own)."""
    blocks, experts = collections.Counter(), collections.Counter()
    for name, shape in shapes.items():
        unit, spread = name.split(".")[2] if ".layers." in name else "ends", ".experts." in name and ep > 1
        blocks[unit] += shape.numel() // (ep if spread else 1)
        experts[unit] += shape.numel() // ep if spread else 0
    ends = blocks.pop("ends", 0)
    return ends, list(blocks.values()), max(n - experts[unit] for unit, n in blocks.items())


def _activations_of_many(c, held, layout, device, size):
    """Bytes (that all blocks keep for the backward, that the one at hand makes again of them, that its backward takes
    beside both)."""
    dtype, D, pieces = getattr(torch, c.dtype), c.hidden_size, PIECES if device.type == "cpu" else 1
    N, s = size * c.sequence_length, dtype.itemsize
    M, S = (N * (1 + sent_rows(c, layout.ep)) if layout.ep > 1 else 0), N * c.num_experts_per_tok
    operator = _operator(device, s)
    # What came from other ranks is kept by the operator; the twins keep rows of every choice instead.
    came = M * (8 * c.num_experts_per_tok + (s * D if operator else 0))
    blocks = [size * block_bytes(c, dtype, device, moe) + moe * came for moe in held.kinds]
    ends = N * (4 + 2 * s) * D * (1 + 3 * c.mtp_depth) * held.has_head  # as in activations
    share = {"none": 1.0, "selective": 0.6}.get(c.activation_checkpointing)
    kept = share * sum(blocks) if share else N * s * D * len(blocks)
    again = 0 if share == 1 else (1 - (share or 0)) * max(blocks)
    working = max(blocks) / 4
    if device.type == "cpu":
        working = _working_on_a_cpu(c, operator, s, size, N, M or N, S if any(held.kinds) else 0)
    return tuple(int(pieces * n) for n in (ends + kept, again, working))


def _working_on_a_cpu(c, operator, s, size, N, M, S):
    """Bytes that come and go in the backward of a block: of the experts or of attention, and the stream's gradients."""
    D, F, T = c.hidden_size, c.moe_intermediate_size, c.sequence_length
    if operator:  # loop_experts.backward: gradients of all rows, and some experts' rows and hidden numbers, M results
        n = min(S, GROUP + S // max(c.n_routed_experts, 1))
        experts = 4 * (S * D + max(n * (2 * D + 5 * F), M * D))
    else:  # SumRows.backward: three products in fp32
        experts = S * D * (s + 12)
    attention = 3 * 4 * size * c.num_attention_heads * min(QUERY_CHUNK, T) * T  # of a chunk's scores
    return max(experts, attention) + 2 * s * N * D


def in_flight(c, place, forwards):
    """Micro-batches whose activations a rank holds at once: those that went in before the first came back."""
    if c.splits_backward():  # where fewer are on their way, what the weights' gradients want waits for more
        return min(forwards, c.pp)
    after, rounds = c.pp - 1 - place, c.stages_a_rank()
    if rounds == 1:  # arXiv 2104.04473, section 2.2: every stage behind this one has one more
        return min(forwards, after + 1)
    return min(forwards, ((rounds - 1) * c.pp + 2 * after + 1) / rounds)  # each has a part of the rank's blocks


def _update(c, held, muon, ranks):
    """Bytes that Muon takes beside gradients: what Newton-Schulz will see of this rank's rows, and of the matrices of
    one shape that it owns four copies, on their way or in the five steps."""
    shapes = collections.Counter()
    for name, shape in held.shapes.items():
        if rows := held.routes[name].rows:
            shapes[rows, shape[-1]] += shape.numel()
    batch = min(BATCH_ELEMENTS, max(shapes.values(), default=0) / ranks)
    return int(c.wire_bytes() * (muon + 4 * batch)) if muon else 0


# ----------------------------------------------------------------------------- what a forward keeps

def _triton(device):
    return device.type == "cuda" and backend.running_now()


def _operator(device, itemsize):
    """Whether one operator has all of the experts."""
    return _triton(device) or device.type == "cpu" and itemsize == 4


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
    operator = _operator(device, s)
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
        rows = (2 * F if operator else 4 * F + 2 * D) * s + 40
        token += K * rows + 4 * c.n_routed_experts + mlp(F * c.n_shared_experts)
        token += 4 * D if s < 4 and not fused else 0  # the router's input in fp32
    else:
        token += mlp(c.intermediate_size)
    scores = 0
    if device.type != "cuda":  # the twin keeps the softmax of every chunk of queries, in fp32 and rounded
        ends = (min(start + QUERY_CHUNK, T) for start in range(0, T, QUERY_CHUNK))
        scores = sum((end - (end - 1) // QUERY_CHUNK * QUERY_CHUNK) * end for end in ends) * H * (4 + s * (s < 4))
    return token * T + scores
