"""A learner: one run of train.py on one device, in pieces, so that several learn in turns in one process.

Its steps are train.py's, on the same tokens: tests/test_contest.py compares the two to the last bit. Records, samples,
the guard and its rollbacks it leaves out. Next: ../step.py, contest.py.
"""

import contextlib
import math
import sys
import time
import types
from dataclasses import dataclass

import torch

from data.loader import TrainStream, ValidationSet
from data.vocabulary import open_tokenizer, require_vocabulary
from evaluate import evaluate
from kernels import attention, backend, expert_tiles, selfcheck
from kernels.backend import synchronize
from ranks import parallel
from run import checkpoint, memory
from run.metrics import expert_statistics
from step import Training

SETTLING = 5  # steps of a learner's first turn, in which compilers and captures are at work
DISK = 25e6  # bytes a second: what is saved on the average at most, a twentieth of what disks write
SAVED = ("seconds", "clipped", "skipped", "first_loss", "loss_scale", "good_steps", "curve")
UNWATCHED = types.SimpleNamespace(beat=lambda *what, **options: None, signal=None, agreed=0)  # for evaluate


@dataclass
class Text:
    """What all learners of a contest share: the device, the tokenizer (or None), the validation set, and what decides
    the order of the training data."""
    device: torch.device
    encoder: object
    validation: ValidationSet
    identity: dict


def open_text(config, device, vocab_size):
    """The Text of a config, whose shards are compared with their checksums; learners need not do that again.
    vocab_size: the smallest of all arms."""
    memory.keep_freed(device)
    encoder = open_tokenizer(config)
    stream = TrainStream(config.data, config.sequence_length, config.seed, config.verify_data, encoder=encoder,
                         packing=config.packing, document_mask=config.document_mask)
    validation = ValidationSet(config.data, config.sequence_length, config.eval_batches * config.global_batch_size,
                               config.verify_data, encoder=encoder)
    require_vocabulary(vocab_size, stream, validation, encoder)
    return Text(device, encoder, validation, stream.identity())


class Learner(Training):
    """One run of a config, from its first step, or from what it saved in `folder`, to its end.

    points: the steps after which it validates, the last of them config.max_steps; () if it never does. folder: None, or
    where it saves at points, so often that it costs little.

    `step` counts finished steps, `seconds` what they took, waited for. What compilers and captures take does not count:
    the first turn of a process, of SETTLING steps, is taken to be as fast as the second. `curve` has a dict for every
    point reached, `pace` the mean seconds of a step. `trouble` is "", or how it diverged, which is its end too.
    """

    def __init__(self, config, text, points, folder=None):
        self.text, self.points, self.folder = text, points, folder
        self.seconds, self.saved_at = 0.0, time.perf_counter()
        self.pace, self.first_turn, self.timed = None, None, (0, 0.0)  # of this process
        self.clipped, self.first_loss, self.loss, self.trouble, self.curve = 0, None, None, "", []
        self.loads = []  # of every step since the last point: the busiest expert's tokens over the mean of its layer
        self._choose_kernels(config)
        stream = TrainStream(config.data, config.sequence_length, config.seed, False, encoder=text.encoder,
                             packing=config.packing, document_mask=config.document_mask)
        super().__init__(config, parallel.make_layout(config, text.device), text.device, stream)
        if folder is not None and checkpoint.step_folders(folder):
            source = checkpoint.find(folder)
            manifest = checkpoint.read_manifest(source)
            self.start(source, manifest)
            self.sequences, self.tokens = self.step * config.global_batch_size, self.step * self.tokens_per_step
            for name in SAVED:
                setattr(self, name, manifest["learner"][name])
        else:
            self.start()
        self.begin()

    def _choose_kernels(self, config):
        """Let the kernels be chosen for this config; what was chosen is taken up again at every turn."""
        parallel.choose_kernels(config, self.text.device)
        on_gpu = sys.modules.get("kernels.triton_experts") if self.text.device.type == "cuda" else None
        self.on_triton = backend.running_now()
        self.choices = {"attention": list(attention.ARM.items()), "tiles": list(expert_tiles.TILES.items()),
                        "library": sorted(on_gpu.LIBRARY) if on_gpu else None}

    # ------------------------------------------------------------------ learning

    @property
    def ended(self):
        return bool(self.trouble) or self.step == self.config.max_steps

    def turn(self, seconds):
        """Train for about so many seconds, at most to the next point; validate and save there."""
        if self.text.device.type == "cuda":
            selfcheck.adopt(self.choices)
        with backend.running(self.on_triton):
            self._turn(seconds)

    def _turn(self, seconds):
        before, goal = self.step, next((p for p in self.points if p > self.step), self.config.max_steps)
        spent = self._train(min(before + (round(seconds / self.pace) or 1 if self.pace else SETTLING), goal))
        done, self.seconds = self.step - before, self.seconds + spent
        if self.first_turn is None:
            self.first_turn = done, spent
        else:
            if self.pace is None:
                self.seconds += self.first_turn[0] * spent / done - self.first_turn[1]
            self.timed = self.timed[0] + done, self.timed[1] + spent
            self.pace = self.timed[1] / self.timed[0]
        if self.step in self.points and not self.trouble:
            self._validate()
            self._save()

    def _train(self, goal):
        """Train up to a step, or to divergence; returns the seconds."""
        synchronize()
        started = time.perf_counter()
        while self.step < goal and not self.trouble:
            self._train_step()
        synchronize()
        return time.perf_counter() - started

    def _train_step(self):
        found = self.agree(self.forward_backward(exact=self.step + 1 in self.points))
        self.clipped = self.clipped + self.update(found)  # on the device, which nobody waits for
        self.loss = found.loss
        counts_LE = self.model.routing.expert_counts
        if counts_LE.numel():
            self.loads.append((counts_LE.amax(-1) / counts_LE.sum(-1)).max() * counts_LE.shape[-1])
        if found.finite:
            self.first_loss = found.loss if self.first_loss is None else self.first_loss
        elif self.skipped >= self.config.max_skipped_steps:
            self.trouble = f"{self.skipped} non-finite steps in a row, up to step {self.step}"

    # ------------------------------------------------------------------ what it says

    def _validate(self):
        """Add this point to the curve: of the weights, or of their average where there is one."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            found = evaluate(self.model, self.text.validation, self.stream.starts, self.micro_batch_size,
                             self.text.device, UNWATCHED)
        if found is None:
            self.trouble = f"no finite validation loss at step {self.step}"
            return
        routing = expert_statistics(self.model.routing.expert_counts, self.model.routing.biases())
        loads, self.loads = torch.stack(self.loads) if self.loads else None, []
        self.curve.append({"tokens": self.tokens, "seconds": self.seconds, "loss": found["loss"],
                           "bits_per_byte": found["bits_per_byte"],
                           "train_loss": self.loss if math.isfinite(self.loss) else None,
                           "largest_logit": self.model.max_logits.max().item(),
                           "expert_load_max": routing["expert_load_max"], "dead_experts": routing["dead_experts"],
                           "expert_load_peak": None if loads is None else loads.max().item(),  # since the last point
                           "expert_load_mean": None if loads is None else loads.mean().item()})
        if self.ended and found["loss"] > (self.first_loss or math.inf):
            self.trouble = f"ended at {found['loss']:.3f}, above the {self.first_loss:.3f} it began with"

    def _save(self):
        """Save what the next process needs to go on from here, unless that was done not long ago, or it has ended."""
        due = self.saved_at + checkpoint.size(self.state) / DISK
        if self.folder is None or self.ended or time.perf_counter() < due:
            return
        self.clipped = int(self.clipped)
        tensors, about = self.saved()
        about["learner"] = {name: getattr(self, name) for name in SAVED}
        checkpoint.save(self.folder, self.step, tensors, about, keep=1)
        self.saved_at = time.perf_counter()

    def result(self):
        """What contest.json keeps of it."""
        config = self.config
        return {"seed": config.seed, "muon_lr": config.muon_lr, "steps": self.step, "tokens": self.tokens,
                "seconds": self.seconds, "clipped_heads": int(self.clipped), "trouble": self.trouble,
                "curve": self.curve}

    def close(self):
        """End the thread that reads its data."""
        self.batches.close()


def take_turns(learners, seconds, tell):
    """Let learners train to their ends, about so many seconds each in turn: whoever has done the least of its steps.
    tell(learner) after every turn."""
    while waiting := [learner for learner in learners if not learner.ended]:
        learner = min(waiting, key=lambda learner: learner.step / learner.config.max_steps)
        learner.turn(seconds)
        tell(learner)
