"""Folders of shards made elsewhere, what a wrong --data advises, and the bytes that bits_per_byte divides by."""

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil

import datasets
import numpy as np
import pytest

import train
from data import advice, prepare, tokenizer
from data.loader import ValidationSet
from data.shards import Writer, open_split, read_meta, write_json
from data.words import CLOSING
from errors import UserError
from kernels.cross_entropy import IGNORE
from tests.helpers import ROOT, make_data


def foreign(path, tokens, dtype=np.uint16):
    """A shard as llm.c writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = np.zeros(256, np.int32)
    header[:3] = *((20240520, 1) if dtype == np.uint16 else (20240801, 7)), len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())


# ---------------------------------------------------------------------- putting a folder in place


@pytest.mark.parametrize("call", [0, 1, 2])
def test_whenever_an_overwriting_preparation_is_killed_one_of_the_two_is_whole(tmp_path, monkeypatch, call):
    """Before each of the two renames, and before the old folder is deleted."""
    def counted(do):
        return lambda *words, **options: 1 / 0 if next(calls) == call else do(*words, **options)

    prepare.main(["random", "--tokens=200", "--vocab_size=1000", f"--out={tmp_path / 'd'}"])
    calls, writer = iter(range(3)), Writer(tmp_path / "d", 2000).__enter__()
    for split in ("train", "val"):
        writer.write(split, [1, 2], 1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(os, "rename", counted(os.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        writer.finish(lambda path: None)
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "d", 3000):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["d"] and open_split(tmp_path / "d", "val").tokens
    assert read_meta(tmp_path / "d")["vocab_size"] == (2000 if call == 2 else 1000)


def test_a_folder_named_by_a_link_is_made_where_the_link_points(tmp_path, monkeypatch):
    (link := tmp_path / "link").symlink_to("there")
    words = ["random", "--tokens=200", f"--out={link}"]
    for more in ([], ["--overwrite"], ["--overwrite", "--vocab_size=300"]):
        prepare.main([*words, *more])
        assert link.is_symlink() and open_split(tmp_path / "there", "train").tokens == 196
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path / "there")
    for out in ("../file", "../loop", ".", "..", "/proc"):
        with pytest.raises(UserError, match="which cannot be replaced: choose another --out"):
            prepare.main([*words[:2], f"--out={out}", "--overwrite"])


def test_json_goes_through_links_and_into_pipes(tmp_path):
    """What is no file, as /dev/null, is not replaced by one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("pipe", "link", "link"):
        write_json({"a": 1}, str(tmp_path / name))
    assert json.loads(os.read(reader, 99)) == json.loads((tmp_path / "file").read_text()) == {"a": 1}
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 3


# ---------------------------------------------------------------------- no meta.json


@pytest.mark.parametrize("train, val", [
    ("fineweb_train_000001.bin", "fineweb_val_000000.bin"), ("pretrain_train_1.bin", "pretrain_val_000000.bin"),
    ("TRAIN01.BIN", "Valid-0.bin"), ("train.interval.bin", "dev.pretrain.bin"), ("a-training-0.bin", "eval000.Bin"),
    ("trainval_train_0.bin", "trainval_validation_0.bin"), ("train/000001.bin", "val/000001.bin"),
    ("Train/shard_0.bin", "validation/shard_0.bin")])
def test_foreign_shards_go_to_splits_by_whole_words_of_their_names(tmp_path, train, val):
    foreign(tmp_path / "retrain" / train, [1, 2, 3] * 30)  # words of the folder's own name do not count
    foreign(tmp_path / "retrain" / val, [4, 5] * 20)
    got = {split: np.concatenate(open_split(tmp_path / "retrain", split).arrays) for split in ("train", "val")}
    assert got["train"].tolist() == [1, 2, 3] * 30 and got["val"].tolist() == [4, 5] * 20


@pytest.mark.parametrize("name", ["train_val_0.bin", "dev_train.bin", "retrain_0.bin", "interval_0.bin", "trainval.bin",
                                  "pytorch_model.bin", "train_test.bin"])
def test_a_foreign_shard_that_could_be_of_both_splits_or_of_none_is_refused_by_name(tmp_path, name):
    for path in ("train_0.bin", "val_0.bin", name):
        foreign(tmp_path / path, [1, 2, 3])
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"{name} (could be of|names no split).*rename it.*or move it"):
            open_split(tmp_path, split)
    (tmp_path / name).rename(tmp_path / "train_1.bin")
    assert open_split(tmp_path, "train").tokens == 6


def test_what_is_left_out_of_a_folder_or_stands_in_it_twice_is_told(tmp_path, capsys):
    for name, ids in (("train_0.bin", [1, 2, 3]), ("train_1.bin", [2, 3, 4]), ("val_0.bin", [2, 3, 4]),
                      ("test_0.bin", [7]), ("._val_0.bin", [8]), ("val/0.bin", [9])):
        foreign(tmp_path / "f" / name, ids)
    (tmp_path / "f/train_2.bin").symlink_to("train_0.bin")
    assert [open_split(tmp_path / "f", split).tokens for split in ("train", "val")] == [9, 3]
    said = capsys.readouterr().out
    assert "no meta.json: by their names 3 shard(s) are train and 1 val, and no checksum is compared" in said
    assert ".bin file(s) left out, as they are hidden, for tests, or in folders beside others: ._val_0.bin, te" in said
    assert "train_2.bin holds the same tokens as train_0.bin: they count twice" in said
    assert "val_0.bin holds the same tokens as train_1.bin: validation measures what was trained on" in said
    foreign(tmp_path / "f/train_3.bin", [1, 70_000], np.uint32)
    assert open_split(tmp_path / "f", "train").max_id == 70_000
    assert "some hold uint16 and some uint32" in capsys.readouterr().out
    with Writer(tmp_path / "d", 1000) as writer:
        for split in ("train", "val"):
            writer.write(split, [1, 2, 3], 9)
        writer.finish(lambda path: None)
    foreign(tmp_path / "d/train_000001.bin", [1])
    assert open_split(tmp_path / "d", "train").tokens == 3
    said = capsys.readouterr().out
    assert ".bin file(s) left out, as meta.json does not list them: train_000001.bin" in said
    assert "val_000000.bin holds the same tokens as train_000000.bin: validation" in said
    make_data(tmp_path / "e", 100, 50)
    open_split(tmp_path / "e", "train")
    assert capsys.readouterr().out == ""


def test_a_split_without_shards_and_a_broken_link_are_named(tmp_path):
    foreign(tmp_path / "train_0.bin", [1, 2, 3])
    with pytest.raises(UserError, match="no val shards: rename one of its .bin files, as in val_000000.bin"):
        open_split(tmp_path, "val")
    (tmp_path / "val_0.bin").symlink_to("nowhere.bin")
    with pytest.raises(UserError, match="val_0.bin is missing"):
        open_split(tmp_path, "val")
    assert open_split(tmp_path, "train").tokens == 3


# ---------------------------------------------------------------------- bytes of what is evaluated

EASY, HARD = [f"{i} plain words of a text, {i * i} of them" for i in range(20)], ["これは日本語の文です。é" * 9] * 8
ENCODERS = {"bytes": lambda: tokenizer.load("bytes"), "bpe": lambda: tokenizer.train_bpe(EASY, 400),
            "words": lambda: tokenizer.train_words(EASY, 10),
            "above 65,536 ids": lambda: tokenizer.encoding("wide", {bytes([i]): i for i in range(256)}, special_tokens={
                "<|endoftext|>": 70_000, "<|pad|>": 300})}


def text_folder(folder, encoder, val, repaired=0):
    """A folder whose text had `repaired` bytes less than it has now."""
    with Writer(folder, encoder.n_vocab, 300) as writer:
        for split, texts in (("train", EASY), ("val", val)):
            for text in texts:
                writer.write(split, tokenizer.encode(encoder, text), len(text.encode()) - repaired)
        writer.finish(lambda path: tokenizer.save(encoder, path), **tokenizer.describe(encoder))
    return str(folder)


def bytes_by_hand(validation, encoder, ranks):
    """Of the targets that the ranks get together, decoded one by one."""
    ids = [id_ for rank in range(ranks) for _, targets in validation.batches(3, rank, ranks)
           for id_ in targets[targets != IGNORE].tolist()]
    special = encoder._special_tokens.values()
    return sum(len(encoder.decode_bytes([id_])) for id_ in ids if id_ not in special), len(ids)


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "words"])
def test_bytes_are_those_of_the_evaluated_targets_on_any_ranks(tmp_path, kind):
    encoder = ENCODERS[kind]()
    a = text_folder(tmp_path / "a", encoder, HARD + EASY)
    b = text_folder(tmp_path / "b", encoder, EASY)
    for data in (a, {a: 3, b: 1}):
        ratios = set()
        for sequences in (2, 8, 10_000):
            validation = ValidationSet(data, 16, sequences)  # the tokenizer is found
            for ranks in (1, 2, 3):
                n_bytes, count = bytes_by_hand(validation, encoder, ranks)
                assert (validation.bytes, validation.bytes_per_token) == (n_bytes, n_bytes / count)
            assert ValidationSet(data, 16, sequences, encoder=encoder).bytes == n_bytes
            ratios.add(n_bytes / count)
        assert len(ratios) > 1  # the case is one in which the part is unlike the whole
    whole = json.loads((tmp_path / "a/meta.json").read_text(encoding="utf-8"))["splits"]["val"]["bytes"]
    assert ValidationSet(a, 16, 10_000).bytes == whole == sum(len(text.encode()) for text in HARD + EASY)


def test_bytes_of_added_tokens_are_those_of_their_text_unless_they_are_special(tmp_path):
    encoder = tokenizer.encoding("added", {bytes([i]): i for i in range(256)}, special_tokens={
        "<|endoftext|>": 256, "<think>": 258, "é": 259})
    encoder.steps = {"added": [{"id": 258}, {"id": 259}]}  # 257 is nothing
    foreign(tmp_path / "train_0.bin", [1, 2])
    foreign(tmp_path / "val_0.bin", [256, 258, 65, 256, 257, 259])
    assert ValidationSet(str(tmp_path), 8, 1, encoder=encoder).bytes == len("<think>") + len("A") + 2


def test_bytes_of_repaired_text_and_of_lossy_tokenizers_are_those_of_the_source(tmp_path):
    encoder = ENCODERS["bpe"]()
    folder = text_folder(tmp_path / "a", encoder, HARD + EASY, repaired=2)
    validation = ValidationSet(folder, 16, 6)
    text = sum(len(text.encode()) for text in HARD + EASY)
    assert validation.bytes == pytest.approx(bytes_by_hand(validation, encoder, 1)[0] * (text - 2 * 28) / text)
    assert ValidationSet(folder, 16, 10_000).bytes == text - 2 * 28
    words = ENCODERS["words"]()
    folder = text_folder(tmp_path / "b", words, EASY)
    assert ValidationSet(folder, 8, 10_000).bytes == sum(len(text.encode()) for text in EASY)
    of = lambda ids: sum(len(words.texts[id_]) + (words.texts[id_] not in CLOSING) for id_ in ids
                         if 0 < id_ < words.n_vocab - 1)  # the word and its space, of what is known
    ids = [id_ for text in EASY for id_ in tokenizer.encode(words, text).tolist()]
    half = (len(ids) - 1) // 8 // 2 * 8  # where the second of two windows of 8 starts
    expected = of(ids[1:9] + ids[half + 1:half + 9]) / of(ids) * sum(map(len, EASY))
    assert ValidationSet(folder, 8, 2).bytes == pytest.approx(expected)


def test_foreign_shards_get_bytes_from_the_tokenizer_that_is_named_and_nothing_is_made_up(tmp_path, capsys):
    encoder = ENCODERS["bytes"]()
    foreign(tmp_path / "f/train_0.bin", [1, 2, 3])
    foreign(tmp_path / "f/val_0.bin", [256, *b"abc", 256, *b"defg"])
    assert ValidationSet(str(tmp_path / "f"), 4, 1, encoder=encoder).bytes == 3  # a b c and a separator
    assert ValidationSet(str(tmp_path / "f"), 4, 2, encoder=encoder).bytes == 7
    assert ValidationSet(str(tmp_path / "f"), 4, 2).bytes is ValidationSet(str(tmp_path / "f"), 4, 2).bytes_per_token
    foreign(tmp_path / "f/val_0.bin", [256, 1, 2, 257])
    validation = ValidationSet(str(tmp_path / "f"), 4, 1, encoder=encoder)
    assert validation.bytes is None and "does not have id 257" in capsys.readouterr().out
    with Writer(tmp_path / "random", 200) as writer:
        for split in ("train", "val"):
            writer.write(split, [1, 2, 3], 0)  # no text at all, as `random` writes it
        writer.finish(lambda path: None)
    mixture = {str(tmp_path / "random"): 1, text_folder(tmp_path / "a", encoder, EASY): 1}
    for data in (str(tmp_path / "random"), mixture):
        assert ValidationSet(data, 4, 2, encoder=encoder).bytes_per_token is None


# ---------------------------------------------------------------------- a --data that is no folder of shards

TEXTS = [f"document {i} " + "and more words " * (i + 5) for i in range(40)]


def make_texts(kind, path):
    """TEXTS in a file of that kind, or in a folder of files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    if kind == "folder":
        for i, text in enumerate(TEXTS):
            make_texts("text", path / f"{i}.md").write_text(text, encoding="utf-8")
        (path / ".git").mkdir()
        (path / ".git/objects.csv").write_text("x" * 100_000, encoding="utf-8")
        (path / "picture.png").write_bytes(bytes(100_000))
    elif kind in ("parquet", "arrow"):
        table = datasets.Dataset.from_dict({"text": TEXTS})
        table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    elif kind == "gz":
        path.write_bytes(gzip.compress(rows.encode()))
    else:
        lines = {"csv": "\n".join(["text", *TEXTS]), "text": "\n".join(TEXTS)}.get(kind, rows)
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind, name, source", [
    ("text", "book.txt", "text"), ("text", "my book", "text"), ("folder", "notes/", "text"),
    ("folder", "my notes", "text"), ("folder", "data/it's", "text"), ("jsonl", "a.jsonl", "jsonl"),
    ("jsonl", "d/a.jsonl", "jsonl"), ("gz", "a.jsonl.gz", "jsonl"), ("jsonl", "d/a.ndjson", "jsonl"),
    ("csv", "t.csv", "csv"), ("csv", "t/a.tsv", "csv"), ("json", "a.json", "hf"), ("parquet", "p/a.parquet", "parquet"),
    ("arrow", "saved", "hf")])
def test_a_file_or_folder_of_text_gets_the_command_that_prepares_it(tmp_path, monkeypatch, kind, name, source):
    monkeypatch.chdir(tmp_path)
    make_texts(kind, tmp_path / name)
    name = name if kind == "folder" or "/" not in name else name.split("/")[0]
    for read in (read_meta, lambda path: open_split(path, "train")):
        with pytest.raises(UserError, match="holds no shards but") as error:
            read(name)
    command, data = re.search(r"make them with  (python .*?)  and train with  --data=(.*)$", str(error.value)).groups()
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "data.prepare", source]
    prepare.main([*words[3:], "--tokenizer=bytes", "--val_fraction=0.3"])
    assert open_split(*shlex.split(data), "train").tokens > 1000
    if not name.startswith("data/"):
        with pytest.raises(UserError, match="did you mean --data=" + re.escape(data)):  # it is there now
            read_meta(name)


def test_names_that_do_not_exist_get_what_fits_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_data(tmp_path / "data/stdlib", 100, 50)
    make_data(tmp_path / "home/my set", 100, 50)
    foreign(tmp_path / "tokens/fineweb_train_0.bin", [1, 2])
    (tmp_path / "empty").mkdir()
    make_texts("text", tmp_path / "my notes/a.txt")
    make_texts("jsonl", tmp_path / "rows/deep/a.jsonl")
    make_texts("jsonl", tmp_path / "rows/a.json")
    (tmp_path / "rows/b.png").write_bytes(b"\0")
    for name, advised in {
            "data/fineweb": "python -m data.prepare fineweb --tokenizer=gpt2 --limit=1000000 --out=data/fineweb",
            "tinystories": "python -m data.prepare tinystories --out=data/tinystories",
            "/elsewhere/fineweb-edu": "--limit=1000000 --out=/elsewhere/fineweb-edu",
            "data/tinystory": "python -m data.prepare tinystories --out=data/tinystories",
            "HuggingFaceFW/fineweb": "python -m data.prepare hf HuggingFaceFW/fineweb --out=data/fineweb  or, to read "
                                     "it while training,  --data=hf:HuggingFaceFW/fineweb --tokenizer=gpt2",
            "https://huggingface.co/datasets/allenai/c4": "hf allenai/c4 --out=data/c4",
            "data/stdilb": "did you mean --data=data/stdlib", "stdlib": "did you mean --data=data/stdlib",
            "data/Stdlib/": "did you mean --data=data/stdlib", "data": "did you mean --data=data/stdlib",
            "tokens/*train*.bin": "did you mean --data=tokens",
            "tokens/fineweb_train_0.bin": "did you mean --data=tokens",
            "data/stdlib/meta.json": "did you mean --data=data/stdlib", "~/my set": f"--data='{tmp_path}/home/my set'",
            "my notes/*.txt": "make it with  python -m data.prepare text 'my notes/*.txt' --out='data/my notes'",
            "rows/**/*.jsonl": "python -m data.prepare jsonl 'rows/**/*.jsonl' --out=data/deep",
            "rows/*.json": f"python -m data.prepare hf {tmp_path}/rows --out=data/rows",
            "rows/*.png": "prepare text FILES", "no/*.txt": "text FILES",
            "s3://bucket/my/x.txt": "remote paths are not read: download it, then  python -m data.prepare text FILES "
                                    "--out=data/x", "gs://b/c": "remote paths are not read",
            "no/such/folder": "python -m data.prepare text FILES --out=no/such/folder",
            "empty": "python -m data.prepare stdlib --vocab_size=2048  makes  --data=data/stdlib"}.items():
        with pytest.raises(UserError) as error:
            read_meta(name)
        assert advised in str(error.value) and ("stdlib" in advised or "FILES" in advised or
                                                "stdlib" not in str(error.value)), (name, str(error.value))
    for words in (["--data=data/stdilb"], ["--data={'data/stdlib': 1, 'data/stdilb': 2}"]):
        with pytest.raises(UserError, match="no data folder data/stdilb: did you mean --data=data/stdlib"):
            train.main([str(ROOT / "configs/debug.py"), "--vocab_size=257", "--device=cpu", *words])


def test_advised_sources_are_those_of_prepare_that_want_no_files():
    for source, options in advice.SOURCES.items():
        assert prepare.parse([source, *options.split()]).source == source
    files = re.search(r"{(.*?)}", prepare_usage()).group(1).split(",")
    assert set(files) - {"text", "jsonl", "parquet", "csv", "hf", "stdin"} == set(advice.SOURCES)


def prepare_usage():
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        prepare.parse(["--help"])
    return out.getvalue()
