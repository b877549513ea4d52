"""The forms of differential attention, against the classic layer's fused attention and the equation with whole maps.

    python -m bench.attention                      the first GPU, or the CPU; shapes of CIFAR-100, BACH and digits
    python -m bench.attention --device cpu --json docs/results/attention.json

Attention alone: without the projections before and after it, which are the same in both architectures. Every form is compared with
the equation in fp64 before it is timed. The roofline counts the fewest FLOPs that a forward and a backward pass need, 14 N N D, and
each of q, k, v, the output and their gradients moved once each way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import reference_attention
from bench.roofline import measure_ceilings
from bench.timing import Bar, Journal, json_option, medians, ratio, rounds_of, spread, table
from diffvit.errors import first_line
from diffvit.kernels.forms import FORMS, Form, default_form, of_matrix, usable
from diffvit.machine.device import default_precision, resolve_device
from diffvit.protocol import PROTOCOLS
from diffvit.vit import triton_supported

CLASSIC, CLASSIC_TRITON = "classic, fused", "classic, triton"
REFERENCE = "whole maps, as the paper's reference"

# The bars: on a CPU the default form is no slower than the reference, which is the default where there are few tokens; on a GPU the fastest
# form takes at most so much of what the classic layer takes.
OF_REFERENCE = 1.05
OF_CLASSIC_ON_GPU = 1.5

# Images at once: what fills the device, and what a round can be waited for.
_IMAGES = {"cpu": {"CIFAR-100": 4, "BACH": 2, "digits": 32}, "cuda": {"CIFAR-100": 64, "BACH": 32, "digits": 512}}


def measure(
    dataset: str, device: torch.device, dtype: torch.dtype, rounds: int, so_far: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Errors, and seconds of forward and backward passes in each round, of one layer's attention.

    Args:
        so_far: called with each form's seconds after each round.
    """
    protocol = PROTOCOLS[dataset]
    B, N = _IMAGES[device.type][dataset], (protocol.image_size // protocol.patch_size) ** 2 + 1
    heads, D = protocol.heads, protocol.d_model
    E = D // heads
    generator = torch.Generator().manual_seed(0)
    qkv_BN3D, do_BND = (torch.randn(shape, generator=generator) for shape in ((B, N, 3, D), (B, N, D)))
    exact = {form: _passes(form, qkv_BN3D[:1].double(), do_BND[:1].double(), heads) for form in (_classic, FORMS["maps"])}
    qkv_BN3D, do_BND = qkv_BN3D.to(device, dtype), do_BND.to(device, dtype)

    forms: dict[str, Form] = {CLASSIC: _classic, REFERENCE: of_matrix(reference_attention)}
    forms |= {CLASSIC_TRITON: _classic_triton} if triton_supported(device, dtype, E, maps=1) else {}
    forms |= {name: FORMS[name] for name in usable(FORMS, device, dtype, E)}
    errors: dict[str, float] = {}
    actions: dict[str, Callable[[], object]] = {}
    for name, form in forms.items():
        try:
            found = _passes(form, qkv_BN3D[:1], do_BND[:1], heads)
        except (RuntimeError, ValueError) as error:
            click.echo(f"{dataset}: {name} does not work here: {first_line(error)[:120]}", err=True)
            continue
        expected = exact[_classic if name in (CLASSIC, CLASSIC_TRITON) else FORMS["maps"]]
        errors[name] = max(((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
        if errors[name] > (2e-2 if dtype == torch.bfloat16 else 1e-4):
            raise click.ClickException(f"{name} is wrong on {dataset}: a relative error of {errors[name]:.1e}")
        actions[name] = partial(_passes, form, qkv_BN3D, do_BND, heads)
    seconds = rounds_of(actions, rounds, device, warm_up=2, after_round=so_far)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    flops, nbytes = 14 * B * N * N * D, 8 * B * N * D * itemsize
    return {
        "dataset": dataset, "images": B, "tokens": N, "pairs": heads // 2, "head_dim": E, "default": default_form(device.type, dtype, N),
        "errors": errors, "seconds": seconds, "flops": flops, "bytes": nbytes,
    }  # fmt: skip


def _passes(form: Form, qkv_BN3D: Tensor, do_BND: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """A form's output and the gradient of q, k and v."""
    qkv_BN3D = qkv_BN3D.detach().requires_grad_()
    out_BND = form(qkv_BN3D, heads, torch.tensor(0.5, device=qkv_BN3D.device))
    return out_BND, torch.autograd.grad(out_BND, qkv_BN3D, do_BND)[0]


def _classic(qkv_BN3D: Tensor, heads: int, lambda_full: Tensor) -> Tensor:
    q_BHNE, k_BHNE, v_BHNE = qkv_BN3D.unflatten(-1, (heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE).transpose(1, 2).flatten(2)


def _classic_triton(qkv_BN3D: Tensor, heads: int, lambda_full: Tensor) -> Tensor:
    from diffvit.kernels.attention_triton import attend

    return attend(qkv_BN3D, heads)


@click.command()
@click.option("--device", "device_name", help="[default: the first GPU, or the CPU]")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--rounds", type=click.IntRange(min=2), default=15, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="On a CPU. [default: torch's]")
@json_option
def main(device_name: str | None, dtype: str, rounds: int, threads: int | None, json_path: Path | None) -> None:
    """Time the forms of differential attention, forward and backward."""
    device = resolve_device(device_name)
    if threads:
        torch.set_num_threads(threads)
    kind = default_precision(device) if dtype == "auto" else dtype
    torch_dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    ceilings = measure_ceilings(device, torch_dtype)
    click.echo(str(ceilings))
    journal = Journal(device, json_path, ceilings=ceilings.__dict__)
    bars: list[Bar] = []

    def so_far(dataset: str, seconds: dict[str, Any]) -> None:
        journal.note(so_far={dataset: medians(seconds)})

    for dataset in ("CIFAR-100", "BACH", "digits"):
        found = measure(dataset, device, torch_dtype, rounds, partial(so_far, dataset))
        seconds = found["seconds"]
        least = ceilings.least_seconds(found["flops"], found["bytes"])
        rows = []
        for name, times in sorted(seconds.items(), key=lambda item: np.median(item[1])):
            error = f"{found['errors'][name]:.1e}" if name in found["errors"] else ""
            shown = f"{name} (default)" if name == found["default"] else name
            rows.append((shown, spread(times), str(ratio(times, seconds[CLASSIC])), f"{100 * least / np.median(times):.0f} %", error))
        shape = f"{found['images']} images of {found['tokens']} tokens, {found['pairs']} pairs of heads of {found['head_dim']}"
        table(
            f"{dataset}, {kind}: {shape}",
            ("forward and backward", "median (range)", "times classic, 95 %", "of roofline", "error to fp64"),
            rows,
        )
        if device.type == "cpu":
            value = ratio(seconds[found["default"]], seconds[REFERENCE]).high
            bars.append(Bar(f"{dataset}: the default form's time over the reference's, upper end", value, OF_REFERENCE))
        else:
            best = min((name for name in seconds if name in FORMS), key=lambda name: np.median(seconds[name]))
            bars.append(
                Bar(f"{dataset}: {best}, the fastest, over classic", ratio(seconds[best], seconds[CLASSIC]).median, OF_CLASSIC_ON_GPU)
            )
        journal.append("shapes", {**found, "kind": kind, "least_seconds": least})
        journal.note(bars=bars)
    journal.finish(bars)


if __name__ == "__main__":
    main()
