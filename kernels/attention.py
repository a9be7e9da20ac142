"""Causal attention for training, with the exact per-head maximum of the scaled logits that QK-clip needs.

`attention_math` is the twin: scores in full, maximum and softmax read off them. On CUDA the output comes from
scaled_dot_product_attention and the maximum from a second, gradient-free pass over the scores. Next: ../model.py (MLA).

Shapes: B batch, H heads, T positions, Q query-key width, V value width (MLA has Q != V).
"""

import torch
import torch.nn.functional as F

QUERY_CHUNK = 128  # rows of scores made at once; keys beyond a chunk's last row are never computed


def causal_attention(q_BHTQ, k_BHTQ, v_BHTV, scale):
    """Returns (o_BHTV, max_logit_H): softmax(scale * q k^T, causal) v, and the largest scaled logit of every head
    (fp32, signed, no gradient) over the batch and all unmasked pairs."""
    if q_BHTQ.device.type == "cuda":
        output = F.scaled_dot_product_attention(q_BHTQ, k_BHTQ, v_BHTV, is_causal=True, scale=scale)
        return output, max_logit(q_BHTQ, k_BHTQ, scale)
    return attention_math(q_BHTQ, k_BHTQ, v_BHTV, scale)


def attention_math(q_BHTQ, k_BHTQ, v_BHTV, scale):
    """Plain attention in chunks of query rows, the same result as causal_attention on every device."""
    outputs, maxima = [], []
    for start in range(0, q_BHTQ.shape[2], QUERY_CHUNK):
        scores, end = _masked_scores(q_BHTQ, k_BHTQ, scale, start)
        maxima.append(scores.detach().amax(dim=(0, 2, 3)))
        outputs.append(scores.softmax(-1).to(v_BHTV.dtype) @ v_BHTV[:, :, :end])
    return torch.cat(outputs, dim=2), torch.stack(maxima).amax(0)


@torch.no_grad()
def max_logit(q_BHTQ, k_BHTQ, scale):
    """The largest scaled, unmasked logit of every head (H,), fp32; scores exist one chunk of rows at a time."""
    chunks = [_masked_scores(q_BHTQ, k_BHTQ, scale, start)[0].amax(dim=(0, 2, 3))
              for start in range(0, q_BHTQ.shape[2], QUERY_CHUNK)]
    return torch.stack(chunks).amax(0)


def _masked_scores(q_BHTQ, k_BHTQ, scale, start):
    end = min(start + QUERY_CHUNK, q_BHTQ.shape[2])
    scores = (q_BHTQ[:, :, start:end] * scale @ k_BHTQ[:, :, :end].mT).float()
    hidden = torch.full((end - start, end), float("-inf"), device=scores.device).triu_(start + 1)  # 0 where visible
    return scores.add_(hidden), end
