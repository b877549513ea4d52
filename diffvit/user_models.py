"""Architectures in files of the user's own: `ideas/my_attention.py:MyAttention`.

A file is parsed when it is named, and executed when a model is first built of it. What is executed is the text that was read: with the
texts of the local modules that it imports it travels in a run's specification, decides the run's identity by its hash, and is kept in the
header of the weights. So a worker or another machine needs no file, and a checkpoint can be built again when the file has changed.

An architecture is called by its class and the beginning of its hash, "MyAttention-3fa81c02": a file that changed is another
architecture, and no two have one name. Executed is only what the user has named on this machine, or trusts by a word.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffvit.checks import dict_of, read_text, record, text, usable_path
from diffvit.errors import UserError, first_line, shown
from diffvit.machine.caches import cache_folder, read_cache, remember

if TYPE_CHECKING:
    from types import CodeType, ModuleType

USER_MODEL = r"[A-Za-z][A-Za-z0-9_]{0,59}-[0-9a-f]{8}"

_REFERENCE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>.*))?", re.DOTALL)
_CLASS = r"[A-Za-z][A-Za-z0-9_]{0,59}"
_PATH = r"(?!/)(?:[^\x00-\x1f\\/:]+/)*[^\x00-\x1f\\/:]+\.py"
_LONGEST_FILE = 1_000_000
_MOST_FILES = 100
_PACKAGE = "diffvit_own"
# What a local module cannot stand for.
_TAKEN = frozenset({*sys.stdlib_module_names, "diffvit", "study"})

# A source as a checkpoint's header has it.
_CODE = text(r"[^\ud800-\udfff]*", _LONGEST_FILE)
SOURCE = record({"class": text(_CLASS), "file": text(_PATH), "files": dict_of(text(_PATH), _CODE, _MOST_FILES)})


@dataclass(frozen=True)
class ModelSource:
    """The code of an architecture.

    Attributes:
        files: path below the file's folder -> text; the class's own file first, then the local modules that it imports.
    """

    class_name: str
    files: Mapping[str, str]

    @functools.cached_property
    def sha256(self) -> str:
        """Over the class's name, the text of its file, whatever that is called, and names and texts of the other files."""
        (_, main), *others = self.files.items()
        return hashlib.sha256(json.dumps([self.class_name, main, sorted(others)]).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The architecture's name."""
        return f"{self.class_name}-{self.sha256[:8]}"

    @property
    def content(self) -> dict[str, Any]:
        """As a checkpoint's header has it."""
        return {"class": self.class_name, "file": next(iter(self.files)), "files": dict(self.files)}

    @staticmethod
    def of(content: Mapping[str, Any]) -> ModelSource:
        """The source of such a content, as SOURCE has checked it. Raises KeyError where the class's file is missing."""
        main, files = content["file"], content["files"]
        return ModelSource(content["class"], {main: files[main], **files})

    @property
    def package(self) -> str:
        """The package that its files are imported as."""
        return f"{_PACKAGE}_{self.sha256[:16]}"

    @functools.cached_property
    def attention_class(self) -> Any:
        """The class, from executing the files. Raises UserError where that fails, or where it is no attention class."""
        from torch import nn

        main = next(iter(self.files))
        if not any(isinstance(finder, _Importer) and finder.package == self.package for finder in sys.meta_path):
            sys.meta_path.append(_Importer(self))
        with sentences(self):
            found = getattr(importlib.import_module(_module_name(self.package, main)), self.class_name)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise UserError(f"the class {self.class_name} in {main} is no torch.nn.Module.", _HINT)
        if not callable(getattr(found, "map_flops", None)):
            raise UserError(f"the class {self.class_name} in {main} has no static method map_flops(d_model, tokens, queries).", _HINT)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        # Where a specification travels its architecture is known by name; the files are what travels.
        return _arrived, (self.class_name, dict(self.files))


_HINT = "docs/own-idea.md says what a class must have; `run.py check FILE.py:CLASS` tries it."
_known: dict[str, ModelSource] = {}


def known_source(model: str) -> ModelSource | None:
    """The source of an architecture that may be executed here; None for built-in and unknown ones."""
    return _known.get(model)


def register(source: ModelSource) -> ModelSource:
    """Make an architecture known by its name; from then on its code may be executed."""
    return _known.setdefault(source.name, source)


def _arrived(class_name: str, files: dict[str, str]) -> ModelSource:
    return register(ModelSource(class_name, files))


def is_reference(model: str) -> bool:
    """Whether this names a file rather than an architecture."""
    return isinstance(model, str) and _REFERENCE.fullmatch(model) is not None


def is_user_model(model: str) -> bool:
    """Whether this is the name of an architecture of the user's own, known here or not."""
    return isinstance(model, str) and re.fullmatch(USER_MODEL, model) is not None


def beside(folder: Path, model: str) -> str:
    """A reference that is relative to a folder as one that is relative to the working directory; a name as it is."""
    return str(folder / model) if is_reference(model) else model


def read_source(reference: str) -> ModelSource:
    """The architecture of a file that the user names: FILE.py:CLASS. It is registered, and its hash noted as named on this machine.

    Raises:
        UserError: there is no such file or class, it cannot be parsed, or it imports what would not travel with it.
    """
    match = _REFERENCE.fullmatch(reference)
    path, name = (usable_path(match["path"]), match["name"]) if match else (usable_path(reference), None)
    if not path.is_file():
        raise UserError(f"there is no file {shown(str(path))}.", "name a file and its class: ideas/my_attention.py:MyAttention.")
    files, pending = {}, [PurePosixPath(path.name)]
    while pending:
        place = pending.pop(0)
        if str(place) not in files:
            files[str(place)], tree = _parsed(path.parent / place)
            pending += sorted(set(_imported(tree, path.parent, place)))
        if len(files) > _MOST_FILES:
            raise UserError(f"{path} imports more than {_MOST_FILES} files.", "leave in its folder what it needs.")
    classes = [node.name for node in ast.parse(files[path.name]).body if isinstance(node, ast.ClassDef)]
    if name not in classes or not re.fullmatch(_CLASS, name):
        defined = f"it defines {', '.join(classes)}" if classes else "it defines none"
        raise UserError(
            f"{path} has no class {shown(name)}." if name else f"{path} is named without its class.",
            f"{defined}; name one after a colon: {path}:{(classes or ['MyAttention'])[0]}.",
        )
    source = register(ModelSource(name, files))
    remember(_named(), source.sha256, {"file": str(path.resolve()), "class": name})
    return source


def kept_source(content: Mapping[str, Any], model: str, where: Path, trust: bool) -> ModelSource:
    """The architecture of a checkpoint's header, registered.

    Args:
        content: as SOURCE has checked it. model: the name that the header gives. where: the checkpoint.
        trust: execute it even if the user has not named it on this machine.

    Raises:
        UntrustedError: its code may not be executed.
        UserError: it is not the code that the name stands for.
    """
    if content["file"] not in content["files"] or (source := ModelSource.of(content)).name != model:
        raise UserError(f"{where} has other code than that of its model {model}.", "delete its _result.json and train the run again.")
    if not trust and source.name not in _known and source.sha256 not in read_cache(_named()):
        files = ", ".join(source.files)
        raise UntrustedError(
            f"{where} is a model of code that comes with it, {source.class_name} in {files}, and was not named on this machine.",
            "if you trust whoever made it: --trust on the command line, trust=True in Python.",
        )
    return register(source)


class UntrustedError(UserError):
    """Code that comes with a checkpoint, and that the user has not named."""


def _named() -> Path:
    """The file of the hashes that were named on this machine."""
    return cache_folder() / "own_architectures.json"


def changed_note(checkpoints: Path, model: str) -> str | None:
    """A sentence where the ledger has runs of other code under the class's name."""
    if others := other_versions(checkpoints, model):
        return f"{checkpoints} has runs of {' and '.join(others)}: the code has changed since, and {model} is trained anew"
    return None


def other_versions(checkpoints: Path, model: str) -> list[str]:
    """Architectures with runs here whose class has the same name and whose code is another."""
    stem, _, _ = model.rpartition("-")
    folders = sorted(checkpoints.glob(f"{stem}-*")) if is_user_model(model) else []
    return [each.name for each in folders if is_user_model(each.name) and each.name != model and any(each.glob("model_*"))]


# ------------------------------------------------------------------------------------------------------------ files


def _parsed(path: Path) -> tuple[str, ast.Module]:
    try:
        content = read_text(path, _LONGEST_FILE)
        return content, ast.parse(content)
    except SyntaxError as error:
        raise UserError(f"line {error.lineno} of {path} is no Python: {error.msg}.", "mend it; nothing was executed.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}.", "an architecture is a Python file in UTF-8.") from error


def _imported(tree: ast.Module, folder: Path, place: PurePosixPath) -> Iterator[PurePosixPath]:
    """The local files that a file's import statements load. Raises UserError for a module from elsewhere that is not installed."""
    for node in ast.walk(tree):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = place.parent.parts if node.level else ()
            base = (*package[: len(package) - max(0, node.level - 1)], *(node.module.split(".") if node.module else ()))
            names = [(*base, alias.name) for alias in node.names]
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        for parts in names:
            places = [parts[:end] for end in range(1, len(parts) + 1)] if relative or parts[0] not in _TAKEN else []
            found = [file for each in places if (file := _file_of(folder, each))]
            yield from found
            if not found and not relative and (origin := _not_installed(parts[0])):
                raise UserError(
                    f"line {getattr(node, 'lineno', 0)} of {folder / place} imports {parts[0]} from {origin}, which is not in its folder.",
                    "put it beside the file: a run travels with the files of that folder, and with no others but installed packages.",
                )


def _file_of(folder: Path, parts: tuple[str, ...]) -> PurePosixPath | None:
    place = PurePosixPath(*parts)
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in files if (folder / file).is_file()), None)


def _not_installed(name: str) -> str | None:
    """Where a module comes from that may change, or be missing elsewhere, without a version of its own; None for installed packages."""
    if name in _TAKEN:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
    return next((place for place in filter(None, places) if not {"site-packages", "dist-packages"} & set(Path(place).parts)), None)


# ------------------------------------------------------------------------------------------------------- execution


def _module_name(package: str, path: str) -> str:
    return ".".join((package, *PurePosixPath(path).with_suffix("").parts)).removesuffix(".__init__")


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports a source's files from memory, as modules of a package of their own."""

    def __init__(self, source: ModelSource):
        self.package = source.package
        self._paths = {_module_name(self.package, path): path for path in source.files}
        self._files = source.files
        parents = {str(parent) for path in source.files for parent in PurePosixPath(path).parents}
        self._packages = {self.package} | {_module_name(self.package, parent) for parent in parents if parent != "."}
        self._local = {PurePosixPath(path).with_suffix("").parts[0] for path in source.files} - _TAKEN

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._paths and fullname not in self._packages:
            return None
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=self._file(fullname), is_package=fullname in self._packages)
        spec.has_location = fullname in self._paths  # so that inspect and tracebacks find its text
        return spec

    def _file(self, fullname: str) -> str:
        return f"{self.package}/{self._paths.get(fullname, '')}"

    def get_source(self, fullname: str) -> str:
        return self._files.get(self._paths.get(fullname, ""), "")

    def get_code(self, fullname: str) -> CodeType:
        depth = fullname.count(".") + (fullname in self._packages)
        tree = ast.fix_missing_locations(_Relative(self._local, depth).visit(ast.parse(self.get_source(fullname))))
        return compile(tree, self._file(fullname), "exec", dont_inherit=True)


class _Relative(ast.NodeTransformer):
    """Makes imports of local modules relative: `import parts` -> `from . import parts`.

    Args:
        local: top names of local modules.
        level: dots that lead to the folder.
    """

    def __init__(self, local: set[str], level: int):
        self._local, self._level = local, level

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if not node.level and (node.module or "").split(".")[0] in self._local:
            node.level = self._level
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for alias in node.names:
            top, *_ = parts = alias.name.split(".")
            if top not in self._local:
                made.append(ast.Import([alias]))
                continue
            inside, last = ".".join(parts[:-1]) or None, parts[-1]
            made.append(ast.ImportFrom(inside, [ast.alias(last, alias.asname if alias.asname or not inside else "_")], self._level))
            if inside and not alias.asname:  # `import parts.inner` binds parts
                made.append(ast.ImportFrom(None, [ast.alias(top)], self._level))
        return [ast.copy_location(each, node) for each in made]


@contextlib.contextmanager
def sentences(source: ModelSource | None) -> Iterator[None]:
    """Turn what an architecture's own code raises into a UserError that names file and line; None: errors stay as they are."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if source is None:
            raise
        inside = f"{source.package}/"
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(inside)]
        where = f"line {frames[-1].lineno} of {frames[-1].filename.removeprefix(inside)}" if frames else source.name
        raise UserError(f"{where} raised {type(error).__name__}: {first_line(error)}.", _HINT) from error
