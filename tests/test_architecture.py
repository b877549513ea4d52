"""The structure of the code, read from its sources: where imports point, whose private names are used, how long things are."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("run", "study", "diffvit", "bench")
MOST_LINES, MOST_FUNCTION_LINES = 450, 70

# What a package must not import: everything that stands before it in the order run.py -> study -> diffvit; bench and tests may import all.
FORBIDDEN = {"diffvit": {"study", "run", "bench", "tests", "ray"}, "study": {"run", "bench", "tests"}, "run": {"bench", "tests"}}

# A Triton kernel and the code that starts it are one text, in which each line needs its neighbours.
LONG = {"diffvit.kernels.attention_triton", "diffvit.kernels.fused_triton"}

# Private names of other packages, by the one module that uses them, and why. A test here or elsewhere fails when the package changes.
PRIVATE = {
    "study.cluster.address": {
        "ray._private.ray_constants.GLOBAL_GRPC_OPTIONS": "the question whether a cluster answers takes the way of Ray's own",
        "ray._private.authentication.authentication_token_setup": "Ray alone needs 20 s for a refused token, and does not name it",
    },
    "study.cluster.watch": {"os._exit": "documented"},
    "diffvit.hub.http": {"huggingface_hub.utils._http": "the client's factory can be set, but not read"},
    "diffvit.data.hub": {"_fingerprint": "the key under which decoded images are kept"},
    "diffvit.compute": {
        "torch._dynamo": "mark_dynamic is documented",
        "_compiled_call_impl": "nn.Module.compile cannot be undone otherwise",
    },
    "diffvit.kernels.forms": {"torch.ops.aten._softmax_backward_data": "the derivative of softmax from its result"},
    "diffvit.loop.passes": {"torch._foreach_zero_": "all gradients in one kernel"},
}
NAMEDTUPLE = {"_fields", "_asdict", "_replace", "_make"}  # documented

# Packages whose import takes 15 ms and more, or that are not on every machine.
HEAVY = {
    "PIL", "datasets", "dotenv", "fsspec", "grpc", "huggingface_hub", "jinja2", "matplotlib", "mlflow", "numpy", "pandas", "plotly", "psutil",
    "pyarrow", "ray", "rich", "safetensors", "scipy", "sklearn", "tensorboard", "tensorboardX", "timm", "torch", "torchvision", "triton",
    "wandb", "yaml",
}  # fmt: skip

Sources = Mapping[str, str]  # module -> its text


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def sources() -> Sources:
    files = [ROOT / "run.py", *(path for name in OURS for path in (ROOT / name).rglob("*.py"))]
    return {_module(path): path.read_text(encoding="utf-8") for path in files}


@dataclasses.dataclass(frozen=True)
class Import:
    """An import of one name, dotted; `function` is the function that makes it, or ""."""

    line: int
    name: str
    function: str

    def of_ours(self, texts: Sources) -> str | None:
        """The module of ours that it loads."""
        return next((module for module in (self.name, self.name.rpartition(".")[0]) if module in texts), None)


tree = cache(ast.parse)


@cache
def imports(text: str) -> tuple[Import, ...]:
    """All imports but those for the type checker only."""

    def walk(node: ast.AST, function: str) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (Import(node.lineno, prefix + alias.name, function) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    return tuple(walk(tree(text), ""))


def circles(texts: Sources) -> list[str]:
    """Circles of imports, those inside functions included. A package's __getattr__ imports for others, once all is loaded."""
    follows = {module: {each.of_ours(texts) for each in imports(text) if each.function != "__getattr__"} for module, text in texts.items()}
    found, finished = [], set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in finished:
            for other in sorted(filter(None, follows[module])):
                visit(other, (*path, module))
            finished.add(module)

    for module in sorted(texts):
        visit(module, ())
    return found


def arrows_against_the_order(texts: Sources) -> list[str]:
    return [
        f"{module}:{each.line} imports {each.name}"
        for module, text in texts.items()
        for each in imports(text)
        if each.name.split(".")[0] in FORBIDDEN.get(module.split(".")[0], ())
    ]


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def private_names(texts: Sources) -> list[tuple[str, int, str]]:
    """Module, line and name of each private name that is not the module's own."""
    found = []
    for module, text in texts.items():
        found += [(module, each.line, each.name) for each in imports(text) if _is_private(each.name)]
        nodes = list(ast.walk(tree(text)))
        own = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")}
        own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        imported = {each.name.rpartition(".")[2]: each.name for each in imports(text)} | {
            each.name.split(".")[0]: each.name.split(".")[0] for each in imports(text)
        }
        for node in nodes:
            if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own | NAMEDTUPLE:
                first, _, rest = ast.unparse(node).partition(".")
                # What is no module's is a value's, whatever the value is called here.
                found.append((module, node.lineno, f"{imported[first]}.{rest}" if first in imported else node.attr))
    return found


def foreign_private_names(texts: Sources) -> list[str]:
    return [
        f"{module}:{line} uses {name}"
        for module, line, name in private_names(texts)
        if not any(f"{name}.".startswith(f"{known}.") for known in PRIVATE.get(module, ()))
    ]


def long_texts(texts: Sources) -> list[str]:
    found = []
    for module, text in texts.items():
        if not module.startswith(("study", "diffvit")) or module in LONG:
            continue
        if (lines := len(text.splitlines())) > MOST_LINES:
            found.append(f"{module} has {lines} lines")
        for node in ast.walk(tree(text)):
            if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > MOST_FUNCTION_LINES:
                found.append(f"{module}.{node.name} has {lines} lines")
    return found


def imports_that_save_nothing(texts: Sources) -> list[str]:
    """Imports inside functions of what is light, or of what the module loads anyway."""

    def loaded(module: str | None, name: str = "") -> set[str]:
        """The packages that an import loads."""
        packages, seen, ahead = {name.split(".")[0]}, set(), [module]
        while ahead:
            if (module := ahead.pop()) and module not in seen:
                seen.add(module)
                at_once = [each for each in imports(texts[module]) if not each.function]
                packages |= {each.name.split(".")[0] for each in at_once}
                ahead += [each.of_ours(texts) for each in at_once]
        return packages & HEAVY

    return [
        f"{module}:{each.line} imports {each.name}"
        for module, text in texts.items()
        for each in imports(text)
        if each.function not in ("", "__getattr__") and not module.startswith("bench")
        if not loaded(each.of_ours(texts), each.name) - loaded(module)
    ]


RULES: tuple[Callable[[Sources], list[str]], ...] = (
    circles, arrows_against_the_order, foreign_private_names, long_texts, imports_that_save_nothing,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_to(rule: Callable[[Sources], list[str]]) -> None:
    faults = rule(sources())
    assert not faults


BROKEN: list[tuple[Callable[[Sources], list[str]], Sources, str]] = [
    (circles, {"diffvit.a": "import diffvit.b", "diffvit.b": "from diffvit.a import x"}, "diffvit.a -> diffvit.b -> diffvit.a"),
    (circles, {"diffvit.a": "from diffvit import b", "diffvit.b": "def f():\n    import diffvit.a"}, "diffvit.a -> diffvit.b -> diffvit.a"),
    (arrows_against_the_order, {"diffvit.a": "def f():\n    from study.b import x"}, "diffvit.a:2 imports study.b.x"),
    (arrows_against_the_order, {"diffvit.a": "import ray.train"}, "diffvit.a:1 imports ray.train"),
    (arrows_against_the_order, {"study.a": "import run"}, "study.a:1 imports run"),
    (foreign_private_names, {"study.a": "from ray._private import worker"}, "study.a:1 uses ray._private.worker"),
    (foreign_private_names, {"study.a": "import torch\ntorch._dynamo.reset()"}, "study.a:2 uses torch._dynamo"),
    (foreign_private_names, {"study.a": "def f(part):\n    return part._fingerprint"}, "study.a:2 uses _fingerprint"),
    (foreign_private_names, {"study.a": "from diffvit.b import _x", "diffvit.b": "_x = 1"}, "study.a:1 uses diffvit.b._x"),
    (foreign_private_names, {"study.a": "from diffvit import b\nb._x", "diffvit.b": "_x = 1"}, "study.a:2 uses diffvit.b._x"),
    (long_texts, {"study.a": "x = 1\n" * (MOST_LINES + 1)}, f"study.a has {MOST_LINES + 1} lines"),
    (long_texts, {"diffvit.a": "def f():\n" + "    x = 1\n" * MOST_FUNCTION_LINES}, f"diffvit.a.f has {MOST_FUNCTION_LINES + 1} lines"),
    (imports_that_save_nothing, {"study.a": "def f():\n    import json"}, "study.a:2 imports json"),
    (imports_that_save_nothing, {"run": "def f():\n    import study.b", "study.b": "import json"}, "run:2 imports study.b"),
    (imports_that_save_nothing, {"run": "import study.b\ndef f():\n    import torch", "study.b": "import torch"}, "run:3 imports torch"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "texts", "fault"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_rule_sees_what_breaks_it(rule: Callable[[Sources], list[str]], texts: Sources, fault: str) -> None:
    assert rule(texts) == [fault]


def test_what_the_rules_let_through() -> None:
    texts = {
        "run": "def f():\n    import study.a\n    import torch",
        "study.a": "from diffvit.b import Step\nimport torch\ndef f(step):\n    return step._asdict()",
        "diffvit.b": "class Step:\n    def __init__(self):\n        self._x = 1\n    def __eq__(self, other):\n        return other._x",
        "bench.a": "import run\ndef f():\n    import json",
    }
    assert not [fault for rule in RULES for fault in rule(texts)]


def test_the_exceptions_are_still_needed() -> None:
    used = {(module, name) for module, _, name in private_names(sources())}
    for module, names in PRIVATE.items():
        for name in names:
            assert any(module == where and f"{found}.".startswith(f"{name}.") for where, found in used), f"{module}: {name}"
    assert all(len(sources()[module].splitlines()) > MOST_LINES for module in LONG)
    third_party = {each.name.split(".")[0] for text in sources().values() for each in imports(text)} - {*OURS, *sys.stdlib_module_names}
    assert HEAVY - {"sklearn"} <= third_party and importlib.util.find_spec("sklearn")


def test_private_names_are_still_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose loss would go unnoticed: they are set, or are copies of a library's own."""
    import datasets
    import torch
    from huggingface_hub import constants
    from ray._common.utils import get_default_ray_temp_dir

    from study.cluster.address import ray_folder

    for name in ("RAY_TMPDIR", "TMPDIR", "none"):
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.delenv("TMPDIR", raising=False)
        monkeypatch.setenv(name, "/somewhere")
        assert str(ray_folder()) == get_default_ray_temp_dir()
    layer = torch.nn.Linear(1, 1)
    layer.compile()
    assert layer._compiled_call_impl is not None
    assert isinstance(constants.HF_HUB_DISABLE_XET, bool) and isinstance(constants.HF_HUB_OFFLINE, bool)
    assert isinstance(datasets.config.HF_HUB_OFFLINE, bool)
