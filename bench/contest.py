"""Does it pay? Two ways to train (or a grid of them against one) on the same data in the same order from the same
seeds, in turns in one process; then how many tokens, seconds and FLOPs the challenger needs to the baseline's loss.

    python -m bench.contest moe-dense                       (also moe-gpt muon-adamw mla-mha clip heads experts)
    python -m bench.contest configs/a.py configs/b.py       (a.py against b.py)
    python -m bench.contest "ns_steps=6 momentum=0.9" momentum=0.95         (one config with other settings; the last
                    is the baseline, the config as it is if there is only one; with a muon_lr: --lr=as-is)

    --config=FILE   the config of all but A.py B.py (configs/debug.py)    --key=value ...   settings of all arms
    --seeds=N       3: the config's seed and those that follow            --out=FOLDER      out/contest-PAIR
    --tokens=N      of every run (the config's max_steps)                 --overwrite       begin anew
    --seconds=N     of training instead, for every arm: its steps follow from its measured pace
    --lr=auto       every arm at the best of base x 0.5, 1, 2, and on if that is at an edge; as-is: the config's; or two
                    of these, or of rates, CHALLENGER,BASELINE, as in 1e-2,auto. AdamW's base is 2e-3 at width 128 and
                    falls with the width's root
    --sweep=N       1: share of the budget of a run of the search for rates, on a seed that is not among the contest's.
                    Shorter runs want higher rates: a quarter of configs/debug.py's budget chose 2e-2, all of it 1e-2
    --grid=E:K:shared,...     of the pair `experts`

In FOLDER lie contest.json (settings, every point, the verdict) and contest.png. Schedules are scaled with the budget:
warm-up and decay keep their shares of max_steps. Stopped and started again with the same words, it goes on.
Next: pairs.py (who meets whom), learner.py (how an arm learns), verdict.py (what that says).
"""

import dataclasses
import gc
import json
import math
import re
import shutil
import time
from pathlib import Path

import torch

import bench
import errors
import settings
from bench import pairs, verdict
from bench.learner import Learner, open_text, take_turns
from data.shards import read_json
from errors import UserError
from model import pick_device
from run import guard
from run.metrics import replace_text
from run.terminal import duration
from step import wants_compile

OWN = {"config": None, "seeds": "3", "tokens": None, "seconds": None, "lr": "auto", "sweep": None, "grid": None,
       "out": None}
CONFIG, SWEEP = "configs/debug.py", 1.0
TURN = 3.0  # seconds
TELL = 10.0  # seconds between lines of progress
POINTS = 10  # validations of a run
SWEEP_SEED = 1000  # how far the seed of the search for rates is from the first of the contest
FACTORS, MOST_RATES = (0.5, 1.0, 2.0), 5  # of the base rate; how many are tried at most


# ----------------------------------------------------------------------------- words

def read_words(argv):
    """({own word: its text or number}, names that are no words, {setting: value}, whether to overwrite)."""
    own, rest = settings.take_words(argv, OWN | {"overwrite": False})
    overwrite = own.pop("overwrite")
    for name, kind in (("seeds", int), ("tokens", float), ("seconds", float), ("sweep", float)):
        if own[name] is not None:
            try:
                own[name] = kind(own[name])
            except ValueError:
                raise UserError(f"--{name}={own[name]} must be a number") from None
            if not 0 < own[name] < math.inf:
                raise UserError(f"--{name}={own[name]} must be above 0")
    if own["tokens"] and own["seconds"]:
        raise UserError("--tokens and --seconds are two budgets: name one")
    sought = "auto" in rates_of(own["lr"])
    if own["sweep"] and (own["sweep"] > 1 or not sought):
        raise UserError(f"--sweep={own['sweep']} is the share of --lr=auto: at most 1, and for nothing else")
    arms = [word for word in rest if pairs.is_changes(word)]
    names, flags = settings.read_words(word for word in rest if word not in arms)
    names += arms
    challenger, baseline = rates_of(own["lr"])
    for number, arm in enumerate(arms, 1):
        rate = baseline if 1 < number == len(arms) else challenger
        if rate != "as-is" and (named := re.search(r"(?:^|\s)(muon_lr|adamw_lr)=", arm)):
            raise UserError(f"--lr={own['lr']} would replace the {named[1]} of {arm!r}: say --lr=as-is")
    if own["config"] and len(names) - len(arms) == 2 or own["grid"] and names != ["experts"]:
        raise UserError("--config goes without A.py B.py, --grid with the pair experts: what shall they be here?")
    own |= {"config": own["config"] or CONFIG, "sweep": own["sweep"] or SWEEP}
    if refused := [name for name in flags if settings.FIELDS[name].metadata["group"] == "start" or name == "out_dir"]:
        raise UserError(f"--{refused[0]} is train.py's: a contest goes on by itself, and has --out and --overwrite")
    return own, names, flags, overwrite


def rates_of(text):
    """--lr as (the challengers' rate, the baseline's), each a number, "auto" or "as-is"."""
    words = text.split(",") if "," in text else [text, text]
    try:
        rates = [word if word in ("auto", "as-is") else float(word) for word in words]
    except ValueError:
        rates = []
    numbers = [rate for rate in rates if isinstance(rate, float)]
    if len(rates) != 2 or "," not in text and numbers or not all(0 < rate < math.inf for rate in numbers):
        raise UserError(f"--lr={text} must be auto, as-is, or two of these or of rates, CHALLENGER,BASELINE, as in "
                        "1e-2,2e-3 or 1e-2,auto")
    return rates


def open_folder(folder, asked, overwrite):
    """The state of the contest in this folder, as contest.json holds it, or a new one. asked: what has to be the same,
    {name: value}; the number of seeds may grow."""
    path = folder / "contest.json"
    if overwrite or not path.exists():  # learners without their contest are nobody's
        for made in (path, folder / "contest.png"):
            made.unlink(missing_ok=True)
        shutil.rmtree(folder / "learners", ignore_errors=True)
    asked = json.loads(json.dumps(asked))
    if not path.exists():
        return {"asked": asked, "made_on": bench.machine(), "runs": {}}
    state = read_json(path)
    begun = len({run["seed"] for run in state["runs"].values() if run["share"] == 1.0})
    if state["asked"]["seeds"] != asked["seeds"] >= begun:
        state["asked"]["seeds"] = asked["seeds"]
        state.pop("verdict", None)  # of other seeds
    before, now = (dict(_flat(of)) for of in (state["asked"], asked))
    older = {name for name in now.keys() - before.keys() if name.startswith("machine.")}  # did not say this much
    differing = [f"{name}: {before.get(name)} there, {now.get(name)} here"
                 for name in before | now if before.get(name) != now.get(name) and name not in older]
    if differing:
        raise UserError(f"{folder} holds another contest: {'; '.join(differing[:5])}. Say the same, choose another "
                        "--out, or begin anew with --overwrite")
    return state


def _flat(value, name=""):
    """(dotted name, value) of everything in nested dicts."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}.{key}" if name else key)


def save(folder, state):
    replace_text(folder / "contest.json", json.dumps(state, indent=1) + "\n")


# ----------------------------------------------------------------------------- runs

def scaled(config, steps):
    """The config with its whole schedule in so many steps."""
    share = steps / config.max_steps
    decay = config.decay_steps and max(1, round(config.decay_steps * share))
    return dataclasses.replace(config, max_steps=steps, warmup_steps=round(config.warmup_steps * share),
                               decay_steps=decay)


def points_of(steps, interval):
    return [*range(interval, steps, interval), steps]


def train_runs(state, folder, text, stage, wanted, interval=None):
    """Train what is wanted and not yet in state["runs"], in turns; the result of each goes there when it ends.
    wanted: {key: (arm, share, config)}, share: of the whole budget; interval: steps between points, None: only the
    end."""
    wanted = {key: of for key, of in wanted.items() if key not in state["runs"]}
    if wanted and text.device.type == "cuda":  # the models and graphs of the runs before
        gc.collect()
        torch.cuda.empty_cache()
    learners = {}
    for key, (_, _, config) in wanted.items():
        points = points_of(config.max_steps, interval or config.max_steps)
        learners[key] = Learner(config, text, points, folder / "learners" / re.sub(r"[^\w.-]+", "-", key))
    keys, told = {id(learner): key for key, learner in learners.items()}, time.perf_counter()
    commit = bench.machine()["commit"]

    def tell(learner):
        nonlocal told
        key = keys[id(learner)]
        arm, share, config = wanted[key]
        if learner.ended:
            state["runs"][key] = {"arm": arm, "share": share, "commit": commit, **learner.result()}
            save(folder, state)
            shutil.rmtree(learner.folder, ignore_errors=True)
            end = learner.trouble and f"DIVERGED: {learner.trouble}; the others go on"
            print(f"{stage}: {key} {end or 'ends at {:.4f}'.format(learner.curve[-1]['loss'])}", flush=True)
        elif time.perf_counter() > told + TELL:
            told = time.perf_counter()
            print(f"{stage}: {key}  step {learner.step}/{config.max_steps}  loss {learner.loss:.4f}  "
                  f"{learner.tokens / learner.seconds:,.0f} tok/s  eta {eta(learners.values())}", flush=True)
    try:
        take_turns(list(learners.values()), TURN, tell)
    finally:
        for learner in learners.values():
            learner.close()


def eta(learners):
    """How long these runs still take, validation apart; those that have not shown their pace go at that of the rest."""
    known = [learner.pace for learner in learners if learner.pace]
    if not known:
        return "?"
    usual = sum(known) / len(known)
    return duration(sum((learner.config.max_steps - learner.step) * (learner.pace or usual) for learner in learners
                        if not learner.ended)) + " of this stage"


def measure_paces(state, folder, text, configs):
    """Seconds a step of every arm, from a few turns that belong to no run."""
    if "paces" in state:
        return
    learners = {name: Learner(config, text, ()) for name, config in configs.items()}
    try:
        for _ in range(5):
            for learner in learners.values():
                if not learner.ended:
                    learner.turn(TURN)
    finally:
        for learner in learners.values():
            learner.close()
    state["paces"] = {name: learner.seconds / learner.step for name, learner in learners.items()}
    save(folder, state)


def sweep(state, folder, text, arms, steps, share):
    """Find every arm's rate: state["sweep"] becomes {arm: {"base", "losses": {rate: loss}, "best"}}."""
    found = {arm.name: {"base": arm.config.muon_lr, "seed": arms[-1].config.seed + SWEEP_SEED,
                        "steps": max(1, round(share * steps[arm.name])), "losses": {}} for arm in arms}
    asked = {arm.name: [arm.config.muon_lr * factor for factor in FACTORS] for arm in arms}
    while any(asked.values()):
        for turn in range(max(map(len, asked.values()))):
            wanted = {}
            for arm in arms:
                if turn < len(asked[arm.name]):
                    rate, about = asked[arm.name][turn], found[arm.name]
                    config = dataclasses.replace(pairs.with_rate(arm.config, rate), seed=about["seed"])
                    wanted[f"sweep {arm.name} {rate:.4g}"] = (arm.name, "sweep", scaled(config, about["steps"]))
            train_runs(state, folder, text, f"{state['pair']}, rates", wanted)
            for key, (name, _, config) in wanted.items():
                found[name]["losses"][config.muon_lr] = verdict.final_loss(state["runs"][key])
        asked = {name: _beyond_the_edge(about["losses"]) for name, about in found.items()}
    for name, about in found.items():
        best = min(about["losses"], key=about["losses"].get)
        about["best"] = best if math.isfinite(about["losses"][best]) else None
        about["losses"] = {f"{rate:.4g}": loss if math.isfinite(loss) else None
                           for rate, loss in sorted(about["losses"].items())}
        shown = ", ".join(f"{rate}: {'diverged' if loss is None else f'{loss:.4f}'}"
                          for rate, loss in about["losses"].items())
        chosen = "no rate" if about["best"] is None else f"rate {best:.4g}"
        rates = sorted(float(rate) for rate in about["losses"])
        about["at_an_edge"] = about["best"] is not None and not rates[0] < float(f"{best:.4g}") < rates[-1]
        print(f"{name}: {chosen} of {shown} ({about['steps']} steps, seed {about['seed']})"
              + f"; at an edge after {MOST_RATES} rates: there may be better ones" * about["at_an_edge"], flush=True)
    state["sweep"] = found


def _beyond_the_edge(losses):
    """[the next rate to try], where the best so far has none on one side of it; [] if it has, or there are enough."""
    rates = sorted(losses)
    best = min(rates, key=losses.get)
    if len(rates) >= MOST_RATES or best not in (rates[0], rates[-1]) or not math.isfinite(losses[best]):
        return []
    return [best / 2 if best == rates[0] else best * 2]


# ----------------------------------------------------------------------------- the contest

def choose_rates(state, folder, text, own, arms, steps):
    """The arms at the rates that they compete with; without those that diverged at all rates."""
    challenger, baseline = rates_of(own["lr"])
    rates = {arm.name: challenger for arm in arms[:-1]} | {arms[-1].name: baseline}
    if sought := [arm for arm in arms if rates[arm.name] == "auto"]:
        sweep(state, folder, text, sought, steps, own["sweep"])
        rates |= {name: found["best"] for name, found in state["sweep"].items()}
    return [arm if rates[arm.name] == "as-is" else pairs.Arm(arm.name, pairs.with_rate(arm.config, rates[arm.name]))
            for arm in arms if rates[arm.name] is not None]


def judge(state, folder, text, arms, steps, challenger, seeds):
    """The verdict on one challenger, for which the better of the two is trained in shares of its tokens."""
    if lost := [name for name in (challenger, state["baseline"]) if name not in arms]:
        return {"diverged": [f"{name}, at every rate that was tried: lower --muon_lr" for name in lost]}
    challenger, baseline = arms[challenger], arms[state["baseline"]]
    full = {arm.name: verdict.runs_of(state, arm.name) for arm in (challenger, baseline)}
    shorter = {}
    if not any(run["trouble"] for runs in full.values() for run in runs):
        better, other = sorted((challenger, baseline), key=lambda arm: verdict.mean_loss(full[arm.name]))
        target = verdict.mean_loss(full[other.name])
        while share := verdict.next_share(shorter, target):
            config = scaled(better.config, max(1, round(share * steps[better.name])))
            for seed in seeds:  # one after the other: their seconds do not count
                key = f"{better.name} seed {seed} in {share:g}"
                train_runs(state, folder, text, f"{state['pair']}, {share:g} of the tokens",
                           {key: (better.name, share, dataclasses.replace(config, seed=seed))})
            shorter[share] = verdict.runs_of(state, better.name, share)
    flops = [arm.about()["flops_per_token"] for arm in (challenger, baseline)]
    return verdict.judge(full[challenger.name], full[baseline.name], shorter, flops)


def main(argv):
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return
    own, names, flags, overwrite = read_words(argv)
    pair, arms = pairs.arms_of(names, own["config"], flags, own["grid"])
    baseline = arms[-1].config
    device, step_tokens = pick_device(baseline.device), baseline.global_batch_size * baseline.sequence_length
    abouts = {arm.name: arm.about() for arm in arms}
    if not (own["tokens"] or own["seconds"]) and len({arm.config.max_steps for arm in arms}) > 1:
        raise UserError("the configs differ in max_steps: name the budget of both with --tokens or --seconds")
    folder = Path(own.pop("out") or f"out/contest-{pair}")
    here = bench.machine()
    machine = {name: here[name] for name in ("device", "instructions", "cores", "threads", "torch")}
    torch._dynamo.config.recompile_limit = 256  # all arms compile the same blocks
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # an arm that is not compiled would compare two things
    text = open_text(baseline, device, min(arm.config.vocab_size for arm in arms))
    lock = guard.Guard(argv)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.claim(folder)
    except UserError as error:
        raise UserError(str(error).replace("--out_dir", "--out")) from None
    state = open_folder(folder, {"pair": pair, **own, "machine": machine, "data": text.identity["data"],
                                 "arms": {name: about["settings"] for name, about in abouts.items()}}, overwrite)
    state |= {"pair": pair, "command": argv, "arms": abouts, "baseline": arms[-1].name, "step_tokens": step_tokens}
    save(folder, state)  # whose words the saved learners are bound to
    print(f"{pair}: {', '.join(arm.name for arm in arms[:-1])} against {arms[-1].name}; {device}, "
          f"{'compiled' if wants_compile(baseline, device) else 'not compiled'}; writing to {folder}/\n"
          "Stopped, it goes on when it is started again with the same words.")
    print("\n".join(verdict.table(abouts, {})), flush=True)

    # ------------------------------------------------------------------ the budget, the rates
    steps = {arm.name: arm.config.max_steps if not own["tokens"] else max(1, round(own["tokens"] / step_tokens))
             for arm in arms}
    if own["seconds"]:
        measure_paces(state, folder, text, {arm.name: arm.config for arm in arms})
        steps = {name: max(1, int(own["seconds"] / pace)) for name, pace in state["paces"].items()}
    state["steps"] = steps
    challengers = [arm.name for arm in arms[:-1]]
    arms = {arm.name: arm for arm in choose_rates(state, folder, text, own, arms, steps)}

    # ------------------------------------------------------------------ the runs
    seeds = [baseline.seed + number for number in range(own["seeds"])]
    interval = max(1, round(max(steps.values()) / POINTS))
    for number, seed in enumerate(seeds):
        wanted = {f"{arm.name} seed {seed}": (arm.name, 1.0, dataclasses.replace(
            scaled(arm.config, steps[arm.name]), seed=seed)) for arm in arms.values()}
        train_runs(state, folder, text, f"{pair}, seed {number + 1} of {len(seeds)}", wanted, interval)
    state["verdict"] = {name: judge(state, folder, text, arms, steps, name, seeds) for name in challengers}
    save(folder, state)

    # ------------------------------------------------------------------ what they say
    full = {name: verdict.runs_of(state, name) for name in abouts}
    print("", *verdict.table(abouts, full), sep="\n")
    for name, found in state["verdict"].items():
        print(*verdict.said(name, state["baseline"], found), sep="\n")
    if len(challengers) > 1:
        print(*verdict.ranking(state["verdict"], state["baseline"]), sep="\n")
    verdict.draw(folder / "contest.png", pair, full, state["verdict"], state["baseline"])
    print(f"{folder}/contest.json  {folder}/contest.png")


if __name__ == "__main__":
    errors.run(main)
