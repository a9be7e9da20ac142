"""What preparing and reading data costs:  python -m bench.data [NAME...]   (a function a measurement; default: all)

prepare_overhead: `data.prepare` against tiktoken's own batch encoding of the same documents, 1 and 2 threads.
memory: of a small and a large corpus. long_line: a line of 100 MB. killed: killed at random moments, then run again.
reader: the stream over a billion tokens. streaming: data="hf:FILE". reading_ahead: what it adds to a debug step.
"""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import bench
import errors
import settings
from data import prepare, sources, tokenizer
from data.loader import TrainStream, prefetch
from model import build

WORDS = ["--tokenizer=data/stdlib/tokenizer", "--overwrite"]


def corpus(path, megabytes):
    """A jsonl file of the standard library's functions, over and over with a number in front; returns the documents."""
    sources_read = (file.read_text(encoding="utf-8", errors="replace") for file in sources.stdlib_files())
    parts = [part for text in sources_read for part in text.split("\n\n\n")]
    documents, size = [], 0
    while size < megabytes * 1e6:
        documents.append(f"# {len(documents)}\n{parts[len(documents) % len(parts)]}")
        size += len(documents[-1].encode())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents),
                    encoding="utf-8")
    return documents


def prepare_overhead(megabytes=20):
    """Tokens a second of both, and the ratio of their times, workers by workers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        documents = corpus(path, megabytes)
        encoder = tokenizer.load("data/stdlib/tokenizer")
        tokens = sum(map(len, encoder.encode_ordinary_batch(documents))) + len(documents)
        result = {"documents": len(documents), "tokens": tokens}
        for workers in (1, 2):
            def ours(workers=workers):
                with contextlib.redirect_stdout(io.StringIO()):
                    prepare.main(["jsonl", str(path), *WORDS, f"--out={folder}/d", f"--workers={workers}"])
            theirs = lambda workers=workers: encoder.encode_ordinary_batch(documents, num_threads=workers)
            seconds = bench.interleaved({"prepare": ours, "tiktoken": theirs}, rounds=9, warmup=1)
            result[f"workers {workers}"] = {name: tokens / taken for name, taken in seconds.items()} | {
                "time ratio": seconds["prepare"] / seconds["tiktoken"]}
            print(f"workers {workers}", result[f"workers {workers}"], flush=True)
    return result


def prepare_alone(*words):
    """{seconds, peak GiB} of data.prepare in a process of its own."""
    code = ("import sys; from data import prepare; prepare.main(sys.argv[1:]); "
            "print(open('/proc/self/status', encoding='utf-8').read().split('VmHWM:')[1].split()[0])")
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.PIPE, encoding="utf-8")
    result = {"seconds": time.time() - started, "peak GiB": int(done.stdout.split()[-1]) / 2**20}
    print(words[0], result, flush=True)
    return result


def memory(megabytes=(30, 300)):
    """Of a small and a ten times larger corpus, in shards of the same size."""
    result = {}
    for size in megabytes:
        with tempfile.TemporaryDirectory() as folder:
            corpus(Path(folder) / "a.jsonl", size)
            result[f"{size} MB"] = prepare_alone("jsonl", f"{folder}/a.jsonl", *WORDS, f"--out={folder}/d",
                                                 "--shard_tokens=2000000")
    return result


def long_line(megabytes=100):
    """One line of text, whose end is validation, and as a jsonl document among others."""
    with tempfile.TemporaryDirectory() as folder:
        line = ("word and another one, " * (megabytes * 10**6 // 22)).strip()
        Path(folder, "a.txt").write_text(line, encoding="utf-8")
        Path(folder, "a.jsonl").write_text(
            json.dumps({"text": line}) + '\n{"text": "short"}\n{"text": "end"}\n', encoding="utf-8")
        more = [*WORDS, "--shard_tokens=5000000", f"--out={folder}/d"]
        return {"text": prepare_alone("text", f"{folder}/a.txt", *more),
                "jsonl": prepare_alone("jsonl", f"{folder}/a.jsonl", "--val_fraction=0.5", *more)}


def killed(megabytes=60, times=3):
    """Kill -9 at random moments, run again: every byte of every file is that of an undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        corpus(Path(folder) / "a.jsonl", megabytes)
        command = [sys.executable, "-m", "data.prepare", "jsonl", f"{folder}/a.jsonl", *WORDS[:1],
                   "--shard_tokens=500000"]
        started = time.time()
        subprocess.run([*command, f"--out={folder}/whole"], check=True, stdout=subprocess.DEVNULL)
        taken = time.time() - started
        content = lambda name: {path.name: path.read_bytes() for path in Path(folder, name).rglob("*.*")}
        moments = []
        while len(moments) < times:
            process = subprocess.Popen([*command, f"--out={folder}/again"], stdout=subprocess.DEVNULL)
            time.sleep(random.uniform(0.2, 0.9) * taken)
            process.send_signal(signal.SIGKILL)
            process.wait()
            shards = [len(list(left.glob("*.bin"))) for left in Path(folder).glob(".again.*")]
            if Path(folder, "again").exists():  # too late
                shutil.rmtree(Path(folder, "again"))
            elif shards:
                moments += [max(shards)]
        subprocess.run([*command, f"--out={folder}/again"], check=True)
        assert content("whole") == content("again"), "the folders differ"
        assert sorted(os.listdir(folder)) == ["a.jsonl", "again", "whole"], "debris is left"
    print(f"killed with {moments} shards written, then run again: identical")
    return {"shards when killed": moments, "identical": True}


def random_shards(folder, tokens, vocab=50_257, mean_length=700, shard_tokens=100_000_000):
    """A folder of random ids below vocab with documents of lognormal lengths, 256 opening each; no meta.json."""
    rng, header = np.random.default_rng(0), np.zeros(256, np.int32)
    for number, start in enumerate(range(0, tokens, shard_tokens)):
        count = min(shard_tokens, tokens - start)
        ids = rng.integers(300, vocab, count, dtype=np.uint16)
        starts = np.cumsum(rng.lognormal(np.log(mean_length) - 0.5, 1.0, 2 * count // mean_length).astype(int) + 2)
        ids[starts[starts < count]] = 256
        for split in ("train", "val") if number == 0 else ("train",):
            part = ids if split == "train" else ids[:100_000]
            header[:3] = 20240520, 1, len(part)
            Path(folder, f"{split}_{number:06d}.bin").write_bytes(header.tobytes() + part.tobytes())


def resident(kind):
    """A part of this process's memory in MiB: RssAnon is its own, RssFile the page cache mapped from files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(kind))
    return int(line.split()[1]) / 1024


def reader(billions=1.0, T=1024):
    """Tokens/s of the reader alone and its own memory over an epoch of a folder of that many tokens, both packings;
    packing also says how long opening takes and what share of places stays empty."""
    result, encoder = {}, tokenizer.load("bytes")
    with tempfile.TemporaryDirectory() as folder:
        random_shards(folder, int(billions * 1e9))
        for packing in ("concat", "best_fit"):
            started = time.perf_counter()
            stream = TrainStream(folder, T, 0, encoder=encoder, packing=packing)
            opened, source = time.perf_counter() - started, stream.sources[0]
            steps = source.count // 32 if packing == "concat" else min(source.count // 32, 3000)
            memory, started = [], time.perf_counter()
            for n, _ in enumerate(prefetch(stream, torch.device("cpu"), range(1, steps + 1), 0, 32, 32)):
                if n % (steps // 8) == steps // 8 - 1:
                    memory.append(round(resident("RssAnon")))
            seconds = time.perf_counter() - started
            result[packing] = {"tokens/s": steps * 32 * T / seconds, "opening s": opened, "own MiB by eighths": memory,
                               "sequences": steps * 32, "empty": getattr(source, "padding", 0.0)}
            print(packing, result[packing], flush=True)
    return result


def streaming(megabytes=40, T=1024):
    """Tokens/s of data="hf:FILE", tokenised by the background thread and its helpers, beside tiktoken alone."""
    with tempfile.TemporaryDirectory() as folder:
        documents = corpus(Path(folder) / "a.jsonl", megabytes)
        encoder = tokenizer.load("data/stdlib/tokenizer")
        started = time.perf_counter()
        tokens = sum(map(len, encoder.encode_ordinary_batch(documents, num_threads=2)))
        alone = tokens / (time.perf_counter() - started)
        stream, steps = TrainStream(f"hf:{folder}/a.jsonl", T, 0, encoder=encoder), tokens // (T * 33)
        started = time.perf_counter()
        for _ in prefetch(stream, torch.device("cpu"), range(1, steps + 1), 0, 32, 32):
            pass
        ours = steps * 32 * T / (time.perf_counter() - started)
        places, started = stream.places(), time.perf_counter()
        again = TrainStream(f"hf:{folder}/a.jsonl", T, 0, encoder=encoder)
        again.go_to(places)
        again.batch(steps * 32, 32)
    return {"tokens/s": ours, "tiktoken alone": alone, "resume s": time.perf_counter() - started}


def reading_ahead(rounds=40):
    """Milliseconds of a step of configs/debug.py (forward and backward): tokens at hand, read in place, and read ahead
    by the thread. The third less the first is what reading ahead costs."""
    config, _ = settings.load(["configs/debug.py"])
    with tempfile.TemporaryDirectory() as folder:
        random_shards(folder, 10_000_000, config.vocab_size)
        model = build(config, "cpu").init_weights(0).train()
        stream = TrainStream(folder, 256, 0)
        batches = prefetch(stream, torch.device("cpu"), range(1, 10**6), 0, 16, 16)
        fixed, number = stream.batch(0, 16), itertools.count()

        def step(inputs, targets):
            loss, _ = model(inputs, targets)
            loss.backward()
            model.zero_grad()
        seconds = bench.interleaved({"at hand": lambda: step(*fixed), "read here": lambda: step(
            *stream.batch(16 * next(number), 16)), "read ahead": lambda: step(*next(batches)[:2])}, rounds)
        started = time.perf_counter()
        for _ in range(200):
            stream.batch(16 * next(number), 16)
        inline = (time.perf_counter() - started) / 200
        batches.close()
    return {**{name: 1000 * taken for name, taken in seconds.items()}, "making a batch": 1000 * inline,
            "share of reading ahead": seconds["read ahead"] / seconds["at hand"] - 1}


MEASUREMENTS = {function.__name__: function for function in (
    prepare_overhead, memory, long_line, killed, reader, streaming, reading_ahead)}


def main(argv):
    if unknown := set(argv) - set(MEASUREMENTS):
        raise errors.UserError(f"no measurement {', '.join(unknown)}: {', '.join(MEASUREMENTS)}")
    bench.save("data", {name: MEASUREMENTS[name]() for name in argv or MEASUREMENTS})


if __name__ == "__main__":
    errors.run(bench.command(main, __doc__))
