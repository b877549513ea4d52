"""The numbers of each step, fetched from the device about once a second."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from diffvit.ledger.log import Step
from diffvit.loop.loss_scale import SMALLEST_SCALE
from diffvit.protocol import Protocol

# Called with the steps since the last call and the number of all steps; at most about once a second.
OnSteps = Callable[[list[Step], int], None]
_FLUSH_SECONDS = 1.0


class Diverged(Exception):  # noqa: N818 (an outcome, not a fault of the program)
    """A loss or the gradient is not a number, and no later step could mend that.

    Attributes:
        step: the record of the step where it was first seen.
    """

    def __init__(self, step: Step):
        super().__init__(
            f"diverged at step {step.step}: training loss {step.train_loss:.4g}, validation loss {step.val_loss:.4g}, "
            f"gradient norm {step.grad_norm:.4g}, learning rate {step.learning_rate:.3g}"
        )
        self.step = step


class Recorder:
    """Keeps the steps' numbers on the device and fetches them about once a second, so that a step need not wait for them.

    In a torch.distributed group all processes must do the same at the same step. So there the numbers are looked at after every
    step, but one step late: no step waits for its own.

    Args:
        on_steps: called with the records of steps; None on all processes but the first.
        last: the record of the step that a resumed training follows.
    """

    def __init__(self, protocol: Protocol, total: int, per_epoch: int, on_steps: OnSteps | None, last: Step | None, workers: int):
        self._protocol, self._total, self._per_epoch, self._on_steps = protocol, total, per_epoch, on_steps
        self._workers = workers
        self._waiting: list[tuple[int, float, Tensor]] = []
        self._last = last
        self._bad: Step | None = None
        self._newest: Tensor | None = None
        self._flushed = time.perf_counter()
        self._start = self._flushed - (last.seconds if last else 0.0)

    def add(self, step: int, train_loss: Tensor, val_loss: Tensor, val_accuracy: Tensor, norm: Tensor, scale: Tensor, stop: bool) -> bool:
        """Take a step's numbers, of which a group's processes have parts. Returns whether to stop; in a group, if any process asked to.

        Raises:
            Diverged: after a step that was handed on training no longer works.
        """
        # Losses are parts of a sum; the gradient and its scale are the same on all processes.
        shared = [norm / self._workers, scale / self._workers]
        record = torch.stack([train_loss, val_loss, val_accuracy, *shared, torch.full_like(norm, float(stop))])
        if self._workers > 1:
            dist.all_reduce(record)
            stop = self._was_asked_to_stop()
        self._newest = record
        self._waiting.append((step, time.perf_counter() - self._start, record))
        if self._workers == 1:
            if time.perf_counter() - self._flushed >= _FLUSH_SECONDS:
                self.flush()
            self.check()
        return stop

    def _was_asked_to_stop(self) -> bool:
        """Whether any process of the group asked to stop at the newest step."""
        if self._newest is None:
            return False
        self.flush()
        self.check()
        return self._newest[-1].item() > 0

    def check(self) -> None:
        """Raise Diverged if a step that was handed on is not sound."""
        if self._bad is not None:
            raise Diverged(self._bad)

    def flush(self) -> Step | None:
        """Fetch the waiting steps and call on_steps, up to the first that is not sound. Returns the last; None once one was not."""
        if self._waiting and self._bad is None:
            rows = torch.stack([record for _, _, record in self._waiting]).tolist()
            # The last step's time is taken now: on a GPU its work has only just ended.
            self._flushed = time.perf_counter()
            steps = [
                Step(
                    step,
                    self._epoch(step),
                    self._protocol.learning_rate(step, self._total),
                    train_loss,
                    val_loss,
                    accuracy,
                    norm,
                    seconds,
                    scale if not math.isfinite(norm) and scale > SMALLEST_SCALE else None,
                )
                for (step, seconds, _), (train_loss, val_loss, accuracy, norm, scale, _) in zip(self._waiting, rows, strict=True)
            ]
            steps[-1] = steps[-1]._replace(seconds=self._flushed - self._start)
            sound = list(itertools.takewhile(lambda step: step.is_sound, steps))
            self._bad = steps[len(sound)] if len(sound) < len(steps) else None
            steps = steps[: len(sound) + 1]
            self._last = steps[-1]
            if self._on_steps:
                self._on_steps(steps, self._total)
        self._waiting.clear()
        return self._last if self._bad is None else None

    def _epoch(self, step: int) -> int:
        return (step - 1) // self._per_epoch + 1
