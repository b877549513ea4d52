"""Shared by all tests: small runs, real data where it is at hand, and no traces outside the test's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Beside the checkout; a test that needs it is skipped, visibly, where it is missing.
SHARED = Path(os.environ.get("DIFFVIT_SHARED") or Path(__file__).resolve().parents[2] / "shared")

needs_cifar = pytest.mark.skipif(
    not (SHARED / "data/uoft-cs/cifar100").is_dir(), reason="the real CIFAR-100 is not at ../shared/data/uoft-cs/cifar100"
)
needs_tissue = pytest.mark.skipif(not (SHARED / "data/breakhis").is_dir(), reason="real tissue images are not at ../shared/data/breakhis")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster, account or data folder of the user's; always the same number of threads."""
    for name in ("RAY_ADDRESS", "HF_TOKEN", "HF_REPOSITORY", "DIFFVIT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data_root() -> str:
    """A data root with the real CIFAR-100."""
    return str(SHARED / "data")
