"""Shards, tokenizers, preparation and the deterministic stream."""

import collections
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare, tokenizer
from data.loader import MIXTURE_BLOCK, TrainStream, ValidationSet, shuffled
from data.shards import HEADER, Writer, open_split
from errors import UserError
from kernels.cross_entropy import IGNORE
from tests.helpers import ROOT, make_data, run_script


def write(folder, vocab, documents, shard_tokens=1000):
    with Writer(folder, vocab, shard_tokens) as writer:
        for split, tokens in documents:
            writer.write(split, tokens, 3 * len(tokens))
        writer.finish(lambda path: tokenizer.save(tokenizer.load("bytes"), path), tokenizer="bytes")
    return folder


# ---------------------------------------------------------------------- shards


@pytest.mark.parametrize(
    "vocab, magic, version, dtype", [(65536, 20240520, 1, np.uint16), (163840, 20240801, 7, np.uint32)]
)
def test_shards_are_llm_c_files(tmp_path, vocab, magic, version, dtype):
    ids = np.random.default_rng(0).integers(0, vocab, 2500)
    ids[7] = vocab - 1
    write(tmp_path / "d", vocab, [("train", ids[:1200]), ("train", ids[1200:]), ("val", [1, 2, 3])])
    files = sorted((tmp_path / "d").glob("train_*.bin"))
    assert len(files) == 3
    header = np.fromfile(files[0], np.int32, 256)
    assert header[:3].tolist() == [magic, version, 1000] and not header[3:].any()
    raw = np.concatenate([np.fromfile(file, dtype, offset=HEADER) for file in files])
    assert raw.tolist() == ids.tolist()
    split = open_split(tmp_path / "d", "train")
    assert np.concatenate(split.arrays).tolist() == ids.tolist()
    assert (split.tokens, split.max_id, split.bytes) == (2500, vocab - 1, 7500)
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    assert meta["splits"]["train"]["documents"] == 2
    assert meta["splits"]["train"]["shards"][1]["crc32"] == zlib.crc32(files[1].read_bytes())


def test_foreign_llm_c_folder_is_read_without_meta(tmp_path):
    make_data(tmp_path / "d")
    (tmp_path / "d/meta.json").unlink()
    (tmp_path / "d/train_000000.bin").rename(tmp_path / "d/fineweb_train_000001.bin")
    split = open_split(tmp_path / "d", "train")
    assert split.tokens == 40_000 and split.max_id == 63 and split.bytes is None


def test_writer_refuses_ids_that_do_not_fit_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        write(tmp_path / "d", 100, [("train", [5, 100])])
    with pytest.raises(UserError, match="the val split has 0 tokens"):
        write(tmp_path / "d", 100, [("train", [5, 6, 7])])
    assert list(tmp_path.iterdir()) == []


def damage(kind, folder):
    path = folder / "train_000000.bin"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "bit flip":
        raw = bytearray(path.read_bytes())
        raw[HEADER + 100] ^= 4
        path.write_bytes(raw)
    elif kind == "magic":
        path.write_bytes(b"\0" * 8 + path.read_bytes()[8:])
    elif kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "meta":
        (folder / "meta.json").write_text('{"vocab_size": 257, "spl')


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "truncated"),
        ("bit flip", "checksum"),
        ("magic", "no token shard"),
        ("missing", "is missing"),
        ("empty", "no token shard"),
        ("meta", "is damaged"),
    ],
)
def test_damaged_shards_are_named(tmp_path, kind, message):
    """Scorecard 11, 12."""
    folder = make_data(tmp_path / "d")
    damage(kind, folder)
    with pytest.raises(UserError, match=message) as error:
        open_split(folder, "train")
    assert str(folder) in str(error.value)


# ---------------------------------------------------------------------- the stream


def test_every_window_once_an_epoch_reshuffled_and_every_token_a_target_once(tmp_path):
    ids = np.arange(997)
    folder = write(tmp_path / "d", 1000, [("train", ids), ("val", [1, 2, 3])], shard_tokens=100)  # windows cross shards
    stream = TrainStream(str(folder), 10, seed=3)
    n = (997 - 1) // 10
    epochs = [[tuple(stream.sequence(e * n + i)) for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(tuple(range(10 * k, 10 * k + 11)) for k in range(n))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    targets = collections.Counter(token for window in epochs[0] for token in window[1:])
    assert set(targets.values()) == {1} and set(targets) == set(range(1, 10 * n + 1))
    inputs, labels = stream.batch(5, 4)
    assert torch.equal(inputs[:, 1:], labels[:, :-1]) and inputs.dtype == torch.int64
    assert [tuple(row) for row in inputs.tolist()] == [tuple(stream.sequence(5 + i)[:-1]) for i in range(4)]
    assert tuple(TrainStream(str(folder), 10, seed=4).sequence(0)) != epochs[0][0]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_shuffle_is_a_permutation(count, key):
    assert sorted(shuffled(i, count, key) for i in range(count)) == list(range(count))


def test_mixture_keeps_its_shares_and_uses_each_source_evenly(tmp_path):
    a = write(tmp_path / "a", 1000, [("train", np.full(5001, 1)), ("val", [1, 1, 1])])
    b = write(tmp_path / "b", 1000, [("train", np.full(401, 2)), ("val", [2, 2, 2])])
    stream = TrainStream({str(a): 3, str(b): 1.0}, 10, seed=0)
    firsts = [int(stream.sequence(i)[0]) for i in range(2 * MIXTURE_BLOCK)]
    for block in (firsts[:MIXTURE_BLOCK], firsts[MIXTURE_BLOCK:]):
        assert block.count(1) == 768
    assert firsts[:MIXTURE_BLOCK] != firsts[MIXTURE_BLOCK:]
    again = TrainStream({str(a): 3, str(b): 1.0}, 10, seed=0)
    assert [int(again.sequence(i)[0]) for i in (1500, 3, 700)] == [firsts[i] for i in (1500, 3, 700)]
    assert stream.epochs(2 * MIXTURE_BLOCK) == pytest.approx(512 / 40)


def test_validation_is_all_of_val_in_order_even_below_one_sequence(tmp_path):
    folder = write(tmp_path / "d", 1000, [("train", np.arange(100)), ("val", np.arange(26))])
    for length in (10, 64):
        seen = []
        for inputs, targets in ValidationSet(str(folder), length, 100).batches(2):
            keep = targets != IGNORE
            assert torch.equal(targets[keep], inputs[keep] + 1)
            seen += targets[keep].tolist()
        assert seen == list(range(1, 26))
    assert len(list(ValidationSet(str(folder), 10, 2).batches(2))) == 1  # no more than asked for


def test_too_little_text_is_an_error(tmp_path):
    folder = write(tmp_path / "d", 1000, [("train", np.arange(20)), ("val", np.arange(5))])
    with pytest.raises(UserError, match="fewer than one sequence"):
        TrainStream(str(folder), 20, 0)
    with pytest.raises(UserError, match="no data folder"):
        open_split(tmp_path / "nowhere", "train")


# ---------------------------------------------------------------------- tokenizers

CORPUS = [(ROOT / name).read_text() for name in ("model.py", "train.py", "config.py", "muon.py")]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(CORPUS, 600)


def test_trained_bpe_equals_the_tokenizers_library(bpe):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    other.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=599, initial_alphabet=alphabet, show_progress=False)
    )
    pieces = lambda encoding: [bytes(piece) for piece in encoding]
    text = (ROOT / "run/checkpoint.py").read_text()
    theirs = [other.decode([i]).encode() for i in other.encode(text).ids]
    ours = [bpe.decode_single_token_bytes(i) for i in bpe.encode_ordinary(text)]
    assert pieces(ours) == pieces(theirs)


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_round_trip_of_any_text(bpe, text):
    for encoder in (bpe, tokenizer.load("bytes")):
        assert encoder.decode(encoder.encode_ordinary(text)) == text


def test_special_text_stays_text(bpe):
    ids = bpe.encode_ordinary("a<|endoftext|>b")
    assert tokenizer.end_of_text(bpe) == bpe.n_vocab - 1 == 599 and 599 not in ids


def test_save_and_load_in_all_forms(tmp_path, bpe):
    tokenizer.save(bpe, tmp_path / "folder")
    for spec in (tmp_path / "folder", str(tmp_path / "folder")):
        assert tokenizer.fingerprint(tokenizer.load(spec)) == tokenizer.fingerprint(bpe)
    ranks = tokenizer.load(str(tmp_path / "folder/ranks.tiktoken"))
    assert ranks.encode_ordinary("def f(x):") == bpe.encode_ordinary("def f(x):")
    tokenizer.save(tokenizer.train_bpe(CORPUS, 300), tmp_path / "folder")  # the same path, another content
    assert tokenizer.load(tmp_path / "folder").n_vocab == 300
    assert isinstance(tokenizer.load("bytes"), tiktoken.Encoding)


def test_wrong_tokenizers_are_clear_errors(tmp_path, monkeypatch):
    (tmp_path / "bad.tiktoken").write_text("hello world\n")
    (tmp_path / "short.tiktoken").write_text("YQ== 0\n")
    (tmp_path / "folder").mkdir()
    for spec, message in (
        ("nonsense", "no tokenizer 'nonsense'"),
        (tmp_path / "bad.tiktoken", "no ranks file"),
        (tmp_path / "short.tiktoken", "no byte-level"),
        (tmp_path / "folder", "no tokenizer folder"),
    ):
        with pytest.raises(UserError, match=message):
            tokenizer.load(str(spec))
    with pytest.raises(UserError, match="at least 257"):
        tokenizer.train_bpe(["abc"], 100)

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="give a local ranks file"):
        tokenizer.load("gpt2")


def test_training_stops_when_nothing_is_left_to_merge():
    assert tokenizer.train_bpe(["ab ab ab"], 1000).n_vocab < 270


# ---------------------------------------------------------------------- prepare


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "words and more words " * (i + 5))
    (folder / "twin.txt").write_text((folder / "7.txt").read_text())
    (folder / "empty.txt").write_text("")
    (folder / "broken.txt").write_bytes(b"caf\xff\xfe latin" + b", and all the rest is right" * 10)
    return folder


def test_prepare_text_end_to_end(tmp_path, texts, capsys):
    words = ["text", str(texts), f"--out={tmp_path / 'd'}", "--vocab_size=300", "--val_fraction=0.2"]
    prepare.main(words)
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    counts = {split: meta["splits"][split]["documents"] for split in ("train", "val")}
    assert sum(counts.values()) == 41 and counts["val"] > 0  # neither the twin nor the empty file
    encoder = tokenizer.load(tmp_path / "d/tokenizer")
    ids = {s: np.concatenate(open_split(tmp_path / "d", s).arrays) for s in counts}
    assert meta["splits"]["train"]["tokens"] == len(ids["train"])
    texts_of = {s: set(encoder.decode(ids[s].tolist()).split("<|endoftext|>")[1:]) for s in counts}
    assert not texts_of["train"] & texts_of["val"] and len(texts_of["train"]) == counts["train"]
    assert any("caf\ufffd" in text for text in texts_of["train"] | texts_of["val"])
    assert meta["splits"]["val"]["bytes"] == sum(len(text.encode()) for text in texts_of["val"])
    before = (tmp_path / "d/train_000000.bin").read_bytes()
    prepare.main(words)
    assert "is ready" in capsys.readouterr().out
    with pytest.raises(UserError, match="made in another way"):
        prepare.main([*words, "--vocab_size=280"])
    shutil.rmtree(tmp_path / "d")
    prepare.main(words)
    assert (tmp_path / "d/train_000000.bin").read_bytes() == before


def test_split_on_makes_documents(tmp_path):
    (tmp_path / "t.txt").write_text("---".join(f"part {i} " * 20 for i in range(50)))
    prepare.main(
        [
            "text",
            str(tmp_path / "t.txt"),
            f"--out={tmp_path / 'd'}",
            "--tokenizer=bytes",
            "--split_on=---",
            "--val_fraction=0.2",
        ]
    )
    meta = json.loads((tmp_path / "d/meta.json").read_text())
    assert meta["splits"]["train"]["documents"] + meta["splits"]["val"]["documents"] == 50 and meta["vocab_size"] == 257


def test_a_book_in_one_file_gives_its_end_to_validation(tmp_path):
    book = "".join(f"line {i} of the book\n" for i in range(500))
    (tmp_path / "book.txt").write_text(book)
    prepare.main(
        ["text", str(tmp_path / "book.txt"), f"--out={tmp_path / 'd'}", "--tokenizer=bytes", "--val_fraction=0.1"]
    )
    encoder = tokenizer.load("bytes")
    texts = [
        encoder.decode(np.concatenate(open_split(tmp_path / "d", s).arrays).tolist()[1:]) for s in ("train", "val")
    ]
    assert "".join(texts) == book and texts[1].startswith("line 4") and 30 < texts[1].count("\n") < 60


def test_new_files_are_not_mistaken_for_the_old_preparation(tmp_path, texts):
    words = ["text", str(texts), f"--out={tmp_path / 'd'}", "--tokenizer=bytes", "--val_fraction=0.2"]
    prepare.main(words)
    (texts / "new.txt").write_text("one more document")
    with pytest.raises(UserError, match="made in another way"):
        prepare.main(words)


def test_overwrite_spares_what_is_no_prepared_data(tmp_path, texts):
    with pytest.raises(UserError, match="something else"):
        prepare.main(["text", str(texts), f"--out={texts}", "--tokenizer=bytes", "--overwrite"])
    assert (texts / "3.txt").exists()
    (tmp_path / "d").mkdir()  # an empty folder is no obstacle
    words = ["text", str(texts), f"--out={tmp_path / 'd'}", "--val_fraction=0.2"]
    prepare.main([*words, "--tokenizer=bytes"])
    for name in ("notes.txt", "tokenizer/mine", "train_1.bin", "a/b"):
        (path := tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        path.write_text("mine")
        for more in ([], ["--overwrite"]):
            with pytest.raises(UserError, match=rf"something else .*\({name.partition('/b')[0]}\): delete it yourself"):
                prepare.main([*words, "--vocab_size=300", *more])
        path.unlink()
    (tmp_path / "d/a").rmdir()
    meta = (tmp_path / "d/meta.json").read_text()
    for other in ("{}", None):
        (tmp_path / "d/meta.json").write_text(other) if other else (tmp_path / "d/meta.json").unlink()
        with pytest.raises(UserError, match="something else .*its meta.json is missing or of another kind.: delete it"):
            prepare.main([*words, "--vocab_size=300", "--overwrite"])
    (tmp_path / "d/meta.json").write_text(meta)
    prepare.main([*words, "--vocab_size=300", "--overwrite"])
    assert json.loads((tmp_path / "d/meta.json").read_text())["vocab_size"] == 300


def test_debris_of_a_killed_preparation_is_swept(tmp_path):
    """Of this host: the number of a process says nothing of another's."""
    here = f".d.{os.uname().nodename}"
    for name in (f"{here}.999999", f"{here}.{os.getpid()}", f"{here}.1", ".d.not-here.9"):
        (tmp_path / f"{name}.partial").mkdir()
    write(tmp_path / "d", 1000, [("train", [1, 2, 3]), ("val", [1, 2])])
    assert {path.name for path in tmp_path.iterdir()} == {"d", f"{here}.1.partial", ".d.not-here.9.partial"}


def test_a_killed_preparation_leaves_nothing_that_looks_done(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(tokenizer, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.main(["text", str(texts), f"--out={tmp_path / 'd'}", "--tokenizer=bytes", "--val_fraction=0.3"])
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d*"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["text"], "text needs files"),
        (["stdlib", "x"], "takes no files"),
        (["text", "nowhere.txt"], "no file or folder"),
        (["stdlib", "--val_fraction=2"], "between 0 and 1"),
        (["text", "README.md", "--encoding=utf-9"], "no encoding 'utf-9'"),
    ],
)
def test_prepare_mistakes_are_one_line(tmp_path, words, message):
    done = run_script("-m", "data.prepare", *words, f"--out={tmp_path / 'd'}", check=2)
    assert message in done.stderr and "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []
