"""Every source of data.prepare on small local files, what is wrong with them, and that interruption leaves no half."""

import bz2
import csv
import gzip
import importlib.util
import json
import lzma
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from data import prepare, sources, tokenizer
from data.files import list_files
from data.loader import ValidationSet
from data.shards import open_split, read_meta
from errors import UserError
from tests.helpers import ROOT, make_data, run_script

DOCUMENTS = [f"document {i}: " + "words and more words " * (i % 7 + 1) for i in range(60)]
needs_datasets = pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs the package datasets")


def jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def run(out, *words):
    prepare.main([*map(str, words), "--tokenizer=bytes", f"--out={out}"])
    return stored(out)


def stored(out):
    encoder = tokenizer.load(out / "tokenizer")
    ids = {split: np.concatenate(open_split(out, split).arrays) for split in ("train", "val")}
    return {split: encoder.decode(ids[split].tolist()).split("<|endoftext|>")[1:] for split in ids}


def everything(found):
    return sorted(found["train"] + found["val"])


# ---------------------------------------------------------------------- every source gives the same documents

def source_files(kind, folder):
    """Files of one kind with DOCUMENTS and empty ones; returns the words for prepare."""
    if kind == "text":
        for i, text in enumerate(["", *DOCUMENTS, "  \n"]):
            (folder / f"{i}.txt").write_text(text)
        return ["text", folder]
    if kind == "split text":
        (folder / "a.txt").write_text("<end>".join(["", *DOCUMENTS[:30], " "]))
        (folder / "b.txt").write_text("<end>".join(DOCUMENTS[30:]))
        return ["text", folder / "*.txt", "--split_on=<end>"]
    if kind == "jsonl":
        jsonl(folder / "a.jsonl", [*DOCUMENTS[:30], "", None])
        jsonl(folder / "b.jsonl", DOCUMENTS[30:])
        (folder / "empty.jsonl").write_text("")
        return ["jsonl", folder]
    if kind == "csv":
        with open(folder / "a.csv", "w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *enumerate([*DOCUMENTS, ""])])
        (folder / "empty.csv").write_text("")
        return ["csv", folder / "a.csv", folder / "empty.csv"]
    import pyarrow
    from pyarrow import parquet
    for name, part in (("a", [*DOCUMENTS[:20], None, ""]), ("b", DOCUMENTS[20:])):
        table = pyarrow.table({"n": list(range(len(part))), "text": part})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    if kind == "parquet":
        (folder / "empty.parquet").touch()
        return ["parquet", folder]
    return ["hf", folder] + (["--no-streaming"] if kind == "hf whole" else [])


@pytest.mark.parametrize("kind", ["text", "split text", "jsonl", "csv", "parquet", "hf", "hf whole"])
def test_every_source_gives_the_same_documents(tmp_path, kind, monkeypatch):
    if kind in ("parquet", "hf", "hf whole"):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "in").mkdir()
    found = run(tmp_path / "d", *source_files(kind, tmp_path / "in"), "--val-fraction=0.2")
    assert everything(found) == sorted(DOCUMENTS)
    whole = jsonl(tmp_path / "whole.jsonl", DOCUMENTS)
    reference = run(tmp_path / "w", "jsonl", whole, "--val_fraction=0.2")
    assert found["val"] and sorted(found["val"]) == sorted(reference["val"])


def test_stdin_and_a_second_run_of_it(tmp_path):
    words = ["-m", "data.prepare", "stdin", "--tokenizer=bytes", "--split-on=<end>", f"--out={tmp_path / 'd'}"]
    run_script(*words, "--val-fraction=0.2", input="<end>".join(DOCUMENTS), check=0)
    assert everything(stored(tmp_path / "d")) == sorted(DOCUMENTS)
    assert "made in another way" in run_script(*words, input="x", check=2).stderr  # nobody knows what comes in
    with pytest.raises(UserError, match="read only once"):
        prepare.parse(["stdin"])


@pytest.mark.parametrize("suffix, compress", [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files(tmp_path, suffix, compress):
    packed = tmp_path / f"a.jsonl.{suffix}"
    packed.write_bytes(compress(jsonl(tmp_path / "a.jsonl", DOCUMENTS).read_bytes()))
    assert everything(run(tmp_path / "d", "jsonl", packed, "--val_fraction=0.2")) == sorted(DOCUMENTS)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=f"cannot read {packed}"):
        run(tmp_path / "e", "jsonl", packed)


def test_zst_is_read_or_names_the_package(tmp_path, monkeypatch):
    pyarrow, path = pytest.importorskip("pyarrow"), tmp_path / "a.jsonl.zst"
    lines = jsonl(tmp_path / "a.jsonl", DOCUMENTS).read_bytes()
    path.write_bytes(b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[:999], lines[999:])))
    assert everything(run(tmp_path / "d", "jsonl", path, "--val_fraction=0.2")) == sorted(DOCUMENTS)
    path.write_bytes(b"no zst")
    with pytest.raises(UserError, match=f"cannot read {path}"):
        run(tmp_path / "e", "jsonl", path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        run(tmp_path / "e", "jsonl", path)
    with pytest.raises(UserError, match="parquet files .* need a package:  pip install datasets"):
        run(tmp_path / "e", "parquet", path)


def test_random_tokens_are_seeded(tmp_path):
    for name in ("a", "b"):
        prepare.main(["random", "--tokens=50000", "--vocab_size=70000", f"--out={tmp_path / name}"])
    files = [sorted((tmp_path / name).glob("*.bin")) for name in ("a", "b")]
    assert [[file.read_bytes() for file in found] for found in files][0] == [file.read_bytes() for file in files[1]]
    ids = np.concatenate(open_split(tmp_path / "a", "train").arrays)
    assert len(ids) == 49_000 and 69_900 < ids.max() < 70_000 and abs(ids.mean() - 35_000) < 500
    assert not ValidationSet(str(tmp_path / "a"), 64, 4).bytes_per_token  # no text, no bits per byte


def test_ready_made_shards(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    made, asked = make_data(tmp_path / "made"), []

    def download(repo, name, repo_type, local_dir):
        asked.append(name)
        if name == "fineweb_train_000002.bin" and len(asked) == 2:
            raise ConnectionError("no network")
        local_dir.mkdir(exist_ok=True)
        (local_dir / name).write_bytes((made / ("val" if "_val_" in name else "train")).with_suffix(".x").read_bytes())

    for split in ("train", "val"):
        (made / f"{split}.x").write_bytes((made / f"{split}_000000.bin").read_bytes())
    monkeypatch.setattr(hub, "hf_hub_download", download)
    words = ["fineweb-gpt2-shards", "--shards=3", f"--out={tmp_path / 'd'}"]
    with pytest.raises(UserError, match=r"fineweb_train_000001.bin .. fineweb_train_000003.bin .*put them into"):
        prepare.main(words)
    for _ in range(2):
        prepare.main(words)
    train, val = [f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3)], "fineweb_val_000000.bin"
    assert asked == [*train[:2], *train[1:], val]  # none twice, but for the one that failed
    assert open_split(tmp_path / "d", "train").tokens == 120_000
    (tmp_path / "d" / train[1]).write_bytes(b"")
    with pytest.raises(UserError, match="no token shard"):
        prepare.main(words)


@needs_datasets
@pytest.mark.parametrize("name", [*sources.KNOWN])
def test_known_names_and_their_validation(tmp_path, monkeypatch, name):
    asked = []

    def open_hf(repo, split, config, column, streaming, chat):
        asked.append((repo, split, config, streaming))
        import datasets
        rows = [{"text": f"{split} {text}"} for text in DOCUMENTS] + [{"text": "in both"}]
        return datasets.IterableDataset.from_generator(lambda: iter(rows)), "text"

    monkeypatch.setattr(sources, "open_hf", open_hf)
    found = run(tmp_path / "d", name, "--limit=40")
    assert all(repo == sources.KNOWN[name][0] and config == sources.KNOWN[name][1] for repo, _, config, _ in asked)
    texts = lambda split: [f"{split} {text}" for text in DOCUMENTS[:40]]
    if name == "tinystories":
        assert found == {"val": texts("validation"), "train": texts("train")}
    else:
        assert everything(found) == sorted(texts("train")) and found["val"]


@needs_datasets
def test_a_validation_split_by_name(tmp_path):
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in/train.jsonl", [*DOCUMENTS, "in both"])
    jsonl(tmp_path / "in/test.jsonl", ["one", "two", "in both"])
    found = run(tmp_path / "d", "hf", tmp_path / "in", "--val-split=test")
    assert found == {"train": DOCUMENTS, "val": ["one", "two", "in both"]}  # what is in both is validation's
    with pytest.raises(UserError, match=r"Available splits: \['train', 'test'\]"):
        run(tmp_path / "e", "hf", tmp_path / "in", "--val_split=dev")


@needs_datasets
def test_without_a_network_or_the_package_the_error_says_how_to_go_on(tmp_path, monkeypatch):
    (tmp_path / "script").mkdir()
    (tmp_path / "script/script.py").write_text("")
    for repo, message in (("nobody/nothing", "cannot load the dataset nobody/nothing.*give the folder or file"),
                          (str(tmp_path / "script"), "REPO@refs/convert/parquet"), (None, "pip install datasets")):
        if repo is None:
            monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=message):
            sources.open_hf(repo or "nobody/nothing")


# ---------------------------------------------------------------------- documents that are wrong, odd or large

def test_columns_are_chosen_or_named(tmp_path):
    body = jsonl(tmp_path / "body.jsonl", DOCUMENTS, key="body")
    assert everything(run(tmp_path / "d", "jsonl", body)) == sorted(DOCUMENTS)  # called so, and the only one of strings
    (two := tmp_path / "two.jsonl").write_text(json.dumps({"story": "a", "body": "b", "n": 1}) + "\n")
    (table := tmp_path / "two.csv").write_text("title,body,body\na,b,c\n")
    listed = r"The columns are story \(text: 'a'\), body \(text: 'b'\), n \(number: '1'\)"
    for words, message in (
        (["jsonl", two], rf"which column is the text\? {listed}: set --text_column"),
        (["jsonl", two, "--text-column=x"], f"no column 'x'. {listed}"),
        (["jsonl", two, "--text_column=n"], "column 'n' holds no text but number"),
        (["csv", table], r"which column is the text\? .* title .*, body \(column 2\) .*, body \(column 3\)"),
        (["csv", table, "--text_column=body"], r"no column 'body'\. .* body \(column 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "e", *words)
    if importlib.util.find_spec("datasets"):
        with pytest.raises(UserError, match=f"no column 'x'. {listed}"):
            run(tmp_path / "e", "hf", two, "--text_column=x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["body.jsonl", "d", "two.csv", "two.jsonl"]


@pytest.mark.parametrize("source, content, message", [
        ("jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is no JSON"),
        ("jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is no JSON object but a list"),
        ("jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: no column 'text'. The columns are body"),
        ("jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2: column 'text' holds no text"),
        *(("parquet", content, "cannot read .*a.parquet") for content in (b"PAR1 but not really", b"")),
        *((source, b"", "the train split has 0 tokens") for source in ("jsonl", "csv", "text")),
])
def test_damaged_files_are_named(tmp_path, source, content, message):
    if source == "parquet":
        pytest.importorskip("pyarrow")
    (path := tmp_path / f"a.{source}").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "d", source, path)
    assert list(tmp_path.iterdir()) == [path]


def test_invalid_unicode_becomes_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    long = "much that is right " * 20
    path.write_bytes(b'{"text": "caf\xff\xfe %b"}\n{"text": "half \\ud83d pair"}\n{"text": "\\ud83d\\ude00"}\n'
                     % long.encode())
    (tmp_path / "a.csv").write_bytes(b'text\ncaf\xff, %b\n"half, quoted"\n' % long.encode())
    expected = [f"caf\ufffd\ufffd {long}", "half \ufffd pair", "\U0001f600"]
    assert everything(run(tmp_path / "d", "jsonl", path, "--val_fraction=0.5")) == sorted(expected)
    altered = read_meta(tmp_path / "d")["account"]["altered"]
    assert altered == {"undecodable characters replaced": 3, "NULs kept": 0, "line ends rewritten as \\n": 0}
    assert everything(run(tmp_path / "e", "csv", tmp_path / "a.csv")) == sorted([f"caf\ufffd, {long}", "half, quoted"])


def test_names_count_once_and_missing_ones_are_named(tmp_path):
    for name in ("a", "b"):  # the same name in two folders
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(f"text of {name}")
    files = list_files([tmp_path, tmp_path / "a/x.txt", str(tmp_path / "*/x.txt")], "*.txt")
    assert files == [tmp_path / "a/x.txt", tmp_path / "b/x.txt"]
    for name, message in (("nowhere", "no file or folder"), ("*.csv", "no file or folder"), ("", "no files .*parquet")):
        with pytest.raises(UserError, match=message):
            list_files([tmp_path / name], "*.parquet")


def test_a_document_longer_than_a_shard_and_one_long_line(tmp_path):
    line = "word " * 400_000  # 2 MB in one line, in 21 shards
    found = run(tmp_path / "d", "jsonl", jsonl(tmp_path / "a.jsonl", [line, "a", "b", "c"]), "--shard_tokens=100000",
                "--val_fraction=0.3")
    assert everything(found) == sorted([line, "a", "b", "c"]) and line in found["train"]
    sizes = [shard["tokens"] for shard in read_meta(tmp_path / "d")["splits"]["train"]["shards"]]
    assert len(sizes) == 21 and set(sizes[:-1]) == {100_000}
    (tmp_path / "book.txt").write_text(line)
    train, val = run(tmp_path / "b", "text", tmp_path / "book.txt", "--val_fraction=0.1").values()
    assert train[0] + val[0] == line and len(val[0]) == 199_995  # from the next word on


def test_white_space_without_end_is_encoded(tmp_path):
    encoder = tokenizer.train_bpe(["a  b   c\n\n d " * 50], 300)
    text = "a b" + " " * 1_500_000 + "\n" * 250_000 + "c d"  # tiktoken alone fails on this
    ids = tokenizer.encode(encoder, text)
    assert ids[0] == tokenizer.end_of_text(encoder) and encoder.decode(ids[1:].tolist()) == text
    for short in ("", "a b <|endoftext|>", " " * 150_000 + "x"):
        assert tokenizer.encode(encoder, short)[1:].tolist() == encoder.encode_ordinary(short)


# ---------------------------------------------------------------------- the same result, whatever happens on the way

def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_workers_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 500)
    words = ["jsonl", str(jsonl(tmp_path / "a.jsonl", DOCUMENTS * 2)), "--shard-tokens=500"]
    for n in (1, 2, 5):
        prepare.main([*words, "--train-tokenizer=300", "--limit=50", f"--workers={n}", f"--out={tmp_path / str(n)}"])
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")
    meta = read_meta(tmp_path / "1")
    assert sum(split["documents"] for split in meta["splits"].values()) == 50 and meta["vocab_size"] == 300
    words += ["--vocab_size=300", "--workers=3", f"--out={tmp_path / '1'}"]
    prepare.main([*words, "--limit=50"])  # the same way by other words: is ready
    with pytest.raises(UserError, match="made in another way"):
        prepare.main(words)


def test_few_documents_wait_for_the_workers(monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 10)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "train", f"{taken:010d}", 10

    found = prepare.encoded(endless(), tokenizer.load("bytes"), workers=2)
    for count in range(1, 50):
        assert bytes(next(found)[1][1:].tolist()) == f"{count:010d}".encode() and taken <= count + 4
    found.close()


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 2**14)
    peaks = {}
    for count in (500, 4000):
        path = jsonl(tmp_path / f"{count}.jsonl", (f"{i} " + "word " * 400 for i in range(count)))
        tracemalloc.start()
        prepare.main(["jsonl", str(path), "--tokenizer=bytes", "--shard_tokens=50000", f"--out={tmp_path}/{count}"])
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert path.stat().st_size > 8e6 and peaks[4000] - peaks[500] < 1.5e6


def test_a_tokenizer_that_is_not_tiktokens_is_trained_and_used(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    prepare.main(["jsonl", str(path), "--tokenizer=words:5", "--val_fraction=0.2", f"--out={tmp_path / 'd'}"])
    found = everything(stored(tmp_path / "d"))
    assert len(found) == 60 and all(text.strip().startswith("document") for text in found)
    assert read_meta(tmp_path / "d")["separator"] == tokenizer.end_of_text(tokenizer.load(tmp_path / "d/tokenizer"))


def test_an_error_in_a_worker_ends_the_preparation(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(tokenizer, "encode", lambda *_: 1 / 0)
        run(tmp_path / "d", "jsonl", jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("moment", ["no shard", "two shards"])
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, moment):
    path = jsonl(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(100) for text in DOCUMENTS])
    words = ["-m", "data.prepare", "jsonl", path, "--tokenizer=bytes", "--shard_tokens=50000"]
    run_script(*words, f"--out={tmp_path / 'whole'}", check=0)
    slow = ("import time; from data import prepare, shards; write = shards.Writer.write; "
            "shards.Writer.write = lambda *a: (time.sleep(0.002), write(*a)); prepare.main(__import__('sys').argv[1:])")
    command = [sys.executable, "-c", slow, *map(str, words[2:]), f"--out={tmp_path / 'again'}"]
    process = subprocess.Popen(command, cwd=ROOT)
    wanted, until = {"no shard": 0, "two shards": 2}[moment], time.time() + 60
    while not any(len(list(left.glob("*.bin"))) >= wanted for left in tmp_path.glob(".again.*")):
        assert process.poll() is None and time.time() < until
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "again").exists() and list(tmp_path.glob(".again.*.partial"))
    run_script(*words, f"--out={tmp_path / 'again'}", check=0)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole") and not list(tmp_path.glob(".again*"))


@pytest.mark.parametrize("words, message", [
        (["jsonl"], "jsonl needs files"), (["nosuch"], "^argument source: invalid choice: 'nosuch'"),
        (["text", "x", "--vocab=9"], r"^unrecognized arguments: --vocab=9; did you mean --vocab_size\?"),
        ([], "required: source"), (["fineweb", "x"], "takes no files"),
        (["hf"], "data.prepare hf REPO"), (["hf", "a", "b"], "hf takes one"),
        (["text", "x", "--text-column=a"], "--text_column has no meaning for text"),
        (["stdlib", "--split-on=a"], "--split_on has no meaning for stdlib"),
        (["hf", "x", "--val-split=test", "--val-fraction=0.1"], "exclude each other"),
        (["random", "--tokens=3"], "at least 100"),
        (["text", "x", "--tokenizer=bytes", "--vocab_size=300"], "--tokenizer and --vocab_size exclude each other"),
        *((["random", word], "no meaning for random") for word in ("--limit=5", "--tokenizer=gpt2")),
        *((["fineweb-gpt2-shards", f"--{word}"], f"--{word[:5]}.* has no meaning for fineweb-gpt2-shards") for word in (
            "limit=5", "val_fraction=0.1", "tokenizer=gpt2", "shard_tokens=9", "vocab_size=300", "overwrite")),
        (["text", "x", "--workers=0"], "--workers=0 must be at least 1"),
        (["text", "x", "--val_fraction=0"], "between 0 and 1"),
])
def test_mistakes_in_the_command(words, message):
    with pytest.raises(UserError, match=message):
        prepare.parse(words)


def test_values_keep_their_dashes():
    args = prepare.parse(["text", "a-b", "--split-on=--x-y--", "--out", "d-e"])
    assert (args.files, args.split_on, args.out) == (["a-b"], "--x-y--", "d-e")
