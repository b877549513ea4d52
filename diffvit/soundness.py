"""What must hold of an architecture before money is spent on it; each property is tried on a CPU, in seconds.

Shapes, parameters and FLOPs are those of the real cells; gradients, determinism and the rest are tried on two layers of real width and 17
tokens, without dropout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffvit.errors import UserError
from diffvit.ledger.spec import RunSpec
from diffvit.protocol import ARMS, LIKE_CLASSIC, PROTOCOLS, Protocol
from diffvit.user_models import known_source, sentences
from diffvit.vit import Block, VisionTransformer, attention_class, build_model

# Relative distance of what is equal to rounding.
ROUNDING = 1e-4

_IMAGES, _SIDE = 8, 4


@dataclass(frozen=True)
class Property:
    """What was found of a property.

    Attributes:
        holds: None where the architecture does not offer it, which is allowed.
        found: what was seen. advice: what to do where it does not hold.
    """

    name: str
    holds: bool | None
    found: str
    advice: str

    def line(self) -> str:
        """For a terminal."""
        word = {True: "yes", False: "no", None: "-"}[self.holds]
        return f"{word:<5}{self.name:<28}{self.found}" + (f": {self.advice}" if self.holds is False else "")


class Outcome(NamedTuple):
    """What a cell shows of a property; of several cells the one that is furthest off is told."""

    holds: bool | None
    found: str
    off: float = 0.0


@dataclass(frozen=True)
class Cell:
    """A size of a data set, with the protocol that a grid gives it."""

    model: str
    dataset: str
    size: str
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.dataset} {self.size}"

    def build(self, model: str | None = None, device: str = "meta") -> VisionTransformer:
        return build_model(model or self.model, self.size, self.protocol, device)

    def small(self) -> VisionTransformer:
        """Two layers of the real width for images of 4 x 4 patches, initialised, without dropout."""
        image_size = _SIDE * self.protocol.patch_size
        model = build_model(
            self.model, self.size, dataclasses.replace(self.protocol, image_size=image_size, depths={self.size: 2}, dropout=0.0)
        )
        model.initialise(0)
        return model

    def images(self, seed: int = 0) -> Tensor:
        side = _SIDE * self.protocol.patch_size
        return torch.randn(_IMAGES, self.protocol.channels, side, side, generator=torch.Generator().manual_seed(seed))


def cells_of(model: str, specs: Sequence[RunSpec] | None = None) -> list[Cell]:
    """The cells of some runs, or all sizes of all data sets, smallest first, with an architecture in place of theirs."""
    if specs is None:
        return [Cell(model, dataset, size, protocol) for dataset, protocol in PROTOCOLS.items() for size in protocol.sizes]
    cells = [Cell(model, spec.dataset, spec.size, spec.protocol) for spec in specs]
    return _one_for_each(cells, lambda cell: (str(cell), repr(cell.protocol)))


def check_architecture(cells: Sequence[Cell]) -> Iterator[Property]:
    """Try each property on cells of one architecture.

    Raises:
        UserError: its file cannot be executed, or its class is none.
    """
    attention_class(cells[0].model)
    widths = _one_for_each(cells, lambda cell: (cell.protocol.d_model, cell.protocol.heads, cell.protocol.patch_size))
    smallest = _one_for_each(cells, lambda cell: (cell.dataset, repr(cell.protocol)))
    tried: list[tuple[str, str, Callable[[Cell], Outcome], Sequence[Cell]]] = [
        ("shapes", "[B, N, D] -> [B, N, D], and with queries=1 the first token of it as [B, 1, D]", _shapes, cells),
        ("parameters as classic", "mlp_hidden(d_model, heads, mlp_ratio) makes the MLP narrower in return", _parameters, cells),
        ("FLOPs as declared", "mend map_flops, or compute no more than the first `queries` tokens need", _flops, smallest),
        ("gradients", "every parameter takes part, and what is learnt of an image does not depend on its batch", _gradients, widths),
        ("determinism", "draw nothing, and say in initialise_parameter how parameters start", _determinism, widths),
        ("images see only themselves", "take no mean or norm over dimension 0", _independence, widths),
        ("bf16", "under autocast inputs and weights are of different types: convert where torch does not", _bf16, widths),
        ("attention maps", "maps and apply_maps must give what forward does; remove or mend them", _maps, widths),
    ]  # fmt: skip
    for name, advice, check, on in tried:
        yield _worst(name, advice, check, on)


def _one_for_each(cells: Sequence[Cell], key: Callable[[Cell], Any]) -> list[Cell]:
    """The first cell for each value of a key."""
    found: dict[Any, Cell] = {}
    for cell in cells:
        found.setdefault(key(cell), cell)
    return list(found.values())


def _worst(name: str, advice: str, check: Callable[[Cell], Outcome], cells: Sequence[Cell]) -> Property:
    """The first cell in which the property does not hold, or the one that is furthest off."""
    worst = Outcome(None, "")
    for cell in cells:
        try:
            with sentences(known_source(cell.model)):
                outcome = check(cell)
        except UserError as error:
            outcome = Outcome(False, error.message.rstrip("."))
        if outcome.holds is False:
            return Property(name, False, f"{cell}: {outcome.found}", advice)
        worst = max(outcome, worst, key=lambda each: (bool(each.found), each.off))
    return Property(name, worst.holds, worst.found, advice)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative; infinite where something is not a number."""
    found, expected = found.double(), expected.double()
    distance = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return distance if distance == distance else float("inf")


@torch.no_grad()
def _shapes(cell: Cell) -> Outcome:
    protocol = cell.protocol
    tokens, depth = (protocol.image_size // protocol.patch_size) ** 2 + 1, protocol.depths[cell.size]
    x_BND = torch.randn(2, tokens, protocol.d_model, generator=torch.Generator().manual_seed(0))
    for layer in dict.fromkeys((0, depth - 1)):
        model = cell.small()
        block = cast(Block, model.blocks[0])
        block.attn = cast(nn.Module, model.attention_class(protocol.d_model, protocol.heads, layer, 0.0))
        model.initialise(0)
        whole, first = block.attn.eval()(x_BND), block.attn(x_BND, 1)
        for out, n in ((whole, tokens), (first, 1)):
            if tuple(out.shape) != (2, n, protocol.d_model):
                return Outcome(False, f"layer {layer} gives {[*out.shape]} for {[*x_BND.shape]}, not {[2, n, protocol.d_model]}")
        if (distance := _distance(first, whole[:, :1])) > ROUNDING:
            return Outcome(False, f"layer {layer} gives the first token another value with queries=1, by {100 * distance:.2g} %")
    return Outcome(True, f"right in the first and the last layer with all {tokens} tokens, and with queries=1", tokens)


def _parameters(cell: Cell) -> Outcome:
    found, classic = (cell.build(model).count_parameters() for model in (cell.model, ARMS[0]))
    off = found / classic - 1
    return Outcome(abs(off) <= LIKE_CLASSIC, f"{found:,}, the classic model has {classic:,} ({100 * off:+.2f} %)", abs(off))


def _flops(cell: Cell) -> Outcome:
    model = cell.build().eval()
    side = cell.protocol.image_size
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        model(torch.empty(1, cell.protocol.channels, side, side, device="meta"))
    declared, counted = model.estimate_flops(), counter.get_total_flops()
    off = declared / counted - 1
    return Outcome(abs(off) <= LIKE_CLASSIC, f"{declared:.4g} an image, torch counts {counted:.4g} ({100 * off:+.2f} %)", abs(off))


def _passes(model: VisionTransformer, images: Tensor, micro_batch: int) -> dict[str, Tensor | None]:
    """The gradients of a batch's mean loss, computed so many images at once."""
    model.train().zero_grad(set_to_none=True)
    labels = torch.arange(len(images)) % model.head.out_features
    for some, of_some in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
        (F.cross_entropy(model(some), of_some, reduction="sum") / len(images)).backward()
    return {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()}


def _gradients(cell: Cell) -> Outcome:
    model, images = cell.small(), cell.images()
    whole, parts = _passes(model, images, _IMAGES), _passes(model, images, _IMAGES // 4)
    if without := [name for name, gradient in whole.items() if gradient is None]:
        return Outcome(False, f"{', '.join(without[:3])} has none")
    gradients = cast(dict[str, Tensor], whole)
    if wrong := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        return Outcome(False, f"that of {wrong[0]} is not finite")
    both = (torch.cat([cast(Tensor, each).flatten() for each in of.values()]) for of in (parts, whole))
    distance = _distance(*both)
    return Outcome(distance <= ROUNDING, f"finite; in micro-batches they differ by {distance:.1g}", distance)


def _determinism(cell: Cell) -> Outcome:
    found: list[dict[str, Any]] = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)  # whatever draws from torch's own generator now differs
            model = cell.small()
            state = {name: value.clone() for name, value in model.state_dict().items()}
            found.append({**state, **{f"the gradient of {name}": value for name, value in _passes(model, cell.images(), _IMAGES).items()}})
    first, second = found
    differ = [name for name in first if first[name] is not None and not torch.equal(first[name], second[name])]
    return Outcome(not differ, f"{differ[0]} differs from one start to the next" if differ else "the same seed gives the same bits")


@torch.no_grad()
def _independence(cell: Cell) -> Outcome:
    model, images, others = cell.small(), cell.images(), cell.images(seed=1)
    mixed = torch.cat([images[:1], others[1:]])
    distance = max(_distance(model.train(mode)(mixed)[0], model.train(mode)(images)[0]) for mode in (True, False))
    return Outcome(distance <= ROUNDING, f"beside other images an image's logits differ by {distance:.1g}", distance)


def _bf16(cell: Cell) -> Outcome:
    model, images = cell.small(), cell.images()
    expected = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images).float()
    logits.square().sum().backward()
    finite = all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    distance = _distance(logits.detach(), expected)
    found = f"logits differ from those in fp32 by {100 * distance:.2g} %" + ("" if finite else ", and gradients are not finite")
    return Outcome(finite and distance < 0.1, found, distance)


@torch.no_grad()
def _maps(cell: Cell) -> Outcome:
    model = cell.small().eval()
    attention: Any = cast(Block, model.blocks[0]).attn
    if missing := [name for name in ("logits", "maps", "apply_maps", "lambdas") if not hasattr(attention, name)]:
        return Outcome(None, f"not offered ({', '.join(missing)}): `evaluate --attention` cannot look into it")
    x_BND = model.embed(cell.images())
    distance = _distance(attention.apply_maps(attention.maps(x_BND), x_BND), attention(x_BND))
    return Outcome(distance <= ROUNDING, f"what they give differs from forward by {distance:.1g}", distance)
