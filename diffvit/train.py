"""A whole run: data, model, fit, test, files; without Ray."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from diffvit.ledger.log import LogPosition, Step, TrainingLog, WorkAgain, skipped_steps
from diffvit.ledger.results import DivergedAt, Result, write_result
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.weights import save_weights, weight_facts
from diffvit.loop.fit import Fit, Stopped, fit, rank_and_workers
from diffvit.loop.placement import Placed, place_model
from diffvit.loop.recorder import Diverged, OnSteps
from diffvit.loop.resume import fits_run
from diffvit.machine.device import machine_facts, resolve_device
from diffvit.machine.host import cpus
from diffvit.protocol import images_in_steps
from diffvit.tracking import NO_TRACKING, Curves, TrackedRun, Tracking, tracked

T = TypeVar("T")


def _on_first_worker(make: Callable[[], T]) -> T:
    """Call `make` on the group's first process; return or raise its outcome on all of them."""
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
    on_steps: OnSteps | None = None,
    on_warning: Callable[[str], None] | None = None,
    on_phase: Callable[[str, int], None] | None = None,
    saving: Saving = DEFAULT_SAVING,
    tracking: Tracking = NO_TRACKING,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result | None:
    """One run, from its specification to its result file.

    A finished run is not trained again; an interrupted one resumes from its last state.

    Args:
        device: default: the first GPU, or the CPU.
        compute: how it is computed; recorded in the result, which does not depend on it.
        on_steps: called with every step, about once a second.
        on_warning: called with warnings: about the run's settings, damaged states, a storage that does not answer.
        on_phase: called with what the run does next beside steps ("compiling", "resumed at step 600", "evaluating"), and how many
            steps it has done.
        saving: when and where states are saved.
        tracking: the experiment tracker that curves are sent to.
        should_stop: asked after each step; if true, the state is saved and Stopped raised.

    Returns:
        The result, as it is in the run's file. Its status is "done", or "diverged" where a loss or gradient was not a number.
        In a torch.distributed group, None on all processes but the first if the run ended now.

    Raises:
        UserError: bad input, before anything is written.
        RunIsBusyError: another process or machine trains this run.
        StorageError: the disk or the storage failed. Another call resumes from the last state.
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

        def begin() -> tuple[Result | None, dict[str, Any] | None]:
            stack.enter_context(keeper)
            total = spec.protocol.total_steps(len(data.train))
            return keeper.result, None if keeper.result else keeper.load_state(lambda state: fits_run(state, spec, total))

        ended, resume = _on_first_worker(begin)
        if ended is not None:
            return ended
        try:
            return _train(
                spec, files, keeper, data, place, resume, compute,
                on_steps=on_steps, on_warning=on_warning, on_phase=on_phase, save_every=saving.every, tracking=tracking,
                should_stop=lambda: should_stop() or keeper.lost,
            )  # fmt: skip
        except Stopped:
            if _on_first_worker(lambda: keeper.lost and not should_stop()):  # a group's workers must agree on why they end
                raise RunIsBusyError(
                    f"another machine has taken over the run {files.run_id}.", "the same command finds it done when that one is."
                ) from None
            raise


@dataclass(frozen=True)
class _Run:
    """A run before its first step.

    Attributes:
        clean: the data as they are; `data` are what is trained on: with the protocol's noise, and with false labels in `false_rows`.
        notes: sentences for the log and the result.
        resume: the state that it resumes from, if any.
    """

    spec: RunSpec
    files: RunFiles
    clean: Dataset
    data: Dataset
    false_rows: Tensor
    device: torch.device
    compute: Compute
    placed: Placed
    notes: list[str]
    started: str
    resume: dict[str, Any] | None


@dataclass(frozen=True)
class _Outcome:
    """How training ended; a model that diverged is not evaluated.

    Attributes:
        last: the step that training ended with.
        written: the run's files.
        memorised, recovered: as in Result.
    """

    last: Step
    images: int
    micro_batch: int
    written: list[Path]
    val: Evaluation | None = None
    test: Evaluation | None = None
    memorised: float | None = None
    recovered: float | None = None
    diverged: DivergedAt | None = None


def _train(
    spec: RunSpec,
    files: RunFiles,
    keeper: RunKeeper,
    clean: Dataset,
    device: torch.device,
    resume: dict[str, Any] | None,
    compute: Compute,
    *,
    on_steps: OnSteps | None,
    on_warning: Callable[[str], None] | None,
    on_phase: Callable[[str, int], None] | None,
    save_every: Every,
    tracking: Tracking,
    should_stop: Callable[[], bool],
) -> Result | None:
    """`train` once the run is ours: resume or begin, fit, evaluate, write the files."""
    rank, workers = rank_and_workers()
    protocol = spec.protocol
    data, false_rows = with_training_noise(clean, protocol, spec.seed)
    enter = on_phase if on_phase and rank == 0 else lambda phase, step: None
    begun, total = resume["step"] if resume else 0, protocol.total_steps(len(data.train))
    if device.type == "cuda" or compute.compile:
        enter("compiling", begun)
    placed = place_model(spec.model, spec.size, protocol, spec.seed, device, spec.precision, compute, workers)
    warning = protocol.warmup_warning(total)
    if warning and on_warning and rank == 0:
        on_warning(warning)
    notes = [*([f"warning: {warning}"] if warning else []), *(f"data: {note}" for note in data.notes)]
    started = resume["started"] if resume else _utc_now()
    run = _Run(spec, files, clean, data, false_rows, device, compute, placed, notes, started, resume)
    if resume:
        enter(f"resumed at step {begun}", begun)

    def tracker_failed(sentence: str) -> None:
        notes.append(sentence)
        if on_warning:
            on_warning(sentence)

    shown = TrackedRun.of(spec, files.run_id, files.checkpoints, begun, tracking)
    with (
        _open_log(run) if rank == 0 else contextlib.nullcontext() as log,
        tracked(tracking.tracker if rank == 0 else None, shown, tracker_failed) as curves,
    ):
        try:
            fitted = _fit(run, keeper, log, curves, on_steps=on_steps, save_every=save_every, should_stop=should_stop)
            enter("evaluating", total)
            outcome = _evaluate(run, fitted, log) if log else None
        except Diverged as diverged:
            outcome = _give_up(run, diverged, log) if log else None
        if log is None or outcome is None:
            return None
        if curves and outcome.test:
            curves.end({"test_accuracy": outcome.test.accuracy, "test_loss": outcome.test.loss})
        log.position()  # on disk before the result says so
    result = _result(run, outcome, workers)
    write_result(files, result)
    keeper.finish(result)
    return result


@contextlib.contextmanager
def _open_log(run: _Run) -> Iterator[TrainingLog]:
    """Open the run's log and write the notes that precede the first step."""
    spec, resume = run.spec, run.resume
    total = spec.protocol.total_steps(len(run.data.train))
    names = {key: value for key, value in spec.names(run.files.run_id).items() if key != "precision"}
    keep = LogPosition(*resume["log"]) if resume else None
    again = WorkAgain.after(run.files.log, keep)
    with TrainingLog(run.files.log, {**names, "steps": total}, run.notes, keep=keep) as log:
        for note in run.placed.chosen.notes:
            log.note(note)
        if resume or again.steps:
            log.note(again.note(f"resumed after step {resume['step']}" if resume else "begun again"))
        yield log


def _fit(
    run: _Run,
    keeper: RunKeeper,
    log: TrainingLog | None,
    curves: Curves | None,
    *,
    on_steps: OnSteps | None,
    save_every: Every,
    should_stop: Callable[[], bool],
) -> Fit:
    """Train the model; steps go to the log and the tracker, states to the keeper."""

    def record(steps: list[Step], total: int) -> None:
        if log:
            log.write(steps)
        if curves:
            curves.steps(steps)
        if on_steps:
            on_steps(steps, total)

    def save(state: dict[str, Any]) -> None:
        if log:
            keeper.save({**state, "started": run.started}, log)

    return fit(
        run.placed.model, run.data, run.spec.protocol, seed=run.spec.seed, precision=run.spec.precision, **run.placed.fit_arguments,
        on_steps=record, resume=run.resume, on_save=save, save_every=save_every, should_stop=should_stop,
    )  # fmt: skip


def _evaluate(run: _Run, fitted: Fit, log: TrainingLog) -> _Outcome:
    """Evaluate the trained model, and write its weights and predictions."""
    spec, data, files, model = run.spec, run.data, run.files, run.placed.model
    # A run cut short by max_steps is a trial: its evaluation shall not cost more than its training.
    limit = None if spec.protocol.max_steps is None else max(64, fitted.images)
    prepare = Prepare(spec.protocol.image_size, data.mean, data.std, run.device)
    if fitted.micro_batch < run.placed.micro_batch:
        log.note(f"memory was short: {fitted.micro_batch} instead of {run.placed.micro_batch} images at once")
    if skipped := skipped_steps(files.log):
        run.notes.append(f"{skipped} of {fitted.last.step} updates skipped, for their gradients overflowed fp16")

    def measure(images: ImageSet) -> Evaluation:
        return evaluate(model, images, prepare=prepare, batch_size=fitted.evaluation_batch, precision=spec.precision)

    val, test = measure(data.val.head(limit)), measure(data.test.head(limit))
    log.note(f"test_accuracy={test.accuracy:.6f} test_loss={test.loss:.6f} test_images={len(test.labels)}")
    save_weights(files.weights, model, weight_facts(spec, files.run_id, data))
    write_atomically(files.predictions, test.to_csv().encode())
    memorised = recovered = None
    rows = run.false_rows[:limit]
    if len(rows):
        learnt = measure(ImageSet(data.train.pixels[rows], data.train.labels[rows]))
        memorised, recovered = learnt.accuracy, (learnt.predicted == run.clean.train.labels[rows]).double().mean().item()
    written = [files.weights, files.log, files.predictions]
    return _Outcome(fitted.last, fitted.images, fitted.micro_batch, written, val, test, memorised, recovered)


def _give_up(run: _Run, diverged: Diverged, log: TrainingLog) -> _Outcome:
    """The outcome of a diverged training, which the log notes."""
    step = diverged.step
    log.note(str(diverged))
    run.notes.append(str(diverged))
    images = images_in_steps(len(run.data.train), run.spec.protocol.batch_size, step.step)
    norm = step.grad_norm if math.isfinite(step.grad_norm) else str(step.grad_norm)
    at = DivergedAt(step=step.step, learning_rate=step.learning_rate, grad_norm=norm, message=str(diverged))
    return _Outcome(step, images, run.placed.micro_batch, [run.files.log], diverged=at)


def _result(run: _Run, outcome: _Outcome, workers: int) -> Result:
    spec, chosen, model = run.spec, run.placed.chosen, run.placed.model
    last, val, test = outcome.last, outcome.val, outcome.test
    return Result(
        **spec.names(run.files.run_id),
        overrides=dict(spec.overrides),
        identity=spec.identity(run.data.fingerprint),
        depth=spec.protocol.depths[spec.size],
        parameters=model.count_parameters(),
        forward_flops=model.estimate_flops(),
        false_labels=len(run.false_rows) if spec.protocol.label_noise else None,
        memorised=outcome.memorised,
        recovered=outcome.recovered,
        status="diverged" if outcome.diverged else "done",
        steps=last.step,
        images=outcome.images,
        seconds=round(last.seconds, 3),
        images_per_second=round(outcome.images / last.seconds, 2),
        train_loss=None if outcome.diverged else last.train_loss,
        val_loss_last_batch=None if outcome.diverged else last.val_loss,
        val_loss=val.loss if val else None,
        val_accuracy=val.accuracy if val else None,
        test_loss=test.loss if test else None,
        test_accuracy=test.accuracy if test else None,
        test_images=len(test.labels) if test else None,
        diverged=outcome.diverged,
        workers=workers,
        micro_batch=outcome.micro_batch,
        attention=chosen.attention,
        fused=chosen.fused,
        graphs=chosen.graphs,
        compiled=chosen.compiled,
        compile_seconds=round(chosen.compile_seconds, 1),
        recompute=model.recompute,
        deterministic=run.compute.deterministic or run.device.type == "cpu",
        **machine_facts(run.device),
        started=run.started,
        finished=_utc_now(),
        notes=run.notes,
        sha256={path.name: file_sha256(path) for path in outcome.written},
    )


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
