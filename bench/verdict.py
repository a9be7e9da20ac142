"""What a contest says: the tokens, seconds and FLOPs that a challenger needs over those of the baseline, to the final
loss of the worse one, with their spread over seeds; the table and the picture. Of a contest that has ended, again:

    python -m bench.verdict out/contest-moe-dense/contest.json

The final losses of whole schedules are compared, never points along one curve: a learning rate that still has to decay
hides what a run is worth. The arm that is better on the mean is trained again with its whole schedule in a share of its
tokens, and loss over log(tokens) of these runs is interpolated, seed by seed, for the other's final loss.

p-values: Student's paired two-sided t-test over seeds, of log ratios against 0 and of differences of losses against 0.
"""

import math
import os
import shlex
import statistics
from pathlib import Path

import errors
from data.shards import read_json
from errors import UserError, existing

SHARES = (0.7, 0.5, 0.35)  # of its tokens, in which the better arm is trained again
BEYOND = 2.0  # times the longest run, or the shortest over it: how far a line is trusted
ROUNDING = 1e-12  # of numbers that are equal


# ----------------------------------------------------------------------------- statistics

def two_sided_p(t, freedom):
    """The probability that |t| is so large by chance, for a whole number of degrees of freedom (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4)."""
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (1.0, 0.0) if freedom % 2 == 0 else (cosine, 0.0)
    for k in range(2 + freedom % 2, freedom + 1, 2):  # the powers of the cosine with their growing factors
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = sine * total if freedom % 2 == 0 else 2 / math.pi * (angle + sine * total)
    return max(1 - inside, 0.0)


def spread(values, tested=None):
    """{"each", "mean", "sd", "p"} of one value a seed; sd and p are None for one seed. tested: the values whose mean is
    compared with 0 for p, these themselves if None."""
    n, tested = len(values), values if tested is None else tested
    mean, sd, p = statistics.fmean(values), None, None
    if n > 1:
        sd, error = statistics.stdev(values), statistics.stdev(tested) / math.sqrt(n)
        centre = statistics.fmean(tested)
        p = two_sided_p(centre / error, n - 1) if error > ROUNDING else float(abs(centre) < ROUNDING)
    return {"each": list(values), "mean": mean, "sd": sd, "p": p}


def crossing(runs, target):
    """(tokens, extrapolated): how many tokens a run of a whole schedule takes to end at the loss `target`, on the line
    through its two neighbours in log(tokens). None where there are no two, where the losses do not fall, and farther
    than BEYOND from all runs: that says nothing.

    runs: (tokens, final loss) of each."""
    runs = sorted(runs)
    if equal := [tokens for tokens, loss in runs if loss == target]:
        return float(equal[-1]), False
    if len(runs) < 2:
        return None
    pairs = list(zip(runs, runs[1:]))
    between = next(((a, b) for a, b in pairs if b[1] <= target <= a[1]), None)
    (few, high), (many, low) = between or pairs[-1 if target < runs[-1][1] else 0]
    if high <= low:
        return None
    log_tokens = math.log(few) + (high - target) / (high - low) * math.log(many / few)
    if not math.log(runs[0][0] / BEYOND) <= log_tokens <= math.log(runs[-1][0] * BEYOND):
        return None
    return math.exp(log_tokens), between is None


# ----------------------------------------------------------------------------- the verdict

def runs_of(state, arm, share=1.0):
    """The runs of an arm with this share of its tokens, by their seeds; state: what contest.json holds."""
    return sorted((run for run in state["runs"].values() if (run["arm"], run["share"]) == (arm, share)),
                  key=lambda run: run["seed"])


def final_loss(run):
    """The validation loss at the end of a run; infinite if it has diverged."""
    return math.inf if run["trouble"] else run["curve"][-1]["loss"]


def mean_loss(runs):
    return statistics.fmean(map(final_loss, runs))


def next_share(shorter, target):
    """The share of its tokens in which the better arm is to be trained next; None if that is enough. shorter: {share:
    its runs}; target: the mean final loss of the other."""
    for share in SHARES:
        if share not in shorter:
            return share
        if not mean_loss(shorter[share]) < target:
            return None
    return None


def judge(challenger, baseline, shorter, flops):
    """The verdict as JSON. challenger, baseline: runs (as Learner.result) of the whole budget, one a seed, in the same
    order; shorter: {share: runs} of the one that is better on the mean; flops: of a token, of both."""
    if broken := [f"seed {run['seed']}: {run['trouble']}" for run in challenger + baseline if run["trouble"]]:
        return {"diverged": broken}
    better, other = (challenger, baseline) if mean_loss(challenger) <= mean_loss(baseline) else (baseline, challenger)
    won = better is challenger
    paces = [c["seconds"] / c["tokens"] / (b["seconds"] / b["tokens"]) for c, b in zip(challenger, baseline)]
    work = flops[0] / flops[1]
    differences = [final_loss(c) - final_loss(b) for c, b in zip(challenger, baseline)]
    found = {"better": "challenger" if won else "baseline", "seeds": len(better),
             "loss_difference": spread(differences), "seconds_a_token": spread(paces, list(map(math.log, paces)))}
    shortest = shorter[min(shorter)] if shorter else []
    if shortest and all(final_loss(run) < final_loss(o) for run, o in zip(shortest, other)):  # it still is the better
        bound = statistics.fmean(run["tokens"] / o["tokens"] for run, o in zip(shortest, other))
        bound, word = (bound, "less than") if won else (1 / bound, "more than")
        factors = {"tokens": 1.0, "seconds": statistics.fmean(paces), "flops": work}
        return found | {name: {"bound": word, "mean": bound * factor} for name, factor in factors.items()}
    reached = []
    for i, (run, target) in enumerate(zip(better, map(final_loss, other))):
        ends = [(r["tokens"], final_loss(r)) for r in (run, *(runs[i] for runs in shorter.values()))]
        reached.append(crossing([end for end in ends if math.isfinite(end[1])], target))
    found["untold_seeds"] = [run["seed"] for run, hit in zip(better, reached) if hit is None]
    found["extrapolated_seeds"] = [run["seed"] for run, hit in zip(better, reached) if hit and hit[1]]
    if found["untold_seeds"]:  # those that lie far from the rest: a mean of the rest would be theirs alone
        return found
    ratios = [tokens / run["tokens"] for (tokens, _), run in zip(reached, other)]
    ratios = ratios if won else [1 / ratio for ratio in ratios]
    seconds = [ratio * pace for ratio, pace in zip(ratios, paces)]
    found["crossing_tokens"] = statistics.fmean(tokens for tokens, _ in reached)
    for name, values in {"tokens": ratios, "seconds": seconds, "flops": [ratio * work for ratio in ratios]}.items():
        found[name] = spread(values, list(map(math.log, values)))
    return found


# ----------------------------------------------------------------------------- in words

def figure(found, digits=3):
    """A spread in words."""
    if "bound" in found:
        return f"{found['bound']} {found['mean']:.{digits}f}"
    words = f"{found['mean']:.{digits}f}"
    return words if found["sd"] is None else f"{words} ± {found['sd']:.{digits}f}, p {found['p']:.2g}"


def said(challenger, baseline, found):
    """A verdict in lines."""
    lines = [f"{challenger} against {baseline}:"]
    if "diverged" in found:
        return [*lines, *(f"    no verdict, a run diverged: {line}" for line in found["diverged"])]
    n = found["seeds"]
    worse = challenger if found["better"] == "baseline" else baseline
    rows = {"final loss, difference": "loss_difference", f"tokens to the final loss of {worse}": "tokens",
            "seconds": "seconds", "FLOPs without the optimizer's": "flops", "seconds a token": "seconds_a_token"}
    lines += [f"    {label:42} {figure(found[key], 4) if key == 'loss_difference' else 'x ' + figure(found[key])}"
              for label, key in rows.items() if key in found]
    lines.append("    one seed: no spread, no p" if n == 1 else f"    n = {n} seeds, paired t-test")
    for key, why in (("extrapolated_seeds", "extrapolated, beyond its runs"),
                     ("untold_seeds", "does not say where one arm reaches the other: so there are no ratios")):
        if found.get(key):
            lines.append(f"    seed {', '.join(map(str, found[key]))} {why}")
    return lines


def sentence(name, state):
    """What the challenger needs for what the baseline needs, to the loss at which the worse of the two ended; "" if a
    run diverged, or none says it."""
    found, baseline = state["verdict"][name], state["baseline"]
    if "tokens" not in found or found.get("untold_seeds"):
        return ""
    n = found["seeds"]
    seeds = f"{n} seed{'s' * (n > 1)}, {state['made_on']['device']}"
    tokens, seconds = (found[key]["mean"] for key in ("tokens", "seconds"))
    bound = "" if "bound" not in found["tokens"] else "at most " if found["better"] == "challenger" else "at least "
    return (f"To the same final loss the {name} model of the contest needs {bound}{tokens:.2f} times the tokens and "
            f"{seconds:.2f} times the seconds of the {baseline} model ({seeds})")


def ranking(verdicts, baseline):
    """Lines of many verdicts, a challenger each, from the lowest loss on. verdicts: {challenger: judge()}."""
    columns = {"loss_difference": "final loss, difference", "tokens": "x tokens", "seconds": "x seconds",
               "flops": "x FLOPs"}
    lines = [f"{'against ' + baseline:14}" + "".join(f"{label:>25}" for label in columns.values())]
    whole = {name: found for name, found in verdicts.items() if "diverged" not in found}
    for name in sorted(whole, key=lambda name: whole[name]["loss_difference"]["mean"]):
        figures = [figure(whole[name][key], 4 if key == "loss_difference" else 3) if key in whole[name] else "-"
                   for key in columns]
        lines.append(f"{name:14}" + "".join(f"{words:>25}" for words in figures))
    return lines + [f"{name:14}{'diverged':>25}" for name in verdicts if name not in whole]


def table(arms, runs):
    """Lines of sizes and results, one an arm. arms: {name: Arm.about()}; runs: {name: full runs}."""
    lines = [f"{'':12}{'parameters':>11}{'active':>9}{'MFLOPs/token':>14}{'rate':>9}{'tokens':>9}{'seconds':>9}"
             f"{'tokens/s':>10}{'final loss':>18}{'bits per byte':>18}"]
    for name, about in arms.items():
        ran = runs.get(name, [])
        whole = [run for run in ran if not run["trouble"]]
        tokens, seconds = (sum(run[key] for run in ran) for key in ("tokens", "seconds"))
        rate = ran[0]["muon_lr"] if ran else about["settings"]["muon_lr"]
        ends = []
        for key in ("loss", "bits_per_byte"):
            values = [run["curve"][-1][key] for run in whole]
            known = values and None not in values
            ends.append(figure(spread(values), 4).split(",")[0] if known else "-")
        spent = [f"{tokens / len(ran) / 1e6:.2f}M", f"{seconds / len(ran):,.1f}", f"{tokens / seconds:,.0f}"] if ran \
            else "---"
        lines.append(f"{name:12}{about['parameters'] / 1e6:10.2f}M{about['active_parameters'] / 1e6:8.2f}M"
                     f"{about['flops_per_token'] / 1e6:14.3f}{rate:9.2g}{spent[0]:>9}{spent[1]:>9}{spent[2]:>10}"
                     f"{ends[0]:>18}{ends[1]:>18}"
                     + f"   diverged: {len(ran) - len(whole)} of {len(ran)}" * (len(whole) < len(ran)))
        clipped = sum(run["clipped_heads"] for run in ran)
        if clipped or ran and name == "clip":
            lines.append(f"{'':12} QK-clip scaled a head down {clipped:,} times in {len(ran)} runs")
    return lines


# ----------------------------------------------------------------------------- the picture

def draw(path, title, runs, verdicts, baseline):
    """contest.png: validation loss against tokens and against seconds; seeds thin, means thick, and where a whole
    schedule of the better arm meets the other's final loss. runs: {arm: full runs}; verdicts: {challenger: judge()}."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    runs = {name: [run for run in ran if run["curve"]] for name, ran in runs.items()}
    for axis, unit in zip(axes, ("tokens", "seconds")):
        for colour, (name, ran) in enumerate(runs.items()):
            for run in ran:
                axis.plot([p[unit] for p in run["curve"]], [p["loss"] for p in run["curve"]], f"C{colour % 10}",
                          linewidth=0.7, alpha=0.6)
            mean = [[statistics.fmean(p[key] for p in points) for points in zip(*(run["curve"] for run in ran))]
                    for key in (unit, "loss")]
            if ran:
                axis.plot(*mean, f"C{colour % 10}", linewidth=2.5, label=name)
        for name, found in verdicts.items():
            if "crossing_tokens" in found:
                winner, loser = (name, baseline) if found["better"] == "challenger" else (baseline, name)
                pace = statistics.fmean(run["seconds"] / run["tokens"] for run in runs[winner])
                at, level = found["crossing_tokens"] * (pace if unit == "seconds" else 1), mean_loss(runs[loser])
                axis.axhline(level, color="grey", linewidth=0.7, linestyle=":")
                axis.plot(at, level, "k*", markersize=12)
                axis.annotate(f"{winner}, whole schedule", (at, level), (-6, 8), textcoords="offset points", fontsize=8,
                              horizontalalignment="right")
        ends = [point["loss"] for ran in runs.values() for run in ran for point in run["curve"][2:]]
        if ends:
            axis.set_ylim(min(ends) - 0.05 * (max(ends) - min(ends)), max(ends))
        axis.set(title=title, xlabel=f"training {unit}", ylabel="validation loss, nats a token")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    temporary = Path(path).with_name(f".{Path(path).name}")
    try:
        shown.savefig(temporary, dpi=110, format="png")
        os.replace(temporary, path)
    finally:
        pyplot.close(shown)
        temporary.unlink(missing_ok=True)


def main(argv):
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("name a contest's file:  python -m bench.verdict out/contest-moe-dense/contest.json")
    state = read_json(existing(argv[0], "a contest leaves contest.json in its folder"))
    if not state.get("verdict"):
        raise UserError(f"{argv[0]} has no verdict yet: start the contest again with the same words, and it goes on")
    print(*table(state["arms"], {name: runs_of(state, name) for name in state["arms"]}), sep="\n")
    for name, found in state["verdict"].items():
        print(*said(name, state["baseline"], found), sentence(name, state), sep="\n")
    commits = {run.get("commit", state["made_on"].get("commit")) for run in state["runs"].values()}
    if len(commits) > 1:
        print(f"(its runs are of {len(commits)} commits: {', '.join(sorted(map(str, commits)))})")
    print(f"(measured by  python -m bench.contest {shlex.join(state['command'])}  and kept in {argv[0]})")


if __name__ == "__main__":
    errors.run(main)
