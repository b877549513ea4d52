"""How a run is computed: nothing here changes what it computes, beyond rounding and the draws of dropout.

On a GPU the form of differential attention and torch.compile are chosen by measurement, before the run's clock starts; the forms'
times are kept in the cache folder. On a CPU a table says it: docs/performance.md has the evidence.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffvit.dataset import cache_folder
from diffvit.differential_forms import CANDIDATES, differential_attention, usable
from diffvit.evaluation import autocast
from diffvit.ledger import write_atomically
from diffvit.vit import VisionTransformer
from diffvit.vit_differential import DifferentialAttention, set_form


@dataclass(frozen=True)
class Compute:
    """How a run shall be computed.

    Attributes:
        micro_batch: images at once on a process; None: what fits in memory.
        memory_share: the part of the device's memory that the run may use.
        deterministic: on a GPU, the same bits every time (the CPU's always are): nothing is then chosen by measurement.
        compile: torch.compile of the blocks; None: where it is found to be faster, on GPUs only.
        recompute: keep only the blocks' inputs and compute the rest again for the backward pass: a third more arithmetic, and memory
            for one block instead of all.
    """

    micro_batch: int | None = None
    memory_share: float = 1.0
    deterministic: bool = False
    compile: bool | None = None
    recompute: bool = False


DEFAULT_COMPUTE = Compute()


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a run.

    Attributes:
        attention: the form of attention, for the record.
        compile_seconds: what compiling took, outside of the run's clock.
        notes: sentences for the log.
    """

    attention: str
    compiled: bool = False
    compile_seconds: float = 0.0
    notes: tuple[str, ...] = ()


# Images that forms and compiled blocks are tried out with, at most: enough to fill a GPU.
_TRIED_IMAGES = 64


def autocast_dtype(precision: str) -> torch.dtype:
    """What matrix products are computed in at a precision, "fp32" or "bf16"."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def set_matmul_precision(precision: str) -> None:
    """What a GPU does with products that stay fp32: TF32 beside bf16, full fp32 for a run that asks for fp32."""
    torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "bf16"


def choose(model: VisionTransformer, images: int, precision: str, compute: Compute) -> Chosen:
    """Choose the form of attention, and compile the blocks where that is asked for or pays. `model` is on its device.

    Args:
        images: the micro-batch.
    """
    device = model.pos_embed.device
    model.recompute = compute.recompute
    measured = device.type == "cuda" and not compute.deterministic
    notes: list[str] = []
    if measured and (form := _fastest_form(model, images, precision)):
        set_form(model, form)
    attention = model.attention_form(autocast_dtype(precision))
    if not (compute.compile or (compute.compile is None and measured)):
        return Chosen(attention)
    try:
        seconds, gain = _compile(model, min(images, _TRIED_IMAGES), precision)
    except Exception as error:  # compilers fail in many ways; each leaves the blocks as they were
        _undo_compile(model)
        notes.append(
            f"torch.compile does not work here and is left out: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        )
        return Chosen(attention, notes=tuple(notes))
    pays = gain > 1.0
    if compute.compile is None and not pays:
        _undo_compile(model)
    verb = "compiled" if compute.compile or pays else "left as it is, after compiling"
    notes.append(f"{verb} in {seconds:.1f} s: a block is {gain:.2f} times as fast")
    return Chosen(attention, bool(compute.compile or pays), seconds, tuple(notes))


# ---------------------------------------------------------------------------------------------------- forms of attention


def _fastest_form(model: VisionTransformer, images: int, precision: str) -> str | None:
    """The fastest form of differential attention for the model's layers, from the cache or measured now; None without such layers."""
    layer = model.blocks[0].attn
    if not isinstance(layer, DifferentialAttention):
        return None
    device, dtype = model.pos_embed.device, autocast_dtype(precision)
    shape = (min(images, _TRIED_IMAGES), model.tokens, layer.pairs, layer.head_dim)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = f"{name}, torch {torch.__version__}, {dtype}, {'x'.join(map(str, shape))}"
    path = cache_folder() / "attention_forms.json"
    forms = usable(CANDIDATES, device, dtype, layer.head_dim)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        seconds = {form: float(value) for form, value in known[key].items() if form in forms}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        seconds = {}
    if not seconds:
        seconds = measure_forms(forms, device, dtype, shape)
        _remember(path, key, seconds)
    return min(seconds, key=seconds.__getitem__, default=None)


def _remember(path: Any, key: str, seconds: dict[str, float]) -> None:
    """Adds to the cache; a cache that cannot be read is begun again, one that cannot be written is done without."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    try:
        write_atomically(path, json.dumps({**(known if isinstance(known, dict) else {}), key: seconds}, indent=1).encode())
    except OSError:
        return


def measure_forms(
    forms: Iterable[str], device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], repeats: int = 7
) -> dict[str, float]:
    """Median seconds of one forward and backward pass of each form. A form that fails here, or is not exact, is left out.

    Args:
        shape: images, tokens, pairs of heads, head dimension.
    """
    B, N, P, E = shape
    generator = torch.Generator().manual_seed(0)
    qkv_BN3D = torch.randn(B, N, 3, 2 * P * E, generator=generator).to(device, dtype).requires_grad_()
    do_BPNV = torch.randn(B, N, P, 2 * E, generator=generator).to(device, dtype).transpose(1, 2)
    lambda_full = torch.tensor(0.5, device=device, requires_grad=True)

    def run(form: str) -> tuple[Tensor, Tensor]:
        q_BNPsE, k_BNPsE = qkv_BN3D[:, :, :2].view(B, N, 2, P, 2, E).unbind(2)
        out_BPNV = differential_attention(q_BNPsE, k_BNPsE, qkv_BN3D[:, :, 2].view(B, N, P, 2 * E).transpose(1, 2), lambda_full, form)
        return out_BPNV, torch.autograd.grad(out_BPNV, qkv_BN3D, do_BPNV)[0]

    seconds: dict[str, float] = {}
    expected: tuple[Tensor, Tensor] | None = None
    for form in forms:
        try:
            found = run(form)
            expected = expected or found
            exact = all(_distance(a, b) < (2e-2 if dtype == torch.bfloat16 else 1e-4) for a, b in zip(found, expected, strict=True))
            if exact:
                seconds[form] = _median_seconds(lambda form=form: run(form), device, repeats)  # type: ignore[misc]
        except Exception:  # no kernel for it here, no memory, no compiler, or one that fails: in many ways
            continue
    return seconds


def _distance(found: Tensor, expected: Tensor) -> float:
    distance = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    return distance if distance == distance else float("inf")


def _median_seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one call, after two that are not counted."""
    times = []
    for turn in range(repeats + 2):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


# --------------------------------------------------------------------------------------------------------- torch.compile


def _compile(model: VisionTransformer, images: int, precision: str) -> tuple[float, float]:
    """Compiles the blocks, one by one, so that equal ones share their code, and tries two of them out.

    Returns:
        Seconds that compiling took, and how many times as fast a block then is.
    """
    device = model.pos_embed.device
    x_BND, validated_BND = (torch.randn(images, model.tokens, model.pos_embed.shape[-1], device=device) for _ in range(2))
    # Last batches are smaller: one code for batches of all sizes.
    for some_BND in (x_BND, validated_BND) if images > 1 else ():
        torch._dynamo.mark_dynamic(some_BND, 0)
    x_BND.requires_grad_()
    # What earlier runs of this process compiled counts against a limit, beyond which torch silently compiles no more.
    torch.compiler.reset()
    training = model.training

    def work(block: nn.Module) -> None:
        with autocast(device, precision):
            out_BND = block(x_BND)
        torch.autograd.grad(out_BND, [x_BND, *block.parameters()], torch.ones_like(out_BND))

    model.train()
    slow = _median_seconds(lambda: work(model.blocks[0]), device, 5)
    start = time.perf_counter()
    for block in model.blocks:
        block.compile()
    # In the second layer torch notices that a layer's constants differ; validation has code of its own.
    for block in model.blocks[:2]:
        work(block)
    with torch.no_grad(), autocast(device, precision):
        model.eval()
        for block in model.blocks[:2]:
            block(validated_BND)
        model.train()
    seconds = time.perf_counter() - start
    fast = _median_seconds(lambda: work(model.blocks[0]), device, 5)
    model.train(training)
    return seconds, slow / fast


def _undo_compile(model: VisionTransformer) -> None:
    for block in model.blocks:
        block._compiled_call_impl = None
