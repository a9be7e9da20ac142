"""A step of training against a plain loop over the whole batch, and what a checkpoint of it says."""

import pytest
import torch
import torch.nn.functional as F

import settings
from data.loader import TrainStream
from model import build
from muon import qk_clip_, schedule_factor
from ranks import parallel
from routes import routes_of
from run import checkpoint
from step import Training, make_optimizer
from tests.helpers import TINY

CPU = torch.device("cpu")


def make(words):
    """A Training of a config that is about to begin, and the config."""
    config, _ = settings.load([*words, "--grad_clip=0.05", "--qk_clip_tau=0.02", "--micro_batch_size=2"])
    stream = TrainStream(config.data, config.sequence_length, config.seed)
    return Training(config, parallel.make_layout(config, CPU), CPU, stream), config


def a_step(training):
    found = training.agree(training.forward_backward(exact=True))
    return found, training.update(found)


def test_steps_are_those_of_a_plain_loop(config):
    training, config = make([config])
    training.start()
    training.begin()
    model = build(config, CPU).init_weights(config.seed).train()
    optimizer = make_optimizer(config, model, routes_of(config, model), parallel.Layout())
    peaks = [group["lr"] for group in optimizer.param_groups]
    stream = TrainStream(config.data, config.sequence_length, config.seed)
    for step in range(1, 4):
        found, clipped = a_step(training)
        inputs, targets = stream.batch((step - 1) * config.global_batch_size, config.global_batch_size)
        model.reset_statistics()
        loss_sum, balance_sum = model(inputs, targets)
        with torch.no_grad():
            loss = F.cross_entropy(model.eval()(inputs).flatten(0, 1), targets.flatten())
        model.train()
        (loss_sum / targets.numel() + config.aux_loss_alpha * balance_sum / len(inputs)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * schedule_factor(step, config.schedule, config.max_steps, config.warmup_steps,
                                                 config.decay_steps, config.min_lr_ratio)
        optimizer.step()
        optimizer.zero_grad()
        heads = qk_clip_(model.layers, model.max_logits, config.qk_clip_tau)
        model.routing.balance_(config.bias_update_rate)
        assert (found.loss, found.norm) == (pytest.approx(loss.item(), abs=1e-5), pytest.approx(norm.item(), rel=1e-4))
        assert norm > config.grad_clip and int(clipped) == int(heads) > 0
    assert (training.step, training.tokens) == (3, 3 * targets.numel())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_that_is_not_finite_leaves_all_as_it_was(config, monkeypatch):
    training, _ = make([config, "--dtype=float16"])
    training.start()
    training.begin()
    a_step(training)
    before = {name: tensor.clone() for name, tensor in training.state.items()}
    monkeypatch.setattr(parallel, "squared_norm", lambda *_: torch.tensor(float("inf")))
    for skipped in (1, 2):
        found, clipped = a_step(training)
        assert not found.finite and clipped == 0 and training.skipped == skipped and training.good_steps == 0
        assert training.loss_scale == 2.0 ** (16 - skipped)
    assert all(torch.equal(training.state[name], tensor) for name, tensor in before.items())
    monkeypatch.undo()
    assert a_step(training)[0].finite and (training.skipped, training.good_steps, training.step) == (0, 1, 4)


def test_what_is_saved_goes_on_bitwise(config, tmp_path):
    ours, _ = make([config, "--ema=0.9", "--dtype=float16"])
    ours.start()
    ours.begin()
    a_step(ours)
    tensors, about = ours.saved()
    checkpoint.save(tmp_path / "saved", ours.step, tensors, about | {"config": {"dtype": "float16"}}, keep=1)
    theirs, _ = make([config, "--ema=0.9", "--dtype=float16"])
    source = checkpoint.find(tmp_path / "saved")
    theirs.start(source, checkpoint.read_manifest(source))
    theirs.begin()
    assert a_step(ours)[0] == a_step(theirs)[0]
    (one, about), (other, same) = ours.saved(), theirs.saved()
    assert about == same and one.keys() == other.keys() and "ema_updates" in about
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ns_dtype", ["auto", "float32", "bfloat16", "float16"])
def test_what_ranks_send_for_muon_is_as_wide_as_planned(dtype, ns_dtype):
    config = settings.Config(**TINY, dtype=dtype, ns_dtype=ns_dtype)
    model = build(config, CPU)
    optimizer = make_optimizer(config, model, routes_of(config, model), parallel.make_layout(config, CPU))
    assert optimizer.wire_dtype.itemsize == config.wire_bytes()
