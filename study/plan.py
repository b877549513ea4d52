"""The cost of runs before they are trained: parameters, steps, FLOPs; and which are done."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffvit.ledger.files import RunFiles
from diffvit.ledger.results import read_result
from diffvit.ledger.spec import PRECISIONS, RunSpec
from diffvit.protocol import ARMS, LIKE_CLASSIC, Protocol, images_in_steps, protocol_of
from diffvit.user_models import changed_note

if TYPE_CHECKING:
    from diffvit.vit import VisionTransformer


@dataclass(frozen=True)
class PlannedRun:
    """A run and its cost.

    Attributes:
        run_id: None where the data are not at hand to take their fingerprint.
        forward_flops: of one image.
        train_flops: of the whole run: three forward passes' worth for each training image (one forward, one backward of twice that),
            one for each image of the validation batches, of the final validation and test, and for each false label.
        status: of a run that has ended: "done" or "diverged".
        elsewhere: of a run that has ended, or else begun, in another precision only: "done in bf16". In its own it is still to be trained.
    """

    spec: RunSpec
    run_id: str | None
    parameters: int
    forward_flops: int
    steps: int
    train_flops: float
    status: str | None
    elsewhere: str | None

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.status is not None


def plan_runs(specs: Iterable[RunSpec], checkpoints: Path, fingerprints: dict[str, str]) -> list[PlannedRun]:
    """The runs in the given order, with costs from models built without memory.

    Args:
        fingerprints: data set -> fingerprint, of the data sets at hand.

    Raises:
        UserError: a damaged result file.
    """
    return [_plan(spec, checkpoints, fingerprints.get(spec.dataset)) for spec in specs]


def _plan(spec: RunSpec, checkpoints: Path, fingerprint: str | None) -> PlannedRun:
    protocol = spec.protocol
    parameters, forward = _model_cost(*_model_key(spec))
    steps = protocol.total_steps()
    run_ids = run_ids_of(spec, fingerprint) if fingerprint else {}
    # Its own precision first: other results are read only where that has none.
    results = ((precision, read_result(RunFiles.of(checkpoints, spec, run_id).result)) for precision, run_id in run_ids.items())
    precision, result = next((each for each in results if each[1]), (None, None))
    status = result.status if result and precision == spec.precision else None
    begun = [each for each, run_id in run_ids.items() if not result and (checkpoints / ".state" / run_id).is_dir()]
    elsewhere = f"{result.status} in {precision}" if result and not status else None
    if begun and spec.precision not in begun:
        elsewhere = f"begun in {begun[0]}"
    run_id, work = run_ids.get(spec.precision), forward * _image_passes(protocol, steps)
    return PlannedRun(spec, run_id, parameters, forward, steps, work, status, elsewhere)


def run_ids_of(spec: RunSpec, fingerprint: str) -> dict[str, str]:
    """Precision -> the run_id that the run has in it, its own first."""
    return {each: dataclasses.replace(spec, precision=each).run_id(fingerprint) for each in (spec.precision, *PRECISIONS)}


def absent_data_notes(runs: Sequence[PlannedRun]) -> list[str]:
    """A sentence where run_ids are unknown, because they depend on data."""
    absent = ", ".join(dict.fromkeys(run.spec.dataset for run in runs if run.run_id is None))
    return [f"{absent}: data not here, so which of these runs are done cannot be seen"] if absent else []


def precision_notes(runs: Sequence[PlannedRun]) -> list[str]:
    """A sentence for each other precision in which runs have ended."""
    own = runs[0].spec.precision if runs else ""
    return [
        f"{count} runs are {elsewhere}; in {own} they are trained anew, --precision {elsewhere.split()[-1]} keeps to those"
        for elsewhere, count in Counter(run.elsewhere for run in runs if run.elsewhere).items()
    ]


def model_notes(runs: Sequence[PlannedRun], checkpoints: Path) -> list[str]:
    """A sentence for each architecture whose code has changed since runs of it, and for each that is not as large as the classic one."""
    notes = []
    for model in dict.fromkeys(run.spec.model for run in runs):
        if note := changed_note(checkpoints, model):
            notes.append(note)
        worst = max((run for run in runs if run.spec.model == model), key=lambda run: abs(_larger(run)))
        if abs(_larger(worst)) > LIKE_CLASSIC:
            cell = f"{worst.spec.dataset} {worst.spec.size}"
            notes.append(
                f"at {cell} {model} has {100 * _larger(worst):+.1f} % parameters against the classic model: sizes are not equal; "
                "mlp_hidden can make them so"
            )
    return notes


def _larger(run: PlannedRun) -> float:
    """By which share a run's model is larger than the classic one of its cell."""
    return run.parameters / _model_cost(*_model_key(dataclasses.replace(run.spec, model=ARMS[0])))[0] - 1


def model_of(spec: RunSpec) -> VisionTransformer:
    """The run's model, without memory."""
    return _model_of(*_model_key(spec))


_ModelKey = tuple[str, str, str, tuple[tuple[str, Any], ...]]


def _model_key(spec: RunSpec) -> _ModelKey:
    """What decides the model: not all of a protocol, so that many runs share one."""
    own = {name: value for name, value in spec.overrides.items() if name in ("dropout", "heads", "patch_size", "image_size")}
    return spec.model, spec.size, spec.dataset, tuple(sorted(own.items()))


@functools.cache
def _model_of(model: str, size: str, dataset: str, own: tuple[tuple[str, Any], ...]) -> VisionTransformer:
    from diffvit.vit import build_model

    return build_model(model, size, protocol_of(dataset).with_overrides(dict(own)), device="meta")


@functools.cache
def _model_cost(*key: Any) -> tuple[int, int]:
    model = _model_of(*key)
    return model.count_parameters(), model.estimate_flops()


def _image_passes(protocol: Protocol, steps: int) -> float:
    """Forward passes' worth of work in a run of `steps`, in images."""
    train, val, test = protocol.images
    trained = images_in_steps(train, protocol.batch_size, steps)
    return 3 * trained + images_in_steps(val, protocol.batch_size, steps) + val + test + protocol.false_labels()


def load_fingerprints(specs: Iterable[RunSpec], data_root: str | None, required: bool) -> dict[str, str]:
    """Data set -> fingerprint, loading each data set of the runs once.

    Args:
        required: load what is on the hub too; otherwise data sets that are not at hand are left out.

    Raises:
        UserError: a data set cannot be loaded.
    """
    from diffvit.dataset import at_hand, load

    names = dict.fromkeys(spec.dataset for spec in specs)
    return {name: load(name, data_root).fingerprint for name in names if required or at_hand(name, data_root)}


def data_notes(specs: Iterable[RunSpec], data_root: str | None) -> list[str]:
    """What there is to know of each data set of the runs: how it was split, what its classes are. Raises UserError."""
    from diffvit.dataset import load

    return [f"{name}: {note}" for name in dict.fromkeys(spec.dataset for spec in specs) for note in load(name, data_root).notes]


def warmup_warnings(specs: list[RunSpec]) -> list[str]:
    """A sentence for each data set and warm-up that is not shorter than its run."""
    found = dict.fromkeys((spec.dataset, spec.protocol.warmup_warning(spec.protocol.total_steps())) for spec in specs)
    return [f"{dataset}: {warning}" for dataset, warning in found if warning]
