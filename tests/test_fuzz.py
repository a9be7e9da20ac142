"""Random input: whatever stands in a file or on the command line ends in one clear UserError that names it, or in what
an independent check confirms; never in a traceback, a hang or a silently wrong result.

Every target counts how many cases were accepted and refused, and wants enough of both. The cases are the same on every
machine; FUZZ=10 tries ten times as many.
"""

import collections
import contextlib
import copy
import functools
import json
import math
import operator
import os
import resource
import shutil
import signal
import types
import typing
import zlib

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import checkpoint
import config as settings
import generate
import metrics
import train
from data import tokenizer
from data.loader import Windows
from data.shards import Writer, open_split, read_meta
from errors import UserError
from mla import rope_frequencies
from tests.helpers import TINY, final_tensors, make_config, make_data, run_train

FUZZ = int(os.environ.get("FUZZ", "1"))


class Hang(BaseException):
    """Raised by the alarm: no handler of the product's may take it for something else."""


@pytest.fixture(autouse=True)
def alarm():
    def ring(number, frame):
        raise Hang
    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def area(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def attempt(action, *names):
    """(result, "") of action(), or (None, message) if it ends in a UserError, which must be one printable line with one
    of the names in it."""
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        return action(), ""
    except UserError as error:
        message = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert 10 < len(message) <= 1100 and message.isprintable(), message
    assert any(str(name) in message for name in names), f"{message!r} names none of {names}"
    return None, message


def fuzz(count, test, *strategies, accepted=0.15, refused=0.15):
    """Call test(*drawn) so often; it returns whether the case was accepted, and enough of both must come."""
    counts = collections.Counter()

    @hypothesis.settings(max_examples=count * FUZZ, derandomize=True, deadline=None, database=None,
                         phases=[hypothesis.Phase.generate],  # shrinking takes minutes
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.tuples(*strategies))
    def case(drawn):
        outcome = bool(test(*drawn))
        hypothesis.event(f"accepted: {outcome}")
        counts[outcome] += 1
    case()
    total = counts.total()
    print(f"{total} cases, {counts[True] / total:.0%} accepted")
    assert total >= 0.9 * count and counts[True] >= accepted * total and counts[False] >= refused * total, counts


# ---------------------------------------------------------------------- what is drawn

ODD_JSON = [b"", b"\xff\xfe\x00", b"null", b"[]", b"[3]", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"NaN",
            b"\xef\xbb\xbf{}", b"{}", b'"splits"', b"1e999", b"\0" * 64, '{"files": "\u2028"}'.encode()]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from([10**30, 2**31, 2**63, -1, 0, 1e308, "../../x", "/dev/zero", "x\0y", "\ud800", "step_00000001"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=4)


def places(value, at=()):
    """The paths to everything inside a JSON value."""
    for key, inner in value.items() if type(value) is dict else enumerate(value) if type(value) is list else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


@st.composite
def damaged(draw, raw, head=None):
    """Bytes with some changed, cut out, put in, or the end lost; near the start if `head` is given."""
    raw, place = bytearray(raw), st.integers(0, max(min(len(raw), head or len(raw)) - 1, 0))
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(place), draw(st.integers(0, 8))
        match draw(st.sampled_from(["set", "set", "cut", "put", "end", "more"])):
            case "set" if at < len(raw):
                raw[at] = draw(st.integers(0, 255))
            case "cut":
                del raw[at:at + size]
            case "put":
                raw[at:at] = draw(st.binary(max_size=8))
            case "end":
                del raw[at:]
            case "more":
                raw += bytes(size)
    return bytes(raw)


@st.composite
def json_file(draw, good):
    """The bytes of a JSON file: a good one, with up to two places changed, or damaged, or something else altogether."""
    value, kind = copy.deepcopy(good), draw(st.integers(0, 9))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        *path, key = draw(st.sampled_from(list(places(value)) or [(None,)]))
        if key is None:
            break
        holder = functools.reduce(operator.getitem, path, value)
        if type(holder[key]) is int and draw(st.booleans()):
            holder[key] += draw(st.sampled_from([-1, 1, 2**32, -2**40, 10**30]))
        elif draw(st.integers(0, 3)):
            holder[key] = draw(ANY_JSON)
        else:
            del holder[key]
    raw = json.dumps(value).encode()
    return draw(damaged(raw)) if kind == 8 else draw(st.sampled_from(ODD_JSON)) if kind == 9 else raw


# ---------------------------------------------------------------------- settings

NOT_BELOW = {  # what --help and the checks promise
    **dict.fromkeys("""sequence_length global_batch_size micro_batch_size max_steps ns_steps log_interval
        keep_checkpoints max_skipped_steps dp_replicate ep eval_batches vocab_size hidden_size intermediate_size
        num_hidden_layers num_attention_heads v_head_dim max_position_embeddings""".split(), 1),
    **dict.fromkeys("""warmup_steps eval_interval save_interval sample_interval seed muon_lr adamw_lr weight_decay
        grad_clip bias_update_rate min_lr_ratio z_loss n_routed_experts n_shared_experts first_k_dense_replace momentum
        decay_steps qk_clip_tau rope_theta rms_norm_eps initializer_range""".split(), 0)}
TEXT = st.text("abcdefgh/._-", min_size=1, max_size=8).map("p".__add__)
FITTING = {
    int: st.sampled_from([0, 1, 1, 2, 4, 8, 16, 64, 257, 1024]) | st.integers(1, 64) | st.integers(0, 2**40),
    float: st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 3),
    bool: st.booleans(), str: TEXT, type(None): st.none(), list: st.lists(st.text(max_size=5), max_size=3),
    dict: st.dictionaries(TEXT, st.integers(1, 5) | st.floats(0.1, 9), min_size=1, max_size=3)}
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.complex_numbers(), st.lists(st.integers(), max_size=3), st.tuples(st.text(max_size=3), st.floats()),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.floats() | st.text(max_size=3), max_size=3),
    st.sampled_from([10**400, -10**400, 2**63, 1e308, 5e-324, math.nan, math.inf, -1, "", "\0", "\ud800", "a" * 5000,
                     {"type": "yarn", "factor": 0, "original_max_position_embeddings": 1}, {"a": 10**400}, ["\0"]]))


def kinds(name):
    annotation = settings.FIELDS[name].type
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) \
        else (annotation,)


def fitting(name):
    """Values of the right type, most of them possible."""
    if name == "rope_scaling":
        number = st.floats(0, 100) | st.sampled_from([1, 4, 4096, math.nan, "4", None])
        return st.none() | st.fixed_dictionaries(
            {"type": st.just("yarn"), "factor": number, "original_max_position_embeddings": number},
            optional=dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), number))
    same = st.just(settings.FIELDS[name].default) if settings.FIELDS[name].default != ("",) else st.just([""])
    return same | st.one_of(*(st.sampled_from(typing.get_args(kind)) if typing.get_origin(kind) else FITTING[kind]
                              for kind in kinds(name)))


def is_of(value, kind):
    if typing.get_origin(kind) is typing.Literal:
        return type(value) is str and value in typing.get_args(kind)
    if type(value) is not kind:
        return False
    if kind is float:
        return math.isfinite(value)
    if kind is int:
        return -2**63 <= value < 2**63
    texts = [value] if kind is str else list(value) if kind in (list, dict) else []
    return all("\0" not in text and text.encode() is not None for text in texts)


def assert_possible(config):
    for name in settings.FIELDS:
        value = getattr(config, name)
        assert any(is_of(value, kind) for kind in kinds(name)), (name, value)
        assert name not in NOT_BELOW or value is None or value >= NOT_BELOW[name], (name, value)
    assert config.sequence_length <= config.max_position_embeddings and config.resume != "" and config.out_dir
    if config.n_routed_experts:
        assert 1 <= config.num_experts_per_tok <= config.n_routed_experts and config.routed_scaling_factor is not None
        assert config.n_routed_experts % config.n_group == 0 and 1 <= config.topk_group <= config.n_group
    if config.rope_scaling:
        frequency, factor = rope_frequencies(16, config.rope_theta, config.rope_scaling, "cpu")
        assert frequency.isfinite().all() and math.isfinite(factor)


def assert_given(config, values):
    """The settings have the values that were asked for."""
    for name, value in values.items():
        if value is None and name in ("out_dir", "routed_scaling_factor"):
            continue  # filled in
        value = list(value) if type(value) is tuple else value
        assert getattr(config, name) == value, (name, value)


@st.composite
def assignments(draw):
    """(name, value, whether it fits) triples."""
    wild, found = draw(st.integers(0, 3)) == 0, []
    for name in draw(st.lists(st.sampled_from(sorted(settings.FIELDS)), max_size=4)):
        fits = not wild or draw(st.booleans())
        found.append((name, draw(fitting(name) if fits else ANYTHING), fits))
    return found


CODE = ["raise SystemExit(3)", "import sys\nsys.exit('bye')", "def f():\n f()\nf()", "x = " + "(" * 5000,
        "max_steps = " + "[" * 90 + "]" * 90, "max_steps = " + "-" * 3000 + "1", "1 / 0", "raise ValueError('a\\nb' * 9999)",
        "assert 0, '\\x1b[31m'", "_x = '\0'", "import nothing", "seed = " + "9" * 5000, "hidden_size = int",
        "data = {}\ndata['x'] = data", "def muon_lr(): pass", "import math as data", "max_iters = 3", "from configs.debug import *",
        "import numpy\nschedule = numpy.zeros(3)", "import numpy\nmuon_lr = numpy.float64(1e-3)", "_private = 3",
        "import torch\nmax_steps = torch.tensor(3)", "if True:\nmax_steps = 3", "max_steps: int", "raise MemoryError",
        "'''", "\\", "max_steps = 3;;", "sample_prompts = ('a', 'b')", "print(end='')", "seed = True", "class seed: pass"]
CODECS = ["utf-8"] * 12 + ["utf-8-sig", "utf-16", "latin-1"]


def test_config_files(area):
    path = area / "mine.py"

    def test(found, code, codec, damage, data):
        lines = [f"{name} = eval({repr(value)!r}, {{'inf': 1e999, 'nan': float('nan')}})" for name, value, _ in found]
        source = "\n".join(lines + code)
        raw = source.encode(codec, "replace")
        path.write_bytes(data.draw(damaged(raw)) if damage == 0 else raw)
        loaded, problem = attempt(lambda: settings.load([str(path)]), path, *settings.FIELDS, "max_iters", "RoPE")
        if not problem:
            assert_possible(loaded[0])
            if not code and damage and codec.startswith("utf-8"):
                assert_given(loaded[0], {name: value for name, value, _ in found})
        return not problem
    fuzz(500, test, assignments(), st.lists(st.sampled_from(CODE), max_size=1) | st.just([]), st.sampled_from(CODECS),
         st.integers(0, 7), st.data())


def test_command_lines(area):
    path = area / "line.py"
    path.write_text("max_position_embeddings = 2048\n")
    typo = lambda name: st.integers(0, len(name) - 1).map(lambda i: name[:i] + name[i + 1:])
    any_name = st.sampled_from(sorted(settings.FIELDS))
    wild = st.one_of(
        any_name.map("--no-{}".format), any_name.map("--{}".format), any_name.flatmap(typo).map("--{}=3".format),
        st.text(max_size=12).map("--".__add__), st.builds("--{}={}".format, any_name, st.text(max_size=12)),
        st.builds("--{}={}".format, any_name, st.sampled_from([
            "(" * 9999, "[" * 150 + "]" * 150, "-" * 50_000 + "1", "{[1]: 2}", "{{}}", "1" * 5000, "9" * 4000, "0x10", "1_0",
            "1e999", "nan", "\0", "'", "'\\x00'", "\ud800", "\u2028", "None", "true", "b'x'", "...", "{'a': 1e999}", "=",
            "{'hf:x': 1}", "hf:", "{'type': 'yarn'}", "[1]", "['\\ud800']", "()", "1j", "１２", "1" + "+1j" * 5000])))

    def test(found, odd):
        words = [f"--{name}={value if type(value) is str else repr(value)}" for name, value, _ in found] + odd
        loaded, problem = attempt(lambda: settings.load([str(path), *words]), *settings.FIELDS, "--", "unknown setting",
                                  "RoPE")
        if not problem:
            assert_possible(loaded[0])
            if not odd and all(fits for *_, fits in found):
                assert_given(loaded[0], {name: value for name, value, _ in found})
        return not problem
    fuzz(700, test, assignments(), st.lists(wild, max_size=1) | st.just([]))


@pytest.mark.parametrize("word", ["", "\0", "a\0.py", "\ud800", ".", "tests", "x" * 200, "configs/debug.py/x"])
def test_a_config_file_that_is_none(word):
    assert attempt(lambda: settings.load([word]), "no config file", "name one config file")[1]


def test_an_interrupt_stays_one(area):
    """Ctrl-C while a config file computes is no mistake in it."""
    (area / "slow.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        settings.load([str(area / "slow.py")])


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
    magic, version, count = (int.from_bytes(raw[i:i + 4], "little", signed=True) for i in (0, 4, 8))
    width = {(20240520, 1): 2, (20240801, 7): 4}.get((magic, version))
    if len(raw) < 1024 or not width or count < 1 or len(raw) != 1024 + count * width:
        return None
    return np.frombuffer(raw, dtype=f"<u{width}", offset=1024)


def read_back(folder, split, verify):
    """(split, its tokens as the loader reads them): all of them, and the second half alone."""
    opened = open_split(folder, split, verify)
    windows = Windows(folder, split, 8, verify, opened=opened)
    half = windows.read(opened.tokens // 2, opened.tokens - opened.tokens // 2)
    whole = windows.read(0, opened.tokens)
    assert (whole[-len(half):] == half).all()
    return opened, whole


def test_shards(area, shards):
    folder, meta = area / "shards", json.loads(shards["meta.json"])
    recorded = {shard["file"]: shard for split in meta["splits"].values() for shard in split["shards"]}

    def header(raw):
        number = st.sampled_from([-1, 0, 1, 2**31 - 1, -2**31, 20240801, 20240520, 7]) | st.integers(-2**31, 2**31 - 1)
        return st.builds(lambda at, n: raw[:at] + n.to_bytes(4, "little", signed=True) + raw[at + 4:],
                         st.sampled_from([0, 4, 8, 8]), number)

    def as_uint32(raw):
        return np.array([20240801, 7, *np.frombuffer(raw, "<i4")[2:256]], "<i4").tobytes() + \
            plain_tokens(raw).astype("<u4").tobytes()

    def test(name, kind, foreign, verify, data):
        raw = data.draw({0: st.just(shards[name]), 1: header(shards[name]), 2: damaged(shards[name], 16),
                         3: damaged(shards[name]), 4: st.binary(max_size=2000), 5: st.just(as_uint32(shards[name]))}[kind])
        files = shards | {name: raw}
        write_files(folder, {key: raw for key, raw in files.items() if not (foreign and key == "meta.json")})
        split = name.split("_")[0]
        expected = [plain_tokens(files[key]) for key in sorted(files) if key.startswith(split)]
        good = all(tokens is not None for tokens in expected) and (foreign or all(
            len(plain_tokens(files[key])) == recorded[key]["tokens"]
            and (not verify or zlib.crc32(files[key]) == recorded[key]["crc32"])
            for key in files if key.startswith(split)))
        found, problem = attempt(lambda: read_back(folder, split, verify), folder / name)
        assert good == (not problem), problem
        if good:
            assert (found[1] == np.concatenate(expected)).all() and (not verify or found[0].max_id >= found[1].max())
        return good
    fuzz(300, test, st.sampled_from(sorted(recorded)), st.integers(0, 5), st.booleans(), st.booleans(), st.data())


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
            assert found[0].max_id >= found[1].max() and found[0].bytes_per_token == info["bytes"] / info["tokens"] >= 0
            assert info["tokens"] == len(found[1])
        return not problem
    fuzz(400, test, json_file(good), st.sampled_from(["train", "val"]))


# ---------------------------------------------------------------------- metrics.jsonl

NUMBER = st.none() | st.floats(-1e3, 1e6) | st.integers(0, 1000)
RECORDS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["train", "val", "event"]), "step": st.integers(0, 20)},
    optional=dict.fromkeys(("loss", "lr", "grad_norm", "tokens_per_second", "expert_load_max"), NUMBER))
LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()), RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.flatmap(lambda record: json_file(record)), st.binary(max_size=40), st.sampled_from(ODD_JSON))


def is_record(line):
    """An object with a kind and a step, which a run may have written."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return type(record) is dict and type(record.get("kind")) is str and type(record.get("step")) is int \
        and 0 <= record["step"] < 2**63


def test_metrics_jsonl(area):
    folder, config, drawn = area / "log", types.SimpleNamespace(wandb="off"), []

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
        assert str(found) == str([*kept, {"kind": "train", "step": step + 1, "loss": None}])
        for part in ("\n## step 3\n\n~~~\nkept", "\n## step 15\n\n~~~\nkept"):
            if part.encode() in samples:
                assert (part in (folder / "samples.md").read_text()) == (int(part.split()[2]) <= step)
        return len(kept) == len(lines) - raw.endswith(b"\n") - (not raw)
    good_samples = "# Samples\n\n## step 3\n\n~~~\nkept\n~~~\n\n## step 15\n\n~~~\nkept\n~~~\n".encode()
    fuzz(350, test, st.lists(LINES, max_size=5), st.integers(0, 25), st.just(good_samples) | damaged(good_samples))


# ---------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def trained(area):
    """A run of two saved steps with its data: (config file, run folder)."""
    data = make_data(area / "text", 2000, 300)
    path = make_config(area / "tiny.py", data=str(data), out_dir=str(area / "run"), hidden_size=16, save_interval=1,
                       num_hidden_layers=2, max_steps=2, global_batch_size=2, micro_batch_size=2, eval_interval=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "draw_curves", lambda folder: None)
        run_train(path)
    return path, area / "run"


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


def is_sound(folder):
    """Whether the manifest of a step folder lists every file with its true size and checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
        return all(manifest["files"][name]["size"] == len(raw) and manifest["files"][name]["crc32"] == zlib.crc32(raw)
                   for name, raw in files.items()) and f"step_{manifest['step']:08d}" == folder.name
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def test_manifests_and_pointers(area, trained, capsys):
    folder = area / "copy/checkpoints"
    step, best = folder / "step_00000002", folder / "best"
    shutil.copytree(trained[1], folder.parent)
    files = {path: path.read_bytes() for path in [*step.iterdir(), best]}
    original = final_tensors(trained[1])
    kinds = st.sampled_from(["manifest", "manifest", "manifest", "pointer", "file"])
    pointer = damaged(b"step_00000001\n") | st.sampled_from([b"../copy", b"/", b"step_00000009", b"\xff", b"step_00000001"])

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
            model, problem = attempt(lambda: generate.load(step, "cpu")[0], step)
            state = {} if problem else model.state_dict()
            assert all(torch.equal(tensor, original[f"model.{name}"]) for name, tensor in state.items())
            return not problem
        return False
    fuzz(200, test, kinds, json_file(json.loads(files[step / "manifest.json"])), pointer, st.data())


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
        (copy_ / "manifest.json").write_text(json.dumps(manifest))
        assert checkpoint.damage(copy_) == ""
        with memory_of(2**32):
            tensors = {name: torch.zeros(shape) for name, shape in names.items()}
            return not attempt(lambda: checkpoint.load(copy_, tensors), copy_)[1]
    fuzz(200, test, st.sampled_from([".metadata", "__0_0.distcp"]), st.data(), accepted=0.05)


def test_resuming_from_a_changed_manifest(area, trained, monkeypatch):
    path, run = trained
    out, raw_good = area / "resumed", (run / "checkpoints/step_00000002/manifest.json").read_text()
    monkeypatch.setattr(metrics, "draw_curves", lambda folder: None)

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
    fuzz(40, test, json_file(json.loads(raw_good)), refused=0)  # a manifest that is refused makes it go on from step 1


# ---------------------------------------------------------------------- whole runs

RUNS = dict(
    attention=["mla", "mha"], hidden_size=[8, 16, 17], intermediate_size=[8, 24], num_attention_heads=[1, 2, 3],
    q_lora_rank=[None, 4], kv_lora_rank=[1, 8], qk_nope_head_dim=[4, 5], qk_rope_head_dim=[2, 4, 3], v_head_dim=[4, 6, 5],
    n_routed_experts=[0, 1, 4, 8, 6], num_experts_per_tok=[1, 2, 5], n_shared_experts=[0, 2], n_group=[1, 2, 3],
    topk_group=[1, 2], norm_topk_prob=[True, False], routed_scaling_factor=[None, 1.5, 0.0], first_k_dense_replace=[0, 1, 2, 3],
    num_hidden_layers=[1, 2], rms_norm_eps=[1e-6, 1e-30, 0.0], rope_theta=[1e4, 1.0, 1e-30], tie_word_embeddings=[True, False],
    rope_scaling=[None, {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
                  {"type": "yarn", "factor": 1, "original_max_position_embeddings": 1, "beta_fast": 1, "mscale": 0}, {"type": "x"}],
    initializer_range=[0.02, 1.0, 1e9], aux_loss_alpha=[0.0, 1e-2, -1.0], z_loss=[0.0, 1e-3], optimizer=["muonclip", "muon", "adamw"],
    muon_lr=[1e-2, 0.0, 1e6], adamw_lr=[None, 1e-3], momentum=[0.0, 0.95], nesterov=[True, False], weight_decay=[0.0, 0.1],
    ns_steps=[1, 5], ns_dtype=["auto", "float32", "bfloat16", "float16"], ns_coefficients=["jordan", "you", "polar_express"],
    muon_per_head=[True, False], qk_clip_tau=[100.0, 1e-3], grad_clip=[0.0, 1.0], bias_update_rate=[0.0, 1e-3],
    schedule=["wsd", "cosine", "constant"], warmup_steps=[0, 1, 2**60], decay_steps=[None, 0, 1, 2**60], min_lr_ratio=[0.0, 0.1, 2.0],
    dtype=["float32", "bfloat16", "float16"], activation_checkpointing=["none", "selective", "full"], seed=[0, 2**63 - 1],
    strategy=["fsdp", "ddp"], dp_replicate=[1, 2], dp_shard=[None, 1, 2], ep=[1, 2], packing=["concat", "best_fit"],
    document_mask=[True, False], sequence_length=[1, 16, 33, 64], global_batch_size=[1, 2, 5], micro_batch_size=[1, 2, 2**40],
    eval_interval=[0, 1], eval_batches=[1, 2**50], save_interval=[0, 1], keep_checkpoints=[1, 2**60], async_save=[True, False],
    verify_data=[True, False], tokenizer=[None, "bytes", "nowhere", "gpt5"], vocab_size=[257, 300, 60], sample_interval=[0, 0, 1],
    sample_prompts=[["a", "\n\u2028é"], []], run_name=[None, "x"], resume=[False, True, "auto", "nowhere"], overwrite=[True, False],
    max_position_embeddings=[64, 65, 10**9], compile=[None, False], kernels=["auto", "torch"], max_skipped_steps=[1, 10],
    log_interval=[1, 2**60], device=["cpu", "auto"], wandb_project=["x"])


def test_whole_runs(area, trained, monkeypatch, capsys):
    """One step and its checkpoint with any settings: refused, or a finite loss and a model that loads and computes."""
    monkeypatch.setattr(metrics, "draw_curves", lambda folder: None)
    monkeypatch.setattr(train, "sample", functools.partial(short_sample, train.sample))
    data = {"train": str(area / "text"), "pieces": str(area / "pieces")}
    with Writer(data["pieces"], 257) as writer:
        for length in range(1, 60):
            writer.write("val" if length % 5 == 0 else "train", [256, *range(length)], length)
        writer.finish(lambda path: tokenizer.save(tokenizer.load("bytes"), path), tokenizer="bytes")
    base = TINY | dict(vocab_size=257, sequence_length=32, global_batch_size=2, micro_batch_size=2, dtype="float32", eval_interval=0,
                       hidden_size=16, num_hidden_layers=2, max_steps=1, wandb="off", device="cpu", out_dir=str(area / "out"))
    sources = st.sampled_from([*data.values(), *data.values(), {data["train"]: 2, data["pieces"]: 0.5}, {data["train"]: 1e-9,
                              data["pieces"]: 1}, str(area / "nowhere")])
    changes = st.lists(st.sampled_from(sorted(RUNS)), max_size=5, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: st.sampled_from(RUNS[name]) for name in names}))

    def test(source, changed):
        shutil.rmtree(area / "out", ignore_errors=True)
        path = area / "run.py"
        path.write_text("".join(f"{key} = {value!r}\n" for key, value in (base | {"data": source} | changed).items()))
        record, problem = attempt(lambda: run_train(path), *settings.FIELDS, area, "nowhere", "tokenizer", "RoPE", "ranks", "non-finite")
        if problem:
            return False
        assert record["step"] == 1 and is_sound(checkpoint.find(area / "out"))
        skipped = any(json.loads(line).get("event") == "skip" for line in (area / "out/metrics.jsonl").read_text().splitlines())
        assert math.isfinite(record["loss"] or math.nan) or skipped and record["grad_norm"] is None, record
        (model, _), stored = generate.load(area / "out", "cpu"), final_tensors(area / "out")
        assert all(torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in model.state_dict().items())
        logits = model(torch.tensor([[1, 2, 3]]))
        assert logits.shape == (1, 3, model.config.vocab_size) and (skipped or set(changed) & EXTREME or logits.isfinite().all())
        return True
    fuzz(150, test, sources, changes)


EXTREME = {"initializer_range", "muon_lr", "rope_theta", "rms_norm_eps"}  # weights may overflow in the step


def short_sample(sample, model, encoder, prompt, config, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "stream_text", lambda *args, **options: generate.stream_text(*args, **options | {"max_new_tokens": 5}))
        return sample(model, encoder, prompt, config, step)
