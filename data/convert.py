"""A Hugging Face tokenizer.json as the pattern, ranks and special tokens of a tiktoken.Encoding, with the same ids.

Both byte-pair encode the same way, except that tokenizer.json lists merges of two tokens in their order, and tiktoken
merges whatever two neighbours make the token of the lowest id. They agree on every text if, for each token, the two
parts that the merges of lower ids leave of it are a listed merge, and these merges stand in the order of the ids; that
is checked here, and what cannot be expressed is refused. Next: tokenizer.py, which loads the result.
"""

import re

from data.shards import read_json
from errors import UserError

# How ByteLevel alone cuts words: GPT-2's way.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_letters():
    """The printable letter that stands for each byte in Hugging Face's byte-level BPE: itself where Latin-1 has a
    visible character, else the next free code point from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def read_hf(path):
    """(pattern, {bytes: rank}, {text: id} of the added tokens) of a tokenizer.json; UserError if it is none, or one
    that is not plain byte-level BPE. What the post-processor adds around a text is left out: data/ puts separators."""
    try:
        about = read_json(path)
        model, added = about["model"], about.get("added_tokens") or []
        special_tokens = {token["content"]: token["id"] for token in added}
        blank = [token["content"] for token in added if not token["content"].strip()]
        vocab, merges = model["vocab"], model["merges"]
        pattern, problem = _pattern(about.get("pre_tokenizer"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no tokenizer.json of a BPE model: {type(error).__name__} {error}") from error
    extras = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
              if model.get(key)]
    if about.get("normalizer"):
        problem = "a normalizer, which changes the text"
    elif model.get("type", "BPE") != "BPE" or extras:
        problem = f"the model {model.get('type')} with {extras}"
    elif blank:  # such tokens are cut out of any text before BPE, and no setting prevents it
        problem = f"added tokens of white space, such as {blank[0]!r}"
    if problem:
        raise UserError(f"{path} has {problem}. Only byte-level BPE can be converted: no normalizer, pre_tokenizer "
                        "ByteLevel, alone or after one Split by an isolated Regex, without add_prefix_space")
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    as_bytes = lambda token: bytes(byte_of[letter] for letter in token)
    try:
        ranks = {as_bytes(token): rank for token, rank in vocab.items() if token not in special_tokens}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        order = {(as_bytes(left), as_bytes(right)): place for place, (left, right) in enumerate(pairs)}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no byte-level BPE: {error} stands in its vocabulary or merges") from error
    _check(path, ranks, order, model.get("ignore_merges"), special_tokens)
    return pattern, ranks, special_tokens


def _pattern(pre_tokenizer):
    """(the regular expression that cuts words, None), or (None, why there is none)."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, level = steps
    if level["type"] != "ByteLevel" or level.get("add_prefix_space", True):
        return None, f"the pre_tokenizer {level}"
    if level.get("use_regex", True) and not before:
        return GPT2_PATTERN, None
    if level.get("use_regex", True) or len(before) != 1 or before[0]["type"] != "Split":
        return None, f"the pre_tokenizers {', '.join(step['type'] for step in steps)}"
    split = before[0]
    pattern = split["pattern"].get("Regex")
    if not pattern or split["behavior"] != "Isolated" or split.get("invert"):
        return None, f"the pre_tokenizer {split}"
    outside = re.sub(r"\[\^?(\\.|[^\]\\])*\]|\\[^hHRXZ]", "", pattern)  # without character classes and escapes
    unlike = (re.search(r"\{\d+(,\d*)?\}\+|[$^]|\\[hHRXZ]|\(\?[a-z]*[mx]", outside)
              or re.search(r"(?<!\\)(?:\\\\)*\\[wWbB]", pattern))  # of which letters, digits and marks differ
    return (None, f"{unlike[0]!r}, which tiktoken reads in another way, in its pattern") if unlike else (pattern, None)


def _check(path, ranks, order, ignore_merges, special_tokens):
    """Refuse what tiktoken would encode differently. order: {(left, right): place} of the listed merges."""
    ids = [*ranks.values(), *special_tokens.values()]
    if len(set(ids)) != len(ids) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} is no byte-level BPE: an id stands twice or a single byte is missing")
    last = -1
    for token in sorted(ranks, key=ranks.get):
        parts = merge_parts(ranks, token)
        place = order.get(tuple(parts), -1)
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))  # tiktoken makes the token of any of them
        known = ignore_merges and all(split in order for split in splits if ranks.keys() >= set(split))
        if len(parts) == 2 and place <= last or len(parts) > 2 and not known:
            raise UserError(f"{path}: the ids do not follow the merges (token {token!r}, id {ranks[token]}), so that "
                            "no ranks give the same ids; train a tokenizer on the data instead, --train-tokenizer=N")
        last = place if len(parts) == 2 else last


def merge_parts(ranks, token):
    """What byte-pair encoding with the merges before its own leaves of a token: the two tokens whose merge makes it,
    more if no merge does and it is found as a whole word only, one for a single byte."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, ranks[token]) for left, right in zip(parts, parts[1:])]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= ranks[token]:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts
