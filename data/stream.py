"""Training from a Hugging Face dataset that is read and tokenised while the run goes on: data="hf:REPO", nothing to
prepare. The spec is hf:REPO[:CONFIG][?split=train&column=text&validation=1000]; REPO may be a local folder or file, or
a short name that data.prepare knows, such as tinystories.

The documents follow one another in the dataset's order, each behind a separator, epoch after epoch; window n is tokens
nT..nT+T of that, and the seed changes nothing. Every rank reads and tokenises all of it: for more than a dozen fast
ranks prepare shards instead. Validation is the first documents, never trained on, or a split.
Next: loader.py, which uses it.
"""

import collections
import functools
import itertools
import math
import os
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data import sources, tokenizer
from data.shards import Split
from errors import UserError

CHUNK = 128  # documents read, and tokenised by several threads, at a time
THREADS = min(os.cpu_count() or 1, 4)


def is_stream(folder):
    return str(folder).startswith("hf:")


def parse(spec):
    """(arguments of sources.open_hf, validation split or None, documents held out for validation) of a spec."""
    where, _, query = spec.removeprefix("hf:").partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    if not where or (wrong := options.keys() - {"split", "column", "validation"}) or "" in options.values():
        raise UserError(f"data={spec!r}: expected hf:REPO[:CONFIG][?split=train&column=text&validation=1000]"
                        + (f"; unknown: {', '.join(sorted(wrong))}" if where and wrong else ""))
    repo, config = where, None
    if not os.path.exists(where):
        repo, _, config = where.partition(":")
    repo, known, validation = sources.KNOWN.get(repo, (repo, None, None))
    opened = (repo, options.get("split", "train"), config or known, options.get("column"))
    validation = options.get("validation", validation or "1000")
    if validation == opened[1]:
        raise UserError(f"data={spec!r}: validation={validation} is the split that is trained on: name another")
    return (opened, None, int(validation)) if validation.isdecimal() else (opened, validation, 0)


class Streamed:
    """The windows of T+1 tokens of a dataset, neighbours sharing one token, in order. `place` is where the next one
    starts, as JSON: [window, epoch, row, tokens after that row's start]."""
    count = math.inf  # nobody knows how many there are

    def __init__(self, spec, sequence_length, encoder):
        self.spec, self.T, self.encoder = spec, sequence_length, encoder
        self.opened, _, self.held_out = parse(spec)
        self.split = Split([], None, encoder.n_vocab - 1, None, spec)
        self.go_to([0, 0, self.held_out, 0])

    def go_to(self, place):
        """Continue from a `place` of an earlier run with the same data, length and tokenizer."""
        self.window, *self.begun, self.offset = place
        self.documents = _tokenised(_documents(self.spec, self.opened, self.held_out, *self.begun), self.encoder)
        # (epoch, row, tokens) of documents; the next window begins at `offset`, and `ready` tokens are behind that
        self.waiting, self.ready = collections.deque(), -self.offset

    @property
    def place(self):
        epoch, row = self.waiting[0][:2] if self.waiting else self.begun
        return [self.window, epoch, row, self.offset]

    def turn(self, n, key=None):
        """Window n, int64; going back means reading from the start again."""
        if n < self.window:
            self.go_to([0, 0, self.held_out, 0])
        while True:
            while self.ready <= self.T:
                self.waiting.append(next(self.documents))
                self.ready += len(self.waiting[-1][2])
            first, *others = (ids for *_, ids in self.waiting)
            window = np.concatenate([first[self.offset:self.offset + self.T + 1], *others])[:self.T + 1]
            self.window, self.offset, self.ready = self.window + 1, self.offset + self.T, self.ready - self.T
            while self.offset >= len(self.waiting[0][2]):
                self.offset -= len(self.waiting.popleft()[2])
            if self.window > n:
                return window.astype(np.int64)


def held_out(spec, encoder, tokens):
    """The validation documents as a Split of at most about so many tokens in memory."""
    opened, split, count = parse(spec)
    if split:
        opened, count = (opened[0], split, *opened[2:]), math.inf
    pieces, found, n_bytes = [], 0, 0
    for row, text in _rows(opened, 0):
        if row >= count or found >= tokens:
            break
        pieces.append(tokenizer.encode(encoder, text))
        found, n_bytes = found + len(pieces[-1]), n_bytes + len(text.encode("utf-8", "surrogatepass"))
    if found < 2:
        raise UserError(f"data={spec!r}: no text for validation; set ?validation=N documents or ?validation=SPLIT")
    return Split([np.concatenate(pieces)], found, encoder.n_vocab - 1, n_bytes)


def _documents(spec, opened, held_out, epoch, row):
    """Yield (epoch, row, text) from a row on, for ever."""
    while True:
        found = row > held_out
        for number, text in _rows(opened, row):
            found = True
            yield epoch, number, text
        if not found:
            raise UserError(f"data={spec!r} has no text beyond its first {held_out} documents, which are held out for "
                            "validation: set ?validation=N to fewer, or ?validation=SPLIT")
        epoch, row = epoch + 1, held_out
        print(f"{spec}: epoch {epoch + 1} begins"
              + ("; warning: beyond four, repeated data teaches little" if epoch >= 4 else ""), flush=True)


def _rows(opened, first):
    """(row number, text) of the rows that are not empty, from row `first` on."""
    dataset, column = sources.open_hf(*opened)
    return ((row - 1, text) for row, text in sources.rows(dataset, column, opened[0], first) if text.strip())


def _tokenised(documents, encoder):
    """Yield (epoch, row, ids) of the documents, a chunk of which is tokenised at a time."""
    encode = functools.partial(tokenizer.encode, encoder)
    with ThreadPoolExecutor(THREADS) as pool:  # tiktoken leaves Python's lock alone
        while chunk := list(itertools.islice(documents, CHUNK)):
            for (epoch, row, _), ids in zip(chunk, pool.map(encode, [text for *_, text in chunk])):
                yield epoch, row, ids
