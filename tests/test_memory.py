"""The estimate of memory: against what autograd really saves, control groups by hand, and what is said of it."""

import dataclasses

import pytest
import torch

import settings
from errors import UserError
from model import build
from muon import Muon
from ranks import parallel, shard
from routes import route_parameters
from run import memory, peak
from tests.helpers import TINY, run_train, tokens

CPU = torch.device("cpu")
KINDS = {
    "experts": dict(),
    "dense": dict(n_routed_experts=0),
    "mha": dict(n_routed_experts=0, attention="mha"),
    "two tokens ahead": dict(mtp_depth=1),
    "wide": dict(first_k_dense_replace=2, q_lora_rank=24, n_shared_experts=2, num_experts_per_tok=3, hidden_size=64),
}


def saved_bytes(model, batch):
    """Bytes of the distinct storages that autograd keeps, parameters aside."""
    kept, ours = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor  # kept alive
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(batch[:, :-1], batch[:, 1:], mtp_scale=1.0 if model.config.mtp_depth else None)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 200])
def test_activations_are_what_autograd_saves(kind, dtype, length):
    sizes = dict(max_position_embeddings=256, dtype=dtype, sequence_length=length)
    config = settings.Config(**TINY | sizes | KINDS[kind])
    model = build(config, CPU).init_weights(0)
    model.compute_dtype = dtype = getattr(torch, dtype)
    one, three = (saved_bytes(model, tokens(n, length + 1)) for n in (1, 3))
    counted, _ = peak.activations(config, dtype, CPU)
    assert counted == pytest.approx((three - one) / 2, rel=0.07)


def config_of(**changes):
    return settings.Config(**TINY | dict(global_batch_size=8, micro_batch_size=8, sequence_length=64, dtype="float32")
                           | changes)


def needed(config, size, forwards):
    model = build(config, CPU)
    routes = route_parameters(model.named_parameters(), config.optimizer)
    return memory.needed(config, model, routes, parallel.Layout(), CPU, size, forwards), model, routes


def test_parameters_and_states_are_counted_exactly():
    for optimizer in ("muonclip", "adamw"):
        with_state, model, routes = needed(config_of(optimizer=optimizer), 1, 2)
        made = Muon(model.named_parameters(), routes=routes)
        state = sum(t.numel() * 4 for s in made.state.values() for t in s.values())
        parameters = sum(p.numel() * 4 for p in model.parameters())
        kept, backward = (int(peak.PIECES * n) for n in peak.activations(config_of(), torch.float32, CPU))
        rest = kept + max(backward, 8 * 2**21) + 4 * model.lm_head.weight.numel() + peak.PYTORCH
        assert with_state == 2 * parameters + state + rest


def test_levers_lower_the_estimate():
    whole = needed(config_of(sequence_length=64, num_hidden_layers=12), 8, 1)[0]
    for changes in (dict(activation_checkpointing="full"), dict(activation_checkpointing="selective"),
                    dict(sequence_length=32), dict(num_hidden_layers=6)):
        assert needed(config_of(**dict(num_hidden_layers=12) | changes), 8, 1)[0] < whole
    assert needed(config_of(num_hidden_layers=12), 2, 4)[0] < whole


@pytest.mark.parametrize("free, message", [(0.3, "refused"), (1.0, "warned"), (20, "")])
def test_what_does_not_fit_is_refused_before_the_first_step(config, tmp_path, monkeypatch, capsys, free, message):
    words = [config, "--micro_batch_size=8", "--num_hidden_layers=6", "--max_steps=1", "--decay_steps=0"]
    monkeypatch.setattr(peak, "PYTORCH", 0)
    need = needed(settings.load(words)[0], 8, 1)[0]
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * need))
    if message == "refused":
        with pytest.raises(UserError, match=r"about .* GiB of memory are needed with micro_batch_size=8, .* GiB are "
                           r"free: .*--activation_checkpointing=full needs less, and so does a shorter"):
            run_train(*words)
        assert not (tmp_path / "run").exists()
        return
    run_train(*words)
    assert ("warning: about" in capsys.readouterr().out) == (message == "warned")


@pytest.mark.parametrize("batch, fits, next_one", [(8, 2, 4), (12, 3, 4), (9, 3, 9)])
def test_the_micro_batch_that_is_named_is_the_largest_that_fits(monkeypatch, batch, fits, next_one):
    config = config_of(sequence_length=64, num_hidden_layers=12, global_batch_size=batch, micro_batch_size=batch)
    need, model, routes = needed(config, batch, 1)
    small, large = (needed(config, size, batch // size)[0] for size in (fits, next_one))
    monkeypatch.setattr(memory, "free_bytes", lambda device: (small + large) // 2)
    monkeypatch.setattr(memory, "SURE", 1.0)
    monkeypatch.setattr(memory, "TIGHT", 1.0)
    with pytest.raises(UserError, match=f"--micro_batch_size={fits} would fit"):
        memory.require(config, model, routes, parallel.Layout(), CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    memory.require(config, model, routes, parallel.Layout(), CPU)  # not known: a line


def ranks_apart(config):
    """Rank 1 has little left: all end alike."""
    config = dataclasses.replace(settings.load([config])[0], global_batch_size=8, micro_batch_size=4)
    layout = parallel.make_layout(config, CPU)
    model = build(config, CPU, lambda model: shard.distribute(model, layout, torch.float32))
    routes = route_parameters(model.named_parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda device: 2**20 if parallel.rank() else 2**40)
        with pytest.raises(UserError) as error:
            memory.require(config, model, routes, layout, CPU)
    return str(error.value)


def test_ranks_decide_together(config, pool):
    said = pool.run(2, ranks_apart, config)
    assert said[0] == said[1] and "needed on rank 1 with micro_batch_size=4, 0.0 GiB are free" in said[0]


def test_control_groups_limit_what_is_free(tmp_path):
    def write(folder, **files):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (folder / name.replace("__", ".")).write_text(f"{value}\n", encoding="utf-8")

    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("0::/job/step\n", encoding="utf-8")
    assert memory.cgroup_bytes(root, own) == []
    write(root / "job", memory__max=1000, memory__current=700, memory__stat="anon 5\ninactive_file 100")
    write(root / "job/step", memory__max="max", memory__current=10, memory__stat="inactive_file 1")
    assert memory.cgroup_bytes(root, own) == [400]
    own.write_text("0::/not/seen/in/a/container\n", encoding="utf-8")
    write(root, memory__max=90, memory__current=50, memory__stat="inactive_file 0")
    assert memory.cgroup_bytes(root, own) == [40]
    own.write_text("5:cpuset:/\n4:memory:/docker/x\n", encoding="utf-8")  # version 1
    write(root / "memory", memory__limit_in_bytes=2000, memory__usage_in_bytes=500,
          memory__stat="total_inactive_file 7")
    assert memory.cgroup_bytes(root, own) == [1507]
