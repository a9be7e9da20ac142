"""The planner: against an H100's measurements, against the program on gloo and on fake ranks, and by hand."""

import dataclasses
import gc
import itertools
import json
import statistics
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import settings
from bench.arms import dense_twin, gpt_twin
from docs import scaling
from errors import UserError
from launch import costs, plan, rehearse
from launch.costs import GIB, Costs, layout_of
from model import build
from muon import local_rows
from owners import Stack, make_plan
from ranks import parallel, shard
from routes import routes_of
from run import memory, peak
from tests.helpers import ROOT

CPU = torch.device("cpu")
MEASURED = json.loads((ROOT / "bench/results/2026-11-27-step-small-bfloat16-cuda-f8767e0.json").read_text())["arms"]


def load(name, *words):
    return settings.load([str(ROOT / "configs" / f"{name}.py"), *words])[0]


# ---------------------------------------------------------------------- an H100


@pytest.mark.parametrize("arm, twin", [("nanok2", lambda config: config), ("dense", dense_twin), ("gpt", gpt_twin)])
def test_small_is_predicted_as_it_was_measured(arm, twin):
    config, measured = twin(load("small")), MEASURED[arm]
    counted, layout = Costs(config), layout_of(config, 1)
    parts = counted.memory(layout, 1, 32, 16)
    parts.pop("validation")  # bench.step makes none
    assert sum(parts.values()) / GIB == pytest.approx(measured["peak_gib"], rel=0.05)
    seconds = measured["seconds"]
    step = seconds["first micro-batch"] + 15 * seconds["another micro-batch"] + seconds["optimizer"]
    predicted = counted.step(layout, 1, 32, 16)
    assert sum(predicted.values()) == pytest.approx(step + seconds["QK-clip and bias"], rel=0.10)
    assert predicted["optimizer"] == pytest.approx(seconds["optimizer"], rel=0.30)


# ---------------------------------------------------------------------- by hand


@pytest.mark.parametrize("P, megabytes", [(2, 3.43), (4, 9.3), (8, 15.8)])
def test_expert_rows_of_k2_are_those_of_the_formula(P, megabytes):
    """4 transfers of D bf16 numbers a MoE layer, (P - 1) (1 - (1 - 1/P)^K) copies of a token; a token's K experts
    differ, which the formula leaves out."""
    config = load("k2", "--activation_checkpointing=none", f"--ep={P}")
    counted = Costs(config)
    (rows,) = [e for e in counted.traffic(parallel.Layout(1, P, P, True), P, 1, 1) if e.kind == "expert rows"]
    about = 2 * 2 * config.num_experts_per_tok * 4  # weights and choices, with their gradient
    sent = rows.sent / 4096 / (4 * 7168 * 2 + about) * 4 * 7168 * 2
    assert sent == pytest.approx(1e6 * megabytes, rel=0.01)
    assert sent == pytest.approx(4 * 60 * 7168 * 2 * (P - 1) * (1 - (1 - 1 / P) ** 8), rel=0.01)


@pytest.mark.parametrize("name, mesh", [("k2", (8, 256, 64)), ("k2", (4, 512, 16)),
                                        ("moonlight", (1, 24, 8)), ("medium", (2, 5, 1))])
def test_the_ranks_hold_every_parameter_once_a_replica(name, mesh):
    counted, layout = Costs(load(name)), parallel.Layout(*mesh, True)
    held = [sum(counted.local(layout, rank).values()) for rank in range(layout.dp_shard)]
    assert sum(held) == counted.parameters and max(held) == held[0]
    assert counted.local(layout, layout.dp_shard + 1 if layout.dp_replicate > 1 else 1) == counted.local(layout, 1)


@pytest.mark.parametrize("name, mesh, words", [
    ("k2", (8, 16, 16), ["--pp=16", "--pp_schedule=interleaved"]), ("debug", (1, 2, 2), ["--pp=2"])])
def test_the_stages_hold_every_parameter_once_a_replica(name, mesh, words):
    counted, layout = Costs(load(name, *words)), parallel.Layout(*mesh, True, pp=16 if name == "k2" else 2)
    places = [counted.stage(place) for place in range(layout.pp)]
    held = [sum(place.local(layout, rank).values()) for place in places for rank in range(layout.dp_shard)]
    assert sum(held) == counted.parameters
    assert sum(sum(place.kinds) for place in places) == sum(counted.kinds)
    for part, flops in counted.flops.items():
        assert sum(place.flops[part] for place in places) == pytest.approx(flops), part


def test_waiting_and_activations_of_a_pipeline_are_those_of_the_formulas():
    """Narayanan et al., arXiv 2104.04473: idle over busy is (pp - 1) / (stages a rank x micro-batches); the first of 4
    stages has 4 micro-batches on their way, with two stages on each rank 5.5 of its blocks' 11 halves. Qi et al., arXiv
    2401.10241: a third of it with ZB-H1, and every stage has as many micro-batches on their way as the first."""
    for schedule, stages in (("zero_bubble", 3), ("1f1b", 1), ("interleaved", 2)):
        counted = Costs(load("medium", "--pp=4", f"--pp_schedule={schedule}")).stage(1)
        seconds = counted.step(parallel.Layout(1, 8, 1, True, pp=4), 8, 4, 16)
        parts = {part: spent for part, spent in seconds.items() if part in counted.flops or part in
                 ("pointwise", "loss", "expert rows", "waiting for Python")}
        assert seconds["idle in the pipeline"] == pytest.approx(sum(parts.values()) * 3 / (stages * 16))
    of = lambda schedule: load("medium", "--pp=4", f"--pp_schedule={schedule}")
    assert [peak.in_flight(of("1f1b"), place, 16) for place in range(4)] == [4, 3, 2, 1]
    assert [peak.in_flight(of("zero_bubble"), place, 16) for place in range(4)] == [4, 4, 4, 4]
    assert peak.in_flight(of("1f1b"), 0, 2) == 2 and peak.in_flight(of("interleaved"), 0, 16) == 5.5
    (sent,) = [e.sent for e in counted.traffic(parallel.Layout(1, 8, 1, True, pp=4), 8, 4, 16) if e.kind == "stages"]
    assert sent == 2 * 7 / 4 * 16 * 4 * 2048 * 1024 * 2  # both ways over 7 borders, in bf16, by 4 ranks


@pytest.mark.parametrize("mesh, words", [
    ((1, 4, 1), []), ((2, 2, 1), []), ((4, 1, 1), []), ((1, 4, 2), []), ((2, 4, 4), []),
    ((2, 16, 8), []), ((1, 4, 1), ["--muon_per_head"])], ids=str)
def test_rows_for_newton_schulz_are_those_of_the_owners_plan(mesh, words):
    counted, layout = Costs(load("debug", *words)), parallel.Layout(*mesh, True)
    n = layout.dp_replicate * layout.dp_shard
    matrices = [(name, shape) for name, shape in counted.shapes.items() if counted.routes[name].rows]
    stacks = [Stack(name, shape.numel() // (rows * shape[-1]), rows, shape[-1], ".experts." in name and layout.ep > 1)
              for name, shape in matrices for rows in [counted.routes[name].rows]]
    made = make_plan(stacks, [counted.held(layout, rank) for rank in range(n)])
    sent = sum(made.traffic(rank, 1)[1] for rank in range(n)) / n
    assert counted.muon_elements(layout, n) == pytest.approx(sent, rel=0.02)


def test_rings_enter_a_node_once_and_rows_travel_each_by_itself():
    counted = Costs(load("debug"), per_node=8)
    links = lambda *what: counted.links([costs.Exchange("it", *what)])
    assert links("all_gather", 8, 1, 70.0) == {("it", "NVLink"): 70.0}
    assert links("all_gather", 16, 1, 150.0) == {("it", "NVLink"): 150.0, ("it", "network"): 160 / 2 / 8}
    assert links("reduce_scatter", 4, 8, 30.0) == {("it", "network"): 30.0}  # one rank of the group on each node
    assert links("all_to_all", 16, 1, 150.0) == {("it", "NVLink"): 70.0, ("it", "network"): 80.0}


# ---------------------------------------------------------------------- the program

LAYOUTS = {
    2: [["--strategy=ddp"], ["--micro_batch_size=2"], ["--ep=2", "--dtype=bfloat16"]],
    4: [["--dtype=bfloat16"], ["--dp_replicate=2", "--micro_batch_size=1"], ["--ep=4"],
        ["--ep=2", "--activation_checkpointing=selective"],
        ["--dp_replicate=2", "--ep=2", "--activation_checkpointing=full"]],
}
SMALL = ["--num_hidden_layers=3", "--global_batch_size=8", "--micro_batch_size=4"]


class Live(TorchDispatchMode):
    """Within it, the most bytes that tensors have had at once, the given ones too: peak."""

    def __init__(self, tensors):
        super().__init__()
        self.storages, self.peak = {}, 0
        self._see(tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._see(tree_leaves(result))
        return result

    def _see(self, tensors):
        seen = len(self.storages)
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages[storage._cdata] = weakref.ref(storage, lambda _, key=storage._cdata:
                                                                self.storages.pop(key, None))
        if len(self.storages) > seen:  # sizes are asked anew: FSDP2 frees and fills the storages of gathered weights
            alive = [ref() for ref in list(self.storages.values())]
            self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))


@pytest.mark.parametrize("words", [[], ["--micro_batch_size=4"], ["--activation_checkpointing=full"]], ids=str)
def test_the_peak_of_tensors_on_a_cpu_is_the_planned_one(monkeypatch, words):
    config = load("debug", *words)
    model = build(config, CPU).init_weights(0)
    tokens = torch.randint(0, config.vocab_size, (config.micro_batch_size, config.sequence_length))
    forwards = config.global_batch_size // config.micro_batch_size
    with Live([*model.parameters(), *model.buffers()]) as live:
        rehearse.one_step(config, model, parallel.Layout(), tokens, forwards)
    monkeypatch.setattr(peak, "PIECES", 1.0)  # of the allocator, and libraries: no tensors
    monkeypatch.setattr(peak, "PYTORCH", 0)
    planned = Costs(config, device="cpu").memory(layout_of(config, 1), 1, config.micro_batch_size, forwards)
    assert sum(planned.values()) == pytest.approx(live.peak, rel=0.05)


def allocated(function):
    """(the most bytes that PyTorch's CPU allocator gave out at once, what the function returned)."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))), result


def counted_by_gloo(layouts):
    """What rehearse.one_step counts on this rank, of every layout, and the most memory that it took."""
    found = []
    for words in layouts:
        config = load("debug", *SMALL, *words)
        layout = parallel.make_layout(config, CPU)
        model = build(config, CPU, lambda m, c=config, to=layout: shard.distribute(m, to, getattr(torch, c.dtype)))
        model.init_weights(0, local_rows)
        size, forwards = parallel.split_batch(config)
        generator = torch.Generator().manual_seed(parallel.rank())
        tokens = torch.randint(0, config.vocab_size, (size, config.sequence_length), generator=generator)
        here = sum(local_rows(t)[0].nbytes for t in [*model.parameters(), *model.buffers()])
        most, counted = allocated(lambda: rehearse.one_step(config, model, layout, tokens, forwards))  # noqa: B023
        found.append(counted | {"peak": here + most, "needed": needed_by(config, model, layout)})
    return found


def needed_by(config, model, layout):
    """What train.py asks before a run."""
    return memory.needed(config, model, routes_of(config, model), layout, CPU, *parallel.split_batch(config))


def needed_by_a_stage(words):
    config = load(*words)
    layout = parallel.make_layout(config, CPU)
    return needed_by(config, build(config, CPU, lambda model: shard.distribute(model, layout, torch.float32)), layout)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble"])
def test_a_run_in_stages_asks_for_the_memory_that_is_planned(pool, schedule):
    words = ["debug", "--pp=2", f"--pp_schedule={schedule}", "--micro_batch_size=2", "--ema=0.9"]
    counted = Costs(load(*words), device="cpu")
    planned = [sum(counted.stage(place).memory(layout_of(counted.config, 2), 1, 2, 8).values()) for place in range(2)]
    assert pool.run(2, needed_by_a_stage, words) == planned and planned[0] != planned[1]


@pytest.mark.parametrize("n", LAYOUTS)
def test_what_is_planned_is_what_gloo_ranks_hold_and_send(pool, n, monkeypatch):
    everyone = pool.run(n, counted_by_gloo, LAYOUTS[n])
    for words, ranks in zip(LAYOUTS[n], zip(*everyone)):
        config = load("debug", *SMALL, *words)
        counted, layout = Costs(config, device="cpu"), layout_of(config, n)
        size = min(config.micro_batch_size, 8 // n)
        for rank, found in enumerate(ranks):
            assert found["parameters"] == found["gradients"] == 4 * sum(counted.local(layout, rank).values()), words
        full = counted.memory(layout, n, size, 8 // n // size)
        with monkeypatch.context() as patch:  # of libraries and the allocator: no tensors
            patch.setattr(peak, "PYTORCH", 0)
            patch.setattr(peak, "PIECES", 1.0)
            parts = counted.memory(layout, n, size, 8 // n // size)
        assert ranks[0]["optimizer"] == parts["optimizer"]
        assert ranks[0]["needed"] == sum(full.values()), words
        most = statistics.median_low(found["peak"] for found in ranks)  # gloo's threads may let go of a block late
        assert sum(parts.values()) == pytest.approx(most, rel=0.05), (words, parts)
        planned = {}
        for e in counted.traffic(layout, n, size, 8 // n // size):
            planned[e.operation, e.ranks] = planned.get((e.operation, e.ranks), 0) + e.sent
        sent = {key: sum(found["sent"][key] for found in ranks) / n for key in ranks[0]["sent"]}
        assert planned.keys() == sent.keys(), words
        assert sum(planned.values()) == pytest.approx(sum(sent.values()), rel=0.01), (words, planned, sent)
        for key in planned.keys() - {("all_to_all", n), ("all_to_all", layout.ep)}:  # what data does not decide
            assert planned[key] == sent[key], (words, key)


@pytest.mark.parametrize("name, n, rank, words", [
    ("k2", 2048, 0, ["--num_hidden_layers=3", "--ep=64", "--dp_replicate=8"]),
    ("k2", 2048, 2047, ["--num_hidden_layers=2", "--ep=16", "--dp_replicate=4"]),
    ("debug", 64, 63, ["--global_batch_size=64", "--ep=8", "--mtp_depth=1", "--tie_word_embeddings"]),
    ("debug", 16, 9, ["--global_batch_size=64", "--ep=4", "--pp=2", "--micro_batch_size=4"]),
    ("debug", 8, 5, ["--global_batch_size=64", "--pp=2", "--pp_schedule=interleaved", "--dp_replicate=2",
                     "--micro_batch_size=8"]),
])
def test_fake_ranks_hold_and_send_what_is_planned(name, n, rank, words):
    """The real model under the real parallel code, as one rank of many."""
    config = load(name, *words)
    ranks, layout = n // config.pp, layout_of(config, n)
    counted = Costs(config).stage(rank // ranks)
    found = rehearse.rehearse(config, n, rank, counted, layout)
    assert found["parameters"] == found["gradients"] == 4 * sum(counted.local(layout, rank).values())
    planned, size = {}, min(config.micro_batch_size, config.global_batch_size // ranks // config.pp)
    for e in counted.traffic(layout, ranks, size, config.pp):
        planned[e.operation, e.ranks] = planned.get((e.operation, e.ranks), 0) + e.sent
    assert planned.keys() == found["sent"].keys()
    for key in planned.keys() - {("all_to_all", ranks)}:  # Newton-Schulz: not every rank sends the mean
        assert planned[key] == pytest.approx(found["sent"][key], rel=1e-3 if key[0] == "all_to_all" else 1e-12), key


# ---------------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_json(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = ["configs/debug.py", "--gpus=16", "--gpu=a100", "--tokens=1e9", "--dp_replicate=2"]
    plan.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any(line.startswith("bottleneck: ") for line in lines)
    plan.main([*words, "--json"])
    said = json.loads(capsys.readouterr().out)
    plan.main([*words, f"--json={tmp_path / 'plan.json'}"])
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == said
    best = said["plans"][0]
    assert best["step_seconds"] == pytest.approx(sum(best["seconds"].values()))
    assert [p["step_seconds"] for p in said["plans"]] == sorted(p["step_seconds"] for p in said["plans"])
    assert all({"--dp_replicate=2", "--dp_shard=8"} < set(p["settings"]) for p in said["plans"])
    assert best["days"] == pytest.approx(1e9 / best["tokens_per_second"] / 86400)
    config = load("debug", *best["settings"])
    assert parallel.check_layout(config, 16) == (2, 8, config.ep)  # train.py would take it


def test_what_does_not_fit_is_refused_with_what_would():
    with pytest.raises(UserError, match=r"on 2 x h100: it does not fit: .* at least. What would: 4 x h100"):
        plan.main([str(ROOT / "configs/moonlight.py"), "--gpus=2"])


@pytest.mark.parametrize("words, message", [
    (["--gpu=tpu"], "--gpu=tpu is not known; there are h100"),
    (["--gpus=many"], "are numbers"),
    (["--gpuss=8"], "^unknown option --gpuss=8; did you mean --gpus?"),
    (["--micro_batch=8"], "^unknown setting 'micro_batch' .* did you mean 'micro_batch_size'"),
    (["--json=nowhere/plan.json"], "no folder nowhere"),
    (["--gpus=12", "--nodes=5"], "must be a multiple of --nodes=5"),
    (["--gpus=32"], "multiple of the 32 GPUs: take --global_batch_size=32"),
    (["--gpus=8", "--dp_replicate=3"], "valid: 1 x 8"),
    (["--gpus=8", "--ep=3"], "ep=3 must divide dp_shard=8"),
    (["--gpus=1", "--micro_batch_size=7"], "micro_batch_size=7 must divide global_batch_size / ranks = 16"),
    (["--gpus=2", "--pp=2", "--micro_batch_size=16"], "set --micro_batch_size=8"),
])
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        plan.main([str(ROOT / "configs/debug.py"), *words])


def test_more_recomputation_needs_less_memory_and_more_time():
    config = load("small", "--micro_batch_size=32")
    made = [plan.Plan(Costs(dataclasses.replace(config, activation_checkpointing=kind)), 8).predict()
            for kind in plan.RECOMPUTE]
    assert sorted(made, key=lambda p: -sum(p.memory.values())) == sorted(made, key=lambda p: p.step) == made


def test_the_heads_of_the_configs_are_the_table():
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.split(scaling.BEGIN)[1].split(scaling.END)[0].splitlines()]
    for name in scaling.ROWS:
        text = (ROOT / f"configs/{name}.py").read_text(encoding="utf-8")
        assert text.partition(scaling.PLANNED)[2].partition('"""')[0] == scaling.head(name, rows) != "", name


@pytest.mark.parametrize("name, n", [("small", 1), ("small", 2048), ("medium", 64), ("moonlight", 512), ("k2", 2048)])
def test_the_page_has_what_is_predicted_today(name, n):
    assert f"| {' | '.join(scaling.row(name, n))} |" in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
