"""The two ceilings of a device, measured: what it computes in a large matrix product, and what it moves in a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.timing import wait_for


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of matrix products in a dtype, and bytes/s between the chip and its memory."""

    flops: float
    bandwidth: float

    def least_seconds(self, flops: float, nbytes: float) -> float:
        """What work takes at least."""
        return max(flops / self.flops, nbytes / self.bandwidth)

    def __str__(self) -> str:
        return f"ceilings measured here: {self.flops / 1e12:.4g} TFLOP/s, {self.bandwidth / 1e9:.4g} GB/s"


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several sizes and repeats."""
    gpu = device.type == "cuda"
    best = 0.0
    for n in (4096, 8192) if gpu else (1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        best = max(best, 2 * n**3 / _best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device))  # type: ignore[misc]
    source = torch.ones(2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(best, 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device))


def _best_seconds(action: Callable[[], object], device: torch.device, repeats: int = 12) -> float:
    seconds = []
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        action()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
