"""bench.verdict: its statistics against tables, verdicts and bounds by hand, what cannot be said."""

import json
import math

import pytest

from bench import verdict
from errors import UserError


@pytest.mark.parametrize("freedom, five, one", [(1, 12.7062, 63.6567), (2, 4.30265, 9.92484), (3, 3.18245, 5.84091),
                                                (4, 2.77645, 4.60409), (9, 2.26216, 3.24984), (30, 2.04227, 2.75)])
def test_the_t_distribution_against_a_table(freedom, five, one):
    for t, p in ((five, 0.05), (one, 0.01), (-five, 0.05), (0.0, 1.0)):
        assert verdict.two_sided_p(t, freedom) == pytest.approx(p, abs=2e-6)


def test_spread_of_values():
    found = verdict.spread([1.0, 2.0, 3.0])  # t = 2 sqrt(3), and with 2 degrees of freedom p = 1 - t / sqrt(t² + 2)
    assert (found["mean"], found["sd"]) == (2.0, 1.0) and found["p"] == pytest.approx(1 - math.sqrt(12 / 14))
    assert verdict.spread([5.0]) == {"each": [5.0], "mean": 5.0, "sd": None, "p": None}
    assert verdict.spread([2.0, 2.0])["p"] == 0 and verdict.spread([0.0, 0.0])["p"] == 1
    assert verdict.spread([1e-16, 2e-16, 1e-16])["p"] == 1  # what logarithms and their powers leave of nothing


def test_a_crossing_is_on_the_line_in_the_logarithm():
    runs = [(1000, 3.0), (4000, 2.0), (16000, 1.8)]
    assert verdict.crossing(runs, 2.5) == (pytest.approx(2000), False)
    assert verdict.crossing(runs, 1.9) == (pytest.approx(8000), False)
    assert verdict.crossing(runs, 3.5) == (pytest.approx(500), True)
    assert verdict.crossing(runs, 1.7) == (pytest.approx(32000), True)
    assert verdict.crossing([(1000, 2.0), (2000, 2.0)], 1.5) is None
    assert verdict.crossing([(1000, 2.0), (2000, 1.99999)], 1.0) is None  # a line that leads nowhere
    assert verdict.crossing([(1000, 2.0)], 1.5) is None  # of the others, all diverged
    assert verdict.crossing(runs, 2.0) == (4000, False) and verdict.crossing([(1000, 2.0)], 2.0) == (1000, False)


def made_up(losses, tokens, pace, trouble=""):
    return [{"seed": seed, "tokens": tokens, "seconds": pace * tokens, "trouble": trouble, "muon_lr": 1e-2,
             "clipped_heads": 0, "curve": [{"tokens": tokens, "seconds": pace * tokens, "loss": loss,
                                            "bits_per_byte": loss / 2}]} for seed, loss in enumerate(losses)]


def test_a_verdict_by_hand():
    """The challenger's loss is 3 - log2(tokens / 1000), the baseline's final ones are those of 500 and 700 tokens."""
    ours = lambda tokens: made_up([3 - math.log2(tokens / 1000)] * 2, tokens, 3.0)
    targets = [3 - math.log2(0.5), 3 - math.log2(0.7)]
    base = made_up(targets, 1000, 2.0)
    assert verdict.next_share({}, verdict.mean_loss(base)) == 0.7
    assert verdict.next_share({0.7: ours(700)}, verdict.mean_loss(base)) == 0.5  # on the mean it still is better
    assert verdict.next_share({0.7: ours(700), 0.5: ours(500)}, verdict.mean_loss(base)) is None
    found = verdict.judge(ours(1000), base, {0.7: ours(700), 0.5: ours(500)}, (10.0, 8.0))
    assert found["better"] == "challenger" and found["extrapolated_seeds"] == [] == found["untold_seeds"]
    assert found["tokens"]["each"] == pytest.approx([0.5, 0.7])
    assert found["seconds"]["each"] == pytest.approx([0.75, 1.05])
    assert found["flops"]["each"] == pytest.approx([0.625, 0.875])
    assert found["tokens"]["mean"] == pytest.approx(0.6) and found["tokens"]["sd"] == pytest.approx(0.2 / math.sqrt(2))
    centre, half = (math.log(0.5) + math.log(0.7)) / 2, (math.log(0.7) - math.log(0.5)) / 2
    p = 1 - 2 / math.pi * math.atan(abs(centre) / half)  # of one degree of freedom, which is Cauchy's
    assert found["tokens"]["p"] == pytest.approx(p)
    differences = [3 - target for target in targets]
    assert found["loss_difference"]["mean"] == pytest.approx(sum(differences) / 2)
    said = "\n".join(verdict.said("moe", "dense", found))
    assert "x 0.600 ± 0.141" in said and "x 0.900" in said and "n = 2 seeds, paired t-test" in said


def test_the_worse_challenger_needs_more():
    worse, better = made_up([2.5], 1000, 3.0), made_up([2.0], 1000, 2.0)
    found = verdict.judge(worse, better, {0.5: made_up([3.0], 500, 1.0)}, (1.0, 1.0))
    assert found["better"] == "baseline" and found["tokens"]["mean"] == pytest.approx(math.sqrt(2))
    assert found["seconds"]["mean"] == pytest.approx(1.5 * math.sqrt(2)) and found["tokens"]["p"] is None
    assert "one seed: no spread, no p" in "\n".join(verdict.said("a", "b", found))


def test_beyond_the_shortest_run_there_is_only_a_bound():
    base, shares = made_up([3.0, 3.0], 1000, 2.0), {0.7: 700, 0.5: 500, 0.35: 350}
    shorter = {share: made_up([2.0, 2.0], tokens, 9.0) for share, tokens in shares.items()}
    assert verdict.next_share(shorter, 3.0) is None
    found = verdict.judge(made_up([1.0, 1.0], 1000, 4.0), base, shorter, (1.0, 1.0))
    assert found["tokens"] == {"bound": "less than", "mean": pytest.approx(0.35)}
    assert found["seconds"] == {"bound": "less than", "mean": pytest.approx(0.7)}
    found = verdict.judge(base, made_up([1.0, 1.0], 1000, 4.0), shorter, (1.0, 1.0))
    assert found["tokens"] == {"bound": "more than", "mean": pytest.approx(1 / 0.35)}
    assert "more than 2.857" in "\n".join(verdict.said("a", "b", found))
    shorter[0.35] = made_up([2.0, 2.0], 500, 9.0)  # a share of few steps: what was trained counts
    assert verdict.judge(made_up([1.0, 1.0], 1000, 4.0), base, shorter, (1.0, 1.0))["tokens"]["mean"] == 0.5


def test_a_bound_needs_every_seed_and_a_shorter_run():
    base = made_up([3.001, 3.2, 2.8], 1000, 1.0)  # the last seed alone is below the shortest run, the mean above it
    ours, shorter = made_up([2.5] * 3, 1000, 1.0), {0.35: made_up([3.0] * 3, 350, 1.0)}
    found = verdict.judge(ours, base, shorter, (1.0, 1.0))
    assert "bound" not in found["tokens"] and found["extrapolated_seeds"] == [0, 1]
    assert found["tokens"]["each"][2] == pytest.approx(0.35 * (1 / 0.35) ** 0.4)
    assert "tokens" not in verdict.judge(ours, base, {}, (1.0, 1.0))  # better, by how much nobody has tried


def test_equal_arms_need_the_same():
    runs = made_up([3.1, 2.9, 3.0], 1000, 1.0)
    found = verdict.judge(runs, runs, {0.7: made_up([3.4] * 3, 700, 1.0)}, (1.0, 1.0))
    assert all(found[name]["mean"] == 1 and found[name]["p"] == 1 for name in ("tokens", "seconds", "flops"))


def test_no_ratio_leaves_out_the_seed_that_contradicts_it():
    """Three seeds need about 0.77 of the tokens, the fourth more than is known: the three alone would have p 0.002."""
    base = made_up([3.12, 3.11, 3.13, 2.66], 1000, 1.0)
    ours = lambda tokens: made_up([3 - 0.46 * math.log(tokens / 1000)] * 4, tokens, 1.2)
    found = verdict.judge(ours(1000), base, {0.7: ours(700)}, (1.0, 1.0))
    assert found["untold_seeds"] == [3] and "tokens" not in found and found["loss_difference"]["p"] > 0.9
    state = {"verdict": {"moe": found}, "baseline": "dense", "made_on": {"device": "a laptop"}}
    assert verdict.sentence("moe", state) == "" and "seed 3 does not say" in "\n".join(
        verdict.said("moe", "dense", found))


def test_a_contest_that_has_ended_is_told_again(tmp_path, capsys):
    """The dense model has the loss of 500 of 1,000 tokens, at two thirds of the challenger's pace."""
    ours = lambda tokens: made_up([3 - math.log2(tokens / 1000)], tokens, 3.0)
    base, short = made_up([4.0], 1000, 2.0), ours(350)
    state = {"baseline": "dense", "made_on": {"device": "a laptop"}, "command": ["moe-dense", "--lr=1,2"], "runs": {
        key: {"arm": arm, "share": share, **run} for key, arm, share, (run,) in (
            ("a", "moe", 1.0, ours(1000)), ("b", "dense", 1.0, base), ("c", "moe", 0.35, short))}}
    about = dict(parameters=2e6, active_parameters=1e6, flops_per_token=5e6, settings={})
    state |= {"arms": {"moe": about, "dense": about}, "verdict": {"moe": verdict.judge(
        ours(1000), base, {0.35: short}, (1.0, 1.0))}}
    (tmp_path / "contest.json").write_text(json.dumps(state), encoding="utf-8")
    verdict.main([str(tmp_path / "contest.json")])
    *_, last, how = capsys.readouterr().out.splitlines()
    assert "needs 0.50 times the tokens and 0.75 times the seconds of the dense model" in last and "--lr=1,2" in how
    (tmp_path / "contest.json").write_text(json.dumps(state | {"verdict": {}}), encoding="utf-8")
    with pytest.raises(UserError, match="no verdict yet"):
        verdict.main([str(tmp_path / "contest.json")])


def test_many_challengers_in_order():
    base, lost = made_up([3.0], 1000, 1.0), made_up([3.0], 1000, 1.0, "10 non-finite steps")
    verdicts = {name: verdict.judge(runs, base, {0.7: made_up([3.2], 700, 1.0)}, (1.0, 1.0))
                for name, runs in {"a": made_up([2.5], 1000, 1.0), "b": lost, "c": made_up([2.0], 1000, 2.0)}.items()}
    lines = verdict.ranking(verdicts, "dense")
    assert [line.split()[0] for line in lines] == ["against", "c", "a", "b"] and "diverged" in lines[3]
    assert lines[1].split()[1] == "-1.0000" and float(lines[1].split()[3]) == pytest.approx(
        2 * float(lines[1].split()[2]), rel=2e-3)  # the pace


def test_a_seed_against_the_mean_is_marked():
    base = made_up([3.0, 2.0], 1000, 1.0)
    ours, shorter = made_up([2.0, 2.2], 1000, 1.0), {0.5: made_up([3.2, 3.2], 500, 1.0)}
    found = verdict.judge(ours, base, shorter, (1.0, 1.0))
    assert found["extrapolated_seeds"] == [1] and found["tokens"]["each"][1] == pytest.approx(2 ** 0.2)
    assert "seed 1 extrapolated" in "\n".join(verdict.said("a", "b", found))


def test_the_picture(tmp_path):
    runs = {"moe": made_up([2.0, 2.1], 1000, 3.0), "dense": made_up([2.5, 2.4], 1000, 2.0), "lost": []}
    found = verdict.judge(runs["moe"], runs["dense"], {0.7: made_up([2.6, 2.5], 700, 3.0)}, (1.0, 1.0))
    verdict.draw(tmp_path / "contest.png", "moe-dense", runs, {"moe": found, "lost": {"diverged": ["all"]}}, "dense")
    assert (tmp_path / "contest.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
