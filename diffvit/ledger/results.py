"""The result of an ended run: its fields, its file, and the columns that tables have of it.

A run ends "done", or "diverged" where a loss or gradient was not a number: then there are only a log and a result.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args, get_type_hints

from diffvit.checks import HEX, NAME, Check, any_of, dict_of, fault, list_of, maybe, one_of, read_json, real, record, text, whole
from diffvit.errors import UserError
from diffvit.ledger.disk import readable, write_atomically
from diffvit.ledger.files import RunFiles, result_paths
from diffvit.ledger.spec import PRECISIONS


class DivergedAt(TypedDict):
    """Where training diverged. A norm that JSON has no number for is text."""

    step: int
    learning_rate: NotRequired[float]
    grad_norm: NotRequired[float | str]
    message: str


_IDENTITY = {
    **dict.fromkeys(("model", "size", "dataset"), text(NAME)), "semantics": whole(), "fingerprint": text(),
    "protocol": dict_of(text(NAME), any_of(one_of(None, True, False), real(), text()), 100),
}  # fmt: skip

# Types with the checks that a file's values must pass.
Name = Annotated[str, text(NAME)]
Text = Annotated[str, text()]
Count = Annotated[int, whole()]
Many = Annotated[int, whole(1, 2**50)]
Amount = Annotated[float, real(0, 1e12)]
Share = Annotated[float, real(0, 1)]
Loss = Annotated[float, real(infinite=True)]  # a model can be lost between its last step and its test
Flag = Annotated[bool, one_of(True, False)]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of an ended run. Fields are in the order of the file; those with a default may be missing there.

    A field's metadata say what it is in tables: "columns", where they are not the field itself, and "after", where it stands elsewhere.

    Attributes:
        overrides: protocol values that replaced the data set's own.
        identity: what decided the result; the run_id is its hash.
        forward_flops: of one image.
        false_labels: training labels that were false; None without label noise.
        memorised, recovered: share of the images with false labels for which the model answers the false label, or the true one.
        train_loss, val_loss_last_batch: of the last step, in nats.
        val_loss, val_accuracy, test_loss, test_accuracy: of the finished model. None where training diverged, as all losses are.
        workers: processes that trained it together.
        micro_batch: images that a process computed at once.
        sha256: name of each of the run's files -> hash.
    """

    run_id: Name
    model: Name
    size: Name
    dataset: Name
    seed: Annotated[int, whole(0, 2**63 - 1)]
    precision: Annotated[str, one_of(*PRECISIONS)] | None = None
    overrides: Annotated[dict[str, Any], dict_of(text(NAME), any_of(one_of(True, False), real(0, 1e9)), 100)]
    identity: Annotated[dict[str, Any], record(_IDENTITY)] = field(metadata={"columns": ("fingerprint",)})
    depth: Annotated[int, whole(1, 1000)] | None = None
    parameters: Many
    forward_flops: Annotated[int, whole(1)] | None = None
    false_labels: Count | None = field(default=None, metadata={"after": "test_images"})
    memorised: Share | None = field(default=None, metadata={"after": "false_labels"})
    recovered: Share | None = field(default=None, metadata={"after": "memorised"})
    status: Annotated[Literal["done", "diverged"], one_of("done", "diverged")] = field(metadata={"after": "run_id"})
    steps: Many
    images: Annotated[int, whole(1)]
    seconds: Amount
    images_per_second: Amount
    train_loss: Loss | None = None
    val_loss_last_batch: Loss | None = None
    val_loss: Loss | None = None
    val_accuracy: Share | None = None
    test_loss: Loss | None = None
    test_accuracy: Share | None
    test_images: Annotated[int, whole(1, 10**8)] | None = None
    diverged: Annotated[DivergedAt, record({"step": whole(), "message": text(longest=10_000)})] | None = field(
        default=None, metadata={"columns": ()}
    )
    workers: Count | None = None
    micro_batch: Count | None = None
    attention: Text | None = None
    fused: Flag | None = None
    graphs: Flag | None = None
    compiled: Flag | None = None
    compile_seconds: Amount | None = field(default=None, metadata={"columns": ()})
    recompute: Flag | None = None
    deterministic: Flag | None = None
    device: Text | None = field(default=None, metadata={"after": "recovered"})
    device_name: Text | None = field(default=None, metadata={"after": "device"})
    threads: Count | None = field(default=None, metadata={"after": "device_name"})
    versions: Annotated[dict[str, str], dict_of(text(NAME), text(), 100)] = field(metadata={"columns": ("python", "torch", "diffvit")})
    git_commit: Text | None = None
    started: Text | None = None
    finished: Text
    notes: Annotated[list[str], list_of(text(longest=10_000))]
    sha256: Annotated[dict[str, str], dict_of(text(), text(HEX), 3)] = field(metadata={"columns": ()})

    @staticmethod
    def of(content: Any) -> Result:
        """The result that a file has. Its names are plain ones, and those of its files are the run's own: they can be used as paths.

        Raises:
            ValueError: it is none; how, as a sentence's end.
        """
        if isinstance(content, dict):
            content = {"status": "done", **content}  # results of versions that knew no other end
        if wrong := fault(_schema(), content):
            raise ValueError(wrong)
        result = Result(**{each.name: content[each.name] for each in fields(Result) if each.name in content})
        if wrong := result._disagreement():
            raise ValueError(wrong)
        return result

    def _disagreement(self) -> str | None:
        """A contradiction between values that are each valid; None where there is none."""
        files = self.files(Path())
        for name in ("model", "size", "dataset"):
            if getattr(self, name) != self.identity[name]:
                return f"it has another {name} in its identity"
        if not set(self.sha256) <= {files.weights.name, files.log.name, files.predictions.name}:
            return "it names files that are not its own"
        measured = (self.train_loss, self.val_loss, self.val_accuracy, self.test_loss, self.test_accuracy, self.test_images)
        if self.status == "done" and None in measured:
            return "it is done and was not measured"
        return None

    def files(self, checkpoints: Path) -> RunFiles:
        """The files of the run."""
        return RunFiles(Path(checkpoints), self.model, self.run_id, self.size, self.dataset)

    def lines(self) -> list[str]:
        """The measurements of a run that is done, as lines of text."""
        assert self.val_accuracy is not None and self.test_accuracy is not None
        pace = f"{self.images_per_second:,.0f}" if self.images_per_second >= 10 else f"{self.images_per_second:.2g}"
        return [
            f"run_id         {self.run_id}",
            f"parameters     {self.parameters:,}",
            f"steps          {self.steps} in {self.seconds:.1f} s, {pace} images/s, {self.device_name}",
            f"train loss     {self.train_loss:.4f} (last batch)",
            f"val loss       {self.val_loss:.4f}, accuracy {100 * self.val_accuracy:.2f} %",
            f"test loss      {self.test_loss:.4f}, accuracy {100 * self.test_accuracy:.2f} % of {self.test_images} images",
        ]

    def content(self) -> dict[str, Any]:
        """The content of its file, without the checksum."""
        return {name: value for name, value in vars(self).items() if name != "diverged" or value is not None}

    @staticmethod
    def columns() -> list[str]:
        """The columns that tables have of a result, in order: identity first, outcome, then where it ran."""
        moved = {each.name: each.metadata["after"] for each in fields(Result) if "after" in each.metadata}
        names = [name for each in fields(Result) if each.name not in moved for name in each.metadata.get("columns", (each.name,))]
        for name, before in moved.items():
            names.insert(names.index(before) + 1, name)
        return names


@functools.cache
def _schema() -> Check:
    """The check of a result file's content."""
    required: dict[str, Check] = {}
    optional: dict[str, Check] = {}
    types = get_type_hints(Result, include_extras=True)
    for each in fields(Result):
        kind = types[each.name]
        of_type = getattr(kind, "__metadata__", None)
        check = of_type[0] if of_type else maybe(get_args(kind)[0].__metadata__[0])
        (required if each.default is MISSING else optional)[each.name] = check
    return record(required, optional)


def write_result(files: RunFiles, result: Result) -> None:
    """Mark a run as ended: all its other files must be on disk."""
    content = result.content()
    write_atomically(files.result, (json.dumps({**content, "checksum": checksum(content)}, indent=1) + "\n").encode())


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 over a file's content, its own checksum left out."""
    text = json.dumps({key: value for key, value in content.items() if key != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# A result is a few kilobytes, findings are below a megabyte.
LONGEST_RESULT = 4 * 1024**2


def read_result(path: Path) -> Result | None:
    """The result in a file, or None where it is missing.

    Raises:
        UserError: it is damaged or cannot be read, or is a link that leads nowhere.
    """
    try:
        return Result.of(_content(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is not a result of diffvit: {error}.", "move it out of the checkpoints folder.") from error


def was_changed(path: Path) -> bool:
    """Whether a result's file is not as it was written: its checksum is another. Errors as read_result has, and FileNotFoundError."""
    content = _content(path)
    return content.get("checksum") != checksum(content)


def _content(path: Path) -> Any:
    try:
        with readable(path):
            return read_json(path, LONGEST_RESULT)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.", "delete it, and the same command trains the run again.") from error


def read_results(checkpoints: Path) -> list[Result]:
    """All ended runs under a checkpoints folder, in order of path. Raises UserError for a damaged one, or one under another's name."""
    results = []
    for path in result_paths(checkpoints):
        if (result := read_result(path)) is not None:
            if result.files(checkpoints).result != path:
                raise UserError(f"{path} has the result of another run.", "move it out of the checkpoints folder.")
            results.append(result)
    return results
