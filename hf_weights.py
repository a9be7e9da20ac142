"""The tensors of a Hugging Face directory as they were published: which files hold them, and float8 as float32.

Names, dtypes and shapes decide, whatever config.json says of them. float8 is read in DeepSeek-V3's form, a scale for
every block of 128 x 128 (`weight_scale_inv`); every other quantisation, and what is not clear, is refused by name.
"""

import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data.shards import FORMATS, read_json
from errors import UserError, one_line

INDEX = "model.safetensors.index.json"
# The last part of the names under which others keep quantised weights.
QUANTISED = {"weight_packed": "compressed-tensors", "weight_scale": "compressed-tensors or modelopt",
             "qweight": "GPTQ or AWQ", "absmax": "bitsandbytes, 4 bits", "SCB": "bitsandbytes, 8 bits",
             "gate_up_proj_blocks": "MXFP4", "down_proj_blocks": "MXFP4"}
# Other forms of weights, with the way to this one; a pickle or GGUF beside safetensors is left unread.
OTHER = (("adapter_*", "a LoRA adapter, which would be left out: merge it into its model first (peft: "
                       "merge_and_unload, then save_pretrained)"),
         ("*.safetensors", None),
         ("*.bin", "a pickle, which may run code and is not read: take a release with safetensors, or convert it where "
                   "you trust it (transformers: from_pretrained, then save_pretrained)"),
         ("*.gguf", "GGUF, which is not read: take the release that it was made from"))
# What needs no mention: it is read here or with the tokenizer, or holds nothing of the model.
KNOWN = re.compile(r"\..*|(generation_)?config\.json|tokenizer|.*token.*\.(json|model)|vocab\.json|merges\.txt"
                   r"|.*\.tiktoken|.*\.index\.json|(README|LICENSE).*|.*\.(md|pdf|png|jpe?g|svg)", re.IGNORECASE)


def note(text):
    """A line on stderr about what was done with the input."""
    print(f"note: {one_line(text)}", file=sys.stderr, flush=True)


def refuse_other_kinds(folder):
    for pattern, what in OTHER:
        if found := sorted(Path(folder).glob(pattern)):
            with open(found[0], "rb") as file:
                if int.from_bytes(file.read(4), "little") in FORMATS:
                    raise UserError(f"{folder} holds prepared data, not a model: name a run folder, as in out/debug")
            if what:
                raise UserError(f"{found[0]} is {what}")
            return


class Published:
    """The tensors of a directory, taken by name; `left` are the names that nobody took yet. block: the rows and columns
    that share a scale of float8."""

    def __init__(self, folder, block):
        self.folder, self.block, self.n_float8 = folder, block, 0
        self.files = open_files(Path(folder))
        self.left = set(self.files)
        for name in sorted(self.files):
            if kind := QUANTISED.get(name.rpartition(".")[2]):
                raise UserError(f"{folder} is quantised by {kind} ({name}): take the bfloat16 or block-scaled float8 "
                                "release, or dequantise it with the tool that made it")

    def take(self, name):
        """The tensor in a floating type of 16 or 32 bits."""
        tensor = self._read(name)
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = self._dequantise(name, tensor)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{self.folder}: {name} is {tensor.dtype}: convert it to float32, bfloat16, float16, or "
                            "float8_e4m3fn with block scales")
        if n_odd := int((~tensor.isfinite()).sum()):
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
        scale, (height, width) = self._read(f"{name}_scale_inv"), self.block
        blocks = tuple(-(-size // step) for size, step in zip(tensor.shape[-2:], self.block))
        if tensor.ndim < 2 or scale.shape != (*tensor.shape[:-2], *blocks) or not scale.is_floating_point():
            raise UserError(f"{self.folder}: {name}_scale_inv is {tuple(scale.shape)} {scale.dtype}, but {name} of "
                            f"{tuple(tensor.shape)} in blocks of {self.block} has {blocks} scales")
        self.n_float8 += 1
        scale = scale.float().repeat_interleave(height, -2)[..., :tensor.shape[-2], :]
        return tensor.float() * scale.repeat_interleave(width, -1)[..., :tensor.shape[-1]]


def open_files(folder):
    """{tensor name: the open safetensors file that holds it}, from the files that the index names; without an index
    from model.safetensors, or from all. What else lies in the folder is said."""
    there, listed = {path.name for path in folder.glob("*.safetensors")}, {}
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(type(name) is str for name in listed.values()):
            raise UserError(f"{folder / INDEX} is damaged: it has no weight_map of files")
        if missing := sorted(set(listed.values()) - there):  # also what lies outside of the folder
            raise UserError(f"{folder / INDEX} names {len(missing)} files that are missing, such as {missing[0]}: "
                            "download them too")
    named = set(listed.values()) or {"model.safetensors"} & there or there
    rival = "model.safetensors" if listed else "model-"
    if rivals := [name for name in sorted(there - named) if name.startswith(rival)]:
        raise UserError(f"{folder} holds two models, {min(named)} and {rivals[0]}: move away what is not meant")
    where = {}
    for name in sorted(named):
        try:
            file = safe_open(folder / name, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is damaged: {error}. Download it again (in a git clone: git lfs pull)"
                            ) from error
        if twice := where.keys() & set(file.keys()):
            raise UserError(f"{folder}: {min(twice)} is in {name} and in another file: move away what is not meant")
        where |= dict.fromkeys(file.keys(), file)
        if lacking := {key for key, owner in listed.items() if owner == name} - set(file.keys()):
            raise UserError(f"{folder / INDEX} says that {min(lacking)} is in {name}, but it is not: download both")
    if unread := sorted({path.name for path in folder.iterdir() if not KNOWN.fullmatch(path.name)} - named):
        note(f"{folder}: {len(unread)} files or folders are left unread: {', '.join(unread)}")
    if not where:
        raise UserError(f"{folder} has no *.safetensors with a tensor in it")
    return where
