"""Multi-head Latent Attention, RoPE with YaRN, and plain MHA as the baseline.

Parameters carry Hugging Face's DeepSeek-V3 names (self_attn.kv_b_proj.weight, ...). The training path ends in
kernels/attention.py; the cached path, used by generation, is here. model.py puts one of these in every block.

Shapes: B batch, T positions, S cached positions, D hidden_size, H heads, R kv_lora_rank; head widths N
(qk_nope_head_dim), P (qk_rope_head_dim), Q = N + P, U (v_head_dim).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import causal_attention, latent_decode
from layers import Linear, RMSNorm, linear

# ----------------------------------------------------------------------------- position

def yarn_mscale(factor, mscale):
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(dim, theta, scaling, device):
    """Angles per position (dim/2,) in fp32, and the factor on cos and sin; YaRN (arXiv 2309.00071, section 3.2)
    blends the interpolated low frequencies with the untouched high ones over a linear ramp."""
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    frequency = 1.0 / theta**exponent
    if scaling is None:
        return frequency, 1.0
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dim_with_turns(turns):  # the pair index whose wavelength fits `turns` times into the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low = max(math.floor(dim_with_turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(dim_with_turns(scaling.get("beta_slow", 1))), dim - 1)
    ramp = ((torch.arange(dim // 2, device=device) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequency = frequency / factor * ramp + frequency * (1 - ramp)
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return frequency, yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all)
    return frequency, yarn_mscale(factor, 1)


def rope_tables(c, start, length, device, first_BT=0):
    """cos and sin, each (T, P/2) or (B, T, P/2), for positions start..start+length, less first_BT, of a ModelConfig."""
    dim = c.qk_rope_head_dim if c.attention == "mla" else c.v_head_dim
    frequency, factor = rope_frequencies(dim, c.rope_theta, c.rope_scaling, device)
    positions = torch.arange(start, start + length, device=device, dtype=torch.float32) - first_BT
    angle = positions[..., None] * frequency
    return angle.cos() * factor, angle.sin() * factor


def apply_rope(x_BTHP, rope):
    """Rotate adjacent pairs (the interleaved layout of the published checkpoints) by the angles of each position: rope
    is cos and sin, each (T, P/2) or (B, T, P/2)."""
    cos, sin = (table.unsqueeze(-2) for table in rope)
    even, odd = x_BTHP.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BTHP.dtype)


class RotateTail(torch.autograd.Function):
    """x_BTHQ with apply_rope on the columns from `start` on. torch.compile writes these in place, forward and backward,
    where a cat would copy all of x."""

    @staticmethod
    def forward(ctx, x_BTHQ, start, cos, sin):
        ctx.start = start
        ctx.save_for_backward(cos, sin)
        return rotate_tail(x_BTHQ, start, (cos, sin))

    @staticmethod
    def backward(ctx, grad_BTHQ):
        cos, sin = ctx.saved_tensors
        return rotate_tail(grad_BTHQ, ctx.start, (cos, -sin)), None, None, None


def rotate_tail(x_BTHQ, start, rope):
    """For a tensor whose storage begins with it, such as the result of an operator."""
    x_BTHQ = x_BTHQ.contiguous()
    tail = x_BTHQ[..., start:]  # by strides, the one scatter that Inductor never makes a copy of all
    return torch.as_strided_scatter(x_BTHQ, apply_rope(tail, rope), tail.size(), tail.stride(), start)


# ----------------------------------------------------------------------------- attention

@dataclass
class Cache:
    """Per layer the latent and RoPE key of every position so far (B, S, kv_lora_rank + qk_rope_head_dim)."""
    layers: list
    length: int = 0


def cached_attention(scores_BHTS, start, first_BT=None):
    """Softmax in fp32 over the cached keys from first_BT (None: 0) on, with query t standing at position start + t."""
    _, _, T, S = scores_BHTS.shape
    hidden = torch.ones(T, S, dtype=torch.bool, device=scores_BHTS.device).triu(start + 1)
    if first_BT is not None:
        hidden = hidden | (torch.arange(S, device=hidden.device) < first_BT[..., None]).unsqueeze(1)
    return scores_BHTS.float().masked_fill(hidden, float("-inf")).softmax(-1)


def softmax_scale(width, scaling):
    """Of queries and keys so wide; YaRN's temperature is here where rope_frequencies leaves it out."""
    return width**-0.5 * (yarn_mscale(scaling["factor"], scaling.get("mscale_all_dim") or 0) ** 2 if scaling else 1)


class MLA(nn.Module):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values come from a latent of
    kv_lora_rank, positions from a small RoPE key that all heads share."""

    def __init__(self, c):
        super().__init__()
        self.H, self.R = c.num_attention_heads, c.kv_lora_rank
        self.N, self.P, self.U = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.scale = softmax_scale(self.N + self.P, c.rope_scaling)
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, self.H * (self.N + self.P))
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, 1e-6)
            self.q_b_proj = Linear(c.q_lora_rank, self.H * (self.N + self.P))
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, self.R + self.P)
        self.kv_a_layernorm = RMSNorm(self.R, 1e-6)
        self.kv_b_proj = Linear(self.R, self.H * (self.N + self.U))
        self.kv_b_proj.copied = dict  # none: keys_and_values takes it to pieces first
        self.o_proj = Linear(self.H * self.U, c.hidden_size)
        self.register_buffer("exact_above", torch.tensor(float("-inf")), persistent=False)  # causal_attention's

    def cache_width(self):
        return self.R + self.P

    def forward(self, x_BTD, rope, cache_BSW=None, start=0, first_BT=None):
        """Returns y_BTD and the per-head maximum of the scaled logits (H,), None behind cached positions.

        A cache gets positions start..start+T. Behind others attention runs in the absorbed form: queries move into the
        latent space, so the heads' keys and values are never made. first_BT: causal_attention's.
        """
        q = self.q_proj(x_BTD) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q = q.unflatten(-1, (self.H, -1))
        latent_BTR, k_rope = self.kv_a_proj_with_mqa(x_BTD).split((self.R, self.P), dim=-1)
        latent_BTR, k_rope_BT1P = self.kv_a_layernorm(latent_BTR), apply_rope(k_rope.unsqueeze(2), rope)
        if cache_BSW is not None:
            end = start + x_BTD.shape[1]
            cache_BSW[:, start:end] = torch.cat((latent_BTR, k_rope_BT1P.squeeze(2)), dim=-1)
        if start:
            q_nope, q_rope = rotate_tail(q, self.N, rope).split((self.N, self.P), dim=-1)
            latent_BSR, k_rope_BSP = cache_BSW[:, :end].split((self.R, self.P), dim=-1)
            weight_HXR = self.kv_b_proj.weight.to(x_BTD.dtype).unflatten(0, (self.H, -1))
            up_HNR, value_HUR = weight_HXR.split((self.N, self.U), dim=1)
            if x_BTD.shape[1] == 1 and first_BT is None:
                q_BHW = torch.cat((torch.einsum("bthn,hnr->bhr", q_nope, up_HNR), q_rope.squeeze(1)), dim=-1)
                latent_BHR = latent_decode(q_BHW, cache_BSW[:, :end], self.scale, self.R)
                return self.o_proj(torch.einsum("bhr,hur->bhu", latent_BHR, value_HUR).flatten(1).unsqueeze(1)), None
            scores = torch.einsum("bthn,hnr,bsr->bhts", q_nope, up_HNR, latent_BSR)
            scores = (scores + torch.einsum("bthp,bsp->bhts", q_rope, k_rope_BSP)) * self.scale
            weights = cached_attention(scores, start, first_BT).to(x_BTD.dtype)
            output_BTHU = torch.einsum("bhts,bsr,hur->bthu", weights, latent_BSR, value_HUR)
            return self.o_proj(output_BTHU.flatten(-2)), None
        q, (k, v) = RotateTail.apply(q, self.N, *rope), self.keys_and_values(latent_BTR, k_rope_BT1P)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        output_BHTU, max_H = causal_attention(*heads, self.scale, first_BT, self.exact_above)
        return self.o_proj(output_BHTU.transpose(1, 2).flatten(-2)), max_H

    def keys_and_values(self, latent_BTR, k_rope_BT1P):
        """k (B, T, H, Q), the RoPE key in every head, and v (B, T, H, U)."""
        if latent_BTR.dtype == self.kv_b_proj.weight.dtype:  # as in MLP
            k_nope, v = self.kv_b_proj(latent_BTR).unflatten(-1, (self.H, -1)).split((self.N, self.U), dim=-1)
            return torch.cat((k_nope, k_rope_BT1P.expand(-1, -1, self.H, -1)), dim=-1), v
        # The matmul spreads the RoPE key over the heads: [latent | key] times [W 0; 0 1], exact since 0 and 1 are. So k
        # and v are written once, nothing is put together, and the backward's matmul sums the key's gradient.
        up_HNR, value_HUR = self.kv_b_proj.weight.unflatten(0, (self.H, -1)).split((self.N, self.U), dim=1)
        one = torch.eye(self.P, dtype=up_HNR.dtype, device=up_HNR.device).expand(self.H, -1, -1)
        key_HQW = torch.cat((F.pad(up_HNR, (0, self.P)), F.pad(one, (self.R, 0))), dim=1)
        both_BTW = torch.cat((latent_BTR, k_rope_BT1P.squeeze(2)), dim=-1)
        k = linear(both_BTW, [key_HQW.flatten(0, 1)])
        v = linear(both_BTW[..., :self.R], [value_HUR.flatten(0, 1)])
        return k.unflatten(-1, (self.H, -1)), v.unflatten(-1, (self.H, -1))

    def qk_clip_rows(self, gamma_H):
        """(weight, factor per row) pairs that scale every head's logits by gamma: sqrt on the two position-free parts,
        gamma on the query's RoPE part, because the RoPE key is shared (Kimi K2, arXiv 2507.20534, algorithm 1)."""
        root, one = gamma_H.sqrt(), torch.ones_like(gamma_H)
        q_rows = torch.cat((root[:, None].expand(-1, self.N), gamma_H[:, None].expand(-1, self.P)), dim=1).flatten()
        kv_rows = torch.cat((root[:, None].expand(-1, self.N), one[:, None].expand(-1, self.U)), dim=1).flatten()
        query = self.q_proj if hasattr(self, "q_proj") else self.q_b_proj
        return [(query.weight, q_rows), (self.kv_b_proj.weight, kv_rows)]


class MHA(nn.Module):
    """Plain multi-head attention with RoPE on whole heads, the baseline; same interface as MLA."""

    def __init__(self, c):
        super().__init__()
        self.H, self.U, self.scale = c.num_attention_heads, c.v_head_dim, softmax_scale(c.v_head_dim, c.rope_scaling)
        self.q_proj, self.k_proj, self.v_proj = (Linear(c.hidden_size, self.H * self.U) for _ in range(3))
        self.o_proj = Linear(self.H * self.U, c.hidden_size)
        self.register_buffer("exact_above", torch.tensor(float("-inf")), persistent=False)  # causal_attention's

    def cache_width(self):
        return 2 * self.H * self.U

    def forward(self, x_BTD, rope, cache_BSW=None, start=0, first_BT=None):
        q, k, v = (proj(x_BTD).unflatten(-1, (self.H, self.U)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache_BSW is not None:
            end = start + x_BTD.shape[1]
            cache_BSW[:, start:end] = torch.cat((k.flatten(-2), v.flatten(-2)), dim=-1)
        if start:  # as in MLA
            k, v = cache_BSW[:, :end].unflatten(-1, (2, self.H, self.U)).unbind(2)
            scores = torch.einsum("bthu,bshu->bhts", q, k) * self.scale
            weights = cached_attention(scores, start, first_BT).to(x_BTD.dtype)
            return self.o_proj(torch.einsum("bhts,bshu->bthu", weights, v).flatten(-2)), None
        heads = (x.transpose(1, 2) for x in (q, k, v))
        output_BHTU, max_H = causal_attention(*heads, self.scale, first_BT, self.exact_above)
        return self.o_proj(output_BHTU.transpose(1, 2).flatten(-2)), max_H

    def qk_clip_rows(self, gamma_H):
        rows = gamma_H.sqrt().repeat_interleave(self.U)
        return [(self.q_proj.weight, rows), (self.k_proj.weight, rows)]
