"""Choosing the next token from logits: temperature, top-k, top-p, min-p and the repetition penalty.

Used by K2.generate in model.py. Shapes: B sequences, V vocabulary, T tokens so far.
"""

import torch

from errors import UserError

# Between what an option lies, ends included.
RANGES = {"temperature": (0, 1e9), "top_k": (1, 2**63), "top_p": (0, 1), "min_p": (0, 1),
          "repetition_penalty": (0.01, 100)}


OPTIONS = RANGES | {"max_new_tokens": (1, 2**31), "seed": (0, 2**63 - 1)}
WHOLE, MAY_BE_NONE = ("top_k", "max_new_tokens", "seed"), ("top_k", "top_p", "min_p")


def check(mark="--", /, **options):
    """A UserError for an option that cannot have its value; NaN is outside of all ranges. mark: what stands before the
    name where the value is from."""
    for name, value in options.items():
        (low, high), whole, none = OPTIONS[name], name in WHOLE, name in MAY_BE_NONE
        if none and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise UserError(f"{mark}{name} must be a {'whole ' * whole}number{' or none' * none}")
        if not low <= value <= high:
            raise UserError(f"{mark}{name}={value} must lie between {low} and {high:,}")


def next_token(logits_BV, history_BT, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
               generator=None):
    """Sample one id per row, (B,) int64. temperature 0 is greedy. The filters apply after the temperature, in the order
    top_k, top_p, min_p; each keeps at least the most likely token. generator: a list gives every row its own, so that
    its choices are those it would make alone.

    repetition_penalty > 1 makes ids that stand in history_BT less likely: positive logits are divided by it, negative
    ones multiplied (CTRL, arXiv 1909.05858, section 4.1, with the sign handled).
    """
    check(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    logits = logits_BV.float()
    if not logits.isfinite().all():
        raise UserError("the model gives NaN or infinite logits, of which no token can be chosen: try --dtype=float32, "
                        "or an earlier checkpoint")
    if repetition_penalty != 1.0:
        seen = logits.gather(1, history_BT)
        seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
        logits = logits.scatter(1, history_BT, seen)
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # the limit, not inf, where it is tiny
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        probs, index = logits.softmax(-1).sort(descending=True)
        drop = probs.cumsum(-1) - probs >= top_p  # the mass before this token already reaches top_p
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, index, drop), float("-inf"))
    if min_p is not None:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    probs = logits.softmax(-1)
    if isinstance(generator, list):
        return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in zip(probs, generator, strict=True)])
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)
