"""torch.compile of single blocks: no graph break in bf16, the same numbers, recomputation included."""

import pytest
import torch

from model import build
from tests.helpers import tiny_config, tokens


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_have_no_graph_break_and_equal_eager_ones(recompute):
    config, x = tiny_config(hidden_size=64, num_hidden_layers=2), tokens(4, 33)
    results = []
    for compiled in (False, True):
        model = build(config, "cpu").init_weights(0)
        model.compute_dtype = torch.bfloat16
        for layer in model.layers:
            layer.recompute = recompute
            if compiled:
                layer.compile(dynamic=False, fullgraph=True)
        loss, balance = model(x[:, :-1], x[:, 1:])
        (loss / 128 + balance).backward()
        results.append((loss.item(), model.expert_counts.sum(), [p.grad.norm() for p in model.parameters()]))
    (loss, counts, norms), (loss2, counts2, norms2) = results
    assert loss2 == pytest.approx(loss, rel=1e-2) and counts == counts2 == 4 * 32 * 2
    assert torch.allclose(torch.stack(norms), torch.stack(norms2), rtol=0.1, atol=1e-2)
