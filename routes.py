"""What the optimizer does with each parameter: Muon or AdamW, its logical matrices, and its share of the learning rate.

Every parameter is routed by its name, exactly once; a name that no route knows is an error. Next: muon.py.
"""

from dataclasses import dataclass

import torch

from errors import UserError

# name ending -> (optimizer, how a parameter splits into logical matrices along its rows, its name in lr_multipliers)
ROUTES = {
    "embed_tokens.weight": ("adamw", None, "embeddings"),
    "lm_head.weight": ("adamw", None, "head"),
    "norm.weight": ("adamw", None, None),
    "gate.weight": ("muon", "whole", "router"),
    "experts.gate_up_proj": ("muon", "halves", "experts"),
    "experts.down_proj": ("muon", "whole", "experts"),
    "q_proj.weight": ("muon", "heads", None),
    "q_b_proj.weight": ("muon", "heads", None),
    "k_proj.weight": ("muon", "heads", None),
    "v_proj.weight": ("muon", "heads", None),
    "kv_b_proj.weight": ("muon", "heads", None),
    "_proj.weight": ("muon", "whole", None),
    "kv_a_proj_with_mqa.weight": ("muon", "whole", None),
}


@dataclass(frozen=True)
class Route:
    """Which half of the optimizer owns a parameter; for Muon, the rows of one logical matrix (the parameter is viewed
    as a stack of rows x last-dimension matrices); by what its learning rate is multiplied."""
    optimizer: str
    rows: int | None = None
    multiplier: float = 1.0


def route_parameters(named_parameters, optimizer="muon", per_head=0, multipliers=None):
    """{name: Route} for every trainable parameter. optimizer="adamw" sends all to AdamW. per_head, if not 0, is the
    number of heads by which all that makes queries, keys and values of heads is split; 0 keeps it whole, as in the K2
    report. multipliers: of learning rates, by the last names in ROUTES; a UserError for one that no parameter has."""
    routes, multipliers, present = {}, multipliers or {}, set()
    for name, parameter in named_parameters:
        ending = next((ending for ending in ROUTES if name.endswith(ending)), None)
        if ending is None:
            raise UserError(f"no optimizer route for parameter {name}: add its ending to ROUTES in routes.py")
        owner, split, group = ROUTES[ending]
        present.add(group)
        multiplier = multipliers.get(group, 1.0)
        if owner == "adamw" or optimizer == "adamw":
            routes[name] = Route("adamw", None, multiplier)
            continue
        parts = {"whole": 1, "halves": 2, "heads": per_head or 1}[split]
        routes[name] = Route("muon", parameter.shape[-2] // parts, multiplier)
    if absent := [group for group in multipliers if group not in present]:
        raise UserError(f"lr_multipliers: this model has no parameters called {absent[0]!r}, but "
                        + ", ".join(sorted(present - {None})))
    return routes


def routes_of(config, model):
    """The routes of a run's model, by its config; of one in stages those of all ranks' parameters."""
    heads = config.num_attention_heads if config.muon_per_head else 0
    if model.stages:
        with torch.device("meta"):
            model = type(model)(config)
    return route_parameters(model.named_parameters(), config.optimizer, heads, config.lr_multipliers)


def routing_table(named_parameters, routes):
    """The routes as printable lines: parameters of one kind are counted together, layer numbers dropped."""
    kinds = {}
    for name, parameter in named_parameters:
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        route = routes[name]
        matrix = f"{parameter.numel() // (route.rows * parameter.shape[-1])} x ({route.rows}, {parameter.shape[-1]})" \
            if route.rows else "-"
        matrix += f"  learning rate x {route.multiplier:g}" * (route.multiplier != 1)
        kinds.setdefault((kind, route.optimizer, matrix), []).append(parameter.numel())
    return [f"  {optimizer:5} {kind:51} {len(sizes):3} x {sizes[0]:>12,}  matrices {matrix}"
            for (kind, optimizer, matrix), sizes in kinds.items()]
