"""What real folders and files are like: which column is the text, what is no text, encodings, separators, links; each
is read right, counted in the account, or refused with the remedy."""

import bz2
import csv
import gzip
import io
import json
import os
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import columns, files, prepare, sources
from data.files import Account, list_files
from data.shards import read_meta
from errors import UserError
from tests.test_prepare import everything, needs_datasets, run

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


# ---------------------------------------------------------------------- tables: delimiters, cells, columns

@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(tmp_path, delimiter, capsys):
    texts = [*PROSE, f"quoted {delimiter} and\nof two lines, {delimiter}"]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    assert everything(run(tmp_path / "d", "csv", tmp_path / "a.csv")) == sorted(texts)
    assert account(tmp_path / "d")["delimiter"] == {repr(delimiter): 1} and account(tmp_path / "d")["column"] == "text"
    assert "the text is column 'text', which begins 'Sentence 0" in capsys.readouterr().out


def test_a_table_of_one_column_and_one_that_may_be_cut_in_two_ways(tmp_path):
    (tmp_path / "one.csv").write_text("text\n" + "\n".join(PROSE) + "\n")
    assert everything(run(tmp_path / "d", "csv", tmp_path / "one.csv")) == sorted(PROSE)  # commas are not quoted
    (table := tmp_path / "two.csv").write_text("n;id,text\n" + "".join(f"{i};5,words {i}\n" for i in range(20)))
    refuse(r"may be ',' or ';': set --delimiter", tmp_path / "e", "csv", table)
    assert everything(run(tmp_path / "e", "csv", table, "--delimiter=,")) == sorted(f"words {i}" for i in range(20))
    (tmp_path / "tab.csv").write_text("n\ttext\n1\ta\n2\tb\n")
    assert everything(run(tmp_path / "f", "csv", tmp_path / "tab.csv", r"--delimiter=\t")) == ["a", "b"]


def test_rows_with_other_numbers_of_cells_are_counted_or_refused(tmp_path):
    rows = [f"{i},words {i}" for i in range(300)]
    (table := tmp_path / "a.csv").write_text("\n".join(["id,text", *rows, "1,too,many", "5"]) + "\n")
    assert len(everything(run(tmp_path / "d", "csv", table))) == 300
    assert account(tmp_path / "d")["rows"] == {"read": 300, "without a text, left out": 2}
    (table := tmp_path / "b.csv").write_text("\n".join(["id,text", *(row + ", tail" for row in rows)]) + "\n")
    refuse(r"b.csv, line 2: 3 cells, the header names 2.*--delimiter.*So are all 100", tmp_path / "e", "csv", table)


def table_of(kind, folder, rows):
    """The rows as a file of one kind; returns the words for prepare."""
    if kind in ("jsonl", "hf"):
        return [kind, lines(folder / f"{kind}.jsonl", rows)]
    if kind == "array":
        (folder / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
        return ["jsonl", folder / "a.json"]
    if kind == "csv":
        with open(folder / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
        return ["csv", folder / "a.csv"]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return ["parquet", folder / "a.parquet"]


TABLES = ["jsonl", "array", "csv", "parquet", pytest.param("hf", marks=needs_datasets)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("kind", TABLES)
def test_no_table_is_guessed_wrongly(tmp_path, kind):
    """Text-like names are taken in any table; a lone column that is no text by name or look is refused."""
    right = [{"id": f"a-{i}", "Content": text, "n": i} for i, text in enumerate(PROSE)]
    assert everything(run(tmp_path / "d", *table_of(kind, tmp_path, right))) == sorted(PROSE)
    for rows, message in (
        ([{"n": i, "conv": f"conv-{i:05d}"} for i in range(30)], "is column 'conv' the text.*looks like ids"),
        ([{"n": i, "sentences": PROSE[i], "remark": PROSE[i]} for i in range(30)], "which column is the text"),
        ([{"body": PROSE[i], "Article": PROSE[i]} for i in range(30)], "which column is the text"),
        ([{"n": i, "page_url": PROSE[i]} for i in range(30)], "is column 'page_url' the text.*not called so"),
    ):
        rows = [{**row, "n": 0.5} for row in rows] if kind != "csv" else rows
        if kind == "csv":  # where everything is a string
            rows = [{key: value for key, value in row.items() if key != "n"} for row in rows]
        refuse(message + ".*The columns are .*set --text_column", tmp_path / "e", *table_of(kind, tmp_path, rows))


@pytest.mark.parametrize("values, look", [
    ([f"2024-01-{i:02d}T10:00:00Z" for i in range(1, 20)], "dates"), (["1", "2.5e7", "1,000 ", "$3"], "numbers"),
    ([f"https://a.org/{i}" for i in range(9)], "addresses"), (["me@a.org"], "addresses"),
    (["d41d8cd98f00b204e9800998ecf8427e"], "hashes"), (["123e4567-e89b-12d3-a456-426614174000"], "hashes"),
    (["a/b.txt", "c/d.txt"], "ids"), (["positive", "negative"] * 20, "labels"),
    (PROSE, None), (["春眠不觉晓，处处闻啼鸟。", "夜来风雨声，花落知多少。"], None), (["x" * 10**6], None), ([], None)])
def test_what_values_look_like(values, look):
    assert columns.looks_like(values) == look


@pytest.mark.parametrize("kind", ["jsonl", "parquet", pytest.param("hf", marks=needs_datasets)])
def test_chats_are_refused_or_rendered_on_request(tmp_path, kind):
    chats = [{"id": f"conv-{i:05d}", "messages": [{"role": "user", "content": f"What is {i}?"},
                                                  {"role": "assistant", "content": f"A number, {i}."}]}
             for i in range(30)]
    words = table_of(kind, tmp_path, chats)
    refuse(r"is column 'id' the text.*looks like ids.*or prepare with --chat", tmp_path / "e", *words)
    refuse(r"column 'messages' holds no text but chat: add --chat", tmp_path / "e", *words, "--text_column=messages")
    expected = sorted(f"user: What is {i}?\n\nassistant: A number, {i}." for i in range(30))
    assert everything(run(tmp_path / "d", *words, "--chat")) == expected


def test_other_forms_of_chats():
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    assert columns.render(shared) == "human: Hi\n\ngpt: Yes"
    for no_chat in ([], "text", [{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}], None):
        assert columns.render(no_chat) is None


def test_mixed_rows_are_counted_or_refused(tmp_path):
    rows = [{"text": text} for text in PROSE * 10] + [{"text": None}, {"body": "x"}]
    assert everything(run(tmp_path / "d", "jsonl", lines(tmp_path / "a.jsonl", rows))) == sorted(PROSE)
    assert account(tmp_path / "d")["rows"] == {"read": 301, "null, as if empty": 1, "without a text, left out": 1}
    assert account(tmp_path / "d")["documents"] == {"kept": 30, "duplicates dropped": 270, "empty ones dropped": 1}
    many = lines(tmp_path / "b.jsonl", [*rows, *[{"text": 3}] * 3])
    refuse("b.jsonl, line 302: no column 'text'. The columns are body.*4 of 305 rows", tmp_path / "e", "jsonl", many)
    nulls = lines(tmp_path / "c.jsonl", [{"text": None}] * 20 + [{"text": "a"}, {"text": "b"}])
    refuse("'text' is empty in 20 rows and holds only 2 texts.*--text_column=text", tmp_path / "e", "jsonl", nulls)
    assert everything(run(tmp_path / "e", "jsonl", nulls, "--text_column=text")) == ["a", "b"]
    (pretty := tmp_path / "d.json").write_text(json.dumps(rows[0], indent=2))
    refuse("line 1 is no JSON.*one object a line is expected", tmp_path / "f", "jsonl", pretty)


def test_parquet_files_need_only_the_text_in_common(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    (folder := tmp_path / "in").mkdir()
    kinds = {"a": None, "b": pyarrow.large_string(), "c": pyarrow.string_view(),
             "d": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    for i, (name, kind) in enumerate(kinds.items()):
        column = pyarrow.array([f"document {name} {j}" for j in range(9)])
        table = {"text": column.cast(kind) if kind else column, f"other {name}": [[{"deep": 1.5}]] * 9}
        parquet.write_table(pyarrow.table(dict(sorted(table.items(), reverse=i % 2))), folder / f"{name}.parquet")
    parquet.write_table(pyarrow.table({"x": pyarrow.array([], pyarrow.int8())}), folder / "no-rows.parquet")
    (folder / "empty.parquet").touch()
    found = everything(run(tmp_path / "d", "parquet", folder))
    assert found == sorted(f"document {name} {j}" for name in kinds for j in range(9))
    parquet.write_table(pyarrow.table({"body": ["x"]}), folder / "z.parquet")
    refuse(r"z.parquet: no column 'text'. The columns are body \(text", tmp_path / "e", "parquet", folder)
    parquet.write_table(pyarrow.table({"text": [b"x"] * 3}), folder / "z.parquet")
    refuse(r"z.parquet, row 1: column 'text' holds no text but bytes", tmp_path / "e", "parquet", folder)
    (folder / "z.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refuse("z.parquet: it is a Git LFS pointer.*git lfs pull", tmp_path / "e", "parquet", folder)


@needs_datasets
def test_training_from_a_dataset_says_the_column_once(tmp_path, capsys):
    path = str(lines(tmp_path / "a.jsonl", [{"body": text} for text in PROSE]))
    for _ in range(2):
        dataset, column = sources.open_hf(path)
        assert [text for _, text in sources.rows(dataset, column, path)] == PROSE
    assert capsys.readouterr().out == f"the text is column 'body', which begins {PROSE[0]!r}\n"


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
                "a.7z": b"7z\xbc\xaf\x27\x1c\0", "a.pkl": b"\x80\4\x95", "a.db": b"SQLite format 3\0",
                "a.gz.gz": gzip.compress(gzip.compress(b"x"))}
    for name, start in contents.items():
        (folder / name).write_bytes(start + (b"" if name.endswith("gz") else noise))
    return {"a.docx": "zip archive", "a.tar.gz": "tar archive", "a.pdf": "PDF", "a.png": "picture", "a.jpg": "picture",
            "a.elf": "program", "a.gif": "picture", "a.mp4": "video", "a.7z": "7z archive", "a.pkl": "pickle",
            "a.db": "SQLite database", "a.bin": "binary file", "a.gz.gz": "archive packed twice"}


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
    for word, message in (("--encoding=hex", "no encoding 'hex'"), ("--encoding=undefined", "cannot read .*a.txt"),
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
        texts = [f"{i}\n" + LONG for i in range(9)]
        (tmp_path / "a.txt").write_bytes(separator.join(texts).encode())
        assert everything(run(tmp_path / "d", "text", tmp_path / "a.txt", f"--split_on={given_as}",
                              "--overwrite")) == texts


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
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden/x.txt").touch()
    assert list_files([corpus], ".hidden/*.txt") == [corpus / ".hidden/x.txt"]


def test_a_file_that_changes_or_goes_meanwhile(tmp_path):
    (path := tmp_path / "a.txt").write_text("one<end>two")
    found, grown = Account(), sources.documents("text", [path], "<end>", account=(kept := Account()))[0]
    next(grown)
    path.write_text("one<end>two<end>three")
    assert len(list(grown)) >= 1 and kept.counts["files"]["changed while they were read"] == 1
    gone = sources.documents("text", [path], account=found)[0]
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
    texts = [(i, f"{i:010d}", b"%d" % i, 10, f"{i:010d}") for i in range(1000)]
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
    assert [text for _, _, text, _ in given_out] == [text for _, text, *_ in texts]
    assert [split for _, split, *_ in given_out] == ["train"] * 999 + ["val"]


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
    assert "documents 3 kept" in told and told.count("1 duplicates dropped") == 1
