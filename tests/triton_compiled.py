"""Compiles the Triton kernels for GPUs that need not be there; run by test_attention_triton.py.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from diffvit.kernels import attention_triton, fused_triton

# Head dimension: tokens and heads; the last two are the study's.
SHAPES = {16: (257, 4), 32: (785, 8), 64: (1025, 6)}
# TF32 is for who asks for it.
TARGETS = {torch.bfloat16: (80, 89, 90), torch.float16: (90,), torch.float32: (90,)}


def whole(target: int, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether all sizes of tiles are compiled, not just one of each kind.

    What fits into the shared memory of 8.9 fits into that of 8.0, bf16 and fp16 differ in the names of instructions alone, and heads of
    16 are of a toy.
    """
    return target != 80 and dtype != torch.float16 and head_dim != 16


class Absent:
    """A driver for a GPU that is not there."""

    capability = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(work: Callable[[], object]) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that some work starts, each with its arguments. None is run: there is no GPU."""
    found: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: str, *key: Any):
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: found.append((self.kernel, args, kwargs))

    real = attention_triton._tuned, fused_triton._tuned, attention_triton.supported
    attention_triton._tuned, fused_triton._tuned, attention_triton.supported = Recorder, Recorder, lambda *about: True
    try:
        work()
    finally:
        attention_triton._tuned, fused_triton._tuned, attention_triton.supported = real
    return found


def attention(dtype: torch.dtype, head_dim: int, maps: int) -> None:
    tokens, heads = SHAPES[head_dim]
    qkv_BN3D = torch.zeros(2, tokens, 3, heads * head_dim, dtype=dtype)
    lambda_full = torch.tensor(0.5) if maps == 2 else None
    results = attention_triton._attend(qkv_BN3D, lambda_full, None, heads, True)
    attention_triton._attend_backward(torch.empty_like(results[0]), qkv_BN3D, lambda_full, heads, True, *results)


def fused(dtype: torch.dtype, d_model: int) -> None:
    """Forward and backward of all of them, as both data sets of the study need them."""
    stream_BND, key = torch.zeros(2, 785, d_model), torch.zeros(3, dtype=torch.int64)
    branch_BND, bias_D, bias_H, p = stream_BND.to(dtype), torch.zeros(d_model), torch.zeros(4 * d_model), 0.2
    weight_HD = torch.zeros(4 * d_model, d_model, dtype=dtype)
    _, u_BNH = fused_triton._linear_gelu_dropout(branch_BND, weight_HD, bias_H, key, 1, p, True)
    fused_triton._linear_gelu_dropout_backward(branch_BND, weight_HD.mT.contiguous(), u_BNH, bias_H, key, 1, p)
    total_BND, normed_BND, *sums = fused_triton._residual_norm(stream_BND, branch_BND, bias_D, bias_D, bias_D, key, 1, p, 1e-6)
    fused_triton._residual_norm_backward(total_BND, normed_BND, total_BND, *sums, bias_D, key, 1, p)
    heads_BNPV = branch_BND.unflatten(-1, (-1, 64))
    fused_triton.head_norm(heads_BNPV, torch.zeros(64), 1e-5, 0.8)
    fused_triton._head_norm_backward(heads_BNPV, heads_BNPV, torch.zeros(64), 1e-5, 0.8)
    fused_triton.dropout(stream_BND, key, 1, p)


def kernels() -> Iterator[tuple[dict[str, Any], JITFunction, tuple[Any, ...], dict[str, Any], int]]:
    """What is told of a kernel, the kernel, its arguments with a tile size, and for which compute capability."""
    for dtype, targets in TARGETS.items():
        for head_dim in SHAPES:
            for maps in (1, 2):
                for name, args, kwargs in launches(lambda: attention(dtype, head_dim, maps)):  # noqa: B023 (called at once)
                    for number, config in enumerate(attention_triton.configs(name, head_dim, maps, dtype)):
                        about = {"kernel": name, "dtype": str(dtype), "head_dim": head_dim, "maps": maps, "config": str(config)}
                        for target in targets:
                            if not number or whole(target, dtype, head_dim):
                                yield about, attention_triton.KERNELS[name], args, kwargs | config.all_kwargs(), target
    for d_model in (256, 384):
        for name, args, kwargs in launches(lambda: fused(torch.bfloat16, d_model)):  # noqa: B023
            for number, config in enumerate(fused_triton.CONFIGS[name]):
                about = {"kernel": name, "d_model": d_model, "config": str(config)}
                for target in TARGETS[torch.bfloat16] if d_model == 256 else (90,):
                    if not number or whole(target, torch.bfloat16, 64):
                        yield about, fused_triton.KERNELS[name], args, kwargs | config.all_kwargs(), target


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
    for number, (about, kernel, args, options, target) in enumerate(kernels()):
        if number % parts != part:
            continue
        absent.capability = target
        compiled = kernel.warmup(*args, grid=(1,), **options)
        print(json.dumps(about | {"target": target} | needs(compiled)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
