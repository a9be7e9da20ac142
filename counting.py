"""How large a model is and what a token of it costs: parameters, those that a token uses, FLOPs; of any config, without
building it. Next: train.py and bench/, which print and compare them.
"""

import torch

from model import K2


def count_parameters(config):
    """(total, active): all parameters, and those that one generated token uses: of the routed experts
    num_experts_per_tok, both the embedding and the head, but not the block of multi-token prediction, which generation
    leaves out. Computed on the meta device, so any size takes seconds."""
    with torch.device("meta"):
        model = K2(config)
    ahead = sum(_used(layer, config) for layer in model.layers[config.num_hidden_layers:])
    return sum(p.numel() for p in model.parameters()), _used(model, config) - ahead


def flops_per_token(config, sequence_length):
    """Model FLOPs of one token in training, forward and backward (3x forward), 2 per multiply-add, causal attention at
    its true mean context of (T+1)/2, no recompute. The embedding lookup is free, the head is not; multi-token
    prediction counts with its block and the head once more."""
    return sum(flops_by_part(config, sequence_length).values())


PARTS = {".experts.": "routed experts", ".shared_experts.": "shared experts", ".gate.": "router", ".mlp.": "dense MLP",
         "lm_head.": "head", "embed_tokens.": "embedding"}  # of a parameter's name -> part; the first that fits counts


def part_of(name):
    """The part of the model that a parameter belongs to: one of PARTS, else projections, with the norms."""
    return next((part for piece, part in PARTS.items() if piece in name), "projections")


def flops_by_part(config, sequence_length, model=None):
    """{part: what it has of flops_per_token}, attention being what is no parameter's. model: one of the config."""
    if model is None:
        with torch.device("meta"):
            model = K2(config)
    used = {}
    for name, p in model.named_parameters():
        part = part_of(name)
        share = (config.num_experts_per_tok, config.n_routed_experts) if part == "routed experts" else (1, 1)
        used[part] = used.get(part, 0) + p.numel() * share[0] // share[1]
    used.pop("embedding")
    qk = config.qk_nope_head_dim + config.qk_rope_head_dim if config.attention == "mla" else config.v_head_dim
    width = config.num_attention_heads * (qk + config.v_head_dim)
    used["attention"] = len(model.layers) * width * (sequence_length + 1) / 2
    used["head"] = config.vocab_size * config.hidden_size * (1 + config.mtp_depth)
    return {part: 6 * n for part, n in used.items()}


def flops_by_layer(config, sequence_length):
    """What each layer has of flops_per_token, the last one with the norm and the head behind it."""
    with torch.device("meta"):
        model = K2(config)
    attention = flops_by_part(config, sequence_length, model)["attention"] / len(model.layers)
    layers = [6 * _used(layer, config) + attention for layer in model.layers]
    layers[-1] += 6 * (config.vocab_size + 1) * config.hidden_size
    return layers


def _used(module, config):
    """Parameters of a module that one token uses."""
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    used = routed * config.num_experts_per_tok // config.n_routed_experts if routed else 0
    return sum(sizes.values()) - routed + used
