"""What models do with a long context: the loss of a token by its position in a document, and how often a value that
was named once is found again, by how many tokens ago that was. For a stage of longer context (docs/method.md), before
and after it:

    python -m bench.context out/debug out/long [--length=1024] [--items=64]

Every model reads the same documents: those of the first one's validation split that are longer than `length` tokens,
from their beginning. One whose own context is shorter stands in two rows, with its RoPE as it is and stretched by YaRN
(factor: length over its context), both beyond what it was trained on. The value is a word behind NAME = " in a line of
its own; at the end stands NAME = " again, and the likeliest of eight words, of which chance finds 0.125, is the answer.
"""

import dataclasses
import statistics

import numpy as np
import torch

import bench
import errors
import generate
from data import tokenizer as tokenizers
from data.loader import Windows
from data.shards import open_split
from errors import UserError
from evaluate import TOKENS, score
from model import build
from run import checkpoint
from talk.text import require_tokenizer

WORDS = ("marble", "copper", "velvet", "cactus", "walnut", "pepper", "falcon", "lantern")
NAME = "needle"


def long_documents(folder, separator, length, most):
    """Up to `most` rows (length + 1,) of ids: documents of the val split that are long enough, from their separator."""
    windows = Windows(open_split(folder, "val", verify=False), length)
    ids = windows.read(0, windows.split.tokens)
    starts = np.flatnonzero(ids == separator)
    long = [start for start, end in zip(starts, [*starts[1:], len(ids)]) if end - start > length]
    if not long:
        raise UserError(f"no document of {folder}'s val split has more than {length} tokens: take a smaller --length")
    return [torch.from_numpy(ids[start:start + length + 1]) for start in long[:most]]


def variants(path, length):
    """Yield (name, model, its run's settings, encoder), where the context is too short as it is and with YaRN."""
    model, encoder = generate.load(path, "auto")
    settings = checkpoint.read_manifest(checkpoint.find(path))["config"]
    context = model.config.max_position_embeddings
    if context >= length:
        yield path, model, settings, encoder
        return
    yarn = {"type": "yarn", "factor": length / context, "original_max_position_embeddings": context}
    for name, scaling in ((f"{path}, as it is", model.config.rope_scaling), (f"{path}, YaRN untrained", yarn)):
        config = dataclasses.replace(model.config, max_position_embeddings=length, rope_scaling=scaling)
        stretched = build(config, model.device)
        stretched.load_state_dict(model.state_dict())
        yield name, stretched.eval(), settings, encoder


@torch.no_grad()
def by_position(model, rows, edges):
    """Mean loss of the tokens at positions edge..next edge."""
    total_T = 0
    for row in rows:
        inputs, targets = row[None, :-1].to(model.device), row[1:]
        log_TV = model(inputs)[0].log_softmax(-1).cpu()
        total_T = total_T - log_TV.gather(1, targets[:, None])[:, 0].double()
    return [float(part.mean()) / len(rows) for part in torch.tensor_split(total_T, edges)]


def needles(documents, encoder, length, distance):
    """One item a document: (rows of ids, one for each of WORDS, with how many are scored; which of them is right)."""
    encode = lambda text: torch.tensor(encoder.encode_ordinary(text))
    question = encode(f'\n{NAME} = "')
    endings = [encode(f'{word}"') for word in WORDS]
    for number, document in enumerate(documents):
        gold = number % len(WORDS)
        told = encode(f'\n{NAME} = "{WORDS[gold]}"\n')
        room = length - len(told) - len(question) - max(map(len, endings))
        if room < distance:
            raise UserError(f"--length={length} has no room for a distance of {distance}")
        hay = document[:room]
        cut = room - distance
        context = torch.cat((hay[:cut], told, hay[cut:], question))
        yield [(torch.cat((context, ending)), len(ending)) for ending in endings], gold


def found_again(model, encoder, documents, length, distance):
    """The share of items in which the word that was named is the likeliest, by its mean log-probability a token."""
    right = []
    for rows, gold in needles(documents, encoder, length, distance):
        found = score(model, rows, TOKENS)[:, 0] / torch.tensor([n for _, n in rows])
        right.append(float(found.argmax() == gold))
    return statistics.fmean(right)


def main(argv):
    numbers = {"length": 1024, "items": 64}
    for word in [word for word in argv if word.startswith("--")]:
        name, _, value = word.removeprefix("--").partition("=")
        if name not in numbers or not value.isdigit() or int(value) < 1:
            raise UserError(f"what is {word}? There are --length=1024 and --items=64, and --out=FOLDER")
        numbers[name] = int(value)
    paths, (length, items) = [word for word in argv if not word.startswith("--")], numbers.values()
    if not paths:
        raise UserError("name run folders:  python -m bench.context out/debug")
    edges = [edge for edge in (16, 64, 256, 1024, 4096, 16384) if edge < length]
    distances = [distance for distance in (16, 64, 192, 448, 960, 3968) if distance < length - 48]
    results, documents = {}, None
    for path in paths:
        for name, model, settings, encoder in variants(path, length):
            require_tokenizer(encoder, path)
            documents = documents or long_documents(settings["data"], tokenizers.end_of_text(encoder), length, items)
            results[name] = {
                "loss": dict(zip(map(str, [*edges, length]), by_position(model, documents, edges))),
                "found": {str(d): found_again(model, encoder, documents, length, d) for d in distances}}
            print(f"{name}: {len(documents)} documents\n  loss up to position  "
                  + "  ".join(f"{edge}: {loss:.3f}" for edge, loss in results[name]["loss"].items())
                  + "\n  found after tokens   "
                  + "  ".join(f"{d}: {share:.2f}" for d, share in results[name]["found"].items()), flush=True)
    bench.save("context", {"command": argv, "documents": len(documents), "length": length, "models": results})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))
