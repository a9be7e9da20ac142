"""Hugging Face directories as others publish them: what is read is read exactly, everything else is refused or said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import export
import generate
import hf
import settings
from data import tokenizer
from errors import UserError
from hf_weights import INDEX
from tests.helpers import ROOT, tokens

SIZES = dict(vocab_size=300, hidden_size=136, intermediate_size=144, moe_intermediate_size=32, num_hidden_layers=3,
             num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
             qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
             first_k_dense_replace=1, max_position_embeddings=64, initializer_range=0.1, num_nextn_predict_layers=0)


def theirs(folder, **changes):
    """A directory as transformers writes it."""
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(config.json, tensors) of a small model."""
    folder = theirs(tmp_path_factory.mktemp("published") / "hf")
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), load_file(folder / "model.safetensors")


@pytest.fixture
def published(tmp_path, source):
    """A function that writes a directory: fields of config.json, the tensors, both with changes."""
    def write(tensors=None, without=(), name="hf", **fields):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = {key: value for key, value in {**source[0], **fields}.items() if key not in without}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = source[1] if tensors is None else tensors
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "model.safetensors")
        return folder

    return write


def logits(folder):
    with torch.no_grad():
        return hf.load_model(folder)(tokens(2, 30, 300))


def their_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens(2, 30, 300)).logits


# ---------------------------------------------------------------------- float8


def in_float8(tensors, block=(128, 128), which=lambda name: "proj" in name):
    """(published tensors, the same in float64 by hand, as float32): a scale for every block of a matrix."""
    stored, exact = {}, dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not which(name):
            stored[name] = tensor
            continue
        rows, columns = (-(-size // step) for size, step in zip(tensor.shape[-2:], block))
        scale = 0.5 + torch.rand(*tensor.shape[:-2], rows, columns, generator=torch.Generator().manual_seed(1))
        stored[name] = tensor.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        wide = stored[name].double()
        for i in range(rows):
            for j in range(columns):
                here = (..., slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                wide[here] *= scale[..., i, j, None, None].double()
        exact[name] = wide.float()
    return stored, exact


def stack_experts(tensors):
    """Experts as one tensor a layer, as transformers 5 keeps them in memory."""
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in (1, 2):
        stem = f"model.layers.{layer}.mlp.experts"
        part = lambda kind, stem=stem: torch.stack([tensors[f"{stem}.{i}.{kind}.weight"] for i in range(4)])
        stacked[f"{stem}.gate_up_proj"] = torch.cat((part("gate_proj"), part("up_proj")), 1)
        stacked[f"{stem}.down_proj"] = part("down_proj")
    return stacked


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("block", [None, [16, 24]])
def test_block_scaled_float8_is_what_its_scales_make_it(source, published, capsys, block, stacked):
    tensors = stack_experts(source[1]) if stacked else source[1]
    stored, exact = in_float8(tensors, block or (128, 128))
    quantised = {"quant_method": "fp8", "fmt": "e4m3"} | ({"weight_block_size": block} if block else {})
    ours = hf.load_model(published(stored, quantization_config=quantised, model_type="kimi_k2")).state_dict()
    assert f"{sum(t.ndim > 1 and 'proj' in n for n, t in tensors.items())} float8 matrices" in capsys.readouterr().err
    plain = hf.load_model(published(exact)).state_dict()
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in ours)


def test_float8_in_a_few_matrices_and_scales_in_bfloat16_are_read(source, published):
    stored, exact = in_float8(source[1], which=lambda name: "shared_experts" in name or "kv_b" in name)
    scales = {name: tensor.bfloat16() for name, tensor in stored.items() if name.endswith("_inv")}
    ours = hf.load_model(published(stored | scales)).state_dict()
    for name in (name.removesuffix("_scale_inv") for name in scales):
        assert (ours[name] / exact[name] - 1).nan_to_num().abs().max() < 2**-8


FIRST = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {FIRST: t[FIRST].to(torch.float8_e4m3fn)}, "float8 without"),
        (lambda t: {FIRST: t[FIRST].to(torch.float8_e4m3fn), FIRST + "_scale_inv": torch.ones(1)}, "scales"),
        (lambda t: {FIRST: t[FIRST].to(torch.float8_e5m2), FIRST + "_scale_inv": torch.ones(2, 2)}, "float8_e5m2"),
        (lambda t: {FIRST + "_scale_inv": torch.ones(2, 2)}, "does not know.*scale_inv"),  # of weights in float32
        (lambda t: {FIRST: t[FIRST].double()}, "float64"),
        (lambda t: {FIRST: t[FIRST] / 0}, "NaN or infinite"),
        (lambda t: {FIRST.replace("weight", "weight_packed"): torch.ones(4, dtype=torch.int32)}, "compressed-tensors"),
        (lambda t: {FIRST.replace("weight", "qweight"): torch.ones(4, dtype=torch.int32)}, "GPTQ or AWQ"),
        (lambda t: {FIRST + ".absmax": torch.ones(4)}, "bitsandbytes"),
        (lambda t: {FIRST.replace("weight", "weight_scale"): torch.ones(4)}, "modelopt"),
        (lambda t: {FIRST.replace("weight", "bias"): torch.ones(136)}, "does not know.*bias"),
        (lambda t: {FIRST: t[FIRST][:, :-1]}, "config.json implies"),
        (lambda t: {"model.layers.1.mlp.experts.2.up_proj.weight": torch.ones(31, 136)}, "do not fit together"),
    ],
)
def test_weights_that_are_not_what_they_seem_are_refused_by_name(source, published, change, message):
    with pytest.raises(UserError, match=message):
        hf.load_model(published(source[1] | change(source[1])))


def test_a_cast_that_kept_its_quantization_config_is_read_with_a_line(source, published, capsys):
    folder = published({name: tensor.bfloat16() for name, tensor in source[1].items()},
                       quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    ours = hf.load_model(folder).state_dict()
    assert "no tensor is quantised" in capsys.readouterr().err
    for name in ("model.embed_tokens.weight", FIRST, "model.layers.1.mlp.gate.e_score_correction_bias"):
        assert torch.equal(ours[name], source[1][name].bfloat16().float())


# ---------------------------------------------------------------------- layers and tensors that are more, or none


def ahead(tensors, layers=1):
    """Multi-token prediction layers behind the last, with the tensors that only they have and those that they share."""
    more = {}
    for number in range(3, 3 + layers):
        layer = dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), torch.ones(136)) | {
            "eh_proj": torch.ones(136, 272), "shared_head.head": tensors["lm_head.weight"]}
        more |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in layer.items()}
        more |= {k.replace("layers.2.", f"layers.{number}."): v for k, v in tensors.items() if "layers.2." in k}
    return tensors | more


@pytest.mark.parametrize("announced, there", [(1, 1), (2, 2), (1, 0), (0, 1), (None, 1), (1, 2)])
def test_of_the_layers_more_that_config_says_the_first_is_read(source, published, capsys, announced, there):
    folder = published(ahead(source[1], there), num_nextn_predict_layers=announced)
    if there > (announced or 0):
        with pytest.raises(UserError, match=f"num_nextn_predict_layers={announced or 0}, such as model.layers"):
            hf.load_model(folder)
        return
    assert torch.equal(logits(folder), logits(published(name="plain")))
    said, more = capsys.readouterr().err, f"{len(ahead(source[1])) - len(source[1])} tensors of 1 multi-token"
    assert said.count("note") == said.count(more) == (there > 1)
    assert hf.load_model(folder).config.mtp_depth == bool(there)


def test_tables_of_rope_are_left_out_with_a_line(source, published, capsys):
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    hf.load_model(published(source[1] | tables))
    assert "3 tensors with tables of RoPE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"n_shared_experts": 0},  # with tensors of size zero
        {"n_shared_experts": 2, "q_lora_rank": 24, "n_group": 2},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 7},
        {"tie_word_embeddings": True},
        {"norm_topk_prob": False, "routed_scaling_factor": 1.7, "rms_norm_eps": 1e-3},
        {"rope_parameters": dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16,
                                 mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1)},
    ],
    ids=str,
)
def test_what_transformers_writes_gives_its_logits(tmp_path, changes):
    folder = theirs(tmp_path / "hf", **changes)
    assert (logits(folder) - their_logits(folder)).abs().max() <= 1e-4


def test_our_export_without_shared_experts_comes_back_through_transformers(tmp_path):
    export.reverse(theirs(tmp_path / "theirs", n_shared_experts=0), tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "ours"), logits(tmp_path / "again"))


def test_a_tied_head_that_is_written_too_must_be_the_embedding(source, published):
    embedding = source[1]["model.embed_tokens.weight"]
    same = published(source[1] | {"lm_head.weight": embedding}, tie_word_embeddings=True)
    assert torch.equal(logits(same), logits(published(source[1] | {"lm_head.weight": embedding}, name="untied")))
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        hf.load_model(published(tie_word_embeddings=True))


# ---------------------------------------------------------------------- config.json


EVERYWHERE = dict(  # in the config.json of DeepSeek-V3, Kimi K2 and Moonlight
    architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001,
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, bos_token_id=163584, eos_token_id=163585,
    ep_size=1, hidden_act="silu", initializer_range=0.02, kv_lora_rank=512, moe_layer_freq=1, norm_topk_prob=True,
    num_nextn_predict_layers=0, pretraining_tp=1, qk_nope_head_dim=128, qk_rope_head_dim=64, scoring_func="sigmoid",
    seq_aux=True, tie_word_embeddings=False, topk_method="noaux_tc", torch_dtype="bfloat16", use_cache=True,
    transformers_version="4.48.3", v_head_dim=128, vocab_size=163840, n_group=1, topk_group=1, rope_theta=50000.0,
    first_k_dense_replace=1)
YARN = dict(type="yarn", beta_fast=1.0, beta_slow=1.0, factor=32.0, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=4096)
K2 = dict(
    model_type="kimi_k2", hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=64, num_key_value_heads=64, q_lora_rank=1536, n_routed_experts=384, num_experts_per_tok=8,
    n_shared_experts=1, routed_scaling_factor=2.827, rms_norm_eps=1e-6, max_position_embeddings=131072,
    rope_scaling=YARN, quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
                                                weight_block_size=[128, 128]))
MOONLIGHT = dict(
    model_type="deepseek_v3", hidden_size=2048, intermediate_size=11264, moe_intermediate_size=1408,
    num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, n_routed_experts=64,
    num_experts_per_tok=6, n_shared_experts=2, routed_scaling_factor=2.446, rms_norm_eps=1e-5, rope_scaling=None,
    max_position_embeddings=8192)


@pytest.mark.parametrize("name, fields", [("k2", K2), ("moonlight", MOONLIGHT)])
def test_the_config_of_published_models_is_that_of_our_config_files(tmp_path, name, fields):
    (tmp_path / "config.json").write_text(json.dumps(EVERYWHERE | fields), encoding="utf-8")
    ours, file = hf.from_hf_config(tmp_path), settings.read_file(ROOT / f"configs/{name}.py")
    for field in (*hf.SAME, "rope_theta"):
        if field != "max_position_embeddings" and field in file:  # ours trains at a shorter context
            assert getattr(ours, field) == file[field], field
    assert ours.rope_scaling == fields["rope_scaling"] and ours.rms_norm_eps == fields["rms_norm_eps"]


def test_the_published_form_of_yarn_gives_the_logits_of_transformers(published):
    rope = YARN | {"original_max_position_embeddings": 16}
    folder = published(without=["rope_parameters"], rope_theta=500.0, rope_scaling=rope, topk_method="noaux_tc")
    assert (logits(folder) - their_logits(folder)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "deepseek_v2"}, "'deepseek_v2' model"),
        ({"model_type": "kimi_k25", "text_config": {"hidden_size": 136}}, "around the language model of its text"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"final_logit_softcapping": 30.0}, "softcapping"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"head_dim": 99}, "head_dim"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_scaling"),
        ({"rope_theta": 5.0}, "two things"),
        ({"quantization_config": {"weight_block_size": "x"}}, "weight_block_size"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"index_topk": 2048}, "index_topk"),
        ({"n_group": None}, "lacks n_group"),
    ],
    ids=str,
)
def test_another_arithmetic_is_refused_by_name(published, fields, message):
    with pytest.raises(UserError, match=message):
        hf.load_model(published(**fields))


@pytest.mark.parametrize("name", ["routed_scaling_factor", "n_group", "rms_norm_eps", "vocab_size", "rope_parameters"])
def test_a_missing_setting_is_not_guessed(published, name):
    with pytest.raises(UserError, match=f"lacks {'rope_theta' if name == 'rope_parameters' else name}"):
        hf.load_model(published(without=[name]))


def test_settings_without_meaning_are_left_out(published):
    folder = published(attention_dropout=0.1, unsloth_version="2025.1", ep_size=8, mlp_bias=False, logit_scale=1.0)
    assert torch.equal(logits(folder), logits(published(name="plain")))


# ---------------------------------------------------------------------- files


FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def in_two_files(folder, source):
    """The directory as two numbered files and their index."""
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(source[1]), {}
    for file, part in zip(FILES, (names[::2], names[1::2])):
        save_file({name: source[1][name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def test_the_index_says_which_files_are_the_model(source, published, capsys):
    folder = in_two_files(published(), source)
    wrong = {"model.norm.weight": torch.full((136,), 7.0)}
    for name in ("consolidated.safetensors", "model-00001-of-00003.safetensors"):
        save_file(wrong, folder / name)
    for name in ("modeling_deepseek.py", "tokenization_kimi.py", "chat_template.jinja", "README.md"):
        (folder / name).touch()
    assert torch.equal(logits(folder), logits(published(name="plain")))
    said = capsys.readouterr().err
    assert "5 files or folders are left unread: chat_template.jinja, consolidated.safetensors, model-00001" in said
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(UserError, match="two models"):
        hf.load_model(folder)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / FILES[1]).unlink(), "names 1 files that are missing"),
        (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
        (lambda f: (f / FILES[1]).write_text("version https://git-lfs"), "git lfs pull"),
        (lambda f: (f / INDEX).unlink(), None),  # the files speak for themselves
        (lambda f: [(f / INDEX).unlink(), shutil.copy(f / FILES[0], f / "model-3.safetensors")], "and in another file"),
        (lambda f: [(f / a).rename(f / b) for a, b in zip([*FILES, "x"], ["x", *FILES])], f"is in {FILES[0]}, but it"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "LoRA adapter"),
    ],
)
def test_files_that_contradict_each_other_are_refused(source, published, spoil, message):
    folder = in_two_files(published(), source)
    spoil(folder)
    if message is None:
        assert torch.equal(logits(folder), logits(published(name="plain")))
        return
    with pytest.raises(UserError, match=message):
        hf.load_model(folder)


OTHERS = {"pytorch_model.bin": "a pickle", "k2-Q4_K_M.gguf": "GGUF", "adapter_model.safetensors": "LoRA adapter"}


@pytest.mark.parametrize("name, message", OTHERS.items())
@pytest.mark.parametrize("with_config", [True, False])
def test_other_kinds_of_files_are_refused_with_the_way_out(published, tmp_path, name, message, with_config):
    folder = published()
    (folder / "model.safetensors").rename(folder / name)
    if not with_config:
        (folder / "config.json").unlink()
    for action in (lambda: generate.load(folder, "cpu"), lambda: export.reverse(folder, tmp_path / "run")):
        with pytest.raises(UserError, match=message):
            action()


# ---------------------------------------------------------------------- the tokenizer beside the weights


def test_a_tokenizer_beside_the_weights_is_used(published, tmp_path):
    encoder = tokenizer.train_bpe(["def f(x): return x\n" * 20], 270)
    about = hf.to_hf_tokenizer(encoder)[0]
    folder = published()
    (folder / "tokenizer.json").write_text(json.dumps(about), encoding="utf-8")
    found = generate.load(folder, "cpu")[1]
    assert found.encode_ordinary("def f(y)") == encoder.encode_ordinary("def f(y)")
    export.reverse(folder, tmp_path / "run")
    kept = generate.load(tmp_path / "run", "cpu")[1]
    assert tokenizer.fingerprint(kept) == tokenizer.fingerprint(found)


@pytest.mark.parametrize("broken", [True, False])
def test_a_tokenizer_that_is_not_the_models_is_said_and_the_weights_are_read(published, tmp_path, capsys, broken):
    """broken: it cannot be read; else it has more ids than the model."""
    text = "the cat sat on the mat while 日本語 and другой text came by, again and again"
    about = "{}" if broken else json.dumps(hf.to_hf_tokenizer(tokenizer.train_bpe([text * 3], 310))[0])
    folder = published()
    (folder / "tokenizer.json").write_text(about, encoding="utf-8")
    assert generate.load(folder, "cpu")[1] is None
    assert "its tokenizer is not: " in capsys.readouterr().err
    export.main(["--reverse", str(folder), str(tmp_path / "run")])
    assert "--tokenizer=TOKENIZER" in capsys.readouterr().out and not (tmp_path / "run/tokenizer").exists()
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        generate.main([str(folder), "--prompt=a"])
