"""What a training step of a config costs on a layout of many GPUs, by arithmetic: memory of a rank, bytes between ranks
by kind, seconds by part.

Memory is run/peak.py's sum and FLOPs are counting.py's; what travels is counted here, as
ranks/ and owners.py send it. rehearse.py counts the same on the real model. Rates are of one H100 that ran
configs/small.py (bench/results/2026-11-27-h100.md); links and other GPUs were never measured here, and GPUS says whence
they are.

Shapes: N tokens of a forward, K choices a token, D model width, P ranks of a group, E experts. Next: plan.py.
"""

import collections
import copy
import dataclasses
from dataclasses import dataclass

import torch

from counting import flops_by_layer, flops_by_part, part_of
from kernels import backend
from model import K2
from owners import ROOM
from ranks.parallel import Layout, check_layout
from ranks.pipeline import BUBBLE, spans
from routes import routes_of
from run import peak
from run.metrics import PEAK_FLOPS

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: what it reaches, in FLOP/s and bytes/s; links are those of one GPU in one direction."""
    peak: float     # of the datasheet, of which MFU is a share
    matmul: float   # a large bf16 product
    copy: float     # read and written
    memory: float   # bytes
    nvlink: float
    network: float
    source: str


def _unmeasured(peak, copy, gib, nvlink, network):
    """From a datasheet, with the shares of it that the H100 reached."""
    return Gpu(peak, 0.80 * peak, 0.90 * copy, gib * GIB, LINK * nvlink, LINK * network, "datasheet x the H100's")


LINK = 0.8  # of a link's datasheet that NCCL's large messages reach: assumed, no second GPU was ever at hand
GPUS = {
    "h100": Gpu(PEAK_FLOPS["H100"], 789e12, 3.01e12, 79.1 * GIB, LINK * 450e9, LINK * 50e9, "measured, links assumed"),
    "h200": Gpu(PEAK_FLOPS["H200"], 788e12, 4.3e12, 139.8 * GIB, LINK * 450e9, LINK * 50e9, "measured, links assumed"),
    "h800": Gpu(PEAK_FLOPS["H800"], 789e12, 3.01e12, 79.1 * GIB, LINK * 200e9, LINK * 50e9, "as h100, links assumed"),
    "a100": _unmeasured(PEAK_FLOPS["A100"], 2.04e12, 79.1, 300e9, 25e9),
    "b200": _unmeasured(PEAK_FLOPS["B200"], 8.0e12, 178.0, 900e9, 50e9),
    "gb200": _unmeasured(PEAK_FLOPS["GB200"], 8.0e12, 184.0, 900e9, 50e9),
    "l40s": _unmeasured(PEAK_FLOPS["L40S"], 0.864e12, 44.4, 32e9, 25e9),  # PCIe
    "rtx4090": _unmeasured(PEAK_FLOPS["RTX 4090"], 1.008e12, 23.5, 32e9, 25e9),
    "rtx3090": _unmeasured(PEAK_FLOPS["RTX 3090"], 0.936e12, 23.5, 32e9, 25e9),
}

# Shares of Gpu.matmul and Gpu.copy that parts reach; a part takes the longer of its arithmetic and its bytes.
# From a micro-batch of small, 76.3 ms (experts 26.4, matmul 23.7, attention 10.3, copies 7.4, loss 3.1, others 3.3),
# and the experts' kernels at moonlight's widths, 328 to 518 TFLOP/s.
MATMUL, EXPERTS, EXPERT_BYTES = 0.79, 0.50, 0.60
ATTENTION, HALF_LENGTH = 0.53, 620  # x T / (T + 620): 0.33 measured at 1024, 0.42 and 0.48 published at 2048 and 4096
STREAMS, LOGIT = 53, 5.6  # passes over (N, D) in bf16 a block: norms, residuals, casts, routing; bytes a logit
NS, HALF_SIDE = 0.60, 480  # Newton-Schulz, x s / (s + 480) for a shorter side s: 0.21 measured at 256
MUON_BYTES, ADAMW_BYTES = 48, 62  # an updated parameter, clipping included: small, its dense twin and gpt
BLOCK_WAIT, BLOCK_PYTHON = 1.55e-3, 6.6e-3  # of a block and micro-batch without CUDA graphs: the GPU waits, Python runs
BUSIEST = 1.1  # the busiest rank's rows over the mean, with experts on other ranks: assumed
CONTEXT, PIECES = 1.5 * GIB, 1.085  # of CUDA and its libraries; reserved over allocated: 18.9 over 17.4 GiB
HOST_COPY, CHECKSUM, DISK = 10e9, 1e9, 2e9  # bytes/s of a rank into host memory, of CRC32, of a node's writing: assumed


# ----------------------------------------------------------------------------- who holds what

def share(length, parts, index):
    """(low, high) of part `index` of `length` rows, as FSDP2 and torch.chunk cut them: the last parts may be empty."""
    size = -(-length // parts)
    return min(size * index, length), min(size * (index + 1), length)


def rows_on(name, shape, layout, rank):
    """(low, high): which indices of a parameter's first dimension a rank holds."""
    index = rank % layout.dp_shard
    if ".experts." not in name or layout.ep == 1:
        return share(shape[0], layout.dp_shard, index)
    shard, place = divmod(index, layout.ep)
    here = shape[0] // layout.ep
    low, high = share(here, layout.dp_shard // layout.ep, shard)
    return place * here + low, place * here + high


class Costs:
    """A config on a kind of GPU. The methods take what may be chosen: a layout of n ranks (of a stage, if there are
    several), sequences of a forward."""

    def __init__(self, config, gpu=GPUS["h100"], per_node=8, device="cuda", disk=DISK):
        self.config, self.gpu, self.per_node, self.device = config, gpu, per_node, torch.device(device)
        self.disk = disk
        with torch.device("meta"):
            self.model = K2(config)
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.alike = alike(self.shapes, config.num_hidden_layers)
        self.routes = routes_of(config, self.model)
        self.flops = flops_by_part(config, config.sequence_length, self.model)
        self.kinds = [config.is_moe_layer(index) for index in range(len(self.model.layers))]  # whether with experts
        self.parameters = sum(shape.numel() for shape in self.shapes.values())
        self.place, self.has_head = 0, True
        self.reduced = getattr(torch, config.reduce_dtype).itemsize  # bytes of a gradient that travels
        self.layer_flops, self.cuts = flops_by_layer(config, config.sequence_length), {}

    def of(self, **settings):
        """The same with other settings of the run; those of the model stay."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **settings)
        return other

    def stages(self):
        """stage() of those that may decide: the first, the last and the one with the most parameters."""
        every = [self.stage(place) for place in range(self.config.pp)]
        most = max(range(len(every)), key=lambda place: every[place].parameters)
        return [every[place] for place in sorted({0, most, len(every) - 1})]

    def stage(self, place):
        """Costs of what the ranks at one place of the pipeline have, its blocks and its ends. Without one of all."""
        c = self.config
        if c.pp == 1:
            return self
        if (key := (c.pp, c.stages_a_rank())) not in self.cuts:
            cuts = spans(self.layer_flops, c.pp * c.stages_a_rank())
            self.cuts[key] = [self._part(place, [index for span in cuts[place::c.pp] for index in span])
                              for place in range(c.pp)]
        other = copy.copy(self)
        vars(other).update(self.cuts[key][place])
        return other

    def _part(self, place, layers):
        """What stage() has in place of what all have."""
        here = lambda name: int(name.split(".")[2]) in layers if ".layers." in name else \
            place == (0 if "embed_tokens" in name else self.config.pp - 1)
        shapes = {name: shape for name, shape in self.shapes.items() if here(name)}
        whole, mine = elements_by(part_of, self.shapes), elements_by(part_of, shapes)
        share = {part: mine[part] / n for part, n in whole.items()} | {"attention": len(layers) / len(self.kinds)}
        return {"shapes": shapes, "alike": alike(shapes, self.config.num_hidden_layers), "parameters": mine.total(),
                "flops": {part: flops * share[part] for part, flops in self.flops.items()},
                "kinds": [self.kinds[index] for index in layers], "place": place,
                "has_head": place == self.config.pp - 1}

    # ------------------------------------------------------------------------- memory

    def local(self, layout, rank=0):
        """{name: elements on a rank of it and of those that are alike}; rank 0 has the most."""
        def count(name, number):
            low, high = rows_on(name, self.shapes[name], layout, rank)
            return number * (high - low) * self.shapes[name][1:].numel()
        return {name: count(name, number) for name, number in self.alike.items()}

    def held(self, layout, rank):
        """[(low, high)]: the rows of every matrix of Muon on a rank, as owners.make_plan takes them."""
        rows = ((rows_on(name, shape, layout, rank), shape[1:-1].numel()) for name, shape in self.shapes.items()
                if self.routes[name].optimizer == "muon")
        return [(low * per_index, high * per_index) for (low, high), per_index in rows]

    def memory(self, layout, n, size, forwards):
        """{what: bytes} of rank 0 at the peak of a step."""
        held = peak.Held(self.shapes, self.local(layout), self.routes, self.kinds, self.place, self.has_head)
        with backend.running(self.device.type == "cuda"):
            parts = peak.parts(self.config, held, layout, self.device, size, forwards)
        return {what: n for what, n in parts.items() if n}

    def save(self, memory, n):
        """What an asynchronous save takes: {"copied", "written": bytes of a rank, "waiting", "writing": seconds}. All
        ranks copy what they hold, the step waits for that; of replicas one writes. memory: of a
        rank; n: ranks in all."""
        copied = sum(memory.get(what, 0) for what in ("parameters", "optimizer", "average"))
        muon = elements_by(lambda name: self.routes[name].optimizer, self.shapes)["muon"]
        written = 4 * (3 * self.parameters - muon + self.parameters * bool(self.config.ema)) / n
        return {"copied": copied, "written": written, "waiting": copied / HOST_COPY,
                "writing": written * (min(n, self.per_node) / self.disk + 1 / CHECKSUM)}

    def fits(self, needed):
        """Whether the peak of so many bytes fits beside CUDA's own and what the allocator cannot use."""
        return PIECES * needed + CONTEXT <= self.gpu.memory

    # ------------------------------------------------------------------------- bytes

    def traffic(self, layout, n, size, forwards):
        """[Exchange] of a step of `forwards` forwards of `size` sequences."""
        c, S, R, ep = self.config, layout.dp_shard, layout.dp_replicate, layout.ep
        recomputes = c.activation_checkpointing != "none"
        wide, found = getattr(torch, c.dtype).itemsize, []
        times = forwards if c.pp == 1 else 1  # stages keep what they gathered, and add up gradients, till the last one
        held = self.local(layout)  # by rank 0: FSDP2 pads all parts to the first one's size
        for unit, ranks, stride in (("ends", S, 1), ("block", S, 1), ("experts", S // ep, ep)):
            elements = sum(n for name, n in held.items() if kind(name, ep) == unit)
            gathered = wide * (elements if unit == "ends" or c.pp > 1 else 2 * elements)
            found.append(Exchange("weights", "all_gather", ranks, stride, times * gathered * (ranks - 1)))
            found.append(Exchange("gradients", "reduce_scatter", ranks, stride,
                                  times * self.reduced * elements * (ranks - 1)))
            found.append(Exchange("gradients", "all_reduce", R, S, 2 * self.reduced * elements * (R - 1) / R))
        tokens, D, K = size * c.sequence_length, c.hidden_size, c.num_experts_per_tok
        sent = forwards * sum(self.kinds) * tokens * peak.sent_rows(c, ep)  # rows of one trip of every layer
        trips = 3 if recomputes else 2  # with the backward's; a row comes home too
        sizes = forwards * sum(self.kinds) * (trips - 1) * 16 * (ep - 1)
        found.append(Exchange("expert rows", "all_to_all", ep, 1, sent * trips * (2 * D * wide + 2 * K * 4) + sizes))
        if c.pp > 1:  # every stage but the last sends on what it made, all but the first send its gradient back
            borders = 2 * (c.pp * c.stages_a_rank() - 1) / c.pp
            found.append(Exchange("stages", "send", 2, n, forwards * borders * tokens * D * wide))
        found.append(Exchange("Muon", "all_to_all", n, 1, c.wire_bytes() * self.muon_elements(layout, n)))
        matrices = sum(number * self.shapes[name].numel() // (self.routes[name].rows * self.shapes[name][-1])
                       for name, number in self.alike.items() if self.routes[name].optimizer == "muon")
        small = 4 * (6 + 2 * c.mtp_depth) + 4 * (c.num_hidden_layers + c.mtp_depth) * c.num_attention_heads
        small += 8 * sum(total.numel() for total in self.model.routing.buffers() if total.dim())
        for numbers, ranks, stride in ((small, n * c.pp, 1), (4 * matrices, n, 1), (8, c.pp, n)):
            found.append(Exchange("statistics", "all_reduce", ranks, stride, 2 * numbers * (ranks - 1) / ranks))
        return [exchange for exchange in found if exchange.sent]

    def muon_elements(self, layout, n):
        """Elements that a rank sends for Newton-Schulz on average: to a matrix's owner, and from it to all that hold
        rows of it. See owners.make_plan, whose balance by work is left out here but for experts that few ranks hold."""
        S, R, total = layout.dp_shard, layout.dp_replicate, 0.0
        for name, number in self.alike.items():
            if self.routes[name].optimizer != "muon":
                continue
            shape = self.shapes[name]
            elsewhere = 1 + R - 2 / S  # an owner chosen among all gets what it lacks, and the holders get it back
            if ".experts." in name and layout.ep > 1:
                elsewhere = R - 1  # the owner is one that holds it
            elif R == 1:
                rows, held, per_index = self.routes[name].rows, rows_on(name, shape, layout, 0)[1], shape[1:-1].numel()
                count, piece, holders = shape[0] * per_index // rows, held * per_index, -(-shape[0] // held)
                whole = sum(m * rows // piece == ((m + 1) * rows - 1) // piece for m in range(count)) / count
                elsewhere *= 1 - whole * min(1.0, ROOM * holders / n)  # those stay
            total += number * shape.numel() * elsewhere
        return total / n

    # ------------------------------------------------------------------------- seconds

    def links(self, exchanges):
        """{(kind, "NVLink" or "network"): bytes that a rank sends over it in a step}. A ring enters a node once and
        shares that among the node's ranks; an all-to-all sends every row by itself."""
        found = {}
        for e in exchanges:
            near = max(1, min(e.ranks, self.per_node // e.stride))  # ranks of the group on a node
            nodes = -(-e.ranks // near)
            if e.operation == "all_to_all":
                outside = e.sent * (e.ranks - near) / max(e.ranks - 1, 1)
                inside = e.sent - outside
            else:
                outside = e.sent * e.ranks / (e.ranks - 1) * (nodes - 1) / nodes / near
                inside = e.sent if near > 1 else 0
            for link, n in (("NVLink", inside), ("network", outside)):
                if n:
                    found[e.kind, link] = found.get((e.kind, link), 0) + n
        return found

    def arithmetic(self, layout, size):
        """{part: seconds} of one micro-batch's forward and backward on the device."""
        c, gpu = self.config, self.gpu
        N, D, F, K, T = (size * c.sequence_length, c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok,
                         c.sequence_length)
        again = 4 / 3 if c.activation_checkpointing == "full" else 1
        seconds = {}
        for part, flops in self.flops.items():
            rate = {"attention": ATTENTION * T / (T + HALF_LENGTH), "routed experts": EXPERTS}.get(part, MATMUL)
            seconds[part] = N * flops / (rate * gpu.matmul) * (1 if part == "head" else again)
        if any(self.kinds):
            held = sum(number * self.shapes[name].numel() for name, number in self.alike.items() if ".experts." in name)
            held /= layout.ep
            moved = N * K * sum(self.kinds) * (16 * D + 18 * F) * again + held * (12 if layout.dense is None else 26)
            seconds["routed experts"] = max(seconds["routed experts"], moved / (EXPERT_BYTES * gpu.copy))
            seconds["routed experts"] *= BUSIEST if layout.ep > 1 else 1
        passes = STREAMS * (1 if c.activation_checkpointing == "none" else 4 / 3)
        seconds["pointwise"] = N * (len(self.kinds) * passes * 2 * D) / gpu.copy
        seconds["loss"] = N * c.vocab_size * LOGIT * (1 + c.mtp_depth) * self.has_head / gpu.copy
        return seconds

    def update(self, layout, n):
        """Seconds of the optimizer on the device: Newton-Schulz, spread evenly over ranks, and bytes of its rows."""
        flops = size = 0.0
        for name, number in self.alike.items():
            if rows := self.routes[name].rows:
                shape = self.shapes[name]
                short, long = sorted((rows, shape[-1]))
                matrices = number * shape.numel() / (rows * shape[-1])
                work = self.config.ns_steps * (3 * short**2 * long + short**3) * matrices
                flops += work / (NS * short / (short + HALF_SIDE))
        for name, elements in self.local(layout).items():
            size += elements * (MUON_BYTES if self.routes[name].optimizer == "muon" else ADAMW_BYTES)
        return flops / n / self.gpu.matmul + size / self.gpu.copy

    def step(self, layout, n, size, forwards):
        """{part: seconds} of a step, and what nobody waits for left out; their sum is the step."""
        c, exchanges = self.config, self.traffic(layout, n, size, forwards)
        rate = {"NVLink": self.gpu.nvlink, "network": self.gpu.network}
        busy = {(kind, link): sent / rate[link] for (kind, link), sent in self.links(exchanges).items()}
        parts = {part: forwards * spent for part, spent in self.arithmetic(layout, size).items()}
        rows = sum(spent for (kind, _), spent in busy.items() if kind == "expert rows")
        # The shared expert computes while rows travel; nothing else does.
        parts["expert rows"] = max(0.0, rows - parts.get("shared experts", 0.0))
        if layout.dense is not None:
            parts["waiting for Python"] = forwards * len(self.kinds) * BLOCK_WAIT
            least = forwards * len(self.kinds) * BLOCK_PYTHON
            parts["waiting for Python"] = max(parts["waiting for Python"], least - sum(parts.values()))
        if c.pp > 1:  # arXiv 2104.04473, section 2.2: of the time that is computed, idle on every rank
            parts["idle in the pipeline"] = sum(parts.values()) * (c.pp - 1) / (BUBBLE[c.pp_schedule] * forwards)
        for link in rate:  # the gathers and reductions that computing does not hide
            spent = sum(s for (kind, on), s in busy.items() if on == link and kind in
                        ("weights", "gradients", "expert rows", "stages"))
            parts[f"weights and gradients on {link}"] = max(0.0, spent - sum(parts.values()))
        travel = sum(spent for (kind, _), spent in busy.items() if kind in ("Muon", "statistics"))
        update = self.update(layout, n)
        parts["optimizer"] = update
        parts["Muon's exchange"] = max(0.0, travel - 0.5 * update)
        return parts


@dataclass(frozen=True)
class Exchange:
    """What a rank sends in a step by one kind of collective: over how many ranks, which are `stride` apart."""
    kind: str
    operation: str
    ranks: int
    stride: int
    sent: float


def kind(name, ep):
    """What FSDP2 gathers a parameter with: "ends", its "block", or the "experts" of one, if they have ranks of their
    own."""
    if ".layers." not in name:
        return "ends"
    return "experts" if ep > 1 and ".experts." in name else "block"


def alike(shapes, n_layers):
    """{name: how many parameters are like it in all but the layer, itself included}; blocks that look more than one
    token ahead apart."""
    first, found = {}, collections.Counter()
    for name, shape in shapes.items():
        _, _, rest = name.partition(".layers.")
        layer, _, rest = rest.partition(".")
        found[first.setdefault((rest or name, shape, bool(layer) and int(layer) >= n_layers), name)] += 1
    return found


def elements_by(key, shapes):
    """Counter of key(name): the elements of the parameters of which it is that."""
    found = collections.Counter()
    for name, shape in shapes.items():
        found[key(name)] += shape.numel()
    return found


def layout_of(config, n):
    """The Layout that n ranks would have, checked as they would."""
    replicate, shard, ep = check_layout(config, n)
    return Layout(replicate, shard, ep, dense=n > 1 or None, pp=config.pp)
