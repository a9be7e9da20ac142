"""Texts of several lengths in one forward: each is what it is alone."""

import pytest
import torch

from decoding import firsts, newest, pad_left
from model import K2
from sampling import next_token
from tests.helpers import tiny_model, tokens
from tests.test_generate import MODELS

LENGTHS = (5, 60, 1, 33, 100)  # the context is 64: the last is cut, the second soon full


def rows_of(lengths):
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]


def alone(model, row, n, **options):
    return [int(ids) for ids in model.generate(torch.tensor([row]), n, **options)]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_greedy_text_of_a_batch_is_that_of_one_by_one_also_past_the_context(changes):
    model, rows = tiny_model(**changes), rows_of(LENGTHS)
    expected = [alone(model, row, 70, temperature=0) for row in rows]
    padded, starts = pad_left(rows)
    for use_cache in (True, False):
        found = model.generate(padded, 70, starts_B=starts, temperature=0, use_cache=use_cache)
        assert torch.stack(list(found), 1).tolist() == expected


def test_logits_of_a_padded_row_are_those_of_the_row():
    model, rows = tiny_model().eval(), rows_of((5, 40, 17))
    padded, starts = pad_left(rows)
    with torch.no_grad():
        cache = model.new_cache(3, 64)
        parts = [model(padded[:, low:high], cache=cache, first_BT=firsts(starts, low, high))
                 for low, high in ((0, 20), (20, 39), (39, 40))]
        for row, logits, start in zip(rows, torch.cat(parts, dim=1), starts):
            assert (logits[start:] - model(torch.tensor([row]))[0]).abs().max() <= 1e-4
        assert all(layer.isfinite().all() for layer in cache.layers)


def test_sampled_rows_draw_from_generators_of_their_own():
    model, rows = tiny_model(), rows_of((9, 3, 20))
    options = dict(temperature=1.0, top_k=30, top_p=0.95, repetition_penalty=1.3)
    seeded = lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4, 3)]
    expected = [alone(model, row, 30, generator=own, **options) for row, own in zip(rows, seeded())]
    padded, starts = pad_left(rows)
    found = model.generate(padded, 30, starts_B=starts, generator=seeded(), **options)
    assert torch.stack(list(found), 1).tolist() == expected
    with pytest.raises(ValueError):  # as many generators as rows
        next_token(torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64), generator=seeded())


def test_what_is_padded_and_what_a_full_row_keeps():
    padded, starts = pad_left([[7, 8], [1, 2, 3, 4, 5]])
    assert padded.tolist() == [[7, 7, 7, 7, 8], [1, 2, 3, 4, 5]] and starts.tolist() == [3, 0]
    assert firsts(starts, 0, 5).tolist() == [[0, 0, 0, 3, 3], [0] * 5]
    assert firsts(starts, 2, 4).tolist() == [[0, 3], [0, 0]]
    window, starts, some = newest(padded, starts, 4, 2)  # the long row is full and keeps two
    assert window.tolist() == [[7, 8], [4, 5]] and starts.tolist() == [0, 0] and not some
    window, starts, some = newest(*pad_left([[7], [1, 2, 3, 4, 5]]), 4, 3)
    assert window.tolist() == [[7, 7, 7], [3, 4, 5]] and starts.tolist() == [2, 0] and some


@pytest.mark.parametrize("changes", [{}, {"attention": "mha"}], ids=str)
def test_rows_that_ended_are_dropped_and_fill_no_context(changes, monkeypatch):
    """The longest row ends early: the others stay within the context, nothing is read anew, and all draw as alone."""
    model, rows, slides, seen, plain = tiny_model(**changes), rows_of((50, 3, 20, 11)), [], [], K2.trunk
    seeded = lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]
    free = [alone(model, row, 40, generator=own) for row, own in zip(rows, seeded())]
    stops = [next(token for token in free[0][:8] if all(token not in ids[:20] for ids in free[1:])), free[2][25]]
    expected = [ids[:next((i + 1 for i, token in enumerate(ids) if token in stops), 40)] for ids in free]
    assert len(expected[0]) <= 8 and len({*map(len, expected)}) > 2 and max(map(len, expected)) > 20
    monkeypatch.setattr(K2, "trunk", lambda *args: seen.append(args[1].shape) or plain(*args))
    padded, starts = pad_left(rows)
    for use_cache in (True, False):
        seen.clear()
        found = torch.stack(list(model.generate(padded, 40, starts_B=starts, generator=seeded(), use_cache=use_cache,
                                                stop=stops, on_slide=lambda: slides.append(1))), 1).tolist()
        for row, wanted in zip(found, expected):
            assert row[:len(wanted)] == wanted and set(row[len(wanted):]) <= {wanted[-1]}
        assert not slides and sum(shape[0] for shape in seen) == sum(map(len, expected))
        assert use_cache is False or {shape[1] for shape in seen[1:]} == {1}
    assert max(shape[1] for shape in seen) < 64
