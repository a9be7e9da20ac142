"""bench.context measures what it says: with models that copy, that know nothing, and that know less far on."""

import math
import types

import pytest
import torch
from torch import nn

from bench import context
from data import tokenizer
from data.shards import Writer
from errors import UserError
from tests.helpers import make_config, run_train


class Pretended(nn.Module):
    """Logits made by a function of the ids so far; its head has nothing left to do."""

    def __init__(self, logits):
        super().__init__()
        self.device, self.logits = torch.device("cpu"), logits
        self.config, self.pp, self.lm_head = types.SimpleNamespace(vocab_size=257), 1, nn.Identity()

    def forward(self, ids_BT):
        return torch.stack([self.logits(row) for row in ids_BT])

    def trunk(self, ids_BT, cache, first_BT):
        return (self(ids_BT),)


def copying(ids):
    """After six ids that stood there before, what followed them then."""
    logits_TV, seen = torch.zeros(len(ids), 257), {}
    for t in range(5, len(ids)):
        before = tuple(ids[t - 5:t + 1].tolist())
        if before in seen:
            logits_TV[t, ids[seen[before] + 1]] = 9.0
        seen.setdefault(before, t)
    return logits_TV


@pytest.mark.parametrize("distance", [16, 100])
def test_a_model_that_copies_finds_every_value(distance):
    encoder = tokenizer.load("bytes")
    documents = [torch.randint(0, 256, (241,), generator=torch.Generator().manual_seed(n)) for n in range(16)]
    assert context.found_again(Pretended(copying), encoder, documents, 240, distance) == 1
    nothing = Pretended(lambda ids: torch.zeros(len(ids), 257))
    assert context.found_again(nothing, encoder, documents, 240, distance) == 1 / len(context.WORDS)
    (rows, gold), *_ = context.needles(documents[3:], encoder, 240, distance)
    ids, n = rows[0]
    text = bytes(ids.tolist())
    assert len(ids) <= 241 and text.endswith(b'needle = "marble"') and n == len(b'marble"') and gold == 0
    assert text.rindex(b'\nneedle = "marble"') - text.index(b'\nneedle = "marble"\n') == distance + 19
    with pytest.raises(UserError, match="no room for a distance of 230"):
        list(context.needles(documents, encoder, 240, 230))


def test_the_loss_by_position_is_the_mean_over_documents():
    def fading(ids):  # certain of 0 up to position 4, and of nothing from there on
        logits_TV = torch.zeros(len(ids), 257)
        logits_TV[:4, 0] = 50.0
        return logits_TV
    rows = [torch.zeros(13, dtype=torch.int64), torch.tensor([0] * 5 + [7] * 8)]
    assert context.by_position(Pretended(fading), rows, [4, 8]) == pytest.approx([0, math.log(257), math.log(257)])


def test_a_run_beside_itself_stretched(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    run_train(make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "run"), max_steps=2,
                          num_hidden_layers=2))
    monkeypatch.setattr(context, "long_documents", lambda folder, separator, length, most: [torch.arange(length + 1)])
    context.main([str(tmp_path / "run"), "--length=160", "--items=1"])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run'}, as it is" in said and "YaRN untrained" in said and "160: " in said
    with pytest.raises(UserError, match="what is --lenght=3"):
        context.main(["x", "--lenght=3"])


def test_documents_are_long_enough_and_whole(tmp_path):
    with Writer(tmp_path / "d", 257) as writer:
        for split in ("train", "val"):
            writer.write(split, [256, 1, 2, 3, 256, 4, 256, 5, 6, 7, 8], 8)
        writer.finish(lambda path: None)
    rows = context.long_documents(tmp_path / "d", 256, 3, 9)
    assert [row.tolist() for row in rows] == [[256, 1, 2, 3], [256, 5, 6, 7]]
    with pytest.raises(UserError, match="smaller --length"):
        context.long_documents(tmp_path / "d", 256, 9, 9)
