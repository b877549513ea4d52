"""Clusters of several nodes on one machine, of real processes.

Nodes carry a custom resource in place of a GPU; nodes with a folder of their own have a mount namespace of their own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from faults.processes import wait_until


class Nodes:
    """Real `ray start` processes: a head that trains nothing, and nodes that have one CPU and one `accelerator` each.

    Args:
        host: the head's address.
        within: a command before the head's, such as one that enters a namespace.
        variables: added to the environment of every node.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", within: Sequence[str] = (), **variables: str):
        self.address = f"{host}:{port}"
        self._variables = variables
        self._folder = tempfile.TemporaryDirectory(prefix="rn")  # short: sockets lie in it
        self._processes: list[subprocess.Popen] = []
        where = [] if host == "127.0.0.1" else [f"--node-ip-address={host}"]
        try:
            self.head = self._start(["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", *where], within)
        except BaseException:
            self.end()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What a study needs so that it keeps to this cluster."""
        return {"RAY_TMPDIR": self._folder.name, **self._variables}

    def add(
        self, own_folder: Path | None = None, host: str | None = None, within: Sequence[str] = (), **variables: str
    ) -> subprocess.Popen:
        """Another node.

        Args:
            own_folder: what it sees there is a folder of its own.
            host: its address. Default: Ray finds out.
            within: as for the head.
            variables: in place of those of all nodes.
        """
        mount = [] if own_folder is None else ["unshare", "-m", "sh", "-c", f'mount -t tmpfs tmpfs "{own_folder}" && exec "$@"', "sh"]
        where = [f"--node-ip-address={host}"] if host else []
        resources = ["--num-cpus=1", '--resources={"accelerator": 1}']
        return self._start([f"--address={self.address}", *resources, *where], [*within, *mount], **variables)

    def _start(self, arguments: list[str], before: Sequence[str] = (), **variables: str) -> subprocess.Popen:
        ray = str(Path(sys.executable).with_name("ray"))
        environment = {
            **os.environ,
            **self.environment,
            **variables,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "PYTHONUNBUFFERED": "1",
        }
        said = Path(self._folder.name) / f"node{len(self._processes)}.log"
        with open(said, "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*before, ray, "start", *arguments, "--num-gpus=0", "--object-store-memory=100000000", "--block"],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        self._processes.append(process)
        # One after the other: nodes that start at once on one machine can take each other's ports.
        wait_until(lambda: "Ray runtime started" in said.read_text(), process)
        return process

    def remove(self, node: subprocess.Popen) -> None:
        """A node disappears: all its processes at once."""
        with contextlib.suppress(psutil.Error):
            gone = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
            for each in reversed(gone):
                with contextlib.suppress(psutil.Error):
                    each.kill()
        node.wait(30)

    def end(self) -> None:
        """Ends all that was started, and nothing else (`ray stop` would end every Ray there is)."""
        for process in reversed(self._processes):
            self.remove(process)
        self._folder.cleanup()
