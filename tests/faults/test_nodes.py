"""Clusters of several nodes on one machine: a node is taken away, folders are not shared, only a storage is.

Nodes carry a custom resource in place of a GPU; nodes with a folder of their own have a mount namespace of their own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from faults.processes import assert_same_ledgers, ending, finish, states, study, wait_until, weights

GRID = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 30}\n"


class Nodes:
    """Real `ray start` processes: a head that trains nothing, and nodes that have one CPU and one `accelerator` each."""

    def __init__(self, port: int):
        self.address = f"127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(prefix="rn")  # short: sockets lie in it
        self._processes: list[subprocess.Popen] = []
        self._start(["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"])

    @property
    def environment(self) -> dict[str, str]:
        """What a study needs so that it keeps to this cluster."""
        return {"RAY_TMPDIR": self._folder.name}

    def add(self, own_folder: Path | None = None) -> subprocess.Popen:
        """Another node. With `own_folder`, what it sees there is a folder of its own."""
        before = [] if own_folder is None else ["unshare", "-m", "sh", "-c", f'mount -t tmpfs tmpfs "{own_folder}" && exec "$@"', "sh"]
        return self._start([f"--address={self.address}", "--num-cpus=1", '--resources={"accelerator": 1}'], before)

    def _start(self, arguments: list[str], before: list[str] | None = None) -> subprocess.Popen:
        ray = str(Path(sys.executable).with_name("ray"))
        environment = {
            **os.environ,
            **self.environment,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "PYTHONUNBUFFERED": "1",
        }
        said = Path(self._folder.name) / f"node{len(self._processes)}.log"
        with open(said, "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*(before or []), ray, "start", *arguments, "--num-gpus=0", "--object-store-memory=100000000", "--block"],
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


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    cluster = Nodes(port=6411)
    yield cluster
    cluster.end()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed study."""
    folder = tmp_path_factory.mktemp("plain")
    finish(study(folder, grid=GRID))
    return folder


def _may_unshare() -> bool:
    return subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(not _may_unshare(), reason="this machine does not let us make mount namespaces")


@pytest.mark.slow
def test_a_node_is_taken_away_and_another_comes(tmp_path: Path, nodes: Nodes, plain: Path) -> None:
    first, second = nodes.add(), nodes.add()
    process = study(
        tmp_path, "--address", nodes.address, "--resource", "accelerator=1", "--save_every", "0.3s", grid=GRID, **nodes.environment
    )
    with ending(process):
        wait_until(lambda: len({path.parent for path in states(tmp_path)}) == 2, process)
        nodes.remove(first)
        nodes.add()
        said = finish(process)
    assert second.poll() is None
    assert "joined the Ray cluster" in said and "2 at a time" in said
    assert_same_ledgers(tmp_path, plain)
    assert sum(log.read_text().count("# resumed after step") for log in tmp_path.glob("checkpoints/*/*.log")) >= 1
    assert not states(tmp_path)


@pytest.mark.slow
@needs_namespaces
def test_a_folder_that_not_all_nodes_share_is_found_out_before_training(tmp_path: Path, nodes: Nodes) -> None:
    nodes.add()
    nodes.add(own_folder=tmp_path)
    process = study(tmp_path, "--address", nodes.address, grid=GRID, **nodes.environment)
    with ending(process):
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    assert "not every node can use the folders" in errors and "hint: " in errors and "--storage" in errors
    assert errors.count("is another folder there") == 1
    assert not states(tmp_path) and not weights(tmp_path)


@pytest.mark.slow
@needs_namespaces
def test_nodes_with_folders_of_their_own_share_a_storage(tmp_path: Path, nodes: Nodes, s3: str, plain: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    for _ in range(2):
        nodes.add(own_folder=folder)
    options = ("--address", nodes.address, "--storage", s3, "--save_every", "0.3s", "--sync_every", "1s", "--lease", "10s")
    finish(study(folder, *options, grid=GRID, **nodes.environment))
    assert_same_ledgers(folder, plain)
