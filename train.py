"""Train a model:  python train.py configs/debug.py [--key=value ...]     (--help lists every setting)
                  python train.py --resume=out/debug [...]         (goes on with that run's own settings)
                  torchrun --nproc_per_node=8 train.py configs/small.py

The whole run in one function, top to bottom: settings, data, run folder, model, optimizer, resume, the loop. Every rank
runs all of it. In out_dir lie config.json, metrics.jsonl, samples.md, curves.png, tokenizer/ and checkpoints/.
The parts, in reading order: model.py, mla.py, moe.py, muon.py, data/loader.py, ranks/parallel.py, evaluate.py, and in
run/ checkpoint.py, guard.py, folder.py, metrics.py.
"""

import dataclasses
import functools
import math
import sys
import time
from pathlib import Path

import torch

import errors
import mtp
import settings
from counting import count_parameters, flops_per_token
from data import tokenizer
from data.loader import TrainStream, ValidationSet, prefetch
from data.tasks import open_tasks
from data.vocabulary import open_tokenizer, require_vocabulary
from errors import UserError
from evaluate import evaluate, result_line, run_tasks
from generate import encode_prompt, stream_text
from kernels import graphs
from kernels.cross_entropy import IGNORE
from kernels.newton_schulz import newton_schulz
from kernels.selfcheck import compile_ahead
from model import build, pick_device
from muon import Muon, local_rows, qk_clip_, schedule_factor
from ranks import parallel
from routes import routes_of, routing_table
from run import checkpoint, folder, guard, memory, metrics, services
from run.ema import Average


def main(argv=None):
    """Run a training from command-line words; returns its last train record. Raises UserError for what the user can
    mend, SystemExit(75) after a signal, when all is saved, and parallel.Restart to start again with other words."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(settings.help_text())
        return None
    with guard.Guard(argv) as watch:
        return train(argv, watch)


def train(argv, watch):
    # ------------------------------------------------------------------ ranks, settings, device
    parallel.start()
    config, config_file = parallel.once(settings.load, argv)
    device = pick_device(config.device)
    memory.keep_freed(device)
    layout = parallel.make_layout(config, device)
    micro_batch_size, accumulation = parallel.split_batch(config)
    if parallel.local_rank() == 0:
        compile_ahead(config, micro_batch_size, device)
    parallel.announce(f"reading {config.data}", device)
    tokens_per_step = config.global_batch_size * config.sequence_length

    # ------------------------------------------------------------------ data
    encoder = open_tokenizer(config)
    share = parallel.rank(), parallel.ranks()  # ranks share the reading of checksums
    stream = TrainStream(config.data, config.sequence_length, config.seed, config.verify_data, share, encoder,
                         config.packing, config.document_mask)
    validation = ValidationSet(config.data, config.sequence_length, config.eval_batches * config.global_batch_size,
                               config.verify_data, share, encoder)
    require_vocabulary(config.vocab_size, stream, validation, encoder)
    tasks = parallel.once(open_tasks, config.eval_tasks, config.eval_task_items, encoder,
                          config.max_position_embeddings)

    # ------------------------------------------------------------------ run folder
    kernels = parallel.choose_kernels(config, device)
    run = Path(config.out_dir)
    parallel.once(watch.claim, run)  # before a checkpoint is chosen: its owner may still be saving
    source = folder.find_source(run, config)  # the step folder to resume from, or None
    parallel.once(folder.refuse_to_mix, run, source, config)
    parallel.once(services.require, config)
    manifest = parallel.once(checkpoint.read_manifest, source) if source else {}
    changed = folder.compare(config, encoder, stream, manifest, source) if source else []
    start = manifest.get("step", 0)
    if start >= config.max_steps:
        more = [] if manifest["config"]["max_steps"] > start else [f"--max_steps={2 * start}"]
        print(f"step {start} is done already, of max_steps={config.max_steps}: raise --max_steps to go on"
              + f", as in  {guard.command(run, *more)}" * folder.is_within(source, run))
        return None

    # ------------------------------------------------------------------ model and optimizer
    parallel.announce("making the model", device)
    compute_dtype = getattr(torch, config.dtype)
    model = build(config, device, lambda model: parallel.distribute(model, layout, compute_dtype))
    model.compute_dtype = compute_dtype
    for layer in model.layers:
        layer.recompute = config.activation_checkpointing
    routes = routes_of(config, model)
    memory.require(config, model, routes, layout, device)
    if memory.keeps_copies(config, layout, device):
        model.make_copies()
    optimizer = make_optimizer(config, model, routes)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    loss_scale, good_steps = 2.0**16 if config.dtype == "float16" else 1.0, 0  # float16 gradients would underflow

    # ------------------------------------------------------------------ resume
    sequences, tokens = manifest.get("sequences", 0) + config.skip_sequences, manifest.get("tokens", 0)  # seen so far
    first, read = tokens, manifest.get("read") or folder.data_read(manifest.get("stream", {}), tokens, {})
    spikes = guard.Spikes(config.spike_sigmas, manifest.get("losses", ()))
    state = checkpoint.named_tensors(model, optimizer)
    size = checkpoint.size(state) + bool(config.ema) * checkpoint.size(checkpoint.named_tensors(model))
    parallel.once(folder.require_room, run, source, size, config.max_steps - start, config)
    if source is None:
        model.init_weights(config.seed, local_rows)
    elif checkpoint.has_optimizer(source):
        checkpoint.load(source, state)
        optimizer.steps = manifest["optimizer_steps"]
        if config.dtype == "float16" and manifest.get("loss_scale"):
            loss_scale, good_steps = manifest["loss_scale"]
    else:
        checkpoint.load(source, checkpoint.named_tensors(model))
        print(f"{source} has no optimizer state: starting with a fresh optimizer")
    average = Average(model, config.ema) if config.ema else None
    if average and source:
        average.load(source, manifest)
    parallel.once(run.mkdir, parents=True, exist_ok=True)
    parallel.once(watch.claim, run)  # if it is new
    run_id, aside = parallel.once(folder.open_run, run, source, start, changed, config, config_file, argv, encoder)
    log = watch.log = metrics.RunLog(run, config, start, run_id, active=parallel.rank() == 0)
    if parallel.starts() and not config.skip_sequences:
        log.write("event", start, event="restart", command=argv)
    if source:
        stream.go_to({} if config.new_data else manifest.get("places", {}))
        rates = folder.rates(manifest["config"], config, start)
        log.write("event", start, event="resume", source=str(source), changed=changed, skipped=config.skip_sequences,
                  rates=rates, set_aside=aside and str(aside))
        print(f"resumed from {source}", *(f"  changed: {line}" for line in changed), *filter(None, [rates]), sep="\n")
    best_loss = parallel.once(folder.best_loss, run, manifest.get("best_loss"))
    saver = checkpoint.Saver(run / "checkpoints", config.keep_checkpoints, best_loss, config.async_save)
    if wants_compile(config, device):
        parallel.compile_blocks(model)
        print("the first step compiles the blocks ...", flush=True)

    # ------------------------------------------------------------------ what is about to happen
    total, active = count_parameters(config)
    flops = flops_per_token(config, config.sequence_length)
    epochs = stream.epochs((config.max_steps - start) * config.global_batch_size,
                           [read.get(key, 0) / config.sequence_length for key in folder.data_keys(stream.identity())])
    print(f"{run.name}: {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active, {flops / 1e6:,.1f} MFLOPs a token",
          f"{layout}, {device}, {config.dtype}, {kernels} kernels, torch {torch.__version__}",
          f"{config.max_steps - start} steps of {tokens_per_step:,} tokens, {epochs:.2f} epochs in all, into {run}/",
          sep="\n  ")
    if epochs > 4:
        print(f"warning: {epochs:.1f} epochs: beyond four, repeated data teaches little")
    if config.verbose:
        print("\n".join(routing_table(model.named_parameters(), routes)))

    # ------------------------------------------------------------------ the loop
    watch.begin(config, start)
    peak = (metrics.peak_flops(device) or 0) * parallel.ranks()
    parameters = list(model.parameters())
    model.train()
    replay = graphs.wanted(config, layout, device)
    if replay:
        optimizer.orthogonalise = newton_schulz  # no small graphs beside the one of all
    micro_batch = graphs.MicroBatch(functools.partial(forward_and_backward, model, config), model, replay,
                                    accumulation > 1)
    update = graphs.Update(functools.partial(update_all, model, optimizer, config), parameters, state.values(), replay,
                           micro_batch.pool)
    record, skipped, alarm, crowding = None, 0, metrics.RoutingAlarm(config), metrics.Crowding(device)
    batches = prefetch(stream, device, range(start + 1, config.max_steps + 1), sequences, config.global_batch_size,
                       micro_batch_size, parallel.rank(), parallel.ranks(), timeout=0.8 * config.step_timeout)
    pace, loop_started = metrics.Pace(), time.perf_counter()
    ended = loop_started
    seconds, steps_timed = 0.0, 0  # spent training since the last record; validation and saving do not count
    waited = 0.0  # for data, since the ranks compared notes
    for step in range(start + 1, config.max_steps + 1):
        watch.beat(f"step {step}", patient=step <= start + guard.EARLY)
        step_started = time.perf_counter()
        factor = schedule_factor(step, *(getattr(config, name) for name in folder.SCHEDULE))
        for group, peak_rate in zip(optimizer.param_groups, peak_rates):
            group["lr"] = peak_rate * factor

        # Forward and backward: sums over micro-batches and ranks, divided by the global batch: how it is split changes
        # nothing.
        logged = step % config.log_interval == 0 or step in (start + 1, config.max_steps)
        model.reset_statistics(-math.inf if logged else config.qk_clip_tau)  # exact where it is told or acted on
        sums, scale = torch.zeros(3 + 2 * config.mtp_depth, device=device), torch.tensor(loss_scale, device=device)
        mtp_weight = mtp.loss_weight(config, step, device)
        for micro in range(accumulation):
            wait_started = time.perf_counter()
            inputs, targets, places = next(batches)
            waited += time.perf_counter() - wait_started
            parallel.last_micro_batch(model, micro == accumulation - 1)
            sums = sums + micro_batch(micro == 0, inputs, targets, stream.starts(inputs), scale, mtp_weight)

        # What the ranks must agree on, in one small reduction a kind; the only wait for the device in a step.
        squared_norm = parallel.squared_norm(parameters, layout)
        signal = sums.new_tensor(bool(watch.signal))
        agreed = parallel.add_up(torch.cat((sums, torch.stack((model.routing.z, squared_norm, signal)))))
        parallel.largest(model.max_logits)
        parallel.add_up(model.routing.expert_counts)
        parallel.add_up(model.routing.histograms)
        alarm.count(model.routing.expert_counts)
        loss, balance, empty, *ahead, z, squared_norm, watch.agreed = agreed.tolist()
        fill = tokens_per_step / max(tokens_per_step - empty, 1)  # 1, but where packing left places empty
        loss, norm = loss * fill, math.sqrt(squared_norm) / loss_scale * fill

        # Clip and update, or leave everything untouched if a number is not finite: momentum would carry it on for ever.
        clipped, trouble = 0, ""
        if math.isfinite(norm) and math.isfinite(loss):
            limit = min(1.0, config.grad_clip / (norm + 1e-6)) if config.grad_clip else 1.0
            parallel.scale_gradients(parameters, limit / loss_scale * fill)
            optimizer.begin_step()
            clipped = update()
            if average:
                average.update(optimizer.steps)
            skipped, good_steps = 0, good_steps + 1
            if config.dtype == "float16" and good_steps % 2000 == 0:
                loss_scale *= 2
            if height := spikes.height(loss):
                trouble = f"loss {loss:.4f} is {height:.1f} standard deviations above the mean before it"
                log.write("event", step, event="spike", loss=loss, sigmas=height)
                print(f"step {step}: {trouble}", flush=True)
        else:
            skipped, good_steps = skipped + 1, 0
            loss_scale = max(loss_scale / 2, 1.0)
            log.write("event", step, event="skip", loss=loss, grad_norm=norm)
            print(f"step {step} skipped: loss {loss}, gradient norm {norm} ({skipped} in a row)")
            if skipped >= config.max_skipped_steps:
                trouble = f"{skipped} non-finite steps in a row"
        optimizer.zero_grad()
        sequences, tokens = sequences + config.global_batch_size, tokens + tokens_per_step
        if trouble and config.max_rollbacks:
            watch.beat("the way back", patient=True)
            report_save(saver.outcome(wait=True), log, final=False)
            folder.roll_back(run, trouble, step, sequences, config, watch, log)  # returns if there is no checkpoint yet
        if skipped >= config.max_skipped_steps:
            raise UserError(f"{trouble}: lower the learning rates and continue from the last checkpoint:  "
                            f"{guard.command(run, f'--muon_lr={config.muon_lr / 2:g}')}")
        pace.add(time.perf_counter() - step_started, step_started - ended)
        ended = time.perf_counter()
        seconds, steps_timed = seconds + ended - step_started, steps_timed + 1
        watch.live.step(step, loss, tokens_per_step / pace.usual(), pace.left(config.max_steps - step))

        # Record, validate, sample, save. A signal leaves out what is not the save.
        last = step == config.max_steps
        if logged or watch.agreed:
            speed = tokens_per_step * steps_timed / seconds
            more = metrics.expert_statistics(model.routing.expert_counts, model.routing.biases())
            more |= {"mtp_loss": ahead[0] / max(ahead[1], 1)} if ahead else {}
            record = log.write(
                "train", step, tokens=tokens, loss=loss, aux_loss=balance, lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm, tokens_per_second=speed, mfu=flops * speed / peak if peak else None,
                step_ms=1000 * seconds / steps_timed, memory_gib=metrics.memory_gib(device),
                max_attention_logit=model.max_logits.max().item() if logged else None, qk_clipped_heads=int(clipped),
                router_z_loss=z * fill / tokens_per_step if config.router_z_loss else None, **more)
            watch.live.record(metrics.step_line(record, config.max_steps, pace.left(config.max_steps - step)))
            if logged and step % metrics.layers_interval(config) == 0:
                log.write("layers", step, **metrics.layer_statistics(model.routing.expert_counts, model.max_logits))
            for event in alarm.raised():
                log.event(step, "routing", **event)
            for event in crowding.found(speed):
                log.event(step, "crowding", **event, again=guard.command(run))
            seconds, steps_timed = 0.0, 0
        save_now = last or (config.save_interval and step % config.save_interval == 0 and not skipped)
        validated = None
        if config.eval_interval and (save_now or step % config.eval_interval == 0) and not watch.agreed:
            validated = evaluate(model, validation, stream.starts, micro_batch_size, device, watch)
        if validated and average:
            with average.in_place():
                found = evaluate(model, validation, stream.starts, micro_batch_size, device, watch)
            validated["ema_loss"] = found and found["loss"]
        if validated:
            log.write("val", step, tokens=tokens, **validated)
            shown = "  ".join(f"{key} {value:.4f}" for key, value in validated.items() if value is not None)
            print(f"step {step}: validation {shown}", flush=True)
            log.draw()
            for result in run_tasks(model, tasks, watch=watch):
                log.write("task", step, tokens=tokens, **result)
                print(f"step {step}: {result_line(result['task'], result)}", flush=True)
        if config.sample_interval and encoder and (last or step % config.sample_interval == 0) and not watch.agreed:
            watch.beat(f"the samples of step {step}", patient=True)
            for prompt in config.sample_prompts:
                log.sample(step, prompt, sample(model, encoder, prompt, config, step, log))
            model.train()  # a sample that failed has not put it back yet
        if config.check_interval and (save_now or watch.agreed or step % config.check_interval == 0):
            guard.refuse_drift(checkpoint.named_tensors(model, optimizer), [sequences, optimizer.steps], step, run)
            for slow in guard.stragglers(waited, device):
                log.event(step, "straggler", **slow)
            waited = 0.0
        if save_now or watch.agreed:
            watch.beat(f"the save of step {step}", patient=True)
            report_save(saver.outcome(wait=True), log, final=False)  # of the save before, if it is still under way
            about = {"sequences": sequences, "tokens": tokens, "optimizer_steps": optimizer.steps,
                     "stream": stream.identity(), "read": folder.data_read(stream.identity(), tokens - first, read),
                     "tokenizer": tokenizer.fingerprint(encoder) if encoder else None, "torch": torch.__version__,
                     "loss_scale": [loss_scale, good_steps], "losses": list(spikes.losses), "places": places,
                     "config": dataclasses.asdict(config)}
            tensors = checkpoint.named_tensors(model, optimizer)
            if average:
                tensors, about = tensors | average.tensors, about | {"ema_updates": average.updates}
            saver.start(step, tensors, about, (validated or {}).get("loss"))
        final = last or bool(watch.agreed)
        report_save(saver.outcome(wait=final or not config.async_save), log, final)
        if watch.agreed and not last:
            print(f"{watch.signal or 'a signal on another rank'}: saved step {step}; continue with:  "
                  f"{guard.command(run)}")
            break
    log.close()
    if watch.agreed and not last:
        sys.exit(errors.STOPPED)
    print("\n".join(folder.summary(run, config, start, time.perf_counter() - loop_started, encoder is not None)))
    return record


# ---------------------------------------------------------------------- the steps of main, in its order

def make_optimizer(config, model, routes):
    """The Muon of a config's rates, momentum and Newton-Schulz."""
    ns_dtype = {"auto": "float32" if config.dtype == "float32" else "bfloat16"}.get(config.ns_dtype, config.ns_dtype)
    return Muon(model.named_parameters(), config.muon_lr, config.adamw_lr, config.momentum, config.nesterov,
                config.weight_decay, config.ns_steps, getattr(torch, ns_dtype), config.ns_coefficients, routes=routes,
                variant=config.muon_variant)


def wants_compile(config, device):
    """Whether the blocks of a run are compiled."""
    return config.compile or (config.compile is None and device.type == "cuda")


def forward_and_backward(model, config, inputs, targets, first_BT, loss_scale, mtp_weight=None):
    """One micro-batch: gradients of its share of the loss, times loss_scale. Returns (3,): its shares of the
    cross-entropy and of the balance loss of the step, and how many of its places are empty; with mtp_weight, a tensor
    by which its loss counts, (5,): the MTPBlock's cross-entropy too, as a sum, and over how many targets."""
    n_tokens = config.global_batch_size * config.sequence_length
    mtp_scale = None if mtp_weight is None else config.mtp_loss_weight / n_tokens
    loss_sum, balance_sum, *ahead = model(inputs, targets, first_BT=first_BT, scale=1 / n_tokens, mtp_scale=mtp_scale)
    loss = loss_sum / n_tokens
    balance = balance_sum / config.global_batch_size
    whole = loss + config.aux_loss_alpha * balance
    if ahead:
        whole = whole + mtp_weight * (ahead[0] / n_tokens)
    (whole * loss_scale).backward()
    return torch.stack((loss, balance, (targets == IGNORE).sum(), *ahead)).detach()


def update_all(model, optimizer, config):
    """What the gradients of a step change, but for the counts of optimizer.begin_step(); asks the host for nothing.
    Returns what clip_and_balance does."""
    optimizer.update()
    return clip_and_balance(model, config)


def clip_and_balance(model, config):
    """What follows the optimizer: QK-clip, the routers' biases, the rounded copies of what has moved. Returns how many
    heads QK-clip scaled down, a tensor or 0."""
    clipped = 0
    if config.optimizer == "muonclip":
        clipped = qk_clip_(model.layers, model.max_logits, config.qk_clip_tau)
    model.routing.balance_(config.bias_update_rate)
    model.refresh_copies(always=True)  # what a replay writes is not counted
    return clipped


def sample(model, encoder, prompt, config, step, log):
    """A continuation of the prompt as text, from its own random generator; a sharded model needs all ranks for it.
    None if it fails, which log tells: what the tokenizer raises is the same on all ranks. What memory, a device or a
    collective raises may be on one alone, and to go on would leave the ranks in different collectives."""
    def must_end(error):
        return guard.is_out_of_memory(error) or parallel.ranks() > 1 and isinstance(error, RuntimeError)
    return log.attempt(f"the sample of {prompt[:40]!r}", lambda: "".join(stream_text(
        model, encoder, encode_prompt(encoder, prompt), max_new_tokens=200, temperature=0.8, top_k=50,
        seed=config.seed + step, agree=parallel.same)), must_end)


def report_save(outcome, log, final):
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


if __name__ == "__main__":
    parallel.run(main)
