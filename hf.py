"""The Hugging Face side of a model: config.json, weight names and tokenizer.json of the DeepSeek-V3 architecture.

Our parameters already carry Hugging Face's names; the only difference on disk is that every expert's gate, up and down
matrix is a tensor of its own. Used by export.py (out and in) and generate.py (loading an exported directory).
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from config import checked, model_config
from data.convert import byte_letters, merge_parts
from data.shards import read_json
from data.tokenizer import end_of_text
from data.words import UNKNOWN, WORD, SentencePiece, Words
from errors import UserError
from model import build

# config.json fields with the same name and meaning on both sides
SAME = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob",
        "routed_scaling_factor",
        "first_k_dense_replace", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "initializer_range")


def is_hf(folder):
    """Whether a folder is a Hugging Face directory, as opposed to a run, whose config.json has no model_type."""
    path = Path(folder) / "config.json"
    return path.is_file() and "model_type" in read_json(path)


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
            "aux_loss_alpha": config.aux_loss_alpha, "seq_aux": True, "num_nextn_predict_layers": 0,
            "bos_token_id": end, "eos_token_id": end, "pad_token_id": None, "use_cache": True}


def from_hf_config(folder):
    """The ModelConfig of a DeepSeek-V3-architecture directory, in the published form or as transformers 5 writes it."""
    path = Path(folder) / "config.json"
    stored = read_json(path)
    if stored.get("model_type") not in ("deepseek_v3", "kimi_k2"):
        raise UserError(f"{folder} is a {stored.get('model_type')!r} model; only the DeepSeek-V3 architecture is read "
                        "(model_type deepseek_v3 or kimi_k2)")
    for key, expected in (("attention_bias", False), ("rope_interleave", True), ("scoring_func", "sigmoid"),
                          ("hidden_act", "silu"), ("moe_layer_freq", 1)):
        if stored.get(key, expected) != expected:
            raise UserError(f"{folder}/config.json has {key}={stored[key]!r}; nanok2 has only {expected!r}")
    if "quantization_config" in stored:
        raise UserError(f"{folder} holds quantised weights: convert them to bfloat16 first")
    rope = checked("rope_scaling", stored.get("rope_parameters") or stored.get("rope_scaling") or {}, f"in {path}")
    fields = {name: stored[name] for name in (*SAME, "aux_loss_alpha") if name in stored}
    fields["rope_theta"] = stored.get("rope_theta") or rope.get("rope_theta", 10000.0)
    kind = rope.get("type", rope.get("rope_type", "default"))
    said = {k: v for k, v in rope.items() if k != "rope_theta" and v is not None and (k, v) != ("truncate", True)}
    fields["rope_scaling"] = None if kind == "default" else said
    return model_config({"aux_loss_alpha": 0.0} | fields, f"in {path}")


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


def load_model(folder, device="cpu"):
    """A K2 with the weights of a Hugging Face directory (one or many safetensors, per-expert or stacked keys)."""
    config = from_hf_config(folder)
    model = build(config, device)
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors")
    where = {}
    try:
        opened = [safe_open(path, "pt") for path in files]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: a safetensors file is damaged: {error}") from error
    for file in opened:
        where |= dict.fromkeys(file.keys(), file)
    unused = set(where)

    def take(name):
        if name not in where:
            raise UserError(f"{folder} lacks the tensor {name}")
        unused.discard(name)
        return where[name].get_tensor(name)

    def stacked(name):
        """The tensor of that name, or what the experts' own matrices make it."""
        stem, experts = name.rpartition(".")[0], range(config.n_routed_experts)
        if name.endswith("experts.gate_up_proj") and name not in where:
            return torch.stack([torch.cat((take(f"{stem}.{i}.gate_proj.weight"), take(f"{stem}.{i}.up_proj.weight")))
                                for i in experts])
        if name.endswith("experts.down_proj") and name not in where:
            return torch.stack([take(f"{stem}.{i}.down_proj.weight") for i in experts])
        return take(name)
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings and name not in where:
            continue
        try:
            source = stacked(name)
        except (RuntimeError, SafetensorError) as error:  # experts of unlike shapes, a type that torch lacks
            raise UserError(f"{folder}: {name} cannot be read: {error}") from error
        if source.shape != parameter.shape:
            raise UserError(f"{folder}: {name} is {tuple(source.shape)}, config.json implies {tuple(parameter.shape)}")
        parameter.copy_(source)
    # Layers beyond the last are multi-token prediction heads, and old checkpoints carry RoPE tables.
    extra = sorted(name for name in unused if not name.startswith(f"model.layers.{config.num_hidden_layers}.")
                   and not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight")
    if extra:
        raise UserError(f"{folder} has {len(extra)} tensors that the architecture does not know, such as {extra[0]}")
    return model


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
