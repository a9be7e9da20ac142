"""What the preparation of data once did without a word: each is refused, said or counted."""


import gzip

import pytest

from data import tokenizer
from data.loader import TrainStream
from data.shards import read_meta
from errors import UserError
from tests.test_prepare import DOCUMENTS, everything, jsonl, needs_datasets, run


def account(out):
    return read_meta(out)["account"]


def refuse(message, out, *words):
    with pytest.raises(UserError, match=message):
        run(out, *words)
    assert not out.exists()


# ---------------------------------------------------------------------- which files


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("Training-0.jsonl", "valid-0.jsonl", "more.jsonl"),
                                   ("train/0.jsonl", "dev/0.jsonl"), ("a.validation.jsonl", "a.test.jsonl")])
def test_files_for_validation_or_tests_are_not_trained_on(tmp_path, names):
    root = tmp_path / "training set"  # whose own words say nothing
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(root / name, [f"{name} {text}" for text in DOCUMENTS])
    said = r"by their names, and all would be trained on: .*--pattern='\*train\*'"
    refuse(said + ".*data.prepare hf '.*training set' --val_split=(test|valid)", tmp_path / "d", "jsonl", root)
    refuse(said + r", or take all by --pattern='\*'$", tmp_path / "d", "text", root)
    refuse(said, tmp_path / "d", "jsonl", *(root / name for name in names), "--pattern=*valid*")  # which chooses none
    assert len(everything(run(tmp_path / "d", "jsonl", root, "--pattern=*.jsonl"))) == 60 * len(names)
    one = run(tmp_path / "e", "jsonl", root / names[0])  # alone
    assert everything(one) == sorted(f"{names[0]} {text}" for text in DOCUMENTS)
    if names[0] == "train.jsonl":
        assert everything(run(tmp_path / "f", "jsonl", root, "--pattern=*train*")) == everything(one)


def test_names_that_say_one_split_or_several_at_once_are_no_reason(tmp_path):
    for name in ("train.txt", "pretrain.txt", "train_and_test.txt", "interval.txt"):
        (tmp_path / name).write_text(f"text of {name} " * 9)
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
