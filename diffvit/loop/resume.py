"""The tensors of a resume state, by name, and whether a state is one that the loop could have saved of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffvit.checks import HEX, any_of, fault, list_of, real, record, text, whole
from diffvit.ledger.log import STEP_COLUMNS
from diffvit.ledger.spec import RunSpec
from diffvit.loop.loss_scale import SMALLEST_SCALE
from diffvit.vit import build_model

_STATE = record(
    {
        "step": whole(1), "micro_batch": whole(1), "last": list_of(real(infinite=True), len(STEP_COLUMNS), len(STEP_COLUMNS)),
        "started": text(), "log": list_of(any_of(whole(), text(HEX)), 2, 2),
    },
    {"loss_scale": record({"scale": real(low=SMALLEST_SCALE), "steps": whole()})},
)  # fmt: skip


def tensors_of(model: nn.Module, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights as `model.{name}`, and AdamW's moments of each parameter as `optimizer.{name}.exp_avg` and so on."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{moment}": tensor for moment, tensor in moments[parameter].items()}
    return tensors


def load_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put what `tensors_of` gave back into a model and its optimiser."""
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        moments = {moment: tensors.get(f"optimizer.{name}.{moment}") for moment in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {moment: tensor.to(parameter.device) for moment, tensor in moments.items() if tensor is not None}


def fits_run(state: dict[str, Any], spec: RunSpec, total: int) -> bool:
    """Whether a state, wherever it comes from, is what `fit` could have saved of this run of so many steps; its log is not looked at."""
    if fault(_STATE, state) or [type(part) for part in state["log"]] != [int, str]:
        return False
    model = build_model(spec.model, spec.size, spec.protocol, "meta")
    moments: dict[Tensor, dict[str, Tensor]] = {p: {"step": torch.empty(()), "exp_avg": p, "exp_avg_sq": p} for p in model.parameters()}
    same_tensors = _shapes(state["tensors"]) == _shapes(tensors_of(model, moments))
    scaled = spec.precision == "fp16"
    last = dict(zip(STEP_COLUMNS, state["last"], strict=True))
    sound = all(math.isfinite(value) for name, value in last.items() if not (scaled and name == "grad_norm"))  # of a skipped step
    return same_tensors and sound and ("loss_scale" in state) == scaled and last["step"] == state["step"] < total


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
