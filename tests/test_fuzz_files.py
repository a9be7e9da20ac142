"""Random files in a data folder, a log and a checkpoint: see fuzzing.py."""

import contextlib
import json
import math
import os
import resource
import shutil
import time
import types
import zlib

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import export
import generate
import settings
from data import tokenizer
from data.loader import Windows
from data.shards import Writer, open_split
from run import checkpoint, metrics
from tests.fuzzing import FUZZ, ODD_JSON, attempt, damaged, fuzz, is_sound, json_file
from tests.helpers import final_tensors, make_data, run_train, small_run


@pytest.fixture(scope="module")
def area(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def shards(area):
    """{name: bytes} of a good folder of two small splits, one of them in two shards."""
    folder = make_data(area / "good", 300, 80)
    with Writer(area / "two", 257, shard_tokens=200) as writer:
        for split in ("train", "val"):
            writer.write(split, open_split(folder, split).arrays[0], 333)
        writer.finish(lambda path: tokenizer.save(tokenizer.load("bytes"), path), tokenizer="bytes")
    return {path.name: path.read_bytes() for path in (area / "two").iterdir() if path.is_file()}


def write_files(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def plain_tokens(raw):
    """The tokens of a shard by the format's definition, None if the bytes are none."""
    magic, version, count = (int.from_bytes(raw[i : i + 4], "little", signed=True) for i in (0, 4, 8))
    width = {(20240520, 1): 2, (20240801, 7): 4}.get((magic, version))
    if len(raw) < 1024 or not width or count < 1 or len(raw) != 1024 + count * width:
        return None
    return np.frombuffer(raw, dtype=f"<u{width}", offset=1024)


def read_back(folder, split, verify):
    """(split, its tokens as the loader reads them): all of them, and the second half alone."""
    opened = open_split(folder, split, verify)
    windows = Windows(opened, 8)
    half = windows.read(opened.tokens // 2, opened.tokens - opened.tokens // 2)
    whole = windows.read(0, opened.tokens)
    assert (whole[-len(half) :] == half).all()
    return opened, whole


def test_shards(area, shards):
    folder, meta = area / "shards", json.loads(shards["meta.json"])
    recorded = {shard["file"]: shard for split in meta["splits"].values() for shard in split["shards"]}

    def header(raw):
        number = st.sampled_from([-1, 0, 1, 2**31 - 1, -(2**31), 20240801, 20240520, 7]) | st.integers(
            -(2**31), 2**31 - 1
        )
        return st.builds(
            lambda at, n: raw[:at] + n.to_bytes(4, "little", signed=True) + raw[at + 4 :],
            st.sampled_from([0, 4, 8, 8]),
            number,
        )

    def as_uint32(raw):
        return (
            np.array([20240801, 7, *np.frombuffer(raw, "<i4")[2:256]], "<i4").tobytes()
            + plain_tokens(raw).astype("<u4").tobytes()
        )

    def test(name, kind, foreign, verify, data):
        raw = data.draw(
            {
                0: st.just(shards[name]),
                1: header(shards[name]),
                2: damaged(shards[name], 16),
                3: damaged(shards[name]),
                4: st.binary(max_size=2000),
                5: st.just(as_uint32(shards[name])),
            }[kind]
        )
        files = shards | {name: raw}
        write_files(folder, {key: raw for key, raw in files.items() if not (foreign and key == "meta.json")})
        split = name.split("_")[0]
        expected = [plain_tokens(files[key]) for key in sorted(files) if key.startswith(split)]
        good = all(tokens is not None for tokens in expected) and (
            foreign
            or all(
                len(plain_tokens(files[key])) == recorded[key]["tokens"]
                and (not verify or zlib.crc32(files[key]) == recorded[key]["crc32"])
                for key in files
                if key.startswith(split)
            )
        )
        found, problem = attempt(lambda: read_back(folder, split, verify), folder / name)
        assert good == (not problem), problem
        if good:
            assert (found[1] == np.concatenate(expected)).all() and (not verify or found[0].max_id >= found[1].max())
        return good

    drawn = st.sampled_from(sorted(recorded)), st.integers(0, 5), st.booleans(), st.booleans(), st.data()
    fuzz(300, test, *drawn, accepted=0.08)


def test_meta_json(area, shards):
    folder, good = area / "meta", json.loads(shards["meta.json"])

    def test(raw, split):
        write_files(folder, shards | {"meta.json": raw})
        found, problem = attempt(lambda: read_back(folder, split, True), folder)
        if not problem:
            info = json.loads(raw)["splits"][split]
            files = [shard["file"] for shard in info["shards"]]
            assert set(files) <= set(shards)  # nothing outside the folder
            assert (found[1] == np.concatenate([plain_tokens(shards[file]) for file in files])).all()
            assert found[0].max_id >= found[1].max() and found[0].bytes == info["bytes"] >= 0
            assert info["tokens"] == len(found[1])
        return not problem

    fuzz(400, test, json_file(good), st.sampled_from(["train", "val"]), accepted=0.08)


# ---------------------------------------------------------------------- metrics.jsonl

NUMBER = st.none() | st.floats(-1e3, 1e6) | st.integers(0, 1000)
RECORDS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "val", "event", "layers"]), "step": st.integers(0, 20)},
    optional=dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_second", "expert_load_max"), NUMBER)
    | {"expert_load": st.lists(st.lists(NUMBER, max_size=3), max_size=3), "max_attention_logits": st.lists(NUMBER)},
)
LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.flatmap(lambda record: json_file(record)),
    st.binary(max_size=40),
    st.sampled_from(ODD_JSON),
)


def is_record(line):
    """An object with a kind and a step, which a run may have written."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return (
        type(record) is dict
        and type(record.get("kind")) is str
        and type(record.get("step")) is int
        and 0 <= record["step"] < 2**63
    )


@pytest.mark.curves
def test_metrics_jsonl(area):
    folder, config, drawn = area / "log", types.SimpleNamespace(wandb="off", tensorboard=False), []

    def test(lines, step, samples):
        raw = b"\n".join(lines)
        lines = raw.split(b"\n")  # some hold line ends themselves
        write_files(folder, {"metrics.jsonl": raw, "samples.md": samples})
        good = [json.loads(line) for line in lines if is_record(line)]
        kept = [record for record in good if record["step"] <= step]
        assert str(metrics.read_records(folder / "metrics.jsonl")) == str(good)  # nan is not equal to itself
        log = metrics.RunLog(folder, config, step, "id")
        log.write("train", step + 1, loss=math.inf)
        log.close()
        odd = [value for record in good for value in record.values() if type(value) not in (str, float, type(None))]
        if len(odd) > len(good) and len(drawn) < 4 * FUZZ:  # takes half a second
            drawn.append(metrics.draw_curves(folder))
            assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert abs(found[-1].pop("time") - time.time()) < 60
        assert str(found) == str([*kept, {"kind": "train", "step": step + 1, "loss": None}])
        for part in ("\n## step 3\n\n~~~\nkept", "\n## step 15\n\n~~~\nkept"):
            if part.encode() in samples:
                assert (part.encode() in (folder / "samples.md").read_bytes()) == (int(part.split()[2]) <= step)
        return len(kept) == len(lines) - raw.endswith(b"\n") - (not raw)

    good_samples = b"# Samples\n\n## step 3\n\n~~~\nkept\n~~~\n\n## step 15\n\n~~~\nkept\n~~~\n"
    fuzz(350, test, st.lists(LINES, max_size=5), st.integers(0, 25), st.just(good_samples) | damaged(good_samples))


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(area):
    """A run of two saved steps with its data: (config file, run folder)."""
    return small_run(area / "trained", save_interval=1, max_steps=2, eval_interval=1), area / "trained/run"


@contextlib.contextmanager
def memory_of(n_bytes):
    """A damaged pickle may ask for any amount of memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_manifests_and_pointers(area, trained):
    folder = area / "copy/checkpoints"
    step, best = folder / "step_00000002", folder / "best"
    shutil.copytree(trained[1], folder.parent)
    files = {path: path.read_bytes() for path in [*step.iterdir(), best]}
    original = final_tensors(trained[1])
    kinds = st.sampled_from(["manifest", "manifest", "manifest", "pointer", "file"])
    pointer = damaged(b"step_00000001\n") | st.sampled_from(
        [b"../copy", b"/", b"step_00000009", b"\xff", b"step_00000001"]
    )

    def test(kind, raw, target, data):
        for path, content in files.items():
            path.write_bytes(content)
        changed = data.draw(st.sampled_from(["__0_0.distcp", ".metadata"]))
        if kind == "manifest":
            (step / "manifest.json").write_bytes(raw)
        elif kind == "file":
            (step / changed).write_bytes(data.draw(damaged((step / changed).read_bytes())))
        else:
            best.write_bytes(target)
            pointed, _ = attempt(lambda: checkpoint.find(folder.parent, "best"), folder.parent)
            assert pointed in (None, folder / "step_00000001", step)
            assert pointed is None or pointed.name == target.decode().strip()
        reason, _ = attempt(lambda: checkpoint.damage(step), step)
        found, _ = attempt(lambda: checkpoint.find(folder), folder)  # of two, one is always sound
        assert (reason == "") <= is_sound(step) and found == (folder / "step_00000001" if reason else step)
        assert attempt(lambda: checkpoint.find(step), step)[1] == "" or reason
        if not reason:
            model, problem = attempt(lambda: generate.load(step, "cpu")[0], step, *settings.FIELDS, "RoPE")
            state = {} if problem else model.state_dict()
            assert all(torch.equal(tensor, original[f"model.{name}"]) for name, tensor in state.items())
            return not problem
        return False

    fuzz(200, test, kinds, json_file(unsealed(files[step / "manifest.json"])), pointer, st.data())


def unsealed(manifest):
    """A manifest as it was before it had a checksum of its own: what it says is all there is to judge by."""
    return {name: value for name, value in json.loads(manifest).items() if name != "crc32"}


def test_a_manifest_protects_itself(area, trained):
    step = area / "sealed/checkpoints/step_00000002"
    shutil.copytree(trained[1], area / "sealed")
    good = json.loads((step / "manifest.json").read_text())

    def test(raw):
        (step / "manifest.json").write_bytes(raw)
        reason, _ = attempt(lambda: checkpoint.damage(step), step)
        try:
            read = json.loads(raw)
            same = json.dumps(read, sort_keys=True) == json.dumps(good, sort_keys=True)  # 1 is not 1.0 here
        except (ValueError, RecursionError):
            read, same = None, False
        assert (reason == "") == same or type(read) is dict and "crc32" not in read
        return same

    fuzz(200, test, json_file(good), accepted=0.05)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="limits memory as Linux does")
def test_indices_and_tensors_with_a_matching_checksum(area, trained):
    run, copy_ = trained[1] / "checkpoints/step_00000002", area / "crafted/step_00000002"
    names = {name: tensor.shape for name, tensor in final_tensors(trained[1]).items()}

    def test(name, data):
        shutil.rmtree(copy_, ignore_errors=True)
        shutil.copytree(run, copy_)
        raw = (run / name).read_bytes()
        raw = data.draw(damaged(raw, 4000) | damaged(raw))
        (copy_ / name).write_bytes(raw)
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["files"][name] = {"size": len(raw), "crc32": zlib.crc32(raw)}
        manifest["crc32"] = checkpoint._own_crc32(manifest)
        (copy_ / "manifest.json").write_text(json.dumps(manifest))
        assert checkpoint.damage(copy_) == ""
        with memory_of(2**32):
            tensors = {name: torch.zeros(shape) for name, shape in names.items()}
            return not attempt(lambda: checkpoint.load(copy_, tensors), copy_)[1]

    fuzz(200, test, st.sampled_from([".metadata", "__0_0.distcp"]), st.data(), accepted=0.05)


def test_resuming_from_a_changed_manifest(area, trained):
    path, run = trained
    out, raw_good = area / "resumed", (run / "checkpoints/step_00000002/manifest.json").read_text()

    def test(raw):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run, out)
        (out / "checkpoints/step_00000002/manifest.json").write_bytes(raw)
        record, problem = attempt(lambda: run_train(path, f"--out_dir={out}", "--resume", "--max_steps=3"), out)
        if not problem:
            assert record["step"] == 3 and math.isfinite(record["loss"])
            assert checkpoint.find(out).name == "step_00000003"
            assert all(tensor.isfinite().all() for tensor in final_tensors(out).values())
        return not problem

    fuzz(40, test, json_file(unsealed(raw_good)), refused=0)  # a manifest that is refused makes it go on from step 1


# ---------------------------------------------------------------------- tokenizers and Hugging Face directories


def test_tokenizer_folders(area):
    folder = area / "tokenizer"
    tokenizer.save(tokenizer.train_bpe(["some words to train on"] * 9, 270), folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = {"kind": "words", "name": "words", "words": ["some", "words"]}

    def test(about, ranks, which):
        write_files(folder, files | ({"ranks.tiktoken": ranks} if which else {"encoding.json": about}))
        encoder, problem = attempt(lambda: tokenizer.load(folder), folder)
        if not problem:
            text = "some wörds\n" * 3
            ids = tokenizer.encode(encoder, text)
            assert 0 <= ids.min() <= ids.max() < encoder.n_vocab and len(tokenizer.fingerprint(encoder)) == 16
            if which:  # the pattern is whole, so every byte comes back
                assert encoder.decode(list(ids[tokenizer.end_of_text(encoder) is not None :])) == text
        return not problem

    good = json.loads(files["encoding.json"])
    for pattern in ("a*", "", "("):  # tiktoken panics where a pattern matches nothing
        assert not test(json.dumps(good | {"pattern": pattern}).encode(), b"", False)
    about = json_file(good) | json_file(words)
    ranks = damaged(files["ranks.tiktoken"]) | st.just(files["ranks.tiktoken"])
    fuzz(200, test, about, ranks, st.integers(0, 3).map(lambda n: n == 0))


def test_hugging_face_configs(area, trained):
    folder = export.export(trained[1], area / "hf")
    weights = (folder / "model.safetensors").read_bytes()
    original = generate.load(folder, "cpu")[0].state_dict()

    def test(raw, tensors, which):
        (folder / "config.json").write_bytes(good if which else raw)
        (folder / "model.safetensors").write_bytes(tensors if which else weights)
        loaded, problem = attempt(lambda: generate.load(folder, "cpu"), folder, *settings.FIELDS, "RoPE")
        if not problem and not which:
            assert all(torch.equal(tensor, original[name]) for name, tensor in loaded[0].state_dict().items())
        return not problem

    good = (folder / "config.json").read_bytes()
    fuzz(200, test, json_file(json.loads(good)), damaged(weights, 3000), st.integers(0, 3).map(lambda n: n == 0))
