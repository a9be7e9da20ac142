"""What the files beside a published tokenizer say of it: its special tokens, which of them ends a text, and how a bare
ranks file in tiktoken's format cuts words. Next: tokenizer.py, which loads it."""

from data.shards import read_json
from errors import UserError

# The token that ends a text, under the names that tokenizers of others give it: the first that there is separates.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]", "</s>", "<eos>")
# These end a turn of a chat. Models for chats declare them as the end, beside the one that ended their documents.
TURN_ENDS = frozenset(("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|eot|>", "<|return|>", "<|EOT|>", "[EOT]",
                       "<end_of_turn>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_msg|>"))

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _BEHIND = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI = (rf"[\p{{Han}}]+|{_BEFORE}{_UPPER}*{_LOWER}+{_BEHIND}|{_BEFORE}{_UPPER}+{_LOWER}*{_BEHIND}"
        + LLAMA3[LLAMA3.index(r"|\p{N}"):])
_RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
# {name: (pattern, the special tokens from a first id on, how many ranks the published file has)}
RANKS_FILES = {
    "kimi": (KIMI, lambda first: [f"<|reserved_token_{first + i}|>" for i in range(256)], 163584),
    "llama3": (LLAMA3, lambda first: ["<|begin_of_text|>", "<|end_of_text|>", *_RESERVED[:4], "<|start_header_id|>",
                                      "<|end_header_id|>", _RESERVED[4], "<|eot_id|>", *_RESERVED[5:]], 128000),
    "qwen": (LLAMA3.replace("{1,3}", ""),
             lambda first: ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))],
             151643)}


class Beside:
    """What stands in the folder of a tokenizer. added: {token: what tokenizer_config.json says of it}; ends: those
    declared to end a text, as (token or id, where); starts: likewise."""

    def __init__(self, folder):
        files = {name: read_json(folder / name) for name in
                 ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json",
                  "params.json", "original/params.json") if (folder / name).is_file()}
        self.about, self.model = files.get("tokenizer_config.json", {}), files.get("config.json", {})
        self.params = files.get("params.json") or files.get("original/params.json", {})
        try:
            self.added = {token["content"] + "": {"special": True, **token, "id": int(number)}
                          for number, token in (self.about.get("added_tokens_decoder") or {}).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"added_tokens_decoder in {folder}/tokenizer_config.json is damaged: {error}") from error
        self.ends, self.starts = ([(token, f"{key}{kind} of {name}") for name, about in files.items()
                                   for kind in ("_token", "_token_id") for token in _listed(about.get(key + kind))]
                                  for key in ("eos", "bos"))

    def ranks_file(self, path, ranks):
        """Which of RANKS_FILES a ranks file is by its name, its size and what stands beside it; None if none."""
        kind, model, size = self.about.get("tokenizer_class"), self.model.get("model_type"), len(ranks)
        code = f"{self.about.get('auto_map')} {self.model.get('auto_map')}".lower()
        if path.name == "tiktoken.model" and (kind == "TikTokenTokenizer" or "kimi" in f"{code}{model}"
                                              or "moonshot" in code or {"[BOS]", "[EOS]"} <= self.added.keys()):
            return "kimi"
        if path.suffix == ".tiktoken" and (kind == "QWenTokenizer" or model == "qwen"):
            return "qwen"
        if path.name == "tokenizer.model" and (model in ("llama", "mllama") or "<|begin_of_text|>" in self.added
                                               or self.params.get("vocab_size") == size + 256) and size != 200_000:
            return "llama3"
        return next((name for name, (_, _, published) in RANKS_FILES.items() if published == size), None)

    def end_of_text(self, special_tokens):
        """(the token that separates documents, why), or (None, None). Declared ends come first, but not one that ends
        the turn of a chat where there is another; the last resort is the declared start."""
        name_of = {number: text for text, number in special_tokens.items()}
        ends, starts = ([(name_of.get(token, token), where) for token, where in declared
                         if name_of.get(token, token) in special_tokens] for declared in (self.ends, self.starts))
        turns = [found for found in ends if found[0] in TURN_ENDS]
        why = "by its name" + (f" ({turns[0][0]}, {turns[0][1]}, ends a turn of a chat)" if turns else "")
        known = [(text, why) for text in SEPARATORS if text in special_tokens]
        return next(iter([found for found in ends if found not in turns] + known + turns + starts), (None, None))


def _listed(value):
    """The tokens or ids that a field declares."""
    value = value.get("content") if isinstance(value, dict) else value
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) in (int, str)]
