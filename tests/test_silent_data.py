"""What the preparation of data once did without a word: each is refused, said or counted."""


import contextlib
import gzip
import json
import os
import zlib

import pytest

from data import prepare, tokenizer
from data.loader import TrainStream, ValidationSet
from data.shards import read_meta
from data.vocabulary import require_vocabulary
from errors import UserError
from kernels.cross_entropy import IGNORE
from tests.test_prepare import DOCUMENTS, everything, jsonl, needs_datasets, run
from tests.test_shards import foreign


def account(out):
    return read_meta(out)["account"]


def refuse(message, out, *words):
    with pytest.raises(UserError, match=message):
        run(out, *words)
    assert not out.exists()


# ---------------------------------------------------------------------- which files


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("Training-0.jsonl", "valid-0.jsonl", "more.jsonl"),
                                   ("train/0.jsonl", "dev/0.jsonl"), ("a.validation.jsonl", "a.test.jsonl")])
def test_files_for_validation_or_tests_are_not_trained_on(tmp_path, names, capsys):
    root = tmp_path / "training set"  # whose own words say nothing
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(root / name, [f"{name} {text}" for text in DOCUMENTS])
    said = r"by their names, and all would be trained on: .*--pattern=.\*train\*., or take all by --pattern=.\*.jsonl"
    refuse(said + ".*data.prepare hf '.*training set' --val_split=(test|valid)", tmp_path / "d", "jsonl", root)
    refuse(said, tmp_path / "d", "jsonl", *(root / name for name in names), "--pattern=*valid*")  # which chooses none
    assert len(everything(run(tmp_path / "d", "jsonl", root, "--pattern=*.jsonl"))) == 60 * len(names)
    run(tmp_path / "g", "text", root)  # whose files may be called anything
    assert "by their names, trained on like all: --pattern chooses" in capsys.readouterr().out
    one = run(tmp_path / "e", "jsonl", root / names[0])  # alone
    assert everything(one) == sorted(f"{names[0]} {text}" for text in DOCUMENTS)
    if names[0] == "train.jsonl":
        assert everything(run(tmp_path / "f", "jsonl", root, "--pattern=*train*")) == everything(one)


def test_names_that_say_one_split_or_several_at_once_are_no_reason(tmp_path):
    for name in ("train.txt", "pretrain.txt", "train_and_test.txt", "interval.txt", "val.bin"):
        (tmp_path / name).write_text(f"text of {name} " * 9 + "\0" * 99 * name.endswith("bin"))
    assert len(everything(run(tmp_path / "out/d", "text", tmp_path))) == 4


@needs_datasets
@pytest.mark.parametrize("name", ["in/book.txt", "in", "in/book.txt.gz"])
def test_datasets_cut_no_plain_text_at_every_line(tmp_path, name):
    (tmp_path / "in").mkdir()
    book = "".join(f"Line {i} of the book\n" for i in range(99)).encode()
    (tmp_path / name if name != "in" else tmp_path / "in/book.txt").write_bytes(
        gzip.compress(book) if name.endswith("gz") else book)
    refuse("plain text is for  python -m data.prepare text", tmp_path / "d", "hf", tmp_path / name)
    with pytest.raises(UserError, match="plain text is for  python -m data.prepare text"):
        TrainStream(f"hf:{tmp_path / name}", 16, 0, encoder=tokenizer.load("bytes")).sequence(0)


def test_tables_and_markup_that_go_in_as_text_are_said(tmp_path):
    names = ("a.jsonl.gz", "a.JSON", "b.csv.GZ", "c.html", "d.xml", "e.md", "f.json.txt")
    for name in names:
        raw = f"The text of {name}.".encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    run(tmp_path / "out/d", "text", tmp_path)
    assert account(tmp_path / "out/d")["names"] == {
        "files tables as plain text; the sources jsonl and csv take a column": [
            str(tmp_path / name) for name in ("a.JSON", "a.jsonl.gz", "b.csv.GZ")],
        "files markup as plain text, with its tags": [str(tmp_path / name) for name in ("c.html", "d.xml")]}


def test_backups_of_editors_are_left_out_unless_they_are_asked_for(tmp_path):
    rows = jsonl(tmp_path / "a.jsonl", DOCUMENTS).read_text()
    for end in ("~", ".bak", ".tmp", ".swp"):
        (tmp_path / f"a.jsonl{end}").write_text(rows.replace("document", f"old{end}"))
    for number, name in enumerate((tmp_path, tmp_path / "*.jsonl*")):
        found = run(tmp_path / f"out/{number}", "jsonl", name)
        assert everything(found) == sorted(DOCUMENTS)
        assert account(tmp_path / f"out/{number}")["files"] == {"backups, left out": 4, "read": 1}
    for number, words in enumerate(([tmp_path, "--pattern=*~"], [tmp_path / "a.jsonl~"], [tmp_path / "*~"])):
        assert everything(run(tmp_path / f"out/{number + 2}", "jsonl", *words))[0].startswith("old~ 0")


# ---------------------------------------------------------------------- what stands in the texts


def test_separators_that_stand_in_the_texts_are_told(tmp_path, capsys):
    text = "<|endoftext|>".join(f"Story {i}. And a\fpage." for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    rows = jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "one </s> two"])
    run(tmp_path / "d", "text", tmp_path / "a.txt")
    told = r"499 '<|endoftext|>' in the texts: --split_on='<|endoftext|>' would cut there, "
    assert told + r"500 '\x0c' in the texts: --split_on='\x0c' would cut there" in capsys.readouterr().out
    assert sum(account(tmp_path / "d")["markers"].values()) == 999
    run(tmp_path / "e", "text", tmp_path / "a.txt", "--split_on=<|endoftext|>", "--limit=9")
    assert account(tmp_path / "e")["markers"] == {r"'\x0c' in the texts: --split_on='\x0c' would cut there": 9}
    run(tmp_path / "f", "jsonl", rows)
    assert account(tmp_path / "f")["markers"] == {"'</s>' in the texts, as plain text": 1}


def test_a_sample_shows_what_an_encoding_made_of_the_words(tmp_path, capsys):
    french = "Plain, and then: le café était fermé, là où l'été passe. " * 20
    (tmp_path / "a.html.txt").write_text(french[:40] * 9, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xe9" + french.encode())  # no UTF-8, but nearly
    run(tmp_path / "d", "text", tmp_path / "b.txt", "--encoding=cp1252")
    assert "encoding  1 cp1252 (éPlain,, cafÃ©, Ã©tait)" in capsys.readouterr().out
    run(tmp_path / "e", "text", tmp_path / "a.html.txt", "--encoding=cp1252")  # which is UTF-8 all the same
    assert account(tmp_path / "e")["names"] == {} and account(tmp_path / "e")["encoding"] == {"utf-8": 1}


def test_lone_carriage_returns_are_counted_too(tmp_path):
    for name, ends in (("lone", "\r"), ("both", "\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(ends.join(DOCUMENTS).encode())
        assert "".join(everything(run(tmp_path / name, "text", tmp_path / f"{name}.txt"))).count("\n") == 59
        assert account(tmp_path / name)["altered"]["line ends rewritten as \\n"] == 59
    table = jsonl(tmp_path / "a.jsonl", [text + "\r" for text in DOCUMENTS])  # of which every character stays
    assert everything(run(tmp_path / "d", "jsonl", table))[0].endswith("\r")
    assert "altered" not in account(tmp_path / "d")


# ---------------------------------------------------------------------- what is made


def test_a_validation_split_of_another_size_than_asked_for_is_a_warning(tmp_path, capsys):
    def warned(source, texts, *words):
        rows = jsonl(tmp_path / "a.jsonl", texts)
        if source == "text":
            (tmp_path / "a.txt").write_text("<end>".join(texts))
            rows = tmp_path / "a.txt"
        prepare.main([source, str(rows), "--tokenizer=bytes", f"--out={tmp_path / 'd'}", "--overwrite", *words])
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: val has")]

    essays = [f"essay {i} " + "of many words " * 200 for i in range(300)]
    small = next(text for text in map(str, range(9999)) if zlib.crc32(text.encode()) / 2**32 < 0.02)
    large = next(text for text in (f"book {i} " + "of words " * 9999 for i in range(999))
                 if zlib.crc32(text.encode()) / 2**32 < 0.02)
    train = [text for text in essays if zlib.crc32(text.encode()) / 2**32 >= 0.02]
    assert warned("jsonl", essays) == []
    assert warned("jsonl", [*train[:40], small]) == [
        "warning: val has 0.00% of the bytes and not 2.00%, since documents go there whole: set another --val_fraction"]
    assert [line[:20] for line in warned("jsonl", [*train[:2], large])] == ["warning: val has 94."]
    assert "cut long ones by --split_on, or set" in warned("text", [*train[:40], small], "--split_on=<end>")[0]
    assert warned("text", train) == []  # one document, whose end is cut off
    prepare.main(["random", "--tokens=200", f"--out={tmp_path / 'e'}"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["another content", "another name"])
def test_files_that_were_replaced_are_not_the_same_whatever_their_size_and_time(tmp_path, capsys, change):
    (tmp_path / "in").mkdir()
    path = jsonl(tmp_path / "in/a.jsonl", DOCUMENTS)
    old = path.stat().st_mtime_ns - 10**10
    os.utime(path, ns=(old, old))
    words = ["jsonl", tmp_path / "in"]
    run(tmp_path / "d", *words)
    run(tmp_path / "d", *words)
    assert capsys.readouterr().out.count("is ready") == 1
    if change == "another name":
        path.rename(tmp_path / "in/b.jsonl")
    else:
        path.write_text(path.read_text().replace("document", "DOCUMENT"))
        os.utime(path, ns=(old - 10**9,) * 2)  # older than it was
    with pytest.raises(UserError, match="d was made of another set of files, or of their times, than there"):
        run(tmp_path / "d", *words)
    meta = read_meta(tmp_path / "d")
    assert len(meta["prepared_by"].pop("digest")) == 16
    (tmp_path / "d/meta.json").write_text(json.dumps(meta))  # as it was made before there were digests
    run(tmp_path / "d", *words)
    assert "is ready" in capsys.readouterr().out


def test_data_with_ids_that_its_tokenizer_does_not_have_is_refused(tmp_path):
    encoder = tokenizer.load("bytes")
    for split, largest, message in (("train", 257, "id 257, its tokenizer only ids below 257: set --tokenizer to the"),
                                    ("val", 257, "set --tokenizer to"), ("val", 256, None)):
        for name in ("train", "val"):
            foreign(tmp_path / f"{name}_0.bin", [1, 2, largest if name == split else 0])
        stream, validation = TrainStream(str(tmp_path), 1, 0, encoder=encoder), ValidationSet(str(tmp_path), 1, 1)
        require_vocabulary(300, stream, validation, None)
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            require_vocabulary(300, stream, validation, encoder)


def test_a_part_of_the_validation_split_is_spread_over_it(tmp_path):
    """Of 10 whole windows and a rest: all in their order, or fewer with gaps that are alike; on any ranks the same."""
    foreign(tmp_path / "train_0.bin", [1, 2])
    foreign(tmp_path / "val_0.bin", range(48))
    foreign(tmp_path / "val_1.bin", range(48, 55))

    def firsts(sequences, ranks=1):
        validation = ValidationSet(str(tmp_path), 5, sequences)
        seen = [row.tolist() for i in range(0, sequences, 2 * ranks) for rank in range(ranks)
                for step, (_, targets) in enumerate(validation.batches(2, rank, ranks)) if step == i // (2 * ranks)
                for row in targets if row[0] != IGNORE]
        assert validation.tokens == sum(id_ != IGNORE for row in seen for id_ in row)
        assert all(row[:4] == list(range(row[0], row[0] + 4)) for row in seen)
        return [row[0] // 5 for row in seen]

    for ranks in (1, 2, 3):
        assert firsts(11, ranks) == firsts(99, ranks) == list(range(11))
        assert firsts(10, ranks) == list(range(10))
        assert firsts(4, ranks) == [0, 2, 5, 7] and firsts(1, ranks) == [0] and firsts(3, ranks) == [0, 3, 6]
