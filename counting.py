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
    with torch.device("meta"):
        model = K2(config)
    head = config.vocab_size * config.hidden_size
    embedding = 0 if config.tie_word_embeddings else head
    qk = config.qk_nope_head_dim + config.qk_rope_head_dim if config.attention == "mla" else config.v_head_dim
    width = config.num_attention_heads * (qk + config.v_head_dim)
    core = len(model.layers) * width * (sequence_length + 1) / 2
    return 3 * 2 * (_used(model, config) - embedding + config.mtp_depth * head + core)


def _used(module, config):
    """Parameters of a module that one token uses."""
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    used = routed * config.num_experts_per_tok // config.n_routed_experts if routed else 0
    return sum(sizes.values()) - routed + used
