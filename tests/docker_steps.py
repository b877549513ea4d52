"""Runs the Dockerfile as far as that goes without an image engine: `python tests/docker_steps.py`, two to three minutes.

Each stage gets an empty folder in place of its file system, and absolute paths such as /app are turned into paths there. COPY takes from the
build context only what .dockerignore lets through. RUN steps see a fresh home, the stage's ENV and PATH, and a bare virtual environment as the
base image's Python. At the end the entry point and the health check run on what came out, under an /app that they cannot write to.

What needs root in an image (apt-get, useradd) is left out and named. Only the standard library is used, so that nothing has to be installed first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]

# A RUN step with one of these programs changes the operating system of the image.
NEEDS_IMAGE = ("apt-get", "useradd")
# Absolute paths of the image that lie in the stage's folder; all others are the host's.
OWN_PATHS = re.compile(r"(?<![\w.$/-])/(?=(?:app|cache|root|usr/local)\b)")
# How this host reaches a package index; nothing else of its environment is passed on.
NETWORK = re.compile(r"(?i)^(\w+_proxy|ssl_cert_\w+|requests_ca_bundle|pip_(cert|index_url|extra_index_url|trusted_host)|uv_\w*index\w*)$")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Instruction:
    """One instruction of a Dockerfile: `RUN --mount=… uv sync` has keyword, flags and the rest."""

    keyword: str
    flags: dict[str, str]
    rest: str

    def words(self) -> list[str]:
        """The rest as a list, in either of its forms."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


@dataclass
class Stage:
    """FROM and what follows it."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, without comments. Here-documents are not known, and end in an error."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if not keyword.isupper() or "<<" in rest:
            raise ValueError(f"not understood: {line}")
        flags = {}
        while match := re.match(r"\s*--([\w-]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        found.append(Instruction(keyword, flags, rest.strip()))
    return found


def stages(instructions: list[Instruction]) -> list[Stage]:
    """The stages, with the ARGs before the first one put into their FROM lines."""
    arguments: dict[str, str] = {}
    found: list[Stage] = []
    for instruction in instructions:
        if instruction.keyword == "FROM":
            base, *as_name = expand(instruction.rest, arguments).split()
            found.append(Stage(as_name[1] if as_name else str(len(found)), base))
        elif found:
            found[-1].instructions.append(instruction)
        else:
            arguments.update(_pairs(instruction.rest))
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    """The text with $NAME and ${NAME} replaced."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda match: variables.get(match[1] or match[2], ""), text)


def _pairs(text: str) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in shlex.split(text))


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether a path of the build context is left out: the last pattern that fits it, or a folder that it lies in, decides."""
    places = [path, *(str(parent) for parent in PurePosixPath(path).parents if str(parent) != ".")]
    out = False
    for pattern in patterns:
        expression = _expression(pattern.removeprefix("!").strip("/"))
        if any(expression.fullmatch(place) for place in places):
            out = not pattern.startswith("!")
    return out


def _expression(pattern: str) -> re.Pattern:
    if re.search(r"[\[\\]", pattern):
        raise ValueError(f"not understood: {pattern}")
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(known.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern)))


def context_files(root: Path) -> list[str]:
    """What an image engine would be sent of a folder."""
    lines = (root / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in (".git", ".venv")]  # large; a test looks at their names
        here = Path(folder).relative_to(root)
        found += [path for name in files if not ignored(path := (here / name).as_posix(), patterns)]
    return sorted(found)


class StepError(Exception):
    """A step ended with an error."""


class Folder:
    """A folder in place of a stage's file system."""

    def __init__(self, root: Path, context: list[str], finished: dict[str, Path], given: dict[str, str]):
        self.root, self.context, self.finished, self.given = root, context, finished, given
        self.arguments: dict[str, str] = {}
        self.workdir = "/"
        self.programs: dict[str, list[str]] = {}
        self.skipped: list[str] = []
        network = {name: value for name, value in os.environ.items() if NETWORK.match(name)}
        # uv's cache is the host's, as the cache mount would be; one file system, so links will do.
        cache = os.environ.get("UV_CACHE_DIR") or os.path.expanduser("~/.cache/uv")
        self.overrides = {**network, "UV_CACHE_DIR": cache, "UV_LINK_MODE": "hardlink", "TMPDIR": str(root / "tmp")}
        self.env = {"PATH": self.inside("/usr/local/bin") + ":/usr/bin:/bin", "HOME": self.inside("/root"), "LANG": "C.UTF-8"}

    def inside(self, text: str) -> str:
        """A path or command of the image as one of this host."""
        return OWN_PATHS.sub(f"{self.root}/", text)

    def build(self, stage: Stage) -> None:
        """Carries out a stage."""
        for name in ("root", "tmp", "usr/local"):
            (self.root / name).mkdir(parents=True)
        here = ".".join(str(part) for part in sys.version_info[:2])
        print(f"\nFROM {stage.base}: a bare virtual environment of Python {here} stands for it")
        python = Path(sys.base_prefix) / "bin" / f"python{here}"
        self.call([str(python), "-m", "venv", str(self.root / "usr/local")])
        for step in stage.instructions:
            self.step(step)

    def step(self, step: Instruction) -> None:
        """Carries out one instruction."""
        began, title = time.monotonic(), f"{step.keyword} {step.rest}"
        match step.keyword:
            case "RUN":
                unknown = {kind for name, kind in step.flags.items() if name != "mount" or not kind.startswith("type=cache,")}
                if unknown:
                    raise ValueError(f"not understood: {unknown}")
                programs = [name for name in NEEDS_IMAGE if re.search(rf"\b{name}\b", step.rest)]
                if programs:
                    self.skipped.append(f"RUN {step.rest} ({' and '.join(programs)} need an image)")
                    return
                self.call(["/bin/sh", "-c", self.inside(step.rest)])
            case "COPY":
                self.copy(step)
            case "WORKDIR":
                self.workdir = step.rest
                self.path(".").mkdir(parents=True, exist_ok=True)
            case "ENV":
                known = {**self.arguments, **self.env}
                self.env |= {name: expand(self.inside(value), known) for name, value in _pairs(step.rest).items()}
            case "ARG":
                self.arguments |= {name: self.given.get(name, value) for name, value in _pairs(step.rest).items()}
            case "ENTRYPOINT" | "CMD":
                self.programs[step.keyword] = step.words()
            case "HEALTHCHECK":
                self.programs[step.keyword] = json.loads(step.rest.removeprefix("CMD"))
            case "USER" | "LABEL":
                pass
            case _:
                raise ValueError(f"not understood: {title}")
        if step.keyword in ("RUN", "COPY"):
            print(f"  {time.monotonic() - began:6.1f} s  {title}", flush=True)

    def path(self, name: str) -> Path:
        """Where a path of the image lies, relative ones under the working directory."""
        return self.root / (PurePosixPath(self.workdir) / name).relative_to("/")

    def copy(self, step: Instruction) -> None:
        """COPY, from the build context or from a stage before."""
        *sources, target = step.words()
        if stage := step.flags.get("from"):
            for source in sources:
                self.call(["cp", "-a", "--link", str(self.finished[stage] / source.lstrip("/")), str(self.path(target))])
            return
        for source in sources:
            files = [name for name in self.context if name == source or name.startswith(source.rstrip("/") + "/")]
            if not files:
                raise StepError(f"COPY {source}: not in the build context")
            for name in files:
                folder = target.endswith("/") or len(sources) > 1
                inner = name[len(source) :].strip("/") or (Path(name).name if folder else "")
                to = self.path(target) / inner
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, to)

    def call(self, command: list[str]) -> str:
        """Runs a program in the stage's working directory and environment; returns what it printed."""
        done = subprocess.run(
            command, cwd=self.path("."), env={**self.env, **self.overrides}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
        if done.returncode:
            raise StepError(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    def prove(self) -> None:
        """Runs what the image would run."""
        entry = self.programs["ENTRYPOINT"]
        if entry[0] == "tini" and not shutil.which("tini"):
            self.skipped.append("tini of ENTRYPOINT, which comes by apt-get")
            entry = entry[entry.index("--") + 1 :]
        trial = self.root / "tmp/trial.yaml"
        trial.write_text("datasets: [digits]\nsizes: [small]\nmodels: [vit_classic]\noverrides: {max_steps: 2}\n")
        with _read_only([self.path("."), *self.path(".").glob("diffvit"), *self.path(".").glob("study")]) as without_override:
            for arguments in (
                self.programs["HEALTHCHECK"],
                [*entry, *self.programs["CMD"]],
                [*entry, "study", "--grid", "digits", "--dry_run"],
                [*entry, "study", "--grid", str(trial), "--address", "local"],
                ["python", "-c", "import s3fs"],
            ):
                began = time.monotonic()
                # Found along the image's PATH, not along this script's.
                program = shutil.which(arguments[0], path=self.env["PATH"])
                if program is None:
                    raise StepError(f"{arguments[0]} is not in the image")
                output = self.call([*without_override, program, *arguments[1:]])
                print(f"  {time.monotonic() - began:6.1f} s  {shlex.join(arguments).replace(str(self.root), '')}", flush=True)
                print("           | " + (output.strip().splitlines() or [""])[-1])
        result = json.loads(next(self.path("checkpoints").glob("*/*_result.json")).read_text())
        if COMMIT not in json.dumps(result):
            raise StepError(f"the result does not name the commit: {result}")


@contextlib.contextmanager
def _read_only(folders: list[Path]) -> Iterator[list[str]]:
    """Folders that cannot be written to; for root there is a command prefix that makes this true."""
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder, mode in modes.items():
        folder.chmod(mode & ~0o222)
    try:
        as_root = os.geteuid() == 0 and shutil.which("setpriv")
        yield [as_root, "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if as_root else []
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)


def main() -> int:
    """Builds all stages, one after the other, and proves the last one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    keep = parser.parse_args().keep
    work = Path(tempfile.mkdtemp(prefix="steps-"))
    began = time.monotonic()
    skipped: list[str] = []
    context = context_files(ROOT)
    print(f"build context: {len(context)} files, {sum((ROOT / name).stat().st_size for name in context) / 1024:.0f} KB")
    try:
        finished: dict[str, Path] = {}
        *before, last = stages(parse((ROOT / "Dockerfile").read_text()))
        for stage in before:
            # All stages are built at one place, so that paths within one are right in the next, as in an image.
            folder = Folder(work / "root", context, finished, {"COMMIT": COMMIT})
            folder.build(stage)
            skipped += folder.skipped
            finished[stage.name] = folder.root.rename(work / stage.name)
        folder = Folder(work / "root", context, finished, {"COMMIT": COMMIT})
        folder.build(last)
        for old in finished.values():  # the last stage stands alone
            shutil.rmtree(old)
        print("\nWhat the image would run:")
        folder.prove()
        skipped += folder.skipped
    except StepError as error:
        print(f"\nFAILED: {error}")
        return 1
    finally:
        if not keep:
            shutil.rmtree(work)
    print(f"\nThe Dockerfile's steps ran, in {time.monotonic() - began:.0f} s. Not run here:")
    for line in [*skipped, "the image itself: no layer was built, and no GPU was used"]:
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
