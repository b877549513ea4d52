"""What a host may lack or limit: CPUs, memory, a home, locks and links in its file system, and a terminal that lasts."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults.processes import ROOT, ending, family, run_py, states, study, wait_until

from diffvit.data import cache
from diffvit.dataset import at_hand
from diffvit.errors import UserError
from diffvit.keeping.state import StateFolder, folder_id
from diffvit.keeping.storage import open_storage
from diffvit.ledger.disk import write_atomically, write_exclusively
from diffvit.ledger.spec import RunSpec
from diffvit.machine import host
from diffvit.train import train

SMALL = ("--model", "vit_classic", "--size", "small", "--dataset", "digits")
TRIAL = ("train", *SMALL, "--device", "cpu", "--max_steps", "2")
LONG = ("train", *SMALL, "--device", "cpu", "--epochs", "5000", "--save_every", "1h")


# --------------------------------------------------------------------------------------------------- CPUs and memory


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        # Version 2: without a limit, in a container, in a slice whose limit stands further up.
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        # A container whose cgroup's path is the host's.
        ({"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        # Version 1, beside an empty version 2.
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/docker/1f\n0::/", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            }, 2,
        ),
        (
            {"proc/self/cgroup": "1:cpu:/x", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1",
             "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"}, 8,
        ),
        # Nothing that anybody would write there.
        ({"proc/self/cgroup": "what\n0::/", "sys/fs/cgroup/cpu.max": "many"}, 8),
    ],
)  # fmt: skip
def test_cpus_are_those_that_the_cgroups_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict, expected: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert host.cpus(_tree(tmp_path, files)) == expected


def test_cpus_are_counted_where_there_are_no_affinities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert host.cpus(tmp_path) == 5


def test_memory_is_what_the_cgroups_allow(tmp_path: Path) -> None:
    everything = host.memory_bytes(tmp_path)
    assert everything == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    two = {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/job/memory.max": "1000000"}
    one = {"proc/self/cgroup": "4:memory:/gone", "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000"}
    free = {"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}
    assert host.memory_bytes(_tree(tmp_path / "two", two)) == 1_000_000
    assert host.memory_bytes(_tree(tmp_path / "one", one)) == 2_000_000
    assert host.memory_bytes(_tree(tmp_path / "free", free)) == everything


def test_a_run_trains_with_as_many_threads_as_it_has_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffvit.train.cpus", lambda: 1)
    result = train(RunSpec.of("vit_classic", "small", "digits", overrides={"max_steps": 1}), tmp_path, device="cpu")
    assert result.threads == 1


@pytest.mark.slow
def test_a_study_trains_as_many_runs_at_a_time_as_its_affinity_has_cpus(tmp_path: Path) -> None:
    first = str(min(os.sched_getaffinity(0)))
    process = study(tmp_path, grid="datasets: [digits]\nsizes: [small]\noverrides: {max_steps: 2}\n", within=("taskset", "-c", first))
    with ending(process):
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "0 GPUs, 1 CPUs" in errors and "2 runs to train, 1 at a time" in errors


# ------------------------------------------------------------------------------------------------------------- a home


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Settings for a child process in which there is no user of that number: the password database is empty there."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, pwd\n"
        "def getpwuid(uid):\n    raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = getpwuid\n"
        "for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME', 'XDG_CACHE_HOME', 'DIFFVIT_CACHE', 'HF_HOME'):\n"
        "    os.environ.pop(name, None)\n"
        "if not os.environ.get('HOME'):\n    os.environ.pop('HOME', None)\n"
        "if 'UNWRITABLE' in os.environ:\n"  # root may write anywhere
        "    access = os.access\n"
        "    os.access = lambda path, mode, **how: access(path, mode, **how) and not (\n"
        "        mode & os.W_OK and str(path) in (*os.environ['UNWRITABLE'].split(os.pathsep), '/'))\n"
    )
    (tmp_path / "tmp").mkdir()
    return {"PYTHONPATH": f"{tmp_path / 'site'}", "TMPDIR": str(tmp_path / "tmp")}


def _python(code: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=100
    ).stdout.splitlines()  # fmt: skip


WHERE = "import getpass, pathlib, diffvit.data.cache; print(pathlib.Path.home(), getpass.getuser(), diffvit.data.cache.cache_folder(), sep='\\n')"


@pytest.mark.parametrize("home", ["", "/nonexistent", "/"])
def test_without_a_home_one_is_lent(tmp_path: Path, nobody: dict[str, str], home: str) -> None:
    where, user, cache = _python(WHERE, HOME=home, UNWRITABLE=home or "/", **nobody)
    assert Path(where).parent == tmp_path / "tmp" and stat.S_IMODE(os.stat(where).st_mode) == 0o700
    assert user == f"user{os.getuid()}"
    assert Path(cache) == Path(where) / ".cache/diffvit"
    assert _python(WHERE, HOME=home, UNWRITABLE=home or "/", **nobody)[0] == where  # caches serve again


def test_a_read_only_home_is_lent_with_what_it_holds(tmp_path: Path, nobody: dict[str, str]) -> None:
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".cache").mkdir()  # on a disk of its own, which can be written
    (home / ".triton").mkdir()
    where = Path(_python(WHERE, HOME=str(home), UNWRITABLE=f"{home}{os.pathsep}{home / '.triton'}", **nobody)[0])
    assert all((where / name).resolve() == home / name for name in (".aws", ".cache")) and not (where / ".triton").exists()


def test_a_home_that_can_be_written_stays(tmp_path: Path, nobody: dict[str, str]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert Path(_python(WHERE, HOME=str(home), **nobody)[0]) == home and not list((tmp_path / "tmp").iterdir())


def test_a_home_is_not_lent_in_somebody_elses_folder(tmp_path: Path, nobody: dict[str, str]) -> None:
    usual = tmp_path / "tmp" / f"diffvit-home-{os.getuid()}"
    usual.mkdir()
    usual.chmod(0o777)
    where = Path(_python(WHERE, HOME="", UNWRITABLE="/", **nobody)[0])
    assert where != usual and where.parent == usual.parent


def test_commands_work_without_a_home(tmp_path: Path, nobody: dict[str, str]) -> None:
    for command in (TRIAL, ("plan", "--gpu", "h100")):
        process = run_py(tmp_path, *command, HOME="", UNWRITABLE="/", **nobody)
        with ending(process):
            _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        assert errors.count("warning: this user has no home that can be written") == 1


# --------------------------------------------------------------------------------------------------- the file system


def _fails(code: int):
    def call(*arguments: object, **named: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


NO_LOCKS = pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])


@NO_LOCKS
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", _fails(code))
    with pytest.raises(UserError) as caught, StateFolder(tmp_path, "0123456789").lock():
        pass
    assert str(tmp_path) in caught.value.message and os.strerror(code) in caught.value.message and "--storage" in caught.value.hint


@NO_LOCKS
def test_train_and_study_say_once_that_there_are_no_locks(cli, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", _fails(code))
    for command in (TRIAL, ("study", "--address", "local")):
        outcome = cli(*command)
        assert outcome.code == 2 and outcome.err.count("has no locks") == 1 and "local disk" in outcome.err


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_links_modes_and_flushes_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    for name in ("link", "chmod", "fsync"):
        monkeypatch.setattr(os, name, _fails(code))
    write_atomically(tmp_path / "a", b"1")
    assert write_exclusively(tmp_path / "b", b"2") and not write_exclusively(tmp_path / "b", b"3")
    assert (tmp_path / "a").read_bytes() == b"1" and (tmp_path / "b").read_bytes() == b"2"
    assert folder_id(tmp_path) == folder_id(tmp_path)
    storage = open_storage(str(tmp_path / "storage"))
    storage.check()
    assert storage.create("one", b"1") and not storage.create("one", b"2")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", ".state", "storage"}


def test_a_cache_that_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    monkeypatch.setattr(mmap, "mmap", _fails(errno.ENODEV))
    assert cache._mapped(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_a_tilde_of_nobody_is_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no data folder"):
        at_hand("CIFAR-100", "~nobody-of-that-name/data")


def test_a_disk_that_fails_to_flush_is_not_taken_for_one_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "a", b"1")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- terminals and readers that go


class _Terminal:
    """A command on a terminal of its own, as a login shell's."""

    def __init__(self, folder: Path, *arguments: str):
        self._ours, theirs = pty.openpty()

        def login() -> None:
            os.setsid()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            fcntl.ioctl(2, termios.TIOCSCTTY, 0)

        command, environment = [sys.executable, str(ROOT / "run.py"), *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=login
        )  # fmt: skip
        os.close(theirs)

    def read(self) -> None:
        while select.select([self._ours], [], [], 0)[0]:
            os.read(self._ours, 65536)

    def close(self) -> None:
        self.process.send_signal(signal.SIGHUP)  # as a shell does, before the kernel does
        os.close(self._ours)


def _training(folder: Path) -> bool:
    return any(len(log.read_text().splitlines()) > 5 for log in folder.glob("checkpoints/*/*.log"))


def test_a_closed_terminal_saves_the_state(tmp_path: Path) -> None:
    terminal = _Terminal(tmp_path, *LONG)
    with ending(terminal.process):
        wait_until(lambda: terminal.read() or _training(tmp_path), terminal.process)
        assert not states(tmp_path)
        terminal.close()
        assert terminal.process.wait(60) == 129
    assert states(tmp_path)


def test_under_nohup_a_hangup_is_nothing(tmp_path: Path) -> None:
    process = run_py(tmp_path, *LONG, within=("nohup",))
    with ending(process):
        wait_until(lambda: _training(tmp_path), process)
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert process.poll() is None and not states(tmp_path)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143 and states(tmp_path)


def test_readers_that_have_gone_do_not_end_the_work(tmp_path: Path) -> None:
    process = run_py(tmp_path, *TRIAL)
    with ending(process):
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()
        assert process.wait(100) == 0
    assert list(tmp_path.glob("checkpoints/*/*_result.json"))


@pytest.mark.slow
def test_a_study_whose_terminal_is_closed_saves_its_states_and_leaves_nothing_running(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("datasets: [digits]\nsizes: [small]\noverrides: {epochs: 5000}\n")
    # A machine that was measured has a forecast, and would be asked whether to start so long a study.
    terminal = _Terminal(tmp_path, "study", "--grid", "grid.yaml", "--address", "local", "--save_every", "1h", "--yes")
    with ending(terminal.process):
        wait_until(lambda: terminal.read() or _training(tmp_path), terminal.process)
        started = family(terminal.process)[1:]
        terminal.close()
        assert terminal.process.wait(60) == 129
        _, alive = psutil.wait_procs(started, timeout=5)
        assert not alive
    assert states(tmp_path)
