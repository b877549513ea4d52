"""`ray up cluster.yaml`, `ray exec` and the autoscaler, for real; ssh, rsync, docker and the hosts are stand-ins."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.hosts import Host, two_hosts
from faults.processes import ROOT, wait_until

RAY = str(Path(sys.executable).with_name("ray"))


class Up:
    """Two hosts with our image on them, and a laptop from which they are reached.

    Attributes:
        config: cluster.yaml, filled in.
        environment: of the laptop.
    """

    def __init__(self, folder: Path, hosts: tuple[Host, Host]):
        self.folder, self.name = folder, f"diffvit-{uuid.uuid4().hex[:8]}"
        home, image, laptop = folder / "home", folder / "image", folder / "laptop"
        self.ledger = home / "diffvit/checkpoints"
        programs = image / "app/.venv/bin"
        for each in (home, programs, laptop / ".diffvit", laptop / ".ssh"):
            each.mkdir(parents=True)
        for code in ("run.py", "study", "diffvit"):
            (image / "app" / code).symlink_to(ROOT / code)
        facts = {
            "keepers": {host.address: host.keeper for host in hosts}, "home": str(home), "folder": str(folder), "image": str(image),
            "name": "ghcr.io/somebody/diffvit:0.1.0",
        }  # fmt: skip
        (folder / "facts.json").write_text(json.dumps(facts))
        stand_ins = f"{sys.executable} {Path(__file__).with_name('stand_ins.py')} {folder / 'facts.json'}"
        for name in ("ssh", "rsync", "docker"):
            _script(programs / name, f'exec {stand_ins} {name} "$@"')
        # `ray stop` ends every Ray of the machine; in a real container it sees its own.
        _script(programs / "ray", f'test "$1" = stop || exec {RAY} "$@"')
        _script(programs / "python", f'exec {sys.executable} "$@"')
        (home / ".bashrc").write_text(f"export PATH={programs}:$PATH\n")

        sessions, own = folder / "s", laptop / "tmp"
        sessions.mkdir()
        own.mkdir()
        (laptop / ".ssh/id_ed25519").write_text("no key")
        (laptop / ".diffvit/auth_token").write_text(uuid.uuid4().hex + "\n")
        (laptop / ".diffvit/env").write_text(f"# as docker reads it\nRAY_TMPDIR={sessions}\nDIFFVIT_CACHE={image}/cache\n")
        self.config = folder / "cluster.yaml"
        self.config.write_text(self._filled_in((ROOT / "cluster.yaml").read_text(), hosts, str(image)))
        self.environment = {
            "HOME": str(laptop), "PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(own), "RAY_TMPDIR": str(own),
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "0",
        }  # fmt: skip

    def _filled_in(self, text: str, hosts: tuple[Host, Host], image: str) -> str:
        names = {
            "<HEAD_IP>": hosts[0].address,
            "<WORKER_IP_1>": hosts[1].address,
            "<SSH_USER>": "root",
            "<OWNER>": "somebody",
            "<VERSION>": "0.1.0",
        }
        for name, value in names.items():
            text = text.replace(name, value)
        # A host of its own each; here they share a disk with others, and its places are not ours.
        text = text.replace("cluster_name: diffvit", f"cluster_name: {self.name}").replace(
            "ray_tmp_mount/diffvit/", f"ray_tmp_mount/{self.name}/"
        )
        for place in ("/run/diffvit", "/app/", "/cache", "/data"):
            text = text.replace(f"{place}", f"{image}{place}")
        text = text.replace(f"diffvit{image}/cache", "diffvit/cache").replace(f"diffvit{image}/data", "diffvit/data")
        return text.replace("--object-store-memory=1000000000", "--object-store-memory=100000000 --num-cpus=1")

    def ray(self, *arguments: str) -> str:
        """What a `ray` command on the laptop says; it must succeed."""
        done = subprocess.run([RAY, *arguments], env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def end(self) -> None:
        """Removes what Ray keeps beside our folder."""
        shutil.rmtree(f"/tmp/ray_tmp_mount/{self.name}", ignore_errors=True)
        for connections in Path("/tmp").glob(f"ray_ssh_*/{hashlib.sha256(self.name.encode()).hexdigest()[:10]}"):
            connections.rmdir()


def _script(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


@pytest.fixture
def up() -> Iterator[Up]:
    with tempfile.TemporaryDirectory(prefix="up") as folder, two_hosts() as hosts:  # short: sockets lie in it
        if hosts[0].keeper is None:
            pytest.skip("this machine does not let us make network namespaces")
        cluster = Up(Path(folder), hosts)
        yield cluster
    cluster.end()


@pytest.mark.slow
def test_ray_up_makes_a_cluster_of_all_hosts_that_trains_a_study(up: Up) -> None:
    up.ray("up", "--yes", str(up.config))
    nodes = "import ray; ray.init('auto', log_to_driver=False); print('nodes:', sum(node['Alive'] for node in ray.nodes()))"
    wait_until(lambda: "nodes: 2" in up.ray("exec", str(up.config), f'python -c "{nodes}"'), seconds=100)
    grid = up.folder / "image/app/grid.yaml"
    grid.write_text("datasets: [digits]\nsizes: [small]\noverrides: {max_steps: 20}\n")
    said = up.ray("exec", str(up.config), "python run.py study --grid grid.yaml")
    assert "2 nodes, 0 GPUs, 2 CPUs" in said and "2 at a time" in said
    assert len(list(up.ledger.glob("*/*.safetensors"))) == 2
