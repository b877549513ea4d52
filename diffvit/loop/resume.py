"""Whether a resume state is one that the loop could have saved of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffvit.checks import HEX, fault, list_of, real, record, text, whole
from diffvit.ledger.log import Step
from diffvit.ledger.spec import RunSpec
from diffvit.loop.optimizer import adamw, decayed_and_others
from diffvit.vit import build_model

_STATE = record(
    {"step": whole(1), "last": list_of(real(infinite=True), len(Step._fields), len(Step._fields)), "started": text()},
    {"micro_batch": whole(1)},
)


def fits_run(state: dict[str, Any], spec: RunSpec, total: int) -> bool:
    """Whether a state, wherever it comes from, is what `fit` could have saved of this run of so many steps; its log is not looked at."""
    model = build_model(spec.model, spec.size, spec.protocol, "meta")
    groups = decayed_and_others(model)
    try:
        if fault(_STATE, state) or state["last"][0] != state["step"] or not state["step"] < total:
            return False
        length, digest = state["log"]
        if whole()(length) or text(HEX)(digest) or not _are_like(state["model"], model.state_dict()):
            return False
        # Its options too, but for the learning rate of the step: the optimiser would take them over.
        usual = adamw([[nn.Parameter(torch.empty(0)) for _ in group] for group in groups], spec.protocol).state_dict()["param_groups"]
        for found, own in zip(state["optimizer"]["param_groups"], usual, strict=True):
            if real()(found["lr"]) or any(found.get(name, value) != value for name, value in {**own, "lr": found["lr"]}.items()):
                return False
            if "params" not in found:
                return False
        moments = state["optimizer"]["state"]
        parameters = [parameter for group in groups for parameter in group]
        return set(moments) == set(range(len(parameters))) and all(
            _are_like(moments[i], {"step": torch.empty(()), "exp_avg": each, "exp_avg_sq": each}) for i, each in enumerate(parameters)
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return False


def _are_like(tensors: Mapping[str, Any], others: Mapping[str, Tensor]) -> bool:
    """Whether names, shapes and dtypes are the same."""
    return set(tensors) == set(others) and all(
        isinstance(tensors[name], Tensor) and tensors[name].shape == other.shape and tensors[name].dtype == other.dtype
        for name, other in others.items()
    )
