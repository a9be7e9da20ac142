"""Train a model:  python train.py configs/debug.py [--key=value ...]     (--help lists every setting)
                  torchrun --nproc_per_node=8 train.py configs/small.py

The whole run in one function, top to bottom: settings, data, run folder, model, optimizer, resume, the loop. Every rank
runs all of it; one rank is the same story with nobody to talk to. What it writes lies in out_dir: config.json,
metrics.jsonl, samples.md, curves.png, tokenizer/, checkpoints/.
The parts, in reading order: model.py, mla.py, moe.py, muon.py, data/loader.py, parallel.py, checkpoint.py, metrics.py.
"""

import dataclasses
import json
import math
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import checkpoint
import config as settings
import metrics
import parallel
from data import tokenizer
from data.loader import TrainStream, ValidationSet, prefetch
from data.shards import read_meta
from errors import UserError
from generate import encode_prompt, stream_text
from kernels.cross_entropy import IGNORE
from model import ModelConfig, build, count_parameters, flops_per_token, pick_device
from muon import Muon, local_rows, qk_clip_, route_parameters, routing_table, schedule_factor


def main(argv=None):
    """Run a training from command-line words; returns its last train record."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(settings.help_text())
        return None

    # ------------------------------------------------------------------ ranks, settings, device
    parallel.start()
    config, config_file = parallel.once(settings.load, argv)
    device = pick_device(config.device)
    layout = parallel.make_layout(config, device)
    kernels = parallel.choose_kernels(config, device)
    micro_batch_size, accumulation = parallel.split_batch(config)
    config.decay_steps = config.max_steps // 5 if config.decay_steps is None else config.decay_steps
    tokens_per_step = config.global_batch_size * config.sequence_length

    # ------------------------------------------------------------------ data
    encoder = open_tokenizer(config)
    share = parallel.rank(), parallel.ranks()  # ranks share the reading of checksums
    stream = TrainStream(config.data, config.sequence_length, config.seed, config.verify_data, share, encoder,
                         config.packing, config.document_mask)
    validation = ValidationSet(config.data, config.sequence_length, config.eval_batches * config.global_batch_size,
                               config.verify_data, share, encoder)
    largest = max(stream.max_id(), validation.max_id(), encoder.n_vocab - 1 if encoder else 0)
    if largest >= config.vocab_size:
        raise UserError(f"vocab_size={config.vocab_size} is too small for token id {largest} of the data and its "
                        f"tokenizer: set --vocab_size={largest + 1} or more")

    # ------------------------------------------------------------------ run folder
    run = Path(config.out_dir)
    source = find_source(run, config)  # the step folder to resume from, or None
    parallel.once(refuse_to_mix, run, source, config)
    parallel.once(metrics.require_wandb, config)
    manifest = parallel.once(checkpoint.read_manifest, source) if source else {}
    if source:
        refuse_another_model(config, encoder, manifest, source)

    # ------------------------------------------------------------------ model and optimizer
    compute_dtype = getattr(torch, config.dtype)
    model = build(config, device, lambda model: parallel.distribute(model, layout, compute_dtype))
    model.compute_dtype = compute_dtype
    for layer in model.layers:
        layer.recompute = config.activation_checkpointing
    heads = config.num_attention_heads if config.muon_per_head else 0
    routes = route_parameters(model.named_parameters(), config.optimizer, heads)
    ns_dtype = config.ns_dtype
    if ns_dtype == "auto":
        ns_dtype = "float32" if config.dtype == "float32" else "bfloat16"
    optimizer = Muon(model.named_parameters(), config.muon_lr, config.adamw_lr, config.momentum, config.nesterov,
                     config.weight_decay, config.ns_steps, getattr(torch, ns_dtype), config.ns_coefficients,
                     routes=routes)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    loss_scale, good_steps = 2.0**16 if config.dtype == "float16" else 1.0, 0  # float16 gradients would underflow

    # ------------------------------------------------------------------ resume
    start, best_loss = manifest.get("step", 0), manifest.get("best_loss")
    sequences, tokens = manifest.get("sequences", 0), manifest.get("tokens", 0)  # seen so far
    if source is None:
        model.init_weights(config.seed, local_rows)
    elif checkpoint.has_optimizer(source):
        checkpoint.load(source, checkpoint.named_tensors(model, optimizer))
        optimizer.steps = manifest["optimizer_steps"]
        if config.dtype == "float16" and manifest.get("loss_scale"):
            loss_scale, good_steps = manifest["loss_scale"]
    else:
        checkpoint.load(source, checkpoint.named_tensors(model))
        print(f"{source} has no optimizer state: starting with a fresh optimizer")
    run_id = parallel.once(open_run, run, source, start, config, config_file, argv, encoder)
    log = metrics.RunLog(run, config, start, run_id, active=parallel.rank() == 0)
    if source:
        changed = changed_stream(stream, manifest)
        stream.go_to({} if changed else manifest.get("places", {}))
        log.write("event", start, event="resume", source=str(source), changed=changed)
        print(f"resumed from {source}", *changed, sep="\n  changed: ")
    if not parallel.once(checkpoint.pointed, run / "checkpoints", "best"):
        best_loss = None  # that of another folder or branch
    saver = checkpoint.Saver(run / "checkpoints", config.keep_checkpoints, best_loss, config.async_save)
    if config.compile or (config.compile is None and device.type == "cuda"):
        parallel.compile_blocks(model)

    # ------------------------------------------------------------------ what is about to happen
    total, active = count_parameters(config)
    flops = flops_per_token(config, config.sequence_length)
    epochs = stream.epochs(config.max_steps * config.global_batch_size)
    print(f"{run.name}: {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active, {flops / 1e6:,.1f} MFLOPs a "
          f"token; {layout}, {device}, {config.dtype}, {kernels} kernels, torch {torch.__version__}")
    print(f"{config.max_steps - start} steps of {tokens_per_step:,} tokens, {epochs:.2f} epochs in all; "
          f"writing to {run}/")
    if epochs > 4:
        print(f"warning: {epochs:.1f} epochs: beyond four, repeated data teaches little")
    print("\n".join(routing_table(model.named_parameters(), routes)))
    if start >= config.max_steps:
        print(f"step {start} is done already: raise --max_steps to go on")

    # ------------------------------------------------------------------ the loop
    stop = catch_signals()
    peak = (metrics.peak_flops(device) or 0) * parallel.ranks()
    parameters = list(model.parameters())
    model.train()
    record, skipped = None, 0
    batches = prefetch(stream, device, range(start + 1, config.max_steps + 1), sequences, config.global_batch_size,
                       micro_batch_size, parallel.rank(), parallel.ranks())
    seconds, steps_timed = 0.0, 0  # spent training since the last record; validation and saving do not count
    for step in range(start + 1, config.max_steps + 1):
        step_started = time.perf_counter()
        factor = schedule_factor(step, config.schedule, config.max_steps, config.warmup_steps, config.decay_steps,
                                 config.min_lr_ratio)
        for group, peak_rate in zip(optimizer.param_groups, peak_rates):
            group["lr"] = peak_rate * factor

        # Forward and backward: sums over micro-batches and ranks, divided by the global batch: how it is split changes
        # nothing.
        model.reset_statistics()
        loss = balance = empty = torch.zeros((), device=device)
        for micro in range(accumulation):
            inputs, targets, places = next(batches)
            parallel.last_micro_batch(model, micro == accumulation - 1)
            loss_sum, balance_sum = model(inputs, targets, first_BT=stream.starts(inputs))
            micro_loss, micro_balance = loss_sum / tokens_per_step, balance_sum / config.global_batch_size
            ((micro_loss + config.aux_loss_alpha * micro_balance) * loss_scale).backward()
            loss, balance = loss + micro_loss.detach(), balance + micro_balance.detach()
            empty = empty + (targets == IGNORE).sum()

        # What the ranks must agree on, in one small reduction a kind; the only wait for the device in a step.
        squared_norm = parallel.squared_norm(parameters, layout)
        agreed = parallel.add_up(torch.stack((loss, balance, squared_norm, loss.new_tensor(bool(stop.signal)), empty)))
        parallel.largest(model.max_logits)
        parallel.add_up(model.expert_counts)
        loss, balance, squared_norm, stop.agreed, empty = agreed.tolist()
        fill = tokens_per_step / max(tokens_per_step - empty, 1)  # 1, but where packing left places empty
        loss, norm = loss * fill, math.sqrt(squared_norm) / loss_scale * fill

        # Clip and update, or leave everything untouched if a number is not finite: momentum would carry it on for ever.
        clipped = torch.zeros((), dtype=torch.int64)
        if math.isfinite(norm) and math.isfinite(loss):
            limit = min(1.0, config.grad_clip / (norm + 1e-6)) if config.grad_clip else 1.0
            parallel.scale_gradients(parameters, limit / loss_scale * fill)
            optimizer.step()
            if config.optimizer == "muonclip":
                clipped = qk_clip_(model.layers, model.max_logits, config.qk_clip_tau)
            model.update_router_biases(config.bias_update_rate)
            skipped, good_steps = 0, good_steps + 1
            if config.dtype == "float16" and good_steps % 2000 == 0:
                loss_scale *= 2
        else:
            skipped, good_steps = skipped + 1, 0
            loss_scale = max(loss_scale / 2, 1.0)
            log.write("event", step, event="skip", loss=loss, grad_norm=norm)
            print(f"step {step} skipped: loss {loss}, gradient norm {norm} ({skipped} in a row)")
            if skipped >= config.max_skipped_steps:
                raise UserError(f"{skipped} non-finite steps in a row: lower the learning rates and --resume from the "
                                f"last checkpoint in {run}/checkpoints")
        optimizer.zero_grad()
        sequences, tokens = sequences + config.global_batch_size, tokens + tokens_per_step
        seconds, steps_timed = seconds + time.perf_counter() - step_started, steps_timed + 1

        # Record, validate, sample, save. A signal leaves out what is not the save.
        last = step == config.max_steps
        if step % config.log_interval == 0 or step == start + 1 or last or stop.agreed:
            speed = tokens_per_step * steps_timed / seconds
            routing = metrics.expert_statistics(model.expert_counts, model.router_biases())
            record = log.write(
                "train", step, tokens=tokens, loss=loss, aux_loss=balance, lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm, tokens_per_second=speed, mfu=flops * speed / peak if peak else None,
                step_ms=1000 * seconds / steps_timed, memory_gib=metrics.memory_gib(device),
                max_attention_logit=model.max_logits.max().item(), qk_clipped_heads=int(clipped), **routing)
            eta = (config.max_steps - step) * seconds / steps_timed
            print(metrics.step_line(record, config.max_steps, eta), flush=True)
            seconds, steps_timed = 0.0, 0
        save_now = last or (config.save_interval and step % config.save_interval == 0)
        validated = None
        if config.eval_interval and (save_now or step % config.eval_interval == 0) and not stop.agreed:
            validated = evaluate(model, validation, stream.starts, micro_batch_size, device, stop)
        if validated:
            log.write("val", step, tokens=tokens, **validated)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in validated.items() if value is not None)
            print(f"step {step}: validation {shown}", flush=True)
        if config.sample_interval and encoder and (last or step % config.sample_interval == 0) and not stop.agreed:
            for prompt in config.sample_prompts:
                log.sample(step, prompt, sample(model, encoder, prompt, config, step))
        if save_now or stop.agreed:
            report_save(saver.outcome(wait=True), log, final=False)  # of the save before, if it is still under way
            about = {"sequences": sequences, "tokens": tokens, "optimizer_steps": optimizer.steps,
                     "stream": stream.identity(), "tokenizer": tokenizer.fingerprint(encoder) if encoder else None,
                     "torch": torch.__version__, "loss_scale": [loss_scale, good_steps],
                     "places": places, "config": dataclasses.asdict(config)}
            saver.start(step, checkpoint.named_tensors(model, optimizer), about, (validated or {}).get("loss"))
        final = last or bool(stop.agreed)
        report_save(saver.outcome(wait=final or not config.async_save), log, final)
        if stop.agreed:
            print(f"{stop.signal or 'a signal on another rank'}: saved step {step}; continue with --resume")
            break
    log.close()
    stop.release()
    print(f"done: {run}/checkpoints  {run}/metrics.jsonl  {run}/curves.png")
    return record


# ---------------------------------------------------------------------- the steps of main, in its order

def open_tokenizer(config):
    """The tokenizer of the data, or the one that the config names; they must be the same. None if neither is known."""
    names = config.data if isinstance(config.data, dict) else [config.data]
    folders = [name for name in names if not name.startswith("hf:")]
    recorded = {folder: read_meta(folder).get("tokenizer_fingerprint") for folder in folders}
    if config.tokenizer:
        encoder = tokenizer.load(config.tokenizer)
    else:
        stored = next((Path(folder) / "tokenizer" for folder in folders if (Path(folder) / "tokenizer").is_dir()), None)
        if stored is None:
            print("the data names no tokenizer (set --tokenizer=...): no samples, and generate.py will want one")
            return None
        encoder = tokenizer.load(stored)
    for folder, known in recorded.items():
        if known and known != tokenizer.fingerprint(encoder):
            raise UserError(f"{folder} was made with another tokenizer than {config.tokenizer or 'the other folders'}: "
                            "use the one it was made with, or prepare the data again")
    return encoder


def find_source(run, config):
    """The step folder to resume from, None for a new run."""
    if config.resume == "auto":
        return checkpoint.find(run) if parallel.once(checkpoint.step_folders, run / "checkpoints") else None
    return checkpoint.find(run if config.resume is True else config.resume) if config.resume else None


def refuse_to_mix(run, source, config):
    """An out_dir that holds a run is for going on with that run, unless told otherwise."""
    if holds_run(run) and not is_within(source, run) and not config.overwrite and config.resume != "auto":
        raise UserError(f"{run} holds a run already: continue it with --resume, start anew with --overwrite, or choose "
                        "another --out_dir")


def holds_run(folder):
    return (folder / "config.json").exists() or (folder / "checkpoints").exists()


def is_within(source, run):
    """Whether the step folder to resume from, if any, is one of this run's own."""
    return source is not None and run.resolve() in source.resolve().parents


def refuse_another_model(config, encoder, manifest, source):
    """Weights fit only the model and the tokenizer that they were trained with: name what differs."""
    if encoder and manifest.get("tokenizer") not in (None, tokenizer.fingerprint(encoder)):
        raise UserError(f"{source} was trained with another tokenizer than that of the data")
    stored = manifest["config"]
    differing = [f"{field.name}: {stored[field.name]} there, {getattr(config, field.name)} here"
                 for field in dataclasses.fields(ModelConfig)
                 if field.name in stored and stored[field.name] != getattr(config, field.name)
                 and field.name not in ("aux_loss_alpha", "z_loss", "initializer_range", "max_position_embeddings")]
    if differing:
        raise UserError(f"{source} holds another model: " + "; ".join(differing))


def changed_stream(stream, manifest):
    """What differs between the checkpoint's stream and this run's; allowed, but text may repeat or be left out."""
    before, now = {"packing": "concat", **manifest.get("stream", {})}, stream.identity()
    return [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]


def open_run(run, source, start, config, config_file, argv, encoder):
    """Make the run folder, or clear away what a new or rewound run replaces; returns the run's id. Only now, when
    everything that could be refused has been."""
    if config.overwrite and holds_run(run) and not is_within(source, run):
        shutil.rmtree(run)
    run_id = provenance(run, config, config_file, argv)
    if encoder:
        tokenizer.save(encoder, run / "tokenizer")
    if source:
        rewound = type(config.resume) is str and checkpoint.STEP.search(config.resume.rstrip("/")) is not None
        checkpoint.drop_after(run / "checkpoints", start, rewound)
    return run_id


def provenance(run, config, config_file, argv):
    """Write config.json: settings, versions, commit and command. Returns the run's id, which a resumed run keeps."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "config.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    about = {"run_id": earlier.get("run_id", secrets.token_hex(4)), "config_file": config_file, "command": argv,
             "commit": commit, "torch": torch.__version__, "python": platform.python_version(),
             "settings": dataclasses.asdict(config)}
    metrics.replace_text(path, json.dumps(about, indent=1) + "\n")
    return about["run_id"]


class catch_signals:
    """Note SIGTERM, SIGINT and SIGUSR1, so that the loop can finish its step and save; a second one ends at once, but
    not its echo: some launchers deliver a signal to the ranks twice. Ranks act only on what they have agreed on:
    `agreed` counts those whose signal the last reduction carried."""

    def __init__(self):
        self.signal, self.agreed, self.noted = None, 0, 0.0
        self.before = {number: signal.signal(number, self._note)
                       for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def _note(self, number, frame):
        if self.signal is None:
            self.signal, self.noted = signal.Signals(number).name, time.monotonic()
            print(f"{self.signal}: finishing the step, then saving; once more to stop at once", flush=True)
        elif number == signal.SIGINT or time.monotonic() > self.noted + 5:
            self.release()
            signal.raise_signal(number)

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@torch.no_grad()
def evaluate(model, validation, starts, batch_size, device, stop):
    """Cross-entropy over the validation set, always the same tokens, shared among the ranks; leaves no trace in the
    training. None if a signal came before the end, or if the loss is not finite."""
    model.eval()
    total, count = 0.0, 0
    for inputs, targets in validation.batches(batch_size, parallel.rank(), parallel.ranks()):
        inputs = inputs.to(device)
        loss_sum, _ = model(inputs, targets.to(device), first_BT=starts(inputs))
        mine = torch.tensor([loss_sum.item(), int((targets != IGNORE).sum()), bool(stop.signal)], dtype=torch.float64)
        loss_sum, targets_here, stop.agreed = parallel.add_up(mine).tolist()
        if stop.agreed:
            break
        total, count = total + loss_sum, count + targets_here
    model.train()
    if stop.agreed or not math.isfinite(total):
        return None
    loss, ratio = total / count, validation.bytes_per_token
    bits_per_byte = loss / math.log(2) / ratio if ratio else None
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits_per_byte}


def sample(model, encoder, prompt, config, step):
    """A continuation of the prompt as text, from its own random generator; a sharded model needs all ranks for it."""
    return "".join(stream_text(model, encoder, encode_prompt(encoder, prompt), max_new_tokens=200, temperature=0.8,
                               top_k=50, seed=config.seed + step, agree=parallel.same))


def report_save(outcome, log, final):
    """Record how a save ended. One that failed (a full disk) leaves what was saved before, and training goes on, unless
    it was the last of the run."""
    if outcome is None:
        return
    step, result = outcome
    if not isinstance(result, OSError):
        log.write("event", step, event="save", path=str(result))
        log.draw()
    elif final:
        raise UserError(f"{result}; free some space and --resume from the checkpoint before") from result
    else:
        log.write("event", step, event="save_failed", error=str(result))
        print(f"warning: {result}; going on", flush=True)


if __name__ == "__main__":
    parallel.run(main)
