"""What the preparation of data once did without a word: each is refused, said or counted."""


import pytest

from data.shards import read_meta
from errors import UserError
from tests.test_prepare import DOCUMENTS, everything, jsonl, run


def account(out):
    return read_meta(out)["account"]


def refuse(message, out, *words):
    with pytest.raises(UserError, match=message):
        run(out, *words)
    assert not out.exists()


# ---------------------------------------------------------------------- which files


@pytest.mark.parametrize("names", [("train.jsonl", "test.jsonl"), ("Training-0.jsonl", "valid-0.jsonl", "more.jsonl"),
                                   ("train/0.jsonl", "dev/0.jsonl"), ("a.validation.jsonl", "a.test.jsonl")])
def test_files_for_validation_or_tests_are_not_trained_on(tmp_path, names):
    root = tmp_path / "training set"  # whose own words say nothing
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(root / name, [f"{name} {text}" for text in DOCUMENTS])
    said = r"by their names, and all would be trained on: .*--pattern='\*train\*'"
    refuse(said + ".*data.prepare hf '.*training set' --val_split=(test|valid)", tmp_path / "d", "jsonl", root)
    refuse(said + r", or take all by --pattern='\*'$", tmp_path / "d", "text", root)
    refuse(said, tmp_path / "d", "jsonl", *(root / name for name in names), "--pattern=*valid*")  # which chooses none
    assert len(everything(run(tmp_path / "d", "jsonl", root, "--pattern=*.jsonl"))) == 60 * len(names)
    one = run(tmp_path / "e", "jsonl", root / names[0])  # alone
    assert everything(one) == sorted(f"{names[0]} {text}" for text in DOCUMENTS)
    if names[0] == "train.jsonl":
        assert everything(run(tmp_path / "f", "jsonl", root, "--pattern=*train*")) == everything(one)


def test_names_that_say_one_split_or_several_at_once_are_no_reason(tmp_path):
    for name in ("train.txt", "pretrain.txt", "train_and_test.txt", "interval.txt"):
        (tmp_path / name).write_text(f"text of {name} " * 9)
    assert len(everything(run(tmp_path / "out/d", "text", tmp_path))) == 4
