"""Shared by all tests: small runs, real data where it is at hand, and no traces outside the test's folder."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if sys.dont_write_bytecode:
    # Every process of the tests, of which there are hundreds, would compile torch and Ray anew: 3 s of CPU time each.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parents[1] / ".pytest_cache/bytecode")
    os.environ.update(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=sys.pycache_prefix)

import pytest
import torch

import run as command_line

if TYPE_CHECKING:
    from hub.server import HubServer

# Beside the checkout; a test that needs it is skipped, visibly, where it is missing.
SHARED = Path(os.environ.get("DIFFVIT_SHARED") or Path(__file__).resolve().parents[2] / "shared")

needs_cifar = pytest.mark.skipif(
    not (SHARED / "data/uoft-cs/cifar100").is_dir(), reason="the real CIFAR-100 is not at ../shared/data/uoft-cs/cifar100"
)
needs_tissue = pytest.mark.skipif(not (SHARED / "data/breakhis").is_dir(), reason="real tissue images are not at ../shared/data/breakhis")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All quick tests run in two processes; a few of them start sooner in this one, and slow ones take all cores themselves."""
    option, is_worker = config.option, hasattr(config, "workerinput")
    whole = config.args_source is config.ArgsSource.TESTPATHS and not option.keyword and option.markexpr == "not slow"
    if whole and not is_worker and not option.usepdb and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist, option.loadscopereorder = 2, "loadfile", False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before every fixture, of a module too: always the same number of threads."""
    torch.set_num_threads(1)  # such small models are no faster with two


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster, account or data folder of the user's."""
    for name in ("RAY_ADDRESS", "HF_TOKEN", "HF_REPOSITORY", "DIFFVIT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="session")
def data_root() -> str:
    """A data root with the real CIFAR-100."""
    return str(SHARED / "data")


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[int]:
    """The port of a stand-in S3 on loopback."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3_port(_s3_server: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The port of a stand-in S3, whose access is in the environment, of child processes too."""
    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_s3_server}"}.items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture
def s3(s3_port: int) -> str:
    """The URL of a folder of its own in a stand-in S3."""
    import uuid

    import s3fs

    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/study"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A stand-in Hugging Face hub, to which huggingface_hub goes with the token hf_write: here, and in child processes."""
    import huggingface_hub
    from hub.server import HubServer
    from huggingface_hub import constants, hf_api

    home = tmp_path_factory.mktemp("hf")
    with HubServer(tokens={"hf_write": "write", "hf_read": "read"}) as server:
        for name, value in server.environment("hf_write", home).items():
            monkeypatch.setenv(name, value)
        # huggingface_hub has read its environment already.
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value, raising=False)  # older clients have not all of them
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        # Its own attempts follow each other at once.
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.01))))
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()
    assert not server.errors, "\n".join(server.errors)


@pytest.fixture
def sessions() -> Iterator[Path]:
    """Where Ray keeps its sessions: short, for sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def made_up_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models are not built to see what they do before their first step, which takes seconds each."""
    layer = {"layer": 0, "attention_rms": 0.1, "mlp_rms": 0.1, "entropy": 3.0}

    def rows(specs: list, quick: bool) -> list[dict]:
        return [{"model": spec.model, "size": spec.size, "dataset": spec.dataset, "overrides": {}, "uniform_entropy": 4.0, "layers": 3 * [layer],
                 "cosine": 0.96 if spec.model == "vit_classic" else 0.64} for spec in specs]  # fmt: skip

    monkeypatch.setattr("study.report.start.start_rows", rows)


class Outcome:
    """Exit code and output of a command run in this process."""

    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return call
