"""Export to a Hugging Face directory and back, through files and the command line."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import generate
import hf
from data import prepare, tokenizer
from errors import UserError
from tests.helpers import ROOT, make_config, records, run_script, run_train, tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on real text with a trained BPE, so that the tokenizer has merges."""
    folder = tmp_path_factory.mktemp("export")
    prepare.main(
        [
            "text",
            *map(str, ROOT.glob("*.py")),
            str(ROOT / "tests"),
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


def test_there_and_back_is_bitwise_and_training_goes_on(run, tmp_path):
    run_script("export.py", run, tmp_path / "hf", check=0)
    run_script("export.py", "--reverse", tmp_path / "hf", tmp_path / "back", check=0)
    model, _ = generate.load(run, "cpu")
    for source in (tmp_path / "hf", tmp_path / "back"):
        again, encoder = generate.load(source, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
        assert encoder.encode_ordinary("def f") and again.state_dict().keys() == model.state_dict().keys()
    data = json.loads((run / "config.json").read_text())["settings"]["data"]
    options = [
        f"--data={data}",
        "--max_steps=3",
        "--sequence_length=32",
        "--global_batch_size=8",
        "--micro_batch_size=8",
        "--dtype=float32",
        "--log_interval=1",
        "--wandb=off",
        "--eval_interval=0",
        "--device=cpu",
    ]
    run_train(tmp_path / "back/config.py", "--resume", *options)
    trained, imported = records(run)[-1]["loss"], records(tmp_path / "back")[0]["loss"]
    assert imported < (trained + records(run)[0]["loss"]) / 2  # it starts from what was learnt
    assert [r["step"] for r in records(tmp_path / "back")] == [1, 2, 3]


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


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: change(f, model_type="llama"), "'llama' model"),
        (lambda f: change(f, attention_bias=True), "attention_bias"),
        (lambda f: change(f, quantization_config={}), "quantised"),
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
    done = run_script("export.py", tmp_path / "mha", tmp_path / "hf", check=2)
    assert "only MLA models" in done.stderr and not (tmp_path / "hf").exists()


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
