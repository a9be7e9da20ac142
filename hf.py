"""The Hugging Face side of a model: config.json, weight names and tokenizer.json of the DeepSeek-V3 architecture.

Our parameters already carry Hugging Face's names; on disk every expert's gate, up and down matrix is a tensor of its
own, and the layer of multi-token prediction, behind the others, holds the embedding and the head once more, as
DeepSeek-V3's does. Used by export.py (out and in) and generate.py (loading an exported directory).
"""

import re
from pathlib import Path

import torch

from data.convert import byte_letters, merge_parts
from data.shards import read_json
from data.tokenizer import end_of_text
from data.words import UNKNOWN, WORD, SentencePiece, Words
from errors import UserError, progress
from hf_weights import Published, note, refuse_other_kinds
from model import build
from settings import checked, model_config

# config.json fields with the same name and meaning on both sides
SAME = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob",
        "routed_scaling_factor", "first_k_dense_replace", "rms_norm_eps", "max_position_embeddings",
        "tie_word_embeddings", "initializer_range")
# Those that a published config.json may leave out or leave empty; the experts' may be if there are none.
OPTIONAL = {"q_lora_rank", "n_routed_experts", "n_shared_experts", "tie_word_embeddings", "initializer_range"}
OF_EXPERTS = {"moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob",
              "routed_scaling_factor", "first_k_dense_replace"}
# A field of such a name that is not known here is taken to change the arithmetic.
TELLING = re.compile(r"bias|soft_?cap|window|multiplier|scal|norm|rotary|rope|alibi|activation|_act$|func|method|index|"
                     r"head|lora|layer_types|gate|sparse|text_config|vision")


def is_hf(folder):
    """Whether a folder is a Hugging Face directory, as opposed to a run, whose config.json names no model_type."""
    path = Path(folder) / "config.json"
    return path.is_file() and not {"model_type", "architectures"}.isdisjoint(read_json(path))


# ----------------------------------------------------------------------------- config.json

def to_hf_config(config, encoder, dtype):
    """config.json of DeepseekV3ForCausalLM as a dict; every field is written, because its defaults are
    DeepSeek-V3's."""
    if config.attention != "mla":
        raise UserError("attention='mha' has no place in the DeepSeek-V3 architecture; only MLA models are exported")
    end = end_of_text(encoder) if encoder else None
    same = {name: getattr(config, name) for name in SAME}
    if not config.n_routed_experts:  # all dense
        same |= {"first_k_dense_replace": config.num_hidden_layers, "routed_scaling_factor": 1.0}
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": dtype, **same,
            "num_key_value_heads": config.num_attention_heads, "attention_bias": False, "attention_dropout": 0.0,
            "rope_theta": config.rope_theta, "rope_interleave": True,
            "rope_scaling": config.rope_scaling and {**config.rope_scaling}, "hidden_act": "silu",
            "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
            "aux_loss_alpha": config.aux_loss_alpha, "seq_aux": True, "num_nextn_predict_layers": config.mtp_depth,
            "bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "use_cache": True}


def from_hf_config(folder):
    """The ModelConfig of a DeepSeek-V3-architecture directory, in the published form or as transformers 5 writes it."""
    path = Path(folder) / "config.json"
    stored = read_json(path)
    if stored.get("model_type") not in ("deepseek_v3", "kimi_k2"):
        inside = " around the language model of its text_config, to be extracted with its tensors first"
        raise UserError(f"{folder} is a {stored.get('model_type')!r} model{inside if 'text_config' in stored else ''}; "
                        "only the DeepSeek-V3 architecture is read (model_type deepseek_v3 or kimi_k2)")
    needed = set(SAME) - OPTIONAL - (set() if stored.get("n_routed_experts") else OF_EXPERTS)
    forms = [stored[name] for name in ("rope_parameters", "rope_scaling") if stored.get(name)]
    rope = checked("rope_scaling", forms[0] if forms else {}, f"in {path}")
    thetas = [form["rope_theta"] for form in (stored, rope) if form.get("rope_theta") is not None]
    if forms[1:] not in ([], forms[:1]) or thetas[1:] not in ([], thetas[:1]):
        raise UserError(f"{path} says two things in rope_theta, rope_scaling and rope_parameters: keep what is meant")
    if missing := sorted(name for name in needed if stored.get(name) is None) + ["rope_theta"] * (not thetas):
        raise UserError(f"{path} lacks {', '.join(missing)}: no value is guessed; see the model that it was made from")
    fields = {"aux_loss_alpha": 0.0, "n_routed_experts": 0, "n_shared_experts": 0, "first_k_dense_replace": 0}
    fields |= {name: checked(name, stored[name], f"in {path}") for name in (*SAME, "aux_loss_alpha")
               if stored.get(name) is not None}
    fields["first_k_dense_replace"] = min(fields["first_k_dense_replace"], fields["num_hidden_layers"])
    kind = rope.get("type", rope.get("rope_type", "default"))
    said = {k: v for k, v in rope.items() if k != "rope_theta" and v is not None and (k, v) != ("truncate", True)}
    fields |= {"rope_theta": thetas[0], "rope_scaling": None if kind == "default" else said}
    config = model_config(fields, f"in {path}")
    _refuse_other_arithmetic(stored, config, path)
    return config


def _refuse_other_arithmetic(stored, c, path):
    """A UserError for a field that means another computation than model.py's."""
    qk_head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    allowed = {"rope_interleave": [True], "scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"],
               "hidden_act": ["silu"], "moe_layer_freq": [1], "num_key_value_heads": [c.num_attention_heads],
               "qk_head_dim": [qk_head_dim], "head_dim": [c.qk_rope_head_dim, qk_head_dim, c.v_head_dim]}
    read = {*SAME, "rope_theta", "rope_scaling", "rope_parameters"}
    for name, value in stored.items():
        if value not in allowed.get(name, [value]) and value is not None:
            raise UserError(f"{path} has {name}={value!r}; nanok2 has only {' or '.join(map(repr, allowed[name]))}")
        neutral = not value or isinstance(value, float) and value == 1
        if TELLING.search(name) and not (neutral or name in allowed or name in read):
            raise UserError(f"{path} has {name}={value!r}, which nanok2 does not have")


# ----------------------------------------------------------------------------- weights

def to_hf_tensors(model, dtype):
    """Yield (name, tensor) in Hugging Face's on-disk form; the router bias stays in fp32."""
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            yield name, tensor.float()
        elif name.endswith("experts.gate_up_proj"):
            for i, gate_up in enumerate(tensor.to(dtype)):
                for part, matrix in zip(("gate_proj", "up_proj"), gate_up.chunk(2)):
                    yield name.replace("gate_up_proj", f"{i}.{part}.weight"), matrix.contiguous()
        elif name.endswith("experts.down_proj"):
            for i, matrix in enumerate(tensor.to(dtype)):
                yield name.replace("down_proj", f"{i}.down_proj.weight"), matrix.contiguous()
        elif not (tied and name == "lm_head.weight"):
            yield name, tensor.to(dtype)
    state = model.state_dict()
    for name, shared in shared_by_mtp(model.config):
        yield name, state[shared].to(dtype, copy=True)


def shared_by_mtp(config):
    """(name on disk, name of our parameter) of what the layer of multi-token prediction shares with the model."""
    layer = f"model.layers.{config.num_hidden_layers}"
    return [(f"{layer}.embed_tokens.weight", "model.embed_tokens.weight"),
            (f"{layer}.shared_head.head.weight", "lm_head.weight")] * config.mtp_depth


def load_model(folder, device="cpu"):
    """A K2 with the weights of a Hugging Face directory (one or many safetensors, per-expert or stacked keys)."""
    refuse_other_kinds(folder)
    config, stored = from_hf_config(folder), read_json(Path(folder) / "config.json")
    weights = Published(folder, _block(stored.get("quantization_config"), folder))
    ahead = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    config.mtp_depth = int(_announced(stored) > 0 and ahead in weights.files)
    config.mtp_depth *= _is_shared(weights, config)
    model = build(config, device)
    for name, parameter in progress(f"reading {folder}", unit=" tensors", over=model.state_dict().items()):
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        if tied and name not in weights.files:
            continue
        source = _stacked(weights, name, config.n_routed_experts)
        if source.shape != parameter.shape:
            raise UserError(f"{folder}: {name} is {tuple(source.shape)}, config.json implies {tuple(parameter.shape)}")
        if tied and not torch.equal(source.float(), parameter.cpu()):
            raise UserError(f"{folder}: lm_head.weight differs from the embedding although config.json has "
                            "tie_word_embeddings: set that to false if both are meant")
        parameter.copy_(source)
    if weights.n_float8:
        note(f"{folder}: {weights.n_float8} float8 matrices are read as float32, times their block scales")
    elif stored.get("quantization_config") is not None:
        note(f"{folder}: config.json has a quantization_config, but no tensor is quantised: read as they are")
    _leave_out(weights, stored, config)
    return model


def _is_shared(weights, config):
    """Whether the layer of multi-token prediction has the model's own embedding and head, as ours does; told if not."""
    own = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for name, shared in shared_by_mtp(config):
        shared = own if shared == "lm_head.weight" else shared
        if name in weights.files and not torch.equal(weights.take(name), weights.take(shared)):
            note(f"{weights.folder}: {name} is not {shared}, which nanok2's layer of multi-token prediction would use")
            return False
    return True


def _announced(stored):
    """How many layers of multi-token prediction config.json speaks of."""
    announced = stored.get("num_nextn_predict_layers", stored.get("num_mtp_layers"))
    return announced if type(announced) is int else 0


def _block(quantised, folder):
    """The rows and columns of a block of float8 weights, from quantization_config."""
    block = (quantised.get("weight_block_size") if isinstance(quantised, dict) else None) or [128, 128]
    if type(block) is not list or len(block) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in block):
        raise UserError(f"{folder}/config.json: weight_block_size={block!r} is no pair of sizes, such as [128, 128]")
    return block


def _stacked(weights, name, n_experts):
    """The tensor of that name, or what the experts' own matrices make it."""
    stem, _, kind = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
    if parts is None or name in weights.files:
        return weights.take(name)
    experts = [[weights.take(f"{stem}.{i}.{part}.weight") for part in parts] for i in range(n_experts)]
    try:
        return torch.stack([torch.cat(matrices) for matrices in experts])
    except RuntimeError as error:  # of unlike shapes
        raise UserError(f"{weights.folder}: the matrices of {stem} do not fit together: {error}") from error


def _leave_out(weights, stored, config):
    """Say which of the tensors that are left stay unread, and refuse those that nothing explains."""
    announced, n_layers = _announced(stored), config.num_hidden_layers
    first = n_layers + config.mtp_depth
    layer = {name: int(found[1]) for name in weights.left if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    ahead = {name for name, number in layer.items() if first <= number < n_layers + announced}
    tables = {name for name in weights.left if name.endswith("rotary_emb.inv_freq")}
    empty = {name for name in weights.left if ".shared_experts." in name  # of no shared experts
             and 0 in weights.files[name].get_slice(name).get_shape()}
    more = f"of {n_layers + announced - first} multi-token prediction layers"
    for names, what in ((ahead, more), (tables, "with tables of RoPE")):
        if names:
            note(f"{weights.folder}: {len(names)} tensors {what} are left out, such as {min(names)}")
    if extra := sorted(weights.left - ahead - tables - empty):
        raise UserError(f"{weights.folder} has {len(extra)} tensors that its config.json does not know, of which "
                        f"num_hidden_layers={n_layers} and num_nextn_predict_layers={announced}, such as {extra[0]}")


# ----------------------------------------------------------------------------- tokenizer.json

def to_hf_tokenizer(encoder):
    """tokenizer.json and tokenizer_config.json of a tokenizer, as dicts, with the same ids: byte-level BPE of a
    tiktoken.Encoding, WordLevel of Words; UserError for SentencePiece."""
    if isinstance(encoder, SentencePiece):
        raise UserError("a SentencePiece tokenizer has no tokenizer.json here: move the run's tokenizer folder away to "
                        "export the weights alone, and load the tokenizer.model in it with the sentencepiece package")
    steps = getattr(encoder, "steps", None) or {"normalizer": None, "splits": [], "added": []}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = {text: {"id": number, "content": text, **flags, "special": True}
              for text, number in encoder._special_tokens.items()}
    tokens |= {token["content"]: {**flags, "normalized": True, **token, "special": False} for token in steps["added"]}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None,
                 "added_tokens": sorted(tokens.values(), key=lambda token: token["id"]),
                 "normalizer": steps["normalizer"] and {"type": steps["normalizer"]}, "post_processor": None}
    if isinstance(encoder, Words):  # every match is a word, and what lies between is dropped
        split = {"type": "Split", "pattern": {"Regex": WORD}, "behavior": "Removed", "invert": True}
        model = {"type": "WordLevel", "vocab": encoder.ids, "unk_token": UNKNOWN}
        tokenizer |= {"pre_tokenizer": split, "decoder": None, "model": model}
    else:
        tokenizer |= _byte_level_bpe(encoder, steps["splits"])
    end = next((text for text, number in encoder._special_tokens.items() if number == end_of_text(encoder)), None)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
             "clean_up_tokenization_spaces": False}
    return tokenizer, about


def _byte_level_bpe(encoder, before):
    ranks, letters = encoder._mergeable_ranks, byte_letters()
    written = lambda token: "".join(letters[byte] for byte in token)
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = merge_parts(ranks, token)
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))  # for what is found as a whole word, or so
        pairs = [parts] if len(parts) == 2 else [split for split in splits if ranks.keys() >= set(split)]
        merges += [[written(part) for part in pair] for pair in pairs]
    # In tiktoken {1,3}+ is possessive, in tokenizers a repetition of the group; without the + both mean the same here.
    patterns = [*before, re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", encoder._pat_str)]
    cuts = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in patterns]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": {written(token): rank for token, rank in ranks.items()}, "merges": merges}
    # The library gives added tokens the ids that follow the vocabulary, whatever is written: others stand in it too.
    later = sorted(number for number in encoder._special_tokens.values() if number > max(ranks.values()))
    size = len(ranks) + len(encoder._special_tokens) - len(later)
    model["vocab"] |= {text: number for text, number in encoder._special_tokens.items()
                       if number not in later or later != list(range(size, size + len(later)))}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]}, "decoder": level, "model": model}
