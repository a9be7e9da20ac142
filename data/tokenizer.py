"""Tokenizers: byte-level BPE trained here, raw bytes, tiktoken's by name or ranks file. All are tiktoken.Encoding.

Everything works offline except a tiktoken name that is not in its cache. A tokenizer is saved as a folder of two files,
ranks.tiktoken and encoding.json, which travels with the data and with every run. Next: prepare.py.
"""

import base64
import collections
import hashlib
import heapq
import json
from pathlib import Path

import regex
import tiktoken

from errors import UserError

END_OF_TEXT = "<|endoftext|>"  # stands before every document; generation stops at it
# Words with their leading space, numbers up to three digits, punctuation runs, line ends with what precedes them, and
# indentation less its last space, which belongs to the word.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def load(spec):
    """A tiktoken.Encoding from "bytes", a tokenizer folder, a ranks file in tiktoken's format, or a tiktoken name."""
    path = Path(spec)
    if spec == "bytes":
        return encoding("bytes", {bytes([i]): i for i in range(256)})
    if path.is_dir():
        return _load_folder(path)
    if path.is_file():
        return encoding(path.stem, read_ranks(path))
    try:
        return tiktoken.get_encoding(str(spec))
    except ValueError as error:
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"no tokenizer {spec!r}: expected 'bytes', a tokenizer folder, a ranks file, or one of "
                        f"{names}") from error
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(f"tokenizer {spec!r} is not in tiktoken's cache and cannot be downloaded here: give a local "
                        "ranks file instead, --tokenizer=PATH.tiktoken") from error


def encoding(name, ranks, pattern=PATTERN, special_tokens=None):
    """A tiktoken.Encoding; without special_tokens it gets END_OF_TEXT after the last rank."""
    special_tokens = special_tokens or {END_OF_TEXT: max(ranks.values()) + 1}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def end_of_text(encoder):
    """The id that separates documents, None if the tokenizer has no such token."""
    return encoder._special_tokens.get(END_OF_TEXT)


def read_ranks(path):
    """{bytes: rank} from a file of "base64 rank" lines. (tiktoken's own reader caches by path, and so serves stale
    ranks.)"""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in Path(path).read_bytes().splitlines() if line)}
    except ValueError as error:
        raise UserError(f"{path} is no ranks file (lines of base64 token and rank): {error}") from error
    if len(set(ranks.values())) != len(ranks) or not all(bytes([i]) in ranks for i in range(256)):
        raise UserError(f"{path} is no byte-level ranks file: a rank stands twice or a single byte is missing")
    return ranks


def save(encoder, folder):
    """Write the tokenizer as a folder that `load` reads back, on any machine."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ranks = sorted(encoder._mergeable_ranks.items(), key=lambda item: item[1])
    (folder / "ranks.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks))
    about = {"name": encoder.name, "pattern": encoder._pat_str, "special_tokens": encoder._special_tokens}
    (folder / "encoding.json").write_text(json.dumps(about, indent=1) + "\n")


def _load_folder(folder):
    try:
        about = json.loads((folder / "encoding.json").read_text())
        ranks = read_ranks(folder / "ranks.tiktoken")
        return encoding(about["name"], ranks, about["pattern"], about["special_tokens"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no tokenizer folder (encoding.json, ranks.tiktoken): {error}") from error


def fingerprint(encoder):
    """A short hash of everything that decides the ids; two encoders with the same one are interchangeable."""
    parts = (encoder._pat_str, sorted(encoder._special_tokens.items()), sorted(encoder._mergeable_ranks.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def byte_letters():
    """The printable letter that stands for each byte in Hugging Face's byte-level BPE: itself where Latin-1 has a
    visible character, else the next free code point from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def train_bpe(texts, vocab_size, name="bpe", pattern=PATTERN):
    """Train a byte-level BPE of vocab_size ids, END_OF_TEXT included, on an iterable of str; returns the Encoding.

    Greedy: the most frequent adjacent pair inside words is merged, ties to the lowest pair of ids (Sennrich et al.,
    arXiv 1508.07909). Pair counts are kept up to date and only the words that contain the merged pair are touched.
    Stops early when every word is a single token.
    """
    if vocab_size < 257:
        raise UserError(f"a byte-level BPE needs a vocabulary of at least 257, not {vocab_size}")
    splitter = regex.compile(pattern)
    frequency = collections.Counter(word for text in texts for word in splitter.findall(text))
    letters = byte_letters()
    tokens = [bytes([byte]) for byte in sorted(letters, key=letters.get)]  # the usual order, which decides ties
    id_of = {token[0]: number for number, token in enumerate(tokens)}
    words = [[id_of[byte] for byte in word.encode()] for word in frequency]
    weights = list(frequency.values())
    counts, where = collections.Counter(), collections.defaultdict(set)
    for index, (word, weight) in enumerate(zip(words, weights)):
        for pair in zip(word, word[1:]):
            counts[pair] += weight
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size - 1:
        negative, pair = heapq.heappop(heap)
        if counts[pair] != -negative:  # stale: the count has changed since it was pushed
            continue
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for index in where.pop(pair):
            old, weight = words[index], weights[index]
            for neighbour in zip(old, old[1:]):
                counts[neighbour] -= weight
                changed.add(neighbour)
            words[index] = merged = _merge(old, pair, new)
            for neighbour in zip(merged, merged[1:]):
                counts[neighbour] += weight
                where[neighbour].add(index)
                changed.add(neighbour)
        for neighbour in changed:
            if counts[neighbour] > 0:
                heapq.heappush(heap, (-counts[neighbour], neighbour))
    return encoding(name, {token: rank for rank, token in enumerate(tokens)}, pattern)


def _merge(word, pair, new):
    merged, i = [], 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged
