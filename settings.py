"""Where the settings of a run come from: configs/*.py files, a run's config.json, --key=value.

Precedence: command line, then file or run, then the defaults of config.py. An unknown key, a wrong type or an
impossible combination is refused before anything is written. Next: train.py.
"""

import ast
import contextlib
import dataclasses
import difflib
import re
import runpy
import shlex
import sys
import types
import typing
from pathlib import Path

import errors
from config import FIELDS, Config
from data.shards import read_json
from errors import UserError, started
from model import ModelConfig

ELSEWHERE = {  # what others call a setting, where the spelling does not lead to it: {ours, with a remark: theirs}
    "muon_lr (adamw_lr follows it)": "lr learning_rate max_lr max_learning_rate peak_lr base_lr",
    "min_lr_ratio, a share of the peak": "min_lr min_learning_rate final_lr",
    "micro_batch_size, sequences of one forward, or global_batch_size, those of a step":
        "batch_size bs train_batch_size device_batch_size per_device_batch_size per_device_train_batch_size",
    "global_batch_size: the forwards of a step follow from it and micro_batch_size":
        "gradient_accumulation_steps gradient_accumulation grad_accum_steps accumulation_steps accumulate_grad_batches",
    "sequence_length": "block_size max_seq_len context_size n_ctx", "decay_steps": "cooldown_steps",
    "hidden_size": "n_embd d_model dim model_dim embed_dim", "num_attention_heads": "n_head n_heads",
    "kv_lora_rank: heads share a latent": "n_kv_head n_kv_heads num_kv_heads num_key_value_heads",
    "intermediate_size": "ffn_dim d_ff n_inner mlp_ratio", "n_routed_experts": "n_experts num_local_experts",
    "num_experts_per_tok": "top_k moe_top_k", "eval_batches": "eval_iters", "eval_interval": "eval_steps",
    "max_steps": "max_iters n_iters num_iterations train_steps train_iters", "schedule": "decay_lr",
    "max_steps: a run prints how many epochs they are": "epochs num_epochs max_epochs num_train_epochs",
    "save_interval": "save_steps checkpoint_interval ckpt_interval", "log_interval": "logging_steps",
    "grad_clip": "max_grad_norm clip_grad", "keep_checkpoints": "save_total_limit", "weight_decay": "wd",
    "momentum, Muon's; AdamW's betas are 0.9 and 0.95": "beta1 beta2 adam_beta1 adam_beta2 betas",
    "weight_decay: there is no dropout here": "dropout attention_dropout",
    "dtype": "precision mixed_precision bf16 fp16 amp", "out_dir": "output save_dir", "wandb": "report_to",
    "resume": "init_from load_from ckpt_path checkpoint resume_from_checkpoint",
    "data": "dataset_name data_dir train_data", "num_hidden_layers": "n_layer",
}


def load(argv):
    """A checked Config from ["configs/x.py", "--key=value", ...], or with the settings of the run that the words name,
    ["out/x", "--resume"] or ["--resume=out/x"]; returns (config, path of the config file or None)."""
    source, values, flags = given(argv)
    config = Config(**values | flags)
    config.out_dir = f"out/{Path(source).stem}" if config.out_dir is None else config.out_dir
    return config.check(), None if Path(source).is_dir() else source


def given(argv):
    """(the config file or the run's folder that the words name, its settings, those of the words)."""
    names, flags = read_words(argv)
    if type(named := flags.get("resume")) is str and named not in ("", "auto"):
        flags["resume"] = str(what_is_meant(named)[1])
    run = run_folder(names, flags)
    if len(names) > 1 or not names and not run:
        raise UserError("name one config file:  python train.py configs/debug.py [--key=value ...]  (see --help), or a "
                        "run to continue:  python train.py --resume=out/debug" + (f"; got {names}" if names else ""))
    return run or names[0], read_run(run) if run else read_file(names[0]), flags


def run_folder(names, flags):
    """The run whose settings are meant: what stands in place of the config file, else what --resume or --out_dir names;
    None if a config file is named, or nothing. A step so named becomes that of --resume."""
    resume = flags.get("resume")
    if len(names) == 1 and (not names[0].endswith(".py") or Path(names[0]).is_dir()):
        run, start = what_is_meant(names[0])
        if not resume and (run / "config.json").exists() and Path(names[0]).exists():
            raise UserError(f"{names[0]} is of a run, not a config file: continue it with  "
                            f"{' '.join(started('train.py'))} {shlex.quote(f'--resume={start}')}")
        if resume is True and start != run:
            flags["resume"] = str(start)
        return run if resume else None
    named = flags.get("out_dir") if resume in (True, "auto") else resume
    return what_is_meant(named)[0] if named and not names else None


def what_is_meant(path):
    """(run folder, what to continue from: it, or one of its step folders) of a path into a run: a step folder,
    checkpoints/, the pointers latest and best there, config.json."""
    path = Path(path)
    if path.is_file() and path.name in ("latest", "best"):
        best = path.read_text(encoding="utf-8", errors="replace").strip()
        path = path.parent / (best if path.name == "best" else "")  # a run goes on with the newest by itself
    step = re.fullmatch(r"step_\d+", path.name)
    folder = path.parent if step or path.is_file() else path
    run = folder.parent if folder.name == "checkpoints" else folder
    return run, path if step else run


def read_run(run):
    """The settings of a run's config.json, but for those of a start; what it holds of another version is told. The run
    may have been moved since."""
    path = run / "config.json"
    stored = read_json(path).get("settings") if path.is_file() else None
    if not isinstance(stored, dict):
        raise UserError(f"{run} has no config.json with the settings of a run: name its config file too, before "
                        f"--resume={shlex.quote(str(run))}" if run.is_dir() else f"there is no folder {run}")
    for name in sorted(stored.keys() ^ FIELDS.keys()):
        told = f"{stored[name]!r}, unknown to this version and left out" if name in stored else \
            f"not recorded, so {FIELDS[name].default!r}, the default"
        print(f"{path}: {name}: {told}", file=sys.stderr)
    return {name: checked(name, value, f"in {path}") for name, value in stored.items()
            if name in FIELDS and FIELDS[name].metadata["group"] != "start"} | {"out_dir": str(run)}


def read_file(path):
    """The settings that a config file assigns. Names with a leading underscore, and modules and functions that are not
    called like a setting, are its own affair."""
    if not Path(path).is_file():
        others = ", ".join(sorted(str(p) for p in Path("configs").glob("[a-z]*.py")))
        raise UserError(f"no config file {path}" + (f"; there are {others}" if others else ""))
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # whatever the file does, the user wants to hear which file it was
        raise UserError(f"{path} does not run: {type(error).__name__}: {error}") from error
    return {name: checked(name, value, f"in {path}") for name, value in names.items()
            if not name.startswith("_")
            and (name in FIELDS or not isinstance(value, types.ModuleType) and not callable(value))}


def read_words(argv):
    """(words that are no settings, {setting: value}) of --key=value, --key value, --key (True) and --no-key (False)."""
    names, values, words = [], {}, list(argv)
    while words:
        word = words.pop(0)
        key, equals, text = word.lstrip("-").partition("=")
        name = key.replace("-", "_")
        if re.match("-(?!-)", word) or not word.startswith("-") and equals and key.isidentifier():
            raise UserError(f"{word}: settings are written --{word.lstrip('-')}" + (
                "" if name in FIELDS else f" (but there is none of that name: {_hint(name)})"))
        if not word.startswith("--"):
            names.append(word)
            continue
        negated = name.startswith("no_") and name not in FIELDS and not equals
        if not negated and not equals and words and _is_value(words[0], name):
            equals, text = "=", words.pop(0)
        if negated:
            name, value = name[3:], False
        elif not equals:
            if name in FIELDS and bool not in _kinds(name):
                raise UserError(f"--{name} needs a value: --{name}=...  (default {FIELDS[name].default!r})")
            value = True
        else:
            try:
                value = ast.literal_eval(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it raises
                value = {"true": True, "false": False}.get(text.lower(), text)
            if name in FIELDS and str in _kinds(name) and not isinstance(value, (dict, bool, type(None))):
                value = text  # a text that happens to look like a number stays a text
        values[name] = checked(name, value, "on the command line")
    return names, values


def take_words(argv, own):
    """({name: value}, the other words) of a command that has words of its own beside settings. own: {name: default},
    False for a switch, "" for one that may stand alone, which is "-" then. What is misspelt is refused here, where both
    kinds are known."""
    taken, rest, words = dict(own), [], iter(argv)
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in own:
            near = difflib.get_close_matches(name, [*own, *FIELDS], 1, 0.7)
            if word.startswith("--") and name not in FIELDS and {*near} & own.keys():
                raise UserError(f"unknown option {word}; did you mean --{near[0]}?")
            rest.append(word)
        elif own[name] in (False, ""):
            if own[name] is False and equals:
                raise UserError(f"--{name} takes no value: leave ={text} out")
            taken[name] = True if own[name] is False else text or "-"
        else:
            taken[name] = text if equals else next(words, "--")
            if taken[name].startswith("--"):
                raise UserError(f"--{name} needs a value, as in --{name}=...")
    return taken, rest


def _is_value(word, name):
    """Whether a word behind --name is its value. What follows a switch is only if it reads like one, and a config file
    (.py) is nobody's but that of a text."""
    kinds = _kinds(name) if name in FIELDS else ()
    if bool in kinds and str not in kinds:
        return word.lower() in ("true", "false", "none", "yes", "no", "on", "off", "0", "1")
    return not word.startswith("--") and (not word.endswith(".py") or str in kinds and bool not in kinds)


def checked(name, value, where):
    """value in the type of setting `name`, or a UserError that says what would be valid."""
    if name not in FIELDS:
        raise UserError(f"unknown setting {name!r} {where}; {_hint(name)}")
    texts = (value, *value) if isinstance(value, str | list | tuple | dict) else ()
    if isinstance(value, int | float) and not abs(value) < 2**63:
        raise UserError(f"{name} {where} must be finite, and below 2**63 in size")
    if any(isinstance(text, str) and re.search("[\0\ud800-\udfff]", text) for text in texts):
        raise UserError(f"{name}={value!r} {where} must be text, without NUL and without bytes that are "
                        "no UTF-8 (in a locale without it: LC_ALL=C.UTF-8)")
    kinds = _kinds(name)
    if choices := [kind for kind in kinds if isinstance(kind, str)]:
        if isinstance(value, str) and value in choices:
            return value
    elif isinstance(value, bool) or value is None:
        if type(value) in kinds:
            return value
    elif float in kinds and isinstance(value, int):
        return float(value)
    elif int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3 steps
    elif list in kinds and isinstance(value, tuple):
        return list(value)
    elif dict in kinds and value == ():  # as --help shows the default
        return {}
    elif type(value) in kinds:
        return value
    raise UserError(f"{name}={value!r} {where}: expected {' or '.join(map(_kind_name, kinds))}")


def model_config(values, where):
    """The checked ModelConfig of {setting: value} out of another file than a config file."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    config = ModelConfig(**{name: checked(name, value, where) for name, value in values.items() if name in names})
    config.check_model()
    return config


def _hint(name):
    """What an unknown name may have meant."""
    here = next((ours for ours, theirs in ELSEWHERE.items() if name.lower().replace("-", "_") in theirs.split()), None)
    near = difflib.get_close_matches(name.lower(), FIELDS, n=1, cutoff=0.5)
    return f"here it is {here}" if here else f"did you mean {near[0]!r}?" if near else "see --help"


def _kinds(name):
    """The types, or the literal choices, that a setting accepts."""
    return typing.get_args(FIELDS[name].type) or (FIELDS[name].type,)


def _kind_name(kind):
    return "None" if kind is type(None) else repr(kind) if isinstance(kind, str) else kind.__name__


def help_text(argv=()):
    """Every setting with type, default and reason, grouped. Words that name a config file or a run, and settings, have
    their values in place of the defaults, marked, and the defaults beside them."""
    lines, groups = ["python train.py CONFIG [--key=value ...] [--key value] [--key] [--no-key]"], {}
    values = {}
    if words := [word for word in argv if word not in ("-h", "--help")]:
        source, values, flags = given(words)
        values |= flags
        lines.append(f"* set by {source}{' or on this line' * bool(flags)}")
    for name, field in FIELDS.items():
        groups.setdefault(field.metadata["group"], []).append((name, field))
    for group, members in groups.items():
        lines.append(f"\n{group}")
        for name, field in members:
            kinds = " | ".join(map(_kind_name, _kinds(name)))
            mark, value, default = ("* ", values[name], f"; default {field.default!r}") if name in values else (
                "  ", field.default, "")
            lines.append(f"{mark}--{name}={value!r}  ({kinds}{default})\n        {field.metadata['why']}")
    return "\n".join(lines)


def about_the_start(argv):
    """For launch/multinode.sh: where the run will lie, and whether its start is one that must not be repeated."""
    with contextlib.redirect_stdout(sys.stderr):  # a config file may print
        config, _ = load(argv)
    print(config.out_dir, "once" if config.overwrite or config.resume not in (False, "auto") else "any", sep="\n")


if __name__ == "__main__":
    errors.run(about_the_start)
