"""Where documents come from: local text, jsonl, parquet and csv files, standard input, Hugging Face datasets.

`documents` streams them, so that a corpus may be larger than memory. Files may be compressed: .gz, .bz2, .xz, .zst.
Parquet files and datasets are read by the package `datasets`, and only they need it; `open_hf` is also what training
from data="hf:REPO" reads. Next: prepare.py.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import sys
import sysconfig
import zlib
from pathlib import Path

from errors import UserError

# repository, configuration, validation split (None: a share of the documents)
KNOWN = {"tinystories": ("roneneldan/TinyStories", None, "validation"),
         "openwebtext": ("Skylion007/openwebtext", None, None),
         "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", None),
         "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", None)}
PATTERNS = {"text": "*", "jsonl": "*.jsonl*", "parquet": "*.parquet", "csv": "*.csv*"}  # what counts in a folder
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json", ".txt": "text",
            ".arrow": "arrow"}  # of datasets
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BLOCK = 2**24  # characters of a text file read at a time


# ---------------------------------------------------------------------- Hugging Face datasets

def open_hf(repo, split="train", name=None, text_column=None, streaming=True):
    """(dataset, column) of a Hugging Face dataset, REPO or REPO@REVISION, or of a local folder or file that datasets
    can read. The column is the given one, else "text", else the only one that holds strings."""
    path = Path(repo)
    saved = sorted(path.glob("*.arrow")) if (path / "state.json").is_file() else []  # by save_to_disk
    if path.is_file() or saved:
        suffix = ".arrow" if saved else next((s for s in reversed(path.suffixes) if s not in COMPRESSED), None)
        if suffix not in BUILDERS:
            raise UserError(f"{repo}: datasets reads files that end in {', '.join(BUILDERS)}, compressed or not")
        return _load(repo, text_column, BUILDERS[suffix], data_files=list(map(str, saved or [path])),
                     split=split, streaming=streaming)
    where, _, revision = (str(repo), "", "") if path.exists() else str(repo).partition("@")
    return _load(repo, text_column, where, name, revision=revision or None, split=split, streaming=streaming)


def _load(where, text_column, *args, **options):
    """datasets.load_dataset with its errors explained, then the column chosen; returns (dataset, column)."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("parquet files and Hugging Face datasets need a package:  pip install datasets") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said once, by the error
    try:
        dataset = datasets.load_dataset(*args, **options)
        first = {} if dataset.features else next(iter(dataset))
    except StopIteration as error:
        raise UserError(f"{where} holds no rows") from error
    except OSError as error:
        advice = "" if Path(where).exists() else (
            "; without a network, download it elsewhere and give the folder or file:  python -m data.prepare hf FOLDER")
        raise UserError(f"cannot load the dataset {where}: {_line(error)}{advice}") from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        advice = "; the Hub has a copy of most such:  hf REPO@refs/convert/parquet" if "script" in str(error) else ""
        raise UserError(f"cannot read {where}: {_line(error)}{advice}") from error
    types = {key: getattr(kind, "dtype", "list") for key, kind in (dataset.features or {}).items()}
    strings = [key for key, kind in types.items() if kind in ("string", "large_string")]
    return dataset, choose_column(list(types) or list(first), strings or _strings(first), text_column, where)


def choose_column(columns, strings, wanted, where):
    """The column that holds the text, or a UserError that names the columns."""
    column = wanted or ("text" if "text" in columns else strings[0] if len(strings) == 1 else None)
    if column in strings:
        return column
    problem = "which column is the text?" if column is None else (
        f"no column {column!r}." if column not in columns else f"column {column!r} holds no text.")
    raise UserError(f"{where}: {problem} The columns are {', '.join(map(str, columns))}: set --text_column=NAME, or "
                    "?column=NAME in data='hf:...'")


def _strings(row):
    return [key for key, value in row.items() if isinstance(value, str | None)]


def _line(error):
    return " ".join(str(error).split())[:300]


def rows(dataset, column, where, first=0):
    """Yield (number of rows up to here, text) of a dataset from row `first` on; rows without a text count as empty."""
    row = first
    try:
        for batch in dataset.select_columns([column]).skip(first).iter(batch_size=128):
            for text in batch[column]:
                row += 1
                yield row, text or ""
    except (OSError, ValueError) as error:
        raise UserError(f"{where}, after row {row}: {_line(error)}") from error


# ---------------------------------------------------------------------- local files

def stdlib_files():
    """The .py files of the running Python's standard library, without tests, installed packages and the code tables of
    `encodings`, which are numbers rather than source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo", "encodings"}
    return [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]


def list_files(names, pattern):
    """The files that names, folders (searched for the pattern) and globs stand for, each once."""
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob(pattern) if p.is_file())
        else:
            matches = [path] if path.is_file() else map(Path, glob.glob(str(name), recursive=True))
            found = sorted(match for match in matches if match.is_file())
        if not found:
            raise UserError(f"no files {path / pattern}" if path.is_dir() else f"no file or folder {name}")
        files += found
    return list(dict.fromkeys(files))


def _decompressed(path, raw):
    """A binary file object over `raw`, the open file of that path."""
    if path.suffix == ".zst":
        try:
            import pyarrow  # comes with datasets
        except ImportError as error:
            raise UserError(f"{path}: .zst needs a package:  pip install pyarrow  (or pack it as .gz)") from error
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix)
    return opened(raw) if opened else raw


def _each_file(files, parts, option):
    """Yield (bytes of files read so far, text) for what parts(binary file, path, option) yields of every file."""
    done = 0
    for path in files:
        try:
            with open(path, "rb") as raw:
                for part in parts(_decompressed(path, raw), path, option):
                    yield done + raw.tell(), part
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        done += path.stat().st_size


def split_text(binary, path, split_on=None):
    """Yield the documents of a file: all of it, or the parts between separators; bytes that are no UTF-8 become
    replacement characters."""
    file = io.TextIOWrapper(binary, encoding="utf-8", errors="replace")
    if not split_on:
        yield file.read()
        return
    rest = ""
    while block := file.read(BLOCK):
        *whole, rest = (rest + block).split(split_on)
        yield from whole
    yield rest


def jsonl_texts(binary, path, column=None):
    """Yield the text of every line of a file of JSON objects; null counts as empty."""
    for number, line in enumerate(binary, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object but a {type(row).__name__}")
        column = column or choose_column(list(row), _strings(row), None, where)
        if not isinstance(row.get(column, 0), str | None):  # missing, or a number
            choose_column(list(row), _strings(row), column, where)
        yield row[column] or ""


def csv_texts(binary, path, column=None):
    """Yield the text column of a comma-separated file whose first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace", newline=""))
    try:
        columns = next(rows, None)
        if columns is None:  # an empty file
            return
        column = choose_column(columns, columns, column, path)
        if columns.count(column) > 1:
            raise UserError(f"{path} has {columns.count(column)} columns {column!r}: rename one of them")
        place = columns.index(column)
        for row in rows:
            if row:
                yield row[place] if place < len(row) else ""
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from error


# ---------------------------------------------------------------------- any source

def documents(source, files=(), split_on=None, repo=None, split="train", name=None, text_column=None, streaming=True):
    """(iterator, total, unit) of a source: the iterator yields (position, text), and position counts up to total, in
    bytes of the files or rows of a dataset; total is None where it is not known."""
    if source == "stdin":
        texts = split_text(sys.stdin.buffer, None, split_on)
        return ((number, text) for number, text in enumerate(texts, 1)), None, " documents"
    if source in ("text", "stdlib", "jsonl", "csv"):
        parts, option = {"jsonl": (jsonl_texts, text_column), "csv": (csv_texts, text_column)}.get(
            source, (split_text, split_on))
        return _each_file(files, parts, option), sum(path.stat().st_size for path in files), "B"
    if source == "parquet":
        paths = [str(path) for path in files if path.stat().st_size]
        dataset, column = _load(str(files[0]), text_column, "parquet", data_files=paths or [str(files[0])],
                                split="train", streaming=True)
        return rows(dataset, column, "parquet"), sum(map(_parquet_rows, paths)), " rows"  # a damaged one shows here
    dataset, column = open_hf(repo, split, name, text_column, streaming)
    about = (dataset.info.splits or {}).get(split)
    return rows(dataset, column, repo), about.num_examples if about else None, " rows"


def _parquet_rows(path):
    import pyarrow.parquet  # comes with datasets
    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_line(error)}") from error
