"""Connecting to Ray: the cluster that runs on this host, one that is named, or one of our own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before ray is imported: no usage reports, no rebuilding of the environment in every worker under `uv run`,
# no CSV, JSON and TensorBoard files per trial (the ledger has it all).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Signals are ours: a study saves its states before it ends.
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
# Ray's start waits so long for its dashboard; each of the dashboard's parts would otherwise be given up after half of it.
os.environ.setdefault("RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT", "60")
# Ray puts its workers far behind other processes (15), where the dashboard's could take most of the CPUs from them.
os.environ.setdefault("RAY_worker_niceness", "5")

from diffvit.errors import UserError
from diffvit.host import cpus
from diffvit.signals import kept_from_children

# No object of a study is larger than a report of a few numbers.
_OBJECT_STORE_BYTES = 200 * 1024**2

# Where sockets lie in Ray's folder, and what a socket's path has room for.
_SOCKETS = "/session_2026-01-31_23-59-59_123456_1234567/sockets/"
_SOCKET_BYTES = 107
# What Ray's logs and a study's record take, with some to spare.
_DISK_BYTES = 50 * 1024**2


@dataclass(frozen=True)
class Cluster:
    """A connected Ray cluster.

    Attributes:
        dashboard: the address that Ray reports; None: there is none.
        no_dashboard: why not, or why it cannot be seen from here.
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
        """For the first line of a study."""
        kind = "started a local Ray" if self.own else f"joined the Ray cluster at {self.address}"
        nodes = f"{self.nodes} node{'s' if self.nodes != 1 else ''}"
        dashboard = f"dashboard http://{self.dashboard}" if self.dashboard else "no dashboard"
        why = f" ({self.no_dashboard})" if self.no_dashboard else ""
        return f"{kind}: {nodes}, {self.gpus:g} GPUs, {self.cpus:g} CPUs; {dashboard}{why}"


@contextlib.contextmanager
def connect(address: str | None = None, dashboard: bool = True) -> Iterator[Cluster]:
    """A connection to Ray, ended with the block; a cluster of our own is ended too.

    Args:
        address: as find_address takes it.
        dashboard: whether a cluster of our own gets one, and with it the file that tells Prometheus where metrics are.

    Raises:
        UserError: there is no cluster at the address, or it wants another token, or Ray has no place for a cluster of our own.
    """
    import ray  # two seconds that a study with nothing to train does not need

    chosen = find_address(address)
    if chosen.startswith("ray://"):
        raise UserError(
            f"{chosen} is an address for Ray's client, which cannot run a study.",
            "run the study on the cluster, with host:port of its head.",
        )
    own = chosen == "local"
    without = "" if dashboard else "--dashboard false"
    if own:
        without = without or _no_room_for_dashboard(_check_ray_folder())
        _have_token()
    elif not _answers(chosen):
        raise UserError(f"no Ray cluster answers at {chosen}.", "check `ray status`, or use --address local.")
    else:
        _check_token(chosen, found=_given(address) is None)
    # None: a dashboard, which Ray does without if it does not come up.
    options: dict[str, Any] = {
        "num_cpus": cpus(), "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False if without else None,
    }  # fmt: skip
    try:
        with kept_from_children():
            context = _start(chosen, options if own else {})
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {chosen} cannot be joined: {str(error).splitlines()[0]}.", "check `ray status`, or use --address local."
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
    """Why there is no dashboard, or none that answers here; "" where it does."""
    if context.dashboard_url:
        host, _, port = context.dashboard_url.rpartition(":")
        return "" if _listens((host.strip("[]"), int(port))) else "on the cluster's head; it does not answer here"
    return without or f"it did not come up, see {context.address_info['session_dir']}/logs/dashboard.log"


def _no_room_for_dashboard(folder: Path) -> str:
    """Which setting makes the paths of the dashboard's sockets too long; "" where none does."""
    paths = {"RAY_TMPDIR": f"{folder}{_SOCKETS}dash_MetricsHead", "TMPDIR": f"{tempfile.gettempdir()}/pymp-12345678/listener-12345678"}
    too_long = (name for name, path in paths.items() if len(os.fsencode(path)) > _SOCKET_BYTES)
    return next((f"{name} is too long a path for its sockets" for name in too_long), "")


def _check_ray_folder() -> Path:
    """The folder of a Ray of our own, in which it can keep its sessions and sockets. Raises UserError."""
    from ray._common.utils import get_default_ray_temp_dir

    folder = Path(get_default_ray_temp_dir()).absolute()
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
    return folder


def _start(address: str, options: dict[str, Any]) -> Any:
    """ray.init. A Ray of our own gets a second chance: on a machine that is busy, its processes can miss Ray's own deadlines."""
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
    """Not the user's fault; trying again may help."""

    exit_code = 1


def find_address(address: str | None = None) -> str:
    """host:port of the cluster to use, or "local" for one of our own.

    What is given comes first, then $RAY_ADDRESS, then a cluster that `ray start` or `ray up` left on this host.
    """
    return _given(address) or _cluster_on_this_host() or "local"


def _given(address: str | None) -> str | None:
    """The address that the user names; None: one is to be found."""
    given = address or os.environ.get("RAY_ADDRESS")
    return given if given and given != "auto" else None


def _cluster_on_this_host() -> str | None:
    """The address that the last `ray start` on this host wrote down, if that cluster still answers.

    A Ray that another program started for itself is not written there, and is not ours to join: it ends with that program.
    """
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # where Ray keeps its sessions
    try:
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
    except (OSError, ValueError):
        return None
    return address if address and _answers(address) else None


def _channel(address: str) -> Any:
    """A gRPC channel to a cluster's head that goes the way of Ray's own: past proxies."""
    import grpc
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    return grpc.insecure_channel(address, options=GLOBAL_GRPC_OPTIONS)


def _answers(address: str) -> bool:
    """Whether a gRPC server, which a cluster's head is, and not just any program answers at host:port."""
    import grpc

    with _channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=3)
        except grpc.FutureTimeoutError:
            return False
    return True


def _have_token() -> None:
    """Makes the token of a Ray of our own where Ray would, by default from 2.59; without a home folder it is kept in the environment.

    Raises:
        UserError: there is no token where the user says that there is one.
    """
    from ray._private.authentication import authentication_token_setup as setup
    from ray.exceptions import AuthenticationError

    default = "token" if hasattr(setup, "enable_token_auth_by_default") else "disabled"
    if os.environ.get("RAY_AUTH_MODE", default).lower() != "token":
        return
    loader = setup.AuthenticationTokenLoader.instance()
    try:
        if not loader.has_token(ignore_auth_mode=True):
            setup.generate_and_save_token()
    except AuthenticationError as error:
        raise _no_token(error) from error
    except (OSError, RuntimeError):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    loader.reset_cache()


def _check_token(address: str, found: bool) -> None:
    """Asks the cluster's head with the token that Ray will send. Ray by itself tries for 20 s, and then says that it cannot connect.

    Args:
        found: the cluster is this host's, and nobody named it. As Ray does then, the user's token is tried even without RAY_AUTH_MODE.

    Raises:
        UserError: there is no token where one is wanted, or it is not the cluster's.
    """
    from ray._private.authentication import authentication_token_setup as setup
    from ray.exceptions import AuthenticationError

    try:
        setup.ensure_token_if_auth_enabled(create_token_if_missing=False)
        if _is_taken(address):
            return
        if found and hasattr(setup, "maybe_enable_token_auth_if_token_available"):  # from Ray 2.59
            setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
            if _is_taken(address):
                return
    except AuthenticationError as error:
        raise _no_token(error) from error
    has_one = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    wanted = "another token than this one" if has_one else "a token, and none was given"
    raise UserError(f"the Ray cluster at {address} wants {wanted}.", _TOKEN_HINT)


_TOKEN_HINT = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that has the cluster's token."


def _no_token(error: Exception) -> UserError:
    return UserError(f"RAY_AUTH_MODE is token, and there is none: {getattr(error, 'message', error)}.", _TOKEN_HINT)


def _is_taken(address: str) -> bool:
    """Whether the cluster's head does not refuse the token that Ray sends now. What else is wrong, Ray will say."""
    import grpc
    from ray._private.authentication.grpc_authentication_client_interceptor import SyncAuthenticationMetadataClientInterceptor

    with _channel(address) as channel:
        asking = grpc.intercept_channel(channel, SyncAuthenticationMetadataClientInterceptor())
        try:
            asking.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.UNAUTHENTICATED
    return True


def gpu_precision() -> str:
    """The precision that the connected cluster's GPUs train in."""
    import ray

    from diffvit.train import default_precision, resolve_device

    return ray.get(ray.remote(num_gpus=0.01, num_cpus=0)(lambda: default_precision(resolve_device())).remote())


def gpu_title() -> str:
    """What torch calls a GPU of the connected cluster."""
    import ray

    from diffvit.train import device_title, resolve_device

    return ray.get(ray.remote(num_gpus=0.01, num_cpus=0)(lambda: device_title(resolve_device())).remote())


# ------------------------------------------------------------------------------------------------ what all nodes reach


def unreachable(fault: Callable[[], str], seconds: float = 120.0, here_too: bool = False) -> dict[str, str]:
    """Runs a check on each other living node; address -> why it failed there, for the nodes where it did.

    Args:
        fault: the check; a reason, or "" where all is well.
        here_too: also in a worker on this node, if it has CPUs for any.
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


def check_shared_folder(checkpoints: Path, data_root: str | None) -> None:
    """Finds out whether all nodes see the same checkpoints folder and data. Raises UserError."""
    mark = checkpoints.resolve() / ".state" / f"reach-{uuid.uuid4().hex}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    data = str(Path(data_root).resolve()) if data_root else None
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


def check_storage_and_data(storage: str, data_root: str | None) -> None:
    """Finds out whether all nodes reach the storage and the data. Raises UserError."""
    data = str(Path(data_root).resolve()) if data_root else None
    failed = unreachable(lambda: _cannot_reach(storage, data), here_too=True)
    if failed:
        listed = "; ".join(f"{node}: {reason}" for node, reason in failed.items())
        raise UserError(f"not every node can reach the storage and the data: {listed}.", "check the address and access on these nodes.")


def _cannot_see(mark: str, data_root: str | None) -> str:
    if not os.path.exists(mark):
        return f"{Path(mark).parent.parent} is another folder there"
    if not os.access(mark, os.W_OK):
        return f"{Path(mark).parent.parent} cannot be written"
    return _no_data(data_root)


def _cannot_reach(storage: str, data_root: str | None) -> str:
    from diffvit.storage import open_storage

    try:
        open_storage(storage).check()
    except UserError as error:
        return error.message
    return _no_data(data_root)


def _no_data(data_root: str | None) -> str:
    return f"there is no data folder {data_root}" if data_root and not os.path.isdir(data_root) else ""


# ------------------------------------------------------------------------------------------------------ asking to stop


class StopFlag:
    """An actor that says whether runs shall save their states and end; all nodes can ask it."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """From now on, yes."""
        self._is_set = True

    def is_set(self) -> bool:
        """The answer."""
        return self._is_set


def make_stop_flag() -> Any:
    """A StopFlag that is started again if its process dies; who set it must then set it again."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1)(StopFlag).remote()


# ------------------------------------------------------------------------------------------- when Ray itself is killed

_WATCH_SECONDS = 2.0
_MISSES = 3
_RESTARTS = "DIFFVIT_RESTARTS"
_MOST_RESTARTS = 5


@contextlib.contextmanager
def watch(cluster: Cluster, say: Callable[[str], None], command: str) -> Iterator[None]:
    """While the block runs, notices when Ray's own processes on this host die, upon which a study would wait forever.

    With a Ray of our own, what is left of it is ended, and this process starts over: finished runs are skipped, others resumed. With a
    cluster that was joined, the process ends with code 1 and the command that carries on.
    """
    import ray

    here = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    head, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    places = [(head, int(port)), (here["NodeManagerAddress"], here["NodeManagerPort"])]
    over = threading.Event()

    def look() -> None:
        import psutil

        misses, family = 0, {}
        me = psutil.Process()
        while not over.wait(_WATCH_SECONDS):
            misses = 0 if all(_listens(place) for place in places) else misses + 1
            if not misses:  # once Ray is dead, its processes are no longer our children
                family = {child.pid: child for child in me.children(recursive=True)}
            if misses >= _MISSES:
                _start_over(cluster, list(family.values()), say, command)

    thread = threading.Thread(target=look, name="watch-ray", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _listens(place: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(place, timeout=5):
            return True
    except OSError:
        return False


def _start_over(cluster: Cluster, family: list[Any], say: Callable[[str], None], command: str) -> None:
    import psutil

    restarts = int(os.environ.get(_RESTARTS, "0"))
    if not cluster.own or restarts >= _MOST_RESTARTS:
        say(f"error: the Ray cluster at {cluster.address} is gone\nhint: carry on with {command}")
        os._exit(1)
    say("warning: a process of Ray died; starting over with the runs that are not done")
    for each in family:
        with contextlib.suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(family, timeout=10)
    time.sleep(2.0**restarts)
    os.environ[_RESTARTS] = str(restarts + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)
