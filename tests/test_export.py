"""Export to a Hugging Face directory and back, through files and the command line."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import generate
import hf
from data import prepare, tokenizer
from data.tasks import coded
from errors import UserError
from tests.helpers import ROOT, make_config, records, run_train, tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on real text with a trained BPE, so that the tokenizer has merges."""
    folder = tmp_path_factory.mktemp("export")
    prepare.main(
        [
            "text",
            *map(str, ROOT.glob("*.py")),
            str(ROOT / "run"),
            "--pattern=*.py",
            f"--out={folder / 'data'}",
            "--vocab_size=400",
            "--val_fraction=0.2",
        ]
    )
    run_train(
        make_config(
            folder / "c.py", data=str(folder / "data"), out_dir=str(folder / "run"), vocab_size=420, q_lora_rank=24
        )
    )
    return folder / "run"


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 60_000])
def test_transformers_loads_the_export_with_equal_logits_and_ids(run, tmp_path, shard_bytes):
    export.export(run, tmp_path / "hf", shard_bytes=shard_bytes)
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 10**9 else len(files) > 3
    model, encoder = generate.load(run, "cpu")
    other, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = tokens(2, 50, 420)
    with torch.no_grad():
        assert (model(x) - other(x).logits).abs().max() <= 1e-4
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (
        "def f(x):\n        return x  # é 中文 123456\n\n\n",
        "  <|endoftext|>  class A",
        "",
        "\u00a0\u2028\tend",
    ):
        ids = encoder.encode(text, allowed_special="all")
        assert (
            theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == encoder.decode(ids) == text
        )
    assert theirs.eos_token_id == tokenizer.end_of_text(encoder) == other.config.eos_token_id
    greedy = other.generate(x[:1, :5], max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:]
    assert greedy.tolist() == [int(i) for i in model.generate(x[:1, :5], 10, temperature=0)]


def test_there_and_back_is_bitwise_and_the_printed_command_trains(run, tmp_path, monkeypatch, capsys):
    """On folders whose names have a space and letters that are not ASCII, from the command line that was printed."""
    there, back = tmp_path / "größe hf", tmp_path / "zurück 1"
    export.main([str(run), str(there)])
    lines, loaded = capsys.readouterr().out.splitlines(), {}
    assert lines[0] == f"wrote {there}; it loads with transformers:" and len(lines) == 4
    exec("\n".join(line.strip() for line in lines[1:]), loaded)
    model, encoder = generate.load(run, "cpu")
    assert (loaded["model"](tokens(1, 9)).logits.float() - model(tokens(1, 9))).abs().max() <= 1e-4
    assert loaded["tokenizer"].encode("def f") == encoder.encode_ordinary("def f")
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        export.main(["--reverse", there.name, back.name])
    printed = capsys.readouterr().out
    for source in (there, back):
        again, encoder = generate.load(source, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        assert encoder.encode_ordinary("def f") and again.state_dict().keys() == model.state_dict().keys()
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in sorted(ROOT.glob("*.py"))[:12]:
        shutil.copy(path, texts)
    lines = [line.split(":  ", 1)[1] for line in printed.splitlines() if ":  " in line]
    assert lines == [line.split(":  ", 1)[1] for line in (back / "config.py").read_text("utf-8").splitlines()[:2]]
    train_words, prepare_words = (shlex.split(line) for line in lines)
    assert train_words[:2] == [sys.executable, str(ROOT / "train.py")]
    assert prepare_words[:4] == [f"PYTHONPATH={ROOT}", sys.executable, "-m", "data.prepare"]
    place = {"TEXTS": str(texts), "--out=FOLDER": f"--out={tmp_path}/data", "--data=FOLDER": f"--data={tmp_path}/data"}
    monkeypatch.chdir(tmp_path)
    prepare.main([place.get(word, word) for word in prepare_words[4:]])
    run_train(*[place.get(word, word) for word in train_words[2:]], "--max_steps=1", "--eval_interval=0")
    assert [record["step"] for record in records(back)] == [1]
    about = json.loads((back / "config.json").read_text("utf-8"))
    assert about["imported_from"] == there.name  # a training keeps it
    settings = about["settings"]
    assert settings["sequence_length"] <= settings["max_position_embeddings"] and settings["device"] == "auto"
    assert settings["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert records(back)[0]["loss"] < (records(run)[-1]["loss"] + records(run)[0]["loss"]) / 2  # from what was learnt


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_all_files_have_the_mode_that_the_umask_gives(run, tmp_path, mask):
    before = os.umask(mask)
    try:
        export.export(run, tmp_path / "one")
        export.export(run, tmp_path / "many", shard_bytes=60_000)
        export.reverse(tmp_path / "one", tmp_path / "back")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_directory_can_be_exported_again_and_has_no_best(run, data, tmp_path):
    export.export(run, tmp_path / "hf")
    export.export(tmp_path / "hf", tmp_path / "again")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for source in (tmp_path / "hf", run / "checkpoints/step_00000020"):
        with pytest.raises(UserError, match="holds one model"):
            export.export(source, tmp_path / "best", which="best")
    for words, message in ((["--rev"], "unrecognized arguments: --rev"), (["--dtype=int8"], "invalid choice: 'int8'"),
                           (["--check-point=best"], "unrecognized arguments: --check_point=best")):
        with pytest.raises(UserError, match=message + r".*\(see --help\)$"):
            export.main([str(run), str(tmp_path / "x"), *words])
    for folder in (data, shutil.copytree(data, tmp_path / "no meta", ignore=lambda *_: ["meta.json"])):
        for words in ([str(folder), str(tmp_path / "x")], ["--reverse", str(folder), str(tmp_path / "x")]):
            with pytest.raises(UserError, match=f"{folder.name} holds prepared data, not a model"):
                export.main(words)
    with pytest.raises(UserError, match="--reverse takes no --checkpoint and no --dtype"):
        export.main(["--reverse", str(tmp_path / "hf"), str(tmp_path / "back"), "--dtype", "bfloat16"])
    with pytest.raises(UserError, match="not empty"):  # a run is not overwritten by another model
        export.reverse(tmp_path / "hf", run)


def test_what_a_type_cannot_hold_is_not_exported(run, tmp_path, monkeypatch, capsys):
    model, _ = generate.load(run, "cpu")
    model.lm_head.weight.data[3, 5] = 1e5
    monkeypatch.setattr(generate, "load", lambda *args, **options: (model, None))
    with pytest.raises(UserError, match="lm_head.weight would have 1 values that are NaN or infinite in torch.float16"):
        export.export(run, tmp_path / "hf", dtype="float16")
    assert not list(tmp_path.iterdir())
    export.export(run, tmp_path / "hf")
    assert "gets no tokenizer" in capsys.readouterr().err and not (tmp_path / "hf/tokenizer.json").exists()


def test_files_are_utf_8_whatever_the_locale(run, tmp_path, monkeypatch):
    """As with LC_ALL=en_US: what names no encoding writes Latin-1."""
    import builtins
    import io

    plain = io.open

    def latin(file, mode="r", buffering=-1, encoding=None, *args, **options):
        odd = "b" not in mode and encoding in (None, "locale")
        return plain(file, mode, buffering, "latin-1" if odd else encoding, *args, **options)

    encoder = tokenizer.train_bpe(["Größe 世界 🙂 привет " * 9], 300)
    model, _ = generate.load(run, "cpu")
    monkeypatch.setattr(generate, "load", lambda *args, **options: (model, encoder))
    monkeypatch.setattr(io, "open", latin)
    monkeypatch.setattr(builtins, "open", latin)
    export.export(run, tmp_path / "größe 世界")
    export.reverse(tmp_path / "größe 世界", tmp_path / "世界")
    monkeypatch.undo()
    written = json.loads((tmp_path / "größe 世界/tokenizer.json").read_text("utf-8"))
    assert written == hf.to_hf_tokenizer(encoder)[0] and "世界" in Path(tmp_path / "世界/config.py").read_text("utf-8")


def test_bfloat16_export_keeps_the_router_bias_in_fp32(run, tmp_path):
    from safetensors.torch import load_file

    export.export(run, tmp_path / "hf", dtype="bfloat16")
    dtypes = {
        name.split(".")[-1]: tensor.dtype for name, tensor in load_file(tmp_path / "hf/model.safetensors").items()
    }
    assert dtypes == {"weight": torch.bfloat16, "e_score_correction_bias": torch.float32}


def test_published_config_forms_are_read(run, tmp_path):
    export.export(run, tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    stored = json.loads(path.read_text())
    ours = hf.from_hf_config(tmp_path / "hf")
    newer = {**stored, "rope_parameters": {"rope_type": "default", "rope_theta": stored["rope_theta"]}}
    del newer["rope_theta"], newer["rope_scaling"]
    kimi = {**stored, "model_type": "kimi_k2", "ep_size": 1, "auto_map": {}, "pretraining_tp": 1}
    for form in (newer, kimi):
        path.write_text(json.dumps(form))
        assert hf.from_hf_config(tmp_path / "hf") == ours


def test_what_a_directory_begins_and_ends_texts_with_is_used_and_what_is_not_kept_is_said(run, tmp_path, capsys):
    plain = export.export(run, tmp_path / "hf")
    there = shutil.copytree(plain, tmp_path / "bos", ignore=shutil.ignore_patterns("tokenizer"))
    stored = json.loads((there / "tokenizer.json").read_text("utf-8"))
    stored["added_tokens"] += [stored["added_tokens"][0] | {"id": id, "content": text} for id, text in (
        (400, "<s>"), (401, "<end>"), (402, "<turn>"))]
    (there / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    change(there, "tokenizer_config.json", bos_token={"content": "<s>"}, add_bos_token=True, chat_template="{{ x }}")
    change(there, "generation_config.json", bos_token_id=400, eos_token_id=[399, 401, 402])
    model, encoder = generate.load(there, "cpu")
    assert generate.encode_prompt(encoder, "def") == [400, *encoder.encode_ordinary("def")]
    assert coded(encoder, "def").tolist() == [400, *encoder.encode_ordinary("def")]
    letters, stops = encoder.encode_ordinary("abc"), []
    model.generate = lambda *args, stop, **options: stops.append(stop) or (
        torch.tensor([first, second]) for first, second in zip([letters[0], 402, 402], [*letters[1:], 401]))
    assert [text for _, text, _ in generate.complete(model, encoder, [[1], [2]], 9, [0, 0])] == ["a", "bc"]
    for end in (399, 401, 402):
        model.generate = lambda *args, stop, end=end, **options: stops.append(stop) or map(torch.tensor, (
            [letters[0]], [end], [letters[1]]))
        assert "".join(generate.stream_text(model, encoder, [1], 9)) == "a"
    assert all({*stop} == {399, 401, 402} for stop in stops)
    change(there, "tokenizer_config.json", add_bos_token=False)
    assert generate.encode_prompt(generate.load(there, "cpu")[1], "")[0] == 399
    capsys.readouterr()
    for written in (lambda: export.reverse(there, tmp_path / "back"), lambda: export.export(there, tmp_path / "again")):
        written()
        assert "begins and ends texts of " in (told := capsys.readouterr().err)
        assert "bos: a chat template, id 400, id 401, id 402; here it is id 399 alone. Copy the rest" in told
    for source, target in ((plain, "x"), (tmp_path / "back", "y")):
        export.export(source, tmp_path / target)
    assert "not kept" not in capsys.readouterr().err


def test_a_tokenizer_that_cannot_be_written_is_refused_before_the_weights_are(run, tmp_path, monkeypatch):
    def refuse(encoder):
        raise UserError("no tokenizer.json here")

    monkeypatch.setattr(hf, "to_hf_tokenizer", refuse)
    monkeypatch.setattr(hf, "to_hf_tensors", lambda *args: pytest.fail("weights are written"))
    with pytest.raises(UserError, match="no tokenizer.json here"):
        export.export(run, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def change(folder, name="config.json", **fields):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: change(f, model_type="llama"), "'llama' model"),
        (lambda f: change(f, attention_bias=True), "attention_bias"),
        (lambda f: change(f, use_qk_norm=True), "use_qk_norm"),
        (lambda f: change(f, n_shared_experts=0), "does not know"),
        (lambda f: change(f, hidden_size=64), "config.json implies"),
        (lambda f: change(f, q_lora_rank=None), "lacks the tensor"),
        (lambda f: change(f, first_k_dense_replace=2), "lacks the"),
        (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "damaged"),
        (lambda f: (f / "config.json").unlink(), "no Hugging"),
    ],
)
def test_what_cannot_be_imported_is_said_and_nothing_is_written(run, tmp_path, spoil, message):
    export.export(run, tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        export.reverse(tmp_path / "hf", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_an_existing_folder_and_a_baseline_are_refused(run, tmp_path, data):
    (tmp_path / "hf").mkdir()
    export.export(run, tmp_path / "hf")  # empty is fine
    with pytest.raises(UserError, match="not empty"):
        export.export(run, tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf")
    config = make_config(tmp_path / "c.py", data=str(data), out_dir=str(tmp_path / "mha"), attention="mha", max_steps=1)
    run_train(config)
    with pytest.raises(UserError, match="only MLA models"):
        export.main([str(tmp_path / "mha"), str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()


def test_gpt2_like_ranks_become_a_tokenizer_json(tmp_path):
    """Merges are recovered from ranks alone, as for a tiktoken encoding whose merges nobody kept."""
    encoder = tokenizer.train_bpe([(ROOT / "model.py").read_text()], 500)
    ranks = encoder._mergeable_ranks
    for token in ranks:
        if len(token) > 1:
            left, right = hf.merge_parts(ranks, token)
            assert left + right == token and max(ranks[left], ranks[right]) < ranks[token]


def test_possessive_counts_in_a_pattern_keep_their_meaning():
    """cl100k_base and o200k_base cut numbers by \\p{N}{1,3}+, which tokenizers would read as a repeated group."""
    from tokenizers import Tokenizer

    pattern = r"\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++|\s+"
    encoder = tokenizer.train_bpe(["1234567 12 345 678 9876 abc def"] * 5, 290, pattern=pattern)
    theirs = Tokenizer.from_str(json.dumps(hf.to_hf_tokenizer(encoder)[0]))
    for text in ("1234567", "abc 98765 12", "7" * 20):
        assert theirs.encode(text).ids == encoder.encode_ordinary(text)


def test_targets_that_are_links_or_no_names(run, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "", "../here", tmp_path / "here"):
        with pytest.raises(UserError, match="is the folder that you are in"):
            export.export(run, name)
    assert export.export(run, "../link") == Path("../link")
    assert (tmp_path / "there/config.json").is_file() and (tmp_path / "link").is_symlink()
    with pytest.raises(UserError, match="exists and is not empty"):
        export.export(run, "../link")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".partial" or path.name == "here") == [
        "here"] and not any(Path().iterdir())


def test_an_imported_model_keeps_its_tokenizer(run, tmp_path, data):
    export.export(run, tmp_path / "hf")
    export.reverse(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(UserError, match="another tokenizer"):
        run_train(tmp_path / "back/config.py", "--resume", f"--data={data}", "--sequence_length=32", "--device=cpu")


def test_unknown_rope_settings_are_refused_not_ignored(run, tmp_path):
    export.export(run, tmp_path / "hf")
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    change(tmp_path / "hf", rope_scaling={**yarn, "truncate": True, "attention_factor": None})
    assert hf.from_hf_config(tmp_path / "hf").rope_scaling == yarn
    change(tmp_path / "hf", rope_scaling={**yarn, "attention_factor": 3.0})
    with pytest.raises(UserError, match="rope_scaling"):
        hf.from_hf_config(tmp_path / "hf")
