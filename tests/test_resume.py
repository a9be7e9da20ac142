"""Resuming: after a signal, after SIGKILL, from a step, from another run; and what is refused."""

import dataclasses
import re
import shlex
import shutil
import signal
import time
from types import SimpleNamespace

import pytest

import export
import generate
import settings
from data import prepare
from data.loader import TrainStream
from errors import STOPPED, UserError
from model import ModelConfig, build
from muon import Muon, schedule_factor
from run import checkpoint, folder
from tests import forks
from tests.helpers import (
    TINY,
    assert_equal_runs,
    losses,
    make_data,
    records,
    run_stopped,
    run_train,
    small_run,
)


def test_ten_and_ten_are_twenty_bitwise(config, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ("--eval_interval=5", "--save_interval=10", "--sample_interval=10", "--decay_steps=4",
               "--balance=quantile", "--router_z_loss=1e-3")
    run_train(config, f"--out_dir={whole}", *options)
    with pytest.MonkeyPatch.context() as patch:  # a signal arrives late in the ninth step: the tenth still counts
        original = Muon.begin_step
        stop = lambda self: signal.raise_signal(signal.SIGTERM) if self.steps == 8 else None
        patch.setattr(Muon, "begin_step", lambda self, *a: (stop(self), original(self, *a))[1])
        run_stopped(config, f"--out_dir={halves}", *options)
    assert losses(halves)[-1][0] == 10
    run_train(config, f"--out_dir={halves}", *options, "--resume")
    assert [step for step, _ in losses(halves)] == list(range(1, 21))
    assert_equal_runs(whole, halves)
    val = {record["step"]: record["loss"] for record in records(whole, "val")}
    del val[10]  # the signal went straight to the save
    assert val == {record["step"]: record["loss"] for record in records(halves, "val")}
    manifest = checkpoint.read_manifest(checkpoint.find(halves))
    assert manifest["sequences"] == 160 and manifest["optimizer_steps"] == 20


def test_a_killed_run_resumes_from_its_last_checkpoint_bitwise(config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_train(config, f"--out_dir={whole}", "--max_steps=30", "--save_interval=5", "--keep_checkpoints=9")
    words = [config, f"--out_dir={killed}", "--max_steps=30", "--save_interval=5", "--keep_checkpoints=9"]
    process = forks.Process(["train.py", *words])
    path, deadline = killed / "metrics.jsonl", time.time() + 120
    there = lambda: path.exists() and '"kind": "train", "step": 13' in path.read_text(encoding="utf-8")
    while time.time() < deadline and not there():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = losses(killed)[-1][0]
    assert 13 <= reached < 30
    run_train(*words, "--resume")
    assert records(killed, "event")[-1]["step"] == 30 and any(e["event"] == "resume" for e in records(killed, "event"))
    assert [step for step, _ in losses(killed)] == list(range(1, 31))  # no line twice
    assert_equal_runs(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_exits_cleanly(config, tmp_path, number):
    words = [config, "--max_steps=100000", "--out_dir=" + str(tmp_path / "run")]
    output = tmp_path / "output"
    process = forks.Process(["train.py", *words], stdout=output)
    while process.poll() is None and not (output.exists() and "\nstep      5/" in output.read_text(encoding="utf-8")):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == STOPPED
    last = output.read_text(encoding="utf-8").splitlines()[-1]
    assert shlex.split(last)[-2:] == ["train.py", f"--resume={tmp_path / 'run'}"]
    step = checkpoint.read_manifest(checkpoint.find(tmp_path / "run"))["step"]
    assert step == losses(tmp_path / "run")[-1][0]


def test_resume_from_a_step_rewinds_and_from_another_run_starts_there(config, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run_train(config, "--save_interval=5", "--keep_checkpoints=9")
    before = losses(run)
    run_train(config, "--save_interval=5", "--keep_checkpoints=9", f"--resume={run}/checkpoints/step_00000010")
    assert losses(run) == before and not list((run / "checkpoints").glob(".*"))
    run_train(config, f"--resume={run}/checkpoints/step_00000015", f"--out_dir={other}", "--micro_batch_size=8")
    assert [step for step, _ in losses(other)] == [16, 17, 18, 19, 20]
    assert losses(other)[-1][1] == pytest.approx(before[-1][1], abs=1e-4)


def test_resume_refuses_another_model_and_names_the_difference(config, tmp_path):
    """Scorecard 16."""
    run_train(config, "--max_steps=2")
    with pytest.raises(UserError, match="hidden_size: 32 there, 48 here"):
        run_train(config, "--max_steps=4", "--resume", "--hidden_size=48")
    with pytest.raises(UserError, match="another model or optimizer"):
        run_train(config, "--max_steps=4", "--resume", "--optimizer=adamw")
    with pytest.raises(UserError, match="no complete checkpoint"):
        run_train(config, f"--out_dir={tmp_path / 'new'}", "--resume")
    (tmp_path / "notes.txt").write_text("\n\n".join(f"note {i} " * 30 for i in range(60)), encoding="utf-8")
    words = ["--split_on=\n\n", "--vocab_size=257", "--val_fraction=0.2", f"--out={tmp_path / 'notes'}"]
    prepare.main(["text", str(tmp_path / "notes.txt"), *words])
    with pytest.raises(UserError, match="another tokenizer"):
        run_train(config, "--max_steps=4", "--resume", f"--data={tmp_path / 'notes'}")
    assert len(losses(tmp_path / "run")) == 2


def test_a_run_folder_is_not_overwritten_by_accident(config, tmp_path, capsys):
    run_train(config, "--max_steps=2")
    with pytest.raises(UserError, match=f"holds a run already: .* train.py --resume={tmp_path}/run$"):
        run_train(config, "--max_steps=3")
    (tmp_path / "run/thesis.txt").write_text("dear to me", encoding="utf-8")
    run_train(config, "--max_steps=3", "--overwrite")
    assert len(losses(tmp_path / "run")) == 3 and (tmp_path / "run/thesis.txt").exists()
    assert f"deleted the run in {tmp_path}/run: 1 checkpoint, up to step_00000002" in capsys.readouterr().out
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "deepseek_v3"}', encoding="utf-8")
    with pytest.raises(UserError, match="holds an exported model"):
        run_train(config, f"--out_dir={tmp_path / 'hf'}", "--overwrite")


def test_a_refused_overwrite_deletes_nothing(config, tmp_path):
    run_train(config, "--max_steps=2")
    run_train(config, "--max_steps=2", f"--out_dir={tmp_path / 'keep'}")
    with pytest.raises(UserError, match="another model"):
        run_train(
            config, f"--out_dir={tmp_path / 'keep'}", f"--resume={tmp_path / 'run'}", "--hidden_size=48", "--overwrite"
        )
    assert losses(tmp_path / "keep")[-1][0] == 2 and checkpoint.find(tmp_path / "keep")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear to me", encoding="utf-8")
    run_train(
        config, "--max_steps=2", f"--out_dir={tmp_path / 'mine'}", "--overwrite"
    )  # holds no run: nothing to delete
    assert (tmp_path / "mine/thesis.txt").exists()


def test_best_belongs_to_the_branch_and_the_folder(config, tmp_path):
    options = ("--eval_interval=5", "--save_interval=5", "--keep_checkpoints=9")
    run_train(config, *options)
    best = checkpoint.find(tmp_path / "run", "best")
    assert best.name == "step_00000020"
    run_train(
        config, *options, f"--resume={tmp_path / 'run'}/checkpoints/step_00000010", "--max_steps=11", "--decay_steps=1"
    )
    folder = tmp_path / "run/checkpoints"
    latest = (folder / "latest").read_text(encoding="utf-8").strip()
    assert latest == checkpoint.find(tmp_path / "run").name == "step_00000011"
    assert checkpoint.find(tmp_path / "run", "best").is_dir()
    run_train(
        config, *options, f"--resume={best.parent}/step_00000005", f"--out_dir={tmp_path / 'other'}", "--max_steps=10"
    )
    assert checkpoint.find(tmp_path / "other", "best").name == "step_00000010"


def test_a_changed_stream_is_said_and_precision_may_change(config, tmp_path, capsys):
    run_train(config, "--max_steps=4")
    words = ("--max_steps=6", "--resume", "--seed=5", "--sequence_length=16", "--dtype=float16", "--muon_lr=0.005")
    stream = ["sequence_length: 32 there, 16 here", "seed: 0 there, 5 here"]
    with pytest.raises(UserError, match="; ".join(stream) + r".*--new_data"):
        run_train(config, *words)
    assert len(losses(tmp_path / "run")) == 4
    run_train(config, *words, "--new_data")
    assert "changed: sequence_length: 32 there, 16 here" in capsys.readouterr().out
    changed = [e["changed"] for e in records(tmp_path / "run", "event") if e["event"] == "resume"]
    assert changed == [[*stream, "max_steps: 4 there, 6 here", "muon_lr: 0.01 there, 0.005 here",
                        "decay_steps: 0 there, 1 here", "dtype: float32 there, float16 here"]]
    assert records(tmp_path / "run")[-1]["tokens"] == 4 * 8 * 32 + 2 * 8 * 16
    scale, good = checkpoint.read_manifest(checkpoint.find(tmp_path / "run"))["loss_scale"]
    assert scale >= 2**12 and good <= 2  # not the float32 run's scale of 1, which would let gradients underflow
    run_train(config, "--max_steps=7", "--resume", *words[2:], "--new_data")
    assert checkpoint.read_manifest(checkpoint.find(tmp_path / "run"))["loss_scale"] == [scale, good + 1]


def test_resume_refuses_other_data_but_not_the_same_elsewhere(config, data, tmp_path):
    """Scorecard 14: the shards of a folder changed since the checkpoint."""
    moved = shutil.copytree(data, tmp_path / "moved")
    run_train(config, f"--data={moved}", "--max_steps=2")
    run_train(config, f"--data={data}", "--max_steps=3", "--resume")
    other = make_data(tmp_path / "other", seed=1)  # as many tokens, but others
    with pytest.raises(UserError, match="another stream of data: data: .*other.*--new_data"):
        run_train(config, f"--data={other}", "--max_steps=4", "--resume")
    run_train(config, f"--data={other}", "--max_steps=4", "--resume", "--new_data")
    assert len(losses(tmp_path / "run")) == 4


def test_new_data_begins_at_its_beginning(tmp_path, monkeypatch):
    """Also where a start after that says --new_data again, and where sequences of it are skipped."""
    path, original, read = small_run(tmp_path, max_steps=2, decay_steps=1), TrainStream.batch, []
    monkeypatch.setattr(TrainStream, "batch", lambda self, *words: read.append(words[0]) or original(self, *words))
    run, on_other = tmp_path / "run", (path, f"--data={make_data(tmp_path / 'other', 2000, 100, seed=1)}")
    run_train(*on_other, "--max_steps=4", "--resume", "--new_data")
    run_train(*on_other, "--max_steps=5", "--resume", "--new_data")
    run_train(*on_other, "--max_steps=6", "--resume")
    run_train(*on_other, "--max_steps=6", f"--resume={run}/checkpoints/step_00000005", "--skip_sequences=10")
    assert read == [0, 2, 4, 6, 16]
    manifest = checkpoint.read_manifest(checkpoint.find(run))
    assert manifest["stream_start"] == 4 and manifest["sequences"] == 22
    run_train(path, "--max_steps=7", "--resume", "--new_data")  # back on the first data, which begins anew too
    assert read[5:] == [0]


def test_a_signal_goes_straight_to_the_save(config, tmp_path, monkeypatch):
    original = Muon.begin_step
    stop = lambda self: signal.raise_signal(signal.SIGTERM) if self.steps == 3 else None
    monkeypatch.setattr(Muon, "begin_step", lambda self, *a: (stop(self), original(self, *a))[1])
    run_stopped(config, "--eval_interval=5", "--sample_interval=5", "--log_interval=4")
    assert losses(tmp_path / "run")[-1][0] == 5 and not records(tmp_path / "run", "val")
    logits = {record["step"]: record["max_attention_logit"] for record in records(tmp_path / "run", "train")}
    assert logits[4] > 0 and logits[5] is None  # nobody knew that step 5 would be logged, so no exact maximum was made
    assert checkpoint.find(tmp_path / "run").name == "step_00000005" and not (tmp_path / "run/samples.md").exists()


def test_a_signal_in_the_last_step_leaves_the_validation_to_a_command(tmp_path, monkeypatch, capsys):
    original = Muon.begin_step
    stop = lambda self: signal.raise_signal(signal.SIGTERM) if self.steps == 2 else None
    monkeypatch.setattr(Muon, "begin_step", lambda self: (stop(self), original(self))[1])
    path, run = small_run(tmp_path, max_steps=3, eval_interval=2), tmp_path / "run"
    assert checkpoint.find(run).name == "step_00000003" and [r["step"] for r in records(run, "val")] == [2]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("without its last validation")]
    assert shlex.split(line)[-2].endswith("evaluate.py") and shlex.split(line)[-1] == str(run)
    run_train(path, "--resume", "--max_steps=4")
    assert "without its last" not in capsys.readouterr().out


# ---------------------------------------------------------------------- what a resumed run may change


LIKE_THE_LOSS = {"rope_theta": 10.0, "aux_loss_alpha": 0.5, "z_loss": 0.1, "initializer_range": 0.5,
                 "router_z_loss": 0.1, "balance": "quantile", "max_position_embeddings": 128,
                 "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}
THE_FUNCTION = {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 2, "norm_topk_prob": False,
                "routed_scaling_factor": 9.0, "rms_norm_eps": 1e-3}
TENSORS = {"attention": "mha", "vocab_size": 99, "hidden_size": 48, "intermediate_size": 48, "moe_intermediate_size": 8,
           "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
           "qk_rope_head_dim": 8, "v_head_dim": 4, "n_routed_experts": 16, "n_shared_experts": 2,
           "first_k_dense_replace": 2, "tie_word_embeddings": True, "mtp_depth": 1}


def test_every_field_of_the_model_is_decided(tmp_path):
    """A field that holds no tensor is allowed to change with a line, or refused; a new one has to be put here."""
    shapes = lambda c: {n: p.shape for n, p in build(c, "meta").named_parameters(remove_duplicate=False)}
    same = lambda a, b: shapes(a) == shapes(b) and a.tie_word_embeddings == b.tie_word_embeddings
    there = ModelConfig(**TINY)
    assert {f.name for f in dataclasses.fields(ModelConfig)} == {*LIKE_THE_LOSS, *THE_FUNCTION, *TENSORS}
    stream = SimpleNamespace(identity=dict)
    manifest = {"config": dataclasses.asdict(settings.Config(**TINY))}
    for name, value in (LIKE_THE_LOSS | THE_FUNCTION | TENSORS).items():
        assert same(there, ModelConfig(**TINY | {name: value})) == (name not in TENSORS), name
        config = settings.Config(**TINY | {"routed_scaling_factor": there.routed_scaling_factor, name: value})
        if name in LIKE_THE_LOSS:
            told = f"{name}: {getattr(there, name)} there, {value} here"
            assert folder.compare(config, None, stream, manifest, "x") == [told]
        else:
            with pytest.raises(UserError, match=f"holds another model or optimizer: {name}"):
                folder.compare(config, None, stream, manifest, "x")


def test_a_stage_of_longer_context_keeps_its_optimizer_state(tmp_path, capsys):
    path, run = small_run(tmp_path, max_steps=2, decay_steps=1), tmp_path / "run"
    run_train(path, f"--resume={run}", f"--out_dir={tmp_path / 'long'}", "--max_steps=4", "--new_data",
              "--sequence_length=64", "--rope_theta=10000", "--max_position_embeddings=128",
              "--rope_scaling={'type':'yarn','factor':2.0,'original_max_position_embeddings':64}")
    said = capsys.readouterr().out
    assert "changed: rope_theta: 50000.0 there, 10000.0 here" in said and "changed: rope_scaling: None there" in said
    assert checkpoint.read_manifest(checkpoint.find(tmp_path / "long"))["optimizer_steps"] == 4
    assert generate.load(tmp_path / "long")[0].config.rope_scaling["factor"] == 2.0


@pytest.mark.parametrize("start, there, here, jumps", [
    (450, {}, {"max_steps": 900}, True),                       # wsd, ended: from 5e-4 back to 1e-2
    (450, {"schedule": "cosine"}, {"max_steps": 900, "schedule": "cosine"}, True),
    (150, {}, {"max_steps": 900}, False),                      # still at the peak
    (150, {}, {"max_steps": 300}, True),                       # in the middle of a fall
    (10, {}, {"warmup_steps": 200}, True),
    (10, {}, {"muon_lr": 5e-3}, True),
    (300, {}, {"muon_lr": 5e-3}, True),
    (300, {"adamw_lr": 3e-3}, {"max_steps": 600, "adamw_lr": 3e-3}, True),
    (450, {"decay_steps": None}, {"max_steps": 900, "decay_steps": None}, True),
    (450, {"schedule": "constant"}, {"schedule": "constant", "max_steps": 900}, False),
    (300, {}, {}, None)])
def test_what_the_rate_will_do_is_said_and_how_to_keep_it(start, there, here, jumps):
    base = dict(max_steps=450, warmup_steps=20, decay_steps=250, muon_lr=1e-2, min_lr_ratio=0.05)

    def rate(config, step, peak=None):
        decay = config.max_steps // 5 if config.decay_steps is None else config.decay_steps
        return (peak or config.muon_lr) * schedule_factor(step, config.schedule, config.max_steps, config.warmup_steps,
                                                          decay, config.min_lr_ratio)
    old, new = settings.Config(**base | there), settings.Config(**base | there | here)
    for name in ("muon_lr", "max_steps"):
        with pytest.raises(UserError, match=f"manifest is damaged: it has {name}='much', no number"):
            folder.compare(new, None, None, {"config": dataclasses.asdict(old) | {name: "much"}}, "out/run")
    said = folder.rates(dataclasses.asdict(old), new, start)
    if jumps is None:
        assert said == ""
        return
    assert said.startswith("warning: ") == jumps and f"{rate(old, start):.2e} at step {start}" in said
    assert f"{rate(new, start + 1):.2e} at step {start + 1}" in said and ("To hold" in said) == jumps
    if not jumps:
        return
    advice = said.split("To hold")[1].split("; to let")
    hold, fall = (settings.read_words(re.findall(r"--\S+", part))[1] for part in advice)
    held = settings.Config(**base | there | here | hold)
    at = rate(old, start)
    assert [rate(held, step) for step in range(start + 1, held.max_steps + 1)] == pytest.approx(
        [at] * (held.max_steps - start), rel=1e-4)
    if old.adamw_lr:
        assert held.adamw_lr == pytest.approx(rate(old, start, old.adamw_lr), rel=1e-4)
    falling = settings.Config(**base | there | here | fall)
    rates = [rate(falling, step) for step in range(start + 1, falling.max_steps + 1)]
    assert 0.98 * at < rates[0] < 1.0001 * at and rates[-1] == pytest.approx(0.05 * at, rel=1e-4)
    assert rates == sorted(rates, reverse=True)


def test_the_resume_event_holds_what_the_rate_does(tmp_path, capsys):
    path, run = small_run(tmp_path, max_steps=2, warmup_steps=1), tmp_path / "run"
    run_train(path, "--resume", "--max_steps=3", "--muon_lr=0.1")
    (event,) = [e for e in records(run, "event") if e["event"] == "resume"]
    assert event["rates"].startswith("warning: learning rate: 1.00e-02 at step 2, 1.00e-01 at step 3")
    assert event["rates"] in capsys.readouterr().out


def test_a_dry_run_tells_what_a_resumed_run_would(tmp_path, monkeypatch, capsys):
    """Whoever tries first wants to know what would change; of 2,000 tokens, 300 steps of two windows are ten epochs."""
    path, run = small_run(tmp_path, max_steps=2, warmup_steps=1), tmp_path / "run"
    words = ("--resume", "--max_steps=300", "--muon_lr=0.1")
    capsys.readouterr()
    run_train(path, *words, "--dry_run")
    tried = capsys.readouterr().out
    original = Muon.begin_step
    monkeypatch.setattr(Muon, "begin_step", lambda self: signal.raise_signal(signal.SIGTERM) or original(self))
    run_stopped(path, *words)
    lines = tried.split("dry run: ")[0].splitlines()
    assert f"resumed from {run}/checkpoints/step_00000002" in lines
    assert "  changed: max_steps: 2 there, 300 here" in lines
    assert any(line.startswith("warning: learning rate: 1.00e-02 at step 2, 1.00e-01 at step 3") for line in lines)
    assert "warning: 9.7 epochs: beyond four, repeated data teaches little" in lines
    assert "\n".join(lines) in capsys.readouterr().out  # the run itself says the same


def test_epochs_count_what_was_read_and_will_be(tmp_path, capsys):
    """2,000 tokens are 62 windows of 32: two steps of eight sequences, then two of 16; then other data, and back."""
    path, other = small_run(tmp_path, max_steps=2, decay_steps=1, global_batch_size=8), tmp_path / "other"
    make_data(other, 2000, 100, seed=1)
    shown = lambda: float(re.search(r"([\d.]+) epochs in all", capsys.readouterr().out).group(1))
    assert shown() == pytest.approx(16 / 62, abs=0.006)
    options = (path, "--resume", "--global_batch_size=16", "--new_data")
    run_train(*options, "--max_steps=4")
    assert shown() == pytest.approx(48 / 62, abs=0.006)
    run_train(*options, "--max_steps=5", f"--data={other}")
    assert shown() == pytest.approx(16 / 62, abs=0.006)
    run_train(*options, "--max_steps=6")
    assert shown() == pytest.approx(64 / 62, abs=0.006)


def test_one_expert_a_token_with_normalised_weights_goes_on_but_does_not_begin(config, tmp_path, monkeypatch, capsys):
    """Its router learns nothing: refused anew, while a run or an import that has such a model goes on, with a line."""
    run, words = tmp_path / "run", [config, "--max_steps=1", "--num_experts_per_tok=1"]
    for more in ([], ["--resume=auto"]):
        with pytest.raises(UserError, match="no-norm_topk_prob"):
            run_train(*words, *more)
    with monkeypatch.context() as patch:
        patch.setattr(settings.Config, "router_is_idle", lambda self: False)  # as a version before would
        run_train(*words)
    run_train(f"--resume={run}", "--max_steps=2")
    assert losses(run)[-1][0] == 2 and "the routers learn nothing" in capsys.readouterr().out
    export.export(run, tmp_path / "hf")
    export.reverse(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back/config.py").exists()
