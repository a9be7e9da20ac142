"""What to do about a --data that is no folder of shards: the command that fits the thing that it names.

Commands are quoted for a shell and run as they stand. Next: shards.py, which raises them as errors.
"""

import collections
import difflib
import os
import re
import shlex
from pathlib import Path

# Sources of prepare.py that want no files, with what their README example adds.
SOURCES = {"stdlib": " --vocab_size=2048", "tinystories": "", "openwebtext": " --tokenizer=gpt2",
           "fineweb": " --tokenizer=gpt2 --limit=1000000", "fineweb-edu": " --tokenizer=gpt2 --limit=1000000",
           "fineweb-gpt2-shards": " --shards=10", "random": ""}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "hf",
         ".arrow": "hf"}  # suffix -> source of prepare.py; others are text, if they look like it
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LOOK_AT = 1000  # files of a folder, at most


def about(name):
    """The message for a name that is no folder with meta.json or .bin files."""
    path = Path(name)
    if path.is_dir():
        inside = [folder for folder in sorted(path.iterdir()) if has_shards(folder)]
        if inside:
            return f"{name} holds no shards, but its folders do: {_choose(inside)}"
        return f"{name} is a folder without shards{_prepare(path)}"
    if path.suffix.lower() == ".bin" or path.name == "meta.json":
        if has_shards(path.parent):
            return f"{name}: the folder of the shards is wanted:  {_choose([path.parent])}"
    if path.exists():
        return f"{name} is a file, not a folder of shards{_prepare(path)}"
    return f"no data folder {name}: {_instead_of(str(name), path)}"


def has_shards(folder):
    return folder.is_dir() and any(file.name == "meta.json" or file.suffix.lower() == ".bin"
                                   for file in folder.iterdir())


def headers(path):
    """The advice for a .bin file without the header of a shard."""
    out = path.parent.with_name(path.absolute().parent.name + "-shards")
    code = f"from data.shards import add_headers; add_headers({str(path.parent)!r}, {str(out)!r})"
    return ("; if it is nanoGPT's, uint16 ids and nothing else, give it a header:  "
            f"python -c {shlex.quote(code)}  and train with {_choose([out])}")


def _choose(folders):
    shown = ", ".join(f"--data={shlex.quote(str(folder))}" for folder in folders[:5])
    return shown + (f" ... ({len(folders)} in all)" if len(folders) > 5 else "")


def _instead_of(name, path):
    """What may have been meant by a path that does not exist."""
    here = sorted({*path.parent.glob("*"), *Path("data").glob("*")}) if path.parent.is_dir() else []
    prepared = [folder for folder in here if has_shards(folder)]
    same = [folder for folder in (path.expanduser(), Path("data", path.name)) if folder.exists()]
    if same:
        return f"did you mean {_choose(same[:1])}"
    out = path if len(path.parts) > 1 else Path("data", path.name)
    if path.name in SOURCES:
        return f"make it with  {_command(path.name + SOURCES[path.name], out)}"
    close = difflib.get_close_matches(path.name, [folder.name for folder in prepared], 3, 0.7)
    if close:
        return f"did you mean {_choose([folder for folder in prepared if folder.name in close])}"
    if source := difflib.get_close_matches(path.name, SOURCES, 1, 0.8):
        return f"did you mean {source[0]}?  {_command(source[0] + SOURCES[source[0]], out.with_name(source[0]))}"
    dataset = re.fullmatch(r"(?:https?://huggingface\.co/)?(?:datasets/)?([\w.-]+/[\w.-]+)/?", name)
    if dataset and not Path(dataset[1]).parent.exists():
        return (f"of the Hugging Face dataset of that name make one with  "
                f"{_command('hf ' + dataset[1], Path('data', Path(dataset[1]).name))}  or read it while training:  "
                f"--data=hf:{dataset[1]} --tokenizer=gpt2")
    known = f"there are {_choose(prepared)}; " if prepared else ""
    return (f"{known}of text of your own make it with  {_command('text FILES', out)}  (FILES: text files or folders), "
            f"and for a first try  {_command('stdlib' + SOURCES['stdlib'], Path('data/stdlib'))}")


def _prepare(path):
    """": " and how to make shards of a file or folder that exists."""
    sizes, saved = collections.Counter(), False
    for file in _files(path):
        sizes[_suffix(file)] += file.stat().st_size
        saved |= file.name == "state.json"  # save_to_disk's
    del sizes[None]
    if not sizes:
        return ", with nothing in it that data.prepare reads (text, jsonl, parquet, csv, arrow)"
    suffix = max(sizes, key=sizes.get)
    out = Path("data", path.absolute().name.split(".")[0] or "text")
    if out.absolute() == path.absolute():
        out = out.with_name(out.name + "-shards")
    if has_shards(out):
        return f"; one is {_choose([out])}"
    kind, quoted = KINDS.get(suffix, "text"), shlex.quote(str(path))
    if suffix == ".arrow" and (saved or path.is_file()):
        load = f"load_from_disk({str(path)!r})" if path.is_dir() else f"Dataset.from_file({str(path)!r})"
        table = out.with_suffix(".parquet")
        code = f"from datasets import Dataset, load_from_disk; {load}.to_parquet({str(table)!r})"
        first, kind, quoted = f"python -c {shlex.quote(code)} && ", "parquet", shlex.quote(str(table))
    else:
        first = ""
    if path.is_dir() and suffix in (".ndjson", ".tsv"):
        quoted += f" --pattern='*{suffix}*'"
    return f": make one with  {first}{_command(f'{kind} {quoted}', out)}  and train with {_choose([out])}"


def _command(source, out):
    return f"python -m data.prepare {source} --out={shlex.quote(str(out))}"


def _files(path):
    """The files of a folder that are not hidden, so many as LOOK_AT; or the file itself."""
    if path.is_file():
        yield path
    left = LOOK_AT
    for folder, inside, names in os.walk(path):
        inside[:] = sorted(name for name in inside if name[0] != ".")
        for name in sorted(names)[:left]:
            if name[0] != "." and os.path.isfile(file := Path(folder, name)):
                yield file
        left -= len(names)
        if left <= 0:
            return


def _suffix(file):
    """A key of KINDS, "" for text, None for what is neither."""
    packed = file.suffix.lower() in COMPRESSED
    suffix = Path(file.stem).suffix.lower() if packed else file.suffix.lower()
    if suffix in KINDS:
        return suffix
    if packed or suffix in (".txt", ".md"):
        return None if suffix == ".tar" else ""
    with open(file, "rb") as opened:
        return None if b"\0" in opened.read(4096) else ""
