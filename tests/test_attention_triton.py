"""The Triton kernels: under the interpreter against the equation, compiled for GPUs that are not here, and where they are offered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffvit import compute, differential_forms
from diffvit.differential_forms import CANDIDATES, FORMS, usable

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
H100 = torch.device("cuda")
# A block's shared memory at most: CUDA C programming guide, table of compute capabilities.
SHARED_KB = {80: 163, 89: 99, 90: 227}


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return {**kept, "PYTHONPATH": str(HERE.parent), **more}


def test_the_kernels_are_the_equation_under_the_interpreter(tmp_path: Path) -> None:
    # In a process of its own: whether Triton interprets is decided when it is imported.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", str(HERE / "triton_interpreted.py")]
    environment = _environment(TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path), OPENBLAS_NUM_THREADS="1")
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    parts = min(os.cpu_count() or 1, 8)
    started = [
        subprocess.Popen(
            [sys.executable, HERE / "triton_compiled.py", str(part), str(parts)],
            env=_environment(TRITON_CACHE_DIR=str(tmp_path)),
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
    assert {(k["kernel"], k["target"]) for k in kernels} == {(k, t) for k in ("forward", "queries", "keys") for t in SHARED_KB}
    spilling = [kernel for kernel in kernels if kernel["target"] == 90 and kernel["stack"]]
    assert not spilling, "\n".join(map(str, spilling))
    too_large = [kernel for kernel in kernels if kernel["shared"] > SHARED_KB[kernel["target"]] * 1024]
    assert not too_large, "\n".join(map(str, too_large))


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.mark.usefixtures("ampere")
def test_where_the_kernels_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    def offered(dtype: torch.dtype = torch.bfloat16, width: int = 32, device: torch.device = H100) -> bool:
        return "triton" in usable(CANDIDATES, device, dtype, width)

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
def test_without_triton_the_other_forms_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffvit.differential_triton", None)
    assert usable(CANDIDATES, H100, torch.bfloat16, 32) == ["two_calls", "padded", "four_calls"]


def test_a_form_that_fails_is_left_out_and_one_that_is_not_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    def failing(error: Exception) -> differential_forms.Form:
        def form(*_: torch.Tensor) -> torch.Tensor:
            raise error

        return form

    class Odd(CompileTimeAssertionFailure):
        def __init__(self) -> None:
            Exception.__init__(self, "no source line")

    monkeypatch.setitem(FORMS, "padded", failing(OutOfResources(1, 0, "shared memory")))
    monkeypatch.setitem(FORMS, "four_calls", failing(PTXASError("no ptxas")))
    monkeypatch.setitem(FORMS, "blocks", failing(Odd()))
    monkeypatch.setitem(FORMS, "maps", lambda *inputs: 1.1 * FORMS["two_calls"](*inputs))
    forms = ["two_calls", *(form for form in FORMS if form != "two_calls")]
    assert list(compute.measure_forms(forms, torch.device("cpu"), torch.float32, (1, 5, 1, 4), repeats=1)) == ["two_calls"]


def test_the_form_says_that_a_cpu_has_no_kernels() -> None:
    q = torch.zeros(1, 3, 1, 2, 16)
    with pytest.raises(ValueError, match="no Triton kernels"):
        FORMS["triton"](q, q, torch.zeros(1, 1, 3, 32), torch.tensor(0.5))
