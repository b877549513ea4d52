"""Small YAML and TOML files, read strictly: what one reader would take for something else than another is refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from diffvit.checks import check_depth
from diffvit.errors import first_line, shown

_DEEPEST = 5


def parse(path: Path, text: str) -> Any:
    """A file's content: numbers, text, lists and tables only. Raises ValueError."""
    try:
        content = tomllib.loads(text) if path.suffix.lower() == ".toml" else _parse_yaml(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OverflowError as error:
        raise ValueError(str(error)) from None
    check_depth(content, _DEEPEST)
    return content


def _parse_yaml(text: str) -> Any:
    import yaml

    depth = 0
    try:
        # Checked before anything is built: aliases can multiply the content, and tags create arbitrary objects.
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ValueError("it takes no anchors (&), aliases (*) and tags (!)")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST + 1:
                raise ValueError("it is nested too deeply")
        return yaml.load(text, _yaml_loader())
    except yaml.YAMLError as error:
        raise ValueError(_said_of(error)) from error


def _said_of(error: Any) -> str:
    """A YAMLError in a line, with where what is wrong begins and ends."""
    if not getattr(error, "problem_mark", None):
        return first_line(error)
    begun = error.context_mark.line if error.context_mark else error.problem_mark.line
    since = f", begun in line {begun + 1}" if begun != error.problem_mark.line else ""
    return f"line {error.problem_mark.line + 1}: {error.problem}{since}"


# A decimal number as everybody reads it. To YAML 1.1 010 is 8, 1:30 is 90, yes is true and 1e-3 is text; none of that holds here.
_NUMBER = re.compile(r"[-+]?(?:(?P<whole>0|[1-9][0-9]*)|(?:0|[1-9][0-9]*|(?=\.[0-9]))(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\Z")


def _yaml_loader() -> Any:
    """A loader that knows numbers, text and null, and refuses duplicate keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as the base class has it)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            found: dict[Any, Any] = {}
            for key_node, _ in node.value:
                key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
                if isinstance(key, (int, float)):  # from 0,2 in braces
                    raise ValueError(f"line {line} has {shown(key_node.value)} for a name; a decimal has a point and no comma, such as 0.2")
                if isinstance(key, str) and found.setdefault(key, key_node) is not key_node:
                    raise ValueError(f"line {line} gives {shown(key)} a second time")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), None)
    Loader.add_implicit_resolver(_TAG, _NUMBER, None)
    Loader.add_constructor(_TAG, lambda loader, node: number(node.value))
    return Loader


_TAG = "number"


def number(text: str) -> Any:
    """A number where the text is one."""
    match = _NUMBER.match(text)
    return text if not match else int(text) if match["whole"] else float(text)
