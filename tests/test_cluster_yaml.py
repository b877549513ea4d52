"""cluster.yaml: Ray's own validator takes it, and what that lets through is checked here. Each check fails on a file that is wrong."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()

Config = dict[str, Any]

# What Ray reads of a local provider with given addresses; of others it says nothing.
PROVIDER_KEYS = {"type", "head_ip", "worker_ips", "external_head_ip"}
PORT = 6379


def _values(node: Any) -> Iterator[str]:
    """All strings in a configuration."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from (*_values(key), *_values(value))
    elif isinstance(node, list):
        for value in node:
            yield from _values(value)
    elif isinstance(node, str):
        yield node


def _starts(config: Config, role: str) -> list[str]:
    """The commands that start Ray on the head or on workers."""
    return [command for command in config.get(f"{role}_start_ray_commands", []) if "ray start" in command]


def _option(options: list[str], name: str) -> list[str]:
    """What an option of docker run is given, each time."""
    return [option.partition("=")[2] for option in options if option.partition("=")[0] == name]


def _volumes(config: Config) -> dict[str, str]:
    """Where the container has what of the host."""
    return {place.split(":")[1]: place.split(":")[0] for place in _option(config["docker"]["run_options"], "--volume")}


def _faults(text: str) -> list[str]:
    """What is wrong with a cluster.yaml, a sentence each."""
    config = yaml.safe_load(text)
    faults = list(_placeholders(text, config))
    for check in (_rays_validator, _provider, _addresses, _tokens, _dashboard, _detection, _secrets, _mounts, _environment):
        try:
            faults += check(copy.deepcopy(config))
        except (KeyError, IndexError) as error:
            faults.append(f"{error} is missing")
    return faults


def _rays_validator(config: Config) -> Iterator[str]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    if unknown := set(config) - _keys_of_ray():
        yield f"Ray knows no {unknown}"
    try:
        validate_config(prepare_config(config))
    except SystemExit:  # Ray's way to refuse
        yield "Ray refuses it"
    except Exception as error:
        yield f"Ray refuses it: {error}"


def _keys_of_ray() -> set[str]:
    import json

    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return set(schema["properties"]) - {"no_restart", "available_node_types", "head_node_type"}


def _provider(config: Config) -> Iterator[str]:
    provider = config["provider"]
    if unknown := set(provider) - PROVIDER_KEYS:
        yield f"a local provider has no {unknown}"
    if provider["type"] != "local" or not provider["worker_ips"]:
        yield "it is not a cluster of given hosts"


def _addresses(config: Config) -> Iterator[str]:
    (head,), (worker,) = _starts(config, "head") or [""], _starts(config, "worker") or [""]
    if f"--node-ip-address={config['provider']['head_ip']}" not in head.split() or f"--port={PORT}" not in head.split():
        yield "the head does not listen where the workers look for it"
    if f"--address=$RAY_HEAD_IP:{PORT}" not in worker.split():
        yield "workers do not look for the head"
    if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in head.split():
        yield "the head starts no workers"
    if any(config[f"{role}_start_ray_commands"][0] != "ray stop" for role in ("head", "worker")):
        yield "a Ray that is there already is not ended first"


def _tokens(config: Config) -> Iterator[str]:
    path = next(iter(_environment_of(config).get("RAY_AUTH_TOKEN_PATH", [])), "")
    for role in ("head", "worker"):
        for command in _starts(config, role):
            exports = command.partition("ray start")[0]
            if "RAY_AUTH_MODE=token" not in exports or f"RAY_AUTH_TOKEN_PATH={path};" not in exports or "export " not in exports:
                yield f"Ray on the {role} takes everybody"
    if _environment_of(config).get("RAY_AUTH_MODE") != ["token"]:
        yield "a study in the container has no token"
    if Path(path).parent.as_posix() not in config["file_mounts"]:
        yield "the token does not come to the hosts"


def _environment_of(config: Config) -> dict[str, list[str]]:
    variables: dict[str, list[str]] = {}
    for given in _option(config["docker"]["run_options"], "--env"):
        variables.setdefault(given.partition("=")[0], []).append(given.partition("=")[2])
    return variables


def _dashboard(config: Config) -> Iterator[str]:
    if any("--dashboard-host=127.0.0.1" not in command.split() for command in _starts(config, "head")):
        yield "the dashboard listens to the network"


def _detection(config: Config) -> Iterator[str]:
    if any("--num-gpus" in command for role in ("head", "worker") for command in _starts(config, role)):
        yield "GPUs are counted by hand"
    if "--gpus=all" not in config["docker"]["run_options"]:
        yield "the container has no GPUs"


SECRETS = re.compile(r"hf_\w{10}|AKIA\w{12}|[0-9a-f]{32}|RAY_AUTH_TOKEN=|_TOKEN=\w|SECRET\w*=|PASSWORD=|PRIVATE KEY")


def _secrets(config: Config) -> Iterator[str]:
    for value in _values(config):
        if SECRETS.search(value):
            yield f"a secret: {value}"


def _mounts(config: Config) -> Iterator[str]:
    volumes = _volumes(config)
    options = config["docker"]["run_options"]
    if len(volumes) != len(_option(options, "--volume")):
        yield "two volumes are in one place"
    places = [*volumes, *config["file_mounts"]]
    for place in places:
        if not place.startswith("/"):
            yield f"{place} is no place in a container"
        if any(other != place and other.startswith(place.rstrip("/") + "/") for other in places):
            yield f"{place} hides another mount or is hidden"
    for path in ("/app/checkpoints", "/cache", "/data"):
        if path not in volumes:
            yield f"{path} goes with the container"
    # Without them Docker makes them, for root alone.
    made = {path for command in config["initialization_commands"] for path in shlex.split(command)[2:] if command.startswith("mkdir -p ")}
    for source in volumes.values():
        if source.replace("$HOME", "~") not in made:
            yield f"{source} is not made on the host"
    if not _option(options, "--shm-size"):
        yield "the container has 64 MB of shared memory"
    if _option(options, "--entrypoint") != ['""']:
        yield "the image's entry point takes Ray's shell for a command"
    if "grep -qs /app/.venv/bin ~/.bashrc || echo 'export PATH=/app/.venv/bin:$PATH' >> ~/.bashrc" not in config["setup_commands"]:
        yield "a login shell does not find ray"


def _environment(config: Config) -> Iterator[str]:
    from ray.autoscaler.sdk import get_docker_host_mount_location

    on_host = [get_docker_host_mount_location(config["cluster_name"]) + mount for mount in config["file_mounts"]]
    files = _option(config["docker"]["run_options"], "--env-file")
    if not files or any(str(Path(file).parent) not in on_host for file in files):
        yield "the environment does not come to the hosts"


def _placeholders(text: str, config: Config) -> Iterator[str]:
    comments = "\n".join(re.findall(r"^#   (<.*)$", text, re.MULTILINE))
    explained = set(re.findall(r"^<[A-Z0-9_]+>", comments, re.MULTILINE))
    used = {name for value in _values(config) for name in re.findall(r"<[A-Z0-9_]+>", value)}
    for name in used ^ explained:
        yield f"{name} is to be filled in and not explained, or the other way round"
    for value in (
        config["provider"]["head_ip"],
        *config["provider"].get("worker_ips", []),
        config["auth"]["ssh_user"],
        config["docker"]["image"],
    ):
        if not re.search(r"<[A-Z0-9_]+>", value):
            yield f"{value} is somebody's"


def test_the_file_is_right() -> None:
    assert _faults(TEXT) == []


def test_a_file_that_is_filled_in_is_one_that_ray_takes() -> None:
    names = {"<HEAD_IP>": "10.0.0.1", "<WORKER_IP_1>": "10.0.0.2", "<SSH_USER>": "ubuntu", "<OWNER>": "somebody", "<VERSION>": "0.1.0"}
    text = re.sub(r"<[A-Z0-9_]+>", lambda found: names[found.group()], TEXT)
    assert [fault for fault in _faults(text) if "somebody's" not in fault] == []


BROKEN = [
    ("cluster_name: diffvit", "cluster_name: diffvit\nmax_worker: 1", "Ray refuses it"),
    ("cluster_name: diffvit\n", "", "'cluster_name' is missing"),
    ("cluster_name: diffvit", "cluster_name: study", "environment does not come"),
    ("cluster_name: diffvit", "cluster_name: diffvit\nno_restart: true", "Ray knows no {'no_restart'}"),
    ("  container_name: diffvit\n", "", "Ray refuses it"),
    ("  container_name:", "  name: x\n  container_name:", "Ray refuses it"),
    ("  ssh_user:", "  port: 22\n  ssh_user:", "Ray refuses it"),
    ("  worker_ips:\n", "  region: here\n  worker_ips:\n", "local provider has no {'region'}"),
    ("  worker_ips:\n    - <WORKER_IP_1>", "  worker_ips: []", "given hosts"),
    ("  worker_ips:\n    - <WORKER_IP_1>\n", "", "Ray refuses it"),
    ("--address=$RAY_HEAD_IP:6379", "--address=10.0.0.1:6379", "workers do not look"),
    ("--address=$RAY_HEAD_IP:6379", "--address=$RAY_HEAD_IP:6380", "workers do not look"),
    ("--node-ip-address=<HEAD_IP> ", "", "head does not listen"),
    ("--port=6379", "--port=6380", "head does not listen"),
    (" --autoscaling-config=~/ray_bootstrap_config.yaml", "", "head starts no workers"),
    ("worker_start_ray_commands:\n  - ray stop\n", "worker_start_ray_commands:\n", "not ended first"),
    ("export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/diffvit/auth_token;\n    ray start --head", "ray start --head", "on the head takes"),
    ("export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/diffvit/auth_token;\n    ray start --address", "ray start --address", "on the worker takes"),
    ("--env=RAY_AUTH_MODE=token", "--env=RAY_AUTH_MODE=disabled", "study in the container has no token"),
    ("--env=RAY_AUTH_TOKEN_PATH=/run/diffvit/auth_token", "--env=RAY_AUTH_TOKEN_PATH=/run/other/auth_token", "takes everybody"),
    ("/run/diffvit/auth_token", "/run/other/auth_token", "token does not come"),
    ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard listens"),
    ("--dashboard-host=127.0.0.1", "", "dashboard listens"),
    ("ray start --address", "ray start --num-gpus=1 --address", "by hand"),
    ("    - --gpus=all\n", "", "has no GPUs"),
    ("--env=RAY_USAGE_STATS_ENABLED=0", "--env=HF_TOKEN=abc", "a secret"),
    ("--env=RAY_USAGE_STATS_ENABLED=0", "--env=RAY_AUTH_TOKEN=$TOKEN", "a secret"),
    ("--env=RAY_USAGE_STATS_ENABLED=0", f"--env=X={'0a' * 32}", "a secret"),
    ("diffvit/data:/data:ro", "diffvit/data:/app/checkpoints:ro", "two volumes"),
    ("diffvit/data:/data:ro", "diffvit/data:/cache/data:ro", "/cache hides"),
    ("diffvit/data:/data:ro", "diffvit/data:data:ro", "no place in a container"),
    ("diffvit/checkpoints:/app/checkpoints", "diffvit/checkpoints:/elsewhere/checkpoints", "/app/checkpoints goes"),
    ("mkdir -p ~/diffvit/checkpoints ~/diffvit/data", "mkdir -p ~/diffvit/data", "not made on the host"),
    ("    - --shm-size=8g ", "    #", "shared memory"),
    ('    - --entrypoint="" ', "    #", "entry point"),
    ("  - grep -qs /app/.venv/bin ~/.bashrc || echo", "  - echo", "login shell"),
    (">> ~/.bashrc", ">> ~/.profile", "login shell"),
    ("/tmp/ray_tmp_mount/diffvit/run/diffvit/env", "~/.diffvit/env", "environment does not come"),
    ("#   <OWNER> ", "#   OWNER ", "<OWNER> is to be filled in"),
    ("image: ghcr.io/<OWNER>/", "image: ghcr.io/me/", "<OWNER> is to be filled in"),
    ("diffvit:<VERSION>", "diffvit:latest", "<VERSION> is to be filled in"),
    ("#   <OWNER> ", "#   <NOBODY> x\n#   <OWNER> ", "<NOBODY> is to be"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "said"), BROKEN)
def test_a_file_that_is_wrong_is_found_out(right: str, wrong: str, said: str) -> None:
    assert right in TEXT
    faults = _faults(TEXT.replace(right, wrong))
    assert any(said in fault for fault in faults), faults


def test_the_container_is_started_as_meant() -> None:
    """What Ray makes of the file, as the host's shell reads it."""
    from ray.autoscaler._private.docker import docker_start_cmds

    config = yaml.safe_load(TEXT)
    docker = config["docker"]
    command = docker_start_cmds(
        "ubuntu", docker["image"], config["file_mounts"], docker["container_name"], docker["run_options"], config["cluster_name"], "/cache", "docker"
    )  # fmt: skip
    words = shlex.split(command)
    assert words[:2] == ["docker", "run"] and words[-2:] == [docker["image"], "bash"]
    assert "--entrypoint=" in words and "--net=host" in words
    mounted = words[words.index("-v") + 1].replace("//", "/")
    assert mounted == "/tmp/ray_tmp_mount/diffvit/run/diffvit:/run/diffvit"


@pytest.mark.skipif(not (ROOT / "Dockerfile").is_file(), reason="there is no Dockerfile beside cluster.yaml")
def test_the_image_has_what_the_cluster_takes_for_granted() -> None:
    image = (ROOT / "Dockerfile").read_text()
    for package in ("rsync", "openssh-client"):  # Ray copies files into the container; the head logs in to the workers
        assert re.search(rf"(?<![\w-]){package}(?![\w-])", image), f"the image has no {package}"
    assert "WORKDIR /app\n" in image and "/app/.venv" in image and "HOME=/cache" in image
    assert 'ENTRYPOINT ["tini", "--", "python", "run.py"]' in image  # else cluster.yaml need not take it away
