"""How a run is computed. Nothing here changes its result beyond rounding and the draws of dropout.

On a GPU the form of attention, and whether the blocks are fused or compiled, are chosen by measurement before the run's clock starts;
the forms' times are kept in the cache folder. On a CPU a table decides: docs/performance.md has the measurements.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from diffvit.errors import UserError, first_line
from diffvit.kernels.dropout import has_kernels
from diffvit.machine.caches import cache_folder, recall, remember
from diffvit.machine.device import autocast, autocast_dtype, is_half
from diffvit.vit import AttentionLayer, Block, VisionTransformer, set_form


@dataclass(frozen=True)
class Compute:
    """How a run shall be computed.

    Attributes:
        micro_batch: images at once on a process; None: what fits in memory.
        memory_share: the part of the device's memory that the run may use.
        deterministic: on a GPU, the same bits every time (the CPU's always are): nothing is then chosen by measurement.
        fused: the blocks in kernels of our own; None: where they are found to be faster, on GPUs only.
        graphs: the passes as CUDA graphs; None: on a GPU, with fused blocks.
        compile: torch.compile of the blocks; None: where it is found to be faster, on GPUs for which there are no kernels of our own.
        recompute: activation checkpointing: keep only the blocks' inputs and compute the rest again for the backward pass. A third more
            arithmetic, and memory for one block instead of all. None: on a GPU whose memory has no room for a few images without.
    """

    micro_batch: int | None = None
    memory_share: float = 1.0
    deterministic: bool = False
    fused: bool | None = None
    graphs: bool | None = None
    compile: bool | None = None
    recompute: bool | None = None

    def __post_init__(self) -> None:
        if self.deterministic and self.fused:
            raise UserError(
                "fused blocks are not deterministic: their kernels' tile sizes are chosen by time.", "leave --fused or --deterministic out."
            )
        if self.fused and self.compile:
            raise UserError("blocks are either fused or compiled.", "leave --fused or --compile out.")


DEFAULT_COMPUTE = Compute()


@dataclass(frozen=True)
class Chosen:
    """What was chosen for a run.

    Attributes:
        attention: the form of attention, for the record.
        compile_seconds: what choosing, compiling and tuning took, outside of the run's clock.
        notes: sentences for the log.
    """

    attention: str
    fused: bool = False
    graphs: bool = False
    compiled: bool = False
    compile_seconds: float = 0.0
    notes: tuple[str, ...] = ()


# The largest batch for trials of forms, fused and compiled blocks: enough to fill a GPU.
_TRIED_IMAGES = 64


def choose(model: VisionTransformer, images: int, precision: str, compute: Compute) -> Chosen:
    """Choose the form of attention, and fuse or compile the blocks where that is asked for or pays. `model` is on its device.

    Args:
        images: the batch size that the blocks will see, about.
    """
    device, start, training = model.pos_embed.device, time.perf_counter(), model.training
    measured = device.type == "cuda" and not compute.deterministic
    images = min(images, _TRIED_IMAGES)
    model.recompute = bool(compute.recompute)
    notes: list[str] = []
    if measured and not model.plain and (form := _fastest_form(model, images, precision)):
        set_form(model, form)
    if model.plain and compute.fused:
        notes.append("fused blocks are for built-in architectures, and are left out")
    elif not model.plain and (compute.fused or (compute.fused is None and measured and not compute.compile)):
        gain, note = _tried("fused blocks", lambda: _gain_of_fusing(model, images, precision))
        model.fused = gain > 0 and (bool(compute.fused) or gain > 1)
        notes.append(note)
    compiled = False
    if compute.compile or (compute.compile is None and measured and not model.fused):
        gain, note = _tried("torch.compile", lambda: _gain_of_compiling(model, images, precision))
        compiled = gain > 0 and (bool(compute.compile) or gain > 1)
        if not compiled:
            _undo_compile(model)
        notes.append(note)
    model.train(training)  # as it was before the trials
    graphs = device.type == "cuda" and (model.fused and not compute.deterministic if compute.graphs is None else compute.graphs)
    seconds = time.perf_counter() - start if notes else 0.0
    return Chosen(model.attention_form(autocast_dtype(precision)), model.fused, graphs, compiled, seconds, tuple(notes))


def _tried(what: str, gain_of: Callable[[], float]) -> tuple[float, str]:
    """The speed-up of a block, 0 where it does not work, and a sentence for the log."""
    start = time.perf_counter()
    try:
        gain = gain_of()
    except Exception as error:  # compilers fail in many ways; each leaves the blocks as they were
        return 0.0, f"{what} does not work here and is left out: {type(error).__name__}: {first_line(error)[:200]}"
    return gain, f"{what}, tried for {time.perf_counter() - start:.1f} s: a block is {gain:.2f} times as fast"


def _fastest_form(model: VisionTransformer, images: int, precision: str) -> str | None:
    """The fastest form of the model's attention layers, from the cache or measured now; None where there is nothing to choose."""
    layer = cast(AttentionLayer, cast(Block, model.blocks[0]).attn)
    device, dtype = model.pos_embed.device, autocast_dtype(precision)
    forms = layer.forms(device, dtype)
    if not forms:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shape = f"{images}x{model.tokens}x{model.pos_embed.shape[-1]}, {model.heads} heads"
    key = f"{name}, torch {torch.__version__}, {dtype}, {type(layer).__name__}, {shape}"
    path = cache_folder() / "attention_forms.json"
    seconds = {form: value for form, value in recall(path, key).items() if form in forms}
    if not seconds:
        seconds = measure_forms(model, forms, images, precision)
        remember(path, key, seconds)
    return min(seconds, key=seconds.__getitem__, default=None)


def measure_forms(model: VisionTransformer, forms: Iterable[str], images: int, precision: str, repeats: int = 7) -> dict[str, float]:
    """Median seconds of a forward and backward pass of the first layer's attention in each form.

    A form that fails here, or differs from the first by more than rounding, is left out.
    """
    layer: Any = cast(Block, model.blocks[0]).attn
    device, before = model.pos_embed.device, layer.form
    x_BND = _random_like(model, images).requires_grad_()

    def run(form: str) -> list[Tensor]:
        layer.form = form
        with autocast(device, precision):
            out_BND = layer.heads_output(x_BND)
        return [out_BND.detach(), *torch.autograd.grad(out_BND, [x_BND, layer.qkv.weight], x_BND.detach().to(out_BND.dtype))]

    seconds: dict[str, float] = {}
    expected: list[Tensor] | None = None
    for form in forms:
        try:
            result = run(form)
            expected = expected or result
            if _alike(result, expected, precision):
                seconds[form] = _median_seconds(lambda form=form: run(form), device, repeats)  # type: ignore[misc]
        except Exception:  # no kernel for it here, no memory, no compiler, or one that fails: in many ways
            continue
    layer.form = before
    return seconds


def _random_like(model: VisionTransformer, images: int) -> Tensor:
    """Random input for a block. [B, N, D]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, *model.pos_embed.shape[1:], generator=generator).to(model.pos_embed.device)


def _alike(result: list[Tensor], expected: list[Tensor], precision: str) -> bool:
    return all(_distance(a, b) < (2e-2 if is_half(precision) else 1e-4) for a, b in zip(result, expected, strict=True))


def _distance(result: Tensor, expected: Tensor) -> float:
    distance = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
    return distance if distance == distance else float("inf")


def _median_seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call after two warm-up calls; on a GPU as a CUDA graph, without Python's time."""
    for _ in range(2):
        action()
    call = _captured(action) if device.type == "cuda" else action
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _captured(action: Callable[[], object]) -> Callable[[], object]:
    """The action as a CUDA graph, or as it is where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            action()
    except RuntimeError:
        torch.cuda.synchronize()
        return action
    graph.replay()  # the first replay is slower
    torch.cuda.synchronize()
    return graph.replay


def _gain_of_fusing(model: VisionTransformer, images: int, precision: str) -> float:
    """The speed-up of a block in fused kernels. Raises ArithmeticError where their result differs by more than rounding."""
    from diffvit.kernels.fused import block_and_norm

    device, block = model.pos_embed.device, cast(Block, model.blocks[0])
    x_BND = _random_like(model, images).requires_grad_()

    downstream = [x_BND.detach().flip(1), x_BND.detach().flip(2)]  # some gradients

    def plain() -> tuple[Tensor, Tensor]:
        out_BND = block(x_BND)
        return out_BND, block.norm1(out_BND)

    def fused() -> tuple[Tensor, Tensor]:
        return block_and_norm(block, block.norm1, x_BND, block.norm1(x_BND))

    def passes(forward: Callable[[], tuple[Tensor, Tensor]]) -> list[Tensor]:
        with autocast(device, precision):
            outputs = forward()
        gradients = torch.autograd.grad(
            outputs, [x_BND, *block.parameters()], [x.to(out.dtype) for x, out in zip(downstream, outputs, strict=True)]
        )
        # Together, for a lambda's is a sum in which much cancels. Detached, for a graph must not be captured beside what they keep.
        return [*(x.detach() for x in outputs), gradients[0], torch.cat([x.flatten() for x in gradients[1:]])]

    if not has_kernels(device, model.pos_embed.shape[-1]):
        raise NotImplementedError("there are no kernels for this device")
    model.eval()  # without dropout
    result, expected = passes(fused), passes(plain)
    model.train()
    if not _alike(result, expected, precision):
        raise ArithmeticError("they do not give what the plain blocks give")
    slow, fast = (_median_seconds(partial(passes, forward), device, 5) for forward in (plain, fused))
    return slow / fast


def _gain_of_compiling(model: VisionTransformer, images: int, precision: str) -> float:
    """Compile the blocks one by one, so that equal ones share code. Returns the speed-up of a block."""
    device, last = model.pos_embed.device, len(model.blocks) - 1
    x_BND, validated_BND = _random_like(model, images), _random_like(model, images)
    # Last batches are smaller: one code for batches of all sizes.
    for some_BND in (x_BND, validated_BND) if images > 1 else ():
        torch._dynamo.mark_dynamic(some_BND, 0)
    x_BND.requires_grad_()
    # What earlier runs of this process compiled counts against a limit, beyond which torch silently compiles no more.
    torch.compiler.reset()

    def run(layer: int, x_BND: Tensor) -> Tensor:
        with autocast(device, precision):
            return model.blocks[layer](x_BND, 1) if layer == last else model.blocks[layer](x_BND)

    def work(layer: int) -> None:
        out_BND = run(layer, x_BND)
        torch.autograd.grad(out_BND, [x_BND, *model.blocks[layer].parameters()], torch.ones_like(out_BND))

    model.train()
    slow = _median_seconds(lambda: work(0), device, 5)
    for block in model.blocks:
        block.compile()
    # In the second layer torch notices that a layer's constants differ; the last one and validation have code of their own.
    layers = sorted({0, min(1, last), last})
    for layer in layers:
        work(layer)
    with torch.no_grad():
        model.eval()
        for layer in layers:
            run(layer, validated_BND)
        model.train()
    fast = _median_seconds(lambda: work(0), device, 5)
    return slow / fast


def _undo_compile(model: VisionTransformer) -> None:
    for block in model.blocks:
        block._compiled_call_impl = None
