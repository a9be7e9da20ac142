"""Tokenizers: byte-level BPE, trained here or read from tiktoken's and Hugging Face's files; raw bytes; words counted
on the data; SentencePiece. All but the last two are tiktoken.Encoding, and those two offer what is used of it here.

A tokenizer is saved as a folder, which travels with the data and with every run. What a text spells of special tokens
is plain text: no document can end itself. Next: convert.py, published.py, words.py, prepare.py.
"""

import base64
import functools
import hashlib
import json
import unicodedata
import urllib.parse
from pathlib import Path
from unittest import mock

import numpy as np
import regex
import tiktoken
from tiktoken_ext import openai_public

from data import bpe
from data.convert import read_hf
from data.published import RANKS_FILES, SEPARATORS, Beside
from data.shards import read_json
from data.words import END_OF_TEXT, SentencePiece, Words, train_words, write_about
from errors import UserError

WHITE_SPACE = "".join(chr(code) for code in range(0x3001) if regex.match(r"\s", chr(code)))
SPACES, LETTER = regex.compile(r"\s*"), regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
RUN = 100_000  # white space beyond this is encoded in parts: tiktoken's pattern overflows its stack at a million
SHORT_NAMES = {"cl100k": "cl100k_base", "o200k": "o200k_base"}
# Words with their leading space, numbers up to three digits, punctuation runs, line ends with what precedes them, and
# indentation less its last space, which belongs to the word.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# What a folder's tokenizer is read from: the first of these, or else a *.tiktoken.
FILES = ("encoding.json", "tokenizer/encoding.json", "tokenizer.json", "tiktoken.model", "tokenizer.model",
         "original/tokenizer.model")


def load(spec, texts=None):
    """The tokenizer that a name or path means, as ../docs/data.md lists them, or the folder that `save` wrote. texts:
    what "words:N" is counted on, an iterable of str."""
    spec, options = _options(str(spec))
    path = Path(spec)
    if path.is_dir():
        path = find(path) or path / FILES[0]
    if spec == "bytes":
        encoder = encoding("bytes", {bytes([i]): i for i in range(256)})
    elif spec.startswith("words:"):
        encoder = train_words(texts, spec.removeprefix("words:"))
    elif path.name == FILES[0]:
        encoder = _load_saved(path.parent)
    elif path.is_file():
        encoder = _load_file(path, options)
    else:
        encoder = _load_name(spec)
    if "end_of_text" in options:
        encoder.separator = wanted = options["end_of_text"]
        encoder.notes = [f"documents are separated by {wanted}, as the command says"]
        if wanted not in encoder._special_tokens:
            raise UserError(f"end_of_text={wanted!r} is none of the special tokens of {spec}: {_some(encoder)}")
    return encoder


def _options(spec):
    """(what stands before the question mark of a spec, {name: value} of what stands behind it)."""
    where, mark, query = spec.rpartition("?")
    if not mark or Path(spec).exists():
        return spec, {}
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    if not options or options.keys() - {"end_of_text", "pattern"}:
        raise UserError(f"tokenizer {spec!r}: behind the question mark stands end_of_text=TOKEN or pattern=NAME")
    return where, options


def find(folder):
    """The file that `load` reads the tokenizer of a folder from, None if there is none."""
    folder = Path(folder)
    there = [path for path in [*map(folder.joinpath, FILES), *sorted(folder.glob("*.tiktoken"))] if path.is_file()]
    if any(map(_is_sentencepiece, there)):  # Llama-2's tokenizer.json, beside one, is not byte-level
        there = [path for path in there if path.name != "tokenizer.json"]
    return next(iter(there), None)


def _load_file(path, options):
    folder = path.absolute().parent
    folder = folder.parent if folder.name == "original" else folder
    name, beside = path.stem if path.stem not in ("tokenizer", "tiktoken") else folder.name, Beside(folder)
    notes = [f"the tokenizer is read from {path}"]
    if path.suffix == ".json":
        pattern, ranks, special_tokens, steps = read_hf(path, beside)
        if _complete(pattern) is None:
            raise UserError(f"{path} cannot be converted: its pattern {pattern} leaves characters out")
        encoder = encoding(name, ranks, _complete(pattern), special_tokens, steps)
        if not special_tokens:
            notes.append(f"{path} has no special tokens: {END_OF_TEXT} is added, id {encoder.n_vocab - 1}")
        if steps and steps["normalizer"]:
            notes.append(f"text is normalised to NFC, as {path} says")
    elif _is_sentencepiece(path):
        encoder = SentencePiece(path.read_bytes(), name, path)
        beside.ends.append((encoder.processor.eos_id(), "the end of text of the model"))
    else:
        encoder = _load_ranks(path, name, beside, options.get("pattern"))
    text, why = beside.end_of_text(encoder._special_tokens)
    if text is not None and not encoder.separator:
        notes.append(f"documents are separated by {text}, id {encoder._special_tokens[text]}: {why}")
        if encoder._special_tokens[text] != end_of_text(encoder):
            encoder.separator = text
    encoder.notes = [*notes, *encoder.notes]
    return encoder


def _is_sentencepiece(path):
    return path.suffix == ".model" and path.read_bytes()[:1] == b"\n"  # ranks files have this ending too


def _load_ranks(path, name, beside, pattern):
    """A ranks file: what cuts its words, and its special tokens, is known from `pattern`, its name or its folder."""
    ranks, names = read_ranks(path), tiktoken.list_encoding_names()
    first = max(ranks.values()) + 1
    kind = pattern or (path.stem if path.stem in names else None)
    if not kind and path.with_name("encoding.json").is_file():
        return _load_saved(path.parent, path)
    kind = kind or beside.ranks_file(path, ranks)
    added = {} if kind == "nanok2" else beside.added
    special_tokens = {text: token["id"] for text, token in added.items()}
    if kind in RANKS_FILES:
        pattern, reserved, _ = RANKS_FILES[kind]
        special_tokens |= {text: id for id, text in enumerate(reserved(first), first)
                           if id not in special_tokens.values()}
    elif kind in names:
        about = _around(kind, ranks)
        pattern, published = about["pat_str"], about["special_tokens"]
        if path.stem == kind or 0 <= min(published.values()) - first <= 1:  # the very file; else its pattern alone
            special_tokens = published
    elif kind == "nanok2":
        pattern = PATTERN
    else:
        said = f"there is no pattern {kind!r}" if kind else "nothing says how this ranks file cuts words"
        raise UserError(f"{path}: {said}. Name it, --tokenizer='{path}?pattern=NAME', with NAME one of nanok2 (made "
                        f"here), {', '.join([*RANKS_FILES, *names])}; or put an encoding.json of both beside it")
    plain = [token for token in added.values() if not token["special"]]
    steps = {"normalizer": None, "splits": [], "added": plain} if plain else None
    encoder = encoding(name, ranks, pattern, special_tokens, steps)
    encoder.notes = [f"words are cut as by {kind}"]
    return encoder


def _load_name(spec):
    name = SHORT_NAMES.get(spec, spec)
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"no tokenizer {spec!r}: expected 'bytes', 'words:N', a tokenizer folder, a tokenizer.json, a "
                        f"SentencePiece .model, a ranks file, or one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        shared = tiktoken.get_encoding(name)
        return encoding(name, shared._mergeable_ranks, shared._pat_str, shared._special_tokens)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a damaged download is a ValueError
        url = getattr(getattr(error, "request", None), "url", None)
        cached = f" as $TIKTOKEN_CACHE_DIR/{hashlib.sha1(url.encode()).hexdigest()}" if url else ""
        raise UserError(f"tokenizer {name!r} is not in tiktoken's cache and cannot be downloaded here: fetch "
                        f"{url or 'its file'} elsewhere and put it there{cached}, or give a local ranks file, "
                        f"--tokenizer=PATH/{name}.tiktoken") from error


def _around(name, ranks):
    """tiktoken's own definition of an encoding, pattern and special tokens, with ranks in place of the download."""
    downloads = ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks")
    with mock.patch.dict(vars(openai_public), dict.fromkeys(downloads, lambda *args, **kwargs: ranks)):
        return getattr(openai_public, name)()


@functools.cache
def _complete(pattern):
    """The pattern, made to take as a word what it leaves out between two words, as Hugging Face does. Patterns come
    from another regular expression engine: None of one that loses characters even then."""
    letters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = " ".join(a + b for a in letters[:128] for b in letters[:128]), "".join(letters)
    for whole in (pattern, rf"{pattern}|(?:(?!{pattern})[\s\S]){{1,{RUN}}}"):  # a longer one would overflow the stack
        encoder = encoding(f"a tokenizer, {pattern}", {bytes([i]): i for i in range(256)}, whole)
        if all(encoder.decode(encoder.encode_ordinary(text)) == text for text in texts):
            return whole
    return None


class ByteLevel(tiktoken.Encoding):
    """A tiktoken.Encoding, and what Hugging Face can do before one pattern cuts words. steps: None, or {"normalizer":
    None or "NFC", "added": tokens that are their id wherever they stand in a text, with their flags, "splits": regular
    expressions that cut a text one after another}. notes: lines that tell a user how it was read."""
    separator, notes = None, ()

    def __init__(self, name, *, steps=None, **options):
        super().__init__(name, **options)
        self.steps, self.encode_words = steps, super().encode_ordinary
        if steps is None:
            return
        if steps["normalizer"] not in (None, "NFC"):
            raise ValueError(f"normalizer {steps['normalizer']!r}")
        self._cuts = [regex.compile(f"({pattern})").split for pattern in steps["splits"]]
        self._added = []  # for two passes, before and after normalising: {text: token}, what finds them
        specials = self._special_tokens.keys() - {t["content"] for t in steps["added"] if t.get("normalized", True)}
        for late in (False, True):
            known = {self._normal(token["content"]) if late else token["content"]: token for token in steps["added"]
                     if token.get("normalized", True) is late}
            every = sorted({*known, *(() if late else specials)}, key=len, reverse=True)  # longest first
            self._added.append((known, regex.compile("|".join(map(regex.escape, every))).finditer))

    def _normal(self, text):
        return unicodedata.normalize("NFC", text) if self.steps["normalizer"] else text

    def encode_ordinary(self, text):
        if self.steps is None:
            return self.encode_words(text)
        ids = []
        for part in self._parts(text, *self._added[0]):
            for piece in [part] if type(part) is int else self._parts(self._normal(part), *self._added[1]):
                words = [piece]
                for cut in self._cuts if type(piece) is str else ():
                    words = [word for one in words for word in cut(one) if word]
                for word in words:
                    ids += self.encode_words(word) if type(word) is str else [word]
        return ids

    def _parts(self, text, known, find):
        """Yield the parts of a text: str, or the id of a token of `known`. What else `find` finds is plain text, and so
        is what separates documents: none can end itself."""
        at, end_id = 0, end_of_text(self)
        for match in find(text) if known else ():
            token, (start, end) = known.get(match[0]), match.span()
            if token is None or token["id"] == end_id:
                continue
            if token.get("single_word") and (start and LETTER.match(text, start - 1) or LETTER.match(text, end)):
                continue
            if token.get("lstrip"):
                start = at + len(text[at:start].rstrip(WHITE_SPACE))
            if token.get("rstrip"):
                end = SPACES.match(text, end).end()
            if start > at:
                yield text[at:start]
            yield token["id"]
            at = end
        if at < len(text):
            yield text[at:]


def encoding(name, ranks, pattern=PATTERN, special_tokens=None, steps=None):
    """A ByteLevel; without special_tokens it gets END_OF_TEXT after the last id."""
    added = [token["id"] for token in steps["added"]] if steps else []
    special_tokens = special_tokens or {END_OF_TEXT: max([*ranks.values(), *added]) + 1}
    if not all(type(i) is int and 0 <= i < 2**31 for i in (*ranks.values(), *special_tokens.values(), *added)):
        raise UserError(f"the ranks or special tokens of {name} have ids that are no whole numbers from 0 to 2**31")
    if not set(ranks.values()).isdisjoint(special_tokens.values()):
        raise UserError(f"the ranks of {name} contain ids of its special tokens: they are of another tokenizer")
    if not {*ranks.values(), *special_tokens.values()}.issuperset(added):
        raise UserError(f"the added tokens of {name} have ids that it does not know")
    try:
        for one in [pattern, *(steps["splits"] if steps else ())]:
            if regex.fullmatch(one, "", regex.V1):
                raise ValueError("it matches the empty text, which makes encoding panic")
        return ByteLevel(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens, steps=steps)
    except (ValueError, regex.error) as error:
        raise UserError(f"tiktoken cannot read the pattern of {name}: {error}") from error


def end_of_text(encoder):
    """The id that separates documents, None if the tokenizer has no such token: the one that was chosen for it, or
    else the first of SEPARATORS that it has."""
    names = [encoder.separator] if encoder.separator else SEPARATORS
    return next((encoder._special_tokens[text] for text in names if text in encoder._special_tokens), None)


def notes(encoder):
    """Lines that a user should see before preparing data or training."""
    if end_of_text(encoder) is not None:
        return [*encoder.notes]
    return [*encoder.notes, f"warning: the tokenizer {encoder.name} has no end-of-text token: documents run together, "
            "generation never stops by itself, and packing=best_fit and document_mask cannot be used. If one of its "
            f"special tokens ends a text ({_some(encoder)}), prepare the data with --tokenizer='TOKENIZER?end_of_text="
            "TOKEN'"]


def _some(encoder):
    return ", ".join([*encoder._special_tokens][:12]) + " ..." * (len(encoder._special_tokens) > 12) or "it has none"


def encode(encoder, text, begin=None):
    """The ids of a text, uint32, behind the separator, or the id `begin`; special tokens in it are plain text."""
    cuts = [start + RUN for start in range(0, len(text), RUN) if text[start:start + RUN].isspace()]
    begin = end_of_text(encoder) if begin is None else begin
    ids = [np.array([] if begin is None else [begin], dtype=np.uint32)]
    quick = isinstance(encoder, tiktoken.Encoding) and encoder.steps is None  # without a list of ids in between
    for part in (text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])):
        ids.append(encoder.encode_to_numpy(part, disallowed_special=()) if quick
                   else np.array(encoder.encode_ordinary(part), dtype=np.uint32))
    return np.concatenate(ids)


def describe(encoder):
    """What meta.json records of a tokenizer."""
    return {"tokenizer": encoder.name, "tokenizer_fingerprint": fingerprint(encoder),
            "separator": end_of_text(encoder), "special_tokens": encoder._special_tokens}


def read_ranks(path):
    """{bytes: rank} from a file of "base64 rank" lines. (tiktoken's own reader caches by path, and so serves stale
    ranks.)"""
    lines = filter(None, Path(path).read_bytes().splitlines())
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in map(bytes.split, lines)}
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
    write_about(folder, encoder, about | ({"steps": encoder.steps} if encoder.steps else {}))


def _load_saved(folder, ranks=None):
    """What `save` wrote, or an encoding.json of the user's beside a ranks file."""
    try:
        about = read_json(folder / "encoding.json")
        if about.get("kind") == "words":
            encoder = Words([word + "" for word in about["words"]])  # here and below, a TypeError if it is no text
        elif about.get("kind") == "sentencepiece":
            model = folder / "tokenizer.model"
            encoder = SentencePiece(model.read_bytes(), about["name"] + "", model)
        else:
            ranks = ranks or next(iter(sorted(folder.glob("*.tiktoken"))), folder / "ranks.tiktoken")
            encoder = encoding(about.get("name", ranks.stem) + "", read_ranks(ranks), about["pattern"],
                               about["special_tokens"], about.get("steps"))
        encoder.separator = about.get("separator")
        if encoder.separator is not None and encoder.separator not in encoder._special_tokens:
            raise UserError(f"its separator {encoder.separator!r} is none of its special tokens")
        return encoder
    except (OSError, KeyError, TypeError, AttributeError, UserError) as error:
        others = "" if (folder / FILES[0]).is_file() else f", nor has it one of {', '.join(FILES[1:])}, *.tiktoken"
        raise UserError(f"{folder} is no tokenizer folder (encoding.json and its files{others}): {error}") from error


def fingerprint(encoder):
    """A short hash of everything that decides the ids; two encoders with the same one are interchangeable."""
    if isinstance(encoder, tiktoken.Encoding):
        parts = (encoder._pat_str, sorted(encoder._special_tokens.items()), sorted(encoder._mergeable_ranks.items()))
        parts += (json.dumps(encoder.steps, sort_keys=True),) if encoder.steps else ()
    else:
        parts = encoder.parts
    if encoder.separator not in (None, next(filter(encoder._special_tokens.__contains__, SEPARATORS), None)):
        parts += (encoder.separator,)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def train_bpe(texts, vocab_size, name="bpe", pattern=PATTERN):
    """Train a byte-level BPE of vocab_size ids, END_OF_TEXT included, on an iterable of str; returns the Encoding."""
    if vocab_size < 257:
        raise UserError(f"a byte-level BPE needs a vocabulary of at least 257, not {vocab_size}")
    tokens = bpe.train(texts, vocab_size - 1, pattern)
    return encoding(name, {token: rank for rank, token in enumerate(tokens)}, pattern)
