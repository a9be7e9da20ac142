"""bench.load: biases that are solved make the load even, and the command reads a run as it was trained."""

import json

import pytest
import torch

from bench import load
from errors import UserError
from tests.helpers import make_config, run_train


def test_a_solved_bias_makes_its_own_tokens_even():
    """Random scores, some experts far more likely than others: by counting afterwards."""
    torch.manual_seed(0)
    logits_NE = torch.randn(4000, 16) + torch.linspace(-1, 1, 16)
    bias_E = load.solve(logits_NE, torch.zeros(16), 4)
    chosen = (logits_NE.sigmoid() + bias_E).topk(4).indices
    counts = torch.stack([(chosen == expert).sum() for expert in range(16)])
    assert load.busiest(logits_NE, torch.zeros(16), 4) > 1.5 > 1.05 > counts.max() / counts.float().mean()
    assert load.busiest(logits_NE, bias_E, 4) == pytest.approx((counts.max() * 16 / counts.sum()).item())


def test_the_command_reads_a_run_as_it_was_trained(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    config = make_config(tmp_path / "tiny.py", data=str(data), out_dir=str(tmp_path / "run"), global_batch_size=4)
    run_train(config, "--max_steps=2", "--decay_steps=1")
    load.main([str(tmp_path / "run"), "--batches=8"])
    found = json.loads(next((tmp_path / "out").glob("*-load-run.json")).read_text(encoding="utf-8"))
    sizes = [row["tokens"] for row in found["loads"]]
    from_one = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))["settings"]
    assert set(sizes) == {4 * from_one["sequence_length"], 16 * from_one["sequence_length"]}
    assert all(1.0 <= row["mean"] <= row["largest"] for row in found["loads"])
    with pytest.raises(UserError, match="a multiple of 4 batches"):
        load.main([str(tmp_path / "run"), "--batches=6"])
