"""Random settings, in config files, on the command line and through whole runs: see fuzzing.py."""

import json
import math
import shutil
import types
import typing

import pytest
import torch
from hypothesis import strategies as st

import generate
import settings
from data import tokenizer
from data.shards import Writer
from mla import rope_frequencies
from run import checkpoint, report
from tests.fuzzing import attempt, damaged, fuzz, is_sound
from tests.helpers import TINY, final_tensors, make_data, run_train


@pytest.fixture(scope="module")
def area(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------- settings

NOT_BELOW = {  # what --help and the checks promise
    **dict.fromkeys(
        """sequence_length global_batch_size micro_batch_size max_steps ns_steps log_interval
        keep_checkpoints max_skipped_steps dp_replicate ep eval_batches vocab_size hidden_size intermediate_size
        num_hidden_layers num_attention_heads v_head_dim max_position_embeddings""".split(),
        1,
    ),
    **dict.fromkeys(
        """warmup_steps eval_interval save_interval sample_interval seed muon_lr adamw_lr weight_decay
        grad_clip bias_update_rate min_lr_ratio z_loss router_z_loss n_routed_experts n_shared_experts
        first_k_dense_replace momentum decay_steps qk_clip_tau rope_theta rms_norm_eps initializer_range mtp_depth
        mtp_loss_weight mtp_decay_loss_weight""".split(),
        0,
    ),
}
TEXT = st.text("abcdefgh/._-", min_size=1, max_size=8).map("p".__add__)
FITTING = {
    int: st.sampled_from([0, 1, 1, 2, 4, 8, 16, 64, 257, 1024]) | st.integers(1, 64) | st.integers(0, 2**40),
    float: st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 3),
    bool: st.booleans(),
    str: TEXT,
    type(None): st.none(),
    list: st.lists(st.text(max_size=5), max_size=3),
    dict: st.dictionaries(TEXT, st.integers(1, 5) | st.floats(0.1, 9), min_size=1, max_size=3),
}
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.lists(st.integers(), max_size=3),
    st.tuples(st.text(max_size=3), st.floats()),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.floats() | st.text(max_size=3), max_size=3),
    st.sampled_from(
        [
            10**400,
            -(10**400),
            2**63,
            1e308,
            5e-324,
            math.nan,
            math.inf,
            -1,
            "",
            "\0",
            "\ud800",
            "a" * 5000,
            {"type": "yarn", "factor": 0, "original_max_position_embeddings": 1},
            {"a": 10**400},
            ["\0"],
        ]
    ),
)


def kinds(name):
    annotation = settings.FIELDS[name].type
    return (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )


def fitting(name):
    """Values of the right type, most of them possible."""
    if name == "rope_scaling":
        number = st.floats(0, 100) | st.sampled_from([1, 4, 4096, math.nan, "4", None])
        return st.none() | st.fixed_dictionaries(
            {"type": st.just("yarn"), "factor": number, "original_max_position_embeddings": number},
            optional=dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), number),
        )
    same = st.just(settings.FIELDS[name].default) if settings.FIELDS[name].default != ("",) else st.just([""])
    return same | st.one_of(
        *(st.sampled_from(typing.get_args(kind)) if typing.get_origin(kind) else FITTING[kind] for kind in kinds(name))
    )


def is_of(value, kind):
    if typing.get_origin(kind) is typing.Literal:
        return type(value) is str and value in typing.get_args(kind)
    if type(value) is not kind:
        return False
    if kind is float:
        return math.isfinite(value)
    if kind is int:
        return -(2**63) <= value < 2**63
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
        if value in (None, "") and name in ("out_dir", "routed_scaling_factor"):
            continue  # filled in
        value = type(getattr(config, name))(value) if type(value) is tuple else value  # () of a dict: {}
        assert getattr(config, name) == value, (name, value)


@st.composite
def assignments(draw):
    """(name, value, whether it fits) triples."""
    wild, found = draw(st.integers(0, 3)) == 0, []
    for name in draw(st.lists(st.sampled_from(sorted(settings.FIELDS)), max_size=4)):
        fits = not wild or draw(st.booleans())
        found.append((name, draw(fitting(name) if fits else ANYTHING), fits))
    return found


CODE = [
    "raise SystemExit(3)", "import sys\nsys.exit('bye')", "def f():\n f()\nf()", "x = " + "(" * 5000,
    "max_steps = " + "[" * 90 + "]" * 90, "max_steps = " + "-" * 3000 + "1", "1 / 0",
    "raise ValueError('a\\nb' * 9999)", "assert 0, '\\x1b[31m'", "_x = '\0'", "import nothing",
    "seed = " + "9" * 5000, "hidden_size = int", "data = {}\ndata['x'] = data", "def muon_lr(): pass",
    "import math as data", "max_iters = 3", "from configs.debug import *", "import numpy\nschedule = numpy.zeros(3)",
    "import numpy\nmuon_lr = numpy.float64(1e-3)", "_private = 3", "import torch\nmax_steps = torch.tensor(3)",
    "if True:\nmax_steps = 3", "max_steps: int", "raise MemoryError", "'''", "\\", "max_steps = 3;;",
    "sample_prompts = ('a', 'b')", "print(end='')", "seed = True", "class seed: pass",
]
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

    fuzz(
        500,
        test,
        assignments(),
        st.lists(st.sampled_from(CODE), max_size=1) | st.just([]),
        st.sampled_from(CODECS),
        st.integers(0, 7),
        st.data(),
    )


def test_command_lines(area):
    path = area / "line.py"
    path.write_text("max_position_embeddings = 2048\n")
    typo = lambda name: st.integers(0, len(name) - 1).map(lambda i: name[:i] + name[i + 1 :])
    any_name = st.sampled_from(sorted(settings.FIELDS))
    wild = st.one_of(
        any_name.map("--no-{}".format),
        any_name.map("--{}".format),
        any_name.flatmap(typo).map("--{}=3".format),
        st.text(max_size=12).map("--".__add__),
        st.builds("--{}={}".format, any_name, st.text(max_size=12)),
        st.builds(
            "--{}={}".format,
            any_name,
            st.sampled_from(
                [
                    "(" * 9999,
                    "[" * 150 + "]" * 150,
                    "-" * 50_000 + "1",
                    "{[1]: 2}",
                    "{{}}",
                    "1" * 5000,
                    "9" * 4000,
                    "0x10",
                    "1_0",
                    "1e999",
                    "nan",
                    "\0",
                    "'",
                    "'\\x00'",
                    "\ud800",
                    "\u2028",
                    "None",
                    "true",
                    "b'x'",
                    "...",
                    "{'a': 1e999}",
                    "=",
                    "{'hf:x': 1}",
                    "hf:",
                    "{'type': 'yarn'}",
                    "[1]",
                    "['\\ud800']",
                    "()",
                    "1j",
                    "１２",
                    "1" + "+1j" * 5000,
                ]
            ),
        ),
    )

    def test(found, odd):
        words = [f"--{name}={value if type(value) is str else repr(value)}" for name, value, _ in found] + odd
        loaded, problem = attempt(
            lambda: settings.load([str(path), *words]), *settings.FIELDS, "--", "unknown setting", "RoPE"
        )
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


# ---------------------------------------------------------------------- whole runs

RUNS = dict(
    attention=["mla", "mha"], hidden_size=[8, 16, 17], intermediate_size=[8, 24], num_attention_heads=[1, 2, 3],
    q_lora_rank=[None, 4], kv_lora_rank=[1, 8], qk_nope_head_dim=[4, 5], qk_rope_head_dim=[2, 4, 3],
    v_head_dim=[4, 6, 5], n_routed_experts=[0, 1, 4, 8, 6], num_experts_per_tok=[1, 2, 5], n_shared_experts=[0, 2],
    n_group=[1, 2, 3], topk_group=[1, 2], norm_topk_prob=[True, False], routed_scaling_factor=[None, 1.5, 0.0],
    first_k_dense_replace=[0, 1, 2, 3], num_hidden_layers=[1, 2], rms_norm_eps=[1e-6, 1e-30, 0.0],
    mtp_depth=[0, 1, 2], rope_theta=[1e4, 1.0, 1e-30], tie_word_embeddings=[True, False],
    rope_scaling=[None, {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
                  {"type": "yarn", "factor": 1, "original_max_position_embeddings": 1, "beta_fast": 1, "mscale": 0},
                  {"type": "x"}],
    initializer_range=[0.02, 1.0, 1e9], aux_loss_alpha=[0.0, 1e-2, -1.0], z_loss=[0.0, 1e-3],
    router_z_loss=[0.0, 1e-3], balance=["quantile", "sign", "none"],
    optimizer=["muonclip", "muon", "adamw"], muon_lr=[1e-2, 0.0, 1e6], adamw_lr=[None, 1e-3], momentum=[0.0, 0.95],
    nesterov=[True, False], weight_decay=[0.0, 0.1], ns_steps=[1, 5],
    ns_dtype=["auto", "float32", "bfloat16", "float16"], ns_coefficients=["jordan", "you", "polar_express"],
    muon_per_head=[True, False], qk_clip_tau=[100.0, 1e-3], grad_clip=[0.0, 1.0], bias_update_rate=[0.0, 1e-3],
    schedule=["wsd", "cosine", "constant"], warmup_steps=[0, 1, 2**60], decay_steps=[None, 0, 1, 2**60],
    min_lr_ratio=[0.0, 0.1, 2.0], dtype=["float32", "bfloat16", "float16"],
    activation_checkpointing=["none", "selective", "full"], seed=[0, 2**63 - 1], strategy=["fsdp", "ddp"],
    dp_replicate=[1, 2], dp_shard=[None, 1, 2], ep=[1, 2], packing=["concat", "best_fit"],
    document_mask=[True, False], sequence_length=[1, 16, 33, 64], global_batch_size=[1, 2, 5],
    micro_batch_size=[1, 2, 2**40], eval_interval=[0, 1], eval_batches=[1, 2**50], save_interval=[0, 1],
    keep_checkpoints=[1, 2**60], async_save=[True, False], verify_data=[True, False],
    tokenizer=[None, "bytes", "nowhere", "gpt5"], vocab_size=[257, 300, 60], sample_interval=[0, 0, 1],
    sample_prompts=[["a", "\n\u2028é"], []], run_name=[None, "x"], resume=[False, True, "auto", "nowhere"],
    overwrite=[True, False], max_position_embeddings=[64, 65, 10**9], compile=[None, False],
    kernels=["auto", "torch"], max_skipped_steps=[1, 10], log_interval=[1, 2**60], device=["cpu", "auto"],
    wandb_project=["x"],
)


def test_whole_runs(area, monkeypatch):
    """One step and its checkpoint with any settings: refused, or a finite loss and a model that loads and computes."""
    monkeypatch.setattr(report, "stream_text", short_text)
    data = {"train": str(make_data(area / "text", 2000, 300)), "pieces": str(area / "pieces")}
    with Writer(data["pieces"], 257) as writer:
        for length in range(1, 60):
            writer.write("val" if length % 5 == 0 else "train", [256, *range(length)], length)
        writer.finish(lambda path: tokenizer.save(tokenizer.load("bytes"), path), tokenizer="bytes")
    base = TINY | dict(
        vocab_size=257,
        sequence_length=32,
        global_batch_size=2,
        micro_batch_size=2,
        dtype="float32",
        eval_interval=0,
        hidden_size=16,
        num_hidden_layers=2,
        max_steps=1,
        wandb="off",
        device="cpu",
        out_dir=str(area / "out"),
    )
    sources = st.sampled_from(
        [
            *data.values(),
            *data.values(),
            {data["train"]: 2, data["pieces"]: 0.5},
            {data["train"]: 1e-9, data["pieces"]: 1},
            str(area / "nowhere"),
        ]
    )
    changes = st.lists(st.sampled_from(sorted(RUNS)), max_size=5, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: st.sampled_from(RUNS[name]) for name in names})
    )

    def test(source, changed):
        shutil.rmtree(area / "out", ignore_errors=True)
        path = area / "run.py"
        path.write_text("".join(f"{key} = {value!r}\n" for key, value in (base | {"data": source} | changed).items()))
        record, problem = attempt(
            lambda: run_train(path), *settings.FIELDS, area, "nowhere", "tokenizer", "RoPE", "ranks", "non-finite"
        )
        if problem:
            return False
        assert record["step"] == 1 and is_sound(checkpoint.find(area / "out"))
        skipped = any(
            json.loads(line).get("event") == "skip" for line in (area / "out/metrics.jsonl").read_text().splitlines()
        )
        assert math.isfinite(record["loss"] or math.nan) or skipped and record["grad_norm"] is None, record
        (model, _), stored = generate.load(area / "out", "cpu"), final_tensors(area / "out")
        assert all(torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in model.state_dict().items())
        logits = model(torch.tensor([[1, 2, 3]]))
        assert logits.shape == (1, 3, model.config.vocab_size) and (
            skipped or set(changed) & EXTREME or logits.isfinite().all()
        )
        return True

    fuzz(100, test, sources, changes)


EXTREME = {"initializer_range", "muon_lr", "rope_theta", "rms_norm_eps"}  # weights may overflow in the step


def short_text(*args, **options):
    return generate.stream_text(*args, **options | {"max_new_tokens": 5})
