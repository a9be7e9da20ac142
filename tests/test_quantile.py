"""Quantile balancing and the routers' z-loss, against sorted scores, literal loops and autograd."""

import math

import numpy as np
import pytest
import torch

from errors import UserError
from kernels import backend, quantile, routing
from kernels.cross_entropy import IGNORE
from moe import Router
from run import metrics
from tests.helpers import records, run_train, tiny_config, tiny_model, tokens

GROUPS = pytest.mark.parametrize("E, K, G, kept", [(16, 4, 1, 1), (64, 7, 1, 1), (16, 3, 4, 2), (64, 6, 8, 3)])


def skewed_logits(N, E, generator, skew=0.7):
    """Tokens that agree about the experts, by an amount that differs from expert to expert."""
    means = skew * torch.randn(E, generator=torch.Generator().manual_seed(99))
    return torch.randn(N, E, generator=generator) + means


def exact_biases(needed_NE, top_k):
    """Mean-centred quantiles by sorting: of N tokens an expert takes the N K / E that need least."""
    N, E = needed_NE.shape
    quantile_E = needed_NE.double().sort(0).values[round(N * top_k / E) - 1]
    return quantile_E - quantile_E.mean()


def load(logits_NE, bias_E, options):
    """Every expert's tokens over the mean."""
    counts_E = routing.route(logits_NE, bias_E, 1, *options)[3].float()
    return counts_E / counts_E.mean()


@GROUPS
def test_needed_biases_are_cutoff_less_score_token_by_token(E, K, G, kept):
    generator = torch.Generator().manual_seed(0)
    logits, bias = skewed_logits(40, E, generator), 0.2 * torch.randn(E, generator=generator)
    _, chosen, _ = routing.choose(logits, bias, K, G, kept)
    needed = quantile.needed_biases(logits, bias, chosen, G, kept)
    for n in range(40):
        scores = logits[n].double().sigmoid()
        biased = (scores + bias.double()).view(G, -1)
        groups = biased.topk(2).values.sum(-1).topk(kept).indices if G > 1 else [0]
        cutoff = torch.cat([biased[g] for g in groups]).sort(descending=True).values[K]  # the best that is not chosen
        torch.testing.assert_close(needed[n].double(), cutoff - scores, rtol=0, atol=1e-6)
    if G == 1:  # an expert is chosen where its bias is above what it needed, and only there
        expected = torch.zeros(40, E, dtype=torch.bool).scatter(1, chosen, True)
        assert torch.equal(bias > needed + 1e-7, expected)


@GROUPS
def test_the_solution_is_the_quantile_of_sorted_scores(E, K, G, kept):
    """And the load is as even with the biases of the histogram as with the exact ones."""
    generator, N = torch.Generator().manual_seed(1), 4096
    bias = 0.1 * torch.randn(E, generator=generator)
    logits = skewed_logits(N, E, generator)
    _, chosen, _ = routing.choose(logits, bias, K, G, kept)
    needed = quantile.needed_biases(logits, bias, chosen, G, kept)
    solved = quantile.solve(quantile.histogram(needed, bias).long(), bias, K)
    exact = exact_biases(needed, K)
    torch.testing.assert_close(solved.double(), exact, rtol=0, atol=(2 + 0.6) / quantile.BINS)
    assert solved.mean().abs() < 1e-6
    spread = [load(logits, b, (K, G, kept)).std().item() for b in (bias, solved, exact.float())]
    assert abs(spread[1] - spread[2]) < 0.02 and spread[1] < spread[0] / 2
    logits = skewed_logits(8, E, generator)  # fewer tokens than bins
    needed = quantile.needed_biases(logits, bias, routing.choose(logits, bias, K, G, kept)[1], G, kept)
    solved = quantile.solve(quantile.histogram(needed, bias).long(), bias, K)
    assert solved.isfinite().all() and (solved.max() - solved.min()) < 2.6


@pytest.mark.parametrize("E, K, G, kept, least, most", [
    (64, 7, 1, 1, 4, 1.2), (16, 4, 1, 1, 2, 1.2), (64, 6, 8, 3, 4, 1.6), (16, 4, 4, 2, 2, 1.3)])
def test_a_skewed_router_is_even_after_three_steps(E, K, G, kept, least, most):
    """On fresh tokens in every step, in micro-batches, and without circling when groups are limited."""
    generator, bias, options = torch.Generator().manual_seed(2), torch.zeros(E), (K, G, kept)
    for step in range(8):
        total, logits = torch.zeros(E, quantile.BINS, dtype=torch.int64), skewed_logits(8192, E, generator, 1.0)
        busiest = load(logits, bias, options).max()
        assert busiest > least if step == 0 else step < 3 or busiest < most, (step, busiest)
        for part in logits.split(2048):
            _, chosen, _ = routing.choose(part, bias, *options)
            total += quantile.histogram(quantile.needed_biases(part, bias, chosen, G, kept), bias)
        bias = quantile.solve(total, bias, K)


def test_histograms_add_up_and_leave_out_what_is_no_token():
    generator = torch.Generator().manual_seed(3)
    needed, bias = torch.rand(300, 5, generator=generator) - 0.5, torch.tensor([0.0, 0.1, -0.2, 0.3, 0.0])
    whole = quantile.histogram(needed, bias)
    assert whole.dtype == torch.int32 and (whole.sum(1) == 300).all()
    parts = [quantile.histogram(part, bias) for part in needed.split(77)]
    assert torch.equal(sum(parts), whole) and torch.equal(quantile.histogram(needed.flip(0), bias), whole)
    real = torch.rand(300, generator=generator) < 0.6
    assert torch.equal(quantile.histogram(needed, bias, real), quantile.histogram(needed[real], bias))
    for e in range(5):
        expected = np.histogram(needed[:, e].double(), quantile.BINS, (-1.2, 1.3))[0]
        assert (whole[e] - torch.tensor(expected)).abs().sum() <= 2  # one at the edge of a bin may round


def test_what_is_no_number_does_no_harm_to_memory():
    needed = torch.tensor([[math.nan, math.inf, -math.inf]] * 4)
    assert quantile.histogram(needed, torch.zeros(3)).sum() == 12


def test_without_a_token_biases_stay():
    bias = torch.tensor([0.1, -0.2, 0.1])
    assert torch.equal(quantile.solve(torch.zeros(3, quantile.BINS, dtype=torch.int64), bias, 1), bias)


# ---------------------------------------------------------------------- the router and the model


@pytest.mark.skipif(not backend.INTERPRETED, reason="Triton's kernels do not run on this CPU")
@pytest.mark.parametrize("G, kept", [(1, 1), (4, 2)])
def test_tritons_router_and_its_twin_find_the_same_biases(G, kept):
    generator, found = torch.Generator().manual_seed(5), []
    router = Router(12, 16, 4, G, kept, True, 1.0, "quantile", z_loss=True)
    x = torch.randn(400, 12, generator=generator)
    with torch.no_grad():
        router.weight.copy_(torch.randn(16, 12, generator=generator))
        router.e_score_correction_bias.copy_(0.1 * torch.randn(16, generator=generator))
    before = router.e_score_correction_bias.clone()
    for on in (False, True):
        with backend.running(on):
            routed = router(x, 4)[2]
        router.e_score_correction_bias.copy_(before)
        router.solve_bias_(routed.histogram_EC.long())
        found.append((router.e_score_correction_bias.clone(), routed.z))
        router.e_score_correction_bias.copy_(before)
    assert (found[0][0] - before).abs().max() > 0.05
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-5) for a, b in zip(*found))


def forward(model, x, targets):
    loss, balance = model(x, targets)
    (loss + balance).backward()
    return loss.detach()


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_micro_batches_and_recompute_change_no_bias(mode):
    """Counted once, without the places that packing left empty, and not in evaluation."""
    model, x = tiny_model(balance="quantile", n_group=4, topk_group=2), tokens(4, 33)
    targets = x[:, 1:].clone()
    targets[1, 20:] = targets[3, :5] = IGNORE
    forward(model, x[:, :-1], targets)
    expected = model.routing.histograms.clone()
    assert (expected.sum(-1) == (4 * 32 - 12 - 5)).all() and expected.shape[:2] == (2, 8)
    model.reset_statistics()
    assert not model.routing.histograms.any()
    for layer in model.layers:
        layer.recompute = mode
    for rows in (slice(0, 1), slice(1, 4)):
        forward(model, x[rows, :-1], targets[rows])
    model.eval()(x[:, :-1], targets)
    before = model.routing.biases().clone()
    model.routing.balance_(rate=0.5)
    solved = [quantile.solve(histogram, bias, 2) for histogram, bias in zip(expected, before)]
    assert torch.allclose(model.routing.biases(), torch.stack(solved), atol=1e-5)
    assert ((model.routing.biases() - before).abs().amax(-1) > 0.01).all()


def test_signs_move_biases_as_before_and_none_leaves_them():
    x = tokens(4, 33)
    for balance in ("sign", "none"):
        model = tiny_model(balance=balance)
        before = model.routing.biases().clone()
        forward(model, x[:, :-1], x[:, 1:])
        counts = model.routing.expert_counts.float()
        sign = (counts.mean(-1, keepdim=True) - counts).sign()
        model.routing.balance_(0.01)
        moved = before + 0.01 * (sign - sign.mean(-1, keepdim=True))
        assert torch.equal(model.routing.biases(), moved if balance == "sign" else before)
        assert len(model.routing.histograms) == 0


def test_a_router_that_chooses_all_has_no_cutoff():
    for changes in (dict(num_experts_per_tok=8), dict(n_group=4, topk_group=1, num_experts_per_tok=2)):
        with pytest.raises(UserError, match="--balance=sign"):
            tiny_config(balance="quantile", **changes)
        tiny_config(balance="sign", **changes)
    tiny_config(balance="quantile", n_routed_experts=0, num_experts_per_tok=1)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_routers_z_loss_is_in_the_gradient_alone(monkeypatch, mode):
    """Against autograd on the logits themselves; empty places have none, micro-batches add up."""
    x, logits, weight = tokens(3, 17), [], 0.05
    targets = x[:, 1:].clone()
    targets[2, 9:] = IGNORE
    plain, ours = tiny_model(), tiny_model(router_z_loss=weight)
    with monkeypatch.context() as patch:
        original = routing.router_logits
        patch.setattr(routing, "router_logits", lambda *a: (logits.append(original(*a)), logits[-1])[1])
        loss, balance = plain(x[:, :-1], targets)
    real = (targets != IGNORE).flatten()
    z = sum(layer[real].exp().sum(-1).log().square().sum() for layer in logits)
    (loss + balance + weight * z).backward()
    for layer in ours.layers:
        layer.recompute = mode
    losses = [forward(ours, x[rows, :-1], targets[rows]) for rows in (slice(0, 2), slice(2, 3))]
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-6)
    assert ours.routing.z.item() == pytest.approx(z.item(), rel=1e-5) and plain.routing.z == 0
    for (name, p), q in zip(plain.named_parameters(), ours.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item() + 1e-7), name


# ---------------------------------------------------------------------- the alarm


def test_the_alarm_names_idle_and_crowded_experts_once():
    alarm = metrics.RoutingAlarm(tiny_config(balance="sign"))  # 8 experts, 2 a token; the first layer is dense
    even, bad = torch.full((2, 8), 25), torch.full((2, 8), 25)
    bad[1] = torch.tensor([60, 51, 40, 49, 0, 0, 0, 0])  # of 100 tokens
    def after(steps, counts):
        for _ in range(steps):
            alarm.count(counts)
        return [(event["layer"], event["trouble"], event["experts"]) for event in alarm.raised()]
    told = [(2, "no tokens", [4, 5, 6, 7]), (2, "more than half of all tokens", [0, 1])]
    assert after(1, even) == [] and after(metrics.STEADY - 1, bad) == [] and after(1, bad) == told
    assert after(100, bad) == [] and after(1, even) == [] and after(metrics.STEADY - 1, bad) == []
    assert after(1, bad) == told
    half = metrics.RoutingAlarm(tiny_config(n_routed_experts=4, num_experts_per_tok=2))
    for _ in range(60):
        half.count(torch.tensor([[100, 100, 0, 0]]))  # an even load is half of the tokens already
    assert [event["trouble"] for event in half.raised()] == ["no tokens"]
    dense = metrics.RoutingAlarm(tiny_config(n_routed_experts=0))
    dense.count(torch.zeros(0, 0, dtype=torch.int64))
    assert dense.raised() == []


def test_a_run_records_and_says_what_alarms(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "STEADY", 3)
    words = ["--max_steps=6", "--log_interval=2", "--n_routed_experts=128", "--balance=none", "--router_z_loss=1e-3"]
    run_train(config, *words)
    events = [event for event in records(tmp_path / "run", "event") if event["event"] == "routing"]
    assert {event["layer"] for event in events} == {1, 2} and {event["step"] for event in events} <= {4, 6}
    assert all(event["trouble"] == "no tokens" and event["experts"] for event in events)
    assert "step 4: layer 1: no tokens for 3 steps, experts [" in capsys.readouterr().out
    z = [record["router_z_loss"] for record in records(tmp_path / "run")]
    assert z[0] == pytest.approx(2 * math.log(128) ** 2, rel=0.05) and z[-1] < z[0]  # logits near 0, in two layers
