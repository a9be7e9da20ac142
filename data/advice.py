"""What to do about a --data that is no folder of shards: the command that fits the thing that it names.

Commands are quoted for a shell and run as they stand. Next: shards.py, which raises them as errors.
"""

import collections
import difflib
import glob
import itertools
import os
import re
from pathlib import Path
from shlex import quote

from data.files import Account, suffix_of, walk

# Sources of prepare.py that want no files, with the options of their example.
SOURCES = {"stdlib": "--vocab_size=2048", "packages": "", "tinystories": "", "openwebtext": "--tokenizer=gpt2",
           "fineweb": "--tokenizer=gpt2 --limit=1000000", "fineweb-edu": "--tokenizer=gpt2 --limit=1000000",
           "fineweb-gpt2-shards": "--shards=10", "random": ""}
# Its words for files that end so; all others may be text.
KINDS = {".jsonl": "jsonl {}", ".ndjson": "jsonl {} --pattern='*.ndjson*'", ".csv": "csv {}", ".txt": "text {}",
         ".tsv": "csv {} --pattern='*.tsv*'", ".parquet": "parquet {}", ".json": "hf {}", ".arrow": "hf {}"}
TRY = "for a first try  python -m data.prepare stdlib --vocab_size=2048  makes  --data=data/stdlib"


def about(name):
    """The message for a name that is no folder with meta.json or .bin files."""
    path = Path(name)
    if not path.exists():
        return f"no data folder {name}: {_instead_of(str(name), path)}"
    inside = [folder for folder in sorted(path.iterdir()) if has_shards(folder)] if path.is_dir() else []
    if inside or path.is_file() and has_shards(path.parent):
        return f"{name} holds no shards itself: did you mean {_choose(inside or [path.parent])}"
    sizes = collections.Counter()
    for file in [path] if path.is_file() else itertools.islice(walk(path, "*", Account()), 1000):
        sizes[_source(file)] += file.stat().st_size
    source = max(sizes.keys() - {None}, key=sizes.get, default=None)
    if not source or not sizes[source]:
        return f"{name} holds no shards and nothing to make them of, as text, jsonl, parquet, csv, arrow files; {TRY}"
    out = Path("data", path.absolute().name.split(".")[0] or "text")
    if out.absolute() == path.absolute():
        out = out.with_name(f"{out.name}-shards")
    return f"{name} holds no shards but {source.split()[0].replace('hf', 'a dataset')}: " + (
        f"did you mean {_choose([out])}" if has_shards(out) else
        f"make them with  {_prepare(source.format(quote(str(path))), out)}  and train with  {_choose([out])}")


def has_shards(folder):
    return folder.is_dir() and os.access(folder, os.R_OK | os.X_OK) and any(
        path.name == "meta.json" or path.suffix.lower() == ".bin" for path in folder.iterdir())


def _instead_of(name, path):
    """What may have been meant by a path that does not exist, as data/d/train_*.bin or data/stdilb."""
    home = Path(os.path.expanduser(name))  # which a shell does not do after =
    for meant in (home, Path("data", path.name), *([path.parent] if path.suffix == ".bin" else [])):
        if meant == home and home.exists() or has_shards(meant):
            return f"did you mean {_choose([meant])}"
    matches = sorted(map(Path, glob.glob(str(home), recursive=True)))
    if source := next(filter(None, map(_source, filter(Path.is_file, matches))), None):
        folder = matches[0].absolute().parent
        what = str(folder if source.startswith("hf") else home)  # which takes one folder or file
        return f"make it with  {_prepare(source.format(quote(what)), Path('data', folder.name))}"
    out = path if len(path.parts) > 1 else Path("data", path.name)
    dataset = re.fullmatch(r"(?:https?:/+huggingface\.co/)?(?:datasets/)?([\w.-]+/[\w.-]+)/?", name)
    if dataset and not Path(dataset[1]).parent.exists():
        return (f"if Hugging Face's dataset is meant,  {_prepare('hf ' + dataset[1], Path('data', path.name))}  or, to "
                f"read it while training,  --data=hf:{dataset[1]} --tokenizer=gpt2")
    if re.match(r"\w+:/", name):
        return "remote paths are not read: download it, then  " + _prepare("text FILES", Path("data", path.stem))
    near = {folder.name: folder for folder in path.parent.glob("*") if has_shards(folder)}
    close = difflib.get_close_matches(path.name, [*near, *SOURCES], 1, 0.75)
    if close and close[0] in near:
        return f"did you mean {_choose([near[close[0]]])}"
    if close:
        return f"make it with  {_prepare(f'{close[0]} {SOURCES[close[0]]}'.strip(), out.with_name(close[0]))}"
    return f"of your own text make it with  {_prepare('text FILES', out)} ; {TRY}"


def _choose(folders):
    return " or ".join(f"--data={quote(str(folder))}" for folder in folders[:5])


def _prepare(source, out):
    return f"python -m data.prepare {source} --out={quote(str(out))}"


def _source(file):
    """The words of prepare.py that read a file; None where it is no text."""
    if suffix_of(file) in KINDS:
        return KINDS[suffix_of(file)]
    with open(file, "rb") as opened:
        return None if b"\0" in opened.read(4096) else "text {}"
