"""What `run.py doctor` checks: does this machine have what a study needs? A line for each check, and what to do about a problem."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvit.errors import DiffvitError, UserError, first_line, redacted
from diffvit.hub.account import find_repository, find_token
from diffvit.keeping.saving import Saving
from diffvit.keeping.storage import open_storage
from diffvit.ledger.disk import check_lockable, check_writable
from diffvit.machine.caches import cache_folder
from diffvit.machine.host import cpus, memory_bytes
from diffvit.protocol import PROTOCOLS
from study.cluster.connect import find_cluster
from study.text import columns

# The weights, states and log of one 50B run take about 1.5 GB, the decoded images of the full grid under 1 GB.
_LITTLE_DISK = 3e9


@dataclass(frozen=True)
class Check:
    """The outcome of one check: a detail, and where that is a problem, what to do about it."""

    name: str
    ok: bool
    detail: str
    hint: str | None = None


def diagnose(checkpoints: Path, data_root: str | None, address: str | None, saving: Saving) -> list[Check]:
    """Check everything; what fails ends no other check. Nothing but a test object in the storage is written, and that goes again.

    Args:
        address: of a Ray cluster, as find_address takes it.
    """
    checks: dict[str, Callable[[], str]] = {
        "Python": _python, "machine": lambda: f"{cpus()} CPUs, {memory_bytes() / 2**30:.1f} GiB of memory", "torch": _torch, "GPU": _gpus,
        "Ray": lambda: _ray(address), "checkpoints": lambda: _folder(checkpoints), "cache": lambda: _folder(cache_folder()),
        "file locks": lambda: _locks(checkpoints), "hub": _credentials, "data": lambda: _data(data_root),
        "storage": lambda: _storage(saving),
    }  # fmt: skip
    return [_outcome(name, check) for name, check in checks.items()]


def _outcome(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, redacted(check()))
    except DiffvitError as error:
        return Check(name, False, error.message.rstrip("."), error.hint)
    except Exception as error:  # whatever is wrong with a package is found out here
        return Check(name, False, redacted(f"{type(error).__name__}: {first_line(error)}"), "delete .venv and run `uv sync`.")


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        raise UserError(f"this is Python {platform.python_version()}, and 3.11 to 3.13 are supported.", "set UV_PYTHON=3.11; `uv sync`.")
    return f"{platform.python_version()} ({sys.executable})"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, " + (f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA")


def _gpus() -> str:
    """GPUs, their memory, and whether one computes."""
    import torch

    from diffvit.machine.device import default_precision, device_memory, device_title

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            raise UserError(
                "there is an NVIDIA driver, and torch sees no GPU.", "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and that torch has CUDA."
            )
        return "none: runs train on the CPUs"
    gpus = []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device)).sum().item()  # a build without its architecture fails here
        free, memory = torch.cuda.mem_get_info(device)[0], device_memory(device)
        if free < memory / 2:
            raise UserError(
                f"of the {memory / 2**30:.0f} GiB of {device} ({device_title(device)}), {free / 2**30:.0f} are free.",
                "end what else uses it: `nvidia-smi` names the processes.",
            )
        gpus.append(f"{device_title(device)}, {memory / 2**30:.0f} GiB, {default_precision(device)}")
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", ""), "gcc", "clang") if compiler):
        raise UserError("there is no C compiler, which Triton's kernels need.", "install gcc (Debian: apt-get install g++).")
    return "; ".join(gpus)


def _ray(address: str | None) -> str:
    import ray

    chosen = find_cluster(address)
    return f"{ray.__version__}, " + ("no cluster here: a study starts its own" if chosen == "local" else f"a cluster answers at {chosen}")


def _folder(folder: Path) -> str:
    nearest = _existing(folder)
    check_writable(nearest)
    free = shutil.disk_usage(nearest).free
    if free < _LITTLE_DISK:
        raise UserError(f"the disk of {folder} has {free / 1e9:.1f} GB left.", "make room, or choose another folder.")
    return f"{folder}, {free / 1e9:,.0f} GB free"


def _locks(checkpoints: Path) -> str:
    check_lockable(_existing(checkpoints))
    return f"work in {checkpoints}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: where it would be made."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _credentials() -> str:
    repository = find_repository()
    token = "HF_TOKEN is set" if find_token() else "no HF_TOKEN; only --upload, upload, download and private data need one"
    return token + (f"; HF_REPOSITORY is {repository}" if repository else "; no HF_REPOSITORY")


def _data(data_root: str | None) -> str:
    from diffvit.data.hub import is_cached
    from diffvit.dataset import at_hand, hub_name

    places: dict[str, list[str]] = {}
    for name in PROTOCOLS:
        on_hub = hub_name(name)
        if at_hand(name, data_root):
            place = "in the data folder" if on_hub else "built in"
        else:
            place = "downloaded" if on_hub and is_cached(on_hub) else "not here: downloaded from the hub when first used"
        places.setdefault(place, []).append(name)
    return "; ".join(f"{', '.join(names)} {place}" for place, names in places.items())


def _storage(saving: Saving) -> str:
    if not saving.storage:
        return "none given; without one, what a lost machine had is lost"
    if "://" not in saving.storage and not Path(saving.storage).is_dir():
        check_writable(_existing(Path(saving.storage)))
        return f"{saving.storage} is not there yet; a study makes it"
    open_storage(saving.storage).check()
    return f"{saving.storage} can be written and read"


def diagnosis_text(checks: list[Check]) -> str:
    """A line a check, and below a problem what to do."""
    rows = columns([("ok" if check.ok else "PROBLEM", check.name, check.detail) for check in checks]).splitlines()
    lines = [line for row, check in zip(rows, checks, strict=True) for line in (row, *([f"         {check.hint}"] if check.hint else []))]
    problems = sum(not check.ok for check in checks)
    return "\n".join([*lines, f"{problems} problem{'s' if problems != 1 else ''}"])


def diagnosis_json(checks: list[Check]) -> list[dict[str, Any]]:
    """The checks as JSON has them."""
    return [dataclasses.asdict(check) for check in checks]
