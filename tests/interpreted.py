"""Tests of Triton kernels that run in a process of their own: whether Triton interprets is decided when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def environment(**more: str) -> dict[str, str]:
    """This process's, without what it says of Triton."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return {**kept, "PYTHONPATH": str(HERE.parent), **more}


def run_interpreted(file: str, cache: Path) -> None:
    """All tests of a file pass, and none is skipped."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", str(HERE / file)]
    variables = environment(TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(cache), OPENBLAS_NUM_THREADS="1")
    done = subprocess.run(command, cwd=HERE.parent, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout and "deselected" not in done.stdout
