"""Pipeline parallelism on 2 to 4 gloo ranks against one process: the same losses and weights, whatever the stages."""


import itertools
import os
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import export
from config import Config
from counting import flops_by_layer, flops_per_token
from errors import UserError
from model import build
from ranks.pipeline import Pipeline, Share, spans
from routes import routes_of
from run import report
from tests.helpers import DEBUG_SIZE, final_tensors, losses, make_config, records
from tests.helpers import run_train as run
from tests.test_loader import END, write

STEPS = int(os.environ.get("STEPS", 10))
LAYOUTS = {  # name: (ranks, settings)
    "pp 2": (2, ["--pp=2"]),
    "pp 4": (4, ["--pp=4"]),
    "pp 2, ep 2": (4, ["--pp=2", "--ep=2", "--activation_checkpointing=selective"]),
    "pp 2, fsdp 2": (4, ["--pp=2"]),
    "pp 2, ddp 2": (4, ["--pp=2", "--strategy=ddp"]),
    "pp 2, interleaved": (2, ["--pp=2", "--pp_schedule=interleaved"]),
    "pp 4, zero bubble": (4, ["--pp=4", "--pp_schedule=zero_bubble"]),
    "pp 2, ep 2, zero bubble": (4, ["--pp=2", "--pp_schedule=zero_bubble", "--ep=2",
                                    "--activation_checkpointing=selective"]),
    "pp 2, fsdp 2, interleaved": (4, ["--pp=2", "--pp_schedule=interleaved"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, data, pool):
    """A config of four layers, and the run of one process that the others are compared with."""
    folder = tmp_path_factory.mktemp("stages")
    config = make_config(
        folder / "debug.py",
        **DEBUG_SIZE
        | dict(data=str(data), global_batch_size=16, micro_batch_size=4, max_steps=STEPS, save_interval=STEPS // 2)
        | dict(hidden_size=64, kv_lora_rank=32, moe_intermediate_size=32, intermediate_size=128),
        eval_interval=STEPS // 2,
        warmup_steps=2 * STEPS,
        qk_clip_tau=0.03,  # low enough that heads are clipped all the time
        balance="quantile",
        router_z_loss=1e-3,
        ema=0.8,
    )
    pool.run(1, run, config, f"--out_dir={folder / 'one'}")
    return folder, config


def assert_same_run(mine, reference):
    """Every record, the validations and the final weights agree."""
    assert [step for step, _ in losses(mine)] == list(range(1, STEPS + 1))
    for one, other in zip(records(mine), records(reference)):
        for name, accuracy in (("loss", {"abs": 1e-5}), ("aux_loss", {"abs": 1e-4}), ("grad_norm", {"rel": 1e-4}),
                               ("max_attention_logit", {"rel": 1e-4}), ("router_z_loss", {"rel": 1e-4}),
                               ("router_bias_std", {"abs": 1e-5})):
            assert one[name] == pytest.approx(other[name], **accuracy), (name, one["step"])
        for exact in ("qk_clipped_heads", "expert_load_max", "expert_load_min", "dead_experts", "tokens"):
            assert one[exact] == other[exact], exact
    for key in ("loss", "ema_loss", "bits_per_byte"):
        values, expected = ([record[key] for record in records(run, "val")] for run in (mine, reference))
        assert values == pytest.approx(expected, abs=1e-5), key
    tensors, expected = final_tensors(mine), final_tensors(reference)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_stages_change_nothing(base, pool, name):
    folder, config = base
    n, words = LAYOUTS[name]
    out = folder / name.replace(" ", "_").replace(",", "")
    returned = pool.run(n, run, config, f"--out_dir={out}", *words)
    assert len({record["loss"] for record in returned}) == 1  # every rank has the global numbers
    assert_same_run(out, folder / "one")
    assert sum(record["qk_clipped_heads"] for record in records(out)) > 20


def test_samples_are_the_same_text_and_a_dry_run_goes_through(base, pool, tmp_path):
    options = ["--max_steps=1", "--sample_interval=1", "--sample_prompts=['abc']", "--eval_interval=0"]
    stages = ["--pp=2", "--pp_schedule=interleaved"]
    pool.run(1, run, base[1], f"--out_dir={tmp_path / 'one'}", *options)
    pool.run(2, run, base[1], f"--out_dir={tmp_path / 'many'}", *options, *stages)
    text = (tmp_path / "one/samples.md").read_text()
    assert "abc" in text and (tmp_path / "many/samples.md").read_text() == text
    options = [f"--out_dir={tmp_path / 'dry'}", "--dry_run", "--max_steps=1"]
    one, many = pool.run(1, run, base[1], *options), pool.run(2, run, base[1], *options, *stages)
    assert {record["checkpoint_bytes"] for record in many} == {one[0]["checkpoint_bytes"]}


@pytest.fixture(scope="module")
def halfway(base, pool):
    """The first half of the run by fsdp 2, and by two stages, as run folders to go on with."""
    folder, config = base
    for name, words in (("by fsdp", []), ("by stages", ["--pp=2"])):
        pool.run(2, run, config, f"--out_dir={folder / name}", *words, f"--max_steps={STEPS // 2}",
                 f"--decay_steps={STEPS // 5}")
    return folder


@pytest.mark.parametrize("source, n, words", [
    ("by stages", 1, ["--pp=1"]),
    ("by stages", 4, ["--pp=4"]),
    ("by stages", 2, ["--pp=2", "--pp_schedule=interleaved"]),
    ("by fsdp", 4, ["--pp=2"]),
], ids=str)
def test_a_run_goes_on_with_other_stages(base, halfway, pool, tmp_path, source, n, words):
    """To the same end, and what is exported is the same directory."""
    folder, config = base
    out = tmp_path / "run"
    shutil.copytree(halfway / source, out)
    pool.run(n, run, config, f"--out_dir={out}", "--resume", *words)
    assert_same_run(out, folder / "one")
    export.export(out, tmp_path / "hf")
    export.export(folder / "one", tmp_path / "hf_one")
    files = [{path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("*") if path.is_file()}
             for name in ("hf", "hf_one")]
    assert files[0].keys() == files[1].keys() and files[0]
    for name, path in files[0].items():
        if name.suffix != ".safetensors":
            assert path.read_bytes() == files[1][name].read_bytes(), name
            continue
        mine, reference = load_file(path), load_file(files[1][name])
        assert mine.keys() == reference.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, reference[key], rtol=0, atol=1e-5, msg=key)


def test_documents_sign_and_half_precision_in_stages(base, pool, tmp_path):
    """Where documents start goes to every stage, empty places count once, a loss scale that is too large skips the same
    steps everywhere, and rates of parameters that a stage has not are no mistake."""
    documents = write(tmp_path / "documents", [[END, *range(n % 40 + 1)] for n in range(0, 4000, 7)])
    words = [f"--data={documents}", "--tokenizer=bytes", "--document_mask", "--packing=best_fit", "--balance=sign",
             "--lr_multipliers={'embeddings': 2.0, 'head': 0.5}", "--max_steps=5", "--save_interval=0", "--pp=1"]
    for dtype, accuracy in (("float32", 1e-5), ("float16", 0.02)):
        one, many = tmp_path / f"one {dtype}", tmp_path / f"many {dtype}"
        pool.run(1, run, base[1], f"--out_dir={one}", *words, f"--dtype={dtype}")
        schedule = "--pp_schedule=" + ("zero_bubble" if dtype == "float16" else "1f1b")
        pool.run(2, run, base[1], f"--out_dir={many}", *words, f"--dtype={dtype}", "--pp=2", schedule,
                 "--activation_checkpointing=full")
        assert [loss for _, loss in losses(many)] == pytest.approx([loss for _, loss in losses(one)], abs=accuracy)
        skips = [[e["step"] for e in records(out, "event") if e["event"] == "skip"] for out in (one, many)]
        assert skips[0] == skips[1]
        assert records(many, "val")[-1]["loss"] == pytest.approx(records(one, "val")[-1]["loss"], abs=accuracy)
    mine, reference = final_tensors(tmp_path / "many float32"), final_tensors(tmp_path / "one float32")
    assert all(torch.allclose(mine[name], tensor, rtol=0, atol=1e-5) for name, tensor in reference.items())


def test_what_a_stage_meets_is_not_hidden_by_the_library():
    """Which wraps it: the guard has to know memory, a compiler and a lost rank when it sees them."""
    def step(*args, **options):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory, for this test")
        except RuntimeError as error:
            raise RuntimeError("[Stage 0] failed to run forward") from error
    pipeline = object.__new__(Pipeline)
    pipeline.config, pipeline.device, pipeline.stages = Config(), torch.device("cpu"), [mock.Mock(index=0)]
    pipeline.schedule = mock.Mock(step=step)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline(torch.zeros(2, 4), torch.zeros(2, 4), None, torch.ones(()))


def refused(words, message):
    with pytest.raises(UserError, match=message):
        run(*words)


@pytest.mark.parametrize("words, message", [
    (["--pp=3"], "pp=3 stages must divide the 2 ranks"),
    (["--pp=2", "--micro_batch_size=16"], "are 1 micro-batch a step, too few.* set --micro_batch_size=8"),
    (["--pp=2", "--global_batch_size=15", "--micro_batch_size=3", "--pp_schedule=interleaved"], "none that go round"),
    (["--pp=2", "--reduce_dtype=bfloat16"], "would lose the small ones"),
    (["--pp=2", "--pp_schedule=interleaved", "--num_hidden_layers=3"], "makes 4 stages, and there are 3 layers"),
    (["--pp=2", "--pp_schedule=zero_bubble", "--compile"], "compile=True cannot follow"),
    (["--pp=2", "--mtp_depth=1"], "need embedding and head on one rank"),
    (["--pp=2", "--dp_shard=2"], "does not make 1 rank of a stage"),
])
def test_what_cannot_be_cut_is_refused_on_every_rank(base, pool, tmp_path, words, message):
    pool.run(2, refused, [base[1], f"--out_dir={tmp_path / 'run'}", *words], message)


def test_the_table_of_the_optimizer_has_the_parameters_of_all_stages():
    config = Config(**DEBUG_SIZE, verbose=True, out_dir="out/x")
    model, stream = build(config, "meta"), SimpleNamespace(identity=dict, epochs=lambda *_: 1.0)
    training = SimpleNamespace(config=config, stream=stream, routes=routes_of(config, model), layout="", device="cpu",
                               step=0, tokens_per_step=1,
                               model=SimpleNamespace(named_parameters=lambda: list(model.named_parameters())[:2]))
    assert "lm_head.weight" in "".join(report.opening(training, 1.0, "", {}))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_spans_are_the_best_there_are(n):
    costs = [1.0, 3.0, 3.0, 2.0, 2.0, 7.0]
    found = spans(costs, n)
    assert [index for span in found for index in span] == list(range(6)) and all(map(len, found))
    inner = itertools.combinations(range(1, 6), n - 1)
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends, 6))) for ends in inner)
    assert max(sum(costs[index] for index in span) for span in found) == best


def test_costs_of_layers_add_up():
    config = Config(num_hidden_layers=5, n_shared_experts=2)
    assert sum(flops_by_layer(config, 512)) == pytest.approx(flops_per_token(config, 512), rel=1e-9)


def test_a_share_of_the_loss_reaches_the_gradient():
    """Two losses, one behind x and one that leaves beside it, by hand: 3 x + 2 w and its gradient."""
    x, w = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(5.0, requires_grad=True)
    y = Share.apply(x, (w * 2).sum())
    assert torch.equal(y, x)
    (y * 3).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0] and w.grad.item() == 2.0
