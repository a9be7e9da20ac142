"""The reader: streamed datasets, mixtures, reading ahead; any ranks, any resume. Packing: test_documents.py."""

import collections
import itertools
import json
import math
import threading
import time
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data.stream
from data import sources, tokenizer
from data.loader import TrainStream, ValidationSet, prefetch
from data.shards import Writer
from errors import UserError
from kernels.cross_entropy import IGNORE
from model import ModelConfig, build
from run import checkpoint
from settings import load
from tests.helpers import assert_equal_runs, make_data, records, run_script, run_train

BYTES = tokenizer.load("bytes")
END = tokenizer.end_of_text(BYTES)
TEXTS = [f"document {i} " + "abcdefgh"[i % 8] * (i * 37 % 90) for i in range(60)]
TEXTS[7], TEXTS[20], TEXTS[33] = "", "   \n", "long " * 400


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    """A local dataset of three files, for datasets' own loader."""
    folder = tmp_path_factory.mktemp("hub")
    for part in range(3):
        rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS[part * 20:part * 20 + 20])]
        (folder / f"part-{part}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def in_memory(monkeypatch):
    """sources.open_hf gives TEXTS as a streaming dataset without any file; returns the rows that were asked for."""
    opened = []

    def open_hf(repo, split="train", name=None, text_column=None, streaming=True):
        texts = TEXTS if split == "train" else ["held out text " * 3]
        opened.append((repo, split, name, text_column))
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(), "text"

    monkeypatch.setattr(sources, "open_hf", open_hf)
    return opened


def write(folder, documents, shard_tokens=1000, vocab=257):
    with Writer(folder, vocab, shard_tokens) as writer:
        for document in documents:
            writer.write("train", document, len(document))
        writer.write("val", [1, 2, 3], 3)
        writer.finish(lambda path: None)
    return str(folder)


def numbered(lengths, vocab=60_000):
    """Documents of these lengths whose tokens, after the separator END, are all different."""
    numbers = itertools.cycle(range(300, vocab))
    return [[END, *itertools.islice(numbers, length - 1)] for length in lengths]


def flat_texts(held_out=0, epochs=3):
    """What a streamed run of TEXTS sees, as one list of bytes and separators."""
    kept = [text for text in TEXTS[held_out:] if text.strip()]
    return [id_ for text in kept for id_ in (END, *text.encode())] * epochs


# ---------------------------------------------------------------------- data="hf:..."


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_a_streamed_dataset_is_its_documents_in_order_epoch_after_epoch(jsonl, chunk, monkeypatch, capsys):
    monkeypatch.setattr(data.stream, "CHUNK", chunk)
    stream, flat = TrainStream(f"hf:{jsonl}?validation=3", 16, 0, encoder=BYTES), flat_texts(held_out=3)
    n = (len(flat) - 1) // 16
    assert [stream.sequence(i).tolist() for i in range(n)] == [flat[16 * i:16 * i + 17] for i in range(n)]
    assert stream.sequence(5).tolist() == flat[80:97] and stream.sequence(0).tolist() == flat[:17]  # backwards
    assert "epoch 2 begins" in capsys.readouterr().out
    assert stream.max_id() == END and stream.epochs(10**6) == 0


def test_the_first_documents_are_held_out_or_a_split_is(jsonl, in_memory):
    validation = ValidationSet("hf:some/repo?validation=5", 16, 100, encoder=BYTES)
    seen = [id_ for inputs, targets in validation.batches(4) for id_ in targets[targets != IGNORE].tolist()]
    texts = [id_ for text in TEXTS[:5] for id_ in (END, *text.encode())]
    assert seen == texts[1:]
    assert validation.bytes_per_token == pytest.approx(sum(len(t) for t in TEXTS[:5]) / (len(texts) - 1))
    part = ValidationSet("hf:some/repo?validation=5", 16, 2, encoder=BYTES)
    assert part.bytes == 32 - texts[1:33].count(END) < validation.bytes
    validation = ValidationSet("hf:some/repo:de?split=train&column=c&validation=test", 16, 100, encoder=BYTES)
    assert in_memory[-1] == ("some/repo", "test", "de", "c")
    assert bytes(validation.sources[0].split.arrays[0][1:].tolist()) == b"held out text " * 3
    story = data.stream.parse("hf:tinystories")
    assert story == (("roneneldan/TinyStories", "train", None, None), "validation", 0)
    assert data.stream.parse("hf:fineweb:sample-100BT")[0][2] == "sample-100BT"


@pytest.mark.parametrize("spec, message", [
    ("hf:", "expected hf:REPO"), ("hf:a/b?colum=x", "unknown: colum"), ("hf:a/b?split=", "expected hf:REPO"),
    ("hf:a/b?validation=train", "is the split that is trained on"),
    ("hf:tinystories?split=validation", "is the split that is trained on"),
    ("hf:a/b?validation=60", "no text beyond its first 60")])
def test_wrong_specs_are_named(in_memory, spec, message):
    with pytest.raises(UserError, match=message):
        TrainStream(spec, 16, 0, encoder=BYTES).sequence(0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 4]))
def test_streamed_resume_at_any_step_is_exact_on_any_ranks_and_reads_on(step, ranks, ranks_after):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open_hf", lambda *_: (
            datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), "text"))
        patch.setattr(data.stream, "CHUNK", 4)
        make = lambda: TrainStream("hf:x?validation=2", 16, 0, encoder=BYTES)
        size, flat, encode = 12, flat_texts(held_out=2, epochs=9), tokenizer.encode
        *_, (_, _, places) = prefetch(make(), torch.device("cpu"), range(1, step + 1), 0, size, size // ranks, 0, ranks)
        assert places["hf:x?validation=2"][0] <= step * size
        for known in (json.loads(json.dumps(places)), {}):  # {}: from the start
            got = {}
            for rank in range(ranks_after):
                stream, tokenised = make(), []
                patch.setattr(tokenizer, "encode", lambda e, text, t=tokenised: t.append(text) or encode(e, text))
                stream.go_to(known)
                got[rank] = stream.batch(step * size + rank * size // ranks_after, size // ranks_after)[0]
                patch.setattr(tokenizer, "encode", encode)
                total = sum(len(text) + 1 for text in tokenised)
                assert 0 < total < 2 * (size * 17) + 4 * 2100 or not known  # a step's worth, not all that came before
            rows = torch.cat(list(got.values())).tolist()
            first = step * size
            assert rows == [flat[16 * i:16 * i + 16] for i in range(first, first + size)]


# ---------------------------------------------------------------------- the same for all ranks, whatever the kind


def every_kind(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 40, 400).tolist()
    folder = write(tmp_path / "d", numbered(lengths), vocab=60_000)
    other = write(tmp_path / "e", numbered([9] * 60), vocab=60_000)
    streamed = "hf:x?validation=2"
    return {"concat": (folder, {}), "best_fit": (folder, {"packing": "best_fit"}), "stream": (streamed, {}),
            "mixture": ({folder: 2, other: 1}, {}), "packed mixture": ({folder: 2, other: 1}, {"packing": "best_fit"}),
            "mixture with a stream": ({folder: 1, streamed: 1}, {})}


@pytest.mark.parametrize("kind", ["concat", "best_fit", "stream", "mixture", "packed mixture", "mixture with a stream"])
def test_ranks_share_one_global_sequence_and_any_step_can_be_the_first(tmp_path, in_memory, kind):
    source, options = every_kind(tmp_path)[kind]
    make = lambda: TrainStream(source, 16, seed=5, encoder=BYTES, **options)
    whole = make()
    inputs, targets = whole.batch(0, 24 * 4)
    cpu = torch.device("cpu")
    for ranks, micro in ((1, 24), (2, 6), (3, 8), (4, 3), (8, 3)):
        shares = [prefetch(make(), cpu, range(1, 5), 0, 24, micro, rank, ranks) for rank in range(ranks)]
        got = [batch[:2] for round_ in zip(*shares) for batch in round_]
        assert torch.equal(torch.cat([i for i, _ in got]), inputs), ranks
        assert torch.equal(torch.cat([t for _, t in got]), targets), ranks
    for step in (3, 1):  # without any record
        [(again, _, _)] = prefetch(make(), cpu, range(step + 1, step + 2), 24 * step, 24, 24)
        assert torch.equal(again, inputs[24 * step:24 * step + 24])
    assert len(set(map(tuple, inputs.tolist()))) > 50  # it is not one row again and again
    if kind == "mixture with a stream":  # the record of rank 0 leads every rank to its own rows
        *_, (_, _, places) = prefetch(make(), cpu, range(1, 3), 0, 24, 6, 0, 2)
        resumed = make()
        resumed.go_to(places)
        assert torch.equal(resumed.batch(24 * 2, 24)[0], inputs[48:72]) and list(places) == ["hf:x?validation=2"]


def test_mixture_shares_over_10000_sequences(tmp_path):
    weights = {"a": 0.55, "b": 0.3, "c": 0.15}
    folders = {write(tmp_path / name, [[i] * 3000], vocab=300): weights[name] for i, name in enumerate(weights)}
    counts = collections.Counter(int(s[0]) for s in map(TrainStream(folders, 10, 1).sequence, range(10_000)))
    assert all(abs(counts[i] / 10_000 - weight) < 0.01 * weight for i, weight in enumerate(weights.values()))


def test_llm_c_and_modded_nanogpt_shards_train_as_downloaded(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, 5000
        (tmp_path / name).write_bytes(header.tobytes() + rng.integers(0, 50257, 5000).astype(np.uint16).tobytes())
    train = (tmp_path / f"fineweb_train_00000{i}.bin" for i in (1, 2))
    raw = np.concatenate([np.fromfile(path, np.uint16, offset=1024) for path in train])
    stream = TrainStream(str(tmp_path), 100, 0)
    windows = sorted(stream.sequence(i).tolist() for i in range(99))
    assert windows == sorted(raw[100 * i:100 * i + 101].tolist() for i in range(99))
    assert sum(int((t != IGNORE).sum()) for _, t in ValidationSet(str(tmp_path), 100, 10**6).batches(8)) == 4999


def test_reading_an_epoch_keeps_no_memory(tmp_path):
    for packing in ("concat", "best_fit"):
        folder = write(tmp_path / packing, numbered([500] * 4000), shard_tokens=500_000, vocab=60_000)
        stream = TrainStream(folder, 512, 0, encoder=BYTES, packing=packing)
        stream.batch(0, 8)
        tracemalloc.start()
        for first in range(8, stream.sources[0].count - 8, 8):
            stream.batch(first, 8)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4e6, packing  # 2 million tokens are 16 MB


# ---------------------------------------------------------------------- reading ahead


class Numbers:
    """A stream whose batch is its number."""

    def __init__(self, fails=None):
        self.fails, self.made = fails, []

    def batch(self, first, size):
        if self.fails and first >= 40:
            raise self.fails
        self.made.append(first)
        return torch.tensor([[first]]), torch.tensor([[size]])

    def places(self):
        return {"made": len(self.made)}


def test_prefetch_is_ahead_but_not_far_and_ends_with_its_reader():
    stream, before = Numbers(), threading.active_count()
    batches = prefetch(stream, torch.device("cpu"), range(1, 1000), 0, 8, 4, ahead=2)
    assert [int(next(batches)[0]) for _ in range(3)] == [0, 4, 8]
    deadline = time.time() + 5
    while len(stream.made) < 6 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(stream.made) == 6  # 3 taken, 2 waiting, 1 in the thread's hand
    inputs, targets, places = next(batches)
    assert places == {"made": 4}  # the place belongs to the batch, however far the thread is
    batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("error, expected, message", [
    (OSError("disk on fire"), UserError, "data of step 6 cannot be read: disk on fire"),
    (UserError("row 7 is no text"), UserError, "step 6.*row 7 is no text"), (KeyError("bug"), KeyError, "bug")])
def test_errors_of_the_thread_come_to_the_step_that_wants_the_data(error, expected, message):
    batches = prefetch(Numbers(error), torch.device("cpu"), range(1, 100), 0, 8, 8)
    got = [int(next(batches)[0]) for _ in range(5)]
    with pytest.raises(expected, match=message) as caught:
        next(batches)
    assert got == [0, 8, 16, 24, 32]
    assert expected is UserError or "at step 6" in caught.value.__notes__[0]


def test_silence_is_an_error_and_the_interpreter_still_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, torch\nsys.path.insert(0, '.')\nfrom data.loader import prefetch\n"
        "class Stuck:\n"
        "    def batch(self, first, size):\n        time.sleep(1000)\n"
        "try:\n    next(prefetch(Stuck(), torch.device('cpu'), range(1, 9), 0, 8, 8, timeout=0.05))\n"
        "except ValueError as error:\n    print(error)\n")
    started = time.time()
    done = run_script(script, check=0)
    assert "no batch came for 1 s" in done.stdout and time.time() - started < 60


# ---------------------------------------------------------------------- whole runs


def test_a_streamed_run_resumes_bitwise_and_quickly(config, jsonl, tmp_path, monkeypatch):
    words = [config, f"--data=hf:{jsonl}?validation=4", "--tokenizer=bytes", "--document_mask", "--eval_interval=4"]
    run_train(*words, f"--out_dir={tmp_path / 'whole'}", "--max_steps=8", "--schedule=constant")
    run_train(*words, f"--out_dir={tmp_path / 'parts'}", "--max_steps=4", "--schedule=constant")
    place = checkpoint.read_manifest(checkpoint.find(tmp_path / "parts"))["places"][f"hf:{jsonl}?validation=4"]
    assert place[0] == 4 * 8 and place[2] > 4
    rows = []
    original = data.stream._rows
    monkeypatch.setattr(data.stream, "_rows", lambda opened, first: rows.append(first) or original(opened, first))
    run_train(*words, f"--out_dir={tmp_path / 'parts'}", "--max_steps=8", "--schedule=constant", "--resume")
    assert place[2] in rows
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    first, last = records(tmp_path / "whole", "val")
    assert last["loss"] < first["loss"] and first["bits_per_byte"] > 0


def test_a_streamed_run_goes_from_two_ranks_to_one_and_a_packed_one_is_the_same_on_both(config, jsonl, pool, tmp_path):
    words = [config, f"--data=hf:{jsonl}?validation=4", "--tokenizer=bytes", "--document_mask", "--schedule=constant"]
    run_train(*words, f"--out_dir={tmp_path / 'one'}", "--max_steps=8")
    pool.run(2, run_train, *words, f"--out_dir={tmp_path / 'parts'}", "--max_steps=5")
    pool.run(1, run_train, *words, f"--out_dir={tmp_path / 'parts'}", "--max_steps=8", "--resume")
    folder = write(tmp_path / "d", [[END, *[i % 200] * (5 + i % 37)] for i in range(300)])
    words = [config, f"--data={folder}", "--tokenizer=bytes", "--packing=best_fit", "--max_steps=4"]
    pool.run(1, run_train, *words, f"--out_dir={tmp_path / 'packed'}")
    pool.run(2, run_train, *words, f"--out_dir={tmp_path / 'packed 2'}", "--micro_batch_size=2")
    for one, other in (("one", "parts"), ("packed", "packed 2")):
        for mine, reference in zip(records(tmp_path / other), records(tmp_path / one), strict=True):
            assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-5)
            assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_the_loss_of_packed_sequences_is_the_mean_over_the_targets_there_are(config, tmp_path):
    folder = write(tmp_path / "d", [[END, *[i % 200] * 20] for i in range(300)])  # 33 places hold one of 21, 12 stay
    run_train(config, f"--data={folder}", "--tokenizer=bytes", "--packing=best_fit", "--max_steps=1", "--document_mask")
    stream = TrainStream(folder, 32, 0, encoder=BYTES, packing="best_fit", document_mask=True)
    assert stream.sources[0].padding == pytest.approx(12 / 33)
    stored = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    model = build(ModelConfig(**{k: v for k, v in stored.items() if k in ModelConfig.__dataclass_fields__}), "cpu")
    model.init_weights(0)
    inputs, targets = stream.batch(0, 8)
    logits = model(inputs, first_BT=stream.starts(inputs))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    record = records(tmp_path / "run")[0]
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-2)  # the balance loss has a part in it


def test_bits_per_byte_of_a_run_is_by_the_bytes_of_what_it_evaluated(config, pool, tmp_path):
    val = [id_ for i in range(60) for id_ in (END, *([i] * 9 if i > 30 else []))]  # many separators at the beginning
    with Writer(tmp_path / "d", 257) as writer:
        for split, ids in (("train", [END, *[7] * 20] * 200), ("val", val)):
            writer.write(split, ids, sum(id_ != END for id_ in ids))
        writer.finish(lambda path: tokenizer.save(BYTES, path), **tokenizer.describe(BYTES))
    words = [config, f"--data={tmp_path / 'd'}", "--eval_interval=1", "--eval_batches=1", "--schedule=constant"]
    packed = ["--packing=best_fit", "--document_mask"]
    run_train(*words, f"--out_dir={tmp_path / 'one'}", "--max_steps=1")
    pool.run(2, run_train, *words, f"--out_dir={tmp_path / 'one'}", "--max_steps=2", "--resume")
    run_train(*words, *packed, f"--out_dir={tmp_path / 'packed'}", "--max_steps=1", "--micro_batch_size=8")
    targets, found = val[1:257], [*records(tmp_path / "one", "val"), *records(tmp_path / "packed", "val")]
    for record in found:
        bits = record["loss"] * len(targets) / math.log(2)
        assert record["bits_per_byte"] == pytest.approx(bits / sum(id_ != END for id_ in targets))
    assert len(found) == 3 and len(val) > 300


def test_more_than_four_epochs_are_warned_of(tmp_path, config, capsys):
    folder = make_data(tmp_path / "d", n_train=400, n_val=50)  # 12 windows
    for steps, warned in ((6, False), (7, True)):  # 4.0 and 4.7 epochs of steps of 8
        run_train(config, f"--data={folder}", f"--max_steps={steps}", "--overwrite")
        assert ("epochs: beyond four" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("words, message", [
    (["--data=hf:some/repo"], "set --tokenizer"),
    (["--data={'hf:some/repo': 1, 'data/stdlib': 2}"], "set --tokenizer"),
    (["--data=hf:some/repo", "--tokenizer=gpt2", "--packing=best_fit"], "needs folders of shards"),
    (["--packing=worst_fit"], "expected 'concat' or 'best_fit'")])
def test_impossible_settings_are_refused(config, words, message):
    with pytest.raises(UserError, match=message):
        load([config, *words])
