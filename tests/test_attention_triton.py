"""The Triton kernels: under the interpreter against the equation, compiled for GPUs that are not here, and where they are offered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import HERE, environment, run_interpreted

from diffvit import compute
from diffvit.kernels import forms as differential_forms
from diffvit.kernels.forms import CANDIDATES, FORMS, usable
from diffvit.protocol import PROTOCOLS
from diffvit.vit import build_model
from diffvit.vit_classic import Attention
from diffvit.vit_differential import DifferentialAttention

pytest.importorskip("triton")

from diffvit.kernels import fused_triton
from diffvit.kernels.attention_triton import _LEAST_BLOCK, KERNELS, configs

H100 = torch.device("cuda")
# A block's shared memory at most: CUDA C programming guide, table of compute capabilities.
SHARED_KB = {80: 163, 89: 99, 90: 227}


@pytest.mark.slow
def test_the_kernels_are_the_equation_under_the_interpreter(tmp_path: Path) -> None:
    run_interpreted("triton_interpreted.py", tmp_path)


@pytest.mark.slow
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    parts = min(os.cpu_count() or 1, 8)
    started = [
        subprocess.Popen(
            [sys.executable, HERE / "triton_compiled.py", str(part), str(parts)],
            env=environment(TRITON_CACHE_DIR=str(tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(parts)
    ]
    outputs = [process.communicate(timeout=500) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-8000:]
    kernels = [json.loads(line) for out, _ in outputs for line in out.splitlines()]
    names = {*KERNELS, *fused_triton.KERNELS}
    assert {(k["kernel"], k["target"]) for k in kernels} == {(name, target) for name in names for target in SHARED_KB}
    assert {(k["head_dim"], k["maps"]) for k in kernels if k["kernel"] in KERNELS} == {(w, m) for w in (16, 32, 64) for m in (1, 2)}
    assert {k["d_model"] for k in kernels if k["kernel"] not in KERNELS} == {256, 384}
    # Which tiles spill a value or two differs from compiler to compiler; of each kernel there is one that spills nothing.
    least: dict[tuple[Any, ...], int] = {}
    for kernel in kernels:
        case = tuple(kernel.get(name) for name in ("kernel", "dtype", "head_dim", "maps", "d_model", "target"))
        least[case] = min(kernel["stack"], least.get(case, 10_000))
    spilling = [case for case, stack in least.items() if stack]
    assert not spilling, "\n".join(map(str, spilling))
    much = [kernel for kernel in kernels if kernel["target"] == 90 and kernel["stack"] > 64]
    assert not much, "\n".join(map(str, much))
    too_large = [kernel for kernel in kernels if kernel["shared"] > SHARED_KB[kernel["target"]] * 1024]
    assert not too_large, "\n".join(map(str, too_large))


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.usefixtures("ampere")
def test_where_the_kernels_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def offered(dtype: torch.dtype = torch.bfloat16, width: int = 32, device: torch.device = H100) -> bool:
        """The same of both architectures."""
        classic = Attention(4 * width, 4, 0, 0.0).forms(device, dtype)
        differential = DifferentialAttention(4 * width, 4, 0, 0.0).forms(device, dtype)
        assert differential == usable(CANDIDATES, device, dtype, width)
        assert classic[0] == "sdpa" and differential[:3] == ["two_calls", "padded", "four_calls"]
        assert ("triton" in classic) == ("triton" in differential)
        return "triton" in classic

    assert all(offered(dtype, width) for dtype in (torch.bfloat16, torch.float16) for width in (16, 32, 64))
    assert not offered(width=128) and not offered(width=24) and not offered(torch.float64)
    assert not offered(device=torch.device("cpu")) and not offered(device=torch.device("mps"))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert offered(torch.float32) and not offered(torch.float32, 64)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert not offered(torch.float32) and offered()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not offered()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not offered()


@pytest.mark.usefixtures("ampere")
def test_where_there_is_a_kernel_all_three_have_block_sizes() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for width in (8, 16, 32, 64, 128):
            for maps in (1, 2):
                offered = {bool(configs(kernel, width, maps, dtype)) for kernel in KERNELS}
                assert min((config.kwargs["BLOCK_Q"] for config in configs("queries", width, maps, dtype)), default=99) >= _LEAST_BLOCK
                assert offered == {width in {torch.float64: (), torch.float32: (16, 32)}.get(dtype, (16, 32, 64))}


@pytest.mark.usefixtures("ampere")
def test_without_triton_the_other_forms_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffvit.kernels.attention_triton", None)
    assert usable(CANDIDATES, H100, torch.bfloat16, 32) == ["two_calls", "padded", "four_calls"]
    assert Attention(128, 4, 0, 0.0).forms(H100, torch.bfloat16) == ["sdpa"]


def test_a_form_that_fails_is_left_out_and_one_that_is_not_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    def failing(error: Exception) -> differential_forms.Form:
        def form(*_: object) -> torch.Tensor:
            raise error

        return form

    class Odd(CompileTimeAssertionFailure):
        def __init__(self) -> None:
            Exception.__init__(self, "no source line")

    two_calls = FORMS["two_calls"]
    monkeypatch.setitem(FORMS, "padded", failing(OutOfResources(1, 0, "shared memory")))
    monkeypatch.setitem(FORMS, "four_calls", failing(PTXASError("no ptxas")))
    monkeypatch.setitem(FORMS, "blocks", failing(Odd()))
    monkeypatch.setitem(FORMS, "maps", lambda qkv, heads, lambda_full: two_calls(qkv, heads, 1.1 * lambda_full))
    forms = ["two_calls", *(form for form in FORMS if form != "two_calls")]
    model = build_model("vit_differential", "0.1M", PROTOCOLS["digits"])
    model.initialise(0)
    assert list(compute.measure_forms(model, forms, 2, "fp32", repeats=1)) == ["two_calls"]


def test_the_form_says_that_a_cpu_has_no_kernels() -> None:
    for lambda_full in (None, torch.tensor(0.5)):
        with pytest.raises(ValueError, match="no Triton kernels"):
            FORMS["triton"](torch.zeros(1, 3, 3, 64), 4, lambda_full)
