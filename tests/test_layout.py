"""The layout that ranks have unless they are told another."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

import settings
from ranks import parallel
from tests.helpers import ROOT


def layout_on(here, room, **changes):
    """(dp_replicate, dp_shard, ep) of all ranks, if so many are on a node and its memory has so many pages."""
    config = dataclasses.replace(settings.load([str(ROOT / "configs/debug.py")])[0], **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(here))
        patch.setattr(os, "sysconf", lambda name: room if name == "SC_PHYS_PAGES" else 2**12)
        layout = parallel.make_layout(config, torch.device("cpu"))
    return layout.dp_replicate, layout.dp_shard, layout.ep


@pytest.mark.parametrize("here, room, changes, expected", [
    (2, 2**20, {}, (2, 2, 1)), (4, 2**20, {}, (1, 4, 1)), (3, 2**20, {}, (1, 4, 1)), (1, 2**20, {}, (4, 1, 1)),
    (2, 2**14, {}, (1, 4, 1)), (2, 2**20, {"ep": 2}, (2, 2, 2)), (2, 2**20, {"ep": 4}, (1, 4, 4)),
    (2, 2**20, {"dp_replicate": 1}, (1, 4, 1)), (2, 2**20, {"dp_shard": 1}, (4, 1, 1)),
    (1, 2**20, {"pp": 2}, (2, 1, 1)), (2, 2**20, {"strategy": "ddp"}, (4, 1, 1))], ids=str)
def test_unless_told_there_is_a_copy_on_each_node_that_can_hold_one(pool, here, room, changes, expected):
    """configs/debug.py has 3.5M parameters: 28 MB a rank of two, in half of 2 GB, or of 32 MB."""
    assert pool.run(4, layout_on, here, room, **changes) == [expected] * 4


@pytest.mark.parametrize("words, most", [
    (["--pp=16", "--ep=8", "--dp_replicate=1"], 128 + 16 + 128 + 128 + 256),  # pp, dp_shard; pp, efsdp, ep
    (["--ep=8", "--dp_replicate=4"], 2 * 512 + 4 + 32 + 256),
], ids=str)
def test_2048_ranks_make_only_the_groups_that_they_use(monkeypatch, words, most):
    """Each costs a rank a round over the store of all, whether it is in it or not."""
    made, new_group = [], distributed_c10d._new_group_with_tag
    monkeypatch.setattr(distributed_c10d, "_new_group_with_tag", lambda *a, **o: made.append(a) or new_group(*a, **o))
    config = settings.load([str(ROOT / "configs/k2.py"), *words])[0]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2048)
    try:
        parallel.make_layout(config, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert 100 < len(made) <= most
