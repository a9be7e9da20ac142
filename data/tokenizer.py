"""Tokenizers: byte-level BPE, trained here or read from tiktoken's and Hugging Face's files; raw bytes; words counted
on the data; SentencePiece. All but the last two are tiktoken.Encoding, and those two offer what is used of it here.

Everything works offline except a tiktoken name that is not in its cache. A tokenizer is saved as a folder,
encoding.json with ranks.tiktoken or tokenizer.model, which travels with the data and with every run. Next: convert.py,
prepare.py.
"""

import base64
import collections
import hashlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
import regex
import tiktoken
from tiktoken_ext import openai_public

from data import bpe
from data.convert import read_hf
from data.shards import read_json
from errors import UserError

END_OF_TEXT = "<|endoftext|>"  # stands before every document; generation stops at it
# The token that ends a text, under the names that tokenizers of others give it: the first that there is separates.
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]", "</s>", "<eos>")
RUN = 100_000  # white space beyond this is encoded in parts: tiktoken's pattern overflows its stack at a million
UNKNOWN = "<unk>"
SHORT_NAMES = {"cl100k": "cl100k_base", "o200k": "o200k_base"}
# Words with their leading space, numbers up to three digits, punctuation runs, line ends with what precedes them, and
# indentation less its last space, which belongs to the word.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# For Words: UNKNOWN, as some corpora write it; words with their apostrophes; single marks; line ends.
WORD = r"<unk>|[\p{L}\p{M}\p{N}_]+(?:['’][\p{L}\p{M}]+)*|[^\s\p{L}\p{M}\p{N}_]|\n"
CLOSING = frozenset(".,;:!?)]}%…”\n")  # no space before these


def load(spec, texts=None):
    """The tokenizer that a name or path means: "bytes"; a tiktoken name; a ranks file in tiktoken's format (cut into
    words by PATTERN, or as tiktoken does if it is called like one of its encodings: cl100k_base.tiktoken); a Hugging
    Face tokenizer.json of byte-level BPE; a SentencePiece .model; a folder with one of these, or one that `save` wrote;
    "words:N", the N most frequent words of texts, an iterable of str."""
    path = Path(spec)
    if spec == "bytes":
        return encoding("bytes", {bytes([i]): i for i in range(256)})
    if str(spec).startswith("words:"):
        return train_words(texts, str(spec)[len("words:"):])
    if path.is_dir():
        files = [path / name for name in ("encoding.json", "tokenizer.json", "tokenizer.model")]
        path = next((file for file in files if file.is_file()), files[0])
        if path == files[0]:
            return _load_folder(path.parent)
    if not path.is_file():
        return _load_name(str(spec))
    name = path.stem if path.stem != "tokenizer" else path.absolute().parent.name
    if path.suffix == ".json":
        pattern, ranks, special_tokens = read_hf(path)
        encoder = encoding(name, ranks, pattern, special_tokens)
        _check_round_trip(encoder, path)
        return encoder
    if path.suffix == ".model" and path.read_bytes()[:1] == b"\n":  # ranks files have this ending too
        return SentencePiece(path.read_bytes(), name, path)
    ranks = read_ranks(path)
    if path.stem in tiktoken.list_encoding_names():
        about = _around(path.stem, ranks)
        return encoding(path.stem, ranks, about["pat_str"], about["special_tokens"])
    return encoding(path.stem, ranks)


def _load_name(spec):
    name = SHORT_NAMES.get(spec, spec)
    if name not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"no tokenizer {spec!r}: expected 'bytes', 'words:N', a tokenizer folder, a tokenizer.json, a "
                        f"SentencePiece .model, a ranks file, or one of {names}")
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a damaged download is a ValueError
        url = getattr(getattr(error, "request", None), "url", None)
        cached = f" as $TIKTOKEN_CACHE_DIR/{hashlib.sha1(url.encode()).hexdigest()}" if url else ""
        raise UserError(f"tokenizer {name!r} is not in tiktoken's cache and cannot be downloaded here: fetch "
                        f"{url or 'its file'} elsewhere and put it into tiktoken's cache{cached}, or give a local "
                        f"ranks file instead, --tokenizer=PATH/{name}.tiktoken, or a tokenizer.json") from error


def _around(name, ranks):
    """tiktoken's own definition of an encoding, pattern and special tokens, with ranks in place of the download."""
    downloads = ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks")
    with mock.patch.dict(vars(openai_public), dict.fromkeys(downloads, lambda *args, **kwargs: ranks)):
        return getattr(openai_public, name)()


def _check_round_trip(encoder, path):
    """Patterns come from another regular expression engine: one that leaves characters out would lose them."""
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    pairs = (a + b for a in letters[:128] for b in letters[:128])
    for text in (" ".join(pairs), "".join(letters)):
        if encoder.decode(encoder.encode_ordinary(text)) != text:
            raise UserError(f"{path} cannot be converted: its pattern {encoder._pat_str} leaves characters out")


def encoding(name, ranks, pattern=PATTERN, special_tokens=None):
    """A tiktoken.Encoding; without special_tokens it gets END_OF_TEXT after the last rank."""
    special_tokens = special_tokens or {END_OF_TEXT: max(ranks.values()) + 1}
    if not all(type(i) is int and 0 <= i < 2**31 for i in (*ranks.values(), *special_tokens.values())):
        raise UserError(f"the ranks or special tokens of {name} have ids that are no whole numbers from 0 to 2**31")
    if not set(ranks.values()).isdisjoint(special_tokens.values()):
        raise UserError(f"the ranks of {name} contain ids of its special tokens: they are of another tokenizer")
    try:
        encoder = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        if regex.fullmatch(pattern, ""):
            raise ValueError("it matches the empty text, which makes encoding panic")
        return encoder
    except (ValueError, regex.error) as error:
        raise UserError(f"tiktoken cannot read the pattern of {name}: {error}") from error


def end_of_text(encoder):
    """The id that separates documents, None if the tokenizer has no such token."""
    return next((encoder._special_tokens[text] for text in SEPARATORS if text in encoder._special_tokens), None)


def encode(encoder, text):
    """The ids of a text, uint32, behind the separator; special tokens in it are plain text."""
    cuts = [start + RUN for start in range(0, len(text), RUN) if text[start:start + RUN].isspace()]
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])] if cuts else [text]
    separator = end_of_text(encoder)
    ids = [np.array([] if separator is None else [separator], dtype=np.uint32)]
    for part in parts:
        if hasattr(encoder, "encode_to_numpy"):  # tiktoken's: no list of ids in between
            ids.append(encoder.encode_to_numpy(part, disallowed_special=()))
        else:
            ids.append(np.array(encoder.encode_ordinary(part), dtype=np.uint32))
    return np.concatenate(ids)


def describe(encoder):
    """What meta.json records of a tokenizer."""
    return {"tokenizer": encoder.name, "tokenizer_fingerprint": fingerprint(encoder),
            "separator": end_of_text(encoder), "special_tokens": encoder._special_tokens}


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
    if not isinstance(encoder, tiktoken.Encoding):
        return encoder.save(folder)
    ranks = sorted(encoder._mergeable_ranks.items(), key=lambda item: item[1])
    (folder / "ranks.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks))
    about = {"name": encoder.name, "pattern": encoder._pat_str, "special_tokens": encoder._special_tokens}
    (folder / "encoding.json").write_text(json.dumps(about, indent=1) + "\n")


def _load_folder(folder):
    try:
        about = read_json(folder / "encoding.json")
        if about.get("kind") == "words":
            return Words([word + "" for word in about["words"]])  # here and below, a TypeError if it is no text
        if about.get("kind") == "sentencepiece":
            model = folder / "tokenizer.model"
            return SentencePiece(model.read_bytes(), about["name"] + "", model)
        ranks = read_ranks(folder / "ranks.tiktoken")
        return encoding(about["name"] + "", ranks, about["pattern"], about["special_tokens"])
    except (OSError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{folder} is no tokenizer folder (encoding.json and its files): {error}") from error


def fingerprint(encoder):
    """A short hash of everything that decides the ids; two encoders with the same one are interchangeable."""
    if not isinstance(encoder, tiktoken.Encoding):
        return hashlib.sha256(repr(encoder.parts).encode()).hexdigest()[:16]
    parts = (encoder._pat_str, sorted(encoder._special_tokens.items()), sorted(encoder._mergeable_ranks.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def train_bpe(texts, vocab_size, name="bpe", pattern=PATTERN):
    """Train a byte-level BPE of vocab_size ids, END_OF_TEXT included, on an iterable of str; returns the Encoding.

    Greedy: see bpe.py.
    """
    if vocab_size < 257:
        raise UserError(f"a byte-level BPE needs a vocabulary of at least 257, not {vocab_size}")
    tokens = bpe.train(texts, vocab_size - 1, pattern)
    return encoding(name, {token: rank for rank, token in enumerate(tokens)}, pattern)


# ---------------------------------------------------------------------- the kinds that are no tiktoken.Encoding

def train_words(texts, size):
    """Words of the `size` most frequent words of texts; fewer if there are no more."""
    if texts is None or not str(size).isdecimal() or int(size) < 1:
        raise UserError(f"words:{size} is counted on the data, as in  python -m data.prepare text notes/ "
                        "--tokenizer=words:10000 ; to use it again, give the tokenizer folder of that data")
    find, counts = regex.compile(WORD).findall, collections.Counter()
    for text in texts:
        counts.update(find(text))
    del counts[UNKNOWN]
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return Words(ordered[:int(size)])


class Words:
    """Word-level, as small studies use it: UNKNOWN is id 0, then the words, END_OF_TEXT last. Lossy: decoding puts one
    space between words, none before closing marks, and cannot bring back white space or what was unknown."""

    name = "words"

    def __init__(self, words):
        self.texts = [UNKNOWN, *words, END_OF_TEXT]
        self.ids = {text: number for number, text in enumerate(self.texts[:-1])}
        self.n_vocab, self.parts = len(self.texts), ("words", WORD, tuple(words))
        self._special_tokens = {UNKNOWN: 0, END_OF_TEXT: self.n_vocab - 1}
        self._find = regex.compile(WORD).findall

    def encode_ordinary(self, text):
        return [self.ids.get(word, 0) for word in self._find(text)]

    def encode_ordinary_batch(self, texts, num_threads=1):
        return [self.encode_ordinary(text) for text in texts]

    def decode_single_token_bytes(self, token):
        """With the space before it."""
        if not 0 <= token < self.n_vocab:
            raise KeyError(token)
        text = self.texts[token]
        return (text if text in CLOSING else " " + text).encode()

    def decode_bytes(self, ids):
        return b"".join(map(self.decode_single_token_bytes, ids)).replace(b"\n ", b"\n").removeprefix(b" ")

    def decode(self, ids):
        return self.decode_bytes(ids).decode()

    def save(self, folder):
        about = {"kind": "words", "name": self.name, "words": self.texts[1:-1]}
        (folder / "encoding.json").write_text(json.dumps(about, indent=1) + "\n")


class SentencePiece:
    """A SentencePiece model, through the package of that name. Whether decoding gives the text back is the model's
    affair: one with byte fallback and without normalization does."""

    def __init__(self, model, name, path):
        """model: the bytes of the .model file; path: where they come from, for errors."""
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError("a SentencePiece .model needs the package:  pip install sentencepiece") from error
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"the SentencePiece model {path} is damaged: {error}") from error
        self.model, self.name, self.n_vocab = model, name, self.processor.vocab_size()
        self.parts = ("sentencepiece", model)
        special = filter(lambda i: self.processor.is_control(i) or self.processor.is_unknown(i), range(self.n_vocab))
        self._special_tokens = {self.processor.id_to_piece(i): i for i in special}
        self.encode_ordinary = self.processor.encode

    def encode_ordinary_batch(self, texts, num_threads=1):
        return self.processor.encode(list(texts), num_threads=num_threads)

    def decode_single_token_bytes(self, token):
        """With the space before it; a control token is nothing, as in `decode`."""
        if not 0 <= token < self.n_vocab:
            raise KeyError(token)
        piece = self.processor.id_to_piece(token)
        if self.processor.is_control(token):
            return b""
        if self.processor.is_unknown(token):
            return self.processor.decode([token]).encode()
        return bytes([int(piece[3:5], 16)]) if self.processor.is_byte(token) else piece.replace("▁", " ").encode()

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def decode(self, ids):
        return self.processor.decode(list(ids))

    def save(self, folder):
        (folder / "tokenizer.model").write_bytes(self.model)
        about = {"kind": "sentencepiece", "name": self.name}
        (folder / "encoding.json").write_text(json.dumps(about) + "\n")
