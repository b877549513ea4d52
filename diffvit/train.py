"""A whole run: data, model, fit, test, files. It does not know of Ray."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from diffvit.compute import DEFAULT_COMPUTE, Compute
from diffvit.data.batches import Prepare
from diffvit.dataset import Dataset, ImageSet, load, with_training_noise
from diffvit.errors import DiffvitError, RunIsBusyError
from diffvit.evaluation import Evaluation, evaluate
from diffvit.keeping.keeper import RunKeeper
from diffvit.keeping.saving import DEFAULT_SAVING, Every, Saving
from diffvit.ledger.disk import disk_faults, file_sha256, write_atomically
from diffvit.ledger.files import RunFiles
from diffvit.ledger.log import LogPosition, Step, TrainingLog, note_of_work_again, work_after
from diffvit.ledger.results import write_result
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import save_weights, weight_facts
from diffvit.loop.fit import Fit, Stopped, fit, rank_and_workers
from diffvit.loop.placement import place
from diffvit.loop.recorder import Diverged, Progress
from diffvit.loop.resume import fits_run
from diffvit.machine.device import machine_facts, resolve_device
from diffvit.machine.host import cpus
from diffvit.protocol import images_in_steps

T = TypeVar("T")


def _on_first_worker(make: Callable[[], T]) -> T:
    """What `make` gives or raises on the group's first process, on all of them."""
    rank, workers = rank_and_workers()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = make()
        except DiffvitError as error:
            outcome[1] = error
    if workers > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def train(
    spec: RunSpec,
    checkpoints: Path,
    *,
    data_root: str | Path | None = None,
    device: str | torch.device | None = None,
    compute: Compute = DEFAULT_COMPUTE,
    on_steps: Progress | None = None,
    on_warning: Callable[[str], None] | None = None,
    on_preparing: Callable[[], None] | None = None,
    saving: Saving = DEFAULT_SAVING,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """One run, from its specification to its result file.

    A run that has ended already is not done again; one that was interrupted goes on after its last saved state.

    Args:
        device: default: the first GPU, or the CPU.
        compute: how it is computed, which the result records and does not depend on.
        on_steps: hears of every step, about once a second.
        on_warning: hears what a reader of the result must know, of damaged states and of a storage that does not answer.
        on_preparing: called before kernels are compiled and tuned.
        saving: how the state survives.
        should_stop: asked after each step; if true, the state is saved and Stopped raised.

    Returns:
        The content of the result file. Its "status" is "done", or "diverged" where a loss or gradient was not a number.

    Raises:
        UserError: bad input, before anything is written.
        RunIsBusyError: another process or machine trains this run.
        StorageError: the disk or the storage failed. Trying again goes on after the last saved state.
        Stopped: should_stop said so.
    """
    place = torch.device(device) if device else resolve_device()
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if place.type == "cpu" and torch.get_num_threads() > cpus():  # torch does not know quotas
        torch.set_num_threads(cpus())
    data = load(spec.dataset, data_root)
    files = RunFiles.of(checkpoints, spec, spec.run_id(data.fingerprint))
    with disk_faults(files.checkpoints), contextlib.ExitStack() as stack:
        keeper = RunKeeper(files, saving, on_warning)

        def begin() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
            stack.enter_context(keeper)
            total = spec.protocol.total_steps(len(data.train))
            return keeper.result, None if keeper.result else keeper.load_state(lambda state: fits_run(state, spec, total))

        ended, resume = _on_first_worker(begin)
        if ended is not None:
            return ended
        try:
            return _train(
                spec, files, keeper, data, place, resume, compute,
                on_steps=on_steps, on_warning=on_warning, on_preparing=on_preparing, save_every=saving.every,
                should_stop=lambda: should_stop() or keeper.lost,
            )  # fmt: skip
        except Stopped:
            if _on_first_worker(lambda: keeper.lost and not should_stop()):  # a group's workers must agree on why they end
                raise RunIsBusyError(
                    f"another machine has taken over the run {files.run_id}.", "the same command finds it done when that one is."
                ) from None
            raise


def _train(
    spec: RunSpec,
    files: RunFiles,
    keeper: RunKeeper,
    data: Dataset,
    device: torch.device,
    resume: dict[str, Any] | None,
    compute: Compute,
    *,
    on_steps: Progress | None,
    on_warning: Callable[[str], None] | None,
    on_preparing: Callable[[], None] | None,
    save_every: Every,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """`train` once the run is ours: resume or begin, fit, evaluate, write the files."""
    rank, workers = rank_and_workers()
    protocol, run_id = spec.protocol, files.run_id
    clean = data
    data, false_rows = with_training_noise(clean, protocol, spec.seed)
    if on_preparing and rank == 0 and (device.type == "cuda" or compute.compile):
        on_preparing()
    placed = place(spec.model, spec.size, protocol, spec.seed, device, spec.precision, compute, workers)
    model, chosen, micro_batch = placed.model, placed.chosen, placed.micro_batch
    total = protocol.total_steps(len(data.train))
    warning = protocol.warmup_warning(total)
    if warning and on_warning and rank == 0:
        on_warning(warning)
    notes = [*([f"warning: {warning}"] if warning else []), *(f"data: {note}" for note in data.notes)]
    started = resume["started"] if resume else _utc_now()
    facts = {"run_id": run_id, "model": spec.model, "size": spec.size, "dataset": spec.dataset, "seed": spec.seed, "steps": total}
    keep = LogPosition(*resume["log"]) if resume else None
    again = work_after(files.log, keep)
    with contextlib.ExitStack() as stack:
        log = None
        if rank == 0:
            log = stack.enter_context(TrainingLog(files.log, facts, notes, keep=keep))
            for note in chosen.notes:
                log.note(note)
            if resume or again[0]:
                log.note(note_of_work_again(f"resumed after step {resume['step']}" if resume else "begun again", *again))

        def record(steps: list[Step], total: int) -> None:
            if log:
                log.write(steps)
            if on_steps:
                on_steps(steps, total)

        def save(state: dict[str, Any]) -> None:
            if log:
                keeper.save({**state, "started": started}, log)

        try:
            fitted = fit(
                model, data, protocol, seed=spec.seed, precision=spec.precision, **placed.how, on_steps=record, resume=resume,
                on_save=save, save_every=save_every, should_stop=should_stop,
            )  # fmt: skip
        except Diverged as diverged:
            if log is None:
                return {"run_id": run_id}
            log.note(str(diverged))
            notes.append(str(diverged))
            images = images_in_steps(len(data.train), protocol.batch_size, diverged.step.step)
            outcome, written = _diverged_outcome(diverged, images), [files.log]
        else:
            if log is None:
                return {"run_id": run_id}
            # A run cut short by max_steps is a trial: its evaluation shall not cost more than its training.
            limit = None if protocol.max_steps is None else max(64, fitted.images)
            prepare = Prepare(protocol.image_size, data.mean, data.std, device)
            if fitted.micro_batch < micro_batch:
                log.note(f"memory was short: {fitted.micro_batch} instead of {micro_batch} images at once")
            micro_batch, evaluation_batch = fitted.micro_batch, fitted.evaluation_batch
            val, test = (
                evaluate(model, split.head(limit), prepare=prepare, batch_size=evaluation_batch, precision=spec.precision)
                for split in (data.val, data.test)
            )
            log.note(f"test_accuracy={test.accuracy:.6f} test_loss={test.loss:.6f} test_images={len(test.labels)}")
            save_weights(files.weights, model, weight_facts(spec, run_id, data))
            write_atomically(files.predictions, test.to_csv().encode())
            outcome, written = _outcome(fitted, val, test), [files.weights, files.log, files.predictions]
            some = false_rows[:limit]
            if len(some):
                falsely = ImageSet(data.train.pixels[some], data.train.labels[some])
                learnt = evaluate(model, falsely, prepare=prepare, batch_size=evaluation_batch, precision=spec.precision)
                outcome |= _memory_of(learnt, clean.train.labels[some])
        log.position()  # on disk before the result says so

    result = {
        **spec.names(run_id),
        "overrides": dict(spec.overrides),
        "identity": spec.identity(data.fingerprint),
        "depth": protocol.depths[spec.size],
        "parameters": model.count_parameters(),
        "forward_flops": model.estimate_flops(),
        "false_labels": len(false_rows) if protocol.label_noise else None,
        "memorised": None,
        "recovered": None,
        **outcome,
        "workers": workers,
        "micro_batch": micro_batch,
        "attention": chosen.attention,
        "fused": chosen.fused,
        "graphs": chosen.graphs,
        "compiled": chosen.compiled,
        "compile_seconds": round(chosen.compile_seconds, 1),
        "recompute": model.recompute,
        "deterministic": compute.deterministic or device.type == "cpu",
        **machine_facts(device),
        "started": started,
        "finished": _utc_now(),
        "notes": notes,
        "sha256": {path.name: file_sha256(path) for path in written},
    }
    write_result(files, result)
    keeper.finish(result)
    return result


def _outcome(fitted: Fit, val: Evaluation, test: Evaluation) -> dict[str, Any]:
    return {
        "status": "done",
        **_pace(fitted.last, fitted.images),
        "train_loss": fitted.last.train_loss,
        "val_loss_last_batch": fitted.last.val_loss,
        "val_loss": val.loss,
        "val_accuracy": val.accuracy,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "test_images": len(test.labels),
    }


def _memory_of(learnt: Evaluation, true_labels: Tensor) -> dict[str, Any]:
    """What a model answers for training images whose labels were false: shares of those labels, and of the true ones."""
    return {"memorised": learnt.accuracy, "recovered": (learnt.predicted == true_labels).double().mean().item()}


def _diverged_outcome(diverged: Diverged, images: int) -> dict[str, Any]:
    """What there is to say of a run that diverged; numbers that JSON does not have are left to the message."""
    step = diverged.step
    unknown = ("train_loss", "val_loss_last_batch", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_images")
    norm = step.grad_norm if math.isfinite(step.grad_norm) else str(step.grad_norm)
    at = {"step": step.step, "learning_rate": step.learning_rate, "grad_norm": norm, "message": str(diverged)}
    return {
        "status": "diverged",
        **_pace(step, images),
        **dict.fromkeys(unknown),
        "diverged": at,
    }


def _pace(last: Step, images: int) -> dict[str, Any]:
    return {
        "steps": last.step,
        "images": images,
        "seconds": round(last.seconds, 3),
        "images_per_second": round(images / last.seconds, 2),
    }


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
