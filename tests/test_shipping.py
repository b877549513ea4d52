"""What ships diffvit: the Dockerfile, its build context and the workflows, by the tools made for them and by rules of our own."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker_steps import Stage, context_files, expand, ignored, parse, stages

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    program = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin") or shutil.which(name)
    assert program, f"{name} is a development dependency: uv sync"
    return subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


# The Dockerfile


@pytest.mark.skipif(not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="hadolint's wheel is for Linux on x86-64 only")
def test_hadolint_finds_nothing() -> None:
    done = tool("hadolint", "--no-color", "Dockerfile")
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built() -> list[Stage]:
    return stages(parse(DOCKERFILE))


def test_two_stages_from_a_named_version(built: list[Stage]) -> None:
    assert [stage.name for stage in built] == ["dependencies", "runtime"]
    for stage in built:
        assert re.fullmatch(r"python:3\.\d+-slim-bookworm", stage.base)
    assert "latest" not in DOCKERFILE


def test_the_image_runs_as_another_user_than_root(built: list[Stage]) -> None:
    last = {step.keyword: step for step in built[-1].instructions}  # the last of each
    assert int(last["USER"].rest) > 0
    assert f"useradd --uid {last['USER'].rest} " in DOCKERFILE
    assert last["HEALTHCHECK"].rest.startswith("CMD [")
    assert last["ENTRYPOINT"].words()[-2:] == ["python", "run.py"]


def test_nothing_from_the_network_but_packages_and_no_secrets(built: list[Stage]) -> None:
    for step in (step for stage in built for step in stage.instructions):
        assert step.keyword != "ADD" and "://" not in step.rest
        assert not re.search(r"\b(curl|wget|git)\b", step.rest)
        if step.keyword in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", step.rest)


def test_the_dependencies_layer_does_not_depend_on_sources(built: list[Stage]) -> None:
    copied = [step.rest for step in built[0].instructions if step.keyword == "COPY"]
    assert copied == ["pyproject.toml ./"]
    assert any("uv sync --no-install-project --no-dev" in step.rest for step in built[0].instructions)


def test_one_version_of_uv_everywhere() -> None:
    assert set(re.findall(r"uv==(\S+)|UV_VERSION: \"(.*)\"", DOCKERFILE + WORKFLOWS[-1].read_text())) == {("0.13.9", ""), ("", "0.13.9")}


# The build context


def test_the_context_is_the_code_and_nothing_else() -> None:
    found = context_files(ROOT)
    assert {name for name in found if "/" not in name} == {"LICENSE", "pyproject.toml", "run.py"}
    code = {path.relative_to(ROOT).as_posix() for folder in ("diffvit", "study") for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {name for name in found if "/" in name} == {name for name in code if "__pycache__" not in name}
    for step in (step for step in parse(DOCKERFILE) if step.keyword == "COPY" and not step.flags):
        for source in step.words()[:-1]:
            assert any(name == source or name.startswith(f"{source}/") for name in found), f"COPY {source} finds nothing"


def test_the_context_has_no_secrets_and_no_results() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for path in (
        ".env", ".env.example", "diffvit/.env", ".git/config", ".venv/bin/python", "checkpoints/vit_classic/model.safetensors",
        "checkpoints/.state/folder", "tests/conftest.py", "docs/design.md", "diffvit/__pycache__/vit.cpython-311.pyc", "uv.lock",
        ".github/workflows/test.yml", "notes.txt", "diffvit/notes/key.py.txt",
    ):  # fmt: skip
        assert ignored(path, patterns), path


@pytest.mark.parametrize(
    ("patterns", "path", "out"),
    [
        (["a"], "a/b/c", True),  # a folder takes what lies in it along
        (["a"], "b/a", False),  # patterns start at the root
        (["**/a"], "b/c/a", True),
        (["**/a"], "a", True),
        (["*.txt"], "b/c.txt", False),
        (["a/**"], "a/b/c", True),
        (["*", "!a"], "a/b", False),  # and an exception too
        (["*", "!a", "**/*.log"], "a/b.log", True),  # the last that fits decides
        (["/a/?.py"], "a/b.py", True),
    ],
)
def test_patterns_mean_what_they_mean_to_docker(patterns: list[str], path: str, out: bool) -> None:
    assert ignored(path, patterns) is out


def test_the_dockerfile_is_read_as_docker_reads_it() -> None:
    read = parse(
        '# c\nARG V=3\nFROM x:${V} AS one\nRUN --mount=type=cache,target=/c a \\\n    # aside\n    && b\nCOPY --from=one /d ./\nCMD ["e", "f"]\n'
    )
    assert [step.keyword for step in read] == ["ARG", "FROM", "RUN", "COPY", "CMD"]
    assert read[2].rest == "a && b" and read[2].flags == {"mount": "type=cache,target=/c"}
    assert read[3].flags == {"from": "one"} and read[4].words() == ["e", "f"]
    assert [(stage.name, stage.base) for stage in stages(read)] == [("one", "x:3")]
    assert expand("$A/${B}$C", {"A": "a", "B": "b"}) == "a/b"
    with pytest.raises(ValueError, match="not understood"):
        parse("RUN <<EOF\nls\nEOF\n")


# A run in the image


def test_a_run_without_git_records_the_commit_of_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffvit.machine import device

    def no_git(*arguments: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(device.subprocess, "run", no_git)
    monkeypatch.setenv("DIFFVIT_COMMIT", "c0ffee")
    assert device._git_commit() == "c0ffee"
    monkeypatch.setenv("DIFFVIT_COMMIT", "")
    assert device._git_commit() is None


# The workflows


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job.get("steps", [])]


def test_zizmor_finds_nothing() -> None:
    done = tool("zizmor", "--offline", "--no-progress", "--color=never", ".github/workflows")
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_fit_their_schema() -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_their_commit(path: Path) -> None:
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for line in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+|\./\.github/workflows/test\.yml # .*", line), line
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_do_no_more_than_it_must(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    extra = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert extra == ({"image": {"contents": "read", "packages": "write"}} if path.stem == "release" else {})
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 90, name
        assert "uses" in job or not job["runs-on"].endswith("latest"), name
    triggers = workflow[True]  # `on`, to YAML
    assert set(triggers) == ({"release"} if path.stem == "release" else {"push", "pull_request", "workflow_call"})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_secret_and_no_expression_reaches_a_shell(path: Path) -> None:
    for step in steps(path):
        assert "${{" not in step.get("run", ""), step
        assert "secrets." not in str(step.get("env", "")), step
    assert re.findall(r"secrets\.(\w+)", path.read_text()) == (["GITHUB_TOKEN"] if path.stem == "release" else [])


def test_every_supported_python_is_tried() -> None:
    matrix = jobs(ROOT / ".github/workflows/test.yml")["tests"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert matrix == ["3.11", "3.12", "3.13"]


def test_the_workflow_runs_what_ci_runs() -> None:
    here = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("uv ")]
    there = [
        step["run"]
        for name, job in jobs(ROOT / ".github/workflows/test.yml").items()
        for step in job["steps"]
        if name != "lowest" and step.get("run", "").startswith("uv ")
    ]
    assert set(here) == set(there) and len(here) >= 7


def test_the_lowest_versions_are_tried_without_the_pins() -> None:
    runs = [step.get("run") for step in jobs(ROOT / ".github/workflows/test.yml")["lowest"]["steps"]]
    assert "uv pip install --no-config --resolution lowest-direct --editable . --group dev" in runs


def test_every_dependency_has_a_bound_and_a_pin_within_it() -> None:
    from packaging.requirements import Requirement

    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["s3"], *PROJECT["dependency-groups"]["dev"]]
    pins = {pin.name: pin.specifier for pin in map(Requirement, PROJECT["tool"]["uv"]["constraint-dependencies"])}
    for each in map(Requirement, wanted):
        if each.name.startswith("types-"):
            continue
        assert [bound.operator for bound in each.specifier] == [">="], each
        version = next(iter(pins[each.name])).version.removesuffix(".*")
        assert each.specifier.contains(version), (each, version)


def test_a_release_can_be_traced() -> None:
    path = ROOT / ".github/workflows/release.yml"
    assert jobs(path)["image"]["needs"] == "test" and jobs(path)["image"]["outputs"]["digest"]
    build = next(step["with"] for step in steps(path) if step.get("uses", "").startswith("docker/build-push-action@"))
    assert build["push"] and build["sbom"] and build["provenance"] == "mode=max"
    assert build["build-args"] == "COMMIT=${{ github.sha }}" and build["labels"]
    assert build["cache-from"] == "type=gha" and build["cache-to"].startswith("type=gha")
