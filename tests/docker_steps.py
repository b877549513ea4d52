"""Runs the Dockerfile as far as that goes without an image engine: `python tests/docker_steps.py`, one to two minutes; with --debian about five.

Each stage gets an empty folder in place of its file system, and absolute paths such as /app are turned into paths there. COPY takes from the
build context only what .dockerignore lets through. RUN steps see a fresh home, the stage's ENV and PATH, and a bare virtual environment as the
base image's Python. At the end the entry point and the health check run on what came out, under an /app that they cannot write to.
What changes an operating system (apt-get, useradd) is left out and named.

With --debian (root, Linux, debootstrap) each stage gets a minimal Debian instead, and every step runs in it as it is written, at its own paths. At the
end tini is process 1, the user is the image's and then one that the image does not know, and SIGTERM must end a study as `docker stop` would.

Only the standard library is used, so that nothing has to be installed first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]

# A RUN step with one of these programs changes the operating system of the image.
NEEDS_SYSTEM = ("apt-get", "useradd")
# Absolute paths of the image that lie in the stage's folder; all others are the host's.
OWN_PATHS = re.compile(r"(?<![\w.$/-])/(?=(?:app|cache|root|usr/local)\b)")
# How this host reaches a package index; nothing else of its environment is passed on.
NETWORK = re.compile(r"(?i)^(\w+_proxy|ssl_cert_\w+|requests_ca_bundle|pip_(cert|index_url|extra_index_url|trusted_host)|uv_\w*index\w*)$")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRIAL = "datasets: [digits]\nsizes: [small]\nmodels: [vit_differential]\noverrides: {max_steps: 2}\n"


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

    left_out: tuple[str, ...] = NEEDS_SYSTEM

    def __init__(self, root: Path, context: list[str], finished: dict[str, Path]):
        self.root, self.context, self.finished = root, context, finished
        self.workdir, self.user = "/", ""
        self.arguments: dict[str, str] = {}
        self.programs: dict[str, list[str]] = {}
        self.skipped: list[str] = []
        network = {name: value for name, value in os.environ.items() if NETWORK.match(name)}
        # uv's cache is the host's, as the cache mount would be; one file system, so links will do.
        self.overrides = {**network, "UV_CACHE_DIR": str(_uv_cache()), "UV_LINK_MODE": "hardlink", "TMPDIR": str(root / "tmp")}
        self.env = {"PATH": self.inside("/usr/local/bin") + ":/usr/bin:/bin", "HOME": self.inside("/root"), "LANG": "C.UTF-8"}

    def inside(self, text: str) -> str:
        """A path or command of the image as one of this host."""
        return OWN_PATHS.sub(f"{self.root}/", text)

    def path(self, name: str) -> Path:
        """Where a path of the image lies, relative ones under the working directory."""
        return self.root / (PurePosixPath(self.workdir) / name).relative_to("/")

    def start(self, image: str) -> None:
        """What stands for the base image."""
        for name in ("root", "tmp", "usr/local"):
            (self.root / name).mkdir(parents=True)
        here = ".".join(str(part) for part in sys.version_info[:2])
        print(f"\nFROM {image}: a bare virtual environment of Python {here} stands for it", flush=True)
        _host(str(Path(sys.base_prefix) / "bin" / f"python{here}"), "-m", "venv", str(self.root / "usr/local"))

    def build(self, stage: Stage) -> None:
        """Carries out a stage."""
        self.start(stage.base)
        for step in stage.instructions:
            began = time.monotonic()
            self.step(step)
            if step.keyword in ("RUN", "COPY") and not (self.skipped and step.rest in self.skipped[-1]):
                print(f"  {time.monotonic() - began:6.1f} s  {step.keyword} {step.rest}", flush=True)

    def step(self, step: Instruction) -> None:
        """Carries out one instruction."""
        match step.keyword:
            case "RUN":
                cache = step.flags.get("mount", "type=cache,target=").partition("type=cache,target=")
                if set(step.flags) - {"mount"} or cache[0] or not cache[1]:
                    raise ValueError(f"not understood: {step.flags}")
                programs = [name for name in self.left_out if re.search(rf"\b{name}\b", step.rest)]
                if programs:
                    self.skipped.append(f"RUN {step.rest} ({' and '.join(programs)} would change this host)")
                else:
                    self.call(["/bin/sh", "-c", self.inside(step.rest)], cache=cache[2])
            case "COPY":
                self.copy(step)
            case "WORKDIR":
                self.workdir = step.rest
                self.path(".").mkdir(parents=True, exist_ok=True)
            case "ENV":
                known = {**self.arguments, **self.env}
                self.env |= {name: expand(self.inside(value), known) for name, value in _pairs(step.rest).items()}
            case "ARG":
                given = {"COMMIT": COMMIT}
                self.arguments |= {name: given.get(name, value) for name, value in _pairs(step.rest).items()}
            case "ENTRYPOINT" | "CMD":
                self.programs[step.keyword] = step.words()
            case "HEALTHCHECK":
                self.programs[step.keyword] = json.loads(step.rest.removeprefix("CMD"))
            case "USER":
                self.user = step.rest
            case "LABEL":
                pass
            case _:
                raise ValueError(f"not understood: {step}")

    def copy(self, step: Instruction) -> None:
        """COPY, from the build context or from a stage before."""
        *sources, target = step.words()
        if stage := step.flags.get("from"):
            for source in sources:
                _host("cp", "-a", "--link", str(self.finished[stage] / source.lstrip("/")), str(self.path(target)))
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

    def call(self, command: list[str], *, cache: str = "", prefix: Sequence[str] = ()) -> str:
        """Runs a program in the stage; returns what it printed."""
        program = shutil.which(command[0], path=self.env["PATH"])  # along the image's PATH, not along this script's
        if program is None:
            raise StepError(f"{command[0]} is not in the image")
        return _run([*prefix, program, *command[1:]], cwd=self.path("."), env={**self.env, **self.overrides})

    def prove(self) -> None:
        """Runs what the image would run."""
        if self.programs["ENTRYPOINT"][0] == "tini" and not shutil.which("tini"):
            self.skipped.append("tini of ENTRYPOINT, which comes by apt-get")
            self.programs["ENTRYPOINT"] = self.programs["ENTRYPOINT"][2:]
        with _read_only([self.path("."), self.path("diffvit"), self.path("study")]) as prefix:
            self.prove_programs(prefix)

    def prove_programs(self, prefix: Sequence[str] = ()) -> None:
        """Help, health check, a dry run, and a study of one run of two steps, whose result must name the image's commit."""
        entry = self.programs["ENTRYPOINT"]
        self.path("/cache/trial.yaml").write_text(TRIAL)
        for command in (
            self.programs["HEALTHCHECK"],
            [*entry, *self.programs["CMD"]],
            [*entry, "study", "--grid", "digits", "--dry_run"],
            [*entry, "study", "--grid", self.inside("/cache/trial.yaml"), "--address", "local"],
            ["python", "-c", "import s3fs"],
        ):
            began = time.monotonic()
            output = self.call(command, prefix=prefix)
            print(f"  {time.monotonic() - began:6.1f} s  {shlex.join(command).replace(str(self.root), '')}")
            print("           | " + (output.strip().splitlines() or [""])[-1], flush=True)
        result = next(self.path("checkpoints").glob("*/*_result.json")).read_text()
        if COMMIT not in result:
            raise StepError(f"the result does not name the commit: {result}")


class Debian(Folder):
    """A minimal Debian in place of a stage's file system."""

    left_out = ()

    def __init__(self, root: Path, context: list[str], finished: dict[str, Path]):
        super().__init__(root, context, finished)
        self.env["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        for name in ("UV_CACHE_DIR", "UV_LINK_MODE", "TMPDIR"):
            del self.overrides[name]
        self.overrides["PIP_BREAK_SYSTEM_PACKAGES"] = "1"  # Debian guards its Python, the base image does not

    def inside(self, text: str) -> str:
        """Paths are what they are."""
        return text

    def start(self, image: str) -> None:
        """A Debian of the base image's release with its own Python; made once, and copied for later stages."""
        suite = image.rpartition("-")[2]
        base = self.root.parent / suite
        began = time.monotonic()
        if not base.exists():
            packages = "--include=ca-certificates,python3,python3-pip,python3-venv"
            _host("debootstrap", "--variant=minbase", packages, suite, str(base), timeout=1200)
            (base / "usr/local/bin/python").symlink_to("/usr/bin/python3")
            certificates = [value for name, value in self.overrides.items() if name.upper().endswith(("_FILE", "_BUNDLE", "_CERT"))]
            for name in {"/etc/resolv.conf", "/etc/hosts", *certificates}:
                if Path(name).is_file():
                    (base / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(name, base / name.lstrip("/"))
        _host("cp", "-a", str(base), str(self.root))
        print(f"\nFROM {image}: a minimal Debian {suite} stands for it, after {time.monotonic() - began:.0f} s", flush=True)

    def command(self, command: list[str], cache: str, user: str) -> list[str]:
        """A command as process 1 of namespaces of its own, under the stage's root."""
        mounts = ['mount -t proc proc "$0/proc"', 'mount --rbind /dev "$0/dev"', 'mount -t tmpfs -o size=1g tmpfs "$0/dev/shm"']
        if cache:
            self.path(cache).mkdir(parents=True, exist_ok=True)
            mounts.append(f'mount --bind {shlex.quote(str(_uv_cache()))} "$0{cache}"')
        within = f'cd {self.workdir} && exec "$@"'
        enter = f'exec chroot --userspec={user or "0:0"} "$0" /bin/sh -c {shlex.quote(within)} sh "$@"'
        return ["unshare", "--mount", "--pid", "--fork", "/bin/sh", "-c", " && ".join([*mounts, enter]), str(self.root), *command]

    def call(self, command: list[str], *, cache: str = "", prefix: Sequence[str] = ()) -> str:
        """Runs a program in the stage; a prefix is a user."""
        return _run(self.command(command, cache, "".join(prefix)), cwd=Path("/"), env={**self.env, **self.overrides})

    def prove(self) -> None:
        """As the image's user, and as one that it does not know; then SIGTERM."""
        for user in (f"{self.user}:{self.user}", "4321:4321"):
            print(f" as user {user}")
            self.prove_programs([user])
            refused = self.call(["/bin/sh", "-c", "touch /app/file 2>&1 || true"], prefix=[user])
            if "denied" not in refused:
                raise StepError("the user may write to /app")
            self.call(["/bin/sh", "-c", "rm -r /app/checkpoints/* /app/checkpoints/.[a-z]* /cache/trial.yaml || true"])
        self.prove_stop(f"{self.user}:{self.user}")

    def prove_stop(self, user: str) -> None:
        """SIGTERM to process 1 in the middle of a study, which is what `docker stop` sends."""
        command = [*self.programs["ENTRYPOINT"], "study", "--grid", "digits", "--address", "local"]
        study = subprocess.Popen(
            self.command(command, "", user), cwd="/", env={**self.env, **self.overrides}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        for _ in range(120):
            time.sleep(1)
            if study.poll() is not None or any(log.stat().st_size > 2000 for log in self.path("checkpoints").rglob("*_training.log")):
                break
        for child in Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        began, output = time.monotonic(), study.communicate(timeout=120)[0]
        saved = len([path for path in (self.path("checkpoints") / ".state").rglob("*") if path.is_file()])
        print(f"  {time.monotonic() - began:6.1f} s  from SIGTERM to code {study.returncode}, {saved} files of saved states")
        if study.returncode != 143 or not saved:
            raise StepError(output[-4000:])


def _uv_cache() -> Path:
    return Path(os.environ.get("UV_CACHE_DIR") or "~/.cache/uv").expanduser()


def _host(*command: str, timeout: float = 600) -> None:
    _run(list(command), cwd=Path("/"), env=dict(os.environ), timeout=timeout)


def _run(command: list[str], cwd: Path, env: dict[str, str], timeout: float = 600) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    if done.returncode:
        raise StepError(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


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
    parser.add_argument("--debian", action="store_true", help="in a minimal Debian, as root: every step as it is written")
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    options = parser.parse_args()
    kind = Debian if options.debian else Folder
    work = Path(tempfile.mkdtemp(prefix="steps-"))
    work.chmod(0o755)  # for the user of the image
    began = time.monotonic()
    skipped: list[str] = []
    context = context_files(ROOT)
    print(f"build context: {len(context)} files, {sum((ROOT / name).stat().st_size for name in context) / 1024:.0f} KB")
    try:
        finished: dict[str, Path] = {}
        *before, last = stages(parse((ROOT / "Dockerfile").read_text()))
        for stage in before:
            # All stages are built at one place, so that paths within one are right in the next, as in an image.
            folder = kind(work / "root", context, finished)
            folder.build(stage)
            skipped += folder.skipped
            finished[stage.name] = folder.root.rename(work / stage.name)
        folder = kind(work / "root", context, finished)
        folder.build(last)
        for old in finished.values():  # the last stage stands alone
            shutil.rmtree(old)
        print("\nWhat the image would run:")
        folder.prove()
        skipped += folder.skipped
        print("\nGiB, of the last stage and of its environment, with what stands for the base image:")
        for place in (folder.root, folder.path(".venv")):
            kilobytes = int(_run(["du", "-sk", str(place)], cwd=Path("/"), env=dict(os.environ)).split()[0])
            print(f"  {kilobytes / 1024**2:6.2f}  {str(place).removeprefix(str(folder.root)) or '/'}")
    except StepError as error:
        print(f"\nFAILED: {error}")
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(work)
    print(f"\nThe Dockerfile's steps ran, in {time.monotonic() - began:.0f} s. Not run here:")
    for line in [*skipped, "the image itself: no layer was built, and no GPU was used"]:
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
