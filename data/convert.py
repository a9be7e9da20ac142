"""A Hugging Face tokenizer.json as the pattern, ranks and special tokens of a tiktoken.Encoding, with the same ids, and
what has to be done to a text before it.

Both byte-pair encode the same way, except that tokenizer.json lists merges of two tokens in their order, and tiktoken
merges whatever two neighbours make the token of the lowest id. They agree on every text if, for each token, the two
parts that the merges of lower ids leave of it are a listed merge, and these merges stand in the order of the ids; that
is checked here, and what cannot be expressed is refused. Next: tokenizer.py, which loads the result.
"""

import heapq
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


def read_hf(path, beside):
    """(pattern, {bytes: rank}, {text: id} of the other tokens, steps) of a tokenizer.json; UserError if it is none, or
    one that is not plain byte-level BPE. steps: tokenizer.py's ByteLevel says what stands in it. What the
    post-processor adds around a text is left out: data/ puts separators. beside: a published.Beside."""
    try:
        about = read_json(path)
        model, added = about["model"], {token["content"]: token for token in about.get("added_tokens") or []}
        vocab, pairs = model["vocab"], [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merged = {"".join(pair) for pair in pairs}
        taken = {**{id: text for text, id in vocab.items()}, **{token["id"]: text for text, token in added.items()}}
        for text, token in beside.added.items():
            if text not in merged and taken.get(token["id"], text) == text:
                added.setdefault(text, token)
        for text, _ in beside.ends + beside.starts:
            if text in vocab and text not in merged and len(text) > 1:  # as transformers does
                added.setdefault(text, {"content": text, "id": vocab[text], "special": True})
        patterns, problem = _patterns(about.get("pre_tokenizer"))
        flags = ("content", "id", "single_word", "lstrip", "rstrip", "normalized")
        plain = [{"normalized": True} | {flag: token[flag] for flag in flags if flag in token}
                 for text, token in added.items() if text and not token.get("special")]
        special_tokens = {text: token["id"] for text, token in added.items()
                          if not (text in merged or len(text) == 1) or vocab.get(text) != token["id"]}
        normalizer = about.get("normalizer") or {"type": "Sequence", "normalizers": []}
        forms = [one["type"] for one in normalizer.get("normalizers", [normalizer])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no tokenizer.json of a BPE model: {type(error).__name__} {error}") from error
    extras = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
              if model.get(key)]
    if {*forms} - {"NFC"}:
        problem = f"a normalizer, {', '.join(forms)}, which changes the text"
    if model.get("type", "BPE") != "BPE" or extras:
        problem = f"the model {model.get('type')} with {extras}"
    elif any(added[text].get("special") and not text.strip() for text in special_tokens):
        problem = "added tokens of white space, which nothing keeps from being found in a text"
    if problem:
        raise UserError(f"{path} has {problem}. Only byte-level BPE can be converted: no normalizer but NFC, "
                        "pre_tokenizer ByteLevel without add_prefix_space, alone or behind isolated Splits or Digits")
    steps = {"normalizer": "NFC" if forms else None, "splits": patterns[:-1], "added": plain}
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    as_bytes = lambda token: bytes(byte_of[letter] for letter in token)
    try:
        ranks = {as_bytes(token): rank for token, rank in vocab.items() if token not in special_tokens}
        order = {(as_bytes(left), as_bytes(right)): place for place, (left, right) in enumerate(pairs)}
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no byte-level BPE: {error} stands in its vocabulary or merges") from error
    _check(path, ranks, order, model.get("ignore_merges"), special_tokens)
    return patterns[-1], ranks, special_tokens, steps if any(steps.values()) else None


def _patterns(pre_tokenizer):
    """(the regular expressions that cut words one after another, None), or (None, why there are none)."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, level = steps
    if level["type"] != "ByteLevel" or level.get("add_prefix_space", True):
        return None, f"the pre_tokenizer {level}"
    patterns = []
    for step in before:
        if step["type"] == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step.get("invert") \
                and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        else:
            return None, f"the pre_tokenizer {step}"
    patterns += [GPT2_PATTERN] if level.get("use_regex", True) else []
    if not patterns:
        return None, "the pre_tokenizers ByteLevel without use_regex, alone"
    for pattern in patterns:
        outside = re.sub(r"\[\^?(\\.|[^\]\\])*\]|\\[^hHRXZ]", "", pattern)  # without character classes and escapes
        unlike = (re.search(r"\{\d+(,\d*)?\}\+|[$^]|\\[hHRXZ]|\(\?[a-z]*[mx]", outside)
                  or re.search(r"(?<!\\)(?:\\\\)*\\[wWbB]", pattern))  # of which letters, digits and marks differ
        if pattern is not patterns[-1]:  # that one tiktoken reads, those before the regex package
            unlike = unlike or re.search(r"\((?!\?(?:[:=!]|<[=!]))|&&|\[(\\.|[^\]\\\[])*\[", pattern)
        if unlike:
            return None, f"{unlike[0]!r}, which tiktoken reads in another way, in its pattern"
    return patterns, None


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
        known = len(parts) > 2 and ignore_merges and all(split in order for split in splits
                                                         if ranks.keys() >= set(split))
        if len(parts) == 2 and place <= last or len(parts) > 2 and not known:
            raise UserError(f"{path}: the ids do not follow the merges (token {token!r}, id {ranks[token]}), so that "
                            "no ranks give the same ids; train a tokenizer on the data instead, --vocab_size=N")
        last = place if len(parts) == 2 else last


def merge_parts(ranks, token):
    """What byte-pair encoding with the merges before its own leaves of a token: the two tokens whose merge makes it,
    more if no merge does and it is found as a whole word only, one for a single byte."""
    size, own, heap = len(token), ranks[token], []
    end, before = [*range(1, size + 1)], [*range(-1, size)]  # of the part that starts at i; 0 where none does any more

    def consider(i):
        if i >= 0 and end[i] < size and ranks.get(token[i:end[end[i]]], own) < own:
            heapq.heappush(heap, (ranks[token[i:end[end[i]]]], i, end[end[i]]))
    for i in range(size):
        consider(i)
    left = size
    while heap and left > 2:
        _, i, stop = heapq.heappop(heap)
        if 0 < end[i] < size and end[end[i]] == stop:
            end[end[i]], end[i], before[stop], left = 0, stop, i, left - 1
            consider(before[i])
            consider(i)
    return [token[i:end[i]] for i in range(size) if end[i]]
