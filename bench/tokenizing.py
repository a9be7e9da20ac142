"""Tokenizers against the libraries they come from, on Python sources and texts of this machine, disjoint for training
and encoding: seconds of training, texts that differ, tokens a second. Texts with characters so new that Python's regex,
which cuts words for training, and tiktoken, which cuts them for encoding, disagree about them are left out and counted.

    python -m bench.tokenizing [MEGABYTES_TO_TRAIN_ON VOCABULARY]     # 30 32768; encodes 10 MB
"""

import random
import sysconfig
import tempfile
import time
from pathlib import Path

import regex

import bench
import errors
from data import tokenizer
from data.published import LLAMA3


def corpus():
    """Distinct texts of at most 400 kB, in an order that looks random and is always the same."""
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "purelib")} | {"/usr/share"}
    kinds = (".py", ".md", ".txt", ".rst")
    files = sorted({file for root in roots for file in Path(root).rglob("*") if file.suffix in kinds})
    random.Random(0).shuffle(files)
    seen = set()
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if 0 < len(text) < 400_000 and text not in seen:
            seen.add(text)
            yield text


def classes():
    """{class: (characters of it in Python's regex, in tiktoken, in the tokenizers library)}"""
    from tokenizers import Regex, pre_tokenizers

    everything = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    ranks, found = {bytes([byte]): byte for byte in range(256)}, {}
    for name in (r"\p{L}", r"\p{N}", r"\p{M}", r"\s"):
        encoder = tokenizer.encoding(name, ranks, name)  # drops what does not match
        split = pre_tokenizers.Split(Regex(name), "removed", invert=True).pre_tokenize_str(everything)
        found[name] = (set(regex.findall(name, everything)), set(encoder.decode(encoder.encode_ordinary(everything))),
                       {piece for piece, _ in split})
    return found


def take(texts, megabytes):
    taken, size = [], 0
    while size < megabytes * 1e6:
        taken.append(next(texts))
        size += len(taken[-1].encode())
    return taken


def timed(function, *arguments):
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def library(texts, vocab_size, pattern):
    """A byte-level BPE of the tokenizers library, cut by a pattern, or as GPT-2 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return made


def pieces(texts, vocab_size, folder):
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=f"{folder}/sp", vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        input_sentence_size=200_000, num_threads=1)
    return tokenizer.load(f"{folder}/sp.model")


def main(argv=None):
    if len(argv) not in (0, 2) or not all(word.isdecimal() for word in argv):
        raise errors.UserError("python -m bench.tokenizing [MEGABYTES VOCABULARY] [--out=FOLDER], as in 30 32768")
    megabytes, vocab_size = [int(word) for word in argv] or (30, 32768)
    known = classes()
    new = set().union(*(ours ^ tiktokens for ours, tiktokens, _ in known.values()))
    every = list(corpus())
    source = (text for text in every if new.isdisjoint(text))
    train, texts = take(source, megabytes), take(source, 10)
    encoders, seconds, differ = {"bytes": tokenizer.load("bytes")}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        encoders["trained"], seconds["train"] = timed(tokenizer.train_bpe, train, vocab_size)
        theirs, seconds["train, library"] = timed(library, train, vocab_size - 1, tokenizer.PATTERN)
        arms = {"trained": theirs}
        for name, pattern in (("gpt2 tokenizer.json", None), ("llama3 tokenizer.json", LLAMA3)):
            arms[name] = library(train, vocab_size, pattern)
            arms[name].save(f"{folder}/{name}")
            Path(f"{folder}/{name}").rename(f"{folder}/{name.split()[0]}.json")
            encoders[name], seconds[f"load {name}"] = timed(tokenizer.load, f"{folder}/{name.split()[0]}.json")
        encoders["words"], seconds["words"] = timed(tokenizer.load, f"words:{vocab_size}", train)
        encoders["sentencepiece"] = pieces(train[:len(train) // 3], vocab_size, folder)
    for name, other in arms.items():
        ours = encoders[name]
        pairs = [(ours.encode_ordinary(text), other.encode(text).ids) for text in texts]
        differ[name] = {"tokens": sum(len(a) for a, _ in pairs), "texts that differ": sum(a != b for a, b in pairs)}
    speed = {}
    for name, encoder in encoders.items():
        ids, one = timed(lambda encoder=encoder: [encoder.encode_ordinary(text) for text in texts])
        _, two = timed(lambda encoder=encoder: encoder.encode_ordinary_batch(texts, num_threads=2))
        count = sum(map(len, ids))
        speed[name] = {"tokens": count, "1 thread, tokens/s": round(count / one), "batch on 2": round(count / two)}
    ids, one = timed(lambda: [theirs.encode(text).ids for text in texts])
    speed["tokenizers library"] = {"1 thread, tokens/s": round(sum(map(len, ids)) / one)}
    unicode = {name: {"regex": len(a), "tiktoken": len(b), "tiktoken unlike tokenizers": len(b ^ c)}
               for name, (a, b, c) in known.items()}
    unicode["texts left out"] = sum(not new.isdisjoint(text) for text in every)
    result = {"unicode": unicode, "texts": len(every), "megabytes": megabytes, "vocabulary": vocab_size,
              "seconds": seconds, "against the library": differ, "speed": speed}
    for key, value in result.items():
        print(key, value)
    bench.save("tokenizing", result)


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))
