"""torch.compile of single blocks: no graph break, the same numbers, recomputation and Triton's kernels included."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import settings
from kernels import backend
from mla import rope_tables
from model import ModelConfig, build
from ranks import shard
from tests.helpers import ROOT, tiny_config, tokens


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_have_no_graph_break_and_equal_eager_ones(recompute):
    """Inductor for both blocks or, where they recompute, for the one with experts: of the dense one, which has nothing
    that the other has not, only the graphs are made then, and what is saved in them chosen."""
    config = tiny_config(hidden_size=64, num_hidden_layers=2, balance="quantile", router_z_loss=1e-2)
    x = tokens(4, 33)
    results = []
    for compiled in (False, True):
        model = build(config, "cpu").init_weights(0)
        model.compute_dtype = torch.bfloat16
        for dense, layer in zip((True, False), model.layers):
            layer.recompute = recompute
            if compiled:
                graphs_only = dense and recompute != "none"
                layer.compile(backend="aot_eager_decomp_partition" if graphs_only else "inductor", dynamic=False,
                              fullgraph=True)
        loss, balance = model(x[:, :-1], x[:, 1:])
        (loss / 128 + balance).backward()
        results.append((loss.item(), model.routing, [p.grad.norm() for p in model.parameters()]))
    (loss, routing, norms), (loss2, routing2, norms2) = results
    assert loss2 == pytest.approx(loss, rel=1e-2)
    assert routing.expert_counts.sum() == routing2.expert_counts.sum() == 4 * 32 * 2
    assert (routing.histograms.sum(-1) == 4 * 32).all() and (routing2.histograms.sum(-1) == 4 * 32).all()
    assert routing2.z.item() == pytest.approx(routing.z.item(), rel=1e-2)
    assert torch.allclose(torch.stack(norms), torch.stack(norms2), rtol=0.1, atol=1e-2)


def test_as_many_kinds_of_blocks_and_batches_are_compiled_as_come():
    """Beyond the limit a block would run uncompiled, with no more than a warning; one that was set higher stays."""
    for before, after in ((8, 64), (256, 256)):
        with torch._dynamo.config.patch(recompile_limit=before):
            shard.compile_blocks(build(tiny_config(num_hidden_layers=2), "cpu"))
            assert torch._dynamo.config.recompile_limit == after


@pytest.mark.skipif(not backend.INTERPRETED, reason="the GPU run compiles them in test_gpu.py")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_with_triton_kernels_compile_once_and_equal_eager_ones(recompute):
    config = tiny_config(num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=4, balance="quantile",
                         router_z_loss=1e-2)
    results, counter = [], CompileCounterWithBackend("aot_eager")
    with backend.running(True):
        for compiled in (False, True):
            model = build(config, "cpu").init_weights(0)
            for layer in model.layers:
                layer.recompute = recompute
                if compiled:
                    layer.forward = torch.compile(layer.forward, backend=counter, dynamic=False, fullgraph=True)
            for seed in range(2):  # other tokens, other counts: nothing may be compiled again
                x = tokens(2, 17, seed=seed)
                model.zero_grad()
                loss, balance = model(x[:, :-1], x[:, 1:])
                (loss / 32 + balance).backward()
            results.append((loss.item(), [p.grad.norm() for p in model.parameters()], model.routing.histograms))
    assert counter.frame_count == 1
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert (results[0][2] - results[1][2]).abs().sum() <= 4  # one at the edge of a bin may round
    assert torch.allclose(torch.stack(results[0][1]), torch.stack(results[1][1]), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not backend.INTERPRETED, reason="shows on a CPU what a GPU would compile")
def test_a_block_of_small_is_one_graph():
    small, _ = settings.load([str(ROOT / "configs/small.py")])
    fields = {name: getattr(small, name) for name in ModelConfig.__dataclass_fields__}
    config = ModelConfig(**fields | dict(num_hidden_layers=2, vocab_size=128))
    model = build(config, "cpu").init_weights(0)
    hidden = torch.randn(1, 16, config.hidden_size, requires_grad=True)
    rope = rope_tables(config, 0, 16, model.device)
    with backend.running(True):
        for layer in model.layers:
            explained = torch._dynamo.explain(layer)(hidden, rope)
            assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons
        called = {str(node.target) for graph in explained.graphs for node in graph.graph.nodes}
    assert {f"nanok2.{op}.default" for op in ("route", "sort_by_expert", "experts", "causal_attention")} <= {
        name.removesuffix("_default") for name in called} | called
