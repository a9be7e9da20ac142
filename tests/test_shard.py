"""How a model is sharded, where a whole training would not show it."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import settings
from model import build
from ranks import parallel, shard
from tests.helpers import make_config


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
