"""Train a model:  python train.py configs/debug.py [--key=value ...]     (--help lists every setting)
                  python train.py --resume=out/debug [...]         (goes on with that run's own settings)
                  torchrun --nproc_per_node=8 train.py configs/small.py

The whole run in one function, top to bottom: settings, data, run folder, model and optimizer, resume, the loop. Every
rank runs all of it. In out_dir lie config.json, metrics.jsonl, samples.md, curves.png, tokenizer/ and checkpoints/.
The parts, in reading order: step.py, model.py, mla.py, moe.py, muon.py, data/loader.py, ranks/parallel.py, evaluate.py,
and in run/ folder.py, checkpoint.py, guard.py, report.py, metrics.py.
"""

import sys
from pathlib import Path

import errors
import settings
from counting import flops_per_token
from data import tokenizer
from data.loader import TrainStream, ValidationSet
from data.tasks import open_tasks
from data.vocabulary import open_tokenizer, require_vocabulary
from errors import UserError
from kernels.selfcheck import compile_ahead
from model import pick_device
from ranks import parallel
from run import checkpoint, folder, guard, memory, metrics, report, services
from run.dry_run import rehearse
from run.profile import Profiler
from step import Training, wants_compile


def main(argv=None):
    """Run a training from command-line words; returns its last train record. Raises UserError for what the user can
    mend, SystemExit(75) after a signal, when all is saved, and parallel.Restart to start again with other words."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(settings.help_text(argv))
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
    micro_batch_size, _ = parallel.split_batch(config)  # or every rank refuses
    if parallel.local_rank() == 0:
        compile_ahead(config, micro_batch_size, device)
    parallel.announce(f"reading {config.data}", device)

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
    if not config.dry_run:
        parallel.once(watch.claim, run)  # before a checkpoint is chosen: its owner may still be saving
    source = folder.find_source(run, config)  # the step folder to resume from, or None
    parallel.once(folder.refuse_to_mix, run, source, config)
    parallel.once(services.require, config)
    manifest = parallel.once(checkpoint.read_manifest, source) if source else {}
    changed = folder.compare(config, encoder, stream, manifest, source) if source else []
    if source and folder.other_stream(stream, manifest):  # accepted with --new_data: it is read from its beginning
        manifest |= {"stream_start": manifest.get("sequences", 0), "places": {}}
    start = manifest.get("step", 0)
    if start >= config.max_steps:
        more = [] if manifest["config"]["max_steps"] > start else [f"--max_steps={2 * start}"]
        print(f"step {start} is done already, of max_steps={config.max_steps}: raise --max_steps to go on"
              + f", as in  {guard.command(run, *more)}" * folder.is_within(source, run))
        return None

    # ------------------------------------------------------------------ model and optimizer
    parallel.announce("making the model", device)
    training = Training(config, layout, device, stream)
    model = training.model

    # ------------------------------------------------------------------ resume
    spikes = guard.Spikes(config.spike_sigmas, manifest.get("losses", ()))
    size = checkpoint.size(training.state) + bool(config.ema) * checkpoint.size(checkpoint.named_tensors(model))
    size = parallel.over_stages(size, config.pp)
    parallel.once(folder.require_room, run, source, size, config.max_steps - start, config)
    training.start(source, manifest)
    stream.go_to(manifest.get("places", {}))
    rates = folder.rates(manifest["config"], config, start) if source else ""
    first = training.tokens
    read = manifest.get("read") or folder.data_read(manifest.get("stream", {}), first, {})
    flops = flops_per_token(config, config.sequence_length)
    told = [f"resumed from {source}", *(f"  changed: {line}" for line in changed), rates] if source else []
    told += report.opening(training, flops, kernels, read)
    if config.dry_run:
        print(*filter(None, told), sep="\n")
        return rehearse(training)
    parallel.once(run.mkdir, parents=True, exist_ok=True)
    parallel.once(watch.claim, run)  # if it is new
    run_id, aside = parallel.once(folder.open_run, run, source, start, changed, config, config_file, argv, encoder)
    log = watch.log = metrics.RunLog(run, config, start, run_id, active=parallel.rank() == 0)
    if parallel.starts() and not config.skip_sequences:
        log.write("event", start, event="restart", command=argv)
    if source:
        log.write("event", start, event="resume", source=str(source), changed=changed, skipped=config.skip_sequences,
                  rates=rates, set_aside=aside and str(aside))
    best_loss = parallel.once(folder.best_loss, run, manifest.get("best_loss"), stream, validation)
    saver = checkpoint.Saver(run / "checkpoints", config.keep_checkpoints, best_loss, config.async_save)
    print(*filter(None, told), sep="\n")
    if wants_compile(config, device):
        print("the first step compiles the blocks ...", flush=True)

    # ------------------------------------------------------------------ the loop
    watch.begin(config, start)
    training.begin()
    record, alarm, crowding, pace = None, metrics.RoutingAlarm(config), metrics.Crowding(device), metrics.Pace()
    profiler = Profiler(config, device, start, log)
    for step in range(start + 1, config.max_steps + 1):
        watch.beat(f"step {step}", patient=step <= start + guard.EARLY)
        last = step == config.max_steps
        logged = last or step % config.log_interval == 0 or step == start + 1

        # Data, forward and backward, gradient norm, update.
        profiler.at(step)
        pace.start()
        sums = training.forward_backward(exact=logged)
        found = training.agree(sums, bool(watch.signal))
        watch.agreed = found.signals
        alarm.count(model.routing.expert_counts)
        clipped = training.update(found)
        trouble = report.trouble(training, found, spikes, log)
        if trouble and config.max_rollbacks:
            watch.beat("the way back", patient=True)
            report.end_save(saver.outcome(wait=True), log, final=False)
            folder.roll_back(run, trouble, step, training.sequences, config, watch, log)  # returns without a checkpoint
        if training.skipped >= config.max_skipped_steps:
            raise UserError(f"{trouble}: lower the learning rates and continue from the last checkpoint:  "
                            f"{guard.command(run, f'--muon_lr={config.muon_lr / 2:g}')}")
        pace.stop()
        left = pace.left(config.max_steps - step)
        watch.live.step(step, found.loss, training.tokens_per_step / pace.usual(), left)

        # Record, validate, sample, save. A signal leaves out what is not the save.
        if logged or watch.agreed:
            fields = report.train_fields(training, found, clipped, logged, pace.mean(), flops)
            record = log.write("train", step, **fields)
            watch.live.record(metrics.step_line(record, config.max_steps, left))
            if logged and step % metrics.layers_interval(config) == 0:
                log.write("layers", step, **metrics.layer_statistics(model.routing.expert_counts, model.max_logits))
            for event in alarm.raised():
                log.event(step, "routing", **event)
            for event in crowding.found(record["tokens_per_second"]):
                log.event(step, "crowding", **event, again=guard.command(run))
        save_now = last or (config.save_interval and step % config.save_interval == 0 and not training.skipped)
        validated = None
        if config.eval_interval and (save_now or step % config.eval_interval == 0) and not watch.agreed:
            validated = report.validate(training, validation, tasks, watch, log)
        if config.sample_interval and encoder and (last or step % config.sample_interval == 0) and not watch.agreed:
            report.samples(training, encoder, watch, log)
        if config.check_interval and (save_now or watch.agreed or step % config.check_interval == 0):
            report.compare_ranks(training, run, log)
        if save_now or watch.agreed:
            watch.beat(f"the save of step {step}", patient=True)
            report.end_save(saver.outcome(wait=True), log, final=False)  # of the save before, if it is still under way
            seen = folder.data_read(stream.identity(), training.tokens - first, read)
            report.begin_save(saver, training, validated, log, losses=list(spikes.losses), read=seen, validated_on=
                              validation.windows, tokenizer=tokenizer.fingerprint(encoder) if encoder else None)
        final = last or bool(watch.agreed)
        report.end_save(saver.outcome(wait=final or not config.async_save), log, final)
        if watch.agreed and not last:
            print(f"{watch.signal or 'a signal on another rank'}: saved step {step}; continue with:  "
                  f"{guard.command(run)}")
            break
    profiler.close()
    log.close()
    if watch.agreed and not last:
        sys.exit(errors.STOPPED)
    print(*report.summary(run, config, start, pace.passed(), encoder is not None), sep="\n")
    return record


if __name__ == "__main__":
    parallel.run(main)
