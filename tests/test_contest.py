"""bench.contest: a learner is a run of train.py to the last bit, a stopped contest ends like any other, verdicts."""

import dataclasses
import json
import math

import pytest
import torch

import settings
from bench import contest, learner, pairs, verdict
from counting import flops_per_token
from errors import UserError
from tests.helpers import ROOT, final_tensors, make_config, make_data, records, run_train

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 12,
         "warmup_steps": 2, "eval_batches": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(make_data(tmp_path_factory.mktemp("contest") / "data", 6000, 600))


@pytest.fixture
def small(tmp_path, text, monkeypatch):
    for name, value in {"TURN": 0.02, "POINTS": 3, "MOST_RATES": 3}.items():
        monkeypatch.setattr(contest, name, value)
    monkeypatch.setattr(verdict, "draw", lambda *words: None)  # which takes most of a tiny contest's time
    return make_config(tmp_path / "small.py", data=text, **SMALL)


def result_of(folder):
    return json.loads((folder / "contest.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------- a learner

def make_learner(config, points, folder=None):
    return learner.Learner(config, learner.open_text(config, torch.device("cpu"), config.vocab_size), points, folder)


@pytest.mark.parametrize("changes", [
    dict(qk_clip_tau=0.02), dict(optimizer="adamw", dtype="bfloat16", document_mask=True, ema=0.9, mtp_depth=1)])
def test_a_learner_is_a_run_of_train_py(small, tmp_path, changes):
    words = [small, *(f"--{key}={value}" for key, value in changes.items())]
    run_train(*words, f"--out_dir={tmp_path / 'run'}", "--eval_interval=1")
    trained, validated = records(tmp_path / "run"), records(tmp_path / "run", "val")
    ours = make_learner(settings.load(words)[0], list(range(1, 13)))
    learner.take_turns([ours], 0.0, lambda _: None)
    assert [(p["tokens"], p["train_loss"], p["largest_logit"]) for p in ours.curve] == [
        (r["tokens"], r["loss"], r["max_attention_logit"]) for r in trained]
    assert [p["loss"] for p in ours.curve] == [r.get("ema_loss", r["loss"]) for r in validated]
    assert [p["bits_per_byte"] for p in ours.curve] == [r["bits_per_byte"] for r in validated] or ours.average
    assert ours.clipped == sum(r["qk_clipped_heads"] for r in trained) and (ours.clipped > 0) == (len(changes) == 1)
    theirs, state = final_tensors(tmp_path / "run"), ours.state | (ours.average.tensors if ours.average else {})
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())


def test_a_learner_goes_on_from_its_last_point(small, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "DISK", math.inf)  # every point is saved
    config, _ = settings.load([small, "--qk_clip_tau=0.02", "--ema=0.9"])
    whole = make_learner(config, [4, 8, 12])
    learner.take_turns([whole], 1.0, lambda _: None)
    first = make_learner(config, [4, 8, 12], tmp_path / "saved")
    while first.step < 8:
        first.turn(0.0)
    first.turn(0.0)  # a step that is lost
    again = make_learner(config, [4, 8, 12], tmp_path / "saved")
    assert again.step == 8 and len(again.curve) == 2
    learner.take_turns([again], 1.0, lambda _: None)
    without_time = lambda of: [{**point, "seconds": None} for point in of.curve]
    assert without_time(again) == without_time(whole) and again.clipped == whole.clipped > 0
    assert all(torch.equal(again.state[name], tensor) for name, tensor in whole.state.items())
    assert first.curve[-1]["seconds"] < again.curve[-1]["seconds"]


def test_compilers_are_not_counted(small, monkeypatch):
    slow = make_learner(dataclasses.replace(settings.load([small])[0], max_steps=20), [20])
    times = iter([50.0, 2.0, 3.0, 0.0])  # of the first turn, which compiles, and of those after it
    monkeypatch.setattr(slow, "_train", lambda goal: setattr(slow, "step", goal) or next(times))
    monkeypatch.setattr(slow, "_validate", lambda: None)
    slow.turn(1.0)
    assert (slow.step, slow.seconds) == (5, 50.0)  # nothing better is known
    slow.turn(2.0)
    assert (slow.step, slow.seconds) == (10, 4.0) and slow.pace == pytest.approx(0.4)
    slow.turn(2.0)  # as many steps as take so long
    assert (slow.step, slow.seconds) == (15, 7.0)


# ----------------------------------------------------------------------------- who meets whom

@pytest.mark.parametrize("pair, tolerance", [("moe-dense", 0.01), ("moe-gpt", 0.01), ("mla-mha", 0.02),
                                             ("heads", 0.01), ("experts", 0.012), ("muon-adamw", 0), ("clip", 0)])
def test_arms_have_equal_flops_and_the_rest_in_common(pair, tolerance):
    name, arms = pairs.arms_of([pair], str(ROOT / "configs/debug.py"), {"max_steps": 7})
    flops = [flops_per_token(arm.config, arm.config.sequence_length) for arm in arms]
    assert name == pair and all(abs(one / flops[-1] - 1) <= tolerance for one in flops)
    assert len({arm.name for arm in arms}) == len(arms) and all(arm.config.max_steps == 7 for arm in arms)


def test_what_the_pairs_change():
    arms = {pair: [arm.config for arm in pairs.arms_of([pair], str(ROOT / "configs/debug.py"), {})[1]]
            for pair in ("muon-adamw", "heads", "clip", "moe-gpt")}
    muon, adamw = arms["muon-adamw"]
    differing = lambda a, b: {k for k, v in dataclasses.asdict(a).items() if dataclasses.asdict(b)[k] != v}
    assert differing(muon, adamw) == {"optimizer", "muon_lr"} and (adamw.optimizer, adamw.muon_lr) == ("adamw", 2e-3)
    many, few = arms["heads"]
    assert (many.num_attention_heads, many.v_head_dim, many.qk_rope_head_dim) == (8, 16, 8)
    assert (few.num_attention_heads, few.v_head_dim, few.qk_rope_head_dim) == (4, 32, 16)
    clip, free = arms["clip"]
    assert differing(clip, free) == {"optimizer"} and free.optimizer == "muon" and clip.qk_clip_tau == 10
    assert arms["moe-gpt"][1].attention == "mha" and arms["moe-gpt"][1].optimizer == "adamw"


def test_the_grid_of_experts():
    arms = pairs.arms_of(["experts"], str(ROOT / "configs/debug.py"), {}, "64:1:0,8:2:1")[1]
    sizes = [(a.config.n_routed_experts, a.config.num_experts_per_tok, a.config.n_shared_experts) for a in arms[:-1]]
    assert sizes == [(64, 1, 0), (8, 2, 1)] and arms[-1].config.n_routed_experts == 0
    one, several = arms[0].config, arms[1].config
    assert not one.norm_topk_prob and one.routed_scaling_factor == 1.0  # else the router would learn nothing
    assert several.norm_topk_prob and several.routed_scaling_factor == pytest.approx(math.sqrt(2), abs=0.02)


def test_a_rate_of_adamw_keeps_its_ratio_to_that_of_muon():
    base = settings.Config(muon_lr=1e-2, adamw_lr=4e-3)
    changed = pairs.with_rate(base, 2e-2)
    assert changed.muon_lr == 2e-2 and changed.adamw_lr == pytest.approx(8e-3)
    assert pairs.with_rate(settings.Config(), 1.0).adamw_lr is None


def test_schedules_are_scaled_whole():
    config = settings.Config(max_steps=450, warmup_steps=20, decay_steps=250)
    half, sixteen = contest.scaled(config, 225), contest.scaled(config, 7200)
    assert (half.max_steps, half.warmup_steps, half.decay_steps) == (225, 10, 125)
    assert (sixteen.max_steps, sixteen.warmup_steps, sixteen.decay_steps) == (7200, 320, 4000)
    assert contest.scaled(settings.Config(decay_steps=None), 10).decay_steps is None
    assert contest.scaled(settings.Config(max_steps=100, warmup_steps=0, decay_steps=1), 50).decay_steps == 1


def test_the_search_for_a_rate_goes_on_at_an_edge():
    beyond = contest._beyond_the_edge
    assert beyond({1.0: 3.0, 2.0: 2.9, 4.0: 2.8}) == [8.0] and beyond({1.0: 2.0, 2.0: 2.9, 4.0: 2.8}) == [0.5]
    assert beyond({1.0: 3.0, 2.0: 2.7, 4.0: 2.8}) == [] == beyond({1.0: math.inf, 2.0: math.inf, 4.0: math.inf})
    assert beyond({1.0: 3.0, 2.0: 2.9, 4.0: 2.8, 8.0: 2.7, 16.0: 2.6}) in ([], [32.0])  # MOST_RATES, as it is here


# ----------------------------------------------------------------------------- the contest

def test_a_contest_stopped_at_any_turn_ends_like_another(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learner, "DISK", math.inf)
    words = ["moe-dense", f"--config={small}", "--seeds=2", "--sweep=0.5"]
    contest.main([*words, f"--out={tmp_path / 'whole'}"])
    whole, shown = result_of(tmp_path / "whole"), capsys.readouterr().out
    turn, turns, starts = learner.Learner.turn, 0, 0

    def interrupted(self, seconds):
        nonlocal turns
        turns += 1
        if turns % 14 == 0:
            raise KeyboardInterrupt
        turn(self, seconds)

    monkeypatch.setattr(learner.Learner, "turn", interrupted)
    while starts < 20:
        starts += 1
        try:
            contest.main([*words, f"--out={tmp_path / 'stopped'}"])
            break
        except KeyboardInterrupt:
            continue
    stopped = result_of(tmp_path / "stopped")
    assert starts > 1 and not list((tmp_path / "stopped/learners").iterdir())
    losses = lambda state: {key: [point["loss"] for point in run["curve"]] for key, run in state["runs"].items()}
    assert losses(stopped) == losses(whole) and stopped["sweep"] == whole["sweep"]
    assert stopped["verdict"]["moe"]["tokens"] == whole["verdict"]["moe"]["tokens"]
    for name in ("moe", "dense"):
        runs = verdict.runs_of(whole, name)
        assert [run["seed"] for run in runs] == [0, 1] and [p["tokens"] for p in runs[0]["curve"]] == [512, 1024, 1536]
        assert whole["sweep"][name]["seed"] == 1000 and len(whole["sweep"][name]["losses"]) == 3
        assert runs[0]["muon_lr"] == whole["sweep"][name]["best"]
    assert "n = 2 seeds, paired t-test" in shown and "moe: rate " in shown


def test_other_words_in_the_same_folder(small, tmp_path):
    words = ["clip", f"--config={small}", "--lr=as-is", "--seeds=1", f"--out={tmp_path / 'out'}", "--tokens=250"]
    contest.main([*words, "--qk_clip_tau=0.02"])
    (clipped,), (free,) = (verdict.runs_of(result_of(tmp_path / "out"), name) for name in ("clip", "no clip"))
    assert clipped["clipped_heads"] > 0 == free["clipped_heads"] and clipped["tokens"] == free["tokens"] == 256
    with pytest.raises(UserError, match="another contest: tokens: 250.0 there, 512.0 here.*--overwrite"):
        contest.main([*words, "--qk_clip_tau=0.02", "--tokens=512"])
    with pytest.raises(UserError, match="arms.clip.qk_clip_tau: 0.02 there, 0.03 here"):
        contest.main([*words, "--qk_clip_tau=0.03"])
    contest.main([*words, "--qk_clip_tau=0.03", "--overwrite"])
    assert result_of(tmp_path / "out")["arms"]["clip"]["settings"]["qk_clip_tau"] == 0.03
    state = result_of(tmp_path / "out")
    state["asked"]["machine"]["instructions"] = "of another processor"
    contest.save(tmp_path / "out", state)
    with pytest.raises(UserError, match="machine.instructions: of another processor there"):
        contest.main([*words, "--qk_clip_tau=0.03"])
    del state["asked"]["machine"]["instructions"]  # as kept before this was asked
    contest.save(tmp_path / "out", state)
    contest.main([*words, "--qk_clip_tau=0.03"])


def test_seeds_are_added_to_a_contest(small, tmp_path, monkeypatch):
    words = ["ns_steps=4", f"--config={small}", "--lr=as-is", "--tokens=250", f"--out={tmp_path / 'out'}"]
    contest.main([*words, "--seeds=1"])
    first = result_of(tmp_path / "out")
    contest.main([*words, "--seeds=2"])
    state = result_of(tmp_path / "out")
    assert all(state["runs"][key] == run for key, run in first["runs"].items())
    assert len(state["verdict"]["ns_steps=4"]["loss_difference"]["each"]) == 2
    with pytest.raises(UserError, match="another contest: seeds: 2 there, 1 here"):
        contest.main([*words, "--seeds=1"])
    asked = lambda seeds: state["asked"] | {"seeds": seeds}
    assert "verdict" not in contest.open_folder(tmp_path / "out", asked(30), False)
    contest.save(tmp_path / "out", state | {"asked": asked(30)})  # a slip, stopped before the third seed had ended
    assert contest.open_folder(tmp_path / "out", asked(2), False)["asked"]["seeds"] == 2


def test_each_arm_has_a_rate_of_its_own(small, monkeypatch):
    monkeypatch.setattr(contest, "sweep", lambda s, *words: s.update(sweep={a.name: {"best": 0.1} for a in words[2]}))
    _, arms = pairs.arms_of(["moe-dense"], small, {"muon_lr": 5e-3})
    for words, rates in (("1e-2,auto", [1e-2, 0.1]), ("auto,2e-2", [0.1, 2e-2]), ("as-is,auto", [5e-3, 0.1])):
        found = contest.choose_rates({}, None, None, {"lr": words, "sweep": 1}, arms, {})
        assert [arm.config.muon_lr for arm in found] == rates


def test_equal_seconds(small, tmp_path, monkeypatch):
    words = ["muon-adamw", f"--config={small}", "--lr=1e-2,2e-3", "--seeds=1", "--seconds=0.4"]
    contest.main([*words, f"--out={tmp_path / 'out'}"])
    state = result_of(tmp_path / "out")
    for arm in ("muonclip", "adamw"):
        assert state["steps"][arm] == max(1, int(0.4 / state["paces"][arm]))
        assert verdict.runs_of(state, arm)[0]["steps"] == state["steps"][arm]
    assert verdict.runs_of(state, "adamw")[0]["muon_lr"] == 2e-3


def test_an_arm_that_diverges_is_told_and_the_other_goes_on(small, tmp_path, capsys):
    words = ["moe-dense", f"--config={small}", "--seeds=1", "--max_skipped_steps=2", f"--out={tmp_path / 'out'}"]
    contest.main([*words, "--lr=1e18,1e-2"])
    state, shown = result_of(tmp_path / "out"), capsys.readouterr().out
    lost, whole = verdict.runs_of(state, "moe")[0], verdict.runs_of(state, "dense")[0]
    assert "2 non-finite steps in a row" in lost["trouble"] and lost["steps"] < 12 == whole["steps"]
    assert "DIVERGED: 2 non-finite" in shown and "diverged: 1 of 1" in shown
    assert "seed 0: 2 non-finite" in state["verdict"]["moe"]["diverged"][0]


def test_an_arm_that_diverges_at_every_rate(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contest, "FACTORS", (1.0,))
    bad = make_config(tmp_path / "bad.py", **SMALL | dict(data=settings.read_file(small)["data"], muon_lr=1e18,
                                                          max_skipped_steps=1))
    contest.main([bad, small, "--seeds=1", "--max_skipped_steps=1", f"--out={tmp_path / 'out'}"])
    state, shown = result_of(tmp_path / "out"), capsys.readouterr().out
    assert state["sweep"]["bad"]["best"] is None and "bad: no rate of 1e+18: diverged" in shown
    assert "bad, at every rate that was tried" in shown and len(verdict.runs_of(state, "small")) == 1


def test_a_run_that_ends_above_its_beginning_has_diverged(small):
    ours = make_learner(dataclasses.replace(settings.load([small])[0], muon_lr=30.0), [12])
    learner.take_turns([ours], 1.0, lambda _: None)
    assert "above the" in ours.trouble and verdict.final_loss(ours.result()) == math.inf


@pytest.mark.parametrize("words, message", [
    (["moe-mamba"], "name a pair, or two config files, A.py B.py, .*; got .'moe-mamba'.. moe-dense: .*; experts: "),
    ([], "name a pair"),
    (["moe-dense", "--hidden_sise=3"], "hidden_size"),
    (["moe-dense", "--seeds=many"], "--seeds=many must be a number"),
    (["moe-dense", "--seeds=0"], "--seeds=0 must be above 0"),
    (["moe-dense", "--tokens=9", "--seconds=9"], "two budgets"),
    (["moe-dense", "--lr=fast"], "--lr=fast must be auto, as-is, or two of these"),
    (["moe-dense", "--sweep=2"], "at most 1"),
    (["moe-dense", "--sweep=0.5", "--lr=as-is"], "is the share of --lr=auto"),
    (["moe-dense", "--lr=1e-2,-1"], "--lr=1e-2,-1 must be auto, as-is, or two of these"),
    (["moe-dense", "--lr=1e-2"], "--lr=1e-2 must be auto, as-is, or two of these"),
    (["moe-dense", "--grid=8:2:0"], "--grid with the pair experts"),
    (["moe-dense", "--resume=out/x"], "--resume is train.py's"),
    (["moe-dense", "--n_routed_experts=0"], "it has no experts"),
    (["mla-mha", "--attention=mha"], "no latent attention"),
    (["muon-adamw", "--optimizer=adamw"], "its challenger is Muon"),
    (["heads", "--qk_nope_head_dim=7"], "qk_nope_head_dim cannot be halved"),
    (["experts", "--grid=8:2"], "'8:2' is not E:K:shared"),
    (["experts", "--grid=8:9:0"], "num_experts_per_tok=9 must be at most n_routed_experts=8"),
    (["moe-dense", "--data=data/nowhere"], "data/nowhere"),
    (["muon_lr=2e-1", "muon_lr=1e-3", "--lr=1e-2,1e-2"], "would replace the muon_lr of 'muon_lr=2e-1'.*as-is"),
    (["momentum=0.9", "adamw_lr=4e-3", "--lr=as-is,auto"], "would replace the adamw_lr of 'adamw_lr=4e-3'"),
    (["muon_lr=2e-1", "--lr=1e-2,as-is"], "would replace the muon_lr"),
    (["seed=7", "seed=3", "--lr=as-is"], "differ in seed"),
    (["experts", "--grid=64:64:64", "--hidden_size=16"], "no moe_intermediate_size gives n_routed_experts=64"),
])
def test_bad_words(small, words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        contest.main([*words, f"--config={small}", f"--out={tmp_path / 'out'}"])
    assert not list((tmp_path / "out").glob("*.json"))


def test_two_configs_have_to_see_the_same_tokens(small, tmp_path):
    other = make_config(tmp_path / "other.py", **SMALL | dict(data="elsewhere", sequence_length=16))
    with pytest.raises(UserError, match="other and small differ in data, sequence_length.*--data="):
        contest.main([other, small, f"--out={tmp_path / 'out'}"])
    longer = make_config(tmp_path / "longer.py", **SMALL | dict(data=settings.read_file(small)["data"], max_steps=13))
    with pytest.raises(UserError, match="differ in max_steps: name the budget"):
        contest.main([longer, small, f"--out={tmp_path / 'out'}"])
    fewer = make_config(tmp_path / "fewer.py", **SMALL | dict(data=settings.read_file(small)["data"], vocab_size=50))
    with pytest.raises(UserError, match="vocab_size=50 is too small"):
        contest.main([fewer, small, f"--out={tmp_path / 'out'}"])
    assert not list((tmp_path / "out").glob("*.json"))
