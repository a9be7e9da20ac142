"""Every setting of a run: its name, type, default and reason, and the checks of combinations.

A config file is plain Python assignments of these. Next: settings.py, which reads them; train.py, which uses them all.
(No postponed annotations here: settings.py needs the real types.)
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from errors import UserError
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
        "stays free is routed like tokens (balance='sign' and aux_loss_alpha count it, 'quantile' does not)", "data")
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
    lr_multipliers: dict = setting(
        (), "of learning rates, and so of decay: {'experts': 0.5}; also router, embeddings, head", "optimizer")
    momentum: float = setting(0.95, "Muon's moving average", "optimizer")
    nesterov: bool = setting(True, "Muon looks ahead by its momentum", "optimizer")
    weight_decay: float = setting(
        0.1, "decoupled, on every parameter, norms too (Moonlight found it crucial)", "optimizer")
    ns_steps: int = setting(5, "Newton-Schulz iterations; more amplify bf16 noise", "optimizer")
    ns_dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Newton-Schulz compute type; auto: float32 in float32 runs, else bfloat16", "optimizer")
    ns_coefficients: Literal["jordan", "you", "polar_express"] = setting(
        "jordan", "Newton-Schulz polynomial", "optimizer")
    ema: float = setting(
        0.0, "decay of an average of the weights in host memory, validated and saved with them, for --checkpoint=ema; "
        "0: none", "optimizer")
    muon_per_head: bool = setting(False, "orthogonalise what makes queries, keys and values head by head", "optimizer")
    mtp_loss_weight: float = setting(0.3, "weight of the loss of mtp_depth's block (DeepSeek-V3: 0.3)", "optimizer")
    mtp_decay_loss_weight: float = setting(
        0.1, "the same in the last decay_steps, whatever the schedule (DeepSeek-V3: 0.1)", "optimizer")
    qk_clip_tau: float = setting(100.0, "largest attention logit that QK-clip allows", "optimizer")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", "optimizer")
    bias_update_rate: float = setting(1e-3, "step of the router bias with balance=sign; 0 freezes it", "optimizer")
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
    dp_replicate: int | None = setting(
        None, "copies of the sharded model, above 1: HSDP; None: one on each node that can hold one", "parallelism")
    dp_shard: int | None = setting(None, "ranks that share one copy; None: all that are left", "parallelism")
    ep: int = setting(1, "ranks that share the experts of a layer; divides dp_shard", "parallelism")
    pp: int = setting(1, "stages of consecutive layers, each on ranks of its own (pipeline parallelism)", "parallelism")
    pp_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = setting(
        "1f1b", "1f1b: a stage a rank; interleaved: two, half the waiting for twice the traffic; zero_bubble: "
        "gradients of weights wait, a third of the waiting for more memory, not compiled", "parallelism")
    reduce_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "in which FSDP2 adds up gradients over ranks; bfloat16: half the traffic, rounded", "parallelism")
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
    wandb_group: str | None = setting(None, "W&B group; None: as the run's name, so that its branches stand together",
                                      "watching")
    wandb_tags: list = setting((), "W&B tags", "watching")
    tensorboard: bool = setting(False, "write event files too, into tensorboard/ of the run folder", "watching")
    verbose: bool = setting(False, "print what the optimizer does with every parameter", "watching")
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
    dry_run: bool = setting(
        False, "build and check everything, try a few micro-batches, tell time and memory; nothing is written", "start")
    profile_steps: str | None = setting(
        None, "as 10:13: out_dir/profile/ tells what the steps 10, 11 and 12 spend time and memory on", "start")

    def __post_init__(self):
        super().__post_init__()
        for name in ("sample_prompts", "eval_tasks", "wandb_tags"):
            setattr(self, name, list(getattr(self, name)))
        self.lr_multipliers = dict(self.lr_multipliers)

    def newton_schulz_dtype(self):
        """The name of the dtype that Muon orthogonalises in."""
        return {"auto": "float32" if self.dtype == "float32" else "bfloat16"}.get(self.ns_dtype, self.ns_dtype)

    def wire_bytes(self):
        """Of a number that ranks send each other for Newton-Schulz: see Muon.wire_dtype."""
        return 2 if self.newton_schulz_dtype() == "bfloat16" else 4

    def router_is_idle(self):
        """Whether the only weight that a token's expert has is always 1; a new run is refused then."""
        return self.n_routed_experts > 0 and self.num_experts_per_tok == 1 and self.norm_topk_prob

    def profiled(self):
        """The range of steps that profile_steps names, empty if None; None if it names none."""
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile_steps or "0:0", re.ASCII)
        steps = range(*map(int, found.groups())) if found else ()
        return steps if steps or self.profile_steps is None else None

    def stages_a_rank(self):
        """Stages of a pipeline on each of its ranks."""
        return 2 if self.pp_schedule == "interleaved" else 1

    def splits_backward(self):
        """Whether gradients of weights wait for a pipeline's rank to be idle."""
        return self.pp > 1 and self.pp_schedule == "zero_bubble"

    def check(self):
        """Raise a UserError for the first impossible value or combination."""
        self.check_model()
        positive = ("sequence_length", "global_batch_size", "micro_batch_size", "max_steps", "ns_steps", "log_interval",
                    "keep_checkpoints", "max_skipped_steps", "step_timeout", "dp_replicate", "dp_shard", "ep", "pp",
                    "eval_batches", "eval_task_items")
        not_negative = ("warmup_steps", "decay_steps", "eval_interval", "save_interval", "sample_interval", "seed",
                        "muon_lr", "adamw_lr", "weight_decay", "grad_clip", "bias_update_rate", "min_lr_ratio",
                        "z_loss", "router_z_loss", "spike_sigmas", "max_rollbacks", "check_interval", "skip_sequences")
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
                (0 <= self.ema < 1, f"ema={self.ema} must lie in [0, 1)"),
                (self.step_timeout <= 10**8, f"step_timeout={self.step_timeout} must be at most 100000000"),
                (self.resume or not self.router_is_idle(), "num_experts_per_tok=1 with norm_topk_prob: a weight that "
                 "is always 1 teaches the router nothing: set --no-norm_topk_prob, or choose two experts or more"),
                (self.mtp_loss_weight > 0 and self.mtp_decay_loss_weight > 0,  # at 0 old momentum would go on moving it
                 "mtp_loss_weight and mtp_decay_loss_weight must be above 0; without the block: --mtp_depth=0"),
                (self.qk_clip_tau > 0, f"qk_clip_tau={self.qk_clip_tau} must be above 0"),
                (self.data, "data is empty: name a folder of shards"),
                (self.out_dir != "", "out_dir is empty: name the run's folder"),
                (not isinstance(self.data, dict) or all(
                    type(f) is str and type(w) in (int, float) and 0 < w < 2**63 for f, w in self.data.items()),
                 "data: expected {folder: weight} with weights above 0"),
                (all(type(name) is str and type(by) in (int, float) and 0 <= by < 2**63
                     for name, by in self.lr_multipliers.items()),
                 f"lr_multipliers={self.lr_multipliers}: expected {{name: factor}}, as in {{'experts': 0.5}}"),
                (not streamed or self.tokenizer, f"data={streamed} is tokenised here: set --tokenizer, as in gpt2"),
                (not streamed or self.packing == "concat",
                 f"packing='best_fit' needs folders of shards: prepare {streamed}, or set --packing=concat"),
                (all(type(text) is str for text in self.sample_prompts + self.eval_tasks + self.wandb_tags),
                 "sample_prompts, eval_tasks and wandb_tags must be texts"),
                (not self.eval_tasks or self.eval_interval, "eval_tasks run at validations: set --eval_interval"),
                (self.resume in (True, False) or self.resume, "resume is empty: name a run or step folder"),
                (not self.skip_sequences or re.search(r"step_\d+/*$", str(self.resume)),
                 "skip_sequences would skip again at every restart: set --resume to a step folder"),
                (self.pp == 1 or not (self.mtp_depth or self.tie_word_embeddings),
                 f"pp={self.pp}: mtp_depth=1 and tie_word_embeddings need embedding and head on one rank"),
                (self.pp == 1 or self.reduce_dtype == "float32",
                 f"pp={self.pp} adds up micro-batches before ranks, which in bfloat16 would lose the small ones: leave "
                 "reduce_dtype='float32'"),
                (self.pp * self.stages_a_rank() <= self.num_hidden_layers or self.pp == 1,
                 f"pp={self.pp} with pp_schedule={self.pp_schedule!r} makes {self.pp * self.stages_a_rank()} stages, "
                 f"and there are {self.num_hidden_layers} layers"),
                (not (self.compile and self.splits_backward()),
                 "compile=True cannot follow pp_schedule='zero_bubble': leave one of the two out"),
                (self.profiled() is not None, f"profile_steps={self.profile_steps!r}: expected two steps, the first "
                 "before the second, as in 10:13 for the steps 10, 11 and 12"),
                (not (self.dry_run and self.profile_steps), "a dry run profiles no steps: leave one of the two out")):
            if not ok:
                raise UserError(message)
        return self


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
