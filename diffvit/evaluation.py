"""Accuracy and loss of a model on a split, one row an image."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.data.batches import Prepare, make_loader
from diffvit.data.near_duplicates import near_duplicates
from diffvit.dataset import Dataset, ImageSet, load
from diffvit.errors import UserError
from diffvit.ledger.disk import listed
from diffvit.ledger.files import files_of_weights, listing_hint, model_folders
from diffvit.ledger.results import read_result
from diffvit.ledger.spec import overrides_text
from diffvit.ledger.weights import load_weights, read_header
from diffvit.machine.device import autocast
from diffvit.protocol import protocol_of
from diffvit.user_models import other_versions
from diffvit.vit import VisionTransformer


@dataclass(frozen=True)
class Evaluation:
    """A model's answers, one an image; all fields are [images].

    Attributes:
        losses: cross-entropy in nats. probabilities: of the true label. confidences: of the predicted label.
        briers: squared distance of all probabilities to the true label's 1 and the others' 0, from 0 to 2 (Brier 1950).
        duplicates: True where the image has a near-duplicate among the training images (see data/near_duplicates.py).
    """

    labels: Tensor
    predicted: Tensor
    losses: Tensor
    probabilities: Tensor
    confidences: Tensor
    briers: Tensor
    duplicates: Tensor

    @property
    def accuracy(self) -> float:
        """Share of images classified correctly, 0 to 1."""
        return (self.labels == self.predicted).double().mean().item()

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes that have images of the share of right answers."""
        return balanced_accuracy(self.labels.numpy(), self.predicted.numpy())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.losses.double().mean().item()

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """For each class: images, accuracy and loss; both None where the class has no image."""
        rows = []
        for label, name in enumerate(classes):
            of_class = self.labels == label
            right = (self.predicted[of_class] == label).double()
            losses = self.losses[of_class].double()
            seen = int(of_class.sum())
            rows.append(
                {
                    "class": name,
                    "images": seen,
                    "accuracy": right.mean().item() if seen else None,
                    "loss": losses.mean().item() if seen else None,
                }
            )
        return rows

    def to_csv(self) -> str:
        """One row an image, in the split's order."""
        numbers = torch.stack([self.losses, self.probabilities, self.confidences, self.briers], dim=1).tolist()
        answers = zip(self.labels.tolist(), self.predicted.tolist(), numbers, self.duplicates.int().tolist(), strict=True)
        rows = (
            f"{i},{label},{guess},{','.join(f'{n:.9g}' for n in row)},{double}\n" for i, (label, guess, row, double) in enumerate(answers)
        )
        return "image,label,predicted,loss,probability,confidence,brier,near_duplicate\n" + "".join(rows)


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur of the share of right answers: what a constant answer gets is 1 / classes."""
    return float(np.mean([(predicted[labels == label] == label).mean() for label in np.unique(labels)]))


def majority_share(labels: np.ndarray) -> float:
    """The accuracy of answering every image with the commonest class."""
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


@torch.no_grad()  # with inference_mode, compiled blocks would be compiled once more
def evaluate(
    model: nn.Module,
    images: ImageSet,
    *,
    prepare: Prepare,
    batch_size: int,
    precision: str = "fp32",
) -> Evaluation:
    """Classify all images on the model's device. Whether the model was in training mode is left as it was."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts, duplicates = [], []
    for pixels, labels in make_loader(images, batch_size=batch_size):
        duplicates.append(near_duplicates(pixels))
        labels = labels.to(device)
        with autocast(device, precision):
            logits = model(prepare(pixels)).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        shares = logits.softmax(1)
        briers = (shares - F.one_hot(labels, shares.shape[1])).square().sum(1)
        columns = (labels, logits.argmax(1), losses, (-losses).exp(), shares.amax(1), briers)
        parts.append(torch.stack([column.double() for column in columns]).cpu())
    model.train(was_training)
    labels, predicted, losses, probabilities, confidences, briers = torch.cat(parts, dim=1)
    return Evaluation(labels.long(), predicted.long(), losses, probabilities, confidences, briers, torch.cat(duplicates))


class _Candidate(NamedTuple):
    """A checkpoint, and its header's facts."""

    path: Path
    facts: dict[str, Any]

    @property
    def overrides(self) -> dict[str, Any]:
        """Its protocol values that are not the data set's own."""
        usual, own = protocol_of(self.facts["dataset"]), self.facts["protocol"]
        values = {each.name: getattr(own, each.name) for each in dataclasses.fields(own)}
        return {name: value for name, value in values.items() if value != getattr(usual, name)}

    def __str__(self) -> str:
        files = files_of_weights(self.path)
        overrides = overrides_text(self.overrides) or "no overrides"
        result = None
        with contextlib.suppress(UserError):  # `list --verify` says what is damaged
            result = read_result(files.result)
        ended = f"ended {result.finished}" if result else "without a result"
        names = " ".join(str(self.facts[name]) for name in ("model", "size", "dataset"))
        return f"{files.run_id}: {names} seed {self.facts['seed']}, {overrides}, {self.facts['precision']}, {ended}"


def find_checkpoint(
    checkpoints: Path, model: str | None, size: str | None, dataset: str | None, *, run_id: str | None = None, seed: int | None = None,
    overrides: Mapping[str, Any] | None = None, on_choice: Callable[[str], None] = lambda text: None,
) -> Path:  # fmt: skip
    """Find the weights of one run. Of several that match, prefer those without further overrides, and of these seed 0.

    Args:
        run_id: or its beginning. overrides: protocol values that it was trained with. None matches anything, for all arguments.
        on_choice: called with a sentence where one of several was chosen.

    Raises:
        UserError: no run matches, or several are equally good.
    """
    name = f"model_{escape(run_id or '')}*_{size or '*'}_{dataset or '*'}.safetensors"
    folders = [folder for folder in model_folders(checkpoints) if model in (None, folder.name)]
    paths = [path for folder in folders for path in listed(folder) if path.match(name)]
    candidates, damaged = [], []
    for path in paths:
        try:
            candidates.append(_Candidate(path, read_header(path)))
        except UserError as error:  # another one may be meant
            damaged.append(error)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    matches = [
        candidate for candidate in candidates
        if seed in (None, candidate.facts["seed"])
        and all(getattr(candidate.facts["protocol"], key) == value for key, value in given.items())
    ]  # fmt: skip
    asked = {"run_id": run_id, "seed": seed, **given}
    which = " ".join([*filter(None, (model, size, dataset)), *(f"{key} {value}" for key, value in asked.items() if value is not None)])
    if damaged and not matches:
        raise damaged[0]
    if not matches:
        hint = listing_hint(checkpoints) if not candidates else "\n  ".join(["there are:", *map(str, candidates)])
        if not candidates and (others := other_versions(checkpoints, model or "")):
            hint = f"its file has changed since {' and '.join(others)} was trained, or is another one; --model takes that name too."
        raise UserError(f"there is no checkpoint of {which} in {checkpoints}.", hint)
    best = [each for each in matches if each.overrides.keys() <= given.keys()] or matches
    if run_id:  # the beginning of several chooses none of them
        best = matches
    elif len({overrides_text(each.overrides) for each in best}) == 1:
        best = [each for each in best if each.facts["seed"] == 0] or best
    if len(best) > 1:
        listing = "\n  ".join(map(str, best))
        how = "give more of its run_id" if run_id else "choose one by its seed, its overrides or its --run_id"
        raise UserError(f"{len(best)} runs of {which} match.", f"{how}:\n  {listing}")
    if len(matches) > 1:
        on_choice(f"of {len(matches)} runs that match, {best[0]}")
    return best[0].path


# What decides the cost of an image; the second ones a run may override.
_OF_DATASET, _OF_RUN = ("channels", "classes", "d_model"), ("image_size", "patch_size", "heads")


def open_checkpoint(
    path: Path, data_root: str | Path | None, device: torch.device
) -> tuple[VisionTransformer, dict[str, Any], Dataset, Prepare]:
    """Load a checkpoint: the model on the device, its header's facts, its data set, and how images are prepared. Raises UserError."""
    model, facts = load_weights(path)
    data = load(facts["dataset"], data_root)
    # A header's numbers may fit its tensors and still ask for anything.
    ours, theirs = protocol_of(facts["dataset"]), facts["protocol"]
    if any(getattr(ours, name) != getattr(theirs, name) for name in _OF_DATASET):
        raise UserError(
            f"{path} was made for other images than those of {facts['dataset']}.",
            "evaluate it with the version, or the grid file, that made it.",
        )
    ours.with_overrides({name: getattr(theirs, name) for name in _OF_RUN if getattr(ours, name) != getattr(theirs, name)})
    return model.to(device), facts, data, Prepare(facts["protocol"].image_size, facts["mean"], facts["std"], device)


def evaluate_checkpoint(
    path: Path,
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    device: torch.device,
) -> dict[str, Any]:
    """Measure a checkpoint's accuracy, loss and per-class figures on its test set.

    Raises:
        UserError: the checkpoint or the data are missing or damaged.
    """
    model, facts, data, prepare = open_checkpoint(path, data_root, device)
    outcome = evaluate(model, data.test.head(limit), prepare=prepare, batch_size=batch_size, precision=facts["precision"])
    return {
        "checkpoint": str(path),
        **{key: facts[key] for key in ("run_id", "model", "size", "dataset", "seed")},
        "images": len(outcome.labels),
        "accuracy": outcome.accuracy,
        "balanced_accuracy": outcome.balanced_accuracy,
        "majority_answer": majority_share(outcome.labels.numpy()),
        "loss": outcome.loss,
        "classes": outcome.per_class(facts["classes"]),
        "warnings": data_warnings(facts, data),
    }


def data_warnings(facts: Mapping[str, Any], data: Dataset) -> list[str]:
    """Warnings about testing a model on these data, given its checkpoint's header."""
    if data.fingerprint == facts["fingerprint"]:
        return []
    return ["these data are not those that the model was trained on: test images may have been seen in training"]
