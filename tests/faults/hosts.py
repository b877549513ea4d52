"""Two hosts on one machine, as far as the network goes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import psutil


@dataclass
class Host:
    """An address, and a command that runs others where it is.

    Attributes:
        keeper: a process in its namespace; None: it has none.
    """

    address: str
    within: list[str]
    keeper: int | None = None


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two network namespaces with a cable between them; where they may not be made, two addresses of this machine's loopback.

    What runs in the namespaces at the end is killed.
    """
    with contextlib.ExitStack() as stack:
        try:
            hosts = _namespaces(stack)
        except (subprocess.CalledProcessError, OSError):
            hosts = Host("127.0.0.2", []), Host("127.0.0.3", [])
        yield hosts


def _namespaces(stack: contextlib.ExitStack) -> tuple[Host, Host]:
    hosts, ends = [], []
    for number in (1, 2):
        # A namespace is there for as long as somebody is in it.
        keeper = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.callback(keeper.wait, 10)
        stack.callback(keeper.kill)
        assert keeper.stdout
        if not keeper.stdout.readline():
            raise subprocess.CalledProcessError(1, "unshare")
        stack.callback(_empty, os.readlink(f"/proc/{keeper.pid}/ns/net"))
        hosts.append(Host(f"10.77.0.{number}", ["nsenter", "-t", str(keeper.pid), "-n"], keeper.pid))
        ends.append([f"host{number}", "netns", str(keeper.pid)])
    _run("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
    for host, (name, *_) in zip(hosts, ends, strict=True):
        _run(*host.within, "ip", "address", "add", f"{host.address}/24", "dev", name)
        for device in ("lo", name):
            _run(*host.within, "ip", "link", "set", device, "up")
    return hosts[0], hosts[1]


def _empty(namespace: str) -> None:
    """Kills all that runs in a network namespace of ours."""
    assert namespace != os.readlink("/proc/self/ns/net")
    while found := [process for process in psutil.process_iter() if _namespace(process.pid) == namespace]:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=5)


def _namespace(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
