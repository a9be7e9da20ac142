"""bench.step and bench.training: the twins are what they are said to be, every arm trains, one that fails hides no
other, and what a run of train.py is compared with."""

import dataclasses
import json

import pytest
import torch

import bench
import settings
from bench import arms, contest, pairs, step, summary, training
from config import Config
from counting import count_parameters, flops_per_token
from errors import UserError
from model import ModelConfig
from tests.helpers import ROOT, TINY, make_config


@pytest.fixture
def out(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def tiny(tmp_path):
    sizes = TINY | dict(hidden_size=64, num_hidden_layers=2)
    return make_config(tmp_path / "tiny.py", **sizes, global_batch_size=4, micro_batch_size=2)


def newest(out, name):
    return json.loads(max(out.glob(f"*-{name}*.json")).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name, multiple", [("debug", 8), ("small", 64)])
def test_the_twins_have_equal_flops_and_the_dense_one_nothing_else_changed(name, multiple):
    config, _ = settings.load([str(ROOT / f"configs/{name}.py")])
    goal, T = flops_per_token(config, config.sequence_length), config.sequence_length
    for twin in (arms.dense_twin(config), arms.gpt_twin(config)):
        twin.check()
        nearest = flops_per_token(twin, T)
        assert count_parameters(twin)[0] == count_parameters(twin)[1] and twin.intermediate_size % multiple == 0
        for other in (-multiple, multiple):  # no other multiple is nearer
            width = twin.intermediate_size + other
            assert abs(nearest - goal) <= abs(flops_per_token(dataclasses.replace(twin, intermediate_size=width), T)
                                              - goal)
    dense = dataclasses.asdict(arms.dense_twin(config))
    changed = {key for key, value in dataclasses.asdict(config).items() if dense[key] != value}
    assert changed <= {"n_routed_experts", "intermediate_size"}


def test_the_plain_twin_of_small_is_configs_gpt():
    small, gpt = (settings.load([str(ROOT / f"configs/{name}.py")])[0] for name in ("small", "gpt"))
    twin = arms.gpt_twin(small)
    unused = ("qk_nope_head_dim", "qk_rope_head_dim", "routed_scaling_factor")  # without latents, and without experts
    sizes = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in unused]
    assert {name: getattr(twin, name) for name in sizes} == {name: getattr(gpt, name) for name in sizes}
    assert twin.optimizer == gpt.optimizer and twin.micro_batch_size == gpt.micro_batch_size


def test_every_arm_trains_and_is_in_the_table(out, tiny, capsys):
    words = [tiny, "--rounds=1", "--arms=nanok2,dense,gpt,nograph,transformers,pytorch,loops"]
    assert not bench.command(step.main, "")(words)
    result, shown = newest(out, "step-tiny-float32-cpu"), capsys.readouterr().out
    assert not result["failed"] and set(result["arms"]) == {"nanok2", *step.WORDS}
    assert list(result["ratios"])[0] == "tiny: MoE over dense twin, tokens/s"
    for row in result["arms"].values():
        gradients = row["seconds"]["first micro-batch"] + 15 * row["seconds"]["another micro-batch"]
        rest = row["seconds"]["optimizer"] + row["seconds"]["QK-clip and bias"]
        assert row["tokens_per_second"] == pytest.approx(16 * 2 * 32 / (gradients + rest))
    assert "dense twin: " in shown and "MFLOPs a token" in shown and "matmul" in shown


def test_an_arm_that_fails_hides_no_other(out, tiny, monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("of another version")

    monkeypatch.setattr(step, "Transformers", broken)
    assert step.main([tiny, "--rounds=1", "--arms=transformers,dense"]) == 1
    result = newest(out, "step-tiny")
    assert "of another version" in result["failed"]["transformers"] and "dense" in result["arms"]
    assert "transformers: not measured: RuntimeError" in capsys.readouterr().out


def test_words_of_bench_step(out, tiny):
    for words, message in ((["--rounds=many"], "--rounds=many must be a number"),
                           (["--arms=dense,moe"], "no arm is called 'moe'; there are nanok2, ")):
        with pytest.raises(UserError, match=message):
            step.main([tiny, *words])
    assert step.main([tiny, "--arms=dense", "--rounds=0"]) == 0 and not out.exists()


@pytest.mark.parametrize("kind", [arms.Nanok2, arms.Transformers])
def test_an_arm_updates_every_parameter(kind, tiny):
    config, _ = settings.load([tiny])
    words = (config, torch.device("cpu"), False) + ((False, {}) if kind is arms.Nanok2 else ())
    arm = kind(*words)
    before = [parameter.detach().clone() for parameter in arm.model.parameters()]
    arm.step()
    assert sum(map(torch.Tensor.numel, before)) == count_parameters(config)[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, arm.model.parameters()))
    assert all(parameter.isfinite().all() for parameter in arm.model.parameters())
    assert list(map(len, arm.seconds.values())) == [1] * 5


def test_arms_of_a_contest_that_are_settings():
    debug = str(ROOT / "configs/debug.py")
    words = ["muon_lr=2e-2 momentum=0.9", "data=data/book", "--seeds=1", "--config", debug, "--lr=as-is"]
    own, names, flags, _ = contest.read_words(words)
    assert names == words[:2] and own["seeds"] == 1 and not flags
    pair, (first, last) = pairs.arms_of(["muon_lr=2e-2 momentum=0.9", "muon_lr=3e-3"], debug, {"seed": 5})
    assert pair == "muon_lr_2e_2_momentum_0_9-muon_lr_3e_3" and first.name == "muon_lr=2e-2 momentum=0.9"
    assert (first.config.muon_lr, first.config.momentum, first.config.seed) == (2e-2, 0.9, 5)
    assert (last.config.muon_lr, last.config.momentum, last.config.seed) == (3e-3, 0.95, 5)
    _, (_, unchanged) = pairs.arms_of(["momentum=0.9"], debug, {})
    assert unchanged.name == "as it is" and unchanged.config == Config(**settings.read_file(debug))
    _, (halved, _) = pairs.arms_of(["lr_multipliers={'experts': 0.5} momentum=0.9"], debug, {})
    assert (halved.config.lr_multipliers, halved.config.momentum) == ({"experts": 0.5}, 0.9)
    with pytest.raises(UserError, match="say --lr=as-is"):
        contest.read_words(["muon_lr=2e-2"])
    for name, message in (("momentun=1", "unknown setting 'momentun'"), ("ns_steps=1 more", "ns_steps=.1 more."),
                          ("sequence_length=128", "differ in sequence_length")):
        with pytest.raises(UserError, match=message):
            pairs.arms_of([name], debug, {})


@pytest.mark.slow
def test_the_start_of_train_with_cold_and_warm_caches(out, tiny):
    training.main(["start", tiny])
    cold, warm = newest(out, "start-tiny")["ratios"].values()
    assert 0 < cold < 300 and 0 < warm < 300


def test_a_run_is_compared_with_the_step_of_the_same_batch(out, tiny, monkeypatch):
    with pytest.raises(UserError, match="no result to compare with:  python -m bench.step"):
        training.main(["run", tiny])
    seconds = {"first micro-batch": 0.1, "another micro-batch": 0.2, "optimizer": 0.3, "QK-clip and bias": 0.04}
    bench.save("step-tiny-float32-cpu", {"arms": {"nanok2": {"seconds": seconds}}})
    records = [{"step": n, "tokens_per_second": 1.0 if n <= 10 else 190.0} for n in (1, 5, 10, 15, 20, 25, 30)]
    monkeypatch.setattr(training, "train_until", lambda *words: (0.0, records))
    training.main(["run", tiny])  # two micro-batches of 2 x 32 tokens, in 0.64 s
    assert list(newest(out, "run-tiny")["ratios"].values()) == [pytest.approx(190 / 200)]


def test_what_train_py_said_is_told_if_it_ends_early(out, tiny):
    with pytest.raises(UserError, match="train.py ended with .*before step 1:(.|\n)*data/nowhere"):
        training.start([tiny, "--data=data/nowhere"], "tiny", out.parent)
    with pytest.raises(UserError, match="say what to measure"):
        training.main([tiny])


def test_the_table_begins_with_what_matters_most(out, capsys):
    out.mkdir()
    for name in ("attention-cuda", "run-small", "step-gpt-bfloat16", "start-small", "step-small-bfloat16"):
        (out / f"2026-01-02-{name}.json").write_text(json.dumps({"ratios": {name: 1.0}}), encoding="utf-8")
    summary.main()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "step-small-bfloat16", "start-small", "run-small", "step-gpt-bfloat16", "attention-cuda"]
