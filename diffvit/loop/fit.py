"""The training loop: one step is one AdamW update on one global batch, then a look at one validation batch.

Micro-batches and workers only split a step, they do not change it: every image's loss counts 1 / (images in the global
batch), whoever computes it. Batches come from (seed, epoch), dropout from (seed, step): so a step depends on its number,
not on what the process did before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffvit.data.batches import Prepare, StepBatches, make_loader
from diffvit.dataset import Dataset, ImageSet
from diffvit.keeping.saving import DEFAULT_SAVING, Every
from diffvit.ledger.log import Step
from diffvit.loop.optimizer import make_optimizer
from diffvit.loop.passes import Passes
from diffvit.loop.recorder import Progress, Recorder
from diffvit.protocol import Protocol, images_in_steps, stable_seed


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Training was asked to stop, and its state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class Fit:
    """What training left behind: the last step's record, the totals, and the images at once that it ended with."""

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
    on_steps: Progress | None = None,
    resume: Mapping[str, Any] | None = None,
    on_save: Callable[[dict[str, Any]], None] | None = None,
    save_every: Every = DEFAULT_SAVING.every,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Train `model` in place, on the device it is on, by `protocol`.

    In a torch.distributed group each process trains its share of every batch.

    Args:
        model: images -> logits.
        micro_batch: images a process computes at once; None is the whole batch. It does not change the result, to rounding. Where memory
            does not suffice it is halved, and the step done again.
        evaluation_batch: the same for validation; default: the micro-batch.
        graphs: on a GPU, replay CUDA graphs (passes.py).
        on_steps: hears of every step, on the first process only.
        resume: what on_save was given by an earlier process; training goes on after its step, to the same bits.
        on_save: takes a resume state, on the first process, at every `save_every` and when stopped. When it is called, on_steps has
            heard of every step up to the state's.
        should_stop: asked after each step; if true on any process, the state is saved and Stopped raised on all.

    Raises:
        Stopped: should_stop said so.
        Diverged: a loss or the gradient is not a number.
        UserError: the memory does not suffice for a single image.
    """
    rank, workers = rank_and_workers()
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    total = protocol.total_steps(len(data.train))
    train_set, val_set = (_to_device(split, device) for split in (data.train, data.val))
    optimizer = make_optimizer(model, protocol)
    at_once = min(micro_batch or protocol.batch_size, -(-protocol.batch_size // workers))
    done = 0
    if resume is not None:
        done, at_once = resume["step"], min(at_once, resume.get("micro_batch", at_once))
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
    train_batches = StepBatches(len(train_set), protocol.batch_size, seed, (done + 1, total), (rank, workers), "train")
    val_batches = StepBatches(len(val_set), protocol.batch_size, seed, (done + 1, total), (rank, workers), "val")
    passes = Passes(
        model, Prepare(protocol.image_size, data.mean, data.std, device), precision=precision, micro_batch=at_once,
        evaluation_batch=evaluation_batch, graphs=graphs, group=(rank, workers),
    )  # fmt: skip

    def update(step: int) -> Tensor:
        """One update of the optimiser. Returns the gradient's norm."""
        # Without a clip_norm this only measures.
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if protocol.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), protocol.clip_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate(step, total)
        optimizer.step()
        passes.zero_gradients()
        return norm

    model.train()
    # Room for the optimiser's moments, which are made after the first step: graphs must leave it.
    moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)] if graphs and resume is None else []
    passes.capture(train_set, train_batches.lengths(), val_set, val_batches.lengths())
    del moments
    last = Step(*resume["last"]) if resume else None
    recorder = Recorder(protocol, total, train_batches.per_epoch, on_steps if rank == 0 else None, last)
    saved_at, saved_step = time.monotonic(), done
    steps = zip(make_loader(train_set, train_batches), make_loader(val_set, val_batches), strict=True)
    for step, (train_batch, val_batch) in enumerate(steps, start=done + 1):
        train_loss = passes.differentiate(train_batch, train_batches.batch_length(step), stable_seed("dropout", seed, step))
        norm = update(step)
        val_loss, val_accuracy = passes.validate(val_batch, val_batches.batch_length(step))
        stop = should_stop()
        # The workers' losses are parts of a sum; the gradient is the same on all of them.
        record = torch.stack([train_loss, val_loss, val_accuracy, norm / workers, torch.full_like(norm, float(stop))])
        if workers > 1:
            dist.all_reduce(record)
            # What all do alike follows from what all have seen: the record before this one, so that no step waits for its own.
            stop = recorder.asked_to_stop()
        recorder.add(step, record)
        if workers == 1:
            recorder.flush_if_due()
        if step == total:
            break
        if rank == 0 and on_save and (stop or save_every.over(time.monotonic() - saved_at, step - saved_step)):
            last = recorder.flush()
            if last:  # else the next step finds that training has diverged
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                on_save({"step": step, "last": list(last), "micro_batch": passes.micro_batch, **state})
            saved_at, saved_step = time.monotonic(), step
        if stop:
            raise Stopped(step)
    last = recorder.flush()
    recorder.check()
    assert last
    return Fit(last, images_in_steps(len(train_set), protocol.batch_size, total), last.seconds, passes.micro_batch, passes.evaluation_batch)


def rank_and_workers() -> tuple[int, int]:
    """(rank, workers) of this process's group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _to_device(split: ImageSet, device: torch.device) -> ImageSet:
    return split if device.type == "cpu" else split.to(device)
