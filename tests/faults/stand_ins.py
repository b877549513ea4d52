"""ssh, rsync and docker for hosts that are network namespaces of this machine, for `ray up`.

Called as `stand_ins.py FACTS COMMAND …`. A host is the namespace of its address, a container an environment and symbolic links for its
volumes. What the commands are asked for is taken as the real ones take it, as far as Ray asks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# What sshd and Docker give to commands, and no more: nothing of the test's own environment shall help.
BARE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def ssh(facts: dict[str, Any], arguments: list[str]) -> int:
    """Runs a command on the host that is named as user@address."""
    at = next(i for i, word in enumerate(arguments) if "@" in word and word.rpartition("@")[2] in facts["keepers"])
    address = arguments[at].rpartition("@")[2]
    within = ["nsenter", "-t", str(facts["keepers"][address]), "-n"]
    environment = {**BARE, "HOME": facts["home"], "HOST": address}
    return subprocess.run([*within, "bash", "-c", " ".join(arguments[at + 1 :])], env=environment, start_new_session=True).returncode


def rsync(facts: dict[str, Any], arguments: list[str]) -> int:
    """Copies a file or the content of a folder; all hosts and containers have the same files."""
    source, target = Path(arguments[-2]), Path(arguments[-1].partition(":")[2])
    if source.resolve() == target.resolve():
        return 0
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)
    return 0


def docker(facts: dict[str, Any], arguments: list[str]) -> int:
    """One container a host; its environment lies in a file."""
    state = Path(facts["folder"]) / f"container-{os.environ['HOST']}.json"
    command, *rest = arguments
    if command == "run":
        state.write_text(json.dumps(_run(facts, rest)))
    elif command == "exec":
        while rest[0].startswith("-"):
            rest.pop(0)
        environment = json.loads(state.read_text())
        return subprocess.run(rest[1:], env=environment, cwd=facts["image"] + "/app").returncode
    elif command == "inspect":
        template = rest[rest.index("-f") + 1]
        if "Config.Env" in template:
            print(json.dumps([f"HOME={facts['image']}/cache"]))
        elif not state.exists():
            print("no such object", file=sys.stderr)
            return 1
        else:
            print({"{{.State.Running}}": "true", "{{json .Mounts}}": "[]", "{{.Config.Image}}": facts["name"]}[template])
    return 0


def _run(facts: dict[str, Any], options: list[str]) -> dict[str, str]:
    """The environment of a new container, after its volumes are where it looks for them."""
    image = facts["image"]
    assert options[-2:] == [facts["name"], "bash"] and "--entrypoint=" in options, options
    environment = {**BARE, "HOME": f"{image}/cache", "PYTHONPATH": f"{image}/app"}
    environment["PATH"] = f"{image}/app/.venv/bin:{environment['PATH']}"
    words = iter(options[:-2])
    for word in words:
        name, given, value = word.partition("=")
        if name in ("-v", "--volume"):
            source, target, *_ = (value if given else next(words)).split(":")
            assert Path(source).is_dir(), source
            if not Path(target).is_symlink():
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                Path(target).symlink_to(source)
        elif name in ("-e", "--env"):
            key, _, what = (value if given else next(words)).partition("=")
            environment[key] = what
        elif name == "--env-file":
            environment |= dict(line.split("=", 1) for line in Path(value).read_text().splitlines() if line and line[0] != "#")
    return environment


if __name__ == "__main__":
    run = {"ssh": ssh, "rsync": rsync, "docker": docker}[sys.argv[2]]
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text()), sys.argv[3:]))
