"""The average of the weights: against the definition in float64, in and out of the model bitwise, in runs that skip,
stop and go on, and what evaluate.py and export.py make of it."""

import math

import pytest
import torch

import evaluate
import export
import generate
from errors import UserError
from model import K2
from run import checkpoint
from run.ema import Average
from tests.helpers import (
    final_tensors,
    losses,
    make_config,
    records,
    run_restarting,
    run_train,
    tiny_model,
    tokens,
)


@pytest.mark.parametrize("decay, interval", [(0.5, 1), (0.95, 1), (0.98, 2), (0.99, 5), (0.999, 50)])
def test_the_average_is_the_weighted_mean_of_what_it_saw(decay, interval):
    model, seen = tiny_model(num_hidden_layers=2), []
    average = Average(model, decay)
    assert average.interval == interval
    for steps in range(1, 101):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
        if steps == 1 or steps % interval == 0:
            seen.append({name: tensor.double().clone() for name, tensor in model.state_dict().items()})
        average.update(steps)
    weights = [decay ** (interval * age) for age in range(len(seen))][::-1]
    for name, tensor in model.state_dict().items():
        mean = sum(weight * state[name] for weight, state in zip(weights, seen)) / sum(weights)
        torch.testing.assert_close(average.tensors[f"ema.{name}"].double(), mean, rtol=0, atol=1e-5)
        assert not torch.equal(average.tensors[f"ema.{name}"], tensor)


@pytest.mark.parametrize("tied", [False, True])
def test_within_it_the_model_has_the_average_and_afterwards_its_own_bits(tied):
    model, other = (tiny_model(tie_word_embeddings=tied, seed=seed) for seed in (0, 1))
    x = tokens(2, 9)
    model.compute_dtype = other.compute_dtype = torch.bfloat16
    model.make_copies()  # rounded copies have to follow
    average = Average(other, 0.9)
    average.model = model
    mine, theirs = ({name: tensor.clone() for name, tensor in m.state_dict().items()} for m in (model, other))
    with torch.no_grad():
        before, expected = model(x), other(x)
        with average.in_place():
            assert torch.equal(model(x), expected) and not torch.equal(before, expected)
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(average.tensors[f"ema.{name}"], tensor) for name, tensor in theirs.items())


OPTIONS = ("--ema=0.98", "--save_interval=10", "--eval_interval=5", "--keep_checkpoints=9")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run with an average: (its config file, its folder)."""
    folder = tmp_path_factory.mktemp("ema")
    path = make_config(folder / "tiny.py", data=str(data), out_dir=str(folder / "run"), decay_steps=4)
    run_train(path, *OPTIONS)
    return path, folder / "run"


def test_it_goes_on_bitwise_and_leaves_the_training_alone(trained, tmp_path):
    path, run = trained
    run_train(path, *OPTIONS, f"--out_dir={tmp_path / 'half'}", f"--resume={run}/checkpoints/step_00000010")
    whole, half = final_tensors(run), final_tensors(tmp_path / "half")
    assert whole.keys() == half.keys() and all(torch.equal(whole[name], half[name]) for name in whole)
    val = lambda folder, *left_out: [{key: value for key, value in record.items() if key not in ("time", *left_out)}
                                     for record in records(folder, "val")]
    assert val(tmp_path / "half") == val(run)[2:]
    run_train(path, *OPTIONS, "--ema=0", f"--out_dir={tmp_path / 'plain'}")
    plain = final_tensors(tmp_path / "plain")
    assert losses(tmp_path / "plain") == losses(run) and all(torch.equal(plain[name], whole[name]) for name in plain)
    assert {f"ema.{name[6:]}" for name in plain if name.startswith("model.")} == whole.keys() - plain.keys()
    assert val(run, "ema_loss") == val(tmp_path / "plain") != val(run)
    assert "ema_updates" not in checkpoint.read_manifest(checkpoint.find(tmp_path / "plain"))


def test_it_begins_where_a_checkpoint_has_none_and_ends_where_it_is_not_wanted(trained, tmp_path, capsys):
    path, run = trained
    run_train(path, "--max_steps=2", f"--out_dir={tmp_path / 'run'}")
    run_train(f"--resume={tmp_path / 'run'}", "--max_steps=3", "--ema=0.9")
    assert "has no average of the weights: it begins here" in capsys.readouterr().out
    tensors = final_tensors(tmp_path / "run")
    assert all(torch.equal(tensor, tensors[f"ema.{name[6:]}"]) for name, tensor in tensors.items()
               if name.startswith("model."))
    run_train(f"--resume={tmp_path / 'run'}", "--max_steps=4", "--ema=0")
    assert "ema: 0.9 there, 0.0 here" in capsys.readouterr().out
    assert not any(name.startswith("ema.") for name in final_tensors(tmp_path / "run"))
    with pytest.raises(UserError, match="has no average of the weights, as --ema"):
        generate.load(tmp_path / "run", "cpu", which="ema")
    with pytest.raises(UserError, match="ema=1.0 must lie in"):
        run_train(path, "--ema=1", f"--out_dir={tmp_path / 'other'}")


def test_evaluate_and_export_take_it_by_choice(trained, tmp_path, monkeypatch):
    _, run = trained
    last = records(run, "val")[-1]
    found = {which: evaluate.main([str(run), f"--checkpoint={which}", "--device=cpu"]) for which in ("latest", "ema")}
    assert found["latest"]["data"]["loss"] == pytest.approx(last["loss"], abs=1e-5)
    assert found["ema"]["data"]["loss"] == pytest.approx(last["ema_loss"], abs=1e-5)
    assert abs(last["ema_loss"] - last["loss"]) > 1e-3 and found["ema"]["checkpoint"] == "ema"
    export.main([str(run / "checkpoints/step_00000020"), str(tmp_path / "hf"), "--checkpoint=ema"])
    published, _ = generate.load(tmp_path / "hf", "cpu")
    tensors = final_tensors(run)
    assert all(torch.equal(tensor, tensors[f"ema.{name}"]) for name, tensor in published.state_dict().items())
    with pytest.raises(UserError, match="holds one model, no ema one"):
        generate.load(tmp_path / "hf", "cpu", which="ema")


@pytest.fixture
def broken_sixth_step(monkeypatch):
    original, turns = K2.forward, iter(range(10**6))

    def forward(self, *args, **options):
        loss, *rest = original(self, *args, **options)
        return (loss * math.nan if next(turns) in (10, 11) else loss), *rest  # two micro-batches a step
    monkeypatch.setattr(K2, "forward", forward)


def test_a_skipped_step_does_not_move_it(config, tmp_path, broken_sixth_step):
    """After step 7 it is that of step 5 moved once, towards the weights of step 7."""
    run_train(config, "--ema=0.9", "--keep_checkpoints=9", "--max_steps=7", "--save_interval=1")
    (skip,) = [event for event in records(tmp_path / "run", "event") if event["event"] == "skip"]
    assert skip["step"] == 6
    folders = [tmp_path / f"run/checkpoints/step_{step:08d}" for step in (5, 7)]
    assert [checkpoint.read_manifest(folder)["ema_updates"] for folder in folders] == [5, 6]
    before, after = map(final_tensors, folders)
    share = (1 - 0.9) / (1 - 0.9**6)
    for name, tensor in before.items():
        if name.startswith("ema."):
            moved = torch.lerp(tensor.double(), after[f"model.{name[4:]}"].double(), share)
            torch.testing.assert_close(after[name].double(), moved, rtol=0, atol=1e-6)


def test_a_rollback_restores_it(config, tmp_path, broken_sixth_step):
    words = ["--ema=0.9", "--max_steps=8", "--save_interval=4", "--keep_checkpoints=9"]
    _, asked = run_restarting(config, *words, "--max_skipped_steps=1", "--max_rollbacks=1")
    assert len(asked) == 2
    run_train(config, *words, f"--resume={tmp_path / 'run'}/checkpoints/step_00000004", "--skip_sequences=16",
              f"--out_dir={tmp_path / 'other'}")
    back, other = final_tensors(tmp_path / "run"), final_tensors(tmp_path / "other")
    assert all(torch.equal(back[name], other[name]) for name in back if name.startswith("ema."))
