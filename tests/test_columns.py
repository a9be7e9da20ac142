"""Which column of a table becomes the text: delimiters, cells, names, looks, chats, mixed rows; of every kind."""

import csv
import json
import os
from collections import Counter

import pytest

from data import columns, prepare, sources, tokenizer
from data.shards import read_meta
from errors import UserError
from tests.test_prepare import everything, needs_datasets, run, stored
from tests.test_sources import PROSE, account, lines, refuse

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
    (tmp_path / "none.csv").write_text("\n".join(PROSE[:9]).replace(",", "") + "\n")  # without a line of names
    refuse("is column 'Sentence 0 with a comma and a tail.' the text.*is a line with them missing here",
           tmp_path / "e", "csv", tmp_path / "none.csv")
    (tmp_path / "space.csv").write_text("id, Text\n1,a b c\n2,d e f\n")
    assert everything(run(tmp_path / "s", "csv", tmp_path / "space.csv")) == ["a b c", "d e f"]
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
    (["positive", "negative"] * 20, "labels"),
    *((values if isinstance(values, list) else [values] * 15, "ids, numbers, dates or short words") for values in (
        [f"2024-01-{i:02d}T10:00:00Z" for i in range(1, 20)], ["1", "2.5e7", "1,000 ", "$3"], ["a/b.txt", "c/d.txt"],
        [f"https://a.org/{i}" for i in range(9)], ["me@a.org"], [f"https://a.org/{'0_a-' * 90}{i}" for i in range(9)],
        ["d41d8cd98f00b204e9800998ecf8427e" * 8], ["123e4567-e89b-12d3-a456-426614174000"],
        "Mon, 05 Jan 2024 10:04:00 GMT", "January 4, 2024", "4 Jan 2024", "Monday, 4 March 2024 at 10:04 am", "SKU",
        "positive", "2 hours ago", "Jane Doe", "lundi 5 février 2024", "正面", "положительный")),
    (["The rest of May."], None), (["Das ist ein Satz.", "x"], None), (["ภาษาไทยเขียนติดกัน"], None),
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
    assert columns.render(shared, lost := Counter()) == "human: Hi\n\ngpt: Yes" and lost == {"messages": 2}
    for no_chat in ("text", [{"role": "user"}], [{"role": "user", "content": {"a": 1}}], None):
        assert columns.render(no_chat, Counter()) is None
    parts = [{"type": "text", "text": "a "}, {"type": "image", "url": "x"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "tool_calls": [{}], "reasoning_content": "", "name": None}
    chat = [{"role": "user", "content": parts}, {**call, "content": None}, {"role": "tool", "content": "2"}, call]
    assert columns.render(chat, lost := Counter()) == "user: a b\n\nassistant: \n\ntool: 2\n\nassistant: "
    assert lost == {"messages": 4, "messages without text": 2, "image parts left out": 1, "tool_calls left out": 2}
    assert columns.render([], lost) == columns.render([call], lost) == ""


def test_what_chats_hold_beside_texts_is_counted_and_much_of_it_refused(tmp_path):
    chat = lambda i, said: {"messages": [{"role": "user", "content": f"What is {i}?", "weight": 0.5},
                                         {"role": "assistant", "content": said, "reasoning_content": "Hm."}]}
    rows = [chat(i, "A number.") for i in range(100)]
    words = ["jsonl", lines(tmp_path / "a.jsonl", [*rows, chat(100, None), {"messages": []}]), "--chat"]
    assert len(everything(run(tmp_path / "d", *words))) == 101
    assert account(tmp_path / "d")["documents"]["empty ones dropped"] == 1
    assert account(tmp_path / "d")["chats"] == {"messages": 202, "messages without text": 1, "weight left out": 101,
                                                "reasoning_content left out": 101}
    lines(tmp_path / "a.jsonl", [*rows, *(chat(i, None) for i in range(100, 103))])
    refuse("3 of 206 messages hold no text.*reasoning_content left out.*make texts of the chats yourself",
           tmp_path / "e", *words)
    lines(tmp_path / "a.jsonl", [chat(0, None), *rows])
    refuse("1 of 6 messages hold no text", tmp_path / "e", *words, "--limit=3")


def test_mixed_rows_are_counted_or_refused(tmp_path, capsys):
    rows = [{"text": text} for text in PROSE * 10] + [{"text": None}, {"body": "x"}]
    words = ["jsonl", lines(tmp_path / "a.jsonl", rows), "--vocab_size=300"]
    prepare.main([*map(str, words), f"--out={tmp_path / 'd'}"])  # read twice, counted once, said once
    assert everything(stored(tmp_path / "d")) == sorted(PROSE) and capsys.readouterr().out.count("begins") == 1
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
def test_a_lone_column_of_ids_is_refused_in_training_too(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"id": f"conv-{i:05d}", "messages": [{"role": "user", "content": "x"}]}
                                        for i in range(9)])
    with pytest.raises(UserError, match="is column 'id' the text.*looks like ids.*[?]column=NAME.*prepare with --chat"):
        sources.open_hf(str(path))


@needs_datasets
def test_training_from_a_dataset_says_the_column_once(tmp_path, capsys):
    path = str(lines(tmp_path / "a.jsonl", [{"body": text} for text in PROSE]))
    for _ in range(2):
        dataset, column = sources.open_hf(path)
        assert [text for _, text in sources.rows(dataset, column, path)] == PROSE
    assert capsys.readouterr().out == f"the text is column 'body', which begins {PROSE[0]!r}\n"


# ---------------------------------------------------------------------- quotes and headers of csv

@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
@pytest.mark.parametrize("bad, line", [
    ('"Never, he said', 3), ('"Hello" she said', 3), ('"a', 3), ('"closed"', None), ('say "x', None)])
def test_quotes_that_are_not_those_of_csv_are_refused(tmp_path, delimiter, bad, line):
    """An open quote swallows no row: not up to the end, nor up to a later cell that happens to end with one."""
    texts = [f"words {i} of it" for i in range(40)]
    texts[1] = bad.replace(",", "")
    for end in ("last", 'last"'):
        rows = ["id" + delimiter + "text", *(f"{i}{delimiter}{text}" for i, text in enumerate([*texts, end]))]
        (table := tmp_path / "a.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        if line:
            refuse(rf"a.tsv, line {line}: .*quotes.*--no_quotes", tmp_path / "e", "csv", table)
        else:
            assert len(everything(run(tmp_path / "d", "csv", table, "--overwrite"))) == 41
        found = run(tmp_path / "d", "csv", table, "--no-quotes", "--overwrite")
        assert everything(found) == sorted([*texts, end])


def test_cells_of_several_lines_are_no_rows(tmp_path):
    texts = [f"A line, with a comma\nAnother, {i}\n\nand \"more\", of it" for i in range(30)]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    assert everything(run(tmp_path / "d", "csv", tmp_path / "a.csv")) == sorted(texts)
    with open(tmp_path / "a.csv", "a", encoding="utf-8") as file:  # one that looks odd among many is counted
        file.write('30,"words\n31,more"\n' + "".join(f"{i},words {i}\n" for i in range(32, 300)))
    found = run(tmp_path / "d", "csv", tmp_path / "a.csv", "--overwrite")
    assert "words\n31,more" in everything(found) and account(tmp_path / "d")["rows"] == {"read": 299}
    assert account(tmp_path / "d")["quotes"] == {"lines in them that look like rows, kept as text": 1}


def test_bodies_of_several_lines_behind_a_title_are_taken_or_accepted_on_request(tmp_path):
    """A line of prose with one comma is like a row of two texts; a swallowed row is among nothing but such."""
    def table(*lines):
        texts = ["\n".join((f"Body {i}", *lines)) for i in range(300)]
        with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["title", "text"], *((f"title {i}", text) for i, text in enumerate(texts))])
        return sorted(texts)
    texts, words = table("of lines, with a comma", "and one", "more, and more", "", "end"), ["csv", tmp_path / "a.csv"]
    assert everything(run(tmp_path / "d", *words)) == texts and "quotes" not in account(tmp_path / "d")
    texts = table("and one, and more", "and, at the end")
    refuse("a.csv, line 2: in quotes .* like rows, 600 of the 901 read: .*--no_quotes.*--multiline", tmp_path / "e",
           *words, "--delimiter=,")
    assert everything(run(tmp_path / "e", *words, "--multiline")) == texts and "quotes" not in account(tmp_path / "e")
    refuse("exclude each other", tmp_path / "f", *words, "--multiline", "--no_quotes")


def test_the_first_line_of_excel(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\nid;text\n" + "".join(f"{i};a, {i}\n" for i in range(9)))
    assert everything(run(tmp_path / "d", "csv", tmp_path / "a.csv")) == [f"a, {i}" for i in range(9)]
    assert account(tmp_path / "d")["delimiter"] == {"';'": 1}


@needs_datasets
def test_csv_is_not_read_by_datasets_which_drops_cells(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text("id,text\n" + "".join(f"{i},words {i}, and more\n" for i in range(30)))
    for name in ("in/a.csv", "in"):
        refuse("for the source csv:  python -m data.prepare csv", tmp_path / "e", "hf", tmp_path / name)
        with pytest.raises(UserError, match="for the source csv"):
            sources.open_hf(str(tmp_path / name))
    (tmp_path / "in/a.csv").rename(tmp_path / "in/a.tsv")
    refuse("for the source csv", tmp_path / "e", "hf", tmp_path / "in/a.tsv")


def test_what_is_no_text_in_a_table_is_said(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"meta": {"a": 1}, "tags": ["x"], "body": "a\0b"}] * 9)
    refuse("a.jsonl: 9 of 27 characters .* NULs or the like: take them out of the texts", tmp_path / "e",
           "jsonl", path, "--text_column=body")
    refuse(r"meta \(object, which is no text: .*tags \(list, which is no text", tmp_path / "e", "jsonl", path)
    (tmp_path / "a.csv").write_text("".join(f"{i},{text}\n" for i, text in enumerate(["a b c d", *"efghij"])))
    refuse("is a line with them missing here", tmp_path / "e", "csv", tmp_path / "a.csv")


def test_files_that_changed_since_are_not_ready(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in PROSE])
    run(tmp_path / "d", "jsonl", path)
    run(tmp_path / "d", "jsonl", path)
    assert "is ready" in capsys.readouterr().out
    lines(path, [{"text": text.upper()} for text in PROSE])
    os.utime(path, ns=((tmp_path / "d/meta.json").stat().st_mtime_ns + 10**9,) * 2)
    with pytest.raises(UserError, match="d was made of another .*a.jsonl than there is now: add --over"):
        run(tmp_path / "d", "jsonl", path)
    assert "COMMA" in everything(run(tmp_path / "d", "jsonl", path, "--overwrite"))[0]


def test_a_tokenizer_that_changed_since_is_not_ready(tmp_path, capsys):
    path, folder = lines(tmp_path / "a.jsonl", [{"text": text} for text in PROSE]), tmp_path / "tokenizer"
    words = ["jsonl", str(path), f"--out={tmp_path / 'd'}", f"--tokenizer={folder}?end_of_text=<|endoftext|>"]
    for size in (260, 260, 270):
        tokenizer.save(tokenizer.train_bpe(PROSE, size), folder)
        if size == 270:
            with pytest.raises(UserError, match="d was made of another .*tokenizer.* than there is now: add --over"):
                prepare.main(words)
            words.append("--overwrite")
        prepare.main(words)
    assert capsys.readouterr().out.count("is ready") == 1 and read_meta(tmp_path / "d")["vocab_size"] == 270
