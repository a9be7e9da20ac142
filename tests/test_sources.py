"""What real folders and files are like: what is no text, encodings, separators, links, few documents; each is read
right, counted in the account, or refused with the remedy."""

import bz2
import gzip
import io
import json
import os
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import files, prepare, sources
from data.files import Account, list_files
from data.shards import read_meta
from errors import UserError
from tests.test_prepare import everything, needs_datasets, run, stored

PROSE = [f"Sentence {i}, with a comma, and a tail." for i in range(30)]
LONG = "Much more of it, all plain. " * 12


def account(out):
    return read_meta(out)["account"]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refuse(message, out, *words):
    with pytest.raises(UserError, match=message):
        run(out, *words)
    assert not out.exists()


# ---------------------------------------------------------------------- what is no text

def archives(folder):
    """Files that are no text, by the kind that they are refused as."""
    with zipfile.ZipFile(folder / "a.docx", "w", 8) as file:
        file.writestr("a.txt", LONG)
    with tarfile.open(folder / "a.tar.gz", "w:gz") as file:
        file.addfile(tarfile.TarInfo("x"), io.BytesIO())
    noise = bytes(range(256)) * 20
    contents = {"a.pdf": b"%PDF-1.7\n", "a.png": b"\x89PNG\r\n\x1a\n\0\0", "a.jpg": b"\xff\xd8\xff\xe0\0",
                "a.elf": b"\x7fELF\2", "a.gif": b"GIF89a\1\0", "a.mp4": b"\0\0\0\x20ftypisom", "a.bin": b"",
                "a.bmp": b"BM\0\0" + b"\xff" * 500, "a.tif": b"II*\0" + b"\xff" * 500, "a.ppm": b"P6\n1 1\n255\n~~~",
                "a.7z": b"7z\xbc\xaf\x27\x1c\0", "a.pkl": b"\x80\4\x95", "a.db": b"SQLite format 3\0",
                "a.gz.gz": gzip.compress(gzip.compress(b"x"))}
    for name, start in contents.items():
        (folder / name).write_bytes(start + (b"" if name[-2:] in ("gz", "mp", "if", "pm") else noise))
    return {"a.docx": "zip archive", "a.tar.gz": "tar archive", "a.pdf": "PDF", "a.png": "picture", "a.jpg": "picture",
            "a.elf": "program", "a.gif": "picture", "a.mp4": "video", "a.7z": "7z archive", "a.pkl": "pickle",
            "a.db": "SQLite database", "a.bin": "binary file", "a.gz.gz": "archive packed twice",
            "a.bmp": "picture", "a.tif": "picture", "a.ppm": "netpbm picture"}


def test_what_is_no_text_is_skipped_in_folders_and_refused_by_name(tmp_path):
    (folder := tmp_path / "in").mkdir()
    kinds = archives(folder)
    for i in range(5):
        (folder / f"{i}.md").write_text(f"note {i}, PK of it")
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("ref")
    (folder / ".DS_Store").write_bytes(b"\0\1")
    (folder / "empty.md").touch()
    (folder / "short.md").write_text("x")
    assert everything(run(tmp_path / "d", "text", folder)) == [f"note {i}, PK of it" for i in range(5)] + ["x"]
    found = account(tmp_path / "d")["files"]
    assert found.pop("read") == 6 and found.pop("empty") == 1 and found.pop("hidden, left out") == 2
    assert found == {f"skipped: {kind}": list(kinds.values()).count(kind) for kind in kinds.values()}
    assert account(tmp_path / "d")["names"]["files skipped: PDF"] == [str(folder / "a.pdf")]
    for name, kind in kinds.items():
        refuse(f"{name} is no text but an? {kind}: ", tmp_path / "e", "text", folder / name)
    refuse("is no text but a zip archive", tmp_path / "e", "jsonl", folder, "--pattern=*.docx")
    (folder / "6.md").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refuse("6.md is no text but a Git LFS pointer: .*git lfs pull", tmp_path / "e", "text", folder)
    refuse("0 tokens: no document holds a text .*skipped: PDF", tmp_path / "e", "text", folder, "--pattern=*.pdf")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "gzip", "bzip2"])
@pytest.mark.parametrize("kind", ["text", "stdin", "jsonl", "csv"])
def test_byte_order_marks_utf_16_and_packed_files_are_known(tmp_path, monkeypatch, encoding, kind):
    texts = [f"Käse {i} " + LONG for i in range(4)]
    content = {"text": "<end>".join(texts), "stdin": "<end>".join(texts),
               "csv": "\r\n".join(["text", *map('"{}"'.format, texts)]),
               "jsonl": "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)}[kind]
    raw = {"gzip": gzip.compress, "bzip2": bz2.compress}[encoding](content.encode()) if "zip" in encoding else (
        content.encode(encoding))
    (path := tmp_path / "file").write_bytes(raw)
    words = [kind, path] if kind != "stdin" else [kind]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw))))
    found = run(tmp_path / "d", *words, *(["--split_on=<end>"] if kind in ("text", "stdin") else []))
    assert everything(found) == sorted(texts)
    assert sum(s["bytes"] for s in read_meta(tmp_path / "d")["splits"].values()) == len("".join(texts).encode())


def test_other_encodings_need_to_be_named(tmp_path):
    french = "Le café était fermé, là où l'été passe à côté. " * 5
    (path := tmp_path / "a.txt").write_bytes(french.encode("cp1252"))
    refuse(r"a.txt: 50 of 235 characters \(21%\) are NULs or bytes that are no utf-8: set --encoding=NAME, as cp1252.*"
           "--pattern", tmp_path / "d", "text", path)
    assert "".join(everything(run(tmp_path / "d", "text", path, "--encoding=cp1252"))).count("é") == 30
    assert account(tmp_path / "d")["encoding"] == {"cp1252": 1}
    (tmp_path / "b.txt").write_text(french, encoding="utf-8-sig")  # a mark is sure, whatever is named
    assert account_of(tmp_path, "--encoding=cp1252")["encoding"] == {"cp1252": 1, "utf-8-sig": 1}
    (tmp_path / "b.txt").write_bytes("春眠不觉晓，处处闻啼鸟。".encode("gb18030") * 9)
    refuse("b.txt.*are NULs or bytes that are no utf-8.*gb18030", tmp_path / "e", "text", tmp_path / "b.txt")
    (tmp_path / "d.txt").write_bytes(french.encode("utf-32-le"))
    assert "".join(everything(run(tmp_path / "f", "text", tmp_path / "d.txt", "--encoding=UTF_32_LE"))) == french
    (tmp_path / "c.txt").write_bytes(LONG.encode() + b"\0" * 5)
    refuse(r"c.txt: 5 of 341 characters \(1%\) are NULs", tmp_path / "e", "text", tmp_path / "c.txt")
    (tmp_path / "b.txt").write_text(french + "x" * 2**16 + "é", encoding="utf-8")  # UTF-8 stays what it is
    assert account_of(tmp_path, "--encoding=latin-1")["encoding"] == {"latin-1": 1, "utf-8": 1}
    assert "".join(everything(stored(tmp_path / "o"))).count("é") == 61
    refuse("b.txt is no utf-16-le but UTF-8: leave --encoding out", tmp_path / "e", "text", tmp_path / "b.txt",
           "--encoding=utf-16-le")
    for word, message in (("--encoding=hex", "no encoding 'hex'"), ("--encoding=undefined", "no encoding"),
                          ("--split_on=", "at least one character"), ("--delimiter=;", "no meaning for text")):
        refuse(message, tmp_path / "e", "text", path, word)


def test_standard_input_is_looked_at_too(tmp_path, monkeypatch):
    for raw, message in ((b"PK\3\4" + bytes(99), "standard input is no text but a zip archive"),
                         (b"", "no document holds"),
                         ("Käse ".encode("latin-1") * 99, "stdin: 99 of 495 .* are NULs or bytes that are no utf-8")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(raw))))
        refuse(message, tmp_path / "d", "stdin")


def test_what_is_read_is_what_was_meant(tmp_path):
    (tmp_path / "a.txt").write_text(LONG)
    with pytest.raises(UserError, match="text needs files"):
        prepare.parse(["text", ""])  # an unset variable of the shell is not this folder
    run(tmp_path / "out", "text", tmp_path)
    with pytest.raises(UserError, match="out lies among the files to be read"):
        run(tmp_path / "out", "text", tmp_path, "--overwrite")
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in PROSE])
    run(tmp_path / "d", "text", path)
    assert account(tmp_path / "d")["names"] == {
        "files tables as plain text; the sources jsonl and csv take a column": [str(path)]}


def account_of(folder, *words):
    run(folder / "o", "text", folder / "[ab].txt", "--overwrite", *words)
    return account(folder / "o")


def test_bytes_are_those_of_the_source(tmp_path):
    """A wrong byte counts as one, not as the three of what stands for it, a line end as the two that it was."""
    raw = b"Caf\xe9 \xe4\xb8 and half a sign.\r\n" + LONG.encode() * 3 + b"\0"
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"%d " % i + raw)
    found = everything(run(tmp_path / "d", "text", tmp_path / "*.txt", "--val_fraction=0.3"))
    assert found[0] == "0 " + raw.decode("utf-8", "replace").replace("\r\n", "\n") and len(found) == 20
    splits = read_meta(tmp_path / "d")["splits"].values()
    assert sum(split["bytes"] for split in splits) == sum(len(b"%d " % i + raw) for i in range(20))
    assert account(tmp_path / "d")["altered"] == {"undecodable characters replaced": 40, "NULs kept": 20,
                                                  "line ends rewritten as \\n": 20}
    book = b"".join(b"Line %d of a book.\r\n" % i for i in range(2000)) + b"\xff\r\n"
    (tmp_path / "book").write_bytes(book)
    texts = run(tmp_path / "b", "text", tmp_path / "book", "--val_fraction=0.1")
    sizes = {name: split["bytes"] for name, split in read_meta(tmp_path / "b")["splits"].items()}
    val = texts["val"][0].replace("\n", "\r\n").encode()  # the tail of the book, but for the one wrong byte
    assert sum(sizes.values()) == len(book) and abs(sizes["val"] - (len(val) - 2)) <= 1


# ---------------------------------------------------------------------- separators

@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", r"\n\n", r"\r\n\r\n", r"\x0a\u000a"])
def test_separators_are_found_in_any_line_ends(tmp_path, ends, separator):
    text = f"{ends}{ends}".join(f"Document {i}{ends}x" for i in range(30))
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8-sig"))
    found = everything(run(tmp_path / "d", "text", tmp_path / "a.txt", f"--split_on={separator}"))
    assert found == sorted(f"Document {i}\nx" for i in range(30))
    assert account(tmp_path / "d")["separator"] == {"found": 29, "texts with it": 1}


def test_separators_as_they_are_given(tmp_path):
    for separator, given_as in (("\\n", r"\\n"), ("\r", r"\r"), ("\x1e", r"\x1e"), ("\u2028", r"\u2028"),
                                ("\\d", r"\d"), ("\t", "\t"), ("\0", r"\0")):
        texts = [f"{i}\nof nine" for i in range(9)]
        (tmp_path / "a.txt").write_bytes(separator.join(texts).encode())
        assert everything(run(tmp_path / "d", "text", tmp_path / "a.txt", f"--split_on={given_as}",
                              "--overwrite")) == texts
    (tmp_path / "w.txt").write_text(LONG + "\0two", encoding="utf-16-le")  # known as such, with its NULs
    assert everything(run(tmp_path / "w", "text", tmp_path / "w.txt", r"--split_on=\0")) == [LONG, "two"]


def test_a_separator_that_is_nowhere_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\n<|EndOfText|>two\r\n", newline="")
    (tmp_path / "b.txt").write_text("three\n\n\n\nfour")
    refuse(r"'<\|endoftext\|>' occurs nowhere in 2 files, .* begins 'one.* line ends '\\r\\n' .*'<\|EndOfText\|>'",
           tmp_path / "d", "text", tmp_path, "--split_on=<|endoftext|>")
    refuse(r"'\\n---' occurs nowhere in 1 files.*\\\\ is a backslash", tmp_path / "d", "text", tmp_path / "a.txt",
           r"--split_on=\n---", "--limit=1")
    run(tmp_path / "d", "text", tmp_path, r"--split_on=\n\n\n\n")
    assert account(tmp_path / "d")["separator"] == {"found": 1, "texts with it": 1, "texts without it": 1}
    assert account(tmp_path / "d")["names"]["separator texts without it"] == [str(tmp_path / "a.txt")]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab<>\r\n", max_size=60), st.sampled_from(["<", "<>", "a<b", "\n", "\n\n", "\r\n", "a\n"]),
       st.integers(1, 9))
def test_text_is_split_as_if_it_were_whole(text, separator, block):
    """Line ends of any kind are alike, and none is torn apart where a block ends."""
    lines = lambda text: text.replace("\r\n", "\n").replace("\r", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        found = list(files.split_text(io.StringIO(text, newline=""), None, separator))
        assert list(map(lines, found)) == lines(text).split(lines(separator))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_repaired_as_python_replaces_them(raw):
    text, encoded, size, replaced = files.repair(raw.decode("utf-8", "nanok2.escape"))
    assert (text, size) == (raw.decode("utf-8", "replace"), len(raw)) and encoded == text.encode()
    assert replaced == text.count("\ufffd") - raw.count("\ufffd".encode())


# ---------------------------------------------------------------------- links, few documents

def test_links_are_followed_and_circles_caught(tmp_path):
    for name in ("corpus/a", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "a/own.txt").write_text("own")
    (elsewhere / "deep/linked.txt").write_text("linked")
    (corpus / "A").symlink_to("a")  # sorts before what it stands for
    (corpus / "more").symlink_to(elsewhere)
    (elsewhere / "deep/back").symlink_to(corpus)
    (elsewhere / "self").symlink_to(elsewhere)
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "twin.txt").symlink_to("a/own.txt")
    (corpus / "data.bin").write_text("x")
    expected = [corpus / "a/own.txt", corpus / "more/deep/linked.txt"]
    for names in ([corpus], [f"{tmp_path}/corp*"], [f"{corpus}/**/*.txt"], [f"{tmp_path}/**"], [expected[0], corpus]):
        found = Account()
        files_found = list_files(names, "*.txt", found)
        assert sorted(map(os.path.realpath, files_found)) == sorted(map(os.path.realpath, expected)), names
    found = Account()
    assert list_files([corpus], "*.txt", found) == expected
    assert found.counts["files"] == {"broken links": 1, "not called *.txt, left out": 1, "reached twice, read once": 1,
                                     "linked folders that are read already": 3}
    (corpus / "loop").symlink_to("pool")
    (corpus / "pool").symlink_to("loop")
    for names in ([corpus], [f"{corpus}/*"], [f"{corpus}/**"]):
        assert len(list_files(names, "*.txt", found := Account())) in (2, 3)
        assert found.counts["files"]["broken links"] in (3, 6)  # by another way too
    with pytest.raises(UserError, match="no file or folder .*loop; .*1 broken links"):
        list_files([corpus / "loop"], "*.txt")
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden/x.txt").touch()
    assert list_files([corpus], ".hidden/*.txt") == [corpus / ".hidden/x.txt"]


def test_a_file_that_changes_or_goes_meanwhile(tmp_path):
    (path := tmp_path / "a.txt").write_text("one<end>two")
    args = prepare.parse(["text", str(path), "--split_on=<end>"])
    grown = sources.documents(args, [path], kept := Account())
    next(grown)
    path.write_text("one<end>two<end>three")
    assert len(list(grown)) >= 1 and kept.counts["files"]["changed while they were read"] == 1
    gone = sources.documents(args, [path], Account())
    path.unlink()
    with pytest.raises(UserError, match="cannot read .*a.txt: No such file"):
        list(gone)


@pytest.mark.parametrize("count", [2, 3, 5, 20, 72])
def test_few_documents_give_validation_something(tmp_path, count):
    """Their hashes give validation nothing at this fraction; the last ones are taken, at least the fraction of the
    text, and never more than half of it."""
    texts = [f"note {i} of {count}" for i in range(count)]
    found = {}
    for workers in (1, 3):
        out = tmp_path / str(workers)
        found = run(out, "jsonl", lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]),
                    "--val_fraction=0.0001", f"--workers={workers}")
        assert found == {"train": texts[:-1], "val": texts[-1:]}
    assert account(out)["documents"] == {
        "kept": count, "at the end taken for val, since none went there by its hash": 1}


def test_a_text_is_cut_behind_a_line_or_word_near_the_place():
    for text, share, rest in (
            ("x" * 900 + "\n" + "y" * 99, 0.9, "y" * 99), ("x" * 998 + "\ny", 0.9, "x" * 98 + "\ny"),
            ("x" * 9000 + " y" * 999 + "\n" + "z" * 9000, 0.45, "y" + " y" * 998 + "\n" + "z" * 9000),
            ("x" * 5001 + "\n" + "y" * 4998, 0.4, "x" * 1001 + "\n" + "y" * 4998)):
        assert prepare.cut(text, share)[1] == rest
        assert "".join(prepare.cut(text, share)) == text


@needs_datasets
def test_network_errors_that_are_no_oserrors_are_told(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    def fail(*words, **options):
        raise error
        yield

    class Rows:
        select_columns = skip = lambda self, _: self
        iter = fail

    class Lost(HTTPError):
        """As httpx's ConnectError and ReadTimeout."""

    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **options: next(fail()))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", datasets.load_dataset)
    for error in (Lost("connection lost"), Lost("")):
        said = f".*{error or 'Lost'}"
        refuse(f"cannot load the dataset a/b: {said}; without a network.*give the folder", tmp_path / "d", "hf", "a/b")
        with pytest.raises(UserError, match=f"a/b, after row 0: {said}"):
            list(sources.rows(Rows(), "text", "a/b"))
        with pytest.raises(UserError, match=rf"cannot download .* \({said}.* put them into"):
            prepare.main(["fineweb-gpt2-shards", "--shards=1", f"--out={tmp_path / 'e'}"])


@pytest.mark.parametrize("texts, fraction, train, val", [
    (["a", "b " * 500], 1e-6, ["a", "b " * 500], 1), (["b " * 500, "a"], 1e-6, ["b " * 500], ["a"]),
    (["one text " * 9, "another one"], 1 - 1e-6, ["one text " * 9], ["another one"]),  # all hashes would be val
])
def test_uneven_documents(tmp_path, texts, fraction, train, val):
    found = run(tmp_path / "d", "jsonl", lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]),
                f"--val_fraction={fraction}")
    if val == 1:  # the long one is cut, as a book is
        assert found["train"][0] == "a" and "".join(found["train"][1:] + found["val"]) == texts[1] and found["val"][0]
    else:
        assert found == {"train": train, "val": val}


def test_documents_before_the_first_of_validation_wait_within_bounds(monkeypatch):
    monkeypatch.setattr(prepare, "HELD", 100)
    texts = [(f"{i:010d}", b"%d" % i, 10, f"{i:010d}") for i in range(1000)]
    taken = 0

    def counted():
        nonlocal taken
        for text in texts:
            taken += 1
            yield text

    given_out = []
    for document in prepare.by_hash(counted(), 1e-9, Account(), False):
        given_out.append(document)
        assert taken - len(given_out) <= 11
    assert [text for _, text, _ in given_out] == [text for text, *_ in texts]
    assert [split for split, *_ in given_out] == ["train"] * 999 + ["val"]


def test_the_account_is_told_and_kept(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, text in (("a", "some words"), ("b", "some words"), ("c", " \n"), ("e", "others"), ("f\n\udcff", "third")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    (tmp_path / "in/old.md~").write_text("x")
    prepare.main(["text", str(tmp_path / "in"), "--pattern=*.txt", "--vocab_size=260", f"--out={tmp_path / 'd'}"])
    told, kept = capsys.readouterr().out, account(tmp_path / "d")
    assert kept["documents"]["kept"] == 3 and kept["documents"]["duplicates dropped"] == 1  # though read twice
    assert kept["documents"]["empty ones dropped"] == 1 and kept["end_of_text"] == "<|endoftext|>"
    assert kept["bytes"] == len("some wordsothersthird") and kept["files"]["not called *.txt, left out"] == 1
    assert told.rstrip().endswith("end_of_text <|endoftext|>") and "files     1 not called *.txt" in told
    assert told.count("training a tokenizer") == 1 and told.count("1 duplicates dropped") == 1
    assert "documents 3 kept" in told
