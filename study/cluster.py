"""Connecting to Ray: the cluster that runs on this host, one that is named, or one of our own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before ray is imported: no usage reports, no rebuilding of the environment in every worker under `uv run`,
# no CSV, JSON and TensorBoard files per trial (the ledger has it all).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Signals are ours: a study saves its states before it ends.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

from diffvit.errors import UserError

# No object of a study is larger than a report of a few numbers.
_OBJECT_STORE_BYTES = 200 * 1024**2


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster."""

    address: str
    own: bool
    nodes: int
    cpus: float
    gpus: float
    dashboard: str | None

    def sentence(self) -> str:
        """For the first line of a study."""
        kind = "started a local Ray" if self.own else f"joined the Ray cluster at {self.address}"
        nodes = f"{self.nodes} node{'s' if self.nodes != 1 else ''}"
        dashboard = f"dashboard http://{self.dashboard}" if self.dashboard else "no dashboard"
        return f"{kind}: {nodes}, {self.gpus:g} GPUs, {self.cpus:g} CPUs; {dashboard}"


@contextlib.contextmanager
def connect(address: str | None = None) -> Iterator[Cluster]:
    """A connection to Ray, ended with the block; a cluster of our own is ended too.

    Args:
        address: as find_address takes it.

    Raises:
        UserError: there is no cluster at the address.
    """
    import ray  # two seconds that a study with nothing to train does not need

    chosen = find_address(address)
    if chosen.startswith("ray://"):
        raise UserError(
            f"{chosen} is an address for Ray's client, which cannot run a study.",
            "run the study on the cluster, with host:port of its head.",
        )
    own = chosen == "local"
    if not own and not _answers(chosen):
        raise UserError(f"no Ray cluster answers at {chosen}.", "check `ray status`, or use --address local.")
    options = {"include_dashboard": True, "object_store_memory": _OBJECT_STORE_BYTES} if own else {}
    try:
        context = ray.init(address=chosen, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {chosen} cannot be joined: {str(error).splitlines()[0]}.", "check `ray status`, or use --address local."
        ) from error
    try:
        resources = ray.cluster_resources()
        nodes = sum(node["Alive"] for node in ray.nodes())
        yield Cluster(
            str(context.address_info["address"]), own, nodes,
            resources.get("CPU", 0), resources.get("GPU", 0), context.dashboard_url or None,
        )  # fmt: skip
    finally:
        ray.shutdown()


def find_address(address: str | None = None) -> str:
    """host:port of the cluster to use, or "local" for one of our own.

    What is given comes first, then $RAY_ADDRESS, then a cluster that `ray start` or `ray up` left on this host.
    """
    given = address or os.environ.get("RAY_ADDRESS")
    return given if given and given != "auto" else _cluster_on_this_host() or "local"


def _cluster_on_this_host() -> str | None:
    """The address that the last `ray start` on this host wrote down, if that cluster still answers.

    A Ray that another program started for itself is not written there, and is not ours to join: it ends with that program.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # where Ray keeps its sessions
    try:
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    return address if address and _answers(address) else None


def _answers(address: str) -> bool:
    """Whether a gRPC server, which a cluster's head is, and not just any program answers at host:port."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=3)
        except grpc.FutureTimeoutError:
            return False
    return True


def gpu_precision() -> str:
    """The precision that the connected cluster's GPUs train in."""
    import ray

    from diffvit.train import default_precision, resolve_device

    return ray.get(ray.remote(num_gpus=0.01, num_cpus=0)(lambda: default_precision(resolve_device())).remote())
