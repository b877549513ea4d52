"""Checks that run on the nodes of a cluster, and the flag that stops a study's runs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffvit.errors import DiffvitError, UserError
from diffvit.keeping.storage import open_storage


def gpu_precision() -> str:
    """The default precision on a GPU of the connected cluster."""
    import ray

    from diffvit.machine.device import default_precision, resolve_device

    return ray.get(ray.remote(num_gpus=0.01, num_cpus=0)(lambda: default_precision(resolve_device())).remote())


def gpu_title() -> str:
    """The name that torch has for a GPU of the connected cluster."""
    import ray

    from diffvit.machine.device import device_title, resolve_device

    return ray.get(ray.remote(num_gpus=0.01, num_cpus=0)(lambda: device_title(resolve_device())).remote())


def unreachable(fault: Callable[[], str], seconds: float = 120.0, here_too: bool = False) -> dict[str, str]:
    """Run a check on every other living node. Returns address -> reason for the nodes where it failed.

    Args:
        fault: the check; returns a reason, or "" on success.
        seconds: the longest wait for a node.
        here_too: also run it in a worker on this node, if the node has CPUs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    check = ray.remote(num_cpus=0, max_retries=0)(fault)
    asked = {
        node["NodeManagerAddress"] + f" ({node['NodeID'][:8]})": check.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"] and ((here_too and node["Resources"].get("CPU")) or node["NodeID"] != here)
    }
    failed = {}
    for name, answer in asked.items():
        try:
            reason = ray.get(answer, timeout=seconds)
        except Exception as error:
            reason = type(error).__name__
        if reason:
            failed[name] = reason
    return failed


def check_shared_folder(checkpoints: Path, data: list[str]) -> None:
    """Raise UserError unless all nodes see the same checkpoints folder and have the folders of data."""
    mark = checkpoints.resolve() / ".state" / f"reach-{uuid.uuid4().hex}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        failed = unreachable(lambda: _cannot_see(str(mark), data))
    finally:
        mark.unlink(missing_ok=True)
    if failed:
        listed = "; ".join(f"{node}: {reason}" for node, reason in failed.items())
        raise UserError(
            f"not every node can use the folders of this study: {listed}.",
            "put them where all nodes mount them (NFS), or give --storage URL and data that are on each node.",
        )


def check_storage_and_data(storage: str, data: list[str]) -> None:
    """Raise UserError unless all nodes reach the storage and have the folders of data."""
    failed = unreachable(lambda: _cannot_reach(storage, data), here_too=True)
    if failed:
        listed = "; ".join(f"{node}: {reason}" for node, reason in failed.items())
        raise UserError(f"not every node can reach the storage and the data: {listed}.", "check the address and access on these nodes.")


def _cannot_see(mark: str, data: list[str]) -> str:
    if not os.path.exists(mark):
        return f"{Path(mark).parent.parent} is another folder there"
    if not os.access(mark, os.W_OK):
        return f"{Path(mark).parent.parent} cannot be written"
    return _no_data(data)


def _cannot_reach(storage: str, data: list[str]) -> str:

    try:
        open_storage(storage).check()
    except DiffvitError as error:
        return error.message
    return _no_data(data)


def _no_data(data: list[str]) -> str:
    return next((f"there is no data folder {folder}" for folder in data if not os.path.isdir(folder)), "")


class StopFlag:
    """An actor that tells the runs on all nodes whether to save their states and end."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Ask the runs to stop."""
        self._is_set = True

    def is_set(self) -> bool:
        """Whether the runs shall stop."""
        return self._is_set


def make_stop_flag() -> Any:
    """A StopFlag actor. Ray restarts it if its process dies; whoever set it must then set it again."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1)(StopFlag).remote()
