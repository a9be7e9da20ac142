"""Muon over ranks: the owners' exchange against gathering everything (bitwise) and against one process, what travels
against what the plan says, and QK-clip and initial weights on shards."""

import hashlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from config import Config
from model import build
from muon import Muon, local_rows, qk_clip_
from owners import make_plan
from ranks import parallel, shard
from routes import Route, route_parameters
from tests.helpers import TINY

# name, shape, rows of one logical matrix: whole, in row blocks, stacks of experts, and fewer rows than ranks
SHAPES = [
    ("wide", (6, 20), 6),
    ("tall", (33, 8), 33),
    ("heads", (12, 10), 4),
    ("experts", (5, 6, 8), 3),
    ("short", (2, 16), 2),
    ("one_row", (1, 9), 1),
    ("square", (16, 16), 16),
]
ROUTES = {name: Route("muon", rows) for name, _, rows in SHAPES} | {"bias": Route("adamw")} \
    | {"heads": Route("muon", 4, 0.5)}  # a rate of its own


def full_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        *(torch.randn(shape, generator=generator) for _, shape, _ in SHAPES),
        torch.randn(7, generator=generator),
    ]


def muon_steps(mesh_shape, steps=3, device="cpu", **options):
    """Parameters after some steps from fixed weights and gradients, whole, with the optimizer's own numbers."""
    names = [name for name, _, _ in SHAPES] + ["bias"]
    weights = full_tensors(0)
    share = lambda tensor: tensor.clone()
    if mesh_shape:
        dims = ("dp_replicate", "dp_shard")[-len(mesh_shape) :]
        mesh = init_device_mesh(device, mesh_shape, mesh_dim_names=dims)
        placements = ([Replicate()] if len(mesh_shape) == 2 else []) + [Shard(0)]
        share = lambda tensor: distribute_tensor(tensor.clone(), mesh, placements)
    named = [(name, torch.nn.Parameter(share(weight))) for name, weight in zip(names, weights)]
    optimizer = Muon(named, lr=0.1, routes=ROUTES, **options)
    for step in range(steps):
        for (name, parameter), grad in zip(named, full_tensors(step + 1)):
            if name in ("heads", "square"):  # rounding noise: the second head, which two ranks share, and all of it
                grad[slice(4, 8) if name == "heads" else slice(None)] *= 1e-8
            parameter.grad = share(grad)
        named[1][1].grad = None if step == 1 else named[1][1].grad  # a parameter that nothing reached
        optimizer.step()
    whole = [p.full_tensor() if mesh_shape else p for _, p in named]
    momenta = [m.full_tensor() if mesh_shape else m for m in optimizer.named_state().values()]
    expected = {key: steps * value for key, value in optimizer.expected_traffic().items()}
    return [t.detach().clone() for t in whole + momenta], optimizer.traffic, expected, optimizer.plan.loads()


def one_step(rows):
    """The weight after a step of Muon on all ranks, of whose rows the last ones may have none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight, gradient = torch.randn(2, rows, 6, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    Muon([("matrix", p)], lr=0.1, routes={"matrix": Route("muon", rows)}).step()
    return p.detach().full_tensor(), len(local_rows(p)[0])


def test_a_rank_without_rows_of_any_matrix(pool):
    """As with 320 shards of configs/k2.py: FSDP2 leaves the last ranks none."""
    (one, _), *_ = pool.run(2, one_step, 4)
    answers = pool.run(3, one_step, 4)
    assert [rows for _, rows in answers] == [2, 2, 0]
    assert all(torch.allclose(whole, one, rtol=0, atol=1e-6) for whole, _ in answers)


@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mesh", [(2,), (3,), (4,), (4, 1), (2, 2)], ids=str)
def test_owners_equal_the_all_gather_twin_bitwise(pool, mesh, ns_dtype):
    for bucket_elements in (1, 200, 10**6):  # every matrix alone, some together, all at once
        options = dict(ns_dtype=ns_dtype, bucket_elements=bucket_elements)
        loads = compare_with_twin_and_one_process(pool, mesh, 1e-6 if ns_dtype == torch.float32 else 0, **options)
    assert sum(loads) == sum(torch.Size(shape).numel() // (rows * shape[-1]) * cost(rows, shape[-1])
                             for _, shape, rows in SHAPES)


def compare_with_twin_and_one_process(pool, mesh, atol, **options):
    """muon_steps on a mesh, bitwise as the all-gather twin and on all ranks; returns the plan's loads."""
    n = torch.Size(mesh).numel()
    answers = pool.run(n, muon_steps, mesh, **options)
    twin = pool.run(n, muon_steps, mesh, exchange="all_gather", **options)
    for (tensors, traffic, expected, _), (other, silent, _, _) in zip(answers, twin):
        assert all(torch.equal(a, b) for a, b in zip(tensors, other))
        assert all(torch.equal(a, b) for a, b in zip(tensors, answers[0][0]))  # replicas too
        assert traffic == expected and traffic["collectives"] > 0
        assert silent == {"collectives": 0, "bytes": 0}
    single, none, _, _ = muon_steps(None, **options)
    assert none == {"collectives": 0, "bytes": 0}
    for a, b in zip(answers[0][0], single, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    return answers[0][3]


def cost(rows, columns):
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


def count_bytes(mesh_shape):
    """What really goes through all_to_all_single, counted from outside."""
    sent, original = [0, 0], dist.all_to_all_single

    def counting(output, input, output_splits, input_splits, **options):
        sent[0] += 1
        sent[1] += input.numel() * input.element_size()
        assert input_splits[dist.get_rank()] == 0  # nothing is sent to oneself
        return original(output, input, output_splits, input_splits, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        _, traffic, expected, _ = muon_steps(mesh_shape, ns_dtype=torch.bfloat16)
    return sent, traffic, expected


def test_the_plan_predicts_what_is_sent(pool):
    for sent, traffic, expected in pool.run(3, count_bytes, (3,)):
        assert traffic == expected == {"collectives": sent[0], "bytes": sent[1]}
        assert sent[1] > 0


def expert_traffic(words):
    """Names of the parameters that travel in a K2 under expert parallelism."""
    config = Config(**TINY, dtype="float32", ep=2, global_batch_size=4, **words)
    layout = parallel.make_layout(config, torch.device("cpu"))
    model = build(config, "cpu", lambda m: shard.distribute(m, layout, torch.float32))
    model.init_weights(0, local_rows)
    optimizer = Muon(model.named_parameters())
    plan = optimizer.plan
    travelling = {plan.stacks[item.stack].name for bucket in plan.buckets for item in bucket}
    assert plan.digest() == make_plan(plan.stacks, all_held(optimizer)).digest()
    return travelling


def all_held(optimizer):
    return parallel.from_all([
        (first, first + local_rows(p)[0].numel() // p.shape[-1])
        for first, p in zip(optimizer.first_rows, optimizer.param_groups[0]["params"])
    ])


def test_no_bytes_for_experts_under_expert_parallelism(pool):
    for travelling in pool.run(4, expert_traffic, {}):
        assert travelling and not [name for name in travelling if ".experts." in name and "shared" not in name]


# ---------------------------------------------------------------------- weights and QK-clip on shards


def initial(words):
    config = Config(**TINY, dtype="float32", global_batch_size=12, **words)
    layout = parallel.make_layout(config, torch.device("cpu"))
    model = build(config, "cpu", lambda m: shard.distribute(m, layout, torch.float32))
    model.init_weights(7, local_rows)
    gamma = torch.linspace(0.5, 3.0, 12).view(3, 4)
    clipped = qk_clip_(model.layers, gamma, 1.0)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    digest = hashlib.sha256(b"".join(whole[name].detach().contiguous().numpy().tobytes() for name in sorted(whole)))
    return digest.hexdigest(), int(clipped)


def test_initial_weights_and_qk_clip_are_bitwise_the_same_on_every_layout(pool):
    one = pool.run(1, initial, {})
    for n, words in ((2, {}), (3, {}), (4, {"ep": 2}), (4, {"ep": 4}), (4, {"dp_replicate": 2, "ep": 2}),
                     (2, {"strategy": "ddp"})):
        assert set(pool.run(n, initial, words)) == set(one), (n, words)
    assert one[0][1] == 9


def test_a_slice_of_the_initial_weights_may_start_inside_a_block():
    rows, width = 70_000, TINY["hidden_size"]  # more than 2**20 elements: several blocks
    model = build(Config(**TINY | dict(vocab_size=rows)), "cpu").init_weights(3)
    whole = model.model.embed_tokens.weight.detach().clone()
    assert whole.numel() > 2 * 2**20
    first, last = 40_000, 66_000
    part = torch.empty(last - first, width)
    window = lambda p: (part, first) if p is model.model.embed_tokens.weight else (torch.empty_like(p), 0)
    model.init_weights(3, window)
    assert torch.equal(part, whole[first:last])


def test_plan_hash_differs_are_refused(pool):
    pool.run(2, disagree)


def disagree():
    shape = (8, 8) if dist.get_rank() else (8, 16)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    weight = torch.nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Shard(0)], src_data_rank=None))
    with pytest.raises(RuntimeError, match="the ranks disagree"):
        Muon([("w", weight)], routes={"w": Route("muon", 8)})


def test_routes_do_not_depend_on_sharding(pool):
    assert pool.run(2, routes_of, {})[0] == pool.run(1, routes_of, {})[0]


def routes_of(words):
    config = Config(**TINY, dtype="float32", global_batch_size=4, **words)
    layout = parallel.make_layout(config, torch.device("cpu"))
    model = build(config, "cpu", lambda m: shard.distribute(m, layout, torch.float32))
    return {name: (route.optimizer, route.rows) for name, route in route_parameters(model.named_parameters()).items()}
