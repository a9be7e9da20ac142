"""A moving average of the weights, beside a training: `ema` is its decay. Steps at a high learning rate jitter around
what they approach, and their average is nearer to it (Polyak and Juditsky, 1992).

It lies in host memory, sharded as the weights are, so that a device holds no second copy. Nothing is gained by looking
often: the average of decay d is made of every n-th step, n a twentieth of its horizon of 1 / (1 - d) steps, with decay
d ** n. What that costs: on every n-th step the weights travel to the host, which reads and writes 12 bytes a parameter;
a second validation. Next: ../step.py.
"""

import contextlib

import torch

from muon import local_rows
from run import checkpoint

LOOKS = 20  # in a horizon


class Average:
    """After its k-th update, with D = d ** n, the mean of the k states that it saw with weights 1, D, D ** 2, ... from
    the newest back: of the weights that the run began with nothing is in it, as with Adam's bias correction.

    model: whose parameters and router biases. decay: d. tensors: {"ema.<name>": fp32}, for checkpoints; before the
    first update the model's as they are. All ranks call it together.
    """

    def __init__(self, model, decay):
        self.model, self.updates = model, 0
        self.interval = max(round(1 / (1 - decay) / LOOKS), 1)
        self.decay = decay**self.interval
        self.tensors = {f"ema.{name}": tensor.detach().to("cpu", copy=True)
                        for name, tensor in model.state_dict().items()}
        self.tied = model.config.tie_word_embeddings  # one tensor under two names: exchanged twice, nothing came back
        if self.tied:
            self.tensors["ema.lm_head.weight"] = self.tensors["ema.model.embed_tokens.weight"]

    def load(self, step_folder, manifest):
        """Go on with the average of a checkpoint, or begin here if it has none."""
        if "ema_updates" not in manifest:
            print(f"{step_folder} has no average of the weights: it begins here")
            return
        checkpoint.load(step_folder, self.tensors)
        self.updates = manifest["ema_updates"]

    def _parts(self):
        """[(this rank's part of a tensor of the model, that of its average)]. FSDP2 lets go of what it has gathered
        when it is asked for its state, so that what is written here is what the next forward gathers."""
        return [(local_rows(tensor)[0], local_rows(self.tensors[f"ema.{name}"])[0])
                for name, tensor in self.model.state_dict().items() if not (self.tied and name == "lm_head.weight")]

    @torch.no_grad()
    def update(self, steps):
        """After a step that has moved the weights, of so many in all; the first is taken whatever its number."""
        if self.updates and steps % self.interval:
            return
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        for now, mean in self._parts():
            mean.lerp_(now.to("cpu"), share)

    @contextlib.contextmanager
    def in_place(self):
        """Within it the model has the average for its weights, and what it had is here."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self):
        for now, mean in self._parts():
            kept = now.to("cpu", copy=True)
            now.copy_(mean)
            mean.copy_(kept)
        self.model.refresh_copies(always=True)
