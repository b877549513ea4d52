"""Clusters of several nodes on one machine: a node is taken away, folders are not shared, only a storage is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.nodes import Nodes
from faults.processes import assert_same_ledgers, ending, finish, states, study, trainers, wait_until, weights

# Four runs: one for each node that is left, and more for one that comes.
GRID = "datasets: [digits]\nsizes: [small]\nseeds: 2\noverrides: {epochs: 12}\n"


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    cluster = Nodes(port=6411, RAY_AUTH_MODE="disabled")
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
        third = nodes.add()
        wait_until(lambda: trainers(third), process)
        said = finish(process)
    assert second.poll() is None
    assert "joined the Ray cluster" in said and "2 at a time" in said
    assert_same_ledgers(tmp_path, plain)
    assert sum(log.read_text().count("# resumed after step") for log in tmp_path.glob("checkpoints/*/*.log")) >= 1
    assert not states(tmp_path)


@pytest.mark.slow
@needs_namespaces
def test_a_folder_that_not_all_nodes_share_is_found_out_before_training_and_a_storage_helps(
    tmp_path: Path, nodes: Nodes, s3: str, plain: Path
) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    nodes.add()
    nodes.add(own_folder=folder)
    process = study(folder, "--address", nodes.address, grid=GRID, **nodes.environment)
    with ending(process):
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    assert "not every node can use the folders" in errors and "hint: " in errors and "--storage" in errors
    assert errors.count("is another folder there") == 1
    assert not states(folder) and not weights(folder)

    options = ("--address", nodes.address, "--storage", s3, "--save_every", "0.3s", "--sync_every", "1s", "--lease", "10s")
    finish(study(folder, *options, grid=GRID, **nodes.environment))
    assert_same_ledgers(folder, plain)
