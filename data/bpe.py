"""Training a byte-level BPE: greedy merges of the most frequent pair of neighbours inside words (Sennrich et al., arXiv
1508.07909), ties to the lowest pair of ids, as the tokenizers library does it.

All distinct words lie in one array of ids, an empty slot between them, and every position knows its neighbours. A merge
touches the positions of its pair alone, all at once, so that the whole takes time in proportion to the text, whatever
the length of a word: a million letters of DNA are one. Next: tokenizer.py, whose train_bpe makes an Encoding of it.
"""

import collections
import heapq
import itertools

import numpy as np
import regex
from tqdm import tqdm

from data.convert import byte_letters

MOST = 2**26  # bytes of distinct words, at most: about 3 GB while training


def train(texts, count, pattern):
    """`count` tokens as bytes, in the order of their ids: the 256 bytes, then the merges; fewer if every word is one
    token before. texts: an iterable of str; pattern cuts them into words. The regex package may know newer Unicode than
    tiktoken: characters assigned between the two can make other words here than when encoding, which costs a merge or
    two, nothing else."""
    letters = byte_letters()
    tokens = [bytes([byte]) for byte in sorted(letters, key=letters.get)]  # the usual order, which decides ties
    words = Words(*_count(texts, pattern), tokens)
    with tqdm(total=count, initial=len(tokens), desc="merging", unit=" ids", disable=None) as bar:
        while len(tokens) < count and (pair := words.most_frequent()):
            words.merge(pair, len(tokens))
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            bar.update()
    return tokens


def _count(texts, pattern):
    """(distinct words as bytes, how often each stands in the texts). What does not fit MOST is left out, and said."""
    find, frequency, size = regex.compile(pattern).findall, collections.Counter(), 0
    for text in texts:
        found = find(text)
        size += sum(len(word.encode()) for word in set(found) - frequency.keys())
        frequency.update(found)
        if size > MOST:
            print(f"the tokenizer is trained on the first {MOST:,} of {size:,} bytes of distinct words, and on no text "
                  "beyond these: memory would not hold more")
            break
    words = [word.encode() for word in frequency]
    ends = itertools.accumulate(map(len, words))
    return [word[:max(MOST - end + len(word), 0)] for word, end in zip(words, ends)], frequency.values()


class Words:
    """The words as ids, their pairs and how often these occur. At a position where no token starts any more, and in the
    slots between words, ids holds -1."""

    def __init__(self, words, frequencies, tokens):
        marked = b"\xff".join([b"", *words, b""])  # a byte that no UTF-8 has
        marked = np.frombuffer(marked, np.uint8)
        id_of = np.full(256, -1, np.int32)
        for number, token in enumerate(tokens):
            id_of[token[0]] = number
        id_of[255] = -1
        self.ids = id_of[marked]
        slots = np.flatnonzero(self.ids < 0)
        self.weights = np.repeat(np.array([*frequencies, 0], np.int64), np.diff(slots, append=len(marked)))
        self.before, self.after = (np.arange(step, len(marked) + step, dtype=np.int32) for step in (-1, 1))
        self.counts, self.where, self.heap = {}, {}, []
        starts = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0)).astype(np.int32)
        codes = self.ids[starts].astype(np.uint16) << 8 | self.ids[starts + 1].astype(np.uint16)
        for code, weight, places in self._grouped(codes, starts):
            self._add((code >> 8, code & 255), weight, places)

    def _grouped(self, keys, places):
        """(key, weight, places) of each distinct key, the places in their order."""
        if not len(keys):
            return []
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        starts = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist()]
        weights = np.add.reduceat(self.weights[places], starts).tolist()
        return zip(keys[starts].tolist(), weights, map(places.__getitem__, map(slice, starts, [*starts[1:], None])))

    def _add(self, pair, weight, places):
        self.counts[pair], self.where[pair] = weight, places
        heapq.heappush(self.heap, (-weight, pair))

    def most_frequent(self):
        """The pair to merge next, None if there is none."""
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            if self.counts[pair] == -negative:
                return pair
            if self.counts[pair] > 0:  # it has become rarer since it was pushed
                heapq.heappush(self.heap, (-self.counts[pair], pair))
        return None

    def merge(self, pair, new):
        """Make one token of the pair wherever it stands, in a run of equal ones from the left."""
        (left, right), ids, before, after = pair, self.ids, self.before, self.after
        first = self.where.pop(pair)
        first = first[ids[first] == left]
        first = first[ids[after[first]] == right]  # the pair may be gone from where it once stood
        if left == right:
            number = np.arange(len(first))
            begins = np.ones(len(first), bool)
            begins[1:] = after[first[:-1]] != first[1:]
            first = first[(number - np.maximum.accumulate(np.where(begins, number, 0))) % 2 == 0]
        second = after[first]
        beyond = after[second]
        ids[first], ids[second] = new, -1
        after[first], before[beyond] = beyond, first
        previous = before[first]
        for neighbours, is_left in ((previous, True), (beyond, False)):
            keys = ids[neighbours]
            kept = keys >= 0 if is_left else (keys >= 0) & (keys != new)  # two new ones in a row: once
            for key, weight, places in self._grouped(keys[kept], (neighbours if is_left else first)[kept]):
                old = (right if key == new else key, left) if is_left else (right, key)
                if old != pair:
                    self.counts[old] -= weight
                self._add((key, new) if is_left else (new, key), weight, places)
        del self.counts[pair]
