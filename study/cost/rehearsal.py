"""A rehearsal: every cell of a grid for two real steps, from data to storage, to find in minutes what would fail after hours.

Each cell trains one step at its full batch, saves its state, is stopped, resumes from it for a second step, is evaluated, saved
and read back, and with a storage copied there and brought back. All of it lies in a folder of its own that is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from diffvit.errors import DiffvitError, StorageError, UserError, first_line
from diffvit.evaluation import evaluate_checkpoint
from diffvit.keeping.runs import fetch_run
from diffvit.keeping.saving import Every
from diffvit.keeping.storage import open_storage
from diffvit.ledger.disk import check_lockable, check_writable
from diffvit.ledger.files import RunFiles
from diffvit.ledger.results import Result
from diffvit.ledger.spec import RunSpec
from diffvit.ledger.verify import verify_run
from diffvit.loop.fit import Stopped
from diffvit.machine.device import resolve_device
from diffvit.train import train
from study.cluster.runner import Settings

_STEPS = 2


@dataclass(frozen=True)
class Rehearsed:
    """The outcome of a cell's rehearsal.

    Attributes:
        parts: what was done, in order.
        seconds: from loading the data to reading back.
        memory: the most that the GPU, or on a CPU the process, needed, in bytes; None where it ended too early to say.
        fault: why it failed, or "".
    """

    title: str
    parts: tuple[str, ...]
    seconds: float
    memory: int | None
    fault: str = ""

    def line(self) -> str:
        """The outcome as a line of text."""
        memory = f", at most {self.memory / 2**30:.2f} GB" if self.memory else ""
        took, done = f"{self.title}: {self.seconds:.1f} s{memory}", ", ".join(self.parts)
        return f"FAILED  {took}: {self.fault}{f' (after: {done})' if done else ''}" if self.fault else f"ok      {took}: {done}"


def cells(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """One run for each cell and condition, cut to two steps."""
    unique: dict[str, RunSpec] = {}
    for spec in specs:
        unique.setdefault(repr((spec.model, spec.size, spec.dataset, sorted(spec.overrides.items()))), spec)
    return [dataclasses.replace(spec, overrides={**spec.overrides, "max_steps": _STEPS}) for spec in unique.values()]


def rehearse(specs: Sequence[RunSpec], settings: Settings, on_outcome: Callable[[Rehearsed], None]) -> list[Rehearsed]:
    """Rehearse the cells on the connected cluster, as many at a time as the study would train.

    Args:
        settings: of the study. A run that several workers would train is rehearsed with one.
        on_outcome: called with each outcome as it comes.

    Returns:
        The outcomes, in the order of the cells.

    Raises:
        UserError: the checkpoints folder cannot be written, or the storage does not answer.
    """
    with _folders(settings) as own:
        needs = own.placement.worker_resources()
        # A process of its own for each, so that its memory is its own and its end ends nothing else.
        task = ray.remote(max_calls=1, max_retries=0)(_rehearse_cell).options(
            num_cpus=needs.pop("CPU"), num_gpus=needs.pop("GPU", 0), resources=needs
        )
        titles = {task.remote(spec, own): _title(spec) for spec in specs}
        found, waiting = {}, list(titles)
        while waiting:
            (ended,), waiting = ray.wait(waiting)
            found[ended] = _outcome(ended, titles[ended])
            on_outcome(found[ended])
        return [found[each] for each in titles]


def _title(spec: RunSpec) -> str:
    """The cell, without a seed."""
    own = {name: value for name, value in spec.overrides.items() if name != "max_steps"}
    return dataclasses.replace(spec, overrides=own).title.replace(f" seed {spec.seed}", "")


def _outcome(task: Any, title: str) -> Rehearsed:
    try:
        return Rehearsed(title, **ray.get(task))
    except ray.exceptions.OutOfMemoryError:
        return Rehearsed(title, (), 0.0, None, "the machine's memory does not suffice: Ray ended its process")
    except ray.exceptions.RayError as error:
        return Rehearsed(title, (), 0.0, None, f"its process died: {first_line(error)}")


@contextlib.contextmanager
def _folders(settings: Settings) -> Iterator[Settings]:
    """The settings with a checkpoints folder and a storage of their own, on the same disk and in the same storage, removed at the end."""
    checkpoints = settings.checkpoints
    made = [folder for folder in (checkpoints / ".state", checkpoints, *checkpoints.parents) if not folder.exists()]
    name = f"rehearsal-{uuid.uuid4().hex[:8]}"
    own = checkpoints / ".state" / name
    url = f"{settings.saving.storage.rstrip('/')}/.{name}" if settings.saving.storage else None
    saving = dataclasses.replace(settings.saving, storage=url, every=Every(steps=1))
    try:
        check_writable(own)
        check_lockable(own)
        if url:
            open_storage(url).check()
        yield dataclasses.replace(settings, checkpoints=own, saving=saving)
    finally:
        shutil.rmtree(own, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # something of the user's is in it by now
                folder.rmdir()
        if url:
            open_storage(url).remove_all()


def _rehearse_cell(spec: RunSpec, settings: Settings) -> dict[str, Any]:
    """A Ray task: the fields of a Rehearsed but for the title. What fails is returned, not raised."""
    settings.know_data()
    placement = settings.placement
    if not placement.gpus_per_run:
        torch.set_num_threads(placement.cpus_per_run)
    device = resolve_device(None if placement.gpus_per_run else "cpu")
    start, parts, fault = time.perf_counter(), [], ""
    try:
        for part in _parts(spec, settings, device):
            parts.append(part)
    except DiffvitError as error:
        fault = error.message
    except Exception as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
    return {"parts": tuple(parts), "seconds": time.perf_counter() - start, "memory": _peak_memory(device), "fault": fault}


def _parts(spec: RunSpec, settings: Settings, device: torch.device) -> Iterator[str]:
    """Do one part after the other; yields the name of each that is done."""
    checkpoints = settings.checkpoints
    how: dict[str, Any] = {
        "data_root": settings.data_root, "device": device, "saving": settings.saving,
        "compute": dataclasses.replace(settings.compute, memory_share=settings.placement.memory_share),
    }  # fmt: skip
    try:
        result = train(spec, checkpoints, should_stop=lambda: True, **how)
    except Stopped:
        yield "stopped and saved after a step"
        result = train(spec, checkpoints, **how)
    assert result is not None  # a rehearsal has one process
    if result.diverged:
        raise UserError(result.diverged["message"], "the study would record it as diverged.")
    yield "resumed to step 2"
    yield f"tested on {result.test_images} images"
    files = result.files(checkpoints)
    _read_back(files, result, settings.data_root, device)
    yield "read back"
    if settings.saving.storage:
        with tempfile.TemporaryDirectory(dir=checkpoints) as folder:
            brought = dataclasses.replace(files, checkpoints=Path(folder))
            if not fetch_run(open_storage(settings.saving.storage), brought):
                raise StorageError(f"the storage {settings.saving.storage} does not have the run whole.", "check the storage.")
            _read_back(brought, result, settings.data_root, device)
        yield "stored and brought back"


def _read_back(files: RunFiles, result: Result, data_root: str | None, device: torch.device) -> None:
    """Raises UserError where a run's files are not whole, or its weights do not give the accuracy of its result."""
    if wrong := verify_run(files.result):
        raise UserError(" ".join(wrong), "check the disk.")
    images, accuracy, batch_size = result.test_images, result.test_accuracy, result.micro_batch
    assert images and batch_size and accuracy is not None  # it is done, and new
    again = evaluate_checkpoint(files.weights, data_root=data_root, limit=images, batch_size=batch_size, device=device)
    # A change of one image is left to rounding.
    if abs(again["accuracy"] - accuracy) * images > 1.5:
        raise UserError(f"the weights read back give {100 * again['accuracy']:.2f} % and not {100 * accuracy:.2f} %.", "check the disk.")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
