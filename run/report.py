"""What a run tells: what is about to happen; then trouble, records, validation, samples, ranks that differ and saves.

It stands in metrics.jsonl, on the terminal and in samples.md, and changes no number of the training. Next: metrics.py,
guard.py, ../train.py.
"""

import dataclasses
import functools
import os
import shlex
from pathlib import Path

import torch

from counting import count_parameters
from errors import UserError, counted, started
from evaluate import evaluate, result_line, run_tasks
from generate import encode_prompt, stream_text
from model import build
from ranks import parallel
from routes import routing_table
from run import checkpoint, folder, guard, metrics
from run.terminal import duration


def opening(training, flops, kernels, read):
    """What is about to happen, in lines. flops: of a token; kernels: which run, in words; read: as of folder.data_read,
    up to here."""
    config, identity = training.config, training.stream.identity()
    (total, active), steps = count_parameters(config), config.max_steps - training.step
    epochs = training.stream.epochs(steps * config.global_batch_size,
                                    [read.get(key, 0) / config.sequence_length for key in folder.data_keys(identity)])
    sizes = f"{total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active, {flops / 1e6:,.1f} MFLOPs a token"
    lines = [f"{Path(config.out_dir).name}: {sizes}",
             f"  {training.layout}, {training.device}, {config.dtype}, {kernels} kernels, torch {torch.__version__}",
             f"  {counted(steps, 'step')} of {training.tokens_per_step:,} tokens, {epochs:.2f} epochs in all, into "
             f"{Path(config.out_dir)}/"]
    if epochs > 4:
        lines.append(f"warning: {epochs:.1f} epochs: beyond four, repeated data teaches little")
    # Of a pipeline this rank has a stage alone.
    return lines + (routing_table(build(config, "meta").named_parameters(), training.routes) if config.verbose else [])


def trouble(training, found, spikes, log):
    """Record and print a spike of the loss, or a step that was skipped; returns in words what takes a run back to its
    newest checkpoint, "" if nothing does."""
    step, skipped = training.step, training.skipped
    if not found.finite:
        log.write("event", step, event="skip", loss=found.loss, grad_norm=found.norm)
        print(f"step {step} skipped: loss {found.loss}, gradient norm {found.norm} ({skipped} in a row)")
        return f"{counted(skipped, 'non-finite step')} in a row" * (skipped >= training.config.max_skipped_steps)
    if height := spikes.height(found.loss):
        what = f"loss {found.loss:.4f} is {height:.1f} standard deviations above the mean before it"
        log.write("event", step, event="spike", loss=found.loss, sigmas=height)
        print(f"step {step}: {what}", flush=True)
        return what
    return ""


def train_fields(training, found, clipped, exact, seconds, flops):
    """The fields of a train record. exact: the largest attention logits are; seconds of a step; flops of a token."""
    model, speed = training.model, training.tokens_per_step / seconds
    peak = (metrics.peak_flops(training.device) or 0) * parallel.ranks()
    fields = {"tokens": training.tokens, "loss": found.loss, "aux_loss": found.balance,
              "lr": training.optimizer.param_groups[0]["lr"], "grad_norm": found.norm, "tokens_per_second": speed,
              "mfu": flops * speed / peak if peak else None, "step_ms": 1000 * seconds,
              "memory_gib": metrics.memory_gib(training.device),
              "max_attention_logit": model.max_logits.max().item() if exact else None,
              "qk_clipped_heads": int(clipped), "router_z_loss": found.z if training.config.router_z_loss else None,
              **metrics.expert_statistics(model.routing.expert_counts, model.routing.biases())}
    return fields if found.mtp_loss is None else fields | {"mtp_loss": found.mtp_loss}


def validate(training, validation, tasks, watch, log):
    """Record and print the validation loss, that of the average of the weights, and the tasks. Returns the record's
    fields; None if a signal came before them, or if the loss is not finite."""
    step, model = training.step, training.model
    measure = functools.partial(evaluate, model, validation, training.stream.starts, training.micro_batch_size,
                                training.device, watch)
    validated = measure()
    if not validated:
        return None
    if training.average:
        with training.average.in_place():
            found = measure()
        validated["ema_loss"] = found and found["loss"]
    log.write("val", step, tokens=training.tokens, **validated)
    shown = "  ".join(f"{key} {value:.4f}" for key, value in validated.items() if value is not None)
    print(f"step {step}: validation {shown}", flush=True)
    log.draw()
    for result in run_tasks(model, tasks, watch=watch):
        log.write("task", step, tokens=training.tokens, **result)
        print(f"step {step}: {result_line(result['task'], result)}", flush=True)
    return validated


def samples(training, encoder, watch, log):
    """Write a continuation of every prompt to samples.md, from its own random generator; a sharded model needs all
    ranks for it. One that fails is told by log: what the tokenizer raises is the same on all ranks. What memory, a
    device or a collective raises may be on one alone, and to go on would leave the ranks in different collectives."""
    def continuation(prompt):
        return "".join(stream_text(
            training.model, encoder, encode_prompt(encoder, prompt), max_new_tokens=200, temperature=0.8, top_k=50,
            seed=training.config.seed + training.step, agree=parallel.same))

    def must_end(error):
        return guard.is_out_of_memory(error) or parallel.ranks() > 1 and isinstance(error, RuntimeError)
    watch.beat(f"the samples of step {training.step}", patient=True)
    for prompt in training.config.sample_prompts:
        text = log.attempt(f"the sample of {prompt[:40]!r}", functools.partial(continuation, prompt), must_end)
        log.sample(training.step, prompt, text)
    training.model.train()  # a sample that failed has not put it back yet


def compare_ranks(training, run, log):
    """Refuse to go on with ranks that drifted apart, and tell those that are slow."""
    step, optimizer = training.step, training.optimizer
    guard.refuse_drift(checkpoint.named_tensors(training.model, optimizer), [training.sequences, optimizer.steps], step,
                       run)
    for slow in guard.stragglers(training.waited, training.device):
        log.event(step, "straggler", **slow)
    training.waited = 0.0


def begin_save(saver, training, validated, log, **about):
    """Begin to save a step. about: what its manifest has to say beside what the training says."""
    if log.active:  # the steps before a checkpoint must not lack their records
        log.attempt("the flush of metrics.jsonl", lambda: os.fsync(log.file.fileno()))
    tensors, counts = training.saved()
    about |= {"stream": training.stream.identity(), "torch": torch.__version__,
              "launch": folder.LAUNCH, "config": dataclasses.asdict(training.config)}
    saver.start(training.step, tensors, about | counts, (validated or {}).get("loss"))


def end_save(outcome, log, final):
    """Record how a save ended. One that failed (a full disk) leaves what was saved before, and training goes on, unless
    it was the last of the run."""
    if outcome is None:
        return
    step, result = outcome
    if not isinstance(result, OSError):
        log.write("event", step, event="save", path=str(result))
        best = checkpoint.pointed(result.parent, "best") == result
        print(f"step {step}: saved {result}" + ", the best so far" * best, flush=True)
        log.draw(final)
    elif final:
        raise UserError(f"{result}; free some space and continue from the checkpoint before:  "
                        f"{guard.command(log.folder)}") from result
    else:
        log.write("event", step, event="save_failed", error=str(result))
        print(f"warning: {result}; going on", flush=True)


def summary(run, config, start, seconds, talks):
    """What a run that is done has come to, and what to do next, in lines. It began at a step and took so many seconds;
    talks: it has a tokenizer."""
    steps = config.max_steps - start
    tokens = steps * config.global_batch_size * config.sequence_length
    lines = [f"done:  {counted(steps, 'step')}, {tokens:,} tokens in {duration(seconds)}: {tokens / seconds:,.0f} "
             "tok/s, validations and saves included"]
    best, losses = checkpoint.pointed(run / "checkpoints", "best"), folder.validation_losses(run)
    if best and (step := checkpoint.step_of(best)) in losses:
        lines.append(f"best:  validation loss {losses[step]:.4f} at step {step}")
    if config.eval_interval and config.max_steps not in losses:  # a signal left it out
        lines.append("without its last validation:  " + " ".join([*started("evaluate.py"), shlex.quote(str(run))]))
    there = [name for name in (*folder.LOGS, "tensorboard", "wandb") if (run / name).exists()]
    lines.append(f"files: {run}/ with checkpoints/, {', '.join(there)}")
    if talks:
        lines.append("talk:  " + " ".join([*started("generate.py"), shlex.quote(str(run)), "--chat"]))
    return [*lines, f"go on: {guard.command(run, f'--max_steps={2 * config.max_steps}')}"]
