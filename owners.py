"""The plan of the distributed Muon: which rank orthogonalises which matrix, and which rows travel for it.

Newton-Schulz needs whole matrices, while ranks hold rows of parameters. So every logical matrix has one owner, to which
the ranks send their rows and which sends the update back: 4 bytes / R per parameter and rank in bf16, against 2 bytes
for gathering everything everywhere, and each matrix is computed once. A matrix that one rank holds whole stays there
and nothing travels: experts under expert parallelism, heads that fit a shard, and everything in a run of one rank.

Only arithmetic on row ranges here, the same on every rank, derived anew at every start and never saved. Next: muon.py,
which executes it.
"""

import hashlib
import heapq
import itertools
from dataclasses import dataclass, field

BUCKET_ELEMENTS = 2**24  # what an owner gets and computes in one exchange: 32 MiB in bf16
BATCH_ELEMENTS = 2**27   # what stays is orthogonalised in batches of at most this size: 512 MiB in fp32
ROOM = 1.1               # a rank keeps its own matrices until it has this multiple of the mean work


@dataclass(frozen=True)
class Stack:
    """A parameter as `count` logical matrices of rows x columns, one under the other. A pinned one never travels to
    ranks that do not hold it."""
    name: str
    count: int
    rows: int
    columns: int
    pinned: bool = False

    @property
    def shape(self):
        return self.rows, self.columns

    @property
    def size(self):
        return self.rows * self.columns

    @property
    def cost(self):
        """Newton-Schulz work of one matrix, up to a factor: two products of s x s x l and one of s x s x s."""
        short, long = sorted(self.shape)
        return short * short * (2 * long + short)


@dataclass(frozen=True)
class Item:
    """Matrices first .. first+count of a stack, all with one owner."""
    stack: int
    first: int
    count: int
    owner: int


@dataclass(frozen=True)
class Move:
    """Rows low..high (of the whole parameter) of an item, from rank to rank; within one rank it is a copy."""
    item: Item
    source: int
    target: int
    low: int
    high: int


@dataclass
class Plan:
    """`local` items stay with their owner; the items of a bucket travel together, in one exchange each way."""
    stacks: list
    pieces: list  # per stack: [(low, high, ranks that hold these rows)]
    ranks: int
    local: list = field(default_factory=list)
    buckets: list = field(default_factory=list)

    def inward(self, item):
        """What brings the rows of an item to its owner: every piece from the nearest rank that has it."""
        return [Move(item, min(ranks, key=lambda rank: (abs(rank - item.owner), rank)), item.owner, low, high)
                for low, high, ranks in self.parts(item)]

    def outward(self, item):
        """What brings the update of an item to every rank that holds some of its rows."""
        return [Move(item, item.owner, rank, low, high) for low, high, ranks in self.parts(item) for rank in ranks]

    def parts(self, item):
        """The pieces of an item's parameter, cut to the item."""
        rows = self.stacks[item.stack].rows
        first, last = item.first * rows, (item.first + item.count) * rows
        return [(max(low, first), min(high, last), ranks) for low, high, ranks in self.pieces[item.stack]
                if low < last and high > first]

    def local_batches(self, rank):
        """A rank's local items in lists that one batched Newton-Schulz takes: of one shape, and not too large."""
        by_shape = {}
        for item in self.local:
            if item.owner == rank:
                by_shape.setdefault(self.stacks[item.stack].shape, []).append(item)
        size = lambda item: item.count * self.stacks[item.stack].size
        return [batch for items in by_shape.values() for batch in _cut(items, size, BATCH_ELEMENTS)]

    def loads(self):
        """Newton-Schulz work of every rank."""
        loads = [0] * self.ranks
        for item in [*self.local, *(item for bucket in self.buckets for item in bucket)]:
            loads[item.owner] += item.count * self.stacks[item.stack].cost
        return loads

    def traffic(self, rank, element_size):
        """(collectives, bytes sent) of one step on one rank. An exchange that moves nothing anywhere is left out."""
        collectives, elements = 0, 0
        for bucket in self.buckets:
            for trip in (self.inward, self.outward):
                moves = [move for item in bucket for move in trip(item) if move.source != move.target]
                collectives += bool(moves)
                elements += sum((move.high - move.low) * self.stacks[move.item.stack].columns
                                for move in moves if move.source == rank)
        return collectives, elements * element_size

    def digest(self):
        """A text that is equal on all ranks if their plans are."""
        return hashlib.sha256(repr((self.stacks, self.pieces, self.local, self.buckets)).encode()).hexdigest()


def make_plan(stacks, held, bucket_elements=BUCKET_ELEMENTS):
    """Choose an owner for every matrix. held[rank][i] is the row range (low, high) of stack i on that rank, of all its
    count * rows rows.

    The costliest matrices choose first, and the rank with the least work so far gets the next (longest processing time
    first). A matrix that one rank alone holds whole stays there unless that rank has more than its share; a pinned one
    always stays with one of those that hold it. Then every owner's travelling matrices are cut into buckets, so that in
    each exchange all owners have work.
    """
    ranks = len(held)
    pieces = [_pieces([ranges[i] for ranges in held]) for i in range(len(stacks))]
    plan = Plan(stacks, pieces, ranks)
    room = ROOM * sum(stack.count * stack.cost for stack in stacks) / ranks
    matrices = [(i, matrix, whole) for i, stack in enumerate(stacks)
                for matrix, whole in enumerate(_whole_on(stack, pieces[i]))]
    loads, stay, travel = _Loads(ranks), [], [[] for _ in range(ranks)]
    # What has no choice first, then what travels anyway, then what may stay; each by falling cost.
    rank_of_kind = lambda i, whole: 0 if stacks[i].pinned and whole else 2 if len(whole) == 1 else 1
    for i, matrix, whole in sorted(matrices, key=lambda m: (rank_of_kind(m[0], m[2]), -stacks[m[0]].cost)):
        stack = stacks[i]
        if stack.pinned and whole:
            owner = loads.least(among=whole)
        elif len(whole) == 1 and (ranks == 1 or loads[whole[0]] + stack.cost <= room):
            owner = whole[0]
        else:
            owner = loads.least()
        loads.add(owner, stack.cost)
        (stay if whole == (owner,) else travel[owner]).append((i, matrix, owner))
    plan.local = _items(stay, stacks, BATCH_ELEMENTS)
    shares = [_cut(_items(mine, stacks, bucket_elements), lambda item: item.count * stacks[item.stack].size,
                   bucket_elements) for mine in travel]
    plan.buckets = [list(itertools.chain(*turn)) for turn in itertools.zip_longest(*shares, fillvalue=())]
    return plan


class _Loads:
    """Work per rank with a quick minimum; the lowest rank wins ties."""

    def __init__(self, ranks):
        self.work, self.heap = [0] * ranks, [(0, rank) for rank in range(ranks)]

    def __getitem__(self, rank):
        return self.work[rank]

    def add(self, rank, cost):
        self.work[rank] += cost
        heapq.heappush(self.heap, (self.work[rank], rank))

    def least(self, among=None):
        if among:
            return min(among, key=lambda rank: (self.work[rank], rank))
        while self.heap[0][0] != self.work[self.heap[0][1]]:
            heapq.heappop(self.heap)  # an entry from before that rank got more
        return self.heap[0][1]


def _pieces(ranges):
    """The distinct non-empty row ranges of one parameter, in order, with the ranks that hold them."""
    holders = {}
    for rank, (low, high) in enumerate(ranges):
        if high > low:
            holders.setdefault((low, high), []).append(rank)
    pieces = [(low, high, tuple(ranks)) for (low, high), ranks in sorted(holders.items())]
    assert all(one[1] == other[0] for one, other in zip(pieces, pieces[1:])), f"rows with gaps or overlaps: {pieces}"
    return pieces


def _whole_on(stack, pieces):
    """For every matrix the ranks that hold all its rows, () if it is cut."""
    whole, at = [], 0
    for matrix in range(stack.count):
        low, high = matrix * stack.rows, (matrix + 1) * stack.rows
        while pieces[at][1] <= low:
            at += 1
        whole.append(pieces[at][2] if pieces[at][1] >= high else ())
    return whole


def _cut(entries, size, limit):
    """Consecutive entries in lists of at most `limit` elements (a matrix larger than that alone)."""
    buckets, elements = [], limit
    for entry in entries:
        if elements + size(entry) > limit:
            buckets.append([])
            elements = 0
        buckets[-1].append(entry)
        elements += size(entry)
    return buckets


def _items(assigned, stacks, limit):
    """(stack, matrix, owner) entries as items: neighbours with one owner are joined, up to `limit` elements."""
    items = []
    for i, matrix, owner in sorted(assigned):
        last = items[-1] if items else None
        if last and (last.stack, last.first + last.count, last.owner) == (i, matrix, owner) \
                and (last.count + 1) * stacks[i].size <= limit:
            items[-1] = Item(i, last.first, last.count + 1, owner)
        else:
            items.append(Item(i, matrix, 1, owner))
    return items


# ----------------------------------------------------------------------------- one rank's part

class Trip:
    """The moves of one job in one direction, as one rank sees them. `collective`: whether anything travels at
    all."""

    def __init__(self, moves, rank, plan):
        size = lambda move: (move.high - move.low) * plan.stacks[move.item.stack].columns
        self.collective = any(move.source != move.target for move in moves)
        self.stays = [move for move in moves if move.source == move.target == rank]
        self.sends = sorted((move for move in moves if move.source == rank != move.target), key=lambda m: m.target)
        self.receives = sorted((move for move in moves if move.target == rank != move.source), key=lambda m: m.source)
        self.send_splits, self.receive_splits = [0] * plan.ranks, [0] * plan.ranks
        for move in self.sends:
            self.send_splits[move.target] += size(move)
        for move in self.receives:
            self.receive_splits[move.source] += size(move)
        self.receive_sizes = [size(move) for move in self.receives]
        self.receive_columns = [plan.stacks[move.item.stack].columns for move in self.receives]


class Job:
    """Items that are orthogonalised together, as one rank sees them: its trips, and where its own items lie when all
    matrices of a shape are stacked."""

    def __init__(self, items, plan, rank):
        self.inward = Trip([move for item in items for move in plan.inward(item)], rank, plan)
        self.outward = Trip([move for item in items for move in plan.outward(item)], rank, plan)
        self.travels = self.inward.collective or self.outward.collective
        self.rows, self.places = {}, {}  # {shape: rows in all}, {item: (shape, first row there, and in the parameter)}
        for item in items:
            if item.owner == rank:
                stack = plan.stacks[item.stack]
                start = self.rows.get(stack.shape, 0)
                self.places[item] = (stack.shape, start, item.first * stack.rows)
                self.rows[stack.shape] = start + item.count * stack.rows

    def part(self, stacked, move):
        """The rows of a move in {shape: stacked matrices}."""
        shape, start, first = self.places[move.item]
        return stacked[shape][start + move.low - first:start + move.high - first]
