"""Documents in sequences: best-fit packing, and attention and positions that stay within a document."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.loader import BLOCK_ROWS, Packed, TrainStream, best_fit
from data.shards import open_split
from errors import UserError
from kernels import backend
from kernels.cross_entropy import IGNORE
from mla import rope_tables
from tests.helpers import tiny_model
from tests.test_loader import BYTES, END, numbered, write

# ---------------------------------------------------------------------- best-fit packing


def slow_best_fit_decreasing(lengths, space):
    """How many bins plain best-fit decreasing fills: another way to write it."""
    left = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, free in enumerate(left) if free >= length]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= length
        else:
            left.append(space - length)
    return len(left)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 70), max_size=60), st.integers(2, 30))
def test_best_fit_splits_no_document_that_fits_and_loses_no_token(lengths, T):
    rows = best_fit(lengths, T)
    assert all(0 < sum(length for *_, length in row) <= T + 1 for row in rows)
    pieces = collections.defaultdict(list)
    for row in rows:
        for number, (document, offset, length) in enumerate(row):
            pieces[document].append((offset, length))
            # What goes on from another row opens this one, but for the shared token.
            assert offset == 0 or number == 0 or row[:number] == [(document, offset - 1, 1)]
    long = [d for d, length in enumerate(lengths) if length > T + 1]
    for document, length in enumerate(lengths):
        if document not in long:
            assert pieces[document] == [(0, length)]
        else:
            targets = [i for offset, n in pieces[document] for i in range(offset, offset + n)]
            assert set(targets) == set(range(length)) and len(targets) - length < len(rows)  # all, and shared ones


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 21), min_size=5, max_size=60))
def test_best_fit_fills_as_few_rows_as_best_fit_decreasing(lengths):
    assert len(best_fit(lengths, 20)) == slow_best_fit_decreasing(lengths, 21)
    assert len(best_fit([6, 6, 6, 15, 15, 15], 20)) == 3


def test_packed_epochs_hold_every_document_whole_wherever_blocks_end(tmp_path):
    rng = np.random.default_rng(1)
    lengths = [*rng.integers(2, 60, 900), 5000, 40, 3, 33, 34, *rng.integers(2, 30, 200)]
    documents = numbered(lengths)
    folder, T = write(tmp_path / "d", [[7, 8, 9], *documents], vocab=60_000), 32  # text before the first separator
    stream = TrainStream(folder, T, 0, encoder=BYTES, packing="best_fit")
    source = stream.sources[0]
    assert sum(lengths) > 3 * BLOCK_ROWS * T and len(source.blocks) > 4
    epochs = []
    for epoch in range(2):
        rows = [stream.sequence(epoch * source.count + i).tolist() for i in range(source.count)]
        found = collections.Counter()
        for row in rows:
            text = [id_ for id_ in row if id_ != IGNORE]
            assert row == text + [IGNORE] * (T + 1 - len(text))
            starts = [i for i, id_ in enumerate(text) if id_ == END] + [len(text)]
            found.update(tuple(text[a:b]) for a, b in zip(starts, starts[1:]))
        assert all(found[tuple(document)] == 1 for document in documents if len(document) <= T + 1)
        seen = collections.Counter(id_ for row in rows for id_ in row)
        assert seen.keys() - {IGNORE} == {id_ for document in documents for id_ in document}  # not 7, 8, 9
        assert source.padding == pytest.approx(seen[IGNORE] / (source.count * (T + 1)))
        epochs.append(rows)
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    inputs, targets = stream.batch(0, 50)
    empty = targets == IGNORE
    assert empty.any() and (inputs[:, 1:][empty[:, :-1]] == END).all() and (inputs >= 0).all()


def test_a_packed_sequence_is_found_without_reading_everything(tmp_path, monkeypatch):
    folder = write(tmp_path / "d", numbered([40] * 8000), vocab=60_000, shard_tokens=10**6)
    source = Packed(open_split(folder, "train"), 64, END, folder)
    read = []
    original = Packed.read
    monkeypatch.setattr(Packed, "read", lambda self, at, n, **dtype: read.append(n) or original(self, at, n, **dtype))
    source.window(source.count // 2)
    assert 0 < sum(read) < 3 * BLOCK_ROWS * 64 < 320_000 / 10


def test_what_packing_leaves_out_is_told_or_refused(tmp_path, capsys):
    def pack(name, documents):
        folder = write(tmp_path / name, documents, vocab=60_000)
        return Packed(open_split(folder, "train"), 16, END, folder)

    pack("d", [[1, 2], *numbered([40] * 50)])
    assert "leaves out the 2 tokens before the first separator" in capsys.readouterr().out
    with pytest.raises(UserError, match="is token 400 of 2,400, and best_fit would leave out.*--packing=concat"):
        pack("e", [[1] * 400, *numbered([40] * 50)])


def test_documents_that_cannot_be_found_are_an_error(tmp_path):
    folder = write(tmp_path / "d", [[1, 2, 3] * 50])
    with pytest.raises(UserError, match="no separator"):
        TrainStream(folder, 16, 0, encoder=BYTES, packing="best_fit")
    for options in ({"packing": "best_fit"}, {"document_mask": True}):
        with pytest.raises(UserError, match="end-of-text token"):
            TrainStream(folder, 16, 0, **options)


# ---------------------------------------------------------------------- documents apart


def documents_and_row():
    generator = torch.Generator().manual_seed(0)
    documents = [torch.cat((torch.tensor([96]), torch.randint(0, 96, (n,), generator=generator)))
                 for n in (9, 1, 14, 6)]
    return documents, torch.cat(documents)[None]


def starts_of(inputs):
    stream = TrainStream.__new__(TrainStream)
    stream.separator, stream.document_mask = 96, True
    return stream.starts(inputs)


def test_where_documents_start():
    inputs = torch.tensor([[5, 96, 1, 2, 96, 96, 3], [96, 1, 1, 1, 1, 1, 96]])
    starts = starts_of(inputs)
    assert starts.tolist() == [[0, 1, 1, 1, 4, 5, 5], [0, 0, 0, 0, 0, 0, 6]]
    assert starts.dtype == torch.int32 and starts.is_contiguous()


def test_positions_restart_with_the_document():  # which logits do not show: RoPE knows distances only
    model, first = tiny_model(), starts_of(documents_and_row()[1])
    table = rope_tables(model.config, 0, first.shape[1], model.device)
    places = torch.cat([torch.arange(len(document)) for document in documents_and_row()[0]])
    for restarted, plain in zip(rope_tables(model.config, 0, first.shape[1], model.device, first), table):
        assert torch.equal(restarted[0], plain[places])


@pytest.mark.parametrize("options", [
    {}, {"attention": "mha"}, {"triton": True}, {"recompute": "full"}, {"recompute": "selective"},
    {"q_lora_rank": 12, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}}])
def test_a_masked_row_is_every_document_alone(options):
    options = dict(options)
    triton, recompute = options.pop("triton", False), options.pop("recompute", "none")
    documents, row = documents_and_row()
    # Balance looks at whole sequences: without it, the loss of a row is the sum over its documents.
    model = tiny_model(num_hidden_layers=2, **options).train()
    for layer in model.layers:
        layer.recompute = recompute
    with backend.running(triton):
        first = starts_of(row)
        targets = row.roll(-1, 1)
        for document_end in torch.tensor([len(d) for d in documents]).cumsum(0):
            targets[0, document_end - 1] = IGNORE
        loss, _ = model(row, targets, first_BT=first)
        packed_grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        maximum = model.max_logits.clone()
        logits = model.eval()(row, first_BT=first)[0]
    model.train()
    model.reset_statistics()
    parts, total = [], 0
    for document in documents:
        alone = document[None]
        loss, _ = model(alone, torch.cat((alone[:, 1:], torch.tensor([[IGNORE]])), 1))
        total = total + loss
        parts.append(model.eval()(alone)[0])
        model.train()
    grads = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert torch.allclose(logits, torch.cat(parts), atol=1e-5)
    assert torch.allclose(maximum, model.max_logits, atol=1e-4)  # QK-clip sees no pair across documents
    for ours, alone in zip(packed_grads, grads):
        assert (ours is None) == (alone is None)
        assert ours is None or torch.allclose(ours, alone, atol=1e-5 + 1e-4 * alone.abs().max().item())
    plain = model.eval()(row)[0]
    assert not torch.allclose(plain[10:], torch.cat(parts)[10:], atol=1e-3)  # the mask did something


def test_a_compiled_block_takes_documents():
    documents, row = documents_and_row()
    model = tiny_model(num_hidden_layers=1, first_k_dense_replace=1)
    expected = model(row, first_BT=starts_of(row))
    model.layers[0].forward = torch.compile(model.layers[0].forward, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.allclose(model(row, first_BT=starts_of(row)), expected, atol=1e-6)
