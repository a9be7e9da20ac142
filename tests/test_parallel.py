"""Training on 2 to 4 gloo ranks against one process: the same losses and the same weights on every layout."""

import json
import math
import os
import shutil
import signal
import socket

import pytest
import torch

import export
import settings
from errors import UserError
from model import build
from muon import Muon
from ranks import parallel, shard
from run import checkpoint
from run.ema import Average
from tests.helpers import DEBUG_SIZE, final_tensors, losses, make_config, records, run_stopped
from tests.helpers import run_train as run
from tests.test_loader import END, write

STEPS = int(os.environ.get("STEPS", 6))
LAYOUTS = {  # name: (ranks, settings)
    "accumulation 4": (1, ["--micro_batch_size=6"]),
    "one rank under torchrun": (1, ["group"]),
    "ddp 2": (2, ["--strategy=ddp"]),
    "ddp 2, accumulation 4": (2, ["--strategy=ddp", "--micro_batch_size=3"]),
    "fsdp 2": (2, []),
    "fsdp 4": (4, []),
    "fsdp 4, accumulation 2": (4, ["--micro_batch_size=3"]),
    "fsdp 3": (3, []),
    "hsdp 2 x 2": (4, ["--dp_replicate=2"]),
    "hsdp 2 x 2, accumulation 2": (4, ["--dp_replicate=2", "--micro_batch_size=3"]),
    "ep 2": (2, ["--ep=2"]),
    "fsdp 4, ep 2": (4, ["--ep=2"]),
    "fsdp 4, ep 4": (4, ["--ep=4"]),
    "hsdp 2 x 2, ep 2": (4, ["--dp_replicate=2", "--ep=2"]),
    "fsdp 4, ep 2, selective recompute": (4, ["--ep=2", "--activation_checkpointing=selective"]),
    "fsdp 4, ep 2, full recompute": (4, ["--ep=2", "--activation_checkpointing=full"]),
}


def run_in_group(*words):
    """One rank, but with a process group and FSDP2, as torchrun --nproc_per_node=1 makes it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, str(value))
        record = run(*words)
        assert torch.distributed.is_initialized()
        torch.distributed.destroy_process_group()
    return record


@pytest.fixture(scope="module")
def base(tmp_path_factory, data, pool):
    """A config of half the debug model's width with a layer less, and the run of one process that the others are
    compared with."""
    folder = tmp_path_factory.mktemp("layouts")
    config = make_config(
        folder / "debug.py",
        **DEBUG_SIZE
        | dict(data=str(data), global_batch_size=24, micro_batch_size=24, max_steps=STEPS, save_interval=STEPS // 2)
        | dict(hidden_size=64, kv_lora_rank=32, moe_intermediate_size=32, intermediate_size=128, num_hidden_layers=3),
        eval_interval=STEPS // 2,
        eval_batches=2,
        warmup_steps=2 * STEPS,
        qk_clip_tau=0.03,  # low enough that heads are clipped all the time
        balance="quantile",
        router_z_loss=1e-3,
        seed=6,  # one whose tokens never find two experts equal: there the last bits decide, which layouts may round
        lr_multipliers={"experts": 0.5, "embeddings": 2.0},
        ema=0.8,
    )
    pool.run(1, run, config, f"--out_dir={folder / 'one'}")
    return folder, config


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_changes_nothing(base, pool, name):
    folder, config = base
    out = folder / name.replace(" ", "_").replace(",", "")
    n, words = LAYOUTS[name]
    start, words = (run_in_group, []) if words == ["group"] else (run, words)
    returned = pool.run(n, start, config, f"--out_dir={out}", *words)
    assert len({json.dumps(record["loss"]) for record in returned}) == 1  # every rank has the global numbers
    one = folder / "one"
    assert [step for step, _ in losses(out)] == list(range(1, STEPS + 1))
    for mine, reference in zip(records(out), records(one)):
        assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-5)
        assert mine["aux_loss"] == pytest.approx(reference["aux_loss"], abs=1e-4)
        assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
        assert mine["max_attention_logit"] == pytest.approx(reference["max_attention_logit"], rel=1e-4)
        assert mine["router_z_loss"] == pytest.approx(reference["router_z_loss"], rel=1e-4)
        assert mine["router_bias_std"] == pytest.approx(reference["router_bias_std"], abs=1e-5)
        for exact in ("qk_clipped_heads", "expert_load_max", "expert_load_min", "dead_experts"):
            assert mine[exact] == reference[exact], exact
    for key in ("loss", "ema_loss"):
        values, expected = ([record[key] for record in records(folder, "val")] for folder in (out, one))
        assert values == pytest.approx(expected, abs=1e-5)
    mine, reference = final_tensors(out), final_tensors(one)
    assert mine.keys() == reference.keys()
    for tensor_name, tensor in mine.items():
        torch.testing.assert_close(tensor, reference[tensor_name], rtol=0, atol=1e-5, msg=tensor_name)
    assert sum(record["qk_clipped_heads"] for record in records(one)) > 20
    assert len([event for event in records(out, "event") if event["event"] == "save"]) == 2


def test_samples_are_the_same_text(base, pool, tmp_path):
    options = ["--max_steps=1", "--sample_interval=1", "--sample_prompts=['abc']", "--eval_interval=0"]
    options += ["--num_hidden_layers=2"]
    pool.run(1, run, base[1], f"--out_dir={tmp_path / 'one'}", *options)
    pool.run(2, run, base[1], f"--out_dir={tmp_path / 'many'}", *options, "--ep=2")
    assert (tmp_path / "many/samples.md").read_text() == (tmp_path / "one/samples.md").read_text()


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def exported(base):
    """What the run of one process is for others."""
    export.export(base[0] / "one", base[0] / "hf")
    return base[0] / "hf"


@pytest.fixture(scope="module")
def halfway(base, pool):
    """The first half of a run on fsdp 4 with ep 2, as a run folder to continue."""
    folder, config = base
    source = folder / "halfway"
    pool.run(4, run, config, f"--out_dir={source}", "--ep=2", f"--max_steps={STEPS // 2}",
             f"--decay_steps={STEPS // 5}", "--no-compile")
    return source


@pytest.mark.parametrize(
    "n, words", [(1, []), (2, ["--strategy=ddp"]), (2, ["--ep=2"]), (3, []), (4, ["--ep=2"])], ids=str
)
def test_a_sharded_checkpoint_resumes_on_any_layout(base, halfway, exported, pool, tmp_path, n, words):
    """Scorecard 7."""
    folder, config = base
    out = tmp_path / "run"
    shutil.copytree(halfway, out)
    pool.run(n, run, config, f"--out_dir={out}", "--resume", *words)
    expected = losses(folder / "one")
    assert len(losses(out)) == STEPS
    for (step, loss), (_, reference) in zip(losses(out), expected):
        assert loss == pytest.approx(reference, abs=1e-5), step
    mine, reference = final_tensors(out), final_tensors(folder / "one")
    assert all(torch.allclose(mine[name], reference[name], rtol=0, atol=1e-5) for name in reference)
    export.export(out, tmp_path / "hf")
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == sorted(p.name for p in exported.iterdir())
    for file in (tmp_path / "hf").glob("*.json"):
        assert file.read_text() == (exported / file.name).read_text(), file.name


def load_and_save(words, source, target):
    """Load a step on this layout and save it again: DCP must put every row back where it was."""
    config, _ = settings.load(words)
    layout = parallel.make_layout(config, torch.device("cpu"))
    model = build(config, torch.device("cpu"), lambda m: shard.distribute(m, layout, torch.float32))
    optimizer = Muon(model.named_parameters())
    tensors = checkpoint.named_tensors(model, optimizer) | Average(model, config.ema).tensors
    checkpoint.load(source, tensors)
    checkpoint.save(target, 10, tensors, {}, keep=1)


@pytest.mark.parametrize("n, words", [(1, []), (2, ["--strategy=ddp"]), (3, []), (4, ["--dp_replicate=2", "--ep=2"])])
def test_loading_and_saving_on_another_layout_is_bitwise(base, halfway, pool, tmp_path, n, words):
    source = checkpoint.find(halfway)
    pool.run(n, load_and_save, [base[1], *words], source, tmp_path / "checkpoints")
    before, after = final_tensors(source), final_tensors(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_saving_beside_the_training_gives_the_same_run(base, pool, tmp_path):
    folder, config = base
    pool.run(2, run, config, f"--out_dir={tmp_path / 'run'}", "--async_save", "--save_interval=2")
    assert [e["step"] for e in records(tmp_path / "run", "event") if e["event"] == "save"][-1] == STEPS
    assert sorted(e["path"][-2:] for e in records(tmp_path / "run", "event")) == ["02", "04", "06"]
    for (_, mine), (_, reference) in zip(losses(tmp_path / "run"), losses(folder / "one")):
        assert mine == pytest.approx(reference, abs=1e-5)
    assert final_tensors(tmp_path / "run").keys() == final_tensors(folder / "one").keys()
    assert not list((tmp_path / "run/checkpoints").glob(".tmp*"))


def full_disk_on_rank_1(*words):
    original = checkpoint._write_synced
    write = checkpoint.dcp.FileSystemWriter.write_data

    def fail(self, *args, **options):
        if parallel.rank() == 1 and not fail.done:
            fail.done = True
            raise OSError(28, "No space left on device")
        return write(self, *args, **options)

    fail.done = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.dcp.FileSystemWriter, "write_data", fail)
        run(*words)
    assert checkpoint._write_synced is original


@pytest.mark.parametrize("words", [[], ["--async_save"]], ids=["at once", "beside"])
def test_a_full_disk_on_one_rank_costs_one_checkpoint(base, pool, tmp_path, words):
    """Scorecard 4."""
    out = tmp_path / "run"
    pool.run(2, full_disk_on_rank_1, base[1], f"--out_dir={out}", "--max_steps=6", "--save_interval=3", *words)
    events = [(e["event"], e["step"]) for e in records(out, "event")]
    assert [name for name, _ in events] == ["save_failed", "save"]
    assert "No space left" in records(out, "event")[0]["error"]
    assert checkpoint.find(out).name == "step_00000006"
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["best", "latest", "step_00000006"]


# ---------------------------------------------------------------------- agreement


def nan_on_rank_1(*words):
    with pytest.MonkeyPatch.context() as patch:
        norm = parallel.squared_norm
        turn = iter(range(100))
        patch.setattr(
            parallel, "squared_norm", lambda *a: norm(*a) * (math.nan if next(turn) == 2 and parallel.rank() else 1)
        )
        run(*words)


def test_a_nan_on_one_rank_skips_the_step_on_all(base, pool, tmp_path):
    """Scorecard 8."""
    out = tmp_path / "run"
    pool.run(2, nan_on_rank_1, base[1], f"--out_dir={out}", "--max_steps=6", "--strategy=ddp", "--save_interval=0")
    assert [(e["event"], e["step"]) for e in records(out, "event")] == [("skip", 3), ("save", 6)]
    assert all(math.isfinite(loss) for _, loss in losses(out))
    assert checkpoint.read_manifest(checkpoint.find(out))["optimizer_steps"] == 5


def signal_on_rank_1(*words):
    original = Muon.begin_step

    def step(self, *args):
        if parallel.rank() == 1 and self.steps == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Muon, "begin_step", step)
        run_stopped(*words)


def test_a_signal_to_one_rank_saves_and_stops_all(base, pool, tmp_path):
    """Scorecard 6."""
    out = tmp_path / "run"
    pool.run(2, signal_on_rank_1, base[1], f"--out_dir={out}", "--save_interval=0", "--eval_interval=0")
    assert losses(out)[-1][0] == 4 and checkpoint.find(out).name == "step_00000004"
    pool.run(2, run, base[1], f"--out_dir={out}", "--resume=auto", "--max_steps=6")
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4, 5, 6]


def expect_refusal(words, message):
    with pytest.raises(UserError, match=message):
        run(*words)


@pytest.mark.parametrize(
    "n, words, message",
    [
        (4, ["--dp_replicate=3"], "valid: 1 x 4, 2 x 2, 4 x 1"),
        (2, ["--dp_shard=3"], "does not make 2 ranks"),
        (4, ["--ep=3"], "valid: 1, 2, 4"),
        (2, ["--ep=2", "--n_routed_experts=0"], "valid: 1"),
        (2, ["--strategy=ddp", "--ep=2"], "use strategy='fsdp'"),
        (1, ["--ep=2"], "must divide dp_shard=1"),
        (3, ["--global_batch_size=25"], "multiple of the 3 ranks"),
        (2, ["--micro_batch_size=5"], "must divide global_batch_size / ranks = 12"),
        (2, ["--nonsense=1"], "unknown setting"),
        (2, ["--resume"], "no complete checkpoint"),
    ],
)
def test_a_wrong_combination_is_refused_on_every_rank(base, pool, tmp_path, n, words, message):
    """Scorecard 15."""
    pool.run(n, expect_refusal, [base[1], f"--out_dir={tmp_path / 'run'}", *words], message)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_refused_on_every_rank(base, pool):
    pool.run(2, expect_refusal, [base[1], f"--out_dir={base[0] / 'one'}"], "holds a run already")


def test_a_share_smaller_than_the_micro_batch_is_taken_whole(base, pool, monkeypatch):
    config, _ = settings.load([base[1], "--micro_batch_size=24"])
    monkeypatch.setattr(parallel, "ranks", lambda: 4)
    assert parallel.split_batch(config) == (6, 1)
    config.micro_batch_size = 2
    assert parallel.split_batch(config) == (2, 3)


# ---------------------------------------------------------------------- model variants


@pytest.mark.parametrize(
    "n, words",
    [
        (2, ["--tie_word_embeddings"]),
        (2, ["--n_routed_experts=0", "--lr_multipliers={'embeddings': 2.0}"]),
        (2, ["--attention=mha", "--muon_per_head"]),
        (4, ["--q_lora_rank=24", "--muon_per_head", "--ep=2", "--n_group=4", "--topk_group=2"]),
        (3, ["--optimizer=adamw", "--n_routed_experts=10", "--n_shared_experts=0"]),
        (2, ["--mtp_depth=1", "--strategy=ddp", "--micro_batch_size=6", "--tie_word_embeddings"]),
        (4, ["--mtp_depth=1", "--ep=2", "--dp_replicate=2", "--micro_batch_size=3", "--activation_checkpointing=full",
             "--eval_interval=2", "--document_mask", "--packing=best_fit", "--tokenizer=bytes", "--data=DOCUMENTS"]),
    ],
    ids=["tied", "dense", "mha per head", "query compression", "adamw uneven", "two ahead, ddp",
         "two ahead, packed"],
)
def test_model_variants(base, pool, tmp_path, n, words):
    documents = write(tmp_path / "documents", [[END, *range(n % 40 + 1)] for n in range(0, 4000, 7)])
    words = [word.replace("DOCUMENTS", documents) for word in words]
    options = ["--max_steps=3", "--save_interval=0", "--eval_interval=0", "--balance=sign", *words]
    pool.run(n, run, base[1], f"--out_dir={tmp_path / 'many'}", *options)
    alone = [word for word in options if not word.startswith(("--ep", "--dp_", "--micro"))]
    pool.run(1, run, base[1], f"--out_dir={tmp_path / 'one'}", *alone)
    for kind, key in (("train", "loss"), ("train", "mtp_loss"), ("val", "loss")):
        many, one = ([r.get(key) for r in records(tmp_path / name, kind)] for name in ("many", "one"))
        assert many == one if None in one else many == pytest.approx(one, abs=1e-5)
        assert bool(one) or kind == "val"
    mine, reference = final_tensors(tmp_path / "many"), final_tensors(tmp_path / "one")
    for name in reference:
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(mine[name], reference[name])


@pytest.mark.parametrize("words", [["--dtype=bfloat16", "--reduce_dtype=bfloat16"],
                                   ["--dtype=float16", "--ep=2"]], ids=" ".join)
def test_low_precision_learns_over_ranks(base, pool, tmp_path, words):
    options = ["--max_steps=6", "--decay_steps=1", "--warmup_steps=2", "--num_hidden_layers=2", *words]
    options += ["--save_interval=0", "--eval_interval=0"]
    pool.run(2, run, base[1], f"--out_dir={tmp_path / 'many'}", *options)
    pool.run(1, run, base[1], f"--out_dir={tmp_path / 'one'}", *[w for w in options if not w.startswith("--ep")])
    many, one = losses(tmp_path / "many"), losses(tmp_path / "one")
    assert many[-1][1] < many[0][1] - 0.3
    assert [loss for _, loss in many] == pytest.approx([loss for _, loss in one], abs=0.03)


def compiled(*words):
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    compile, backend = torch.compile, "aot_eager_decomp_partition"
    with pytest.MonkeyPatch.context() as patch:  # the same graphs; their C++ is test_compile.py's
        patch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
        run(*words)
    reset()
    return dict(counters["graph_break"]), counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_blocks_compile_inside_of_what_shards_them(base, pool, tmp_path):
    options = ["--max_steps=4", "--save_interval=0", "--eval_interval=0", "--dtype=bfloat16", "--compile"]
    options += ["--num_hidden_layers=4"]
    breaks, graphs = pool.run(2, compiled, base[1], f"--out_dir={tmp_path / 'fsdp'}", *options)[0]
    assert not breaks and graphs == 3  # the dense block, all others, the last norm: nothing is compiled again
    breaks, graphs = pool.run(2, compiled, base[1], f"--out_dir={tmp_path / 'ep'}", *options, "--ep=2")[0]
    assert sum(breaks.values()) == 3 and graphs <= 8  # one break in each MoE block, around what travels
    for one, other in zip(losses(tmp_path / "fsdp"), losses(tmp_path / "ep")):
        assert one[1] == pytest.approx(other[1], abs=0.02)
