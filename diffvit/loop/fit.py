"""The training loop: one step is one AdamW update on one global batch, then a look at one validation batch.

Micro-batches and workers only split a step, they do not change it: every image's loss counts 1 / (images in the global
batch), whoever computes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from diffvit.dataset import Dataset
from diffvit.keeping.saving import DEFAULT_SAVING, Every
from diffvit.ledger.log import Step
from diffvit.loop.recorder import OnSteps, Recorder
from diffvit.loop.stepper import Stepper
from diffvit.protocol import Protocol, images_in_steps


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Training was asked to stop, and its state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class Fit:
    """The outcome of training: the last step's record, the totals, and the final micro-batch."""

    last: Step
    images: int
    seconds: float
    micro_batch: int
    evaluation_batch: int


def fit(
    model: nn.Module,
    data: Dataset,
    protocol: Protocol,
    *,
    seed: int,
    precision: str = "fp32",
    micro_batch: int | None = None,
    evaluation_batch: int | None = None,
    graphs: bool = False,
    on_steps: OnSteps | None = None,
    resume: Mapping[str, Any] | None = None,
    on_save: Callable[[dict[str, Any]], None] | None = None,
    save_every: Every = DEFAULT_SAVING.every,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Train `model` in place, on the device it is on, by `protocol`.

    In a torch.distributed group each process trains its share of every batch.

    Args:
        model: images -> logits.
        micro_batch: images a process computes at once; default: its whole batch. It does not change the result, to rounding. Where
            memory does not suffice it is halved, and the step done again.
        evaluation_batch: the same for validation; default: the micro-batch.
        graphs: on a GPU, replay CUDA graphs (passes.py).
        on_steps: called with every step's record, on the first process only.
        resume: what on_save was called with in an earlier process; training resumes from it, to the same bits.
        on_save: called with a resume state, on the first process, at every `save_every` and when stopped; on_steps has then been
            called with every step up to the state's.
        should_stop: called after each step; if true on any process, the state is saved and Stopped raised on all.

    Raises:
        Stopped: should_stop said so.
        Diverged: a loss is not a number, or the gradient; in fp16, a gradient that no loss scale keeps from overflowing.
        UserError: the memory does not suffice for a single image.
    """
    rank, workers = group = rank_and_workers()
    stepper = Stepper(
        model, data, protocol, seed=seed, precision=precision, micro_batch=micro_batch, evaluation_batch=evaluation_batch, graphs=graphs,
        group=group, resume=resume,
    )  # fmt: skip
    last = Step(*resume["last"]) if resume else None
    recorder = Recorder(protocol, stepper.total, stepper.steps_per_epoch, on_steps if rank == 0 else None, last, workers)
    saved_at, saved_step = time.monotonic(), stepper.step
    for train_batch, val_batch in stepper.batches():
        train_loss = stepper.differentiate(train_batch)
        norm, scale = stepper.update()
        val_loss, val_accuracy = stepper.validate(val_batch)
        stop = recorder.add(stepper.step, train_loss, val_loss, val_accuracy, norm, scale, should_stop())
        if stepper.step == stepper.total:
            break
        if rank == 0 and on_save and (stop or save_every.over(time.monotonic() - saved_at, stepper.step - saved_step)):
            last = recorder.flush()
            if last:  # else the next step finds that training has diverged
                on_save({**stepper.state(), "last": list(last.columns.values())})
            saved_at, saved_step = time.monotonic(), stepper.step
        if stop:
            raise Stopped(stepper.step)
    last = recorder.flush()
    recorder.check()
    assert last
    images, passes = images_in_steps(len(data.train), protocol.batch_size, stepper.total), stepper.passes
    return Fit(last, images, last.seconds, passes.micro_batch, passes.evaluation_batch)


def rank_and_workers() -> tuple[int, int]:
    """(rank, workers) of this process's group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
