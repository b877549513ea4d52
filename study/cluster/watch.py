"""A watch over Ray's processes: when they die, Ray's driver waits forever."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from diffvit.repeat import Repeater
from study.cluster.address import listens
from study.cluster.connect import Cluster

_WATCH_SECONDS = 2.0
_MISSES = 3
_RESTARTS = "DIFFVIT_RESTARTS"
_MOST_RESTARTS = 5


@contextlib.contextmanager
def watch(cluster: Cluster, say: Callable[[str], None], command: str) -> Iterator[None]:
    """While the block runs, act when Ray's own processes on this host die.

    With a Ray of our own, kill what is left of it and restart this process: finished runs are skipped, others resumed. With a cluster
    that was joined, exit with code 1 and print the command that resumes the study.
    """
    import psutil
    import ray

    here = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    head, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    places = [(head, int(port)), (here["NodeManagerAddress"], here["NodeManagerPort"])]
    me, family, misses = psutil.Process(), {}, 0

    def look() -> float:
        nonlocal family, misses
        misses = 0 if all(listens(place) for place in places) else misses + 1
        if not misses:  # once Ray is dead, its processes are no longer our children
            family = {child.pid: child for child in me.children(recursive=True)}
        if misses >= _MISSES:
            _start_over(cluster, list(family.values()), say, command)
        return _WATCH_SECONDS

    with Repeater("watch-ray", look, _WATCH_SECONDS):
        yield


def restarted() -> bool:
    """Whether this process began by starting itself over, with nobody at the terminal."""
    return _RESTARTS in os.environ


def _start_over(cluster: Cluster, family: list[Any], say: Callable[[str], None], command: str) -> None:
    import psutil

    restarts = int(os.environ.get(_RESTARTS, "0"))
    if not cluster.own or restarts >= _MOST_RESTARTS:
        say(f"error: the Ray cluster at {cluster.address} is gone\nhint: to resume, run: {command}")
        os._exit(1)
    say("warning: a process of Ray died; starting over with the runs that are not done")
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=10)
    time.sleep(2.0**restarts)
    os.environ[_RESTARTS] = str(restarts + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)
