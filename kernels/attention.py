"""Causal attention for training, with the exact per-head maximum of the scaled logits that QK-clip needs, and attention
of single queries to MLA's latent cache for generation.

`attention_math` and `latent_decode_math` are the twins: scores in full, maximum and softmax read off them. Triton's
kernels are torch.library ops here; on CUDA the libraries' attention competes with them (choose_arm), with a second,
gradient-free pass over the scores for the maximum, which leaves out what the log-sum-exp rules out (skip_below).
Next: triton_attention.py, or ../mla.py, which calls this.

Shapes: B batch, H heads, T positions, Q query-key width, V value width (MLA has Q != V); S cached positions, W = R + P
cache width: latent and RoPE key. first_BT (int32, contiguous) is where the document of position t starts: query t sees
the keys first_BT[t]..t. It must not decrease along a row, and first_BT[t] <= t; neither is checked. None: one document.
"""

import math

import torch
import torch.nn.functional as F

from kernels import backend

QUERY_CHUNK = 128  # rows of scores made at once; keys beyond a chunk's last row are never computed

# ----------------------------------------------------------------------------- twins

def attention_math(q_BHTQ, k_BHTQ, v_BHTV, scale, first_BT=None, exact_above=None):
    """Plain attention in chunks of query rows, the same result as causal_attention on every device; its maximum is
    always exact."""
    if q_BHTQ.numel() == 0:
        return q_BHTQ @ k_BHTQ.mT @ v_BHTV, _no_maximum(q_BHTQ)
    outputs, maxima = [], []
    for start in range(0, q_BHTQ.shape[2], QUERY_CHUNK):
        scores, end = _masked_scores(q_BHTQ, k_BHTQ, scale, start, first_BT)
        maxima.append(scores.detach().amax(dim=(0, 2, 3)))
        outputs.append(scores.softmax(-1).to(v_BHTV.dtype) @ v_BHTV[:, :, :end])
    return torch.cat(outputs, dim=2), torch.stack(maxima).amax(0)


@torch.no_grad()
def max_logit_math(q_BHTQ, k_BHTQ, scale, first_BT=None, lse_BHT=None, below_H=None):
    """The twin of Triton's max_logits; scores exist one chunk of rows at a time, and none is left out."""
    if q_BHTQ.numel() == 0:
        return _no_maximum(q_BHTQ)
    chunks = []
    for start in range(0, q_BHTQ.shape[2], QUERY_CHUNK):
        scores, end = _masked_scores(q_BHTQ, k_BHTQ, scale, start, first_BT)
        maxima_BH = scores.amax(dim=(2, 3))
        if lse_BHT is not None:
            bounds_BH = lse_BHT[:, :, start:end].amax(2)
            maxima_BH = torch.where(bounds_BH < below_H, bounds_BH, maxima_BH)
        chunks.append(maxima_BH.amax(0))
    return torch.stack(chunks).amax(0)


def _no_maximum(q_BHTQ):
    return torch.full((q_BHTQ.shape[1],), float("-inf"), device=q_BHTQ.device)


def _masked_scores(q_BHTQ, k_BHTQ, scale, start, first_BT):
    end = min(start + QUERY_CHUNK, q_BHTQ.shape[2])
    scores = (q_BHTQ[:, :, start:end] * scale @ k_BHTQ[:, :, :end].mT).float()
    hidden = torch.full((end - start, end), float("-inf"), device=scores.device).triu_(start + 1)  # 0 where visible
    if first_BT is not None:
        before_BTS = torch.arange(end, device=scores.device) < first_BT[:, start:end, None]
        hidden = hidden.masked_fill(before_BTS, float("-inf")).unsqueeze(1)
    return scores.add_(hidden), end


def latent_decode_math(q_BHW, cache_BSW, scale, value_width):
    """The twin of latent_decode."""
    weights_BHS = (q_BHW @ cache_BSW.mT * scale).float().softmax(-1).to(q_BHW.dtype)
    return weights_BHS @ cache_BSW[..., :value_width]


# ----------------------------------------------------------------------------- Triton's kernels as ops
# opaque to torch.compile; triton itself is imported when they run

def _heads(like, B, H, T, width):  # what triton_attention.empty_heads gives
    return like.new_empty(B, T, H, width).transpose(1, 2)


@torch.library.custom_op("nanok2::causal_attention", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor? first) -> (Tensor, Tensor, Tensor)"))
def _attention_op(q, k, v, scale, first):
    from kernels import triton_attention
    return triton_attention.forward(q, k, v, scale, first)


@_attention_op.register_fake
def _(q, k, v, scale, first):
    B, H, T, _ = q.shape
    return (_heads(q, B, H, T, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32),
            q.new_empty(H, dtype=torch.float32))


@torch.library.custom_op("nanok2::causal_attention_backward", mutates_args=(), schema=(
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, Tensor? first)"
    " -> (Tensor, Tensor, Tensor)"))
def _attention_backward_op(do, q, k, v, o, lse, scale, first):
    from kernels import triton_attention
    return triton_attention.backward(do, q, k, v, o, lse, scale, first)


@_attention_backward_op.register_fake
def _(do, q, k, v, o, lse, scale, first):
    return tuple(_heads(x, *x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ctx.scale, first = inputs
    ctx.save_for_backward(q, k, v, output[0], output[1], first)


def _attention_backward(ctx, do, _lse, _maximum):
    q, k, v, o, lse, first = ctx.saved_tensors
    return *_attention_backward_op(do, q, k, v, o, lse, ctx.scale, first), None, None


_attention_op.register_autograd(_attention_backward, setup_context=_save)


@torch.library.custom_op("nanok2::max_logits", mutates_args=(),
                         schema="(Tensor q, Tensor k, float scale, Tensor? first, Tensor? lse=None, "
                                "Tensor? below=None) -> Tensor")
def _max_logits_op(q, k, scale, first, lse=None, below=None):
    from kernels import triton_attention
    return triton_attention.max_logits(q, k, scale, first, lse, below)


@_max_logits_op.register_fake
def _(q, k, scale, first, lse=None, below=None):
    return q.new_empty(q.shape[1], dtype=torch.float32)


@torch.library.custom_op("nanok2::latent_decode", mutates_args=(),
                         schema="(Tensor q, Tensor cache, float scale, int value_width) -> Tensor")
def _latent_decode_op(q, cache, scale, value_width):
    from kernels import triton_decode
    return triton_decode.latent_decode(q, cache, scale, value_width)


@_latent_decode_op.register_fake
def _(q, cache, scale, value_width):
    return q.new_empty(*q.shape[:2], value_width)


# ----------------------------------------------------------------------------- arms: who computes attention

def _triton(q, k, v, scale, first, exact_above=None):
    output, _, maximum = _attention_op(q, k, v, scale, first)
    return output, maximum.detach()


def _sdpa(q, k, v, scale, first, exact_above=None):  # whichever PyTorch takes, which keeps the log-sum-exp to itself
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), max_logit(q, k, scale)


def _cudnn(q, k, v, scale, first, exact_above=None):
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale)
    return output, max_logit(q, k, scale, None, lse, exact_above)


def _flash(q, k, v, scale, first, exact_above=None):  # wants one width for all: values are padded with zeros
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, F.pad(v, (0, q.shape[3] - v.shape[3])), 0.0, True, False, scale=scale)
    return output[..., :v.shape[3]], max_logit(q, k, scale, None, lse, exact_above)


def _flex(q, k, v, scale, first, exact_above=None):
    from torch.nn.attention import flex_attention as flex

    def visible(b, h, query, key):
        return (key <= query) & (first is None or key >= first[b, query])
    B, _, T, _ = q.shape
    mask = flex.create_block_mask(visible, None if first is None else B, None, T, T, device=q.device)
    if hasattr(flex, "AuxRequest"):
        output, extra = flex.flex_attention(q, k, v, block_mask=mask, scale=scale,
                                            return_aux=flex.AuxRequest(max_scores=True))
        return output, extra.max_scores.detach().amax((0, 2))
    return flex.flex_attention(q, k, v, block_mask=mask, scale=scale), max_logit(q, k, scale, first)


ARMS = {"triton": _triton, "cudnn": _cudnn, "flash": _flash, "flex": _flex, "sdpa": _sdpa, "math": attention_math}
KNOW_DOCUMENTS = ("triton", "flex", "math")
HAVE_LSE = (_cudnn, _flash)  # exact_above saves them work
COMPILED_ALONE = ("flex",)  # slow unless compiled, as it is in the model
ARM = {}      # arm_key(...) -> name of the arm that causal_attention takes; choose_arm fills it
REASONS = {}  # arm_key(...) -> {arm: why it is no candidate}


def arm_key(q_shape, value_width, dtype, documents):
    """What a choice depends on, in plain values: Q, V, T, H, dtype, whether there are documents."""
    _, H, T, Q = q_shape
    return Q, value_width, T, H, str(dtype), documents


def _default_arm(q_BHTQ, documents):
    if q_BHTQ.is_cuda and not documents:
        return "sdpa"  # at lengths where nothing was measured: neither compiled nor checked by us
    return "triton" if backend.triton_runs(q_BHTQ) else "math"


def causal_attention(q_BHTQ, k_BHTQ, v_BHTV, scale, first_BT=None, exact_above=None):
    """Returns (o_BHTV, max_logit_H): softmax(scale * q k^T, causal) v, and the largest scaled logit of every head
    (fp32, signed, no gradient) over the batch and all unmasked pairs. scale > 0. first_BT: see the top of this file.
    exact_above, a tensor () in fp32: the maximum need be exact only where it lies above; where not, what is returned
    lies between the maximum and exact_above, and may be an upper bound of at most the maximum + log T."""
    documents = first_BT is not None
    name = ARM.get(arm_key(q_BHTQ.shape, v_BHTV.shape[3], q_BHTQ.dtype, documents)) or _default_arm(q_BHTQ, documents)
    return ARMS[name](q_BHTQ, k_BHTQ, v_BHTV, scale, first_BT, exact_above)


@torch.no_grad()
def max_logit(q_BHTQ, k_BHTQ, scale, first_BT=None, lse=None, exact_above=None):
    """The largest scaled, unmasked logit of every head (H,), fp32. lse: the queries' log-sum-exp, fp32, (B, H, T) or
    (B, H, T, 1); with it most scores need not be computed, and exact_above counts (see causal_attention)."""
    function = _max_logits_op if backend.triton_runs(q_BHTQ) else max_logit_math
    if lse is None or not lse.numel():
        return function(q_BHTQ, k_BHTQ, scale, first_BT)
    lse_BHT = lse.reshape(q_BHTQ.shape[:3])
    return function(q_BHTQ, k_BHTQ, scale, first_BT, lse_BHT, skip_below(lse_BHT, first_BT, exact_above))


def skip_below(lse_BHT, first_BT=None, exact_above=None):
    """(H,): queries whose log-sum-exp lies below this cannot hold the maximum of their head, or hold one that is not
    asked for. With n visible keys, LSE - log n <= the largest logit <= LSE. NaN, so nothing is skipped, where a
    log-sum-exp of the head is NaN or infinite."""
    last = torch.arange(lse_BHT.shape[2], device=lse_BHT.device)
    visible = last + 1 if first_BT is None else (last + 1 - first_BT).unsqueeze(1)
    below_H = (lse_BHT - visible.log()).amax((0, 2))
    if exact_above is not None:
        below_H = torch.maximum(below_H, exact_above)
    return below_H - 1e-3 * (1 + below_H.abs())  # more than the rounding of the log-sum-exp and of the scores


def latent_decode(q_BHW, cache_BSW, scale, value_width):
    """One new query per sequence against MLA's cache in the absorbed form (DeepSeek-V2, arXiv 2405.04434, section
    2.1.2): o_BHR = softmax(scale * q cache^T) cache[..., :R], with R = value_width. No gradient."""
    function = _latent_decode_op if backend.triton_runs(q_BHW) else latent_decode_math
    return function(q_BHW, cache_BSW, scale, value_width)


def forward_and_backward(arm, tensors, scale, first, exact_above=None):
    """(o, max_H, dq, dk, dv) of an arm on q, k, v and the output's gradient."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output, maximum = arm(*tensors[:3], scale, first, exact_above)
    return output.detach(), maximum, *torch.autograd.grad(output, tensors[:3], tensors[3].detach())


def sample(B, H, T, Q, V, dtype, device, documents):
    """q, k, v and the output's gradient as views of (B, T, H, width), as the model has them; document starts."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [torch.randn(B, T, H, width, generator=generator, device=device).to(dtype).transpose(1, 2)
               for width in (Q, Q, V, V)]
    starts = torch.arange(T, dtype=torch.int32, device=device)
    length = max(1, T // 3)
    return tensors, (starts // length * length).expand(B, T).contiguous() if documents else None


def wrong(arm, H, T, Q, V, dtype, device, documents):
    """Why an arm's result on a small input is no good, or None: errors may be twice those of the twin in this dtype.
    The small input is of a kind (multiples of 16) for which Triton compiles what the large one needs, and no more."""
    tensors, first = sample(1, min(H, 16), min(T, 256), Q, V, dtype, device, documents)
    exact = forward_and_backward(attention_math, [tensor.double() for tensor in tensors], Q**-0.5, first)
    twin = forward_and_backward(attention_math, tensors, Q**-0.5, first)
    ours = forward_and_backward(arm, tensors, Q**-0.5, first)
    for name, right, usual, got in zip(("output", "maximum", "dq", "dk", "dv"), exact, twin, ours):
        error, limit = (got - right).abs().max(), 2 * (usual - right).abs().max() + 1e-4 * right.abs().max()
        if not error <= limit:
            return f"{name} is off by {error:.2g}"
    if arm in HAVE_LSE:
        return _wrong_maximum(arm, *tensors[:3], Q**-0.5)


@torch.no_grad()
def _wrong_maximum(arm, q, k, v, scale):
    """As wrong, of what is made of a log-sum-exp; later queries are peaked in half of the heads, so that the earlier
    ones are left out where the maximum is sought."""
    q, T = q.clone(), q.shape[2]
    q[:, ::2, T // 2:] *= 8
    right = max_logit_math(q.double(), k.double(), scale)
    exact, bounds = (arm(q, k, v, scale, None, limit)[1] - right for limit in (None, right.new_tensor(1e9)))
    slack = 1e-3 * right.abs().max()
    if not exact.abs().max() <= slack:
        return f"maximum is off by {exact.abs().max():.2g} where scores are left out"
    if not (bounds.min() >= -slack and bounds.max() <= math.log(T) + slack):
        return f"bounds lie {bounds.min():.2g} to {bounds.max():.2g} above the maximum"


def last_resorts(device, documents, how):
    """Arms that never win on CUDA: math, without documents flex, which compiles for many seconds, and there from Hopper
    on Triton's (1.51 ms where cuDNN's takes 1.13, its closest), which how = "full" asks nevertheless."""
    if device.type != "cuda":
        return ()
    if documents:
        return ("math",)
    triton_loses = how != "full" and torch.cuda.get_device_capability(device) >= (9, 0)
    return ("triton",) * triton_loses + ("flex", "math")


def choose_arm(q_shape, value_width, dtype, device, documents=False, how="auto"):
    """Measure the arms that can run and are right, forward and backward, at this size; causal_attention takes the
    fastest from now on. last_resorts are asked only if no other is right. Maxima are exact nowhere, as in a step that
    is not logged. Returns a line to print. Where another rank has chosen: ARM[arm_key(...)] = name."""
    (B, H, T, Q), V, device = q_shape, value_width, torch.device(device)
    tensors, first = sample(B, H, T, Q, V, dtype, device, documents)
    nowhere, speeds, reasons = torch.tensor(1e9, device=device), {}, {}
    last = last_resorts(device, documents, how)
    for name in sorted(ARMS, key=lambda name: name in last):  # the others in their order
        if documents and name not in KNOW_DOCUMENTS:
            reasons[name] = "no documents"
        elif name == "triton" and not backend.triton_runs(tensors[0]):
            reasons[name] = "kernels are off"
        elif name not in ("triton", "sdpa", "math") and device.type != "cuda":
            reasons[name] = "CUDA only"
        elif not (name in last and speeds):
            arm = torch.compile(ARMS[name], dynamic=False) if name in COMPILED_ALONE else ARMS[name]
            try:
                reasons[name] = wrong(arm, H, T, Q, V, dtype, device, documents)
                if reasons[name] is None:
                    speeds[name] = backend.milliseconds(
                        lambda arm=arm: forward_and_backward(arm, tensors, Q**-0.5, first, nowhere), device)
            except Exception as error:  # whatever a library says: it does not compete
                reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    key = arm_key(q_shape, V, dtype, documents)
    REASONS[key] = {name: why for name, why in reasons.items() if why}
    ARM[key] = min(speeds, key=speeds.get, default=None)  # None: the default
    return f"attention {Q}/{V}{' with documents' * documents}: {ARM[key]}, ms: " + ", ".join(
        f"{name} {speeds[name]:.2f}" if name in speeds else f"{name} - ({reasons.get(name, 'not asked'):.80})"
        for name in ARMS)
