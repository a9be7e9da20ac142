"""The tokenizer of a run's data, and whether a model's vocabulary holds what both make. Next: tokenizer.py."""

from pathlib import Path

from data import tokenizer
from data.shards import read_meta
from errors import UserError


def open_tokenizer(config):
    """The tokenizer of the data, or the one that the config names; they must be the same. None if neither is known."""
    names = config.data if isinstance(config.data, dict) else [config.data]
    folders = [name for name in names if not name.startswith("hf:")]
    recorded = {folder: read_meta(folder).get("tokenizer_fingerprint") for folder in folders}
    if config.tokenizer:
        encoder = tokenizer.load(config.tokenizer)
    else:
        stored = next((Path(folder) / "tokenizer" for folder in folders if (Path(folder) / "tokenizer").is_dir()), None)
        if stored is None:
            print("the data names no tokenizer (set --tokenizer=...): no samples, no bits_per_byte, and generate.py "
                  "will want one")
            return None
        encoder = tokenizer.load(stored)
    for folder, known in recorded.items():
        if known and known != tokenizer.fingerprint(encoder):
            raise UserError(f"{folder} was made with another tokenizer than {config.tokenizer or 'the other folders'}: "
                            "use the one it was made with, or prepare the data again")
    for line in tokenizer.notes(encoder):
        print(line)
    return encoder


def require_vocabulary(vocab_size, stream, validation, encoder):
    """Refuse data and a tokenizer (or None) with token ids that a model of this vocab_size does not have."""
    largest = max(stream.max_id(), validation.max_id())
    if encoder and largest >= encoder.n_vocab:
        raise UserError(f"the data holds token id {largest}, its tokenizer only ids below {encoder.n_vocab}: set "
                        "--tokenizer to the one that the data was made with")
    largest = max(largest, encoder.n_vocab - 1 if encoder else 0)
    if largest >= vocab_size:
        raise UserError(f"vocab_size={vocab_size} is too small for token id {largest} of the data and its tokenizer: "
                        f"set --vocab_size={largest + 1} or more")
