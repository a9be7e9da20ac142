"""The tokenizers that are no byte-level BPE, offering what is used of a tiktoken.Encoding: words counted on the data,
and SentencePiece. Next: tokenizer.py."""

import collections
import json

import regex

from errors import UserError

END_OF_TEXT = "<|endoftext|>"  # stands before every document; generation stops at it
UNKNOWN = "<unk>"
# For Words: UNKNOWN, as some corpora write it; words with their apostrophes; single marks; line ends.
WORD = r"<unk>|[\p{L}\p{M}\p{N}_]+(?:['’][\p{L}\p{M}]+)*|[^\s\p{L}\p{M}\p{N}_]|\n"
CLOSING = frozenset(".,;:!?)]}%…”\n")  # no space before these


def write_about(folder, encoder, about):
    """encoding.json, with the separator if it was chosen."""
    about |= {"separator": encoder.separator} if encoder.separator else {}
    (folder / "encoding.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def train_words(texts, size):
    """Words of the `size` most frequent words of texts; fewer if there are no more."""
    if texts is None or not str(size).isdecimal() or int(size) < 1:
        raise UserError(f"words:{size} is counted on the data, as in  python -m data.prepare text notes/ "
                        "--tokenizer=words:10000 ; to use it again, give the tokenizer folder of that data")
    find, counts = regex.compile(WORD).findall, collections.Counter()
    for text in texts:
        counts.update(find(text))
    del counts[UNKNOWN]
    return Words(sorted(counts, key=lambda word: (-counts[word], word))[:int(size)])


class Words:
    """Word-level, as small studies use it: UNKNOWN is id 0, then the words, END_OF_TEXT last. Lossy: decoding puts one
    space between words, none before closing marks, and cannot bring back white space or what was unknown."""

    name, separator, steps, notes = "words", None, None, ()

    def __init__(self, words):
        self.texts = [UNKNOWN, *words, END_OF_TEXT]
        self.ids = {text: number for number, text in enumerate(self.texts[:-1])}
        self.n_vocab, self.parts = len(self.texts), ("words", WORD, tuple(words))
        self._special_tokens = {UNKNOWN: 0, END_OF_TEXT: self.n_vocab - 1}
        self._find = regex.compile(WORD).findall

    def encode_ordinary(self, text):
        return [self.ids.get(word, 0) for word in self._find(text)]

    def decode_single_token_bytes(self, token):
        """With the space before it."""
        if not 0 <= token < self.n_vocab:
            raise KeyError(token)
        text = self.texts[token]
        return (text if text in CLOSING else " " + text).encode()

    def decode_bytes(self, ids):
        return b"".join(map(self.decode_single_token_bytes, ids)).replace(b"\n ", b"\n").removeprefix(b" ")

    def decode(self, ids):
        return self.decode_bytes(ids).decode()

    def save(self, folder):
        write_about(folder, self, {"kind": "words", "name": self.name, "words": self.texts[1:-1]})


class SentencePiece:
    """A SentencePiece model, through the package of that name. Whether decoding gives the text back is the model's
    affair: one with byte fallback and without normalization does."""
    separator, steps, notes = None, None, ()

    def __init__(self, model, name, path):
        """model: the bytes of the .model file; path: where they come from, for errors."""
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError("a SentencePiece .model needs the package:  pip install sentencepiece") from error
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"the SentencePiece model {path} is damaged: {error}") from error
        self.model, self.name, self.n_vocab = model, name, self.processor.vocab_size()
        self.parts = ("sentencepiece", model)
        self._special_tokens = {self.processor.id_to_piece(i): i for i in range(self.n_vocab)
                                if self.processor.is_control(i) or self.processor.is_unknown(i)}
        self.encode_ordinary = self.processor.encode

    def decode_single_token_bytes(self, token):
        """With the space before it; a control token is nothing, as in `decode`."""
        if not 0 <= token < self.n_vocab:
            raise KeyError(token)
        piece = self.processor.id_to_piece(token)
        if self.processor.is_control(token) or self.processor.is_unknown(token):
            return self.decode_bytes([token])
        return bytes([int(piece[3:5], 16)]) if self.processor.is_byte(token) else piece.replace("▁", " ").encode()

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def decode(self, ids):
        return self.processor.decode(list(ids))

    def save(self, folder):
        (folder / "tokenizer.model").write_bytes(self.model)
        write_about(folder, self, {"kind": "sentencepiece", "name": self.name})
