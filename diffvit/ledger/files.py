"""Where a run's files are: checkpoints/{model}/model_{run_id}_{size}_{dataset}, and

.safetensors       the final weights; the header rebuilds the model
_training.log      one line a step
_predictions.csv   one row a test image
_result.json       written last, and atomically: where it is, the run has ended
_evaluations.json  what `run.py evaluate` found out later, by kind
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffvit.checks import NAME
from diffvit.errors import UserError
from diffvit.ledger.disk import listed
from diffvit.ledger.spec import RunSpec


@dataclass(frozen=True)
class RunFiles:
    """Where a run's files lie."""

    checkpoints: Path
    model: str
    run_id: str
    size: str
    dataset: str

    @property
    def stem(self) -> str:
        return f"model_{self.run_id}_{self.size}_{self.dataset}"

    def _path(self, suffix: str) -> Path:
        return self.folder / (self.stem + suffix)

    @property
    def folder(self) -> Path:
        return self.checkpoints / self.model

    @property
    def weights(self) -> Path:
        return self._path(".safetensors")

    @property
    def log(self) -> Path:
        return self._path("_training.log")

    @property
    def predictions(self) -> Path:
        return self._path("_predictions.csv")

    @property
    def evaluations(self) -> Path:
        return self._path("_evaluations.json")

    @property
    def result(self) -> Path:
        return self._path("_result.json")

    @staticmethod
    def of(checkpoints: Path, spec: RunSpec, run_id: str) -> RunFiles:
        return RunFiles(Path(checkpoints), spec.model, run_id, spec.size, spec.dataset)


def files_of_weights(path: Path) -> RunFiles:
    """The files of the run whose checkpoint this is. Raises UserError for a file that is not named as one."""
    parts = path.name.removesuffix(".safetensors").split("_", 3)
    if path.suffix != ".safetensors" or len(parts) != 4 or parts[0] != "model":
        raise UserError(f"{path} is not named as a checkpoint is.", "its name is model_{run_id}_{size}_{dataset}.safetensors.")
    return RunFiles(path.parent.parent, path.parent.name, *parts[1:])


def result_paths(checkpoints: Path) -> list[Path]:
    """The result files under a checkpoints folder, in order of path. Raises UserError for a folder that cannot be read."""
    return [path for folder in model_folders(checkpoints) for path in listed(folder) if path.match("model_*_result.json")]


def model_folders(checkpoints: Path) -> list[Path]:
    """The subfolders that may hold an architecture's runs: no lost+found. Raises UserError for a folder that cannot be read."""
    return [folder for folder in listed(Path(checkpoints)) if re.fullmatch(NAME, folder.name)]


def in_ledger(command: Sequence[str], checkpoints: Path) -> str:
    """A command line of run.py for a ledger."""
    where = [] if checkpoints == Path("checkpoints") else ["--checkpoints", str(checkpoints)]
    return shlex.join(["run.py", *command, *where])


def listing_hint(checkpoints: Path) -> str:
    """What shows which runs a ledger has."""
    return f"`{in_ledger(['list'], checkpoints)}` shows the runs there are."
