"""MuonClip against torch.optim.Muon and AdamW, and QK-clip in float64."""

import math
from unittest import mock

import pytest
import torch
from torch.optim import _muon as torch_muon

from errors import UserError
from mla import MHA, MLA
from model import build
from muon import Muon, qk_clip_, schedule_factor
from routes import Route, route_parameters
from tests.helpers import tiny_config, tiny_model, tokens

SHAPES = {"square": (64, 64), "wide": (32, 128), "tall": (128, 32), "odd": (17, 53), "row": (1, 40)}


def grads_of(step, shapes):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fp32_newton_schulz(grad, coefficients, steps, eps):
    """torch.optim.Muon's iteration without its cast to bfloat16."""
    a, b, c = coefficients
    X = grad.T if grad.size(0) > grad.size(1) else grad
    X = X / X.norm().clamp(min=eps)
    for _ in range(steps):
        gram = X @ X.T
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.T if grad.size(0) > grad.size(1) else X


def run_both(ns_dtype, patch, nesterov=True, steps=10):
    start = grads_of(99, SHAPES)
    ours, theirs = ({n: torch.nn.Parameter(t.clone()) for n, t in start.items()} for _ in range(2))
    routes = {name: Route("muon", shape[0]) for name, shape in SHAPES.items()}
    optimizer = Muon(ours.items(), lr=0.01, weight_decay=0.1, nesterov=nesterov, ns_dtype=ns_dtype, routes=routes)
    other = torch.optim.Muon(
        theirs.values(), lr=0.01, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    with mock.patch.object(
        torch_muon,
        "_zeropower_via_newtonschulz",
        fp32_newton_schulz if patch else torch_muon._zeropower_via_newtonschulz,
    ):
        for step in range(steps):
            for name, grad in grads_of(step, SHAPES).items():
                ours[name].grad, theirs[name].grad = grad.clone(), grad.clone()
            optimizer.step()
            other.step()
    return start, ours, theirs, optimizer, other


@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_steps_equal_torch_muon_in_fp32(nesterov):
    start, ours, theirs, optimizer, other = run_both(torch.float32, patch=True, nesterov=nesterov)
    for name in SHAPES:
        moved, expected = ours[name] - start[name], theirs[name] - start[name]
        assert (moved - expected).norm() / expected.norm() <= 1e-5, name
        assert torch.equal(optimizer.state[ours[name]]["momentum"], other.state[theirs[name]]["momentum_buffer"])


def test_bf16_newton_schulz_stays_close_to_torch_muon():
    start, ours, theirs, *_ = run_both(torch.bfloat16, patch=False, steps=1)
    for name in SHAPES:
        moved, expected = (ours[name] - start[name]).flatten(), (theirs[name] - start[name]).flatten()
        assert torch.cosine_similarity(moved, expected, dim=0) >= 0.995
        assert (moved - expected).norm() / expected.norm() <= 0.06


def test_adamw_half_equals_torch_adamw():
    shapes = {"model.embed_tokens.weight": (40, 8), "model.norm.weight": (8,)}
    ours, theirs = ({n: torch.nn.Parameter(t) for n, t in grads_of(5, shapes).items()} for _ in range(2))
    optimizer = Muon(ours.items(), lr=1.0, adamw_lr=0.02, weight_decay=0.1)
    other = torch.optim.AdamW(theirs.values(), lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(10):
        for name, grad in grads_of(step, shapes).items():
            ours[name].grad, theirs[name].grad = grad.clone(), grad.clone()
        optimizer.step()
        other.step()
    assert optimizer.steps == 10
    for name in shapes:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6)


def one_step(shape, rows, grad, weight, **options):
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = grad.clone()
    Muon([("w", parameter)], lr=0.1, weight_decay=0.0, routes={"w": Route("muon", rows)}, **options).step()
    return parameter.detach()


@pytest.mark.parametrize("shape, rows", [((4, 12, 20), 12), ((4, 12, 20), 6), ((36, 20), 9)])
def test_logical_matrices_equal_separate_parameters(shape, rows):
    """An expert stack, gate above up, heads: each matrix is orthogonalised and scaled for itself."""
    grad, weight = torch.randn(shape), torch.randn(shape)
    together = one_step(shape, rows, grad, weight).reshape(-1, rows, shape[-1])
    apart = torch.stack(
        [
            one_step(w.shape, rows, g, w)
            for g, w in zip(grad.reshape(-1, rows, shape[-1]), weight.reshape(-1, rows, shape[-1]))
        ]
    )
    assert (together - apart).abs().max() <= 1e-6
    flat = one_step(
        (math.prod(shape[:-1]), shape[-1]), math.prod(shape[:-1]), grad.flatten(0, -2), weight.flatten(0, -2)
    )
    moved, flattened = together.flatten() - weight.flatten(), flat.flatten() - weight.flatten()
    assert torch.cosine_similarity(moved, flattened, dim=0) < 0.97


def test_update_is_orthogonal_of_the_right_size_and_follows_the_gradient():
    grad = torch.randn(64, 256)
    update = -one_step((64, 256), 64, grad, torch.zeros(64, 256), ns_coefficients="you") / 0.1
    values = torch.linalg.svdvals(update) / (0.2 * 16)
    assert 0.94 < values.min() and values.max() < 1.07
    assert update.pow(2).mean().sqrt().item() == pytest.approx(0.2, rel=0.04)
    assert (update * grad).sum() > 0
    assert not torch.allclose(update, -one_step((64, 256), 64, torch.randn(64, 256), torch.zeros(64, 256)) / 0.1)


def test_zero_gradient_is_only_weight_decay_and_gradients_stay_as_they_are():
    model = tiny_model()
    optimizer = Muon(model.named_parameters(), lr=0.05, weight_decay=0.2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()  # no gradients at all: the same as zero ones
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] * (1 - 0.05 * 0.2), rtol=1e-6)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))


def test_batching_limit_changes_nothing(monkeypatch):
    weights, grads = torch.randn(5, 16, 16), torch.randn(5, 16, 16)
    results = []
    for limit in (1, 600, 2**27):
        monkeypatch.setattr("owners.BATCH_ELEMENTS", limit)
        named = [(f"w{i}", torch.nn.Parameter(w.clone())) for i, w in enumerate(weights)]
        for (_, parameter), grad in zip(named, grads):
            parameter.grad = grad
        Muon(named, lr=0.1, routes={name: Route("muon", 16) for name, _ in named}).step()
        results.append(torch.stack([p.detach() for _, p in named]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_an_idle_expert_moves_on_along_its_decaying_momentum():
    """Newton-Schulz has no sense of scale: documented behaviour, not an accident."""
    stack = torch.nn.Parameter(torch.zeros(2, 16, 16))
    optimizer = Muon([("w", stack)], lr=1.0, weight_decay=0.0, routes={"w": Route("muon", 16)})
    sizes = []
    for step in range(400):
        stack.grad = torch.randn(2, 16, 16)
        stack.grad[1] *= step == 0  # the second expert gets a gradient once
        before = stack.detach().clone()
        optimizer.step()
        sizes.append((stack.detach() - before)[1].norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3) and sizes[300] == pytest.approx(sizes[1], rel=1e-2)
    assert optimizer.state[stack]["momentum"][1].abs().max() < 1e-8 and stack.isfinite().all()


def after_one_step(seen=16, **changes):
    """The parameters of a tiny model before and after a Muon step on sequences of `seen` tokens, with the gradients."""
    model, x = tiny_model(**changes), tokens(8, seen + 1)
    model(x[:, :-1], x[:, 1:])[0].div(8 * seen).backward()
    optimizer = Muon(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    found = {name: [p.detach().clone(), p.grad.clone()] for name, p in model.named_parameters()}
    optimizer.step()
    return {name: (*found[name], p.detach(), optimizer.state[p]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("what, seen, changes", [
    ("mlp.gate.weight", 16, {"num_experts_per_tok": 1}),  # its one weight is s / s
    ("mlp.gate.weight", 16, {"num_experts_per_tok": 1, "n_routed_experts": 1}),
    ("self_attn.q_proj.weight", 1, {}),  # a softmax over one key
])
def test_a_matrix_whose_gradient_is_rounding_noise_is_left_alone(what, seen, changes):
    """The exact gradient of these is zero; what rounding leaves would move them as far as any other matrix."""
    moved = {}
    for name, (before, grad, after, state) in after_one_step(seen, **changes).items():
        moved[name] = (after - before).pow(2).mean().sqrt().item()
        if name.endswith(what):
            assert grad.abs().max() < 1e-8 and moved.pop(name) == 0 and not state["momentum"].any(), name
        elif "self_attn.o_proj" in name or "shared_experts" in name:
            assert moved[name] > 5e-4, name  # 0.2 lr, less where eight tokens make a matrix of rank eight


def test_routers_with_a_gradient_move_at_full_size():
    for changes in ({}, {"num_experts_per_tok": 1, "norm_topk_prob": False}):
        for name, (before, _, after, _) in after_one_step(**changes).items():
            if name.endswith("gate.weight"):
                assert (after - before).pow(2).mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.3)


def test_noise_is_judged_matrix_by_matrix_and_beside_all_gradients():
    """Bitwise as if it were zero, whatever the scale of all; alone it is no noise, and nothing else is hidden."""
    weights, grads = torch.randn(3, 8, 16), torch.randn(3, 8, 16)

    def moved(grads):
        stack = torch.nn.Parameter(weights.clone())  # three experts
        optimizer = Muon([("w", stack)], lr=0.1, routes={"w": Route("muon", 8)})
        for size in (1.0, *grads.new_ones(2)):
            stack.grad = grads * size
            optimizer.step()
        return torch.stack((stack.detach(), optimizer.state[stack]["momentum"]))

    zeros, noise, small = grads.clone(), grads.clone(), grads.clone()
    zeros[1], noise[1], small[1] = 0, noise[1] * 1e-7, small[1] * 1e-5
    for scale in (1.0, 1e-9, 1e6):
        assert torch.equal(moved(noise * scale), moved(zeros * scale))
    assert not torch.equal(moved(small)[0, 1], moved(zeros)[0, 1]) and moved(small)[1, 1].all()
    assert moved(noise[1].expand(3, 8, 16))[1].all()
    noise[2, 0, 0] = torch.nan
    assert moved(noise)[1, 2].isnan().any()


# ---------------------------------------------------------------------- routing


def test_routing_table_is_exact():
    model = tiny_model(q_lora_rank=24)
    routes = route_parameters(model.named_parameters())
    assert set(routes) == {name for name, _ in model.named_parameters()}
    adamw = {name for name, route in routes.items() if route.optimizer == "adamw"}
    assert adamw == {n for n, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in n or "lm_head" in n}
    layer = {
        n.removeprefix("model.layers.1."): r.rows
        for n, r in routes.items()
        if n.startswith("model.layers.1.") and r.rows
    }
    assert layer == {
        "self_attn.q_a_proj.weight": 24,
        "self_attn.q_b_proj.weight": 48,
        "self_attn.kv_a_proj_with_mqa.weight": 20,
        "self_attn.kv_b_proj.weight": 64,
        "self_attn.o_proj.weight": 32,
        "mlp.gate.weight": 8,
        "mlp.experts.gate_up_proj": 16,
        "mlp.experts.down_proj": 32,
        "mlp.shared_experts.gate_proj.weight": 16,
        "mlp.shared_experts.up_proj.weight": 16,
        "mlp.shared_experts.down_proj.weight": 32,
    }
    heads = route_parameters(model.named_parameters(), per_head=4)
    assert heads["model.layers.0.self_attn.q_b_proj.weight"].rows == 12
    assert heads["model.layers.0.self_attn.kv_b_proj.weight"].rows == 16
    everything = route_parameters(model.named_parameters(), "adamw")
    assert {route.optimizer for route in everything.values()} == {"adamw"}


def test_unknown_parameter_is_an_error_and_tied_weights_are_owned_once():
    with pytest.raises(UserError, match="no optimizer route for parameter model.mystery"):
        route_parameters([("model.mystery", torch.zeros(2, 2))])
    model = tiny_model(tie_word_embeddings=True)
    optimizer = Muon(model.named_parameters())
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))


# ---------------------------------------------------------------------- QK-clip


def logits_of(attention, x, rope):
    """Every head's scaled logits (H, T, T), by hand from the projections, in x's dtype."""
    from mla import apply_rope

    if isinstance(attention, MHA):
        q, k = (apply_rope(p(x).unflatten(-1, (attention.H, -1)), rope) for p in (attention.q_proj, attention.k_proj))
        return torch.einsum("bthu,bshu->hts", q, k) * attention.U**-0.5
    q = attention.q_proj(x).unflatten(-1, (attention.H, -1))
    latent, k_rope = attention.kv_a_proj_with_mqa(x).split((attention.R, attention.P), -1)
    k = attention.kv_b_proj(attention.kv_a_layernorm(latent)).unflatten(-1, (attention.H, -1))[..., : attention.N]
    q = torch.cat((q[..., : attention.N], apply_rope(q[..., attention.N :], rope)), -1)
    k = torch.cat((k, apply_rope(k_rope.unsqueeze(2), rope).expand(-1, -1, attention.H, -1)), -1)
    return torch.einsum("bthq,bshq->hts", q, k) * attention.scale


@pytest.mark.parametrize("kind", [MLA, MHA])
def test_qk_clip_scales_the_logits_of_clipped_heads_only(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms and RoPE in float64 too
    attention = kind(tiny_config()).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    angle = torch.arange(20)[:, None] * torch.rand((4 if kind is MLA else 8) // 2, dtype=torch.float64)
    rope = (angle.cos(), angle.sin())
    before = logits_of(attention, x, rope)
    maxima = before.flatten(1).amax(1)
    tau = maxima.sort().values[1:3].mean().item()  # two heads above, two below
    weights = {n: p.detach().clone() for n, p in attention.named_parameters()}
    layer = mock.Mock(self_attn=attention)
    clipped = qk_clip_([layer], maxima[None], tau)
    after = logits_of(attention, x, rope)
    assert clipped == 2
    for head in range(4):
        gamma = min(1.0, tau / maxima[head].item())
        assert (after[head] - gamma * before[head]).abs().max() <= 1e-10
        if gamma == 1.0:
            assert torch.equal(after[head], before[head])
        else:
            assert after[head].max().item() == pytest.approx(tau, abs=1e-10)
    for name, parameter in attention.named_parameters():
        if name.split(".")[0] not in ("q_proj", "k_proj", "kv_b_proj"):
            assert torch.equal(parameter, weights[name]), name
    if kind is MLA:  # value rows
        rows = attention.kv_b_proj.weight.unflatten(0, (4, -1))[:, attention.N :]
        assert torch.equal(rows, weights["kv_b_proj.weight"].unflatten(0, (4, -1))[:, attention.N :])


@pytest.mark.parametrize(
    "value, clipped", [(-500.0, 0), (0.0, 0), (100.0, 0), (math.inf, 0), (math.nan, 0), (-math.inf, 0), (100.1, 1)]
)
def test_qk_clip_of_odd_maxima(value, clipped):
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    maxima = torch.full((3, 4), 5.0)
    maxima[1, 2] = value
    assert qk_clip_(model.layers, maxima, 100.0) == clipped
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    expected = {f"model.layers.1.self_attn.{n}.weight" for n in ("q_proj", "kv_b_proj")} if clipped else set()
    assert changed == expected and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_qk_clip_holds_a_forced_blow_up(attention):
    """Logits forced to hundreds come back to tau in the next forward; without the clip they stay."""
    results = {}
    for tau in (30.0, math.inf):
        model, x = tiny_model(attention=attention), tokens(4, 33)
        with torch.no_grad():
            model.layers[2].self_attn.q_proj.weight.mul_(60)
        for _ in range(2):
            model.reset_statistics()
            model(x[:, :-1], x[:, 1:])
            qk_clip_(model.layers, model.max_logits, tau)
        results[tau] = model.max_logits[2].max().item()
    assert results[math.inf] > 60 and results[30.0] == pytest.approx(30.0, rel=1e-3)


# ---------------------------------------------------------------------- schedule


def test_schedules_at_every_landmark():
    wsd = [schedule_factor(s, "wsd", 100, 10, 20, 0.1) for s in range(1, 101)]
    assert (
        wsd[0] == 0.1
        and wsd[9] == 1.0
        and wsd[79] == 1.0
        and wsd[89] == pytest.approx(0.55)
        and wsd[99] == pytest.approx(0.1)
    )
    cosine = [schedule_factor(s, "cosine", 100, 10, 20, 0.1) for s in range(1, 101)]
    assert cosine[9] == 1.0 and cosine[54] == pytest.approx(0.55) and cosine[99] == pytest.approx(0.1)
    assert cosine == sorted(cosine[:10]) + sorted(cosine[10:], reverse=True)
    assert [schedule_factor(s, "constant", 100, 0, 20, 0.1) for s in (1, 50, 100)] == [1.0] * 3
    assert schedule_factor(1, "wsd", 1, 0, 0, 0.1) == pytest.approx(1.0)  # a run of one step learns
    short = [schedule_factor(s, "wsd", 100, 40, 500, 0.1) for s in range(1, 101)]  # decay longer than what is left
    assert short[39] == 1.0 and short[:40] == sorted(short[:40]) and short[99] == pytest.approx(0.1)


def test_muon_learns_faster_than_adamw_on_a_tiny_moe():
    """Half the loss after 15 steps, each at the best of three learning rates, on the same data: which token follows
    which, a fixed permutation."""
    follows, best = torch.randperm(97, generator=torch.Generator().manual_seed(0)), {}
    for kind in ("muon", "adamw"):
        losses = []
        for lr in (1e-2, 3e-2, 1e-1):
            model = build(tiny_config(initializer_range=0.02), "cpu").init_weights(0)
            optimizer = Muon(model.named_parameters(), lr, routes=route_parameters(model.named_parameters(), kind))
            for step in range(15):
                x = [tokens(8, 1, seed=step)[:, 0]]
                for _ in range(32):
                    x.append(follows[x[-1]])
                x = torch.stack(x, 1)
                loss, _ = model(x[:, :-1], x[:, 1:])
                (loss / x[:, 1:].numel()).backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item() / x[:, 1:].numel())
        best[kind] = min(losses)
    assert best["muon"] < 0.5 * best["adamw"], best
