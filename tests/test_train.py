"""Whole runs of a tiny model through train.main and through the command line."""

import json
import math
import re
import sys

import pytest
import torch

import settings
import train
from errors import UserError
from model import K2
from muon import Muon, schedule_factor
from run import checkpoint
from tests.helpers import (
    ROOT,
    assert_equal_runs,
    final_tensors,
    losses,
    make_config,
    make_data,
    records,
    run_script,
    run_train,
)

TRAIN_KEYS = {
    "kind",
    "step",
    "time",
    "tokens",
    "loss",
    "aux_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "step_ms",
    "memory_gib",
    "max_attention_logit",
    "qk_clipped_heads",
    "expert_load_max",
    "expert_load_min",
    "dead_experts",
    "router_bias_std",
    "router_z_loss",
}


# ---------------------------------------------------------------------- what a run does and leaves behind


@pytest.mark.parametrize("optimizer", [pytest.param("muonclip", marks=pytest.mark.curves), "muon", "adamw"])
def test_a_run_learns_and_writes_what_it_should(config, tmp_path, optimizer, capsys):
    last = run_train(
        config,
        f"--optimizer={optimizer}",
        "--micro_batch_size=8",
        "--max_steps=60",
        "--eval_interval=20",
        "--save_interval=20",
        "--sample_interval=30",
        "--sample_prompts=['ab', '']",
        "--keep_checkpoints=2",
    )
    run = tmp_path / "run"
    assert last == records(run)[-1] and last["step"] == 60 and last["tokens"] == 60 * 8 * 32
    assert set(last) == TRAIN_KEYS and last["loss"] < 0.75 * records(run)[0]["loss"]
    assert last["dead_experts"] == 0 and 1 <= last["expert_load_max"] < 8 and last["mfu"] is None
    val = records(run, "val")
    assert [record["step"] for record in val] == [20, 40, 60]
    assert set(val[0]) == {"kind", "step", "time", "tokens", "loss", "perplexity", "bits_per_byte"}
    assert val[-1]["perplexity"] == pytest.approx(math.exp(val[-1]["loss"]))
    assert val[-1]["bits_per_byte"] == pytest.approx(val[-1]["loss"] / math.log(2))  # one byte a token here
    assert [e["step"] for e in records(run, "event") if e["event"] == "save"] == [20, 40, 60]
    about = json.loads((run / "config.json").read_text())
    assert (
        about["settings"]["max_steps"] == 60 and about["command"][0] == config and about["torch"] == torch.__version__
    )
    assert optimizer != "muonclip" or (run / "curves.png").stat().st_size > 10_000  # drawn from the same records
    assert (run / "tokenizer/encoding.json").exists()
    assert (run / "samples.md").read_text().count("## step") == 4
    assert checkpoint.find(run, "best").is_dir() and len(checkpoint.step_folders(run / "checkpoints")) in (2, 3)
    assert "validation loss" in capsys.readouterr().out


def test_rate_of_every_step_is_the_schedules(config, monkeypatch):
    used = []
    original = Muon.begin_step
    monkeypatch.setattr(
        Muon, "begin_step", lambda self, *a: (used.append([g["lr"] for g in self.param_groups]), original(self))[1]
    )
    run_train(config, "--max_steps=10", "--warmup_steps=4", "--decay_steps=3", "--adamw_lr=0.5", "--muon_lr=0.02")
    expected = [schedule_factor(step, "wsd", 10, 4, 3, 0.1) for step in range(1, 11)]
    assert used == [[pytest.approx(0.02 * f), pytest.approx(0.5 * f)] for f in expected]
    assert used[0][0] == pytest.approx(0.005)


def test_accumulation_and_micro_batches_do_not_change_the_run(config, tmp_path):
    for size in (8, 2):
        run_train(
            config,
            f"--micro_batch_size={size}",
            "--max_steps=10",
            f"--out_dir={tmp_path / str(size)}",
            "--aux_loss_alpha=0.01",
            "--qk_clip_tau=0.05",
            "--router_z_loss=0.01",
        )
    for one, other in zip(records(tmp_path / "8"), records(tmp_path / "2")):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["aux_loss"] == pytest.approx(
            other["aux_loss"], abs=1e-5
        )
        assert (
            one["expert_load_max"] == other["expert_load_max"] and one["qk_clipped_heads"] == other["qk_clipped_heads"]
        )
    assert sum(record["qk_clipped_heads"] for record in records(tmp_path / "8")) > 0


def test_newton_schulz_runs_once_a_step(config, monkeypatch):
    steps = []
    original = Muon._muon
    monkeypatch.setattr(Muon, "_muon", lambda self, *args: (steps.append(1), original(self, *args))[1])
    run_train(config, "--max_steps=3", "--micro_batch_size=2")
    assert len(steps) == 3


def test_logged_loss_is_cross_entropy_alone_and_gradients_are_those_of_the_sum(config, tmp_path, monkeypatch):
    norms = {}
    for alpha in (0.0, 10.0):
        run_train(config, "--max_steps=1", f"--aux_loss_alpha={alpha}", f"--out_dir={tmp_path / str(alpha)}")
        norms[alpha] = records(tmp_path / str(alpha))[0]
    assert norms[0.0]["loss"] == norms[10.0]["loss"] and norms[0.0]["grad_norm"] < norms[10.0]["grad_norm"]
    assert norms[0.0]["aux_loss"] == norms[10.0]["aux_loss"] > 1.9  # two MoE layers, each at least 1


def test_validation_and_samples_leave_no_trace_in_training(config, tmp_path):
    run_train(config, f"--out_dir={tmp_path / 'plain'}")
    run_train(
        config, f"--out_dir={tmp_path / 'watched'}", "--eval_interval=3", "--sample_interval=8", "--save_interval=7"
    )
    assert_equal_runs(tmp_path / "plain", tmp_path / "watched")
    val = records(tmp_path / "watched", "val")
    assert len({record["loss"] for record in val}) == len(val)


def test_a_validation_set_below_one_batch_is_still_evaluated(tmp_path):
    data = make_data(tmp_path / "d", n_val=12)
    config = make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"), eval_interval=10)
    run_train(config)
    assert len(records(tmp_path / "run", "val")) == 2 and checkpoint.find(tmp_path / "run", "best")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_runs_learn(config, tmp_path, dtype):
    run_train(config, f"--dtype={dtype}", "--max_steps=40", "--micro_batch_size=8")
    found = losses(tmp_path / "run")
    assert found[-1][1] < 0.8 * found[0][1]
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in final_tensors(tmp_path / "run").values())


def test_dense_mha_baseline_and_other_settings_run(config, tmp_path):
    last = run_train(
        config, "--attention=mha", "--n_routed_experts=0", "--optimizer=adamw", "--max_steps=5", "--schedule=cosine"
    )
    assert last["expert_load_max"] is None and last["dead_experts"] is None
    run_train(
        config,
        "--overwrite",
        "--max_steps=5",
        "--q_lora_rank=24",
        "--muon_per_head",
        "--ns_coefficients=you",
        "--ns_dtype=bfloat16",
        "--activation_checkpointing=full",
        "--tie_word_embeddings",
        "--schedule=constant",
    )


# ---------------------------------------------------------------------- faults


def test_a_non_finite_step_is_skipped_whole(config, tmp_path, monkeypatch):
    states, original = [], K2.forward

    def forward(self, tokens, targets=None, *args, **options):
        result = original(self, tokens, targets, *args, **options)
        if targets is not None and self.training:
            states.append({n: t.clone() for n, t in self.state_dict().items()})
            if len(states) in (5, 6):  # both micro-batches of step 3
                return result[0] * float("nan"), result[1]
        return result

    monkeypatch.setattr(K2, "forward", forward)
    run_train(config, "--max_steps=6")
    assert all(torch.equal(states[4][n], states[6][n]) for n in states[4])  # before step 3 = before step 4
    assert not all(torch.equal(states[6][n], states[8][n]) for n in states[6])
    events = records(tmp_path / "run", "event")
    assert [(e["step"], e["event"]) for e in events][0] == (3, "skip") and events[0]["loss"] is None
    assert records(tmp_path / "run")[2]["loss"] is None and math.isfinite(losses(tmp_path / "run")[-1][1])


def test_too_many_non_finite_steps_stop_the_run(config, monkeypatch):
    """Scorecard 9."""
    original = K2.forward
    monkeypatch.setattr(K2, "forward", lambda self, *a, **k: tuple(x * math.inf for x in original(self, *a, **k)))
    with pytest.raises(UserError, match="3 non-finite steps in a row"):
        run_train(config, "--max_skipped_steps=3")


def test_a_full_disk_costs_a_checkpoint_not_the_run(config, tmp_path, monkeypatch):
    original = checkpoint.save

    def save(folder, step, *rest):
        if step in (10, 20):
            raise OSError("No space left on device")
        return original(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(UserError, match="free some space"):
        run_train(config, "--save_interval=5")
    assert [e["step"] for e in records(tmp_path / "run", "event") if e["event"] == "save_failed"] == [10]
    assert checkpoint.find(tmp_path / "run").name == "step_00000015" and losses(tmp_path / "run")[-1][0] == 20


def test_what_a_model_says_cannot_break_the_samples_file(config, tmp_path):
    run_train(config, "--max_steps=4", "--sample_interval=2", "--sample_prompts=['\\n## step one\\n\\n~~~\\n']")
    run_train(config, "--max_steps=6", f"--resume={tmp_path}/run/checkpoints/step_00000004", "--sample_interval=2")
    found = re.findall(r"\n## step (\d+)\n", (tmp_path / "run/samples.md").read_text())
    assert [int(step) for step in found] == [2, 4, 6]


def test_no_config_assumes_what_the_text_is():
    for path in sorted((ROOT / "configs").glob("*.py")):
        assert settings.load([str(path)])[0].sample_prompts == [""]


def test_a_finished_run_says_so(config, capsys):
    run_train(config, "--max_steps=3")
    assert run_train(config, "--max_steps=3", "--resume") is None
    assert "raise --max_steps" in capsys.readouterr().out


def bad(name, *words, message, spoil=None):
    return pytest.param(words, message, spoil, id=name)


def cut_shard(data):
    path = data / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_bit(data):
    path = data / "train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "words, message, spoil",
    [
        bad("unknown key", "--maxsteps=3", message="did you mean 'max_steps'"),
        bad("wrong type", "--max_steps=many", message="expected int"),
        bad("impossible size", "--num_experts_per_tok=9", message="at most n_routed_experts=8"),
        bad("no data", "--data=nowhere", message="python -m data.prepare"),
        bad("truncated shard", message="truncated", spoil=cut_shard),
        bad("bad checksum", message="checksum", spoil=flip_bit),
        bad("vocabulary too small", "--vocab_size=64", message="set --vocab_size=257 or more"),
        bad("another tokenizer", "--tokenizer=TOKENIZER", message="another tokenizer"),
        bad("no such device", "--device=cuda", message="is not there; available"),
        bad(
            "sequence longer than the data",
            "--sequence_length=50000",
            "--max_position_embeddings=50000",
            message="fewer than one",
        ),
        bad("W&B without the package or a login", "--wandb=maybe", message="expected 'auto'"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(tmp_path, words, message, spoil):
    """Scorecard 11, 13, 15."""
    if torch.cuda.is_available() and "--device=cuda" in words:
        pytest.skip("this machine has the device")
    data = make_data(tmp_path / "data")
    if spoil:
        spoil(data)
    if "--tokenizer=TOKENIZER" in words:
        from data import tokenizer

        tokenizer.save(tokenizer.train_bpe(["some text"], 260), tmp_path / "tok")
        words = (f"--tokenizer={tmp_path / 'tok'}",)
    config = make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"))
    done = run_script("train.py", config, *words)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_needs_nothing(capsys):
    assert train.main(["--help"]) is None
    assert "--muon_lr=0.002" in capsys.readouterr().out
    train.main([str(ROOT / "configs/debug.py"), "--help"])
    assert "* --muon_lr=0.01  (float; default 0.002)" in capsys.readouterr().out


# ---------------------------------------------------------------------- W&B


def test_wandb_failures_never_stop_a_run(config, tmp_path, monkeypatch, capsys):
    class Broken:
        def init(self, **_):
            raise RuntimeError("service down")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    run_train(config, "--wandb=auto", "--max_steps=2")
    assert "W&B did not start (RuntimeError: service down)" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 2


def test_wandb_auto_is_off_without_a_login_and_gets_all_records_with_one(config, tmp_path, monkeypatch):
    calls = []

    class Fake:
        def init(self, **options):
            calls.append(("init", options))
            return self

        step = 0

        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append(("finish", None))

    monkeypatch.setitem(sys.modules, "wandb", Fake())
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run_train(config, "--wandb=auto", "--max_steps=2")
    assert calls == []
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    run_train(config, "--wandb=auto", "--max_steps=2", "--overwrite", "--eval_interval=1")
    options = calls[0][1]
    assert options["mode"] == "online" and options["project"] == "nanok2" and options["name"] == "run"
    logged = {key for step, numbers in calls[1:-1] for key in numbers}
    assert {"train/loss", "train/lr", "val/loss", "val/bits_per_byte"} <= logged and calls[-1][0] == "finish"


@pytest.mark.slow
def test_wandb_offline_writes_a_real_run(config, tmp_path):
    pytest.importorskip("wandb")
    run_script("train.py", config, "--wandb=offline", "--max_steps=2", f"--out_dir={tmp_path / 'run'}", check=0)
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
