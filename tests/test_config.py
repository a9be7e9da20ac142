"""Settings: types, precedence, errors that name the way out, and every file in configs/."""

import re
import shlex

import pytest

import settings
from counting import count_parameters
from errors import UserError
from tests.helpers import ROOT

CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py"))


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_precedence_is_line_then_file_then_default(file):
    config, _ = settings.load([file("hidden_size = 512\nmuon_lr = 1e-3\n"), "--muon_lr=5e-4"])
    assert (config.hidden_size, config.muon_lr, config.momentum) == (512, 5e-4, 0.95)
    assert config.out_dir == "out/mine"


def test_a_file_may_compute_and_import_another(file):
    text = "import math\nfrom configs.debug import *\n_width = int(math.sqrt(65536))\nhidden_size = _width\n"
    config, _ = settings.load([file(text)])
    assert config.hidden_size == 256 and config.data == "data/stdlib"


@pytest.mark.parametrize(
    "word, expected",
    [
        ("--muon_lr=3e-4", {"muon_lr": 3e-4}),
        ("--max_steps=1e3", {"max_steps": 1000}),
        ("--muon_lr=1", {"muon_lr": 1.0}),
        ("--adamw_lr=None", {"adamw_lr": None}),
        ("--compile", {"compile": True}),
        ("--no-compile", {"compile": False}),
        ("--compile=false", {"compile": False}),
        ("--norm_topk_prob=True", {"norm_topk_prob": True}),
        ("--resume", {"resume": True}),
        ("--resume=out/x/checkpoints/step_00000010", {"resume": "out/x/checkpoints/step_00000010"}),
        ("--data={'a': 2, 'b': 0.5}", {"data": {"a": 2, "b": 0.5}}),
        ("--data=a=b", {"data": "a=b"}),
        ("--run_name=17", {"run_name": "17"}),
        ("--sample_prompts=['def ', 'import ']", {"sample_prompts": ["def ", "import "]}),
        ("--schedule=cosine", {"schedule": "cosine"}),
        ("--tie-word-embeddings", {"tie_word_embeddings": True}),
        ("--no-nesterov", {"nesterov": False}),
    ],
)
def test_flags(word, expected):
    _, values = settings.read_words([word])
    assert values == expected and all(type(values[key]) is type(expected[key]) for key in expected)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--data data/book --max_steps 5 --no-compile --compile", dict(data="data/book", max_steps=5, compile=True)),
        ("--adamw_lr -1e-3 --seed 7", dict(adamw_lr=-1e-3, seed=7)),
        ("--run_name 'my run' --sample_prompts \"['a b', 'c']\"", dict(run_name="my run", sample_prompts=["a b", "c"])),
        ("--compile false --nesterov True --tie-word-embeddings", dict(
            compile=False, nesterov=True, tie_word_embeddings=True)),
        ("--resume out/b2 --overwrite", dict(resume="out/b2", overwrite=True)),
        ("--resume --max_steps 9", dict(resume=True, max_steps=9)),
        ("--activation_checkpointing none --q_lora_rank None", dict(activation_checkpointing="none", q_lora_rank=None)),
        ("--data a=b --run_name 17", dict(data="a=b", run_name="17")),
        ("--data \"{'a': 2}\" --eval-interval 0", dict(data={"a": 2}, eval_interval=0)),
    ],
)
def test_a_value_may_follow_its_key(line, expected, file):
    words = shlex.split(line)
    assert settings.read_words(words)[1] == expected
    name = file("hidden_size = 64\n")
    for argv in ([name, *words], [*words, name]):  # a switch does not swallow the config file
        if "-1e-3" not in line:
            assert settings.load(argv)[1] == name


@pytest.mark.parametrize(
    "line, message",
    [
        ("-muon_lr=1e-3", "settings are written --muon_lr=1e-3$"),
        ("-lr 1e-3", "settings are written --lr .*: here it is muon_lr"),
        ("max_steps=5", "settings are written --max_steps=5$"),
        ("--max_steps", "--max_steps needs a value: --max_steps=..."),
        ("--max_steps --compile", "--max_steps needs a value"),
        ("--lr 1e-3", "unknown setting 'lr' on the command line; here it is muon_lr"),
        ("--dropout 0.1", "no dropout here"),
        ("--Max_Steps 3", "did you mean 'max_steps'"),
        ("--compile maybe", "config file"),
    ],
)
def test_what_other_programs_take_is_hinted_at(file, line, message):
    with pytest.raises(UserError, match=message):
        settings.load([file("hidden_size = 64\n"), *shlex.split(line)])


def test_names_of_other_trainers_lead_to_ours(file):
    ours = {"lr": "muon_lr", "learning_rate": "muon_lr", "batch_size": "global_batch_size", "block_size":
            "sequence_length", "n_layer": "num_hidden_layers", "n_embd": "hidden_size", "max_iters": "max_steps",
            "init_from": "resume", "num_train_epochs": "max_steps", "gradient_accumulation_steps": "micro_batch_size"}
    for name, here in ours.items():
        with pytest.raises(UserError, match=f"unknown setting '{name}' in .*; here it is .*{here}"):
            settings.load([file(f"{name} = 3\n")])
    names = " ".join(settings.ELSEWHERE.values()).split()
    assert len(names) == len(set(names)) and not set(names) & set(settings.FIELDS)
    for hint in settings.ELSEWHERE:
        assert re.match(r"\w+", hint)[0] in settings.FIELDS


@pytest.mark.parametrize(
    "word, message",
    [
        ("--maxsteps=3", "did you mean 'max_steps'"),
        ("--n_routed_expert=3", "did you mean 'n_routed_experts'"),
        ("--zzzz=1", "see --help"),
        ("--max_steps=three", "expected int"),
        ("--max_steps=1.5", "expected int"),
        ("--muon_lr=fast", "expected float"),
        ("--muon_lr=True", "expected float"),
        ("--nesterov=1", "expected bool"),
        ("--schedule=linear", "expected 'wsd' or 'cosine'"),
        ("--q_lora_rank=x", "expected int or None"),
        ("--hidden_size=None", "expected int"),
        ("--data=None", "expected str or dict"),
    ],
)
def test_wrong_flags_say_what_would_be_valid(word, message):
    with pytest.raises(UserError, match=message):
        settings.read_words([word])


@pytest.mark.parametrize(
    "word, message",
    [
        ("--n_group=3", "n_group=3 must divide"),
        ("--num_experts_per_tok=99", "at most n_routed_experts"),
        ("--num_experts_per_tok=1", "no-norm_topk_prob"),
        ("--topk_group=2", "at most n_group"),
        ("--qk_rope_head_dim=15", "must be even"),
        ("--sequence_length=4096", "exceeds max_position_embeddings"),
        ("--max_steps=0", "must be at least 1"),
        ("--muon_lr=-1", "must be at least 0"),
        ("--hidden_size=0", "must be at least 1"),
        ("--rope_scaling={'type': 'linear'}", "must be None or a dict of type"),
        ("--dp_shard=0", "at least 1"),
        ("--data={'a': -1}", "weights above 0"),
        ("--momentum=1", "momentum"),
        ("--sample_prompts=[1]", "must be texts"),
        ("--adamw_lr=-1e-3", "adamw_lr"),
        ("--muon_lr=1e999", "must be finite"),
        ("--rope_theta=0", "must be above 0"),
        ("--n_shared_experts=-1", "n_shared_experts"),
        ("--data=", "data is empty"),
        ("--out_dir=", "out_dir is empty: name the run's folder"),
        ("--first_k_dense_replace=99", "first_k_dense_replace"),
        ("--decay_steps=-1", "decay_steps"),
    ],
)
def test_impossible_settings_are_refused(file, word, message):
    with pytest.raises(UserError, match=message):
        settings.load([file("hidden_size = 64\n"), word])


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_iterz = 3\n", "unknown setting 'max_iterz' in"),
        ("muon_lr = '3e-4'\n", "expected float"),
        ("max_steps = \n", "SyntaxError"),
        ("max_steps = 1 / 0\n", "ZeroDivisionError"),
        ("import nothing_there\n", "ModuleNotFoundError"),
    ],
)
def test_wrong_files_are_named(file, text, message):
    with pytest.raises(UserError, match=message) as error:
        settings.load([file(text)])
    assert "mine.py" in str(error.value)


@pytest.mark.parametrize("words", [[], ["configs/nowhere.py"], ["configs/debug.py", "configs/small.py"]])
def test_exactly_one_existing_file(words):
    with pytest.raises(UserError, match="config file"):
        settings.load(words)


def test_help_names_every_setting_with_its_reason():
    text = settings.help_text()
    for name, field in settings.FIELDS.items():
        assert f"  --{name}=" in text and field.metadata["why"] in text


def test_help_behind_a_config_shows_its_values_beside_the_defaults(file):
    path = file("hidden_size = 64\nmuon_lr = 0.25\n")
    lines = settings.help_text([path, "--help", "--max_steps=7"]).splitlines()
    assert lines[1] == f"* set by {path} or on this line"
    assert [line for line in lines[2:] if line.startswith("*")] == [
        "* --hidden_size=64  (int; default 768)", "* --max_steps=7  (int; default 1000)",
        "* --muon_lr=0.25  (float; default 0.002)"]
    plain = settings.help_text(["-h"]).splitlines()
    assert len(lines) == len(plain) + 1 and "  --momentum=0.95  (float)" in lines
    assert "  --max_steps=1000  (int)" in plain


def test_words_of_a_command_beside_settings():
    own = {"gpus": "1", "nodes": None, "json": "", "anew": False}
    assert settings.take_words(["--json", "c.py", "--gpus", "8", "--ep=2", "--anew"], own) == (
        {"gpus": "8", "nodes": None, "json": "-", "anew": True}, ["c.py", "--ep=2"])
    assert settings.take_words(["--json=f", "--nodes=3"], own)[0] == own | {"nodes": "3", "json": "f"}
    with pytest.raises(UserError, match="^--anew takes no value: leave =False out"):
        settings.take_words(["--anew=False"], own)
    with pytest.raises(UserError, match=r"^unknown option --gpuss=8; did you mean --gpus\?$"):
        settings.take_words(["--gpuss=8"], own)
    for word in ("--seed=3", "--lr=1", "--max_step=3"):  # settings, theirs of other trainers, misspelt ones of ours
        assert settings.take_words([word], own | {"seeds": "3"})[1] == [word]


def test_the_launchers_read_nothing_but_the_run_folder(file, capsys):
    settings.about_the_start([file("print('hello')\nout_dir = 'out/x'"), "--overwrite"])
    assert capsys.readouterr() == ("out/x\nonce\n", "hello\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_is_a_document(path):
    config, _ = settings.load([str(path)])
    head = path.read_text(encoding="utf-8").split('"""')[1]
    for word in (
        "multinode.sh" if path.stem == "k2" else "train.py",
        "Hardware",
        "Time",
        "Memory",
        "Expect",
    ):
        assert word in head, f"{path.name}'s docstring does not say {word}"
    assert f"configs/{path.name}" in head
    assert config.out_dir == f"out/{path.stem}"


# (total, active) of the published models count what the reports count: see the convention in count_parameters.
PUBLISHED = {"k2": (1.04e12, 32.6e9, 0.015), "moonlight": (16e9, 3e9, 0.08)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, _ = settings.load([str(ROOT / f"configs/{name}.py")])
    total, active, tolerance = PUBLISHED[name]
    assert count_parameters(config) == (pytest.approx(total, rel=tolerance), pytest.approx(active, rel=tolerance))


@pytest.mark.parametrize("words", [["--nodes"], ["--nodes", "--gpus=8"]])
def test_an_option_of_a_command_does_not_swallow_the_next(words):
    with pytest.raises(UserError, match="--nodes needs a value, as in --nodes="):
        settings.take_words(words, {"nodes": None, "gpus": None})
    assert settings.take_words(["--nodes", "2", "--gpus=8"], {"nodes": None, "gpus": None})[0] == {
        "nodes": "2", "gpus": "8"}
