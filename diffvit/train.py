"""The training loop: one step is one AdamW update on one global batch, then a look at one validation batch.

Micro-batches and workers only split a step, they do not change it: every image's loss counts 1 / (images in the global
batch), whoever computes it. Batches come from (seed, epoch), dropout from (seed, step): so a step depends on its number,
not on what the process did before.

`fit` trains a model; `train` makes a whole run of it: data, model, fit, test, files. Neither knows of Ray.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import diffvit
from diffvit.checks import HEX, fault, list_of, real, record, text, whole
from diffvit.compute import DEFAULT_COMPUTE, Compute
from diffvit.dataset import Dataset, ImageSet, Prepare, StepBatches, load, make_loader, with_training_noise
from diffvit.errors import RunIsBusyError, UserError
from diffvit.evaluation import Evaluation, evaluate
from diffvit.host import cpus
from diffvit.keeper import RunKeeper
from diffvit.ledger import RunFiles, RunSpec, disk_faults, file_sha256, save_weights, weight_facts, write_atomically, write_result
from diffvit.log import LogPosition, Step, TrainingLog, note_of_work_again, work_after
from diffvit.passes import Passes
from diffvit.placed import place
from diffvit.protocol import Protocol, images_in_steps, stable_seed
from diffvit.saving import DEFAULT_SAVING, Every, Saving
from diffvit.vit import build_model

# Called with the steps since the last call and the number of all steps; at most about once a second.
Progress = Callable[[list[Step], int], None]
_FLUSH_SECONDS = 1.0

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """Training was asked to stop, and its state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


class Diverged(Exception):  # noqa: N818 (an outcome, not a fault of the program)
    """A loss or the gradient is not a number: no later step could mend the weights.

    Attributes:
        step: the record of the step where it was first seen.
    """

    def __init__(self, step: Step):
        super().__init__(
            f"diverged at step {step.step}: training loss {step.train_loss:.4g}, validation loss {step.val_loss:.4g}, "
            f"gradient norm {step.grad_norm:.4g}, learning rate {step.learning_rate:.3g}"
        )
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
    rank, workers = _group()
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
    recorder = _Recorder(protocol, total, train_batches.per_epoch, on_steps if rank == 0 else None, last)
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


def make_optimizer(model: nn.Module, protocol: Protocol) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms, lambda vectors, positions or the class token."""
    return _adamw(_decayed_and_others(model), protocol)


def _decayed_and_others(model: nn.Module) -> list[list[nn.Parameter]]:
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
        (decayed if is_matrix else others).append(parameter)
    return [decayed, others]


def _adamw(groups: list[list[nn.Parameter]], protocol: Protocol) -> torch.optim.AdamW:
    decays = zip(groups, (protocol.weight_decay, 0.0), strict=True)
    return torch.optim.AdamW([{"params": group, "weight_decay": decay} for group, decay in decays], lr=protocol.lr, fused=True)


_STATE = record(
    {"step": whole(1), "last": list_of(real(infinite=True), len(Step._fields), len(Step._fields)), "started": text()},
    {"micro_batch": whole(1)},
)


def fits_run(state: dict[str, Any], spec: RunSpec, total: int) -> bool:
    """Whether a state, wherever it comes from, is what `fit` could have saved of this run of so many steps; its log is not looked at."""
    model = build_model(spec.model, spec.size, spec.protocol, "meta")
    groups = _decayed_and_others(model)
    try:
        if fault(_STATE, state) or state["last"][0] != state["step"] or not state["step"] < total:
            return False
        length, digest = state["log"]
        if whole()(length) or text(HEX)(digest) or not _are_like(state["model"], model.state_dict()):
            return False
        # Its options too, but for the learning rate of the step: the optimiser would take them over.
        usual = _adamw([[nn.Parameter(torch.empty(0)) for _ in group] for group in groups], spec.protocol).state_dict()["param_groups"]
        for found, own in zip(state["optimizer"]["param_groups"], usual, strict=True):
            if real()(found["lr"]) or any(found.get(name, value) != value for name, value in {**own, "lr": found["lr"]}.items()):
                return False
            if "params" not in found:
                return False
        moments = state["optimizer"]["state"]
        parameters = [parameter for group in groups for parameter in group]
        return set(moments) == set(range(len(parameters))) and all(
            _are_like(moments[i], {"step": torch.empty(()), "exp_avg": each, "exp_avg_sq": each}) for i, each in enumerate(parameters)
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return False


def _are_like(tensors: Mapping[str, Any], others: Mapping[str, Tensor]) -> bool:
    """Whether names, shapes and dtypes are the same."""
    return set(tensors) == set(others) and all(
        isinstance(tensors[name], Tensor) and tensors[name].shape == other.shape and tensors[name].dtype == other.dtype
        for name, other in others.items()
    )


class _Recorder:
    """Keeps the steps' numbers on the device and fetches them about once a second, so that a step need not wait for them.

    In a group all processes must do the same at the same step, so there the numbers are looked at one step late, each time.
    """

    def __init__(self, protocol: Protocol, total: int, per_epoch: int, on_steps: Progress | None, last: Step | None):
        self._protocol, self._total, self._per_epoch, self._on_steps = protocol, total, per_epoch, on_steps
        self._waiting: list[tuple[int, float, Tensor]] = []
        self._last = last
        self._bad: Step | None = None
        self._newest: Tensor | None = None
        self._flushed = time.perf_counter()
        self._start = self._flushed - (last.seconds if last else 0.0)

    def add(self, step: int, record: Tensor) -> None:
        """Takes a step's [train loss, validation loss, validation accuracy, gradient norm, wishes to stop]."""
        self._newest = record
        self._waiting.append((step, time.perf_counter() - self._start, record))

    def flush_if_due(self) -> None:
        """Hands steps on about once a second. Raises Diverged."""
        if time.perf_counter() - self._flushed >= _FLUSH_SECONDS:
            self.flush()
        self.check()

    def asked_to_stop(self) -> bool:
        """Whether anyone in the group wished to stop at the newest step. Raises Diverged."""
        if self._newest is None:
            return False
        self.flush()
        self.check()
        return self._newest[-1].item() > 0

    def check(self) -> None:
        """Raises Diverged if a step that was handed on is not finite."""
        if self._bad is not None:
            raise Diverged(self._bad)

    def flush(self) -> Step | None:
        """Hands all waiting steps on, up to the first that is not finite. Returns the last, or None after one that is not finite."""
        if self._waiting and self._bad is None:
            rows = torch.stack([record for _, _, record in self._waiting]).tolist()
            # The last step's time is taken now: on a GPU its work has only just ended.
            self._flushed = time.perf_counter()
            steps = [
                Step(
                    step, self._epoch(step), self._protocol.learning_rate(step, self._total), train_loss, val_loss, accuracy, norm, seconds
                )
                for (step, seconds, _), (train_loss, val_loss, accuracy, norm, _) in zip(self._waiting, rows, strict=True)
            ]
            steps[-1] = steps[-1]._replace(seconds=self._flushed - self._start)
            finite = list(itertools.takewhile(lambda step: step.is_finite, steps))
            self._bad = steps[len(finite)] if len(finite) < len(steps) else None
            steps = steps[: len(finite) + 1]
            self._last = steps[-1]
            if self._on_steps:
                self._on_steps(steps, self._total)
        self._waiting.clear()
        return self._last if self._bad is None else None

    def _epoch(self, step: int) -> int:
        return (step - 1) // self._per_epoch + 1


def _group() -> tuple[int, int]:
    """(rank, workers) of this process's group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _on_first_worker(make: Callable[[], T]) -> T:
    """What `make` gives or raises on the group's first process, on all of them."""
    rank, workers = _group()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = make()
        except UserError as error:
            outcome[1] = error
    if workers > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def _to_device(split: ImageSet, device: torch.device) -> ImageSet:
    return split if device.type == "cpu" else split.to(device)


# ---------------------------------------------------------------------------------------------------- a whole run


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
    rank, workers = _group()
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


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Where it ran and on which versions: recorded, and no part of a run's identity."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffvit": diffvit.__version__}
    return {
        "device": device.type,
        "device_name": device_title(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "git_commit": _git_commit(),
    }


def device_title(device: torch.device) -> str:
    """What the maker calls a GPU, or the machine's CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def resolve_device(name: str | None = None) -> torch.device:
    """The named device; without a name the first GPU, or the CPU. Raises UserError for one that is not there."""
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        usable = device.type in ("cpu", "cuda")
        torch.empty(0, device=device if usable else "cpu")
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise UserError(f"there is no device {name!r} here.", "use --device cpu, or leave it out.")
    return device


def default_precision(device: torch.device) -> str:
    """bf16 on a GPU that has it, else fp32: a CPU computes bf16 much more slowly."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the code that runs, with + where files differ from it; outside a checkout $DIFFVIT_COMMIT, or None."""
    here = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("DIFFVIT_COMMIT") or None
    return described.stdout.strip() or None


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
