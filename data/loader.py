"""The training stream and the validation set.

The stream is a pure function of (seed, position): sequence i of the run is the same on every world size and after
every resume, so a checkpoint needs to remember nothing but the step. Each epoch visits every window of the data once,
in a new order; mixtures interleave folders by weight. Validation is always the same windows in the same order.

Shapes: B sequences, T tokens each. Next: ../train.py.
"""

import zlib

import numpy as np
import torch

from data.shards import open_split
from errors import UserError
from kernels.cross_entropy import IGNORE

MIXTURE_BLOCK = 1024  # sequences over which the mixture's shares are exact


class Windows:
    """The non-overlapping windows of T+1 tokens of one split of one folder; neighbours share one token, so that every
    token but the first is a target exactly once."""

    def __init__(self, folder, split, sequence_length, verify=True, share=(0, 1)):
        self.split, self.T = open_split(folder, split, verify, share), sequence_length
        self.starts = np.cumsum([0] + [len(array) for array in self.split.arrays])
        self.count = (self.split.tokens - 1) // sequence_length

    def read(self, start, length):
        """Tokens start..start+length of the split, across shard borders, as int64."""
        pieces = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while length > 0:
            offset = start - int(self.starts[shard])
            piece = self.split.arrays[shard][offset:offset + length]
            pieces.append(piece)
            start, length, shard = start + len(piece), length - len(piece), shard + 1
        return np.concatenate(pieces).astype(np.int64)

    def window(self, index):
        return self.read(index * self.T, self.T + 1)


class TrainStream:
    """Sequence i of a run, for any i >= 0. data is a folder or {folder: weight}; share: open_split's."""

    def __init__(self, data, sequence_length, seed, verify=True, share=(0, 1)):
        weights = data if isinstance(data, dict) else {data: 1.0}
        self.seed, self.T, self.folders = seed, sequence_length, list(weights)
        self.sources = [Windows(folder, "train", sequence_length, verify, share) for folder in weights]
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
        epoch, index = divmod(turn, self.sources[which].count)
        key = zlib.crc32(f"{self.seed}/{which}/{epoch}".encode())
        return self.sources[which].window(shuffled(index, self.sources[which].count, key))

    def batch(self, first, size):
        """Sequences first..first+size as (inputs, targets), each (B, T) int64 tensors."""
        tokens = torch.from_numpy(np.stack([self.sequence(i) for i in range(first, first + size)]))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def epochs(self, sequences):
        """Passes over the most repeated folder after that many sequences."""
        return max(sequences * share / MIXTURE_BLOCK / source.count for share, source in zip(self.shares, self.sources))

    def max_id(self):
        return max(source.split.max_id for source in self.sources)

    def identity(self):
        """What decides the sequence of a given number, as JSON: a resumed run compares it."""
        data = {folder: [source.split.tokens, share] for folder, source, share in
                zip(self.folders, self.sources, self.shares)}
        return {"data": data, "sequence_length": self.T, "seed": self.seed}


class ValidationSet:
    """The first `sequences` windows of the val split of every folder, the last one padded with IGNORE targets, so
    that a split shorter than one sequence is evaluated too."""

    def __init__(self, data, sequence_length, sequences, verify=True, share=(0, 1)):
        folders = data if isinstance(data, dict) else {data: 1.0}
        self.sources = [Windows(folder, "val", sequence_length, verify, share) for folder in folders]
        self.T, self.sequences = sequence_length, max(sequences // len(self.sources), 1)
        ratios = [source.split.bytes_per_token for source in self.sources]
        targets = [min(source.split.tokens - 1, self.sequences * self.T) for source in self.sources]
        self.bytes_per_token = None  # unknown where a folder has no meta.json
        if None not in ratios:
            self.bytes_per_token = sum(ratio * n for ratio, n in zip(ratios, targets)) / sum(targets)

    def batches(self, batch_size, rank=0, ranks=1):
        """Yields this rank's share as (inputs, targets), (B, T) tensors; the last batch is smaller if need be, and the
        same number of batches of the same sizes comes on every rank, if need be with a row of IGNORE alone."""
        places = [(source, start) for source in self.sources
                  for start in range(0, min(source.split.tokens - 1, self.sequences * self.T), self.T)]
        for i in range(0, len(places), batch_size * ranks):
            round_ = places[i:i + batch_size * ranks]
            size = -(-len(round_) // ranks)
            rows = [self._row(*place) for place in round_[rank * size:(rank + 1) * size]]
            rows += [(np.zeros(self.T, np.int64), np.full(self.T, IGNORE, np.int64))] * (size - len(rows))
            inputs, targets = zip(*rows)
            yield torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))

    def _row(self, source, start):
        tokens = source.read(start, min(self.T + 1, source.split.tokens - start))
        inputs, targets = np.zeros(self.T, np.int64), np.full(self.T, IGNORE, np.int64)
        inputs[:len(tokens) - 1], targets[:len(tokens) - 1] = tokens[:-1], tokens[1:]
        return inputs, targets

    def max_id(self):
        return max(source.split.max_id for source in self.sources)


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
    floors = [int(fraction * total) for fraction in fractions]
    by_remainder = sorted(range(len(fractions)), key=lambda i: floors[i] - fractions[i] * total)
    for i in by_remainder[:total - sum(floors)]:
        floors[i] += 1
    return floors
