"""The model: ModelConfig, the block, and K2, the transformer that joins the blocks.

It knows one device and nothing of ranks. Fields and parameters carry the names of Kimi-K2's and DeepSeek-V3's
config.json and checkpoints, so that export is a dump. Linear, norm and MLP are in layers.py, attention in mla.py, the
experts in moe.py, what more than one token ahead takes in mtp.py, the arithmetic in kernels/.

Shapes: B batch, T positions, D hidden_size, H heads, V vocabulary, E routed experts, S cached positions.
"""

import functools
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.utils import checkpoint

import decoding
from errors import UserError
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from layers import MLP, Linear, RMSNorm, WeightCopies
from mla import MHA, MLA, Cache, rope_tables
from moe import Experts, MoE, Router, Routing, default_scaling_factor, keep_gradients
from mtp import next_and_second


def setting(default, why, group="model"):
    """A dataclass field with its reason, which --help prints."""
    return field(default=default, metadata={"why": why, "group": group})


MOST, MOST_EXPERTS = 2**24, 2**13  # of any size; default_scaling_factor draws 20,000 numbers an expert


@dataclass
class ModelConfig:
    attention: Literal["mla", "mha"] = setting(
        "mla", "mla: latent attention; mha: plain heads of v_head_dim, for baselines")
    vocab_size: int = setting(50304, "rows of the embedding; at least the tokenizer's size")
    hidden_size: int = setting(768, "width of the residual stream")
    intermediate_size: int = setting(2048, "width of the dense SwiGLU MLPs")
    moe_intermediate_size: int = setting(256, "width of one expert; fine-grained: at most hidden_size / 2")
    num_hidden_layers: int = setting(12, "blocks")
    num_attention_heads: int = setting(8, "heads")
    q_lora_rank: int | None = setting(None, "rank of the query compression; None: no compression")
    kv_lora_rank: int = setting(256, "rank of the latent that is all the cache keeps of keys and values")
    qk_nope_head_dim: int = setting(64, "query-key width of a head without position")
    qk_rope_head_dim: int = setting(32, "query-key width of a head that carries RoPE; heads share the key")
    v_head_dim: int = setting(64, "value width of a head")
    n_routed_experts: int = setting(64, "experts to choose from; 0: every layer dense")
    num_experts_per_tok: int = setting(7, "experts that each token is sent to")
    n_shared_experts: int = setting(1, "always-on experts, fused into one MLP of that many expert widths")
    n_group: int = setting(1, "expert groups for group-limited routing (DeepSeek-V3: 8); 1: no limit")
    topk_group: int = setting(1, "groups that a token may use")
    norm_topk_prob: bool = setting(True, "chosen weights are normalised to sum 1 before scaling")
    routed_scaling_factor: float | None = setting(
        None, "scale of the routed sum; None: the value that keeps its size (about sqrt K)")
    first_k_dense_replace: int = setting(1, "this many first layers are dense: early routing balances badly")
    rms_norm_eps: float = setting(1e-6, "epsilon of the norms (q_a and kv_a: always 1e-6, as published)")
    rope_theta: float = setting(50000.0, "RoPE base")
    rope_scaling: dict | None = setting(None, "YaRN settings as in config.json; None: plain RoPE")
    max_position_embeddings: int = setting(1024, "longest context")
    tie_word_embeddings: bool = setting(False, "one matrix for embedding and head")
    initializer_range: float = setting(0.02, "standard deviation of the initial weights")
    aux_loss_alpha: float = setting(1e-4, "weight of the sequence-wise balance loss")
    mtp_depth: int = setting(
        0, "1: one more block learns to predict the token after the next one (DeepSeek-V3); 0: none")
    z_loss: float = setting(0.0, "weight of the logits' squared log-sum-exp, in the gradient only; 0: none, as K2")
    router_z_loss: float = setting(0.0, "the same of the routers' logits, in the gradient only too; 0: none")
    balance: Literal["quantile", "sign", "none"] = setting(
        "sign", "how a router's bias evens out the load: quantile: solved anew in every step (Kimi K3); sign: by steps "
        "of bias_update_rate (DeepSeek-V3); none: it stays")

    def __post_init__(self):
        if self.routed_scaling_factor is None and 0 < self.num_experts_per_tok <= self.n_routed_experts <= MOST_EXPERTS:
            self.routed_scaling_factor = default_scaling_factor(self.n_routed_experts, self.num_experts_per_tok)

    def check_model(self):
        """Raise a UserError that names the first impossible size and what would be valid."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "v_head_dim", "max_position_embeddings")
        if self.attention == "mla":
            sizes += ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        if self.n_routed_experts:
            sizes += ("moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group")
        for name in sizes:
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1 and at most {MOST:,}")
        rope_dim = self.qk_rope_head_dim if self.attention == "mla" else self.v_head_dim
        E, K, G = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        for ok, message in (
                (rope_dim % 2 == 0, f"RoPE turns pairs: its head width {rope_dim} must be even"),
                (self.q_lora_rank is None or 0 < self.q_lora_rank <= MOST, "q_lora_rank must be None or at least 1"),
                (0 <= E <= MOST_EXPERTS, f"n_routed_experts must be 0 (dense) or more, at most {MOST_EXPERTS:,}"),
                (0 <= self.n_shared_experts <= MOST_EXPERTS, "n_shared_experts must be 0 or more"),
                (self.rms_norm_eps > 0 and self.initializer_range > 0 and self.rope_theta > 0,
                 "rms_norm_eps, initializer_range and rope_theta must be above 0"),
                (E == 0 or K <= E, f"num_experts_per_tok={K} must be at most n_routed_experts={E}"),
                (E == 0 or E % G == 0, f"n_group={G} must divide n_routed_experts={E}"),
                (E == 0 or G == 1 or E // G >= 2, f"n_group={G} leaves fewer than 2 of {E} experts a group"),
                (E == 0 or self.topk_group <= G, f"topk_group={self.topk_group} must be at most n_group={G}"),
                (E == 0 or K <= E // G * self.topk_group, f"topk_group={self.topk_group} groups hold "
                 f"{E // G * self.topk_group} experts, too few for num_experts_per_tok={K}"),
                (E == 0 or self.balance != "quantile" or K < E // G * self.topk_group, "balance='quantile' needs "
                 f"an expert that is not chosen, but num_experts_per_tok={K} chooses all: set --balance=sign"),
                (0 <= self.first_k_dense_replace <= self.num_hidden_layers,
                 "first_k_dense_replace must lie in 0..num_hidden_layers"),
                (self.mtp_depth in (0, 1), f"mtp_depth={self.mtp_depth} must be 0 or 1")):
            if not ok:
                raise UserError(message)
        if self.rope_scaling is not None:
            numbers = {key: value for key, value in self.rope_scaling.items() if key not in ("type", "rope_type")}
            kind = self.rope_scaling.get("type", self.rope_scaling.get("rope_type"))
            needed = {"factor": 1, "original_max_position_embeddings": 1}  # and the least that each can be
            known = needed | {"beta_fast": 1e-3, "beta_slow": 1e-3, "mscale": 0, "mscale_all_dim": 0}
            if kind != "yarn" or not needed.keys() <= numbers.keys() <= known.keys() or not all(
                    type(value) in (int, float) and known[key] <= value <= 1e9 for key, value in numbers.items()):
                raise UserError(f"rope_scaling must be None or a dict of type 'yarn' with {', '.join(needed)} and at "
                                f"most these numbers, each from here to 1e9: {known}")
            if self.rope_theta <= 1:
                raise UserError(f"rope_theta={self.rope_theta} must be above 1 with rope_scaling")

    def is_moe_layer(self, index):
        return self.n_routed_experts > 0 and index >= self.first_k_dense_replace


# ----------------------------------------------------------------------------- the block

KEPT = ("nanok2::", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_grouped_mm", "aten::_scaled_",
        "aten::_flash_attention", "aten::_efficient_attention", "flex_attention", "aten::sort", "aten::topk")


def keep_matmuls(context, operator, *args, **kwargs):
    """The policy of selective recomputation: kept are the results of matmuls, of sorts, of our own operators and of
    attention, whichever library computes it; pointwise work, copies and views are computed again."""
    kept = operator.name().startswith(KEPT)
    return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


KEEP_MATMULS = functools.partial(checkpoint.create_selective_checkpoint_contexts, keep_matmuls)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream. recompute says what the backward computes again:
    "none", "selective" (all but matmuls) or "full"."""

    def __init__(self, c, index):
        super().__init__()
        self.recompute = "none"
        self.self_attn = MLA(c) if c.attention == "mla" else MHA(c)
        if c.is_moe_layer(index):
            self.mlp = MoE(
                Router(c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, c.n_group, c.topk_group,
                       c.norm_topk_prob, c.routed_scaling_factor, c.balance, c.router_z_loss > 0),
                Experts(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size),
                MLP(c.hidden_size, c.moe_intermediate_size * c.n_shared_experts) if c.n_shared_experts else None)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x_BTD, rope, cache_BSW=None, start=0, first_BT=None, real_BT=None):
        """Returns x_BTD, max_H, and the Routed of an MoE block or None. real_BT: see Router.forward."""
        if self.recompute == "none" or not self.training or cache_BSW is not None:
            return self.compute(x_BTD, rope, cache_BSW, start, first_BT, real_BT)
        # Inside the block, so that a compiled block knows of it. "selective" keeps the matmul results.
        kept = {"context_fn": KEEP_MATMULS} if self.recompute == "selective" else {}
        return checkpoint.checkpoint(self.compute, x_BTD, rope, None, 0, first_BT, real_BT, use_reentrant=False,
                                     preserve_rng_state=False, **kept)  # nothing here is random

    def compute(self, x_BTD, rope, cache_BSW=None, start=0, first_BT=None, real_BT=None):
        attended, max_H = self.self_attn(self.input_layernorm(x_BTD), rope, cache_BSW, start, first_BT)
        x_BTD = x_BTD + attended
        hidden = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            x_BTD, routed = self.mlp(hidden, x_BTD, real_BT)
            return x_BTD, max_H, routed
        return x_BTD + self.mlp(hidden), max_H, None


class MTPBlock(Block):
    """The block of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a Block over a projection of
    two things, the embedding of the token after a position and what the model made of the position, and a last norm of
    its own; embedding and head are the model's. The embedding stands first, as in the published weights."""

    def __init__(self, c, index):
        super().__init__(c, index)
        self.enorm, self.hnorm, last = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(3))
        self.eh_proj = Linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": last})

    def compute(self, both_BTW, *rest):
        """both_BTW: next embedding and hidden state, side by side: a block, its recompute and FSDP take one tensor."""
        next_BTD, x_BTD = both_BTW.chunk(2, dim=-1)
        x_BTD = self.eh_proj(torch.cat((self.enorm(next_BTD), self.hnorm(x_BTD)), dim=-1))
        x_BTD, *told = super().compute(x_BTD, *rest)
        return self.shared_head.norm(x_BTD), *told


# ----------------------------------------------------------------------------- the transformer

class K2(nn.Module):
    """The transformer. Build it on any device, or on meta, then call init_weights(seed) or load a checkpoint.

    compute_dtype is the dtype of the residual stream; parameters stay in fp32. In training, forward adds to running
    statistics that the optimizer step reads and clears: routing (see moe.Routing) and max_logits (layers, H). With
    mtp_depth=1 the last of `layers` is the MTPBlock. Of a model in stages (ranks/pipeline.py) this rank has the layers
    `here` and no others, and its part of the `stages`, of which there are some on each of pp ranks.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.compute_dtype, self.copies = config, torch.float32, None
        n_layers = config.num_hidden_layers + config.mtp_depth
        self.here, self.stages, self.pp = range(n_layers), (), 1
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList((MTPBlock if index >= config.num_hidden_layers else Block)(config, index)
                                    for index in range(n_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        routers = [layer.mlp.gate for layer in self.layers if isinstance(layer.mlp, MoE)]
        self.routing = Routing(routers, config.n_routed_experts, config.balance)
        maxima = (n_layers, config.num_attention_heads)
        self.register_buffer("max_logits", torch.full(maxima, float("-inf")), persistent=False)

    @property
    def layers(self):
        return [self.model.layers[index] for index in self.here]

    @property
    def device(self):
        return self.max_logits.device

    def trunk(self, x, cache=None, first_BT=None, real_BT=None, span=None):
        """All but the head: x_BTD after the last norm, rope, and of every layer what else it returns. x: tokens_BT.
        span: of the layers of this range alone: the embedding goes with the first, the norm with the last, and x is
        what came out of the layer before."""
        self.refresh_copies()
        span = range(self.config.num_hidden_layers) if span is None else span
        start, length = 0 if cache is None else cache.length, x.shape[1]
        x_BTD = x if span.start else self.model.embed_tokens(x).to(self.compute_dtype)
        rope = rope_tables(self.config, start, length, self.device, 0 if first_BT is None else first_BT)
        told = []
        for index in span:
            past = None if cache is None else cache.layers[index]
            x_BTD, *more = self.model.layers[index](x_BTD, rope, past, start, first_BT, real_BT)
            told.append(more)
        if cache is not None:
            cache.length += length
        return x_BTD if span.stop < self.config.num_hidden_layers else self.model.norm(x_BTD), rope, told

    def ahead(self, x_BTD, next_BT, rope, past_BSW=None, start=0, first_BT=None, real_BT=None):
        """What the MTPBlock returns for trunk's x_BTD and the tokens that come next; the head makes logits of it, for
        the tokens after those."""
        next_BTD = self.model.embed_tokens(next_BT).to(self.compute_dtype)
        return self.layers[-1](torch.cat((next_BTD, x_BTD), dim=-1), rope, past_BSW, start, first_BT, real_BT)

    def forward(self, tokens_BT, targets_BT=None, cache=None, first_BT=None, scale=1.0, mtp_scale=None):
        """Without targets: logits (B, T, V) in fp32. With targets: (cross-entropy summed over the targets, balance loss
        summed over sequences and layers), both unweighted sums, so that micro-batches of any size add up exactly. scale
        is what the caller multiplies the first by before the backward: see linear_cross_entropy.

        mtp_scale: None leaves the MTPBlock out; else it is that of the block's own cross-entropy, which is returned
        behind the others, a sum too, and behind it over how many targets.

        cache, from new_cache(), holds the positions before these tokens and receives theirs. first_BT (int32): where in
        its row, cached positions included, the document of each position starts. Attention then stays within a
        document, and its positions count from there.
        """
        real_BT = None if targets_BT is None else targets_BT != IGNORE  # places left empty are routed, but no tokens
        x_BTD, rope, told = self.trunk(tokens_BT, cache, first_BT, real_BT)
        if targets_BT is None:
            return self.lm_head(x_BTD).float()
        losses = [self.loss_sum(x_BTD, targets_BT, scale)]
        if mtp_scale is not None:
            next_BT, second_BT = next_and_second(tokens_BT, targets_BT, first_BT)
            x_BTD, *more = self.ahead(x_BTD, next_BT, rope, first_BT=first_BT, real_BT=real_BT)
            told.append(more)
            losses += [self.loss_sum(x_BTD, second_BT, mtp_scale), (second_BT != IGNORE).sum()]
        balance, z = self.take_in(told)
        return losses[0] + z, balance, *losses[1:]

    def take_in(self, told, first=0):
        """Add what the layers from the first-th on told to the running statistics of a training; returns (their balance
        loss summed over sequences and layers, what brings their z-losses into the gradient of the cross-entropy's sum
        and is 0 itself)."""
        maxima, routed = ([one for one in column if one is not None] for column in zip(*told))
        z = zero = torch.zeros((), device=self.device)
        if self.training:
            with torch.no_grad():
                max_logits = self.max_logits[first:first + len(maxima)]
                max_logits.copy_(torch.maximum(max_logits, torch.stack(maxima)))
            self.routing.add(routed, sum(map(self.config.is_moe_layer, range(first))))
            if self.config.router_z_loss and routed:
                z = self.config.router_z_loss * sum(r.z for r in routed)
        return sum((r.balance for r in routed), zero), z - z.detach()

    def loss_sum(self, x_BTD, targets_BT, scale):
        return linear_cross_entropy(
            x_BTD.flatten(0, 1), self.lm_head.weight, targets_BT.flatten(), self.config.z_loss, scale)

    def make_copies(self):
        """Keep the blocks' matrices in compute_dtype too, from the next forward on: it saves every later micro-batch of
        a step the rounding. For parameters that are whole on this device."""
        taken, matrices = set(), []
        for module in self.model.layers.modules():  # an MLP comes before the layers whose weights it stacks
            copied = module.copied() if isinstance(module, (MLP, Linear, Experts)) else {}
            matrices += [(module, name, weights) for name, weights in copied.items() if not taken & set(weights)]
            taken.update(*copied.values())
        self.copies = WeightCopies(matrices, self.compute_dtype)

    def refresh_copies(self, always=False):
        """WeightCopies.refresh, which forward calls; none without make_copies()."""
        if self.copies is not None:
            self.copies.refresh(always)

    def keep_gradients(self):
        """moe.keep_gradients for every layer."""
        return keep_gradients(self.model.layers.modules(), self.compute_dtype)

    @torch.no_grad()
    def reset_statistics(self, exact_above=float("-inf")):
        """exact_above: until the next reset, max_logits must be exact above it and may be bounds below."""
        self.routing.clear()
        self.max_logits.fill_(float("-inf"))
        for layer in self.layers:
            layer.self_attn.exact_above.fill_(exact_above)

    @torch.no_grad()
    def init_weights(self, seed, local_rows=lambda tensor: (tensor, 0)):
        """Norms to 1, everything else normal(0, initializer_range), drawn in blocks of rows whose generator is seeded
        by (seed, parameter name, block). local_rows gives the part of a parameter that is here and the index of its
        first row: any rank makes just its rows, and every layout starts from the same numbers."""
        self.reset_statistics()
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
        def draw(name, shape, part, first, rows, block):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{block}".encode()))
            start, end = block * rows, min((block + 1) * rows, shape[0])
            drawn = torch.randn((end - start, *shape[1:]), generator=generator)
            low, high = max(start, first), min(end, first + len(part))
            part[low - first:high - first] = drawn[low - start:high - start] * self.config.initializer_range

        with ThreadPoolExecutor() as pool:  # drawing takes a core seconds for every hundred million
            jobs = []
            for name, parameter in self.named_parameters():
                part, first = local_rows(parameter)
                if parameter.ndim == 1:
                    part.fill_(1.0)
                    continue
                rows = max(1, 2**20 // parameter.shape[1:].numel())
                blocks = range(first // rows, -(-(first + len(part)) // rows) if len(part) else 0)
                jobs += [pool.submit(draw, name, parameter.shape, part.detach(), first, rows, i) for i in blocks]
            for job in jobs:
                job.result()
        return self

    # ------------------------------------------------------------------------- generation

    def new_cache(self, batch_size, length, mtp=False):
        """mtp: with room for the MTPBlock too."""
        n = len(self.model.layers) if mtp else self.config.num_hidden_layers
        return Cache([torch.zeros(batch_size, length, self.model.layers[index].self_attn.cache_width(),
                                  dtype=self.compute_dtype, device=self.device) if index in self.here else None
                      for index in range(n)])

    def generate(self, tokens_BT, max_new_tokens, **options):
        """decoding.generate, with its options: yields (B,) ids, one tensor per new token."""
        return decoding.generate(self, tokens_BT, max_new_tokens, **options)


def pick_device(name):
    """The torch.device of a setting: auto takes the best there is, a missing one is refused with what there is."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        there = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"device={name!r} is not there; available: {there}")
    return torch.device(name)


def build(config, device, distribute=lambda model: None):
    """A K2 on `device` with unset weights, made on meta first so that nothing is initialised twice. distribute(model)
    may shard it while it is there, so that no device ever holds all of it."""
    with torch.device("meta"):
        model = K2(config)
    distribute(model)
    model.to_empty(device=device)
    if config.tie_word_embeddings:  # to_empty makes new parameters
        model.lm_head.weight = model.model.embed_tokens.weight
    model.reset_statistics()
    return model
