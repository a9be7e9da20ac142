"""The owner plan as arithmetic: every matrix once, every row to all who hold it, even loads, no needless traffic."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import K2
from owners import BUCKET_ELEMENTS, Stack, make_plan
from routes import route_parameters
from settings import load
from tests.helpers import ROOT


def chunk(rows, parts, index):
    """The rows of part `index` as torch.chunk cuts them."""
    size = math.ceil(rows / parts)
    return min(index * size, rows), min((index + 1) * size, rows)


def stacks_of(path, ep=1):
    """The Muon matrices of a config, by name."""
    config, _ = load([str(ROOT / path)])
    with torch.device("meta"):
        model = K2(config)
    routes = route_parameters(model.named_parameters())
    return [
        Stack(
            n,
            p.numel() // (routes[n].rows * p.shape[-1]),
            routes[n].rows,
            p.shape[-1],
            pinned=ep > 1 and ".experts." in n and "shared" not in n,
        )
        for n, p in model.named_parameters()
        if routes[n].optimizer == "muon"
    ], {n: p.shape for n, p in model.named_parameters()}


def fsdp_rows(stacks, shapes, ranks, ep=1):
    """held[rank][stack] for FSDP over `ranks`, experts first over ep."""
    held = []
    for rank in range(ranks):
        ranges = []
        for stack in stacks:
            shape = shapes[stack.name]
            per_index = math.prod(shape[1:-1])
            if stack.pinned:
                experts = shape[0] // ep
                low, high = chunk(experts, ranks // ep, rank // ep)
                low, high = low + rank % ep * experts, high + rank % ep * experts
            else:
                low, high = chunk(shape[0], ranks, rank)
            ranges.append((low * per_index, high * per_index))
        held.append(ranges)
    return held


@pytest.mark.parametrize("ranks", [8, 64])
def test_loads_are_even_on_small(ranks):
    stacks, shapes = stacks_of("configs/small.py")
    plan = make_plan(stacks, fsdp_rows(stacks, shapes, ranks))
    loads = plan.loads()
    assert max(loads) / (sum(loads) / ranks) <= 1.15
    assert sum(loads) == sum(stack.count * stack.cost for stack in stacks)


@pytest.mark.parametrize("ranks, replicas, ep", [(8, 1, 1), (8, 8, 1), (64, 8, 8), (64, 2, 8)], ids=str)
def test_every_exchange_gives_all_owners_work(ranks, replicas, ep):
    """Owners wait for each other in every bucket: the sum of the slowest must stay near the even share."""
    stacks, shapes = stacks_of("configs/moonlight.py", ep=ep)
    one = fsdp_rows(stacks, shapes, ranks // replicas, ep)
    plan = make_plan(stacks, one * replicas)
    work = [[0] * ranks for _ in [*plan.buckets, plan.local]]
    for bucket, items in zip(work, [*plan.buckets, plan.local]):
        for item in items:
            bucket[item.owner] += item.count * stacks[item.stack].cost
    even = sum(stack.count * stack.cost for stack in stacks) / ranks
    assert sum(max(bucket) for bucket in work) <= 1.5 * even
    biggest = max(sum(item.count * stacks[item.stack].size for item in bucket if item.owner == 0)
                  for bucket in plan.buckets)
    assert biggest <= max(BUCKET_ELEMENTS, max(stack.size for stack in stacks))


def test_experts_send_nothing_under_expert_parallelism():
    stacks, shapes = stacks_of("configs/small.py", ep=8)
    for ranks in (8, 64):
        plan = make_plan(stacks, fsdp_rows(stacks, shapes, ranks, ep=8))
        travelling = {stacks[item.stack].name for bucket in plan.buckets for item in bucket}
        assert not any(".experts." in name and "shared" not in name for name in travelling)
        assert all(item.owner in range(ranks) for item in plan.local)


def test_one_rank_has_no_traffic_and_replicas_receive_only():
    stacks, shapes = stacks_of("configs/debug.py")
    alone = make_plan(stacks, fsdp_rows(stacks, shapes, 1))
    assert alone.buckets == [] and alone.traffic(0, 4) == (0, 0)
    assert [(item.stack, item.first) for item in alone.local] == [(i, 0) for i in range(len(stacks))]
    everything = [(0, stack.count * stack.rows) for stack in stacks]
    ddp = make_plan(stacks, [everything] * 4)
    elements = sum(stack.count * stack.size for stack in stacks)
    assert sum(ddp.traffic(rank, 2)[1] for rank in range(4)) == 3 * elements * 2  # each update goes to three others
    assert {ddp.traffic(rank, 2)[0] for rank in range(4)} == {len(ddp.buckets)}  # nothing has to go to the owner


def test_the_exchange_costs_what_the_head_comment_says():
    """FSDP without expert parallelism: every cut matrix goes to its owner and back once, less what the owner has."""
    stacks = [Stack("w", 1, 64, 48), Stack("v", 1, 128, 48)]
    plan = make_plan(stacks, fsdp_rows(stacks, {"w": (64, 48), "v": (128, 48)}, 4))
    total = sum(plan.traffic(rank, 2)[1] for rank in range(4))
    assert total == 2 * (64 + 128) * 48 * 2 * 3 // 4


@st.composite
def layouts(draw):
    """Random stacks, cut into random row ranges, on random numbers of ranks and replicas."""
    replicas, shards = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    stacks, held = [], [[] for _ in range(replicas * shards)]
    for i in range(draw(st.integers(1, 6))):
        count, rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
        stacks.append(Stack(f"p{i}", count, rows, columns, pinned=draw(st.booleans())))
        cuts = sorted(draw(st.lists(st.integers(0, count * rows), min_size=shards - 1, max_size=shards - 1)))
        edges = [0, *cuts, count * rows]
        for rank in range(replicas * shards):
            held[rank].append((edges[rank % shards], edges[rank % shards + 1]))
    return stacks, held, draw(st.integers(1, 100))


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_every_matrix_has_one_owner_and_every_row_arrives(layout):
    stacks, held, bucket_elements = layout
    plan = make_plan(stacks, held, bucket_elements)
    assert plan.digest() == make_plan(stacks, held, bucket_elements).digest()
    items = [*plan.local, *(item for bucket in plan.buckets for item in bucket)]
    owned = Counter((item.stack, item.first + k) for item in items for k in range(item.count))
    assert owned == Counter((i, matrix) for i, stack in enumerate(stacks) for matrix in range(stack.count))
    for item in items:
        rows = stacks[item.stack].rows
        mine = range(item.first * rows, (item.first + item.count) * rows)
        arrived = Counter(row for move in plan.inward(item) for row in range(move.low, move.high))
        assert arrived == Counter(mine)
        for rank, ranges in enumerate(held):
            low, high = ranges[item.stack]
            wanted = Counter(row for row in mine if low <= row < high)
            assert wanted == Counter(
                row for m in plan.outward(item) if m.target == rank for row in range(m.low, m.high)
            )
        for move in plan.inward(item):
            low, high = held[move.source][item.stack]
            assert low <= move.low < move.high <= high  # nobody sends what it does not have
    for item in plan.local:
        assert all(m.source == m.target == item.owner for m in plan.inward(item) + plan.outward(item))
