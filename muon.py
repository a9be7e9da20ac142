"""MuonClip: Muon for matrices, AdamW for the rest in the same class, QK-clip, and the learning-rate schedule.

Muon (Keller Jordan, 2024) replaces the momentum of a matrix by its nearest semi-orthogonal matrix; the update is
scaled to AdamW's typical size, 0.2 * sqrt(max(rows, cols)) (Moonlight, arXiv 2502.16982, section 2.2), so that both
halves share a learning rate. QK-clip rescales the attention heads whose logits grew too large (Kimi K2, arXiv
2507.20534, section 2.1).

Every parameter is routed by name, exactly once; a name that no route knows is an error. A parameter of several logical
matrices (experts, gate above up, heads) is orthogonalised matrix by matrix, batched over everything of the same shape.
An expert without tokens keeps moving along its decaying momentum: Newton-Schulz has no sense of scale.
Next: kernels/newton_schulz.py.
"""

import math
from dataclasses import dataclass

import torch

from errors import UserError
from kernels.newton_schulz import newton_schulz

NS_BATCH_ELEMENTS = 2**27  # matrices of one shape are stacked up to this many elements: 512 MiB in fp32

# name ending -> (optimizer, how a parameter splits into logical matrices along its rows)
ROUTES = {
    "embed_tokens.weight": ("adamw", None),
    "lm_head.weight": ("adamw", None),
    "norm.weight": ("adamw", None),
    "gate.weight": ("muon", "whole"),
    "experts.gate_up_proj": ("muon", "halves"),
    "experts.down_proj": ("muon", "whole"),
    "q_proj.weight": ("muon", "heads"),
    "q_b_proj.weight": ("muon", "heads"),
    "kv_b_proj.weight": ("muon", "heads"),
    "_proj.weight": ("muon", "whole"),
    "kv_a_proj_with_mqa.weight": ("muon", "whole"),
}


@dataclass(frozen=True)
class Route:
    """Which half of the optimizer owns a parameter; for Muon, the rows of one logical matrix (the parameter is viewed
    as a stack of rows x last-dimension matrices)."""
    optimizer: str
    rows: int | None = None


def route_parameters(named_parameters, optimizer="muon", per_head=0):
    """{name: Route} for every trainable parameter. optimizer="adamw" sends all to AdamW. per_head, if not 0, is the
    number of heads by which q_proj, q_b_proj and kv_b_proj are split; 0 keeps them whole, as in the K2 report."""
    routes = {}
    for name, parameter in named_parameters:
        ending = next((ending for ending in ROUTES if name.endswith(ending)), None)
        if ending is None:
            raise UserError(f"no optimizer route for parameter {name}: add its ending to ROUTES in muon.py")
        owner, split = ROUTES[ending]
        if owner == "adamw" or optimizer == "adamw":
            routes[name] = Route("adamw")
            continue
        parts = {"whole": 1, "halves": 2, "heads": per_head or 1}[split]
        routes[name] = Route("muon", parameter.shape[-2] // parts)
    return routes


def routing_table(named_parameters, routes):
    """The routes as printable lines: parameters of one kind are counted together, layer numbers dropped."""
    kinds = {}
    for name, parameter in named_parameters:
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        route = routes[name]
        matrix = f"{parameter.numel() // (route.rows * parameter.shape[-1])} x ({route.rows}, {parameter.shape[-1]})" \
            if route.rows else "-"
        kinds.setdefault((kind, route.optimizer, matrix), []).append(parameter.numel())
    return [f"  {optimizer:5} {kind:51} {len(sizes):3} x {sizes[0]:>12,}  matrices {matrix}"
            for (kind, optimizer, matrix), sizes in kinds.items()]


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer.

    named_parameters: (name, parameter) pairs. lr: Muon's rate; adamw_lr: None means lr. momentum: fp32 moving
    average, nesterov: look ahead by it. weight_decay: decoupled, p *= 1 - lr * weight_decay, for every parameter.
    ns_dtype: compute type of Newton-Schulz, None for the parameter's. routes: from route_parameters, None for its
    defaults. A parameter without a gradient is treated as having a zero one. State is made here, not in the first
    step.
    """

    def __init__(self, named_parameters, lr=2e-3, adamw_lr=None, momentum=0.95, nesterov=True, weight_decay=0.1,
                 ns_steps=5, ns_dtype=None, ns_coefficients="jordan", betas=(0.9, 0.95), eps=1e-8, routes=None):
        named = list(named_parameters)
        routes = routes or route_parameters(named)
        rates = {"muon": lr, "adamw": lr if adamw_lr is None else adamw_lr}
        groups = [{"kind": kind, "lr": rates[kind], "weight_decay": weight_decay, "step": 0,
                   "params": [p for n, p in named if routes[n].optimizer == kind],
                   "names": [n for n, _ in named if routes[n].optimizer == kind]} for kind in ("muon", "adamw")]
        super().__init__([group for group in groups if group["params"]], {})
        self.rows = {p: routes[n].rows for n, p in named}
        self.momentum, self.nesterov, self.betas, self.eps = momentum, nesterov, betas, eps
        self.ns_options = {"steps": ns_steps, "dtype": ns_dtype, "coefficients": ns_coefficients}
        for group in self.param_groups:
            for p in group["params"]:
                keys = ("momentum",) if group["kind"] == "muon" else ("exp_avg", "exp_avg_sq")
                self.state[p] = {key: torch.zeros_like(p, dtype=torch.float32) for key in keys}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            params = group["params"]
            grads = [torch.zeros_like(p).float() if p.grad is None else p.grad.float() for p in params]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["kind"] == "muon" else self._adamw)(group, params, grads)
        return loss

    def _muon(self, group, params, grads):
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        directions = torch._foreach_lerp(grads, momenta, self.momentum) if self.nesterov else momenta
        for batch in self._batches_of_one_shape(params):
            matrices = [directions[i].reshape(-1, self.rows[params[i]], params[i].shape[-1]) for i in batch]
            updates = newton_schulz(torch.cat(matrices), **self.ns_options)
            scale = 0.2 * math.sqrt(max(updates.shape[-2:]))
            for i, update in zip(batch, updates.split([len(stack) for stack in matrices])):
                params[i].add_(update.reshape(params[i].shape), alpha=-group["lr"] * scale)

    def _batches_of_one_shape(self, params):
        """Index lists of the parameters whose logical matrices are orthogonalised in one batched call."""
        batches = []
        open_batch = {}  # shape -> (indices, elements so far)
        for i, p in enumerate(params):
            shape = (self.rows[p], p.shape[-1])
            indices, elements = open_batch.get(shape, (None, NS_BATCH_ELEMENTS))
            if elements + p.numel() > NS_BATCH_ELEMENTS:
                indices, elements = [], 0
                batches.append(indices)
            indices.append(i)
            open_batch[shape] = (indices, elements + p.numel())
        return batches

    def _adamw(self, group, params, grads):
        beta1, beta2 = self.betas
        averages = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2 ** group["step"]))
        torch._foreach_add_(denominators, self.eps)
        torch._foreach_addcdiv_(params, averages, denominators, -group["lr"] / (1 - beta1 ** group["step"]))

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


@torch.no_grad()
def qk_clip_(layers, max_logits_LH, tau):
    """Scale down the query and key weights of every head whose largest logit S exceeded tau, by gamma = tau / S, so
    that the same input would now give tau. Run after the optimizer step, with that step's maxima.

    S is signed: large negative logits are harmless. S at or below tau, and a non-finite S, leave the head untouched (a
    factor of exactly 1). No host sync. Returns the number of clipped heads as a tensor.
    """
    clipped_LH = max_logits_LH.isfinite() & (max_logits_LH > tau)
    gamma_LH = torch.where(clipped_LH, tau / max_logits_LH, torch.ones_like(max_logits_LH))
    for layer, gamma_H in zip(layers, gamma_LH):
        for weight, row_factors in layer.self_attn.qk_clip_rows(gamma_H):
            weight.mul_(row_factors.to(weight.dtype).unsqueeze(1))
    return clipped_LH.sum()


def schedule_factor(step, kind, max_steps, warmup_steps, decay_steps, min_lr_ratio):
    """The learning rate of step 1, 2, ... max_steps as a factor of the peak. Warm-up is linear, its last step at the
    peak; wsd then holds and falls linearly over the last decay_steps (what is left, if that is less), cosine falls all
    the way; both end at min_lr_ratio.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    start = max(max_steps - decay_steps, warmup_steps) if kind == "wsd" else warmup_steps
    progress = min(max((step - start) / max(max_steps - start, 1), 0.0), 1.0)
    fall = progress if kind == "wsd" else (1 - math.cos(math.pi * progress)) / 2
    return 1 - (1 - min_lr_ratio) * fall
