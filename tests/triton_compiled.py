"""Compiles Triton kernels of differential_triton.py for GPUs that need not be there; run by test_differential_triton.py.

    python triton_compiled.py PART PARTS

Every PARTS-th kernel, beginning with PART, is compiled with the very arguments that the operators start it with, and what it
needs is printed: one JSON object a line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from diffvit import differential_triton

# Head dimension: tokens and pairs of heads; the last two are the study's.
SHAPES = {16: (257, 2), 32: (785, 4), 64: (1025, 3)}
# bf16 and fp16 differ in the names of instructions alone: of fp16, one kernel of a kind is enough.
TARGETS = {torch.bfloat16: (80, 89, 90), torch.float16: (90,), torch.float32: (80, 89, 90)}


class Absent:
    """A driver for a GPU that is not there."""

    capability = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(dtype: torch.dtype, head_dim: int) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that forward and backward start each kernel with."""
    found = {}

    class Recorder:
        def __init__(self, kernel: str, *key: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: found.setdefault(self.kernel, (args, kwargs))

    N, P = SHAPES[head_dim]
    qkv_BN3D = torch.zeros(2, N, 3, 2 * P * head_dim, dtype=dtype)
    q_BNPsE, k_BNPsE = qkv_BN3D[:, :, :2].view(2, N, 2, P, 2, head_dim).unbind(2)
    v_BPNV = qkv_BN3D[:, :, 2].view(2, N, P, 2 * head_dim).transpose(1, 2)
    inputs = (q_BNPsE, k_BNPsE, v_BPNV, torch.tensor(0.5).to(dtype))
    # The kernels are for a GPU, which is not here.
    real = differential_triton._tuned, differential_triton.supported
    differential_triton._tuned, differential_triton.supported = Recorder, lambda *about: True
    try:
        results = differential_triton._attend(*inputs, True)
        differential_triton._attend_backward(torch.empty_like(results[0]), *inputs, *results)
    finally:
        differential_triton._tuned, differential_triton.supported = real
    return found


def kernels() -> Iterator[tuple[torch.dtype, int, str, triton.Config, int]]:
    for dtype, targets in TARGETS.items():
        for head_dim in SHAPES:
            for kernel in differential_triton.KERNELS:
                for config in differential_triton.configs(kernel, head_dim, dtype)[: 1 if dtype == torch.float16 else None]:
                    for target in targets:
                        yield dtype, head_dim, kernel, config, target


def needs(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def main(part: int, parts: int) -> None:
    absent = Absent()
    driver.set_active(absent)
    arguments = {}
    for number, (dtype, head_dim, kernel, config, target) in enumerate(kernels()):
        if number % parts != part:
            continue
        if (dtype, head_dim) not in arguments:
            arguments[dtype, head_dim] = launches(dtype, head_dim)
        args, kwargs = arguments[dtype, head_dim][kernel]
        absent.capability = target
        compiled = differential_triton.KERNELS[kernel].warmup(*args, grid=(1,), **kwargs, **config.all_kwargs())
        about = {"kernel": kernel, "dtype": str(dtype), "head_dim": head_dim, "config": str(config), "target": target}
        print(json.dumps(about | needs(compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
