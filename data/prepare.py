"""Text to shards:  python -m data.prepare SOURCE [FILES...] [--tokenizer=...] [--out=data/NAME]

The sources are those of ../docs/data.md. A document goes to the val split by a hash of its text, so that the same text
never stands in both; where that leaves a split empty, the end of the text is val. What was read, left out and altered
is said at the end and stands in meta.json. Next: ../configs/debug.py trains on the result.
"""

import collections
import hashlib
import itertools
import os
import shlex
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import errors
from data import sources, tokenizer
from data.files import SHARE, Account, check_separator, check_share, list_files, repair, suffix_of, unescape
from data.shards import Writer, open_split, read_meta, require_one_split, require_ours
from errors import UserError, progress

FILES = ("text", "jsonl", "parquet", "csv", "hf")  # sources that want names of files, or of a repository
TEXTS = (*sources.INSTALLED, "stdin", *FILES, *sources.KNOWN)
OPTIONS = {  # what belongs to some sources only
    "pattern": FILES[:4], "split_on": ("text", "stdin"), "text_column": (*FILES[1:], *sources.KNOWN),
    "encoding": ("text", "stdin", "jsonl", "csv"), "delimiter": ("csv",), "no_quotes": ("csv",),
    "multiline": ("csv",), "tokenizer": TEXTS, "limit": TEXTS,
    **dict.fromkeys(("val_fraction", "vocab_size", "shard_tokens", "overwrite"), (*TEXTS, "random")),
    "chat": ("jsonl", "parquet", "hf"), "name": ("hf", *sources.KNOWN), "split": ("hf", *sources.KNOWN),
    "val_split": ("hf", *sources.KNOWN), "no_streaming": ("hf", *sources.KNOWN), "tokens": ("random",),
    "shards": ("fineweb-gpt2-shards",)}
LEAST = {"limit": 1, "workers": 1, "tokens": 100, "shards": 1, "vocab_size": 2, "shard_tokens": 2}
SHARDS_REPO = "kjj0/fineweb10B-gpt2"
TRAINING_TEXT = 2**30  # characters that a tokenizer is trained on, at most
CHUNK = 2**18  # characters that a worker encodes at a time
HELD = 2**24  # characters that may wait until it is known that both splits get a document


def parse(argv):
    parser = errors.ArgumentParser(prog="python -m data.prepare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("source", help="where the text comes from", choices=[*TEXTS, "random", "fineweb-gpt2-shards"])
    add("files", nargs="*", help="files, folders to search for files, or globs; for hf: a repository, folder or file")
    add("--out", help="folder of the shards (default data/SOURCE)")
    add("--tokenizer", help="as bytes, gpt2, a folder, 'FOLDER?end_of_text=TOKEN' (default: train a BPE)")
    add("--vocab_size", "--train_tokenizer", type=int,
        help="size of the trained BPE, end of text included; for random: of the vocabulary (default 4096)")
    add("--pattern", help="which files of a folder, as in *.py (default: all, or those of the source's kind)")
    add("--split_on", help=r"a separator between documents inside a file; \n (any line end), \t, \x1e are understood")
    add("--text_column", help="the column of the text (default: text, or one that is called and looks like it)")
    add("--chat", action="store_true", default=None, help="the column holds chats: a message becomes 'ROLE: CONTENT'")
    add("--encoding", help="of files without a byte order mark, as cp1252 (default utf-8)")
    add("--delimiter", help=r"between the cells of csv, as ';' or '\t' (default: found in the file)")
    add("--no_quotes", action="store_true", default=None, help="quotes in csv are characters as any other")
    add("--multiline", action="store_true", default=None, help="quotes in csv are right, even around what seem rows")
    add("--name", help="configuration of the dataset, as sample-10BT of fineweb")
    add("--split", help="split of the dataset to train on (default train)")
    add("--val_split", help="split of the dataset to validate on (default: a share of the documents)")
    add("--no_streaming", action="store_true", help="download the dataset as a whole first, into datasets' cache")
    add("--limit", type=int, help="documents to take, at most, of each split that is read")
    add("--val_fraction", type=float, help="share of the documents held out (default 0.02)")
    add("--shard_tokens", type=int, help="tokens of one shard (default 100 million)")
    add("--workers", type=int, default=os.cpu_count(), help="threads that encode; any number gives the same result")
    add("--tokens", type=int, help="for random: how many (default 10 million)")
    add("--shards", type=int, help="for fineweb-gpt2-shards: how many (default 10, all: 103)")
    add("--overwrite", action="store_true", help="replace a folder that was made in another way")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    """Raise UserError for what cannot work; fill in the defaults that depend on the source."""
    source = args.source
    if source in FILES and not all(args.files or [""]):
        wanted = "REPO" if source == "hf" else "notes/"
        raise UserError(f"{source} needs files or folders:  python -m data.prepare {source} {wanted} --out=data/notes")
    if args.files and source not in FILES:
        raise UserError(f"{source} takes no files")
    if source == "hf" and len(args.files) > 1:
        raise UserError("hf takes one repository, folder or file")
    args.delimiter = args.delimiter and unescape(args.delimiter)
    if args.split_on == "" or args.delimiter is not None and len(args.delimiter) != 1:
        raise UserError(r"--split_on needs at least one character, --delimiter one (\0 is NUL, which shells leave out)")
    try:
        b"a".decode(args.encoding or "utf-8", "nanok2.escape")
    except (LookupError, UnicodeError) as error:
        raise UserError(f"no encoding {args.encoding!r}: give one of Python's, as cp1252, gb18030, koi8-r") from error
    given = {option: value for option, value in vars(args).items() if value is not None}
    for option, places in OPTIONS.items():
        if given.get(option) and source not in places:
            raise UserError(f"--{option} has no meaning for {source}, only for {', '.join(places)}")
    for one, other in (("val_split", "val_fraction"), ("no_quotes", "multiline"), ("tokenizer", "vocab_size")):
        if one in given and other in given:
            raise UserError(f"--{one} and --{other} exclude each other: leave one out")
    if source in sources.KNOWN and not args.val_fraction:
        args.val_split = args.val_split or sources.KNOWN[source][2]
    for option, default in (("val_fraction", 0.02), ("vocab_size", 4096), ("shard_tokens", 100_000_000)):
        setattr(args, option, given.get(option, default))
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction={args.val_fraction} must lie between 0 and 1")
    if args.shard_tokens >= 2**31:
        raise UserError(f"--shard_tokens={args.shard_tokens} must lie below 2**31")
    for option, least in LEAST.items():
        if given.get(option, least) < least:
            raise UserError(f"--{option}={given[option]} must be at least {least}")
    if source == "stdin" and (args.tokenizer or "words:").startswith("words:"):
        raise UserError("stdin can be read only once, so no tokenizer can be trained on it: give another --tokenizer")


def documents(args, files, account):
    """Yield (split, text, bytes in the source) of every distinct, non-empty document. The split is --val_split's, which
    comes first, or drawn by a hash of the text."""
    seen, line_ends = set(), args.source in ("text", "stdin", *sources.INSTALLED)
    take = lambda split: itertools.islice(
        distinct(sources.documents(args, files, account, split), seen, account, line_ends), args.limit)
    train = args.split or "train"
    if not args.val_split:
        return by_hash(take(train), args.val_fraction, account, line_ends)
    return ((split, text, size) for split, name in (("val", args.val_split), ("train", train))
            for text, _, size, _ in take(name))


def distinct(found, seen, account, line_ends=False):
    """Yield (text, its UTF-8 bytes, number of bytes in the source, text in the source) of the documents that are not
    empty and whose 8-byte digest is not in `seen`, and add it. Bytes of the source are those of the text before
    repairs, in UTF-8."""
    for original in found:
        text, raw, size, replaced = repair(original, line_ends)
        nuls, ends = text.count("\0"), original.count("\r") if line_ends else 0
        account.characters, account.wrong = account.characters + len(text), account.wrong + nuls + replaced
        if replaced or nuls or ends:
            account.add("altered", "undecodable characters replaced", n=replaced)
            account.add("altered", "NULs kept", n=nuls)
            account.add("altered", "line ends rewritten as \\n", n=ends)
        digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        if not text or text.isspace() or digest in seen:
            account.add("documents", "duplicates dropped" if text.strip() else "empty ones dropped")
            continue
        seen.add(digest)
        account.add("documents", "kept")
        account.look(text)
        yield text, raw, size, original


def by_hash(texts, fraction, account, line_ends):
    """Yield (split, text, bytes in the source): val are the texts with a hash in that fraction. Documents
    wait until both splits have one; if that never comes, the end of those that wait is val."""
    held, waiting, total, splits = collections.deque(), 0, 0, set()
    for text, raw, size, original in texts:
        held.append(("val" if zlib.crc32(raw) / 2**32 < fraction else "train", text, size, original))
        splits.add(held[-1][0])
        total, waiting = total + len(text), waiting + len(text)
        while held and (len(splits) == 2 or waiting > HELD and len(held) > 1):
            waiting -= len(held[0][1])
            yield held.popleft()[:3]
    train, val, taken = list(held), collections.deque(), 0
    while len(train) > 1 and taken < fraction * total and taken + len(train[-1][1]) <= total / 2:
        val.appendleft(train.pop())
        taken += len(val[0][1])
    if val:
        account.add("documents", "at the end taken for val, since none went there by its hash", n=len(val))
    elif train:
        account.add("documents", "cut in two, its end for val")
        *_, original = train.pop()
        for part, documents in zip(cut(original, 1 - fraction), (train, val)):
            text, _, size, _ = repair(part, line_ends)
            documents.append((None, text, size, part))
    for split, documents in (("train", train), ("val", val)):
        yield from ((split, text, size) for _, text, size, _ in documents)


def cut(text, share):
    """That share of a text and the rest, cut behind a line or a word if one ends soon, and well before the end."""
    at = int(len(text) * share)
    last = at + min(1000, (len(text) - at) // 2)
    at = next((end + 1 for mark in "\n " if (end := text.find(mark, at, last)) >= 0), at)
    return text[:at], text[at:]


def encoded(found, encoder, workers):
    """Yield (split, ids, bytes) in the order of the documents. Threads do the encoding, since tiktoken leaves Python's
    lock alone meanwhile; a few chunks of documents wait at any time."""
    def work(chunk):
        return [(split, tokenizer.encode(encoder, text), size) for split, text, size in chunk]

    waiting, chunk, characters = collections.deque(), [], 0
    with ThreadPoolExecutor(workers) as pool:
        for document in found:
            chunk.append(document)
            characters += len(document[1])
            if characters >= CHUNK:
                waiting.append(pool.submit(work, chunk))
                chunk, characters = [], 0
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        waiting.append(pool.submit(work, chunk))
        while waiting:
            yield from waiting.popleft().result()


def write_documents(writer, args, files, encoder, account):
    for split, ids, size in encoded(documents(args, files, account), encoder, args.workers):
        writer.write(split, ids, size)
    check_separator(args.split_on, account)
    check_share(args.source, account)  # of stdin; files have been looked at one by one
    counts, column = account.counts["documents"], account.about.get("column")
    chats = account.counts["chats"] if args.chat else {}
    if args.chat and chats["messages without text"] > SHARE * chats["messages"]:
        raise UserError(f"{chats['messages without text']:,} of {chats['messages']:,} messages hold no text ("
                        f"{'; '.join(account.lines())}): make texts of the chats yourself, as a column of a jsonl")
    if not counts["kept"]:
        raise UserError(f"the train split has 0 tokens: no document holds a text ({'; '.join(account.lines())})")
    if column and not args.text_column and counts["empty ones dropped"] > counts["kept"]:
        raise UserError(f"column {column!r} is empty in {counts['empty ones dropped']:,} rows and holds only "
                        f"{counts['kept']:,} texts: if it is the text all the same, set --text_column={column}")


def write_random(writer, args):
    """Uniform ids; there are no bytes of text, which metrics take for unknown."""
    rng = np.random.Generator(np.random.Philox(key=0))
    count = args.tokens or 10_000_000
    held_out = max(int(count * args.val_fraction), 2)
    for split, left in (("val", held_out), ("train", count - held_out)):
        for start in progress(split, unit=" M tokens", over=range(0, left, 2**20)):
            writer.write(split, rng.integers(0, args.vocab_size, min(2**20, left - start), dtype=np.uint32), 0)


def make_tokenizer(args, files, account):
    """The tokenizer that is named, or a BPE trained on the documents of the training split."""
    def texts():
        print("training a tokenizer")
        left, once = TRAINING_TEXT, Account(account)  # what is read is counted when it is written
        for split, text, _ in documents(args, files, once):
            if split == "train":
                yield text[:left]
                left -= len(text)
            if left <= 0:
                print(f"on the first {TRAINING_TEXT:,} characters")
                break
        check_separator(args.split_on, once)
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
    for name in progress("shards", unit=" shards", over=missing):
        try:
            from huggingface_hub import hf_hub_download
            hf_hub_download(SHARDS_REPO, name, repo_type="dataset", local_dir=out)
        except ImportError as error:
            raise UserError("downloading shards needs a package:  pip install huggingface_hub") from error
        except (OSError, sources.network_errors()) as error:
            raise UserError(f"cannot download {name} of the dataset {SHARDS_REPO} ({errors.said(error)}): fetch "
                            f"{names[0]} .. {names[-2]} and {names[-1]} elsewhere and put them into {out}/") from error
    tokens = sum(open_split(out, split).tokens for split in ("train", "val"))
    print(f"{out} is complete with {tokens:,} tokens: {len(missing)} of {len(names)} shards downloaded; train with "
          "--tokenizer=gpt2")
    return out


def is_ready(args, out, files, how):
    """Whether a folder was made in that way; UserError if what it was made of is another by now."""
    meta, spec = read_meta(out), args.tokenizer or ""
    before = {key: value for key, value in (meta.get("prepared_by") or {}).items() if value is not None}
    digest = before.pop("digest", None)  # which older folders do not have
    if before != {key: value for key, value in how.items() if key != "digest"}:
        return False
    made = (out / "meta.json").stat().st_mtime_ns
    newer = [file for file in files if args.source not in sources.INSTALLED and file.stat().st_mtime_ns > made]
    if digest:
        newer = (newer or ["set of files, or of their times,"]) * (digest != how["digest"])
    if any(map(os.path.exists, (spec, spec.rpartition("?")[0]))):  # what a name means never changes
        newer += [spec] * (tokenizer.fingerprint(tokenizer.load(spec)) != meta.get("tokenizer_fingerprint"))
    if newer:
        raise UserError(f"{out} was made of another {newer[0]} than there is now: add --overwrite to make it anew")
    return True


def main(argv=None):
    """Prepare one folder; returns its path."""
    args = parse(argv)
    out = Path(args.out or f"data/{args.source}")
    if args.source == "fineweb-gpt2-shards":
        return fetch_shards(args, out)
    names = args.files if args.source != "hf" or Path(args.files[0]).exists() else []
    account, chosen = Account(), args.pattern
    args.pattern = args.pattern or sources.PATTERNS.get(args.source, "*")
    installed = args.source in sources.INSTALLED
    files = sources.installed_files(args.source, account) if installed else list_files(names, args.pattern, account)
    if args.source in OPTIONS["pattern"]:
        require_one_split(files, chosen, args.source, account, sources.PATTERNS[args.source])
    how = {key: value for key, value in vars(args).items()
           if key not in ("out", "overwrite", "workers", "no_streaming") and value is not None}
    stats = [(str(file), status.st_size, int(status.st_mtime)) for file in files if (status := file.stat())]
    how |= {"found": len(files), "bytes": sum(size for _, size, _ in stats)}
    if files and not installed:  # what is installed again has another time
        how["digest"] = hashlib.blake2b(repr(stats).encode(), digest_size=8).hexdigest()
    known = (out / "meta.json").is_file() and args.source != "stdin"
    if known and not args.overwrite and is_ready(args, out, files, how):
        print(f"{out} is ready (made earlier in the same way)")
        return out
    require_ours(out)
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        raise UserError(f"{out} exists and was made in another way: choose another --out, or --overwrite it")
    if any(Path(os.path.realpath(out)) in Path(os.path.realpath(file)).parents for file in files):
        raise UserError(f"{out} lies among the files to be read: choose another --out")
    for file in files if args.source == "text" else ():
        if what := sources.UNLIKE_TEXT.get(suffix_of(file)):
            account.add("files", what, file)
    started = time.time()
    if args.source == "random":
        with Writer(out, args.vocab_size, args.shard_tokens) as writer:
            write_random(writer, args)
            writer.finish(lambda folder: None, tokenizer=None, prepared_by=how)
    else:
        encoder = make_tokenizer(args, files, account)
        with Writer(out, encoder.n_vocab, args.shard_tokens) as writer:
            write_documents(writer, args, files, encoder, account)
            about = tokenizer.describe(encoder)
            end = next((text for text, i in about["special_tokens"].items() if i == about["separator"]), None)
            account.about |= {"bytes": sum(split["bytes"] for split in writer.splits.values()), "end_of_text": end}
            writer.finish(lambda folder: tokenizer.save(encoder, folder), prepared_by=how, account=account.as_dict(),
                          **about)
    for split, info in writer.splits.items():
        print(f"{split:5} {info['documents']:>9,} documents {info['tokens']:>13,} tokens {info['bytes']:>14,} bytes "
              f"{info['bytes'] / info['tokens']:.2f} bytes/token")
    share = writer.splits["val"]["bytes"] / max(sum(info["bytes"] for info in writer.splits.values()), 1)
    if args.source != "random" and not args.val_split and not 0.25 <= share / args.val_fraction <= 4:
        cut = "cut long ones by --split_on, or " if args.source in OPTIONS["split_on"] else ""
        print(f"warning: val has {share:.2%} of the bytes and not {args.val_fraction:.2%}, since documents go there "
              f"whole: {cut}set another --val_fraction")
    seconds = time.time() - started
    print(f"wrote {out} in {seconds:.1f} s, {sum(s['tokens'] for s in writer.splits.values()) / seconds:,.0f} tokens/s")
    print(f"to train on it:  --data={shlex.quote(str(out))} --vocab_size={writer.vocab_size}  (or more)")
    print(*account.lines(), sep="\n")
    return out


if __name__ == "__main__":
    errors.run(main)
