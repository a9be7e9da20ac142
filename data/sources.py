"""Where documents come from: installed source, local text, jsonl, parquet and csv files, standard input, Hugging Face.

`documents` streams them, so that a corpus may be larger than memory. Datasets are read by the package `datasets` and
parquet files by pyarrow, which comes with it, and only they need it; `open_hf` is also what training from
data="hf:REPO" reads. Next: prepare.py.
"""

import csv
import functools
import importlib.metadata
import itertools
import json
import platform
import re
import string
import sys
import sysconfig
from pathlib import Path

from data import columns
from data.files import MARKERS, SHARE, Account, each_file, git_lfs, open_text, split_text, suffix_of, unescape
from errors import UserError, progress, said

# repository, configuration, validation split (None: a share of the documents)
KNOWN = {"tinystories": ("roneneldan/TinyStories", None, "validation"),
         "openwebtext": ("Skylion007/openwebtext", None, None),
         "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", None),
         "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", None)}
PATTERNS = {"text": "*", "jsonl": "*.jsonl*", "parquet": "*.parquet", "csv": "*.csv*"}  # what counts in a folder
INSTALLED = ("stdlib", "packages")  # sources that are on this machine already
# Packages is the source of these and of all that they require: what pip install -r requirements.txt brings, no more.
REQUIREMENTS = ("matplotlib", "numpy", "regex", "safetensors", "tiktoken", "torch", "tqdm")
OF_CUDA = ("nvidia-", "cuda-", "triton")  # come with torch's build for it alone, and some of them are not free
LETTERS = string.ascii_letters.encode() + bytes(range(128, 256))  # of UTF-8
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}  # datasets'
OTHERS = ("those of .csv and .tsv are for the source csv:  python -m data.prepare csv FILES, plain text is for  python "
          "-m data.prepare text FILES")
UNLIKE_TEXT = {  # but read as such, since the source text takes files as they are
    **dict.fromkeys(".jsonl .ndjson .json .csv .tsv".split(),
                    "tables as plain text; the sources jsonl and csv take a column"),
    **dict.fromkeys(".html .htm .xhtml .xml .svg .rtf .ipynb".split(), "markup as plain text, with its tags")}
DELIMITERS = ",;\t|"
NEEDS_DATASETS = "parquet files and Hugging Face datasets need a package:  pip install datasets"  # with pyarrow


def open_hf(repo, split="train", name=None, text_column=None, streaming=True, chat=False):
    """(dataset, column) of a Hugging Face dataset, REPO or REPO@REVISION, or of a local folder or file that datasets
    can read. The column is the one that columns.choose finds."""
    path = Path(repo)
    saved = sorted(path.glob("*.arrow")) if (path / "state.json").is_file() else []  # by save_to_disk
    options = {"split": split, "streaming": streaming}
    if path.is_file() or saved:
        suffix = ".arrow" if saved else suffix_of(path)
        if suffix not in BUILDERS:
            raise UserError(f"{repo}: datasets reads files that end in {', '.join(BUILDERS)}, packed or not; {OTHERS}")
        dataset, names = _load(repo, BUILDERS[suffix], data_files=list(map(str, saved or [path])), **options)
    else:
        where, _, revision = (str(repo), "", "") if path.exists() else str(repo).partition("@")
        dataset, names = _load(repo, where, name, revision=revision or None, **options)
    if (kind := dataset.info.builder_name) == "text" or kind == "csv" and path.exists():
        what = "tables of csv, of which datasets would drop cells" if kind == "csv" else (
            "plain text, of which datasets would make a document of every line")
        raise UserError(f"{repo} holds {what}; {OTHERS}")
    if not names:
        raise UserError(f"{repo} holds no rows of text")
    sample = lambda: list(itertools.islice(dataset.select_columns(names), columns.SAMPLE))
    return dataset, columns.choose(names, sample, text_column, repo, chat)


def network_errors():
    """Of huggingface_hub's client, whichever its version has, and no OSErrors: for `except`, once it was imported."""
    from huggingface_hub.errors import HTTPError
    return HTTPError


def _load(where, *args, **options):
    """datasets.load_dataset with its errors explained: (dataset, its columns but for pictures and sounds)."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(NEEDS_DATASETS) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said once, by the error
    try:
        dataset = datasets.load_dataset(*args, **options)
        features = dataset.features or dict.fromkeys(next(iter(dataset), ()))
        return dataset, [key for key, kind in features.items() if not hasattr(kind, "decode_example")]
    except (OSError, network_errors()) as error:
        advice = "" if Path(where).exists() else "; without a network, download it and give the folder or file"
        raise UserError(f"cannot load the dataset {where}: {str(error) or said(error)}{advice}") from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError) as error:
        advice = "; the Hub has a copy of most such:  hf REPO@refs/convert/parquet" if "script" in str(error) else ""
        raise UserError(f"cannot read {where}: {error}{advice}") from error


def rows(dataset, column, where, first=0, account=None, chat=False):
    """Yield (number of rows up to here, text) of a dataset from row `first` on; rows without a text count as empty."""
    return columns.texts(_numbered(dataset, column, where, first), column, where, account or _streamed(where), chat,
                         unit="row")


@functools.cache
def _streamed(where):
    """The account of a dataset that training reads: it says each thing once."""
    return Account()


def _numbered(dataset, column, where, row):
    try:
        for batch in dataset.select_columns([column]).skip(row).iter(batch_size=128):
            for value in batch[column]:
                row += 1
                yield row, {column: value}
    except (OSError, ValueError, network_errors()) as error:
        raise UserError(f"{where}, after row {row}: {str(error) or said(error)}") from error


def installed_files(source, account):
    """The files of a source of INSTALLED, in a fixed order; account is told what of, their bytes, the licence."""
    parts = {f"Python {platform.python_version()}": ("PSF-2.0", stdlib_files())}
    for name, package in _required(account) if source == "packages" else ():
        parts[f"{name} {package.version}"] = _licence(package.metadata), _package_files(package, account)
    account.about["installed"] = {
        name: {"files": len(files), "bytes": sum(file.stat().st_size for file in files), "licence": licence}
        for name, (licence, files) in parts.items()}
    return [file for _, files in parts.values() for file in files]


def stdlib_files():
    """The .py files of the running Python's standard library, without tests, installed packages and the code tables of
    `encodings`, which are numbers rather than source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo", "encodings"}
    return [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]


def _required(account):
    """[(name, distribution)] of REQUIREMENTS and of all that they require, sorted; what is not installed is counted."""
    from packaging.requirements import Requirement  # comes with matplotlib
    found, waiting = {}, list(REQUIREMENTS)
    while waiting:
        name = re.sub("[-_.]+", "-", waiting.pop()).lower()
        if name not in found and name.startswith(OF_CUDA):
            found[name] = account.add("packages", "of torch for CUDA, left out", name)
        elif name not in found:
            try:
                found[name] = importlib.metadata.distribution(name)
                needs = map(Requirement, found[name].requires or [])
                waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
            except importlib.metadata.PackageNotFoundError:
                found[name] = account.add("packages", "not installed, left out", name)
    return sorted((name, package) for name, package in found.items() if package)


def _package_files(package, account):
    """The .py files of an installed package, whose docstrings are nearly all the documentation that packages bring,
    without tests, copies of other packages, and what a program seems to have written, as tables are."""
    files = []
    for entry in sorted(package.files or []):
        path, folders = Path(entry.locate()), entry.parts[:-1]
        if entry.suffix != ".py" or ".." in folders:  # commands, which lie outside
            continue
        why_not = ("of a package but gone" if not path.is_file() else
                   "of tests, left out" if any(folder.startswith("test") for folder in folders) else
                   "copies of other packages, left out" if "_vendor" in folders else
                   "that look generated, left out" if _generated(path.read_bytes()) else "")
        if why_not:
            account.add("files", why_not, path)
        else:
            files.append(path)
    return files


def _generated(raw):
    """Whether lines of source are longer, on average, than people write, or fewer of its marks letters."""
    marks = raw.translate(None, b" \t\r\n")
    return len(raw) > 90 * (raw.count(b"\n") + 1) or len(marks.translate(None, LETTERS)) > 0.55 * len(marks)


def _licence(about):
    """What a package's metadata name as its licence: an expression, one line, classifiers, or the head of a text."""
    head, *more = (about.get("License") or "").strip().split("\n")
    classified = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    return about.get("License-Expression") or not more and head or ", ".join(classified) or head or "not stated"


def jsonl_rows(file, path):
    """Yield (number, object) of a file of JSON objects, one a line, or of one array of them."""
    seen = False
    for number, line in enumerate(file, 1):
        line = line.strip("\ufeff \t\r\n")
        if not line:
            continue
        whole, seen = line[0] == "[" and not seen, True
        try:
            found = json.loads(line + file.read() if whole else line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no JSON: {error}; one object a line is expected, as  jq -c .  "
                            "makes them, or one array of objects") from error
        for place, row in enumerate(found, 1) if whole else [(number, found)]:
            if not isinstance(row, dict):
                raise UserError(f"{path}, {'object' if whole else 'line'} {place} is no JSON object but a "
                                f"{type(row).__name__}")
            yield place, row


def csv_rows(file, path, delimiter, account, no_quotes=False, multiline=False):
    """Yield (line, {column: cell}) of a table whose first line, but for Excel's sep=; line, names the columns; (line,
    problem) where a row has more or fewer cells than that. An open quote swallows whole rows: more than SHARE of lines
    that seem to be such are an error, unless multiline says that they are none."""
    csv.field_size_limit(2**31 - 1)
    quoting = csv.QUOTE_NONE if no_quotes else csv.QUOTE_MINIMAL
    start = list(itertools.islice(file, 1000))
    told = re.fullmatch(r'"?sep=(.)"?\s*', "".join(start[:1]))
    delimiter = delimiter or (told[1] if told else _delimiter(start, path, quoting))
    account.add("delimiter", "none" if delimiter == "\x1f" else repr(delimiter))
    lines = []  # of one row, since a cell in quotes may hold line ends
    rows = csv.reader((lines.append(line) or line for line in itertools.chain(start, file)), strict=True,
                      delimiter=delimiter, quoting=quoting)
    letters = lambda cells: [any(map(str.isalpha, cell)) for cell in cells]
    place, names, odd, first = lambda: rows.line_num - len(lines) + 1, None, 0, None
    try:
        if told:
            next(rows)
        for row in itertools.chain(rows, [None]):  # the end
            if odd > SHARE * rows.line_num and (row is None or rows.line_num >= 10 * columns.SAMPLE):
                raise UserError(f"{path}, line {first}: in quotes there are lines that look like rows, {odd:,} of the "
                                f"{rows.line_num:,} read: close the quotes, take them as plain characters by "
                                "--no_quotes, or say by --multiline that they are right")
            if row and names is None:
                names = [name if row.count(name) == 1 else f"{name} (column {i})" for i, name in enumerate(row, 1)]
            elif row:
                more = lines[1:] if len(names) > 1 and not multiline else []  # those of cells with line ends
                if more and all(letters(line.split(delimiter)) == letters(row) for line in more):
                    odd, first = odd + len(more), first or place()
                    account.add("quotes", "lines in them that look like rows, kept as text", f"{path}, line {place()}",
                                len(more))
                yield rows.line_num, dict(zip(names, row)) if len(row) == len(names) else (
                    f"{len(row)} cells, the header names {len(names)}")
            lines.clear()
    except csv.Error as error:
        raise UserError(f"{path}, line {place()}: the quotes are not those of csv ({error}): close them, double those "
                        "inside a cell, or take them as plain characters by --no_quotes") from error


def _delimiter(lines, path, quoting):
    """What separates the cells: that of DELIMITERS which stands in the header and cuts the rows into as many cells; a
    character that nobody writes where there is but one column."""
    share = {}
    for delimiter in DELIMITERS:
        cells = [len(row) for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if row]
        if cells and cells[0] > 1:
            share[delimiter] = cells.count(cells[0]) / len(cells)
    best = [delimiter for delimiter in share if share[delimiter] > max(share.values()) - 0.05]
    if len(best) > 1:
        raise UserError(f"{path}: what separates the cells? It may be {' or '.join(map(repr, best))}: set --delimiter")
    return best[0] if best else "\x1f"


def parquet_rows(path, account, text_column, chat):
    """Yield (row, {column: cell}) of a parquet file, of which only the column of the text is read."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(NEEDS_DATASETS) from error
    if not path.stat().st_size and path not in account.named:
        account.add("files", "empty", path)
        return
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            account.add("files", "read")
            if not (count := file.metadata.num_rows):
                return
            sample = lambda: next(file.iter_batches(columns.SAMPLE)).to_pylist()
            wanted = text_column or account.about.get("column")
            column = columns.choose(file.schema_arrow.names, sample, wanted, path, chat)
            cells = (cell for batch in file.iter_batches(1024, columns=[column]) for cell in batch.to_pylist())
            for row, cell in enumerate(progress(path.name, count, " rows", cells), 1):
                yield row, cell
    except UserError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"cannot read {path}: {git_lfs(path) or f'{error} (after row {row})'}") from error


def documents(args, files, account, split="train"):
    """Yield the documents of a source, which is described by the options of prepare.py; split: of those of a dataset.
    What is left out goes into account. Undecodable bytes of files stand in the texts as lone surrogates, line ends of
    text files as they are."""
    separator = unescape(args.split_on or "")
    account.separator = separator.encode("utf-8", "surrogateescape")
    told = ": --split_on={0!r} would cut there" if args.source in ("text", "stdin") else ", as plain text"
    account.markers = {marker: ("{0!r} in the texts" + told).format(marker)
                       for marker in MARKERS if args.source not in INSTALLED}  # whose texts are programs
    whole = functools.partial(split_text, separator=separator, account=account)
    texts = lambda rows, where, unit="line": (
        text for _, text in columns.texts(rows, args.text_column, where, account, args.chat, unit))
    if args.source == "stdin":
        file = open_text(sys.stdin.buffer, "standard input", account, args.encoding, strict=True)
        return progress("reading", unit=" documents", over=whole(file, "standard input"))
    if args.source in ("text", *INSTALLED):
        return each_file(files, whole, account, args.encoding)
    if args.source == "jsonl":
        table = lambda file, path: texts(jsonl_rows(file, path), path)
        return each_file(files, table, account, args.encoding, strict=True)
    if args.source == "csv":
        table = lambda file, path: texts(
            csv_rows(file, path, args.delimiter, account, args.no_quotes, args.multiline), path)
        return each_file(files, table, account, args.encoding, strict=True)
    if args.source == "parquet":
        read = lambda path: texts(parquet_rows(path, account, args.text_column, args.chat), path, "row")
        return itertools.chain.from_iterable(map(read, files))
    repo, name, _ = KNOWN.get(args.source) or (*args.files, None, None)
    dataset, column = open_hf(repo, split, args.name or name, args.text_column, not args.no_streaming, args.chat)
    about = (dataset.info.splits or {}).get(split)
    found = (text for _, text in rows(dataset, column, repo, 0, account, args.chat))
    return progress("reading", about and about.num_examples, " rows", found)
