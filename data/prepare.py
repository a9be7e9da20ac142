"""Text to shards:  python -m data.prepare stdlib | text FILES...  [--tokenizer=...] [--out=data/NAME]

stdlib: the Python standard library's own source on this machine, without its test folders; needs no download.
text: any UTF-8 files, one document each, or with --split_on every part between two separators.
A document goes to the val split by a hash of its text, so that the same text never stands in both; of a single document
the end is val. A folder that is complete is reused; an interrupted preparation leaves nothing that looks complete.
Next: ../configs/debug.py trains on the result.
"""

import argparse
import sysconfig
import time
import zlib
from pathlib import Path

from tqdm import tqdm

import errors
from data import tokenizer
from data.shards import Writer, read_meta
from errors import UserError


def stdlib_files():
    """The .py files of the running Python's standard library, without tests, installed packages and the code tables of
    `encodings`, which are numbers rather than source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "turtledemo", "encodings"}
    return [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]


def documents(files, fraction, split_on=None):
    """Yield (split, text) of every distinct, non-empty document; bytes that are no UTF-8 become replacement characters.

    The split is drawn by a hash of the text. A single document, as a book in one file, is cut instead: its end is val.
    """
    seen = set()
    for path in files:
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        parts = text.split(split_on) if split_on else [text]
        if len(files) == len(parts) == 1:
            cut = text.find("\n", int(len(text) * (1 - fraction))) + 1 or len(text)
            yield from (("train", text[:cut]), ("val", text[cut:]))
            return
        for part in parts:
            digest = hash(part)
            if part.strip() and digest not in seen:
                seen.add(digest)
                hashed = zlib.crc32(part.encode("utf-8", "surrogatepass")) / 2**32
                yield "val" if hashed < fraction else "train", part


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", choices=["stdlib", "text"], help="where the text comes from")
    parser.add_argument("files", nargs="*", help="for text: the files, or folders to search for files")
    parser.add_argument("--out", help="folder of the shards (default data/SOURCE)")
    parser.add_argument("--tokenizer", help="bytes, a tiktoken name, a ranks file or a folder (default: train one)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="size of the trained BPE, end of text included")
    parser.add_argument("--pattern", default="*", help="for text: which files of a folder, as in *.py")
    parser.add_argument("--split_on", help="for text: a separator between documents inside a file")
    parser.add_argument("--val_fraction", type=float, default=0.02, help="share of the documents held out")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="tokens of one shard")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that was made in another way")
    args = parser.parse_args(argv)
    if args.source == "text" and not args.files:
        raise UserError("text needs files or folders:  python -m data.prepare text notes/*.txt --out=data/notes")
    if args.source == "stdlib" and args.files:
        raise UserError("stdlib takes no files")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction} must lie between 0 and 1")
    if not 2 <= args.shard_tokens < 2**31:
        raise UserError(f"--shard_tokens={args.shard_tokens} must lie in 2..2147483647")
    return args


def list_files(args):
    if args.source == "stdlib":
        return stdlib_files()
    files = []
    for name in map(Path, args.files):
        if not name.exists():
            raise UserError(f"no file or folder {name}")
        files += sorted(p for p in name.rglob(args.pattern) if p.is_file()) if name.is_dir() else [name]
    return files


def main(argv=None):
    """Prepare one folder; returns its path."""
    args = parse(argv)
    out = Path(args.out or f"data/{args.source}")
    how = {key: value for key, value in vars(args).items() if key not in ("out", "overwrite")}
    files = list_files(args)
    how |= {"found": len(files), "bytes": sum(file.stat().st_size for file in files)}
    if out.exists() and not args.overwrite:
        if read_meta(out).get("prepared_by") == how:
            print(f"{out} is ready (made earlier in the same way)")
            return out
        raise UserError(f"{out} exists and was made in another way: choose another --out, or --overwrite it")
    if out.exists() and any(out.iterdir()) and not (out / "meta.json").is_file():
        raise UserError(f"{out} holds something else than prepared data: delete it yourself or choose another --out")
    started = time.time()
    if args.tokenizer:
        encoder = tokenizer.load(args.tokenizer)
    else:
        print(f"training a BPE of {args.vocab_size} ids on {len(files)} files")
        texts = (text for split, text in documents(files, args.val_fraction, args.split_on) if split == "train")
        encoder = tokenizer.train_bpe(texts, args.vocab_size)
    separator = tokenizer.end_of_text(encoder)
    with Writer(out, encoder.n_vocab, args.shard_tokens) as writer:
        found = documents(files, args.val_fraction, args.split_on)
        for split, text in tqdm(found, desc="tokenizing", unit=" documents", disable=None):
            ids = encoder.encode_ordinary(text)
            writer.write(split, ids if separator is None else [separator, *ids], len(text.encode("utf-8")))
        writer.finish(lambda folder: tokenizer.save(encoder, folder), tokenizer=encoder.name,
                      tokenizer_fingerprint=tokenizer.fingerprint(encoder), prepared_by=how)
    for split, info in writer.splits.items():
        print(f"{split:5} {info['documents']:>9,} documents {info['tokens']:>13,} tokens {info['bytes']:>14,} bytes "
              f"{info['bytes'] / info['tokens']:.2f} bytes/token")
    print(f"wrote {out} in {time.time() - started:.1f} s")
    return out


if __name__ == "__main__":
    errors.run(main)
