"""Connecting to Ray: the cluster that runs on this host, one that is named, or one of our own."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffvit.errors import UserError, first_line
from diffvit.machine.host import cpus
from diffvit.signals import kept_from_children
from study.cluster.address import check_token, ensure_token, find_address, gcs_answers, given_address, listens, ray_folder
from study.text import say

# A study's objects are reports of a few numbers.
_OBJECT_STORE_BYTES = 200 * 1024**2

# The path of sockets in Ray's folder, and the longest path that a socket may have.
_SOCKETS = "/session_2026-01-31_23-59-59_123456_1234567/sockets/"
_SOCKET_BYTES = 107
# Room for Ray's logs and a study's record, with some to spare.
_DISK_BYTES = 50 * 1024**2


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster.

    Attributes:
        dashboard: the address that Ray reports; None without a dashboard.
        no_dashboard: why there is none, or why it does not answer here.
    """

    address: str
    own: bool
    nodes: int
    cpus: float
    gpus: float
    dashboard: str | None
    no_dashboard: str = ""
    resources: dict[str, float] = field(default_factory=dict)

    def sentence(self) -> str:
        """What a study says of its cluster."""
        kind = "started a local Ray" if self.own else f"joined the Ray cluster at {self.address}"
        nodes = f"{self.nodes} node{'s' if self.nodes != 1 else ''}"
        dashboard = f"dashboard http://{self.dashboard}" if self.dashboard else "no dashboard"
        why = f" ({self.no_dashboard})" if self.no_dashboard else ""
        return f"{kind}: {nodes}, {self.gpus:g} GPUs, {self.cpus:g} CPUs; {dashboard}{why}"


def find_cluster(address: str | None = None) -> str:
    """host:port of the cluster to join, which answers and takes our token; or "local", where Ray has a place for one of our own.

    Args:
        address: as for find_address.

    Raises:
        UserError: neither is so.
    """
    chosen = find_address(address)
    if chosen.startswith("ray://"):
        raise UserError(
            f"{chosen} is an address for Ray's client, which cannot run a study.",
            "run the study on the cluster, with host:port of its head.",
        )
    if chosen == "local":
        _check_ray_folder()
    elif not gcs_answers(chosen):
        raise UserError(f"no Ray cluster answers at {chosen}.", "check `ray status`, or use --address local.")
    else:
        check_token(chosen, found=given_address(address) is None)
    return chosen


@contextlib.contextmanager
def connect(address: str | None = None, dashboard: bool = True) -> Iterator[Cluster]:
    """Connect to Ray while the block runs; a cluster of our own ends with it.

    Args:
        address: as for find_address.
        dashboard: start one with a cluster of our own, and with it the file that tells Prometheus where metrics are.

    Raises:
        UserError: as find_cluster.
    """
    import ray  # takes two seconds, which a study with nothing to train saves

    chosen = find_cluster(address)
    own = chosen == "local"
    without = "" if dashboard else "--dashboard false"
    if own:
        without = without or _no_room_for_dashboard(ray_folder().absolute())
        ensure_token()
    # None: with a dashboard, but Ray goes on if the dashboard does not come up.
    options: dict[str, Any] = {
        "num_cpus": cpus(), "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False if without else None,
    }  # fmt: skip
    if own:
        say("starting Ray")
    try:
        with kept_from_children():
            context = _start(chosen, options if own else {})
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {chosen} cannot be joined: {first_line(error)}.", "check `ray status`, or use --address local."
        ) from error
    try:
        resources = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        why = _no_dashboard(context, without) if own or context.dashboard_url else ""
        yield Cluster(
            str(context.address_info["address"]), own, nodes,
            resources.get("CPU", 0), resources.get("GPU", 0), context.dashboard_url or None, why, resources,
        )  # fmt: skip
    finally:
        ray.shutdown()


def _no_dashboard(context: Any, without: str) -> str:
    """Why there is no dashboard, or none that answers here; "" where one answers."""
    if context.dashboard_url:
        host, _, port = context.dashboard_url.rpartition(":")
        return "" if listens((host.strip("[]"), int(port))) else "on the cluster's head; it does not answer here"
    return without or f"it did not come up, see {context.address_info['session_dir']}/logs/dashboard.log"


def _no_room_for_dashboard(folder: Path) -> str:
    """A sentence on the setting that makes the paths of the dashboard's sockets too long; "" where all are short enough."""
    paths = {"RAY_TMPDIR": f"{folder}{_SOCKETS}dash_MetricsHead", "TMPDIR": f"{tempfile.gettempdir()}/pymp-12345678/listener-12345678"}
    too_long = (name for name, path in paths.items() if len(os.fsencode(path)) > _SOCKET_BYTES)
    return next((f"{name} is too long a path for its sockets" for name in too_long), "")


def _check_ray_folder() -> None:
    """Raises UserError where a Ray of our own cannot keep its sessions and sockets in its folder."""
    folder = ray_folder().absolute()
    fault, room = "", _SOCKET_BYTES - len(f"{_SOCKETS}plasma_store")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder):
            free = shutil.disk_usage(folder).free
        if free < _DISK_BYTES:
            fault = f"has {free / 1024**2:.0f} MB left"
    except OSError as error:
        fault = f"cannot be written: {error.strerror}"
    if len(os.fsencode(folder)) > room:
        fault = f"has a path of {len(os.fsencode(folder))} bytes, and Ray's sockets in it leave room for {room}"
    if fault:
        raise UserError(
            f"Ray's temporary folder {folder} {fault}.", "set RAY_TMPDIR to a short path of a folder that is yours, such as /tmp/me."
        )


def _start(address: str, options: dict[str, Any]) -> Any:
    """Call ray.init, and once more for a Ray of our own: on a busy machine its processes can miss Ray's deadlines."""
    import ray

    tries = 2 if address == "local" else 1
    while True:
        tries -= 1
        try:
            return ray.init(address=address, log_to_driver=False, logging_level="CRITICAL", **options)
        except (ConnectionError, ValueError):
            raise
        except Exception as error:  # Ray raises a bare Exception for it
            ray.shutdown()
            if not tries:
                raise RayDidNotStartError(
                    f"Ray did not start: {' '.join(str(error).split())[:200]}", "free some of the machine, and give the same command again."
                ) from error


class RayDidNotStartError(UserError):
    """Ray did not start on this machine; trying again may help."""

    exit_code = 1
