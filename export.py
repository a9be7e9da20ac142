"""Hugging Face directories, out and in.

    python export.py out/debug hf/                  # config.json, model*.safetensors, tokenizer files
    python export.py --reverse hf/ out/from_hf      # a run folder to continue from, with its config file

The directory loads with transformers' AutoModelForCausalLM and AutoTokenizer, and in the engines that serve
DeepSeek-V3.
"""

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import checkpoint
import errors
import generate
import hf
from config import Config
from data import tokenizer as tokenizers
from errors import UserError


def export(source, folder, dtype="float32", which="latest", shard_bytes=5 * 10**9):
    """Write the model in `source` (run or step folder) as a Hugging Face directory; complete or absent."""
    model, encoder = generate.load(source, "cpu", which=which)
    config = hf.to_hf_config(model.config, encoder, dtype)
    with in_place(folder) as temporary:
        _write_json(temporary / "config.json", config)
        end = config["eos_token_id"]
        _write_json(temporary / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
        _write_weights(temporary, hf.to_hf_tensors(model, getattr(torch, dtype)), shard_bytes)
        if encoder:
            tokenizer, about = hf.to_hf_tokenizer(encoder)
            _write_json(temporary / "tokenizer.json", tokenizer)
            _write_json(temporary / "tokenizer_config.json",
                        about | {"model_max_length": model.config.max_position_embeddings})
            tokenizers.save(encoder, temporary / "tokenizer")  # for nanok2's own tools
    return Path(folder)


def _write_weights(folder, tensors, shard_bytes):
    """One model.safetensors, or numbered files of at most shard_bytes with an index."""
    shards, size = [{}], 0
    for name, tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += n_bytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def reverse(source, run):
    """Turn a Hugging Face directory into a run folder: a checkpoint of step 0 without optimizer state, the tokenizer if
    nanok2 exported it, and config.py, with which train.py --resume goes on."""
    if not hf.is_hf(source):
        raise UserError(f"{source} has no Hugging Face config.json")
    model = hf.load_model(source)
    fields = dataclasses.asdict(model.config)
    with in_place(run) as temporary:
        settings = dataclasses.asdict(Config(**fields, out_dir=str(run)))
        about = {"sequences": 0, "config": settings}
        if (Path(source) / "tokenizer").is_dir():
            encoder = tokenizers.load(Path(source) / "tokenizer")
            tokenizers.save(encoder, temporary / "tokenizer")
            about["tokenizer"] = tokenizers.fingerprint(encoder)
        checkpoint.save(temporary / "checkpoints", 0, checkpoint.named_tensors(model), about, keep=1)
        said = f"The model of {source}, to continue:  python train.py {run}/config.py --resume --data=..."
        lines = ["# " + errors.one_line(said)]  # a comment of one line: a folder's name is not to become code
        lines += [f"{name} = {value!r}" for name, value in (fields | {"out_dir": str(run)}).items()]
        (temporary / "config.py").write_text("\n".join(lines) + "\n")
        _write_json(temporary / "config.json", {"settings": settings, "imported_from": str(source)})
    return Path(run)


class in_place:
    """A folder that appears under its name only when the `with` block succeeds; an existing one is refused."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.partial")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists and is not empty: choose another name or delete it")

    def __enter__(self):
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, *error):
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        if self.folder.exists():
            self.folder.rmdir()
        os.rename(self.temporary, self.folder)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python export.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="run or step folder; with --reverse a Hugging Face directory")
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--reverse", action="store_true", help="from Hugging Face to a run folder")
    parser.add_argument("--checkpoint", choices=["latest", "best"], default="latest")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    args = parser.parse_args(argv)
    if args.reverse:
        run = reverse(args.source, args.target)
        print(f"wrote {run}; continue with  python train.py {run}/config.py --resume --data=FOLDER")
    else:
        print(f"wrote {export(args.source, args.target, args.dtype, args.checkpoint)}")


if __name__ == "__main__":
    errors.run(main)
