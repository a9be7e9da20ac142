"""MuonClip: Muon for matrices, AdamW for the rest in the same class, QK-clip, and the learning-rate schedule.

Muon (Keller Jordan, 2024) replaces the momentum of a matrix by its nearest semi-orthogonal matrix; the update is
scaled to AdamW's typical size, 0.2 * sqrt(max(rows, cols)) (Moonlight, arXiv 2502.16982, section 2.2), so that both
halves share a learning rate. QK-clip rescales the attention heads whose logits grew too large (Kimi K2, arXiv
2507.20534, section 2.1).

A parameter of several logical matrices (experts, gate above up, heads; routes.py says which) is orthogonalised matrix
by matrix, batched over everything of the same shape.
An expert without tokens keeps moving along its decaying momentum: Newton-Schulz has no sense of scale. For the same
reason rounding noise must not get into the momentum: it would move a matrix as far as any gradient (NOISE).

Over many ranks every rank keeps the momentum of its own rows; the rows of a matrix meet at its owner (owners.py), which
orthogonalises it and sends the update back, in buckets that travel while others are computed. One rank is the same code
with nothing to send.
Next: routes.py, owners.py, kernels/newton_schulz.py.
"""

import collections
import functools
import itertools
import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kernels import momentum
from kernels.newton_schulz import newton_schulz, newton_schulz_replayed
from owners import BUCKET_ELEMENTS, Job, Stack, make_plan
from routes import route_parameters

# A matrix whose gradient's root mean square is below this share of that over all of Muon's matrices has no gradient but
# rounding noise, and counts as having none. Measured on configs/debug.py, 16 to 128 experts, 1 to 16 sequences a step:
# where the exact gradient is zero (the router of a model with one expert a token, normalised) rounding leaves 1e-10 to
# 2e-8; the smallest true ones, of experts that saw a token or two, have 7e-4.
NOISE = 1e-6


@functools.cache
def _offset(shape, mesh, placements):
    return compute_local_shape_and_global_offset(shape, mesh, placements)[1]


def local_rows(tensor):
    """(this rank's rows of a tensor, the index of the first): all of it and 0 if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    offset = _offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert not any(offset[1:]), f"sharded along other dimensions than rows: {tensor.placements}"
    return tensor.to_local(), offset[0]


# ----------------------------------------------------------------------------- the optimizer

class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer.

    named_parameters: (name, parameter) pairs; DTensors sharded by rows make it distributed, and then every rank must
    call it alike. lr: Muon's rate; adamw_lr: None means lr. momentum: fp32 moving average, nesterov: look ahead by it.
    weight_decay: decoupled, p *= 1 - lr * weight_decay, for every parameter. ns_dtype: compute type of Newton-Schulz,
    None for fp32. routes: from route_parameters, None for its defaults. exchange: "owners", or its slow twin
    "all_gather", in which every rank orthogonalises everything. group: of the ranks that hold parts of these
    parameters, None: all. across: of the ranks whose optimizers together have the parameters of one model, None: this
    one has them all.
    A parameter without a gradient is treated as having a zero one, and so is a matrix with nothing but rounding noise.
    State is made here, not in the first step.
    """

    def __init__(self, named_parameters, lr=2e-3, adamw_lr=None, momentum=0.95, nesterov=True, weight_decay=0.1,
                 ns_steps=5, ns_dtype=None, ns_coefficients="jordan", betas=(0.9, 0.95), eps=1e-8, routes=None,
                 exchange="owners", bucket_elements=BUCKET_ELEMENTS, group=None, across=None):
        named = list(named_parameters)
        self.group, self.across = group, across
        routes = routes or route_parameters(named)
        peaks = {"muon": lr, "adamw": lr if adamw_lr is None else adamw_lr}
        members = {}
        for name, p in named:
            members.setdefault((routes[name].optimizer, routes[name].multiplier), []).append((name, p))
        groups = [{"kind": kind, "lr": peaks[kind] * multiplier, "weight_decay": weight_decay, "step": 0,
                   "params": [p for _, p in members[kind, multiplier]],
                   "names": [name for name, _ in members[kind, multiplier]]}
                  for kind, multiplier in sorted(members, key=lambda key: (key[0] != "muon", key[1] != 1, key[1]))]
        super().__init__(groups, {})  # Muon's first, and of those the one with the plain rate
        self.momentum, self.nesterov, self.betas, self.eps = momentum, nesterov, betas, eps
        self.ns_options = {"steps": ns_steps, "dtype": ns_dtype, "coefficients": ns_coefficients}
        # Rows travel as Newton-Schulz will see them; fp16 could not hold the momentum before its normalisation.
        self.wire_dtype = torch.bfloat16 if ns_dtype == torch.bfloat16 else torch.float32
        self.exchange = exchange
        self.orthogonalise = newton_schulz_replayed  # whoever captures all of update() takes newton_schulz instead
        self.traffic = {"collectives": 0, "bytes": 0}  # what this rank's exchanges have sent so far
        device = self.param_groups[0]["params"][0].device
        number = lambda: torch.zeros((), device=device)
        self.rates, self.count = [number() for _ in groups] if device.type == "cuda" else [], number()
        for group in self.param_groups:
            for p in group["params"]:
                keys = ("momentum",) if group["kind"] == "muon" else ("exp_avg", "exp_avg_sq")
                self.state[p] = {key: torch.zeros_like(p, dtype=torch.float32) for key in keys}
        # Muon's parameters of all groups, one a stack of the plan, and the group of each.
        named = [(name, p, at) for at, group in enumerate(self.param_groups) if group["kind"] == "muon"
                 for name, p in zip(group["names"], group["params"])]
        self.matrices, self.group_of = [p for _, p, _ in named], [at for _, _, at in named]
        if named:
            self._make_plan([name for name, _, _ in named], routes, bucket_elements)

    def _make_plan(self, names, routes, bucket_elements):
        """Agree with the other ranks on who owns what: self.plan, and self.jobs, this rank's part of it."""
        self.stacks, self.first_rows, held = [], [], []
        for name, p in zip(names, self.matrices):
            rows, columns = routes[name].rows, p.shape[-1]
            part, first = local_rows(p)
            per_index = p.shape[1:-1].numel()  # rows under one index of the first dimension
            self.first_rows.append(first * per_index)
            held.append((first * per_index, first * per_index + part.numel() // columns))
            pinned = isinstance(p, DTensor) and "ep" in (p.device_mesh.mesh_dim_names or ())
            self.stacks.append(Stack(name, p.numel() // (rows * columns), rows, columns, pinned))
        sharded = any(isinstance(p, DTensor) for p in self.matrices)
        self.rank, everyone = (dist.get_rank(self.group), _from_all_ranks(held, self.group)) if sharded else (0, [held])
        self._number_matrices(held, everyone, self.matrices[0].device)
        self.plan = make_plan(self.stacks, everyone, bucket_elements)
        if sharded and len(set(_from_all_ranks(self.plan.digest(), self.group))) > 1:
            raise RuntimeError("the ranks disagree about the parameters: do all run the same code and settings?")
        local = [Job(batch, self.plan, self.rank) for batch in self.plan.local_batches(self.rank)]
        self.buckets = [Job(bucket, self.plan, self.rank) for bucket in self.plan.buckets]
        turns = itertools.zip_longest(local, self.buckets)  # something to compute while a bucket travels
        self.jobs = [job for turn in turns for job in turn if job is not None]

    def _number_matrices(self, held, everyone, device):
        """For _sum_by_matrix: which logical matrices of all stacks have rows here, how many, and on how many ranks."""
        starts = list(itertools.accumulate((stack.count for stack in self.stacks), initial=0))
        pieces = []
        for stack, start, (low, high), others in zip(self.stacks, starts, held, zip(*everyone)):
            for matrix in range(low // stack.rows, -(-high // stack.rows) if high > low else 0):
                rows = min(high, (matrix + 1) * stack.rows) - max(low, matrix * stack.rows)
                pieces.append((start + matrix, rows, others.count((low, high))))
        pieces = torch.tensor(pieces, dtype=torch.int64, device=device).view(-1, 3)
        self.matrix_P, self.rows_P, self.copies_P = pieces.unbind(1)
        sizes = [size for stack in self.stacks for size in [stack.size] * stack.count]
        self.sizes_M = torch.tensor(sizes, dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin_step()
        self.update()
        return loss

    def begin_step(self):
        """Count the step, and bring the device what it needs of the host: the rates and the count."""
        for group in self.param_groups:
            group["step"] += 1
        for rate, group in zip(self.rates, self.param_groups):
            rate.fill_(group["lr"])
            self.count.fill_(group["step"])

    @torch.no_grad()
    def update(self):
        """The rest of the step; on one CUDA device it asks the host for nothing, so that a graph can replay it."""
        rates = self.rates or [group["lr"] for group in self.param_groups]
        if self.matrices:
            self._muon(*_parts_and_grads(self.matrices), rates)
        for group, rate in zip(self.param_groups, rates):
            if group["kind"] == "adamw":
                self._adamw(group, *_parts_and_grads(group["params"]), rate)

    def _muon(self, params, grads, rates):
        momenta = [local_rows(self.state[p]["momentum"])[0] for p in self.matrices]
        directions = momentum.directions(momenta, grads, self._noise(grads), self.momentum, self.nesterov,
                                         self.wire_dtype)
        params = [p.view(-1, p.shape[-1]) for p in params]

        def update(stack, low, high, rows):
            """Decay rows low..high of a parameter and move them along `rows`, their part of the orthogonal one."""
            first, scale = self.first_rows[stack], 0.2 * math.sqrt(max(self.stacks[stack].shape))
            momentum.update_(params[stack][low - first:high - first], rows, rates[self.group_of[stack]],
                             self.param_groups[self.group_of[stack]]["weight_decay"], scale)
        (self._by_owners if self.exchange == "owners" else self._by_all)(directions, update)

    def _noise(self, grads):
        """Per gradient the rows (bool) of matrices that have no gradient but rounding noise (NOISE)."""
        sums_M = self._sum_by_matrix(torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten().square() for g in grads]))
        total, size = whole = torch.stack((sums_M.sum(), self.sizes_M.sum()))
        if self.across is not None:
            dist.all_reduce(whole, group=self.across)
        return self._rows_of(sums_M < NOISE**2 * self.sizes_M * (total / size))

    def _sum_by_matrix(self, values):
        """(M,): the sums of a value for every row here over the M matrices of all ranks. P pieces of matrices are here;
        one that is on several ranks counts once."""
        sums_M = torch.zeros_like(self.sizes_M)
        sums_M[self.matrix_P] = torch.segment_reduce(values, "sum", lengths=self.rows_P, unsafe=True) / self.copies_P
        if self.plan.ranks > 1:
            dist.all_reduce(sums_M, group=self.group)
        return sums_M

    def _rows_of(self, values_M):
        """Of every parameter (R,): a matrix's value for each of its rows here."""
        counts = [local_rows(p)[0].shape[:-1].numel() for p in self.matrices]
        return values_M[self.matrix_P].repeat_interleave(self.rows_P, output_size=sum(counts)).split(counts)

    def _by_all(self, directions, update):
        """The slow twin: every rank gathers and orthogonalises everything, parameter by parameter."""
        for stack, p in enumerate(self.matrices):
            whole = directions[stack]
            if isinstance(p, DTensor):
                part = whole.view(p.to_local().shape)
                whole = DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                whole = whole.full_tensor()
            whole = newton_schulz(whole.view(-1, *self.stacks[stack].shape), **self.ns_options)
            low, high = self.first_rows[stack], self.first_rows[stack] + len(directions[stack])
            update(stack, low, high, whole.reshape(-1, p.shape[-1])[low:high])

    def _by_owners(self, directions, update):
        """Bring the rows of every matrix to its owner, orthogonalise there, bring them back for update(stack, low,
        high, rows)."""
        def direction(move):
            first = self.first_rows[move.item.stack]
            return directions[move.item.stack][move.low - first:move.high - first]

        def finish(moves, rows):
            for move, update_rows in zip(moves, rows):
                update(move.item.stack, move.low, move.high, update_rows)

        # Local jobs differ from rank to rank, so only those that travel may decide about the order of departures.
        coming, under_way, last = collections.deque(self.buckets), collections.deque(), None
        for job in self.jobs:
            while coming and len(under_way) < 2:
                under_way.append(self._depart(coming.popleft().inward, direction))
            matrices = {shape: torch.empty(rows, shape[1], dtype=self.wire_dtype, device=directions[0].device)
                        for shape, rows in job.rows.items()}
            arrived = under_way.popleft()() if job.travels else []
            sources = [direction(move) for move in job.inward.stays] + arrived
            if sources:
                torch._foreach_copy_([job.part(matrices, move) for move in job.inward.stays + job.inward.receives],
                                     sources)
            updates = {shape: self.orthogonalise(stacked.view(-1, *shape), **self.ns_options).to(self.wire_dtype)
                       .reshape(-1, shape[1]) for shape, stacked in matrices.items()}
            going = self._depart(job.outward, lambda move, job=job, updates=updates: job.part(updates, move))
            finish(job.outward.stays, [job.part(updates, move) for move in job.outward.stays])
            if last:
                finish(last[0], last[1]())
            last = job.outward.receives, going
        if last:
            finish(last[0], last[1]())

    def _depart(self, trip, rows_of):
        """Start a trip; returns a function that waits for its end and gives the received rows, one tensor a move."""
        if not trip.collective:
            return list
        rows = [rows_of(move).reshape(-1) for move in trip.sends]
        device = self.param_groups[0]["params"][0].device
        sent = torch.cat(rows) if rows else torch.empty(0, dtype=self.wire_dtype, device=device)
        received = torch.empty(sum(trip.receive_splits), dtype=self.wire_dtype, device=device)
        work = dist.all_to_all_single(received, sent, trip.receive_splits, trip.send_splits, group=self.group,
                                      async_op=True)
        self.traffic["collectives"] += 1
        self.traffic["bytes"] += sent.numel() * sent.element_size()

        def arrive(sent=sent):  # which has to live until it has left
            work.wait()
            return [rows.view(-1, columns) for rows, columns in
                    zip(received.split(trip.receive_sizes), trip.receive_columns)]
        return arrive

    def _adamw(self, group, params, grads, rate):
        beta1, beta2 = self.betas
        averages, squares = ([local_rows(self.state[p][key])[0] for p in group["params"]]
                             for key in ("exp_avg", "exp_avg_sq"))
        if self.rates:  # on CUDA PyTorch has it in one pass
            here = [tensors for tensors in zip(params, grads, averages, squares) if tensors[0].numel()]
            if here:
                torch._fused_adamw_(*map(list, zip(*here)), [], [self.count] * len(here), lr=rate, beta1=beta1,
                                    beta2=beta2, weight_decay=group["weight_decay"], eps=self.eps, amsgrad=False,
                                    maximize=False)
            return
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2 ** group["step"]))
        torch._foreach_add_(denominators, self.eps)
        torch._foreach_addcdiv_(params, averages, denominators, -rate / (1 - beta1 ** group["step"]))

    def expected_traffic(self):
        """What the plan predicts that one step adds to `traffic`."""
        collectives, sent = self.plan.traffic(self.rank, self.wire_dtype.itemsize)
        return {"collectives": collectives, "bytes": sent}

    def named_state(self):
        """{"<parameter name>.<key>": tensor}, the tensors that a checkpoint keeps beside the step count."""
        return {f"{name}.{key}": tensor for group in self.param_groups
                for name, p in zip(group["names"], group["params"]) for key, tensor in self.state[p].items()}

    @property
    def steps(self):
        """Updates done so far; AdamW's bias correction depends on it."""
        return self.param_groups[0]["step"]

    @steps.setter
    def steps(self, value):
        for group in self.param_groups:
            group["step"] = value


def _parts_and_grads(parameters):
    """This rank's rows of every parameter, and of its gradient in fp32; no gradient is a zero one."""
    parts = [local_rows(p)[0] for p in parameters]
    return parts, [torch.zeros_like(part).float() if p.grad is None else local_rows(p.grad)[0].float()
                   for p, part in zip(parameters, parts)]


def _from_all_ranks(value, group=None):
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@torch.no_grad()
def qk_clip_(layers, max_logits_LH, tau, here=None):
    """Scale down the query and key weights of every head whose largest logit S exceeded tau, by gamma = tau / S, so
    that the same input would now give tau. Run after the optimizer step, with that step's maxima.

    S is signed: large negative logits are harmless. S at or below tau, and a non-finite S, leave the head untouched (a
    factor of exactly 1). No host sync. Returns the number of clipped heads as a tensor. here: the rows of max_logits_LH
    that `layers` are, if they are not all or the first.
    """
    clipped_LH = max_logits_LH.isfinite() & (max_logits_LH > tau)
    gamma_LH = torch.where(clipped_LH, tau / max_logits_LH, torch.ones_like(max_logits_LH))
    for index, layer in zip(itertools.count() if here is None else here, layers):
        for weight, row_factors in layer.self_attn.qk_clip_rows(gamma_LH[index]):
            part, first = local_rows(weight)
            part.mul_(row_factors[first:first + len(part)].to(part.dtype).unsqueeze(1))
    return clipped_LH.sum()


SCHEDULE = ("schedule", "max_steps", "warmup_steps", "decay_steps", "min_lr_ratio")  # settings, in the order of


def schedule_factor(step, kind, max_steps, warmup_steps, decay_steps, min_lr_ratio):
    """The learning rate of step 1, 2, ... max_steps as a factor of the peak. Warm-up is linear, its last step at the
    peak; wsd then holds and falls linearly over the last decay_steps (None: a fifth of all; what is left, if that is
    less), cosine falls all the way; both end at min_lr_ratio.
    """
    decay_steps = max_steps // 5 if decay_steps is None else decay_steps
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    start = max(max_steps - decay_steps, warmup_steps) if kind == "wsd" else warmup_steps
    progress = min(max((step - start) / max(max_steps - start, 1), 0.0), 1.0)
    fall = progress if kind == "wsd" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - min_lr_ratio) * fall
