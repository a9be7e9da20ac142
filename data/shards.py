"""The shard format: llm.c's binary files and, beside them, meta.json. Writing is atomic, reading is checked.

A shard is 256 int32 of header (magic, version, token count), then the tokens: magic 20240520 version 1 holds uint16
ids, magic 20240801 version 7 uint32 ids for vocabularies above 65,536. meta.json records tokenizer, vocabulary,
documents, tokens and bytes of each split, and size, largest id and CRC32 of every shard. Folders of llm.c or
modded-nanogpt, which have no meta.json, are read as they are: whole words of the file names tell the splits apart.
Next: loader.py.
"""

import filecmp
import glob
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np

from data import advice
from errors import UserError, progress

HEADER = 256 * 4
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}  # magic -> version, dtype
SPLITS = ("train", "val")
# What a word of a file's name says of it, where no meta.json does; a test shard is for neither split.
WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
         "eval": "val", "evaluation": "val", "test": "test", "testing": "test"}
OURS = re.compile(r"meta\.json|(train|val)_\d{6,}\.bin|tokenizer(/(encoding\.json|ranks\.tiktoken|tokenizer\.model))?")


class Writer:
    """Writes documents into the shards of a folder. Everything goes to a sibling folder that `finish` renames into
    place, so that the folder exists only if it is complete; use it in a `with` block, which removes the rest on an
    error."""

    def __init__(self, folder, vocab_size, shard_tokens=100_000_000):
        self.folder = Path(os.path.realpath(folder))  # what a link stands for, that it may go on doing so
        self.vocab_size, self.shard_tokens = vocab_size, shard_tokens
        self.hidden = f".{self.folder.name}.{os.uname().nodename}."  # another host's processes are not known here
        self.temporary = self.folder.with_name(f"{self.hidden}{os.getpid()}.partial")
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.splits = {split: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for split in SPLITS}
        self.pending = {split: [] for split in SPLITS}  # documents not yet written

    def __enter__(self):
        for left in self.folder.parent.glob(f"{glob.escape(self.hidden)}*"):
            named = re.fullmatch(r"(\d+)\.(partial|old)", left.name.removeprefix(self.hidden))
            if not named or int(named[1]) != os.getpid() and _is_running(int(named[1])):
                continue  # of another; our own number had a process of this container's life before
            if named[2] == "old" and not self.folder.exists():  # killed between the two renames of `finish`
                os.rename(left, self.folder)
            else:
                shutil.rmtree(left, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self

    def __exit__(self, *error):
        shutil.rmtree(self.temporary, ignore_errors=True)

    def write(self, split, tokens, n_bytes):
        """Append one document (ids, separator included) that came from n_bytes of text."""
        tokens = np.asarray(tokens)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"token id {tokens.max()} does not fit a vocabulary of {self.vocab_size}")
        info = self.splits[split]
        info["documents"] += 1
        info["tokens"] += len(tokens)
        info["bytes"] += n_bytes
        self.pending[split].append(tokens.astype(self.dtype))
        if info["tokens"] >= (len(info["shards"]) + 1) * self.shard_tokens:
            self._write_shards(split, self.shard_tokens)

    def _write_shards(self, split, least):
        """Write the pending tokens as shards of at least so many; the rest waits."""
        waiting, shards = np.concatenate(self.pending[split]), self.splits[split]["shards"]
        magic, version = next((magic, v) for magic, (v, dtype) in FORMATS.items() if dtype == self.dtype)
        while len(waiting) >= least:
            tokens, waiting = waiting[:self.shard_tokens], waiting[self.shard_tokens:]
            header = np.zeros(256, dtype=np.int32)
            header[:3] = magic, version, len(tokens)
            content, name = header.tobytes() + tokens.tobytes(), f"{split}_{len(shards):06d}.bin"
            with open(self.temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            shards.append({"file": name, "tokens": len(tokens), "max_id": int(tokens.max()),
                           "crc32": zlib.crc32(content)})
        self.pending[split] = [waiting]

    def finish(self, save_tokenizer, **about):
        """Write the last shards, the tokenizer and meta.json, then put the folder in place. `about` goes into
        meta.json."""
        for split in SPLITS:
            if self.splits[split]["tokens"] < 2:
                raise UserError(f"the {split} split has {self.splits[split]['tokens']} tokens: "
                                "give more text, smaller documents (--split_on) or a larger --val_fraction")
            self._write_shards(split, 1)
        save_tokenizer(self.temporary / "tokenizer")
        meta = {**about, "vocab_size": self.vocab_size, "splits": self.splits}
        (self.temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        old = self.temporary.with_suffix(".old")
        if self.folder.exists():
            os.rename(self.folder, old)  # deleted last: whenever this is killed, one of the two is whole
        os.rename(self.temporary, self.folder)
        shutil.rmtree(old, ignore_errors=True)


def require_ours(folder):
    """Refuse to replace what is no folder, cannot be renamed, or holds anything that Writer does not write."""
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder) and not folder.is_dir() or os.path.ismount(folder) or Path.cwd().is_relative_to(folder):
        raise UserError(f"{folder} is a file, a mount point or where you are, which cannot be replaced: choose another "
                        "--out")
    names = [path.relative_to(folder).as_posix() for place in (folder, folder / "tokenizer") if place.is_dir()
             for path in place.iterdir()]
    odd, meta = sorted(name for name in names if not OURS.fullmatch(name)), folder / "meta.json"
    if names and not (meta.is_file() and b'"splits"' in meta.read_bytes()):
        odd.append("its meta.json is missing or of another kind")
    if odd:
        raise UserError(f"{folder} holds something else than prepared data ({odd[0]}): delete it yourself or choose "
                        "another --out")


@dataclass
class Split:
    """The tokens of one split of one folder, as a list of memory-mapped arrays, and what is recorded about them."""
    arrays: list
    tokens: int
    max_id: int
    bytes: int | None  # of the text before it was tokenised; None where no meta.json says it, 0 where there was none
    fingerprint: int | str | None = None  # of the content; None where no meta.json has checksums


def read_meta(folder):
    """meta.json of a folder of shards as a dict; {} for a foreign folder that has shards but no meta.json."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        if not path.parent.is_dir() or not _bin_files(path.parent):
            raise UserError(advice.about(folder))
        return {}
    try:
        meta = read_json(path)
        for info in (meta["splits"][split] for split in SPLITS):
            numbers = [shard[key] for shard in info["shards"] for key in ("tokens", "max_id", "crc32")]
            if not all(type(number) is int and number >= 0 for number in (info["bytes"], *numbers)) \
                    or info["tokens"] != sum(shard["tokens"] for shard in info["shards"]):
                raise ValueError("its numbers are no counts, or do not add up")
            if not all(Path(shard["file"]).name == shard["file"] for shard in info["shards"]):
                raise ValueError("a shard lies outside of the folder")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): prepare the data again") from error
    return meta


def read_json(path):
    """The object in a JSON file, or a UserError that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read (it holds no JSON object)")
    return value


def write_json(value, name):
    """What --json asks for: a line on stdout for "-", else a file, which has the old or the new content at any time."""
    if name == "-":
        print(json.dumps(value))
        return
    place = Path(os.path.realpath(name))
    device = os.path.exists(name) and not place.is_file()  # or a pipe, which a file must not replace
    temporary = Path(name) if device else place.with_name(f".{place.name}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    if not device:
        os.replace(temporary, place)
    print(f"wrote {name}")


def open_split(folder, split, verify=True, share=(0, 1)):
    """Open all shards of a split; every header and size is checked, and with `verify` every recorded checksum; of
    share=(i, n), n readers of the same folder, this one reads only every n-th shard from the i-th on for that."""
    folder, splits = Path(folder), read_meta(folder).get("splits")
    recorded = splits and splits[split]
    shards = {name: [folder / shard["file"] for shard in splits[name]["shards"]] for name in SPLITS} if splits \
        else find_shards(folder)
    if split == "train":  # said once
        if not splits:
            print(f"{folder} has no meta.json: by their names {len(shards['train'])} shard(s) are train and "
                  f"{len(shards['val'])} val, and no checksum is compared")
        _tell(folder, shards, "meta.json does not list them" if splits else
              "they are hidden, for tests, or in folders beside others")
    if not shards[split]:
        raise UserError(f"{folder} has no {split} shards: " + (
            "prepare the data again" if recorded else f"rename one of its .bin files, as in {split}_000000.bin"))
    arrays = [_open_shard(path) for path in shards[split]]
    tokens = sum(map(len, arrays))
    if not recorded:
        if len({array.dtype for array in arrays}) > 1:
            print(f"warning: of the {split} shards of {folder} some hold uint16 and some uint32: of one tokenizer?")
        return Split(arrays, tokens, max(int(array.max()) for array in arrays), None)
    for i, (path, array, shard) in enumerate(zip(shards[split], arrays, recorded["shards"])):
        if len(array) != shard["tokens"] or verify and i % share[1] == share[0] and (
                file_crc32(path) != shard["crc32"] or array.max() > shard["max_id"]):
            raise UserError(f"{path} is damaged: its tokens or checksum differ from meta.json; prepare the data again")
    fingerprint = zlib.crc32(repr([shard["crc32"] for shard in recorded["shards"]]).encode())
    return Split(arrays, tokens, max(shard["max_id"] for shard in recorded["shards"]), recorded["bytes"], fingerprint)


def find_shards(folder):
    """{split: sorted paths} of a folder without meta.json, by whole words of the names; "test" is a split here too. If
    the folder itself has no .bin files, those of its folders train/, val/ and the like are meant."""
    files = [path for path in _bin_files(folder) if path.name[0] != "."]
    found = {"train": [], "val": [], "test": []}
    for path in sorted([path for path in files if path.parent == folder] or files):
        splits = _splits(path.relative_to(folder).with_suffix(""))
        if len(splits) != 1:
            raise UserError(f"{path} {'could be of ' if splits else 'names no split, neither train nor val'}"
                            f"{' or '.join(sorted(splits))}: rename it so that one word of its name says which, as in "
                            "train_000001.bin or val_000000.bin, or move it elsewhere")
        found[splits.pop()].append(path)
    return found


def _bin_files(folder):
    """The .bin files of a folder and of those in it that are named for a split."""
    inside = [path for path in folder.iterdir() if path.is_dir() and _splits(path.name)]
    return [path for place in (folder, *inside) for path in place.iterdir()
            if path.suffix.lower() == ".bin" and not path.is_dir()]


def _splits(name):
    """What the words of a name say, in any case; words are runs of letters."""
    return {WORDS[word] for word in re.findall(r"[^\W\d_]+", str(name).lower()) if word in WORDS}


def require_one_split(files, pattern, source, account, usual):
    """Refuse tables that go by their names, below the folder of all, to several splits; a pattern chooses. Of texts,
    which may be called anything, it is only told. usual: the pattern of the source."""
    root, named = os.path.commonpath([os.path.abspath(file.parent) for file in files] or ["/"]), {}
    for file in files:
        if len(splits := _splits(os.path.relpath(file, root))) == 1 and file.suffix != ".bin":  # no text
            named.setdefault(splits.pop(), []).append(file)
    if len(named) < 2 or pattern and all(file.match(pattern.removeprefix("**/")) for file in files):
        return
    if source == "text":
        for split in named.keys() - {"train"}:
            for file in named[split]:
                account.add("files", f"for {split} by their names, trained on like all: --pattern chooses", file)
        return
    hf = f"; to validate on the others:  python -m data.prepare hf {quote(root)} --val_split="
    raise UserError(f"{' and '.join(str(some[0]) for some in named.values())} are for {' and '.join(named)} by their "
                    "names, and all would be trained on: name the files or folders of train alone, or choose by "
                    f"--pattern='*train*', or take all by --pattern='{usual}'" + (source != "csv") * (
                        hf + ("test" if "test" in named else "validation")))


def _tell(folder, shards, why):
    """Print which .bin files of a folder are left out, and which hold the same as another."""
    read, first = [*shards["train"], *shards["val"]], {}
    left = sorted(str(path.relative_to(folder)) for path in set(_bin_files(folder)) - set(read))
    if left:
        print(f"{folder}: {len(left)} .bin file(s) left out, as {why}: {', '.join(left[:5])}{' ...' * (len(left) > 5)}")
    for path in filter(Path.is_file, read):
        other = first.setdefault((path.stat().st_size, np.fromfile(path, "u1", 2**16).tobytes()), path)
        if other != path and filecmp.cmp(other, path, shallow=False):
            leak = other in shards["train"] and path in shards["val"]
            print(f"warning: {path} holds the same tokens as {other.name}: "
                  + ("validation measures what was trained on" if leak else "they count twice"))


def _is_running(pid):
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # but somebody else's
    return True


def _open_shard(path):
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data again")
    header = np.fromfile(path, dtype=np.int32, count=256)
    if len(header) < 256 or int(header[0]) not in FORMATS:
        raise UserError(f"{path} is no token shard: its first number is not {' or '.join(map(str, FORMATS))}"
                        + "; files without a header, as nanoGPT's, are not read: prepare the text again")
    version, dtype = FORMATS[int(header[0])]
    count, size = int(header[2]), path.stat().st_size
    if header[1] != version:
        raise UserError(f"{path} has version {header[1]}, expected {version}")
    if size != HEADER + count * np.dtype(dtype).itemsize or count < 1:
        raise UserError(f"{path} is truncated or damaged: {count} tokens announced, {size} bytes found")
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER, shape=(count,))


def file_crc32(path, block=2**24):
    """CRC32 of a file, read in blocks."""
    crc = 0
    with open(path, "rb") as file, progress(f"checksum of {path.name}", path.stat().st_size) as bar:
        while chunk := file.read(block):
            crc = zlib.crc32(chunk, crc)
            bar.update(len(chunk))
    return crc
