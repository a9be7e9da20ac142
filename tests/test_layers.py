"""Linear layers in 16 bits, their kept copies, and how attention's q and k are put together: against plain code."""

import copy
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import settings
from errors import UserError
from kernels import backend
from layers import MLP, linear
from mla import MHA, MLA, RotateTail, apply_rope
from model import build
from muon import Muon, qk_clip_
from ranks import parallel
from run import checkpoint, peak
from tests.helpers import TINY, tiny_config, tiny_model, tokens

BF16 = torch.bfloat16


def gradients(output, inputs, seed=1):
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
    return torch.autograd.grad(output, inputs, grad)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("kept", [False, True])
def test_linear_equals_the_plain_product(dtype, kept):
    """Bit by bit: value, gradient of x, gradients of two stacked weights."""
    x, weights = normal(2, 5, 16, dtype=dtype), [normal(8, 16, seed=1), normal(24, 16, seed=2)]
    rounded = torch.cat(weights).to(dtype)
    plain = F.linear(x, rounded)
    ours = linear(x, weights, rounded.detach() if kept else None)
    assert torch.equal(ours, plain) and ours.dtype == dtype
    for mine, right in zip(gradients(ours, [x, *weights]), gradients(plain, [x, *weights])):
        assert torch.equal(mine, right) and mine.dtype == right.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_weight_gradients_are_not_rounded_on_a_gpu(compiled):
    x, weight = normal(512, 64, dtype=BF16).detach().cuda(), normal(128, 64, seed=1).detach().cuda().requires_grad_()
    function = torch.compile(linear, fullgraph=True) if compiled else linear
    grad = torch.randn(512, 128, device="cuda").to(BF16)
    (ours,) = torch.autograd.grad(function(x, [weight]), [weight], grad)
    exact = grad.double().T @ x.double()
    assert ours.dtype == torch.float32 and (ours - exact).abs().max() < 1e-5 * exact.abs().max()


def test_mlp_in_16_bits_is_the_one_of_float64():
    mlp = MLP(32, 48)
    for seed, parameter in enumerate(mlp.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed).detach() * 0.2
    exact = copy.deepcopy(mlp).double()
    x = normal(4, 7, 32, dtype=BF16)
    x64 = x.detach().double().requires_grad_()
    ours, right = mlp(x), exact.down_proj(F.silu(exact.gate_proj(x64)) * exact.up_proj(x64))
    pairs = [(ours, right), *zip(gradients(ours, [x, *mlp.parameters()]), gradients(right, [x64, *exact.parameters()]))]
    for mine, theirs in pairs:
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()


# ---------------------------------------------------------------------- attention's q, k and v

@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_rotating_the_tail_equals_split_and_cat(dtype):
    angle = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.3])
    x, rope = normal(3, 6, 2, 9, dtype=dtype), (angle.cos(), angle.sin())
    plain = torch.cat((x[..., :5], apply_rope(x[..., 5:], rope)), dim=-1)
    ours = RotateTail.apply(x, 5, *rope)
    assert torch.equal(ours, plain) and not torch.equal(ours[..., 5:], x[..., 5:])
    assert torch.equal(gradients(ours, [x])[0], gradients(plain, [x])[0])


def test_keys_that_the_matmul_spreads_equal_those_of_a_cat():
    """In float64 to rounding, and the RoPE key in every head exactly."""
    attention = MLA(tiny_config(kv_lora_rank=24))
    weight = attention.kv_b_proj.weight
    weight.data = normal(*weight.shape, seed=3).detach()
    latent, key = normal(2, 5, 24, dtype=BF16), normal(2, 5, 1, attention.P, seed=1, dtype=BF16)
    k, v = attention.keys_and_values(latent, key)
    inputs64 = [t.detach().double().requires_grad_() for t in (latent, key, weight.detach().to(BF16))]
    both = F.linear(inputs64[0], inputs64[2]).unflatten(-1, (attention.H, -1))
    k_nope, v64 = both.split((attention.N, attention.U), dim=-1)
    k64 = torch.cat((k_nope, inputs64[1].expand(-1, -1, attention.H, -1)), dim=-1)
    assert torch.equal(k[..., attention.N:], key.expand(-1, -1, attention.H, -1))
    ours, right = torch.cat((k, v), dim=-1), torch.cat((k64, v64), dim=-1)
    pairs = [(ours, right), *zip(gradients(ours, [latent, key, weight]), gradients(right, inputs64))]
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape and (mine.double() - theirs).norm() < 0.005 * theirs.norm()


# ---------------------------------------------------------------------- copies

def trained(copies, compiled=False, steps=3, **changes):
    """Losses and last gradients of a few steps of a 16-bit model with two micro-batches each."""
    model = tiny_model(**changes)
    model.compute_dtype = BF16
    if copies:
        model.make_copies()
    if compiled:
        for layer in model.layers:
            layer.compile(backend="aot_eager", dynamic=False, fullgraph=True)
    optimizer, losses = Muon(model.named_parameters(), 1e-2, 1e-2), []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            x = tokens(2, 17, seed=2 * step + micro)
            loss, balance = model(x[:, :-1], x[:, 1:])
            (loss / 64 + balance).backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("compiled, changes", [(False, {}), (True, {}), (False, dict(q_lora_rank=24)), (False, dict(
    attention="mha", tie_word_embeddings=True)), (False, dict(n_routed_experts=0))])
def test_copies_change_no_bit_of_a_training(compiled, changes):
    (losses, grads), (losses2, grads2) = (trained(copies, compiled, **changes) for copies in (False, True))
    assert losses == losses2 and losses[0] != losses[2] and all(map(torch.equal, grads, grads2))


def test_copies_follow_every_way_to_change_a_weight(tmp_path):
    model, x = tiny_model(), tokens(2, 17)
    model.compute_dtype = BF16
    model.make_copies()
    optimizer = Muon(model.named_parameters(), 1e-2, 1e-2)
    state, other = checkpoint.named_tensors(model, optimizer), tiny_model(seed=1)
    saver = checkpoint.Saver(tmp_path, 1, None, False)
    saver.start(1, state, {}, None)
    saved = saver.outcome(wait=True)[1]

    def step():
        optimizer.zero_grad()
        sum(model(x[:, :-1], x[:, 1:])).backward()
        optimizer.step()

    ways = {
        "optimizer": step,
        "QK-clip": lambda: qk_clip_(model.layers, torch.full_like(model.max_logits, 1e3), 100.0),
        "checkpoint": lambda: checkpoint.load(saved, state),
        "state_dict": lambda: model.load_state_dict(other.state_dict()),
        "init": lambda: model.init_weights(2),
    }
    for way, change in ways.items():
        model(x)
        before = [c.clone() for c in model.copies.copies]
        change()
        model(x)
        assert not all(map(torch.equal, before, model.copies.copies)), way
        for rounded, weight in zip(model.copies.copies, model.copies.weights):
            assert torch.equal(rounded, weight.to(BF16)), way
    with mock.patch.object(torch, "_foreach_copy_") as written:
        model(x)  # nothing has changed
        assert not written.called
        model.refresh_copies(always=True)
        assert written.called


@pytest.mark.parametrize("triton", [False, True])
def test_copies_are_of_all_matrices_of_the_blocks_and_in_no_state_dict(triton, monkeypatch):
    """Those of experts are read by Triton's kernels alone."""
    monkeypatch.setattr(backend, "INTERPRETED", True)
    model = tiny_model(q_lora_rank=24)
    names, state = {id(p): name for name, p in model.named_parameters()}, set(model.state_dict())
    with backend.running(triton):
        model.make_copies()
    copied = sorted(names[id(weight)] for weight in model.copies.weights)
    others = ("gate.weight", "kv_b_proj.weight", *(() if triton else ("gate_up_proj", "down_proj")))
    assert copied == sorted(name for name, p in model.named_parameters() if p.ndim > 1
                            and name.startswith("model.layers") and not name.endswith(others))
    assert set(model.state_dict()) == state
    mlp, first = model.layers[0].mlp, model.copies.copies
    assert mlp.gate_up_copy.data_ptr() in {part.data_ptr() for part in first} and mlp.gate_proj.weight_copy is None


def test_copies_are_kept_where_they_can_be():
    config = lambda **changes: settings.Config(**TINY | changes)
    alone, many = parallel.Layout(), parallel.Layout(dense="a mesh")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert peak.keeps_copies(config(), alone, cuda) and not peak.keeps_copies(config(), many, cuda)
    assert not peak.keeps_copies(config(), alone, cpu)
    assert peak.keeps_copies(config(weight_copies=True), alone, cpu)
    assert not peak.keeps_copies(config(activation_checkpointing="full"), alone, cuda)
    for changes, layout in ((dict(dtype="float32"), alone), (dict(), many)):
        assert not peak.keeps_copies(config(**changes), layout, cuda)
        with pytest.raises(UserError, match="leave weight_copies=None"):
            peak.keeps_copies(config(weight_copies=True, **changes), layout, cuda)


def test_a_model_of_shapes_alone_has_copies_too():
    with torch.device("meta"):
        model = build(tiny_config(), "meta")
        model.make_copies()
    assert model.layers[0].mlp.gate_up_copy.shape == (2 * TINY["intermediate_size"], TINY["hidden_size"])


@pytest.mark.parametrize("scales, heat", [
    ({"mscale": 1.0, "mscale_all_dim": 1.0}, (0.1 * math.log(32) + 1) ** 2), ({}, 1)])
def test_yarn_heats_plain_and_latent_attention_alike(scales, heat):
    """As K2 has it, factor 32; with both named, cos and sin carry nothing of it."""
    yarn = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 8, **scales}
    for attention in (MLA, MHA):
        plain, heated = (attention(tiny_config(rope_scaling=scaling)).scale for scaling in (None, yarn))
        assert heated / plain == pytest.approx(heat)
