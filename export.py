"""Hugging Face directories, out and in.

    python export.py out/debug hf/                  # config.json, model*.safetensors, tokenizer files
    python export.py --reverse hf/ out/from_hf      # a run folder to continue from, with its config file

The directory loads with transformers' AutoModelForCausalLM and AutoTokenizer, and in the engines that serve
DeepSeek-V3.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import errors
import generate
import hf
from config import Config
from data import tokenizer as tokenizers
from errors import UserError
from hf_weights import INDEX, note, refuse_other_kinds
from model import pick_device
from run import checkpoint
from talk.text import lacking, tell_of_loss

LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({0!r})
tokenizer = AutoTokenizer.from_pretrained({0!r})"""


def export(source, folder, dtype="float32", which="latest", shard_bytes=5 * 10**9):
    """Write the model in `source` (run or step folder) as a Hugging Face directory; complete or absent."""
    model, encoder = generate.load(source, "cpu", which=which)
    config = hf.to_hf_config(model.config, encoder, dtype)
    tell_of_loss(encoder, source)
    tokenizer, about = hf.to_hf_tokenizer(encoder) if encoder else (None, None)
    with in_place(folder) as temporary:
        _write_json(temporary / "config.json", config)
        end = config["eos_token_id"]
        _write_json(temporary / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "do_sample": True})
        _write_weights(temporary, hf.to_hf_tensors(model, getattr(torch, dtype)), shard_bytes)
        if encoder:
            _write_json(temporary / "tokenizer.json", tokenizer)
            _write_json(temporary / "tokenizer_config.json",
                        about | {"model_max_length": model.config.max_position_embeddings})
            tokenizers.save(encoder, temporary / "tokenizer")  # for nanok2's own tools
        else:
            note(f"{folder} gets no tokenizer: {lacking(source)}")
    return Path(folder)


def _write_weights(folder, tensors, shard_bytes):
    """One model.safetensors, or numbered files of at most shard_bytes with an index."""
    shards, size = [{}], 0
    for name, tensor in tensors:
        if n_odd := int((~tensor.isfinite()).sum()):
            raise UserError(f"{name} would have {n_odd} values that are NaN or infinite in {tensor.dtype}: export "
                            "another checkpoint, or with --dtype=float32")
        n_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + n_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += n_bytes
    many, index = len(shards) > 1, {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / name)  # it gets 0600, whatever the umask
        index |= dict.fromkeys(shard, name)
    if many:
        total = sum(tensor.numel() * tensor.element_size() for shard in shards for tensor in shard.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def reverse(source, run):
    """Turn a Hugging Face directory into a run folder: a checkpoint of step 0 without optimizer state, the tokenizer if
    it can be read, and config.py, which says how train.py goes on and with what."""
    if not hf.is_hf(source):
        refuse_other_kinds(source)
        raise UserError(f"{source} has no Hugging Face config.json")
    model, encoder = generate.load(source, "cpu")
    tell_of_loss(encoder, source)
    run = Path(os.path.realpath(run))
    fields = dataclasses.asdict(model.config) | continuation(model.config) | {"out_dir": str(run)}
    with in_place(run) as temporary:
        settings = dataclasses.asdict(Config(**fields, resume=True).check())
        about = {"sequences": 0, "config": settings}
        if encoder:
            tokenizers.save(encoder, temporary / "tokenizer")
            about["tokenizer"] = tokenizers.fingerprint(encoder)
        checkpoint.save(temporary / "checkpoints", 0, checkpoint.named_tensors(model), about, keep=1)
        word = shlex.quote(f"{run}/tokenizer") if encoder else "TOKENIZER_OF_THE_MODEL"
        here = str(Path(__file__).absolute().parent)  # the commands run from anywhere
        train = shlex.join([sys.executable, f"{here}/train.py", f"{run}/config.py", "--resume", "--data=FOLDER"])
        prepare = f"PYTHONPATH={shlex.quote(here)} {shlex.quote(sys.executable)} -m data.prepare text TEXTS"
        lines = [f"# {errors.one_line(line)}" for line in (  # one line each: a folder's name is not to become code
            f"The model of {source}, to continue:  {train}",
            f"FOLDER by:  {prepare} --tokenizer={word} --out=FOLDER")]
        lines += [f"{name} = {value!r}" for name, value in fields.items()]
        _write(temporary / "config.py", "\n".join(lines) + "\n")
        _write_json(temporary / "config.json", {"settings": settings, "imported_from": str(source)})
    return run


def continuation(model):
    """What a model does not say and a training that goes on from it wants: settings to begin with."""
    length = min(model.max_position_embeddings, 1024)
    micro = max(4096 // length, 1)
    return {"sequence_length": length, "micro_batch_size": micro, "global_batch_size": 4 * micro, "max_steps": 1000,
            "muon_lr": 2e-4,  # low, because the weights are trained already
            "dtype": "bfloat16" if pick_device("auto").type == "cuda" else "float32"}


@contextlib.contextmanager
def in_place(folder):
    """A folder that appears under its name only when the `with` block succeeds; one that holds something is refused."""
    folder = Path(os.path.realpath(folder))  # what a link, ".", ".." or "" stand for
    if folder == Path.cwd():
        raise UserError(f"{folder} is the folder that you are in, which cannot be replaced: name another")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: choose another name or delete it")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path, value):
    _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write(path, text):
    """As UTF-8; of a file name that is none, the escapes of JSON and Python."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def main(argv=None):
    parser = errors.ArgumentParser(prog="python export.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="run or step folder; with --reverse a Hugging Face directory")
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--reverse", action="store_true", help="from Hugging Face to a run folder")
    parser.add_argument("--checkpoint", choices=["latest", "best", "ema"], default="latest")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    args = parser.parse_args(argv)
    if args.reverse:
        if (args.checkpoint, args.dtype) != ("latest", "float32"):
            raise UserError("--reverse takes no --checkpoint and no --dtype: there is one model, read as float32")
        run = reverse(args.source, args.target)
        about = (run / "config.py").read_text(encoding="utf-8").splitlines()
        print(f"wrote {run}", *(line[2:] for line in about if line.startswith("# ")), sep="\n")
    else:
        print(f"wrote {export(args.source, args.target, args.dtype, args.checkpoint)}; it loads with transformers:",
              *(f"    {line}" for line in LOADING.format(args.target).splitlines()), sep="\n")


if __name__ == "__main__":
    errors.run(main)
