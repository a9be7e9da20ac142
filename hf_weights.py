"""The tensors of a Hugging Face directory as they were published: which files hold them, and float8 as float32.

Names, dtypes and shapes decide, whatever config.json says of them. float8 is read in DeepSeek-V3's form, a scale for
every block of 128 x 128 (`weight_scale_inv`); every other quantisation is refused by name, and so is what is not clear.
Used by hf.py.
"""

import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.shards import read_json
from errors import UserError, one_line

INDEX = "model.safetensors.index.json"
# The last part of the names under which others keep quantised weights.
QUANTISED = {"weight_packed": "compressed-tensors", "weight_scale": "compressed-tensors or modelopt",
             "qweight": "GPTQ or AWQ", "absmax": "bitsandbytes, 4 bits", "SCB": "bitsandbytes, 8 bits",
             "gate_up_proj_blocks": "MXFP4", "down_proj_blocks": "MXFP4"}
# What needs no mention: it is read here or with the tokenizer, or holds nothing of the model.
KNOWN = re.compile(r"\..*|(generation_|tokenizer_)?config\.json|tokenizer(\.json|\.model)?|.*\.tiktoken|tiktoken\.model"
                   r"|vocab\.json|merges\.txt|added_tokens\.json|special_tokens_map\.json|.*\.index\.json"
                   r"|(README|LICENSE).*|.*\.(md|pdf|png|jpe?g|svg)", re.IGNORECASE)


def note(text):
    print(f"note: {one_line(text)}", file=sys.stderr)


def refuse_other_kinds(folder):
    """A UserError for a folder whose weights are in a form that is not read, with the way to one that is."""
    names = {path.name for path in Path(folder).iterdir()}
    ending = lambda *ends: next((name for name in sorted(names) if name.endswith(ends)), None)
    if adapter := next((name for name in sorted(names) if name.startswith("adapter_")), None):
        raise UserError(f"{folder} has a LoRA adapter ({adapter}), which would be left out: merge it into its model "
                        "first (peft: merge_and_unload, then save_pretrained)")
    if ending(".safetensors"):
        return
    if pickle := ending(".bin", ".pt", ".pth"):
        raise UserError(f"{folder} has no *.safetensors, only {pickle}, a pickle, which may run code and is not read: "
                        "take a release with safetensors, or convert it where you trust it (transformers: "
                        "from_pretrained, then save_pretrained)")
    if gguf := ending(".gguf"):
        raise UserError(f"{folder} has no *.safetensors, only {gguf}; GGUF is not read: take the release it was made "
                        "from")


class Published:
    """The tensors of a directory, taken by name. `left` are the names that nobody took yet."""

    def __init__(self, folder, block):
        """block: the rows and columns that share a scale of float8."""
        self.folder, self.block, self.n_float8 = folder, block, 0
        self.files = open_files(Path(folder))
        self.left = set(self.files)
        for name in sorted(self.files):
            if kind := QUANTISED.get(name.rpartition(".")[2]):
                raise UserError(f"{folder} is quantised by {kind} ({name}): take the bfloat16 or block-scaled float8 "
                                "release, or dequantise it with the tool that made it")

    def shape(self, name):
        return tuple(self.files[name].get_slice(name).get_shape())

    def take(self, name):
        """The tensor in a floating type of at least 16 bits."""
        tensor = self._read(name)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = self._dequantise(name, tensor)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{self.folder}: {name} is {tensor.dtype}: convert it to float32, bfloat16, float16, or "
                            "float8_e4m3fn with block scales")
        if n_odd := tensor.numel() - int(tensor.isfinite().sum()):
            raise UserError(f"{self.folder}: {name} has {n_odd} values that are NaN or infinite: the file is damaged "
                            "or the training diverged; take another")
        return tensor

    def _read(self, name):
        if name not in self.files:
            raise UserError(f"{self.folder} lacks the tensor {name}")
        self.left.discard(name)
        try:
            return self.files[name].get_tensor(name)
        except (RuntimeError, AttributeError, SafetensorError) as error:  # a type that torch lacks
            raise UserError(f"{self.folder}: {name} cannot be read: {error}") from error

    def _dequantise(self, name, tensor):
        """value x scale of its block, in float32; the last blocks of rows and columns may be smaller."""
        if f"{name}_scale_inv" not in self.files:
            raise UserError(f"{self.folder}: {name} is float8 without {name}_scale_inv, so that its values are "
                            "unknown: take a release with block scales, or in bfloat16")
        scale = self._read(f"{name}_scale_inv")
        blocks = tuple(-(-size // block) for size, block in zip(tensor.shape[-2:], self.block))
        if tensor.ndim < 2 or scale.shape != (*tensor.shape[:-2], *blocks) or not scale.is_floating_point():
            raise UserError(f"{self.folder}: {name}_scale_inv is {tuple(scale.shape)} {scale.dtype}, but {name} of "
                            f"{tuple(tensor.shape)} in blocks of {self.block} has {blocks} scales")
        self.n_float8 += 1
        scale = scale.float().repeat_interleave(self.block[0], -2)[..., :tensor.shape[-2], :]
        return tensor.float() * scale.repeat_interleave(self.block[1], -1)[..., :tensor.shape[-1]]


def open_files(folder):
    """{tensor name: the open safetensors file that holds it}, from the files that the index names; without an index
    from model.safetensors, or from all. What else lies in the folder is said."""
    there, listed = {path.name for path in folder.glob("*.safetensors")}, {}
    if not there:
        raise UserError(f"{folder} has no *.safetensors")
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(type(name) is str and Path(name).name == name
                                                   for name in listed.values()):
            raise UserError(f"{folder / INDEX} is damaged: its weight_map names no files of the folder")
        if missing := sorted(set(listed.values()) - there):
            raise UserError(f"{folder / INDEX} names {len(missing)} files that are missing, such as {missing[0]}: "
                            "download them too")
    named = set(listed.values()) or {"model.safetensors"} & there or there
    unread = sorted(there - named)
    if rival := next((name for name in unread if re.match(r"model-" if not listed else r"model\.", name)), None):
        raise UserError(f"{folder} holds two models, {min(named)} and {rival}: move away the one that is not meant")
    where = {}
    for name in sorted(named):
        try:
            file = safe_open(folder / name, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder}: {name} is damaged: {error}. Download it again (in a git clone: git lfs pull)"
                            ) from error
        if twice := next((key for key in file.keys() if key in where), None):
            raise UserError(f"{folder}: {twice} is in {name} and in another file: move away what is not meant")
        where |= dict.fromkeys(file.keys(), file)
        mine = sorted(key for key, owner in listed.items() if owner == name)
        if lacking := next((key for key in mine if where.get(key) is not file), None):
            raise UserError(f"{folder / INDEX} says that {lacking} is in {name}, but it is not: download both again")
    if unread := sorted({path.name for path in folder.iterdir() if not KNOWN.fullmatch(path.name)} - named):
        note(f"{folder}: {len(unread)} files or folders are left unread: {', '.join(unread)}")
    return where
