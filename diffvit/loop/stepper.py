"""One training step, and the state between two steps.

Batches come from (seed, epoch), dropout from (seed, step): a step depends on its number, not on what the process did before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffvit.data.batches import Prepare, StepBatches, make_loader
from diffvit.dataset import Dataset, ImageSet
from diffvit.loop.loss_scale import LossScale
from diffvit.loop.optimizer import make_optimizer
from diffvit.loop.passes import Passes
from diffvit.loop.resume import load_tensors, tensors_of
from diffvit.protocol import Protocol, stable_seed

Batch = tuple[Tensor, Tensor]  # pixels and labels, this process's part


class Stepper:
    """Trains a model in place, on the device it is on. A step is `differentiate`, `update` and `validate`, in this order.

    Args:
        micro_batch, evaluation_batch, graphs, resume: see `fit`.
        group: (rank, workers) of this process.

    Attributes:
        step: the step under way, or the last one done; counted from 1.
        total: the training's last step.
        passes: forward and backward passes; they know the micro-batch as it is now.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        protocol: Protocol,
        *,
        seed: int,
        precision: str,
        micro_batch: int | None,
        evaluation_batch: int | None,
        graphs: bool,
        group: tuple[int, int],
        resume: Mapping[str, Any] | None,
    ):
        device = next(model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.model, self.protocol, self.seed = model, protocol, seed
        self.step, self.total = 0, protocol.total_steps(len(data.train))
        self.optimizer = make_optimizer(model, protocol)
        self._loss_scale = LossScale(device, precision)
        micro_batch = min(micro_batch or protocol.batch_size, -(-protocol.batch_size // group[1]))
        if resume is not None:
            self.load(resume)
            micro_batch = min(micro_batch, resume["micro_batch"])
        self._train_set, self._val_set = (_to_device(split, device) for split in (data.train, data.val))
        self._train_batches, self._val_batches = (
            StepBatches(len(split), protocol.batch_size, seed, (self.step + 1, self.total), group, salt)
            for split, salt in ((self._train_set, "train"), (self._val_set, "val"))
        )
        self.steps_per_epoch = self._train_batches.per_epoch
        self.passes = Passes(
            model, Prepare(protocol.image_size, data.mean, data.std, device), precision=precision, micro_batch=micro_batch,
            evaluation_batch=evaluation_batch, graphs=graphs, group=group, loss_scale=self._loss_scale,
        )  # fmt: skip
        model.train()
        # Room for the optimiser's moments, which are made after the first step: graphs must leave it.
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)] if graphs and resume is None else []
        self.passes.capture(self._train_set, self._train_batches.lengths(), self._val_set, self._val_batches.lengths())
        del moments

    def batches(self) -> Iterable[tuple[Batch, Batch]]:
        """A training and a validation batch for each step that is left."""
        return zip(make_loader(self._train_set, self._train_batches), make_loader(self._val_set, self._val_batches), strict=True)

    def differentiate(self, batch: Batch) -> Tensor:
        """Begin the next step: its gradient into the parameters. Returns this process's part of the batch's mean loss."""
        self.step += 1
        return self.passes.differentiate(batch, self._train_batches.batch_length(self.step), stable_seed("dropout", self.seed, self.step))

    def update(self) -> tuple[Tensor, Tensor]:
        """Update the weights, unless the gradient overflowed fp16, and forget it.

        Returns:
            The gradient's norm, before clipping, and the loss scale that it was computed at.
        """
        scale = self._loss_scale.current
        self._loss_scale.unscale(self.optimizer)
        # Without a clip_norm this only measures.
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.protocol.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.protocol.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.protocol.learning_rate(self.step, self.total)
        self._loss_scale.update(self.optimizer)
        self.passes.zero_gradients()
        return norm, scale

    def validate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """This process's part of a validation batch's mean loss and accuracy."""
        return self.passes.validate(batch, self._val_batches.batch_length(self.step))

    def state(self) -> dict[str, Any]:
        """The state for `load`, which resumes after this step, to the same bits. Tensors are live: the next step changes them."""
        tensors = tensors_of(self.model, self.optimizer.state)
        return {"step": self.step, "micro_batch": self.passes.micro_batch, **self._loss_scale.state(), "tensors": tensors}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take step, weights, moments and loss scale from a state."""
        self.step = state["step"]
        self._loss_scale.load(state)
        load_tensors(self.model, self.optimizer, state["tensors"])


def _to_device(split: ImageSet, device: torch.device) -> ImageSet:
    return split if device.type == "cpu" else split.to(device)
