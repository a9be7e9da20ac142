"""Text to shards:  python -m data.prepare SOURCE [FILES...] [--tokenizer=...] [--out=data/NAME]

stdlib: the Python standard library's own source on this machine, without its test folders; needs no download.
text: any UTF-8 files, one document each, or with --split_on every part between two separators. stdin: the same, piped.
jsonl, parquet, csv: files, folders or globs with a text column. tinystories, openwebtext, fineweb, fineweb-edu: from
Hugging Face, as is any other dataset, also one on disk, by hf REPO. random: tokens without a text, for speed tests.
fineweb-gpt2-shards: ready-made GPT-2 tokens, 100 million a shard.
A document goes to the val split by a hash of its text, so that the same text never stands in both; of a single document
the end is val. A folder that is complete is reused; an interrupted preparation leaves nothing that looks complete.
Next: ../configs/debug.py trains on the result.
"""

import argparse
import collections
import hashlib
import itertools
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import errors
from data import sources, tokenizer
from data.shards import Writer, open_split, read_meta
from errors import UserError

FILES = ("text", "jsonl", "parquet", "csv", "hf")  # sources that want names of files, or of a repository
OPTIONS = {  # what belongs to some sources only
    "pattern": FILES[:4], "split_on": ("text", "stdin"), "text_column": (*FILES[1:], *sources.KNOWN),
    "name": ("hf", *sources.KNOWN), "split": ("hf", *sources.KNOWN), "val_split": ("hf", *sources.KNOWN),
    "no_streaming": ("hf", *sources.KNOWN), "tokens": ("random",), "shards": ("fineweb-gpt2-shards",)}
SHARDS_REPO = "kjj0/fineweb10B-gpt2"
TRAINING_TEXT = 2**30  # characters that a tokenizer is trained on, at most
CHUNK = 2**18  # characters that a worker encodes at a time


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("source", help="where the text comes from",
        choices=["stdlib", "text", "stdin", "jsonl", "parquet", "csv", *sources.KNOWN, "hf", "random",
                 "fineweb-gpt2-shards"])
    add("files", nargs="*", help="files, folders to search for files, or globs; for hf: a repository, folder or file")
    add("--out", help="folder of the shards (default data/SOURCE)")
    add("--tokenizer", help="what data/tokenizer.py's load takes, as bytes, gpt2, a folder, 'FOLDER?end_of_text=TOKEN' "
        "(default: train a BPE)")
    add("--vocab_size", "--train_tokenizer", type=int, default=4096,
        help="size of the trained BPE, end of text included; for random: of the vocabulary")
    add("--pattern", help="which files of a folder, as in *.py (default: all, or those of the source's kind)")
    add("--split_on", help="a separator between documents inside a file")
    add("--text_column", help="the column of the text (default: text, or the only one that holds strings)")
    add("--name", help="configuration of the dataset, as sample-10BT of fineweb")
    add("--split", help="split of the dataset to train on (default train)")
    add("--val_split", help="split of the dataset to validate on (default: a share of the documents)")
    add("--no_streaming", action="store_true", help="download the dataset as a whole first, into datasets' cache")
    add("--limit", type=int, help="documents to take, at most, of each split that is read")
    add("--val_fraction", type=float, help="share of the documents held out (default 0.02)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens of one shard")
    add("--workers", type=int, default=os.cpu_count(), help="threads that encode; any number gives the same result")
    add("--tokens", type=int, help="for random: how many (default 10 million)")
    add("--shards", type=int, help="for fineweb-gpt2-shards: how many (default 10, all: 103)")
    add("--overwrite", action="store_true", help="replace a folder that was made in another way")
    names = (word.partition("=") for word in argv)
    args = parser.parse_args([(name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name)
                              + equals + value for name, equals, value in names])
    check(args)
    return args


def check(args):
    """Raise UserError for what cannot work; fill in the defaults that depend on the source."""
    source = args.source
    if source in FILES and not args.files:
        wanted = "REPO" if source == "hf" else "notes/"
        raise UserError(f"{source} needs files or folders:  python -m data.prepare {source} {wanted} --out=data/notes")
    if source not in FILES and args.files:
        raise UserError(f"{source} takes no files")
    if source == "hf" and len(args.files) > 1:
        raise UserError("hf takes one repository, folder or file")
    for option, places in OPTIONS.items():
        if getattr(args, option) and source not in places:
            raise UserError(f"--{option} has no meaning for {source}, only for {', '.join(places)}")
    if args.val_split and args.val_fraction:
        raise UserError("--val_split and --val_fraction exclude each other")
    if source in sources.KNOWN and not args.val_fraction:
        args.val_split = args.val_split or sources.KNOWN[source][2]
    args.pattern = args.pattern or sources.PATTERNS.get(source, "*")
    args.val_fraction = 0.02 if args.val_fraction is None else args.val_fraction
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction} must lie between 0 and 1")
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(f"--shard_tokens={args.shard_tokens} must lie in 2..2147483647")
    for option, least in (("limit", 1), ("workers", 1), ("tokens", 100), ("shards", 1), ("vocab_size", 2)):
        if getattr(args, option) is not None and getattr(args, option) < least:
            raise UserError(f"--{option}={getattr(args, option)} must be at least {least}")
    if source == "stdin" and (args.tokenizer or "words:").startswith("words:"):
        raise UserError("stdin can be read only once, so no tokenizer can be trained on it: give another --tokenizer")


# ---------------------------------------------------------------------- documents

def open_source(args, files, split):
    """(iterator, total, unit) of one split of the source: see sources.documents."""
    repo, name, _ = sources.KNOWN.get(args.source, (args.files[0] if args.files else None, None, None))
    return sources.documents(args.source, files, args.split_on, repo, split or args.split or "train",
                             args.name or name, args.text_column, not args.no_streaming)


def documents(args, files):
    """(iterator, total, unit): yields (position, split, text, UTF-8 bytes) of every distinct, non-empty document.

    The split is --val_split's, which comes first, or drawn by a hash of the text. A single document, as a book in one
    file, is cut instead: its end is val.
    """
    seen = set()
    found, total, unit = open_source(args, files, None)
    texts = itertools.islice(distinct(found, seen), args.limit)
    if not args.val_split:
        return by_hash(texts, args.val_fraction), total, unit
    val = itertools.islice(distinct(open_source(args, files, args.val_split)[0], seen), args.limit)
    return itertools.chain(((0, "val", text, raw) for _, text, raw in val),
                           ((position, "train", text, raw) for position, text, raw in texts)), total, unit


def distinct(found, seen):
    """Yield (position, text, UTF-8 bytes) of the documents that are not empty and whose 8-byte digest is not in `seen`,
    and add it."""
    for position, text in found:
        try:
            raw = text.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can hold
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            raw = text.encode()
        digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        if text and not text.isspace() and digest not in seen:
            seen.add(digest)
            yield position, text, raw


def by_hash(texts, fraction):
    """Yield (position, split, text, UTF-8 bytes)."""
    first = list(itertools.islice(texts, 2))
    if len(first) == 1:
        position, text, _ = first[0]
        at = int(len(text) * (1 - fraction))
        cut = next((end + 1 for mark in "\n " if (end := text.find(mark, at, -1)) >= 0), at)
        yield from ((position, split, part, part.encode()) for split, part in
                    (("train", text[:cut]), ("val", text[cut:])))
        return
    for position, text, raw in itertools.chain(first, texts):
        yield position, "val" if zlib.crc32(raw) / 2**32 < fraction else "train", text, raw


# ---------------------------------------------------------------------- tokens

def encoded(found, encoder, workers):
    """Yield lists of (position, split, ids, bytes) in the order of the documents. Threads do the encoding, since
    tiktoken leaves Python's lock alone meanwhile; a few chunks of documents wait at any time."""
    def work(chunk):
        return [(position, split, tokenizer.encode(encoder, text), size) for position, split, text, size in chunk]

    waiting, chunk, characters = collections.deque(), [], 0
    with ThreadPoolExecutor(workers) as pool:
        for position, split, text, raw in found:
            chunk.append((position, split, text, len(raw)))
            characters += len(text)
            if characters >= CHUNK:
                waiting.append(pool.submit(work, chunk))
                chunk, characters = [], 0
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        if chunk:
            waiting.append(pool.submit(work, chunk))
        while waiting:
            yield waiting.popleft().result()


def write_documents(writer, args, files, encoder):
    found, total, unit = documents(args, files)
    tokens, started = 0, time.time()
    with tqdm(total=total, desc="tokenizing", unit=unit, unit_scale=True, disable=None) as bar:
        for chunk in encoded(found, encoder, args.workers):
            for _, split, ids, size in chunk:
                writer.write(split, ids, size)
                tokens += len(ids)
            bar.set_postfix_str(f"{tokens / (time.time() - started):,.0f} tokens/s", refresh=False)
            bar.update(max(chunk[-1][0] - bar.n, 0))


def write_random(writer, args):
    """Uniform ids; there are no bytes of text, which metrics take for unknown."""
    rng = np.random.Generator(np.random.Philox(key=0))
    count = args.tokens or 10_000_000
    held_out = max(int(count * args.val_fraction), 2)
    for split, left in (("val", held_out), ("train", count - held_out)):
        for start in tqdm(range(0, left, 2**20), desc=split, unit=" M tokens", disable=None):
            writer.write(split, rng.integers(0, args.vocab_size, min(2**20, left - start), dtype=np.uint32), 0)


def make_tokenizer(args, files):
    """The tokenizer that is named, or a BPE trained on the documents of the training split."""
    def texts():
        print("training a tokenizer")
        left = TRAINING_TEXT
        for _, split, text, _ in documents(args, files)[0]:
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                print(f"on the first {TRAINING_TEXT:,} characters")
                return
    if not args.tokenizer:
        return tokenizer.train_bpe(texts(), args.vocab_size)
    encoder = tokenizer.load(args.tokenizer, texts())
    for line in tokenizer.notes(encoder):
        print(line)
    return encoder


def fetch_shards(args, out):
    """Download llm.c shards of FineWeb as they are; each is complete or absent, and those that are there are kept."""
    names = [f"fineweb_train_{i:06d}.bin" for i in range(1, (args.shards or 10) + 1)] + ["fineweb_val_000000.bin"]
    missing = [name for name in names if not (out / name).is_file()]
    for name in tqdm(missing, desc="shards", disable=None):
        try:
            from huggingface_hub import hf_hub_download
            hf_hub_download(SHARDS_REPO, name, repo_type="dataset", local_dir=out)
        except ImportError as error:
            raise UserError("downloading shards needs a package:  pip install huggingface_hub") from error
        except OSError as error:
            raise UserError(f"cannot download {name} of the dataset {SHARDS_REPO} ({error}): fetch {names[0]} .. "
                            f"{names[-2]} and {names[-1]} on another machine and put them into {out}/") from error
    for split in ("train", "val"):
        print(f"{split:5} {open_split(out, split).tokens:>13,} tokens")
    print(f"{out} is complete: {len(missing)} of {len(names)} shards downloaded; train with --tokenizer=gpt2")
    return out


def main(argv=None):
    """Prepare one folder; returns its path."""
    args = parse(argv)
    out = Path(args.out or f"data/{args.source}")
    if args.source == "fineweb-gpt2-shards":
        return fetch_shards(args, out)
    names = args.files if args.source != "hf" or Path(args.files[0]).exists() else []
    files = sources.stdlib_files() if args.source == "stdlib" else sources.list_files(names, args.pattern)
    how = {key: value for key, value in vars(args).items()
           if key not in ("out", "overwrite", "workers", "no_streaming") and value is not None}
    how |= {"found": len(files), "bytes": sum(file.stat().st_size for file in files)}
    if out.exists() and not args.overwrite:
        before = read_meta(out).get("prepared_by")
        known = {key: value for key, value in before.items() if value is not None} if isinstance(before, dict) else {}
        if known == how and args.source != "stdin":
            print(f"{out} is ready (made earlier in the same way)")
            return out
        raise UserError(f"{out} exists and was made in another way: choose another --out, or --overwrite it")
    if out.exists() and any(out.iterdir()) and not (out / "meta.json").is_file():
        raise UserError(f"{out} holds something else than prepared data: delete it yourself or choose another --out")
    started = time.time()
    if args.source == "random":
        with Writer(out, args.vocab_size, args.shard_tokens) as writer:
            write_random(writer, args)
            writer.finish(lambda folder: None, tokenizer=None, prepared_by=how)
    else:
        encoder = make_tokenizer(args, files)
        with Writer(out, encoder.n_vocab, args.shard_tokens) as writer:
            write_documents(writer, args, files, encoder)
            writer.finish(lambda folder: tokenizer.save(encoder, folder), prepared_by=how,
                          **tokenizer.describe(encoder))
    for split, info in writer.splits.items():
        print(f"{split:5} {info['documents']:>9,} documents {info['tokens']:>13,} tokens {info['bytes']:>14,} bytes "
              f"{info['bytes'] / info['tokens']:.2f} bytes/token")
    seconds = time.time() - started
    print(f"wrote {out} in {seconds:.1f} s, {sum(s['tokens'] for s in writer.splits.values()) / seconds:,.0f} tokens/s")
    return out


if __name__ == "__main__":
    errors.run(main)
