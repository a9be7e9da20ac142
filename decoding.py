"""The loops that make text: token by token, or two at once where a block of multi-token prediction drafts the second.

K2.generate is the first, generate.py offers both. The choice of a token is in sampling.py.

Shapes: B sequences, T tokens.
"""

import torch

from sampling import next_token


@torch.no_grad()
def generate(model, tokens_BT, max_new_tokens, *, starts_B=None, stop=None, use_cache=True, on_slide=lambda: None,
             agree=lambda ids: ids, **sampling):
    """Yield (B,) ids, one tensor per new token; keyword arguments of sampling.next_token choose how. agree(ids) lets
    the ranks of a sharded model go on with one choice. starts_B: pad_left's, where the rows differ in length; what a
    row gives does not depend on the others.

    Rows that produced an id of `stop`, one or a list, go on yielding it and are computed no more; the stream ends when
    all have. When a row fills the context, its newest half becomes its new context and on_slide() is called; cached and
    uncached runs slide alike.
    """
    was_training, limit, device = model.training, model.config.max_position_embeddings, tokens_BT.device
    ends, cache = torch.tensor([] if stop is None else stop, dtype=torch.int64, device=device), None
    history, rows_B = tokens_BT, torch.arange(len(tokens_BT), device=device)
    made_B, starts_B = torch.zeros_like(rows_B), torch.zeros_like(rows_B).int() if starts_B is None else starts_B
    model.eval()
    try:
        window, starts_B, padded = newest(history, starts_B, limit, limit)
        for left in range(max_new_tokens, 0, -1):
            if window.shape[1] > limit:
                on_slide()
                window, starts_B, padded = newest(window, starts_B, limit, max(limit // 2, 1))
                cache = None
            if use_cache and cache is None:
                cache = model.new_cache(len(rows_B), min(limit, window.shape[1] + left))
            seen = cache.length if use_cache else 0
            first_BT = firsts(starts_B, seen, window.shape[1]) if padded else None
            x_BTD, head = before_head(model, window[:, seen:], cache, first_BT)
            ids = agree(next_token(head(x_BTD[:, -1]), history, **sampling))
            yield (made_B := made_B.index_put((rows_B,), ids))
            history, window = (torch.cat((tokens, ids[:, None]), dim=1) for tokens in (history, window))
            if not (done := (ids[:, None] == ends).any(1)).any():
                continue
            if done.all():
                return
            rows_B, history, length = rows_B[~done], history[~done], window.shape[1]
            window, starts_B, padded = newest(window[~done], starts_B[~done], length, length)
            if use_cache:  # without the columns that only those had; the room stays
                unused = length - window.shape[1]
                cache.layers = [layer if layer is None else layer[~done].roll(-unused, 1) for layer in cache.layers]
                cache.length -= unused
            if isinstance(own := sampling.get("generator"), list):
                sampling["generator"] = [one for one, ended in zip(own, done.tolist()) if not ended]
    finally:
        model.train(was_training)


def before_head(model, tokens_BT, cache=None, first_BT=None):
    """(x_BTD, head): head(any part of x) are its logits, fp32, so that they need not be made of every position. Of a
    model in shards, whose weights only its forward gathers, x are the logits themselves."""
    if model.pp > 1 or hasattr(model, "unshard"):  # FSDP2's
        return model(tokens_BT, cache=cache, first_BT=first_BT), lambda x: x
    return model.trunk(tokens_BT, cache, first_BT)[0], lambda x: model.lm_head(x).float()


def pad_left(rows, device=None):
    """(tokens_BT, starts_B int32) of lists of ids: they end in one column, and the places before a row's start repeat
    its first id, so that a penalty on repeats counts only the row's own."""
    width = max(map(len, rows))
    padded = [row[:1] * (width - len(row)) + row for row in rows]
    starts = [width - len(row) for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(starts, dtype=torch.int32, device=device)


def newest(window_BT, starts_B, limit, kept):
    """window_BT and starts_B when of every row longer than `limit` only its newest `kept` are left, without columns
    that nobody needs; and whether any row is padded still."""
    length = window_BT.shape[1]
    starts_B = torch.where(length - starts_B > limit, length - kept, starts_B)
    unused = int(starts_B.min())
    return window_BT[:, unused:], starts_B - unused, bool((starts_B > unused).any())


def firsts(starts_B, begin, end):
    """K2.forward's first_BT of the columns begin..end: where their row starts. Padding sees padding, since a softmax
    over nothing would be NaN."""
    columns_T = torch.arange(begin, end, dtype=torch.int32, device=starts_B.device)
    return starts_B[:, None] * (columns_T >= starts_B[:, None])


@torch.no_grad()
def speculate(model, tokens_BT, max_new_tokens, *, stop=None, on_slide=lambda: None, on_draft=lambda right: None):
    """Yield what generate does at temperature 0 for one sequence (B = 1), from a model in evaluation mode with an
    MTPBlock: it drafts the token after every new one, and the next forward confirms the draft and goes on behind it, or
    corrects it (Leviathan et al., arXiv 2211.17192). on_draft(right) is called for every draft.

    The text is that of generate, but for ties: a forward of two tokens rounds otherwise than one of one.
    """
    limit, cache = model.config.max_position_embeddings, None
    window = tokens_BT[:, -limit:]
    while max_new_tokens > 0:
        if window.shape[1] > limit:
            on_slide()
            window, cache = window[:, -max(limit // 2, 1):], None
        if cache is None:
            cache = model.new_cache(1, min(limit, window.shape[1] + max_new_tokens), mtp=True)
            draft = window[:, :0]
        if window.shape[1] == limit or max_new_tokens == 1:  # no room for two
            draft = window[:, :0]
        start = cache.length
        x_BTD, rope, *_ = model.trunk(torch.cat((window[:, start:], draft), dim=1), cache)
        logits_BTV = model.lm_head(x_BTD[:, window.shape[1] - start - 1:])
        new = [next_token(logits_BTV[:, 0], window, temperature=0)]
        if draft.shape[1]:
            right = bool(new[0] == draft)
            on_draft(right)
            new += [next_token(logits_BTV[:, 1], window, temperature=0)] * right
        for ids in new:
            yield ids
            if int(ids) in ([stop] if isinstance(stop, int) else stop or []):
                return
        max_new_tokens -= len(new)
        window = torch.cat((window, torch.stack(new, dim=1)), dim=1)
        cache.length = seen = window.shape[1] - 1  # a wrong draft is written over
        tables = [table[:seen - start] for table in rope]
        ahead_BTD, *_ = model.ahead(x_BTD[:, :seen - start], window[:, start + 1:], tables, cache.layers[-1], start)
        draft = model.lm_head(ahead_BTD[:, -1:]).argmax(-1)
