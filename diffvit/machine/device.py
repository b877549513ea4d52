"""The device that a run trains on: its choice, name, precision and memory."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import diffvit
from diffvit.errors import UserError
from diffvit.machine.host import memory_bytes


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, for a run's result. No part of its identity."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffvit": diffvit.__version__}
    return {
        "device": device.type,
        "device_name": device_title(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "git_commit": _git_commit(),
    }


def device_title(device: torch.device) -> str:
    """The product name of a GPU, or of the machine's CPU."""
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
    """bf16 on a GPU that has it, fp16 where its tensor cores have nothing else (V100, T4), else fp32: CPUs are slow in either."""
    if device.type != "cuda":
        return "fp32"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"


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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass runs at a precision."""
    return torch.autocast(device.type, dtype=autocast_dtype(precision), enabled=is_half(precision))


def autocast_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products at a precision."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def is_half(precision: str) -> bool:
    """Whether matrix products take numbers of 16 bits."""
    return precision != "fp32"


def set_matmul_precision(precision: str) -> None:
    """Set how a GPU computes fp32 products: in full fp32 in an fp32 run, else in TF32 where it has that."""
    torch.set_float32_matmul_precision("high" if is_half(precision) else "highest")
    torch.backends.cudnn.allow_tf32 = is_half(precision)


def device_memory(device: torch.device) -> int:
    """Bytes of memory: all of a GPU's, or as much of the machine's as this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes()
