"""How a model is sharded, where a whole training would not show it."""

from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import settings
from model import build
from ranks import parallel, shard
from tests.helpers import ROOT, make_config


def reduces_in(*words):
    """The type in which each of FSDP2's modules adds up gradients."""
    config, _ = settings.load([str(word) for word in words])
    layout = parallel.make_layout(config, torch.device("cpu"))
    model = build(config, torch.device("cpu"), lambda m: shard.distribute(m, layout, torch.float32))
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert len(sharded) == 6  # three blocks, the experts of two, the model
    return {str(module._get_fsdp_state()._mp_policy.reduce_dtype) for module in sharded}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_added_up_in_the_type_that_is_set(tmp_path, pool, dtype):
    config = make_config(tmp_path / "tiny.py", num_hidden_layers=3)
    assert pool.run(2, reduces_in, config, "--ep=2", f"--reduce_dtype={dtype}") == 2 * [{f"torch.{dtype}"}]


def test_meshes_on_gpus_have_no_connections_of_gloo(monkeypatch):
    """Which, made at once for every group, thousands of ranks would wait for."""
    made = []
    monkeypatch.setattr(parallel, "ranks", lambda: 8)
    monkeypatch.setattr(parallel, "local_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel, "init_device_mesh",
                        lambda device, shape, **options: made.append((shape, options)) or mock.MagicMock())
    config, _ = settings.load([str(ROOT / "configs/small.py"), "--pp=2", "--ep=2"])
    parallel.make_layout(config, torch.device("cuda"))
    assert [shape for shape, _ in made] == [(2, 4), (2, 1, 4), (2, 1, 2, 2)]
    for shape, options in made:
        assert set(options["backend_override"].values()) == {"nccl"}
        assert list(options["backend_override"]) == list(options["mesh_dim_names"]) and len(shape) > 1
