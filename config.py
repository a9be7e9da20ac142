"""Every setting of a run: names, defaults, types and reasons; configs/*.py files, --key=value, and the checks.

A config file is plain Python assignments. Precedence: command line, then file, then the defaults here. An unknown key,
a wrong type or an impossible combination is refused before anything is written. Next: train.py, which reads all of it.
(No postponed annotations here: the loader needs the real types.)
"""

import ast
import dataclasses
import difflib
import re
import runpy
import shlex
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import errors
from data.shards import read_json
from errors import UserError, started
from model import ModelConfig, setting


@dataclass
class Config(ModelConfig):
    # ---- data
    data: str | dict = setting(
        "data/stdlib", "folder of shards, or hf:REPO[:CONFIG][?split=train&column=text&validation=1000] for a dataset "
        "read while training, or {either: weight}", "data")
    tokenizer: str | None = setting(None, "None: that of the data; else a name, ranks file or folder", "data")
    sequence_length: int = setting(1024, "tokens of one training sequence", "data")
    packing: Literal["concat", "best_fit"] = setting(
        "concat", "concat: documents joined and cut; best_fit: those that fit into a sequence stay whole, and what "
        "stays free is routed like tokens but has no loss", "data")
    document_mask: bool = setting(
        False, "attention stays within a document and positions restart with it, in training and validation", "data")
    verify_data: bool = setting(True, "compare every shard with its recorded checksum at start (4 GB/s a core)", "data")
    # ---- batch and duration
    global_batch_size: int = setting(512, "sequences per optimizer step, whatever the number of ranks", "batch")
    micro_batch_size: int = setting(
        16, "sequences per forward of a rank, at most; the rest is gradient accumulation", "batch")
    max_steps: int = setting(1000, "optimizer steps of the whole run", "batch")
    # ---- optimizer
    optimizer: Literal["muonclip", "muon", "adamw"] = setting("muonclip", "muonclip is muon with QK-clip", "optimizer")
    muon_lr: float = setting(2e-3, "peak learning rate of the matrices", "optimizer")
    adamw_lr: float | None = setting(None, "peak rate of AdamW's parameters; None: muon_lr", "optimizer")
    momentum: float = setting(0.95, "Muon's moving average", "optimizer")
    nesterov: bool = setting(True, "Muon looks ahead by its momentum", "optimizer")
    weight_decay: float = setting(
        0.1, "decoupled, on every parameter, norms too (Moonlight found it crucial)", "optimizer")
    ns_steps: int = setting(5, "Newton-Schulz iterations; more amplify bf16 noise", "optimizer")
    ns_dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Newton-Schulz compute type; auto: float32 in float32 runs, else bfloat16", "optimizer")
    ns_coefficients: Literal["jordan", "you", "polar_express"] = setting(
        "jordan", "Newton-Schulz polynomial", "optimizer")
    muon_per_head: bool = setting(False, "orthogonalise q and kv up-projections head by head", "optimizer")
    qk_clip_tau: float = setting(100.0, "largest attention logit that QK-clip allows", "optimizer")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", "optimizer")
    bias_update_rate: float = setting(1e-3, "step of the router bias; 0 freezes it", "optimizer")
    # ---- schedule
    schedule: Literal["wsd", "cosine", "constant"] = setting("wsd", "wsd: warm-up, stable, linear decay", "schedule")
    warmup_steps: int = setting(100, "linear warm-up; step 1 already learns", "schedule")
    decay_steps: int | None = setting(None, "length of wsd's decay; None: a fifth of max_steps", "schedule")
    min_lr_ratio: float = setting(0.1, "final rate as a share of the peak", "schedule")
    # ---- machine
    device: Literal["auto", "cuda", "mps", "cpu"] = setting("auto", "auto: cuda, else mps, else cpu", "machine")
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", "compute type; parameters stay float32", "machine")
    compile: bool | None = setting(None, "torch.compile every block; None: on CUDA only", "machine")
    cuda_graph: bool | None = setting(
        None, "replay micro-batches as CUDA graphs; None: on CUDA without torchrun", "machine")
    weight_copies: bool | None = setting(
        None, "keep the blocks' matrices in dtype too, 2 bytes a parameter, to round them once a step instead of in "
        "every forward; None: on CUDA without torchrun, unless activation_checkpointing=full saves memory", "machine")
    kernels: Literal["auto", "triton", "torch"] = setting(
        "auto", "auto: Triton on CUDA if it passes a short check, else torch; triton on a CPU: interpreted", "machine")
    kernels_tuning: Literal["auto", "off", "full"] = setting(
        "auto", "auto: tiles remembered, or searched for seconds; off: defaults; full: measure all anew", "machine")
    activation_checkpointing: Literal["none", "selective", "full"] = setting(
        "none", "recompute in the backward: nothing, all but matmuls, or whole blocks", "machine")
    seed: int = setting(0, "initial weights and data order", "machine")
    # ---- parallelism
    strategy: Literal["fsdp", "ddp"] = setting(
        "fsdp", "fsdp: ranks share parameters, gradients and optimizer state; ddp: each has all of them", "parallelism")
    dp_replicate: int = setting(1, "copies of the sharded model; above 1: HSDP", "parallelism")
    dp_shard: int | None = setting(None, "ranks that share one copy; None: all that are left", "parallelism")
    ep: int = setting(1, "ranks that share the experts of a layer; divides dp_shard", "parallelism")
    # ---- watching
    out_dir: str | None = setting(None, "run folder; None: out/<name of the config file>", "watching")
    run_name: str | None = setting(None, "name in W&B; None: that of the run folder", "watching")
    log_interval: int = setting(10, "steps between records and terminal lines", "watching")
    eval_interval: int = setting(250, "steps between validations, besides saves and the end; 0: never", "watching")
    eval_batches: int = setting(20, "validation size in batches of global_batch_size sequences, at most", "watching")
    eval_tasks: list = setting((), "tasks at validations, as evaluate.py takes them: ['piqa', 'my.jsonl']", "watching")
    eval_task_items: int = setting(200, "first items of each: cheap, and accuracy has a deviation of 3.5 %", "watching")
    save_interval: int = setting(1000, "steps between checkpoints; 0: only at the end", "watching")
    async_save: bool = setting(
        False, "write checkpoints beside the training, from a copy in host memory", "watching")
    keep_checkpoints: int = setting(3, "newest checkpoints to keep, besides the best", "watching")
    sample_interval: int = setting(0, "steps between samples in samples.md; 0: never", "watching")
    sample_prompts: list = setting(("",), "texts to continue; empty: from the document start", "watching")
    wandb: Literal["auto", "online", "offline", "off"] = setting("auto", "auto: if installed and logged in", "watching")
    wandb_project: str = setting("nanok2", "W&B project", "watching")
    # ---- faults
    max_skipped_steps: int = setting(10, "stop, or roll back, after this many non-finite steps in a row", "faults")
    spike_sigmas: float = setting(
        6.0, "a loss so many standard deviations above the mean of the last 128 is recorded as a spike; 0: none is",
        "faults")
    max_rollbacks: int = setting(
        0, "how often after a start a spike, or too many non-finite steps, take the run back to its newest "
        "checkpoint, leaving out the data since", "faults")
    step_timeout: int = setting(
        600, "seconds after which a step that does not end ends the run, with the stacks of all ranks", "faults")
    check_interval: int = setting(
        100, "steps between comparisons of the ranks' state and speed, besides saves; 0: never", "faults")
    # ---- start
    resume: bool | str = setting(
        False, "continue out_dir; or a run or step folder to continue from; auto: continue if there is something to",
        "start")
    overwrite: bool = setting(False, "delete the run that out_dir holds", "start")
    new_data: bool = setting(
        False, "resume on other data, packing, sequence length or seed than the checkpoint's", "start")
    skip_sequences: int = setting(
        0, "sequences of the data to leave out; with --resume=STEP_FOLDER, to get past a loss spike", "start")

    def __post_init__(self):
        super().__post_init__()
        self.sample_prompts, self.eval_tasks = list(self.sample_prompts), list(self.eval_tasks)

    def router_is_idle(self):
        """Whether the only weight that a token's expert has is always 1; a new run is refused then."""
        return self.n_routed_experts > 0 and self.num_experts_per_tok == 1 and self.norm_topk_prob

    def check(self):
        """Raise a UserError for the first impossible value or combination."""
        self.check_model()
        positive = ("sequence_length", "global_batch_size", "micro_batch_size", "max_steps", "ns_steps", "log_interval",
                    "keep_checkpoints", "max_skipped_steps", "step_timeout", "dp_replicate", "dp_shard", "ep",
                    "eval_batches", "eval_task_items")
        not_negative = ("warmup_steps", "decay_steps", "eval_interval", "save_interval", "sample_interval", "seed",
                        "muon_lr", "adamw_lr", "weight_decay", "grad_clip", "bias_update_rate", "min_lr_ratio",
                        "z_loss", "spike_sigmas", "max_rollbacks", "check_interval", "skip_sequences")
        for name in (*positive, *not_negative):
            value, floor = getattr(self, name), int(name in positive)
            if value is not None and value < floor:
                raise UserError(f"{name}={value} must be at least {floor}")
        names = self.data if isinstance(self.data, dict) else [self.data]
        streamed = next((name for name in names if str(name).startswith("hf:")), None)
        for ok, message in (
                (self.sequence_length <= self.max_position_embeddings,
                 f"sequence_length={self.sequence_length} exceeds "
                 f"max_position_embeddings={self.max_position_embeddings}"),
                (0 <= self.momentum < 1, f"momentum={self.momentum} must lie in [0, 1)"),
                (self.resume or not self.router_is_idle(), "num_experts_per_tok=1 with norm_topk_prob: a weight that "
                 "is always 1 teaches the router nothing: set --no-norm_topk_prob, or choose two experts or more"),
                (self.qk_clip_tau > 0, f"qk_clip_tau={self.qk_clip_tau} must be above 0"),
                (self.data, "data is empty: name a folder of shards"),
                (self.out_dir != "", "out_dir is empty: name the run's folder"),
                (not isinstance(self.data, dict) or all(
                    type(f) is str and type(w) in (int, float) and 0 < w < 2**63 for f, w in self.data.items()),
                 "data: expected {folder: weight} with weights above 0"),
                (not streamed or self.tokenizer, f"data={streamed} is tokenised here: set --tokenizer, as in gpt2"),
                (not streamed or self.packing == "concat",
                 f"packing='best_fit' needs folders of shards: prepare {streamed}, or set --packing=concat"),
                (all(type(text) is str for text in self.sample_prompts + self.eval_tasks),
                 "sample_prompts and eval_tasks must be texts"),
                (not self.eval_tasks or self.eval_interval, "eval_tasks run at validations: set --eval_interval"),
                (self.resume in (True, False) or self.resume, "resume is empty: name a run or step folder"),
                (not self.skip_sequences or re.search(r"step_\d+/*$", str(self.resume)),
                 "skip_sequences would skip again at every restart: set --resume to a step folder")):
            if not ok:
                raise UserError(message)
        return self


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
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
    names, flags = read_words(argv)
    if type(named := flags.get("resume")) is str and named not in ("", "auto"):
        flags["resume"] = str(what_is_meant(named)[1])
    run = run_folder(names, flags)
    if len(names) > 1 or not names and not run:
        raise UserError("name one config file:  python train.py configs/debug.py [--key=value ...]  (see --help), or a "
                        "run to continue:  python train.py --resume=out/debug" + (f"; got {names}" if names else ""))
    values = read_run(run) if run else read_file(names[0])
    config = Config(**values | flags)
    config.out_dir = f"out/{Path(*names or [run]).stem}" if config.out_dir is None else config.out_dir
    return config.check(), None if run else names[0]


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
    annotation = FIELDS[name].type
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return typing.get_args(annotation) or (annotation,)


def _kind_name(kind):
    return "None" if kind is type(None) else repr(kind) if isinstance(kind, str) else kind.__name__


def help_text():
    """Every setting with type, default and reason, grouped."""
    lines = ["python train.py CONFIG [--key=value ...] [--key value] [--key] [--no-key]"]
    groups = {}
    for name, field in FIELDS.items():
        groups.setdefault(field.metadata["group"], []).append((name, field))
    for group, members in groups.items():
        lines.append(f"\n{group}")
        for name, field in members:
            kinds = " | ".join(map(_kind_name, _kinds(name)))
            lines.append(f"  --{name}={field.default!r}  ({kinds})\n        {field.metadata['why']}")
    return "\n".join(lines)


def about_the_start(argv):
    """For launch/multinode.sh: where the run will lie, and whether its start is one that must not be repeated."""
    config, _ = load(argv)
    print(config.out_dir, "once" if config.overwrite or config.resume not in (False, "auto") else "any", sep="\n")


if __name__ == "__main__":
    errors.run(about_the_start)
