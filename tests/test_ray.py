"""How a study comes to its Ray: past proxies, with the cluster's token, in a folder that Ray can use; and Ray's dashboard."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray
from faults.nodes import Nodes
from faults.processes import ending, family, finish, run_py, study, trainers, wait_until

from diffvit.errors import UserError
from study.cluster.address import find_address
from study.cluster.connect import Cluster, connect

GRID = "datasets: [digits]\nmodels: [vit_classic]\nsizes: [small]\noverrides: {max_steps: 2}\n"
NOWHERE = "http://127.0.0.1:9"
PROXIES = {name: NOWHERE for low in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy") for name in (low, low.upper())} | {
    "no_proxy": "", "NO_PROXY": ""}  # fmt: skip


class _Head(grpc.GenericRpcHandler):
    """What answers as a cluster's head does: only who has its token, if it has one."""

    def __init__(self, token: str):
        self.token = token

    def service(self, handler_call_details: Any) -> Any:
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self.token not in given:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@contextlib.contextmanager
def _head(token: str = "") -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1), handlers=[_Head(token)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


@pytest.fixture
def left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Address and token of a cluster that `ray start` seems to have left on this host; nothing is known of tokens."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    token = secrets.token_hex(32)
    with _head(token) as address:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray/ray_current_cluster").write_text(address)
        yield address, token


@pytest.mark.parametrize("name", [name for name in PROXIES if name.lower() != "no_proxy"])
def test_a_cluster_on_this_host_is_found_past_a_proxy(left_behind: tuple[str, str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, NOWHERE)
    assert find_address() == left_behind[0]


def test_an_address_file_that_is_no_text_names_no_cluster(left_behind: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "ray/ray_current_cluster").write_bytes(b"\xff\xfe\x00")
    assert find_address() == "local"


def test_a_missing_token_is_noticed_past_a_proxy(left_behind: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="wants a token, and none was given"), connect(left_behind[0]):
        pass


@pytest.mark.parametrize("fault", ["long", "a file", "not writable", "full"])
def test_a_folder_that_ray_cannot_use_is_named_before_ray_starts(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = {"long": tmp_path / ("x" * 105), "a file": tmp_path / "file", "not writable": Path("/proc/1")}.get(fault, tmp_path)
    (tmp_path / "file").touch()
    if fault == "full":
        folder = Path(tempfile.mkdtemp(prefix="rf", dir="/tmp"))  # its path is short
        usage = namedtuple("usage", "total used free")(100, 99, 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    with pytest.raises(UserError) as caught, connect("local"):
        pass
    assert caught.value.exit_code == 2
    assert str(folder) in caught.value.message and "RAY_TMPDIR" in caught.value.hint
    if fault == "full":
        shutil.rmtree(folder)


def test_a_long_tmpdir_counts_where_ray_tmpdir_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 105)))
    with pytest.raises(UserError, match="bytes"), connect("local"):
        pass


def test_the_first_line_says_why_a_dashboard_is_missing() -> None:
    assert Cluster("a:1", True, 1, 2, 0, None, "--dashboard false").sentence().endswith("; no dashboard (--dashboard false)")
    assert Cluster("a:1", True, 1, 2, 0, "127.0.0.1:8266").sentence().endswith("; dashboard http://127.0.0.1:8266")


def _listening(process: subprocess.Popen) -> set[int]:
    """The ports that a study's processes listen on."""
    ports = set()
    for each in family(process):
        with contextlib.suppress(psutil.Error):
            ports |= {found.laddr.port for found in each.connections("tcp") if found.status == psutil.CONN_LISTEN}
    return ports


@pytest.mark.slow
def test_the_dashboard_answers_at_the_printed_address_while_runs_train_on_all_cores(tmp_path: Path, sessions: Path) -> None:
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # then another study has it
            taken.bind(("127.0.0.1", 8265))
            taken.listen()
        process = study(tmp_path, grid="datasets: [digits]\noverrides: {epochs: 400}\n", dashboard=True, RAY_TMPDIR=str(sessions))
        with ending(process):
            assert process.stderr
            lines = (process.stderr.readline().strip() for _ in range(4))
            printed = next(found for line in lines if (found := re.search(r"dashboard http://127\.0\.0\.1:(\d+)$", line)))
            assert int(printed[1]) in _listening(process)
            wait_until(lambda: len(trainers(process)) == (os.cpu_count() or 1), process)
            connection = http.client.HTTPConnection("127.0.0.1", int(printed[1]), timeout=60)
            connection.request("GET", "/")
            assert connection.getresponse().status == 200


@pytest.mark.slow
def test_a_study_without_room_for_a_dashboard_says_why(tmp_path: Path, sessions: Path) -> None:
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    said = finish(study(tmp_path, grid=GRID, dashboard=True, RAY_TMPDIR=str(sessions), TMPDIR=str(folder)))
    assert "; no dashboard (TMPDIR is too long a path for its sockets)\n" in said


@pytest.mark.slow
def test_a_cluster_is_joined_past_proxies_and_with_the_token_of_the_home_folder(tmp_path: Path) -> None:
    """As after a first study, which made the token: from Ray 2.59 `ray start` then takes only who has it."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(secrets.token_hex(32))
    asks = tuple(map(int, ray.__version__.split(".")[:2])) >= (2, 59)
    mode = {"RAY_AUTH_MODE": "token"} if asks else {}  # who names the head does not send the token unasked
    nodes = Nodes(6423, HOME=str(tmp_path), **PROXIES)
    try:
        nodes.add(**mode)
        for name, given in (("found", {}), ("named", {"RAY_ADDRESS": nodes.address, **mode})):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "grid.yaml").write_text(GRID)
            said = finish(run_py(folder, "study", "--grid", "grid.yaml", **nodes.environment, **given))
            assert re.search(r"joined the Ray cluster at \S+:6423: 2 nodes, 0 GPUs, 1 CPUs", said)
            assert nodes.head.poll() is None  # it was not ours to end
    finally:
        nodes.end()


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/proc", None])
def test_a_study_needs_no_home_folder(tmp_path: Path, sessions: Path, home: str | None) -> None:
    """A user without an entry in the user database, as in a container; / is not theirs either."""
    user = ["unshare", "--user", "--map-user=12345", "--map-group=12345", "env", "-u", "HOME", "-u", "USER"]
    environment = {"RAY_TMPDIR": str(sessions), "DIFFVIT_CACHE": str(tmp_path / "cache")}
    said = finish(study(tmp_path, grid=GRID, within=[*user, *([f"HOME={home}"] if home else [])], **environment))
    assert "started a local Ray" in said and "; no dashboard (--dashboard false)\n" in said
