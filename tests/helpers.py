"""Small models, data folders and runs for the tests."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import tokenizer
from data.shards import Writer
from errors import STOPPED
from model import ModelConfig, build
from ranks import parallel
from run import metrics
from tests import forks

ROOT = Path(__file__).parent.parent
TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)


DEBUG_SIZE = dict(  # configs/debug.py's model, with the vocabulary of bytes
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=2,
)


def tiny_config(**changes):
    config = ModelConfig(**TINY | changes)
    config.check_model()
    return config


def tiny_model(seed=0, **changes):
    """A small K2 in which nothing is at a neutral value: norms and router biases are random too."""
    model = build(tiny_config(**changes), "cpu").init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def tokens(batch, length, vocab=97, seed=0):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_data(folder, n_train=40_000, n_val=3_000, vocab=64, seed=0):
    """A shard folder of a learnable synthetic language: each token is a noisy function of the one before. Its
    tokenizer is `bytes` cut down to nothing special: ids below `vocab` are single bytes."""
    rng = np.random.default_rng(seed)

    def text(n):
        ids, state = [], 1
        for noise in rng.random(n):
            state = int(noise * 1e6) % vocab if noise < 0.1 else (state * 5 + 3) % vocab
            ids.append(state)
        return ids

    encoder = tokenizer.load("bytes")
    with Writer(folder, encoder.n_vocab) as writer:
        for split, count in (("train", n_train), ("val", n_val)):
            writer.write(split, text(count), count)
        writer.finish(
            lambda path: tokenizer.save(encoder, path),
            tokenizer="bytes",
            tokenizer_fingerprint=tokenizer.fingerprint(encoder),
        )
    return folder


def make_config(path, **changes):
    """Write a config file for a run of seconds; returns its path."""
    settings = (
        TINY
        | dict(
            vocab_size=257,
            sequence_length=32,
            global_batch_size=8,
            micro_batch_size=4,
            max_steps=20,
            warmup_steps=4,
            dtype="float32",
            log_interval=1,
            eval_interval=0,
            save_interval=0,
            initializer_range=0.02,
            muon_lr=1e-2,
            wandb="off",
            device="cpu",
        )
        | changes
    )
    Path(path).write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return str(path)


def run_train(*words):
    """train.main in this process."""
    return train.main([str(word) for word in words])


def small_run(folder, **changes):
    """Data, a config file and a run of a step or two in `folder`, without curves; returns the config file."""
    folder.mkdir(exist_ok=True)
    data = make_data(folder / "data", 2000, 300)
    small = dict(hidden_size=16, num_hidden_layers=2, global_batch_size=2, micro_batch_size=2)
    path = make_config(folder / "tiny.py", data=str(data), out_dir=str(folder / "run"), **small | changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "draw_curves", lambda folder: None)
        run_train(path)
    return path


def run_stopped(*words):
    """run_train of a run that a signal ends: saved, with the status that says so."""
    with pytest.raises(SystemExit) as end:
        run_train(*words)
    assert end.value.code == STOPPED


def run_restarting(*words):
    """run_train, started again with other words as often as it asks for that. Returns (last record, all words)."""
    asked = [list(map(str, words))]
    while True:
        try:
            return train.main(asked[-1]), asked
        except parallel.Restart as restart:
            asked.append(restart.words)


def run_script(*words, check=None, env=None, input="", **options):
    """A command in a process of its own from the repository root; check=0 asserts success. It is forked (see forks.py)
    unless it is to have an environment or options of subprocess.run, which may matter when an interpreter starts."""
    if env or options or forks.environment_changed():
        done = subprocess.run([sys.executable, *map(str, words)], text=True, input=input, **dict(
            cwd=ROOT, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
            | options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            paths = given, out, err = [Path(folder) / name for name in ("in", "out", "err")]
            given.write_text(input, encoding="utf-8")
            process = forks.Process(words, stdin=given, stdout=out, stderr=err)
            try:
                status = process.wait(300)
            finally:
                process.kill()
            _, out, err = [path.read_text(encoding="utf-8") for path in paths]
            done = subprocess.CompletedProcess(words, status, out, err)
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


def records(run, kind="train"):
    """The records of a kind; of events all but stragglers, which are the machine's affair."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines)
            if record["kind"] == kind and record.get("event") != "straggler"]


def stragglers(run):
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [r for r in map(json.loads, lines) if r.get("event") == "straggler"]


def losses(run):
    return [(record["step"], record["loss"]) for record in records(run)]


def final_tensors(run):
    """All tensors of the newest checkpoint, by name."""
    from run import checkpoint

    step_folder = checkpoint.find(run)
    stored = checkpoint._SafeReader(step_folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in stored.items()}
    checkpoint.load(step_folder, tensors)
    return tensors


def assert_equal_runs(one, other):
    """Every loss and every final tensor of two runs is bitwise the same."""
    assert losses(one) == losses(other)
    a, b = final_tensors(one), final_tensors(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty gives NaN, and huge integers: an element that a kernel does not write shows."""
    def poisoned(make):
        def filled(*args, **options):
            tensor = make(*args, **options)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)
        return filled

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield
