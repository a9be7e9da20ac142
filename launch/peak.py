"""The memory of one rank of many at the fullest moment of a step, by arithmetic: what it holds all the time, and the
largest of what comes and goes. FSDP2 gathers weights for a block at a time, or with stages once for all of them.

What blocks keep for their backward is run/memory.py's count; one process alone is that file's own sum. On a CPU
tests/test_plan.py holds this against what PyTorch's allocator counted on gloo ranks. Next: costs.py.

Shapes: N tokens of a forward, M of them and of other ranks that have experts here, K choices a token, S = N K rows, D
model width, F expert width, V vocabulary, P ranks of an expert group.
"""

import collections
import dataclasses

from kernels.attention import QUERY_CHUNK
from kernels.loop_experts import GROUP
from owners import BATCH_ELEMENTS
from run import memory


def parts(costs, layout, size, forwards):
    """{what: bytes} of rank 0 at the peak of a step of `forwards` forwards of `size` sequences, or of the first rank of
    the stage that costs are of."""
    c, device, s, local = costs.config, costs.device, costs.dtype.itemsize, costs.local(layout)
    total = sum(local.values())
    muon = sum(n for name, n in local.items() if costs.routes[name].optimizer == "muon")
    always = {"parameters": 4 * total, "optimizer": 4 * (2 * total - muon)}
    always["average"] = 4 * total * bool(c.ema)
    always["copy for a save"] = sum(always.values()) if c.async_save and device.type == "cpu" else 0
    always["libraries"] = memory.PYTORCH

    ends, blocks, own = gathered(costs, layout.ep)
    head = c.vocab_size * c.hidden_size * costs.has_head
    kept, again, working = activations(costs, layout, size)
    most = (8 if s == 4 else 12) * size * c.sequence_length * c.vocab_size  # if one chunk is all
    logits = min(memory._logits(c, costs.dtype, device, size), most) if costs.has_head else 0
    if layout.pp > 1:  # PipelineStage has room for what comes in of every micro-batch, from both sides
        comes = s * size * c.sequence_length * c.hidden_size * c.stages_a_rank()
        kept = int(kept * in_flight(c, costs.place, forwards))
        always["stages' inputs"] = forwards * comes * ((costs.place > 0) + (costs.place < c.pp - 1))
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
    updating = {"gradients": 4 * total, "update": max(_update(costs, muon, ranks), 4 * (total - muon))}
    return always | max((losing, computing, reducing, updating), key=lambda phase: sum(phase.values()))


def gathered(costs, ep):
    """Elements that a rank gathers (of the ends, [of every block], of a block at most without experts that have ranks
    of their own)."""
    blocks, experts = collections.Counter(), collections.Counter()
    for name, shape in costs.shapes.items():
        unit, spread = name.split(".")[2] if ".layers." in name else "ends", ".experts." in name and ep > 1
        blocks[unit] += shape.numel() // (ep if spread else 1)
        experts[unit] += shape.numel() // ep if spread else 0
    ends = blocks.pop("ends", 0)
    return ends, list(blocks.values()), max(n - experts[unit] for unit, n in blocks.items())


def activations(costs, layout, size):
    """Bytes (that all blocks keep for the backward, that the one at hand makes again of them, that its backward takes
    beside both)."""
    c, device, s, D = costs.config, costs.device, costs.dtype.itemsize, costs.config.hidden_size
    N, alone = size * c.sequence_length, dataclasses.replace(c, ep=1)
    M, S = (N * (1 + costs.sent_rows(layout.ep)) if layout.ep > 1 else 0), N * c.num_experts_per_tok
    operator = memory._triton(device) or device.type == "cpu" and s == 4  # as in memory.block_bytes
    # What came from other ranks is kept by the operator; the twins keep rows of every choice instead, not widened.
    came = M * (8 * c.num_experts_per_tok + (s * D if operator else 0)) - (4 - s) * D * S * (M > 0 and not operator)
    blocks = [size * memory.block_bytes(alone, costs.dtype, device, moe) + moe * came for moe in costs.kinds]
    ends = N * (4 + 2 * s) * D * (1 + 3 * c.mtp_depth) * costs.has_head  # as in memory.activations
    share = {"none": 1.0, "selective": 0.6}.get(c.activation_checkpointing)
    kept = share * sum(blocks) if share else N * s * D * len(blocks)
    again = 0 if share == 1 else (1 - (share or 0)) * max(blocks)
    working = max(blocks) / 4
    if device.type == "cpu":
        working = _working_on_a_cpu(c, operator, s, size, N, M or N, S if any(costs.kinds) else 0)
    return int(ends + kept), int(again), int(working)


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
    if c.pp_schedule == "zero_bubble":  # where fewer are on their way, what the weights' gradients want waits for more
        return min(forwards, c.pp)
    after, rounds = c.pp - 1 - place, c.stages_a_rank()
    if rounds == 1:  # arXiv 2104.04473, section 2.2: every stage behind this one has one more
        return min(forwards, after + 1)
    return min(forwards, ((rounds - 1) * c.pp + 2 * after + 1) / rounds)  # each has a part of the rank's blocks


def _update(costs, muon, ranks):
    """Bytes that Muon takes beside gradients: what Newton-Schulz will see of this rank's rows, and of the matrices of
    one shape that it owns four copies, on their way or in the five steps."""
    shapes = collections.Counter()
    for name, number in costs.alike.items():
        if rows := costs.routes[name].rows:
            shapes[rows, costs.shapes[name][-1]] += number * costs.shapes[name].numel()
    batch = min(BATCH_ELEMENTS, max(shapes.values(), default=0) / ranks)
    return int(costs.wire * (muon + 4 * batch)) if muon else 0
