"""The training stream, read ahead by one thread, and the validation set.

The stream is a pure function of (seed, position): sequence i of the run is the same on every world size and after
every resume, so a checkpoint needs to remember nothing but the step. Each epoch visits every window of the data once,
in a new order; mixtures interleave folders by weight. Validation is always the same windows in the same order.
A window is cut from the plain concatenation of the documents, or packed so that none is split that fits.

Shapes: B sequences, T tokens each. Next: stream.py, where the data is no folder, or ../train.py.
"""

import bisect
import contextlib
import functools
import queue
import threading
import zlib
from pathlib import Path

import numpy as np
import torch

from data import tokenizer
from data.shards import open_split
from data.stream import Streamed, held_out, is_stream
from errors import UserError
from kernels.cross_entropy import IGNORE

MIXTURE_BLOCK = 1024  # sequences over which the mixture's shares are exact
BLOCK_ROWS = 128  # rows' worth of tokens that are packed together


class Windows:
    """The non-overlapping windows of T+1 tokens of a shards.Split; neighbours share one token, so that every token but
    the first is a target exactly once."""

    def __init__(self, split, sequence_length):
        self.split, self.T = split, sequence_length
        self.starts = np.cumsum([0] + [len(array) for array in self.split.arrays])
        self.count = (self.split.tokens - 1) // sequence_length

    def turn(self, n, key):
        """Window number n of a run: every window once an epoch, in an order that key and epoch decide."""
        epoch, index = divmod(n, self.count)
        return self.window(shuffled(index, self.count, zlib.crc32(f"{key}/{epoch}".encode())))

    def read(self, start, length, dtype=np.int64):
        """Tokens start..start+length of the split, across shard borders; dtype None: as they are stored."""
        pieces = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while length > 0:
            offset = start - int(self.starts[shard])
            piece = self.split.arrays[shard][offset:offset + length]
            pieces.append(piece)
            start, length, shard = start + len(piece), length - len(piece), shard + 1
        return np.concatenate(pieces, dtype=dtype)

    def window(self, index):
        return self.read(index * self.T, self.T + 1)

    def text_bytes(self, starts, encoder):
        """Bytes of text behind the targets of the windows that start there: those that the tokenizer has for them, none
        for special tokens, times what the text had over what the tokenizer has for the whole split; that is 1 unless
        text was repaired or the tokenizer is lossy. None without a tokenizer, text, or some id in the tokenizer."""
        recorded = self.split.bytes
        if encoder is None or recorded == 0:
            return None
        if self.split.max_id >= encoder.n_vocab:
            print(f"the tokenizer {encoder.name} does not have id {self.split.max_id} of val: no bits_per_byte")
            return None
        found = sum(self._token_bytes(at + 1, min(at + self.T + 1, self.split.tokens), encoder) for at in starts)
        whole = recorded is not None and self._token_bytes(0, self.split.tokens, encoder)
        return found * recorded / whole if whole else found

    def _token_bytes(self, start, end, encoder, block=2**22):
        table = token_bytes(encoder)
        return sum(int(table[self.read(at, min(block, end - at))].sum()) for at in range(start, end, block))


class Packed(Windows):
    """Rows of T+1 tokens in which no document that fits into one is split. Blocks of documents, so many as start within
    BLOCK_ROWS * T tokens, are packed each for itself; opening it packs all of them once, to know how many rows there
    are. Places that stay free hold IGNORE; `padding` is their share."""

    def __init__(self, split, sequence_length, separator, folder):
        super().__init__(split, sequence_length)
        self.separator = separator
        block = BLOCK_ROWS * sequence_length
        found = (self._separators(start, start + block) for start in range(0, self.split.tokens, block))
        firsts = [int(places[0]) for places in found if len(places)]
        if not firsts or firsts[0] > 0.01 * self.split.tokens:
            where = f"its first separator (id {separator}) is token {firsts[0]:,} of {self.split.tokens:,}" if firsts \
                else f"it holds no separator (id {separator})"
            raise UserError(f"{folder}: {where}, and best_fit would leave out what is before it: set --packing=concat "
                            "or the --tokenizer that the data was made with")
        if firsts[0]:
            print(f"{folder}: best_fit leaves out the {firsts[0]:,} tokens before the first separator")
        self.blocks = [*firsts, self.split.tokens]
        counts, filled = [0], 0
        for number in range(len(self.blocks) - 1):
            rows = self._layout(number)[1]
            counts.append(len(rows))
            filled += sum(length for row in rows for *_, length in row)
        self.rows, self.count = np.cumsum(counts), sum(counts)
        self.padding = 1 - filled / (self.count * (self.T + 1))
        self.layout = functools.lru_cache(64)(self._layout)
        print(f"{folder}: {self.padding:.2%} of the places of packed sequences stay empty")

    def _separators(self, start, end):
        """Where separators stand in start..end of the split."""
        length = min(end, self.split.tokens) - start
        return start + np.flatnonzero(self.read(start, length, dtype=None) == self.separator)

    def _layout(self, number):
        """(starts of the block's documents, its rows as best_fit gives them)."""
        end = self.blocks[number + 1]
        starts = self._separators(self.blocks[number], end)
        return starts, best_fit(np.diff(starts, append=end).tolist(), self.T)

    def window(self, index):
        number = int(np.searchsorted(self.rows, index, side="right")) - 1
        starts, rows = self.layout(number)
        row, at = np.full(self.T + 1, IGNORE, np.int64), 0
        for document, offset, length in rows[index - int(self.rows[number])]:
            row[at:at + length] = self.read(int(starts[document]) + offset, length)
            at += length
        return row


class TrainStream:
    """Sequence i of a run, for any i >= 0. data is a folder, a spec of stream.py, or {either: weight}; share:
    open_split's. The encoder, a tokenizer, is for streams, packing and document_mask."""

    def __init__(self, data, sequence_length, seed, verify=True, share=(0, 1), encoder=None, packing="concat",
                 document_mask=False):
        weights = data if isinstance(data, dict) else {data: 1.0}
        self.seed, self.T, self.folders, self.packing = seed, sequence_length, list(weights), packing
        self.separator, self.document_mask = encoder and tokenizer.end_of_text(encoder), document_mask
        if self.separator is None and (packing == "best_fit" or document_mask):
            raise UserError("best_fit and document_mask find documents by the tokenizer's end-of-text token, which "
                            "this one lacks: choose the --tokenizer that the data was made with")

        def opened(folder):
            if is_stream(folder):
                return Streamed(folder, sequence_length, encoder)
            split = open_split(folder, "train", verify, share)
            if packing == "best_fit":
                return Packed(split, sequence_length, self.separator, folder)
            return Windows(split, sequence_length)
        self.sources = [opened(folder) for folder in weights]
        for folder, source in zip(weights, self.sources):
            if source.count < 1:
                raise UserError(f"{folder}: {source.split.tokens} training tokens are fewer than one sequence of "
                                f"{sequence_length + 1}; lower sequence_length or add text")
        self.shares = _whole_shares([weight / sum(weights.values()) for weight in weights.values()], MIXTURE_BLOCK)
        if not all(self.shares):
            raise UserError(f"data={data}: a weight below {1 / MIXTURE_BLOCK:.4f} of the sum never gets a turn")

    def sequence(self, i):
        """T+1 token ids, int64."""
        block, place = divmod(i, MIXTURE_BLOCK)
        order = np.repeat(np.arange(len(self.shares)), self.shares)
        if len(self.shares) > 1:
            order = np.random.Generator(np.random.Philox(key=[self.seed, block])).permutation(order)
        which = int(order[place])
        turn = block * self.shares[which] + int((order[:place] == which).sum())  # how often this folder had its turn
        return self.sources[which].turn(turn, f"{self.seed}/{which}")

    def batch(self, first, size):
        """Sequences first..first+size as (inputs, targets), each (B, T) int64 tensors. Where a packed sequence is
        empty, targets are IGNORE and inputs the separator: there every position is a document of its own."""
        tokens = torch.from_numpy(np.stack([self.sequence(i) for i in range(first, first + size)]))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return (inputs if self.packing == "concat" else inputs.masked_fill_(inputs == IGNORE, self.separator)), targets

    def starts(self, inputs_BT):
        """document_starts with document_mask, None without."""
        return document_starts(inputs_BT, self.separator) if self.document_mask else None

    def places(self):
        """How far the streamed sources were read, as JSON. It saves a resumed run the tokenising of what came before,
        though not passing over its rows, and changes nothing in what it reads."""
        return {name: source.place for name, source in zip(self.folders, self.sources) if is_stream(name)}

    def go_to(self, places):
        """Continue from earlier places()."""
        for name, source in zip(self.folders, self.sources):
            if name in places and is_stream(name):
                source.go_to(places[name])

    def epochs(self, sequences, before=None):
        """Passes over the most repeated folder after so many sequences; before: those read of each already."""
        return max((read + sequences * share / MIXTURE_BLOCK) / source.count for read, share, source in
                   zip(before or [0] * len(self.sources), self.shares, self.sources))

    def max_id(self):
        return max(source.split.max_id for source in self.sources)

    def identity(self):
        """What decides the sequence of a given number, as JSON: a resumed run compares it."""
        data = {folder: [source.split.tokens, share, source.split.fingerprint] for folder, source, share in
                zip(self.folders, self.sources, self.shares)}
        return {"data": data, "sequence_length": self.T, "seed": self.seed, "packing": self.packing}


def document_starts(inputs_BT, separator):
    """(B, T) int32: where in its row the document of each position starts, which is where the last separator stands,
    or 0."""
    position_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    return torch.where(inputs_BT == separator, position_T, 0).cummax(dim=1).values.int()


class ValidationSet:
    """At most `sequences` windows, of every folder as many: its whole val split or windows spread evenly over it. The
    last of all is padded with IGNORE targets, so that a split shorter than one sequence is evaluated too. `bytes`: of
    text behind just these targets, None where it is not known; the encoder is for that, None: that of each folder."""

    def __init__(self, data, sequence_length, sequences, verify=True, share=(0, 1), encoder=None):
        folders = data if isinstance(data, dict) else {data: 1.0}
        self.T, self.sequences = sequence_length, max(sequences // len(folders), 1)
        self.sources = [Windows(held_out(folder, encoder, self.sequences * self.T + 1) if is_stream(folder) else
                                open_split(folder, "val", verify, share), sequence_length) for folder in folders]
        counts = [min(source.split.tokens - 1, self.sequences * self.T) for source in self.sources]
        taken = [-(-count // self.T) for count in counts]  # windows, of all that there are
        self.starts = [[i * max(source.count, n) // n * self.T for i in range(n)]
                       for source, n in zip(self.sources, taken)]
        found = [source.text_bytes(starts, encoder or _own_tokenizer(folder))
                 for folder, source, starts in zip(folders, self.sources, self.starts)]
        self.tokens, self.bytes = sum(counts), None if None in found else sum(found)
        self.bytes_per_token = self.bytes and self.bytes / self.tokens
        self.windows = zlib.crc32(repr((self.T, self.starts, self.tokens)).encode())  # what losses may be compared by

    def batches(self, batch_size, rank=0, ranks=1):
        """Yields this rank's share as (inputs, targets), (B, T) tensors; the last batch is smaller if need be, and the
        same number of batches of the same sizes comes on every rank, if need be with a row of IGNORE alone."""
        places = [(source, start) for source, starts in zip(self.sources, self.starts) for start in starts]
        for i in range(0, len(places), batch_size * ranks):
            round_ = places[i:i + batch_size * ranks]
            size = -(-len(round_) // ranks)
            inputs, targets = torch.zeros((size, self.T), dtype=torch.int64), torch.full((size, self.T), IGNORE)
            for row, (source, start) in enumerate(round_[rank * size:(rank + 1) * size]):
                tokens = torch.from_numpy(source.read(start, min(self.T + 1, source.split.tokens - start)))
                inputs[row, :len(tokens) - 1], targets[row, :len(tokens) - 1] = tokens[:-1], tokens[1:]
            yield inputs, targets

    def max_id(self):
        return max(source.split.max_id for source in self.sources)


def _own_tokenizer(folder):
    stored = Path(folder) / "tokenizer"
    return tokenizer.load(stored) if stored.is_dir() else None


@functools.lru_cache(4)
def token_bytes(encoder):
    """How many bytes every id of a tokenizer stands for, int64; 0 for special tokens and ids without a text."""
    lengths = np.zeros(encoder.n_vocab, np.int64)
    plain = {token["id"] for token in (encoder.steps or {"added": ()})["added"]}  # they are text like any other
    for id_ in set(range(encoder.n_vocab)) - (set(encoder._special_tokens.values()) - plain):
        with contextlib.suppress(KeyError):  # ids between the ranks and the special tokens
            lengths[id_] = len(encoder.decode_single_token_bytes(id_))
    return lengths


def prefetch(stream, device, steps, sequences, per_step, size, rank=0, ranks=1, ahead=3, timeout=600.0):
    """Yield (inputs, targets, stream.places()) for every micro-batch of this rank, in order, made ahead by a thread.

    steps: their numbers; sequences: how many of the stream came before them; per_step: the global batch; size: this
    rank's micro-batch. To a GPU tensors go by pinned memory, and nobody waits. An error of the thread is raised here
    and names the step, and a silence of `timeout` seconds (at the start twelve times that) is one. The thread is the
    stream's only reader, and ends with this generator.
    """
    made, room, stop = queue.SimpleQueue(), threading.Semaphore(ahead), threading.Event()
    gpu = torch.cuda.current_device() if device.type == "cuda" else None

    def work():
        step = None
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # else pinning would open a context on the first GPU
            for step in steps:
                start = sequences + (step - steps[0]) * per_step
                for first in range(start + rank * size, start + per_step, ranks * size):
                    tensors = stream.batch(first, size)
                    item = (*((t.pin_memory() for t in tensors) if gpu is not None else tensors), stream.places())
                    room.acquire()
                    if stop.is_set():
                        return
                    made.put(item)
            made.put(None)
        except (UserError, OSError) as error:
            made.put(UserError(f"the data of step {step} cannot be read: {error}"))
        except BaseException as error:  # whatever it is, the main thread has to hear of it
            error.add_note(f"raised by the thread that reads the data, at step {step}")
            made.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    wait = 12 * timeout  # a stream may first pass over what it had
    try:
        while (item := made.get(timeout=wait)) is not None:
            if isinstance(item, BaseException):
                raise item
            wait = timeout
            room.release()
            yield *(tensor.to(device, non_blocking=gpu is not None) for tensor in item[:2]), item[2]
    except queue.Empty as error:
        raise UserError(f"no batch came for {wait:.0f} s: does the disk or the network that holds the data answer? "
                        "--resume continues from the last checkpoint") from error
    finally:
        stop.set()
        room.release()
        thread.join(timeout=5)


def best_fit(lengths, T):
    """Rows of at most T+1 tokens for documents of these lengths; a row is a list of (document, offset, length).

    Documents longer than a row are joined and cut, neighbouring rows sharing one token. The others stay whole: from the
    longest on, each goes where the least space is left in which it fits (best fit, decreasing).
    """
    rows, row, space = [], [], T + 1
    for document, length in enumerate(lengths):
        offset = 0
        while length > T + 1 and offset < length:
            taken = min(space, length - offset)
            row.append((document, offset, taken))
            offset, space = offset + taken, space - taken
            if space == 0:
                rows.append(row)
                row, space = [(document, offset - 1, 1)], T
    rows += [row] if space < T else []  # more than the shared token
    spaces = [(space, len(rows) - 1)] if space < T else []
    for document in sorted((d for d, length in enumerate(lengths) if length <= T + 1), key=lambda d: -lengths[d]):
        i = bisect.bisect_left(spaces, (lengths[document], 0))
        if i == len(spaces):
            rows.append([])
            space, number = T + 1, len(rows) - 1
        else:
            space, number = spaces.pop(i)
        rows[number].append((document, 0, lengths[document]))
        if space > lengths[document]:
            bisect.insort(spaces, (space - lengths[document], number))
    return rows


def shuffled(index, count, key):
    """Where `index` goes in a pseudo-random permutation of range(count): a four-round Feistel network on the next power
    of four, walked until it lands inside. No table, so an epoch of billions costs nothing."""
    half = max((int(count - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = (right + key * 0x9E3779B1 + turn * 0x85EBCA77) * 0xC2B2AE3D27D4EB4F & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0x165667B19E3779F9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        index = left << half | right
        if index < count:
            return index


def _whole_shares(fractions, total):
    """Whole numbers that sum to total, as near to the fractions as possible (largest remainder)."""
    exact = np.array(fractions) * total
    shares = exact.astype(int)
    shares[np.argsort(shares - exact, kind="stable")[:total - shares.sum()]] += 1
    return shares.tolist()
