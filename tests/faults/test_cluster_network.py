"""A cluster of two hosts, as far as the network goes, that takes only who has its token."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.hosts import Host, two_hosts
from faults.nodes import Nodes
from faults.processes import ROOT, ending, finish, states, study, trainers, wait_until, weights

GRID = "datasets: [digits]\nsizes: [small]\noverrides: {epochs: 15}\n"
NOTHING_TO_SAY = {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}


@dataclass
class Net:
    """A cluster over two hosts, a node that trains on each."""

    nodes: Nodes
    first: Host
    second: Host
    members: list[subprocess.Popen]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text(secrets.token_hex(32) + "\n")
    with two_hosts() as (first, second):
        nodes = Nodes(6421, first.address, first.within, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(token))
        try:
            members = [nodes.add(host=host.address, within=host.within) for host in (first, second)]
            yield Net(nodes, first, second, members)
        finally:
            nodes.end()


def _study_on(host: Host, folder: Path, net: Net, **environment: str) -> subprocess.Popen:
    options = ("--address", net.nodes.address, "--resource", "accelerator=1", "--save_every", "0.3s")
    return study(folder, *options, grid=GRID, within=host.within, **{**net.nodes.environment, **environment})


@pytest.mark.slow
def test_a_study_trains_on_both_hosts(tmp_path: Path, net: Net) -> None:
    process = _study_on(net.first, tmp_path, net)
    with ending(process):
        wait_until(lambda: len({path.parent for path in states(tmp_path)}) == 2, process)
        assert [len(trainers(member)) for member in net.members] == [1, 1]
        said = finish(process)
    assert f"joined the Ray cluster at {net.nodes.address}: 3 nodes" in said and "2 at a time" in said
    assert len(weights(tmp_path)) == 2


def _wrong(kind: str, folder: Path) -> dict[str, str]:
    """The environment of somebody who has not the token."""
    wrong = folder / "wrong"
    wrong.write_text(secrets.token_hex(32))
    return {
        **NOTHING_TO_SAY,
        "HOME": str(folder),  # there may be a token in the user's
        **{
            "none": {},
            "none, but says so": {"RAY_AUTH_MODE": "token"},
            "another": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
            "another, in a file": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)},
            "a file that is not there": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "nothing")},
        }[kind],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "none, but says so", "another", "another, in a file", "a file that is not there"])
def test_a_study_without_the_token_gets_nowhere(tmp_path: Path, net: Net, kind: str) -> None:
    process = _study_on(net.second, tmp_path, net, **_wrong(kind, tmp_path))
    with ending(process):
        out, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors
    assert not out
    error, hint = errors.splitlines()
    assert error.startswith("error: ") and "token" in error and hint.startswith("hint: ") and "RAY_AUTH_MODE=token" in hint
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_ray_of_our_own_says_where_its_token_should_be(tmp_path: Path) -> None:
    process = study(tmp_path, grid=GRID, **_wrong("a file that is not there", tmp_path))
    with ending(process):
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 2, errors
    assert "there is none" in errors and str(tmp_path / "nothing") in errors and "RAY_AUTH_TOKEN_PATH" in errors


@pytest.mark.slow
def test_a_node_without_the_token_does_not_join(tmp_path: Path, net: Net) -> None:
    for kind in ("none", "another"):
        process = subprocess.Popen(
            [*net.second.within, str(Path(sys.executable).with_name("ray")), "start", f"--address={net.nodes.address}", "--num-cpus=1",
             f"--node-ip-address={net.second.address}", "--num-gpus=0", "--object-store-memory=100000000", "--block"],
            env={**os.environ, **net.nodes.environment, **_wrong(kind, tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        with ending(process):
            said, _ = process.communicate(timeout=100)
        assert process.returncode != 0 and "Ray runtime started" not in said
    # The cluster's head counts the nodes that it began with, and no other.
    code = f"import ray; ray.init({net.nodes.address!r}, log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    environment = {**os.environ, **net.nodes.environment, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [*net.first.within, sys.executable, "-c", code]
    living = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100).stdout
    assert living.split() == ["3"]
