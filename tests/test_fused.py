"""The fused kernels: under Triton's interpreter against fp64 and the plain blocks, and where they are offered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interpreted import run_interpreted
from torch import Tensor

from diffvit.compute import Chosen, Compute, choose
from diffvit.kernels import dropout
from diffvit.kernels.dropout import Dropout, has_kernels
from diffvit.protocol import PROTOCOLS
from diffvit.vit import build_model

pytest.importorskip("triton")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    has_kernels.cache_clear()
    yield
    has_kernels.cache_clear()


@pytest.mark.slow
def test_the_fused_kernels_are_right_under_the_interpreter(tmp_path: Path) -> None:
    run_interpreted("fused_interpreted.py", tmp_path)


def test_where_the_kernels_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def offered(width: int = 64, device: torch.device = GPU, capability: tuple[int, int] = (8, 0), hip: str | None = None) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        has_kernels.cache_clear()
        return has_kernels(device, width)

    assert offered() and offered(8) and offered(384) and offered(capability=(9, 0))
    assert not offered(20) and not offered(capability=(7, 5)) and not offered(hip="6.4")
    assert not offered(device=CPU) and not offered(device=torch.device("mps"))


def test_without_triton_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffvit.kernels.fused_triton", None)
    assert not has_kernels(GPU, 64)


def test_a_cpu_draws_masks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that a CPU only has in tests are not asked for while it trains."""
    monkeypatch.setattr(dropout, "has_kernels", lambda *_: pytest.fail("asked"))
    assert 0 < (Dropout(0.5)(torch.ones(100)) > 0).sum() < 100


@pytest.mark.parametrize("fails", ["no kernels", "it breaks"])
def test_where_blocks_cannot_be_fused_they_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    if fails == "it breaks":
        monkeypatch.setattr("diffvit.compute.has_kernels", lambda *_: True)
    model = build_model("vit_differential", "0.1M", PROTOCOLS["digits"])
    model.initialise(0)
    images = torch.randn(2, 1, 8, 8)
    expected: Tensor = model(images)
    chosen = choose(model, 2, "fp32", Compute(fused=True))
    assert chosen == Chosen("maps", compile_seconds=chosen.compile_seconds, notes=chosen.notes) and not model.fused and model.training
    assert chosen.notes[0].startswith("fused blocks does not work here and is left out: ")
    assert torch.equal(model(images), expected)
