"""A page as a list of blocks, written as Markdown or as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment


@dataclass(frozen=True)
class Heading:
    """A section's title; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text. `lead` is set large: what a reader must not miss. `tag` is a word before it."""

    text: str
    lead: bool = False
    tag: str = ""


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of text; the first `left` columns are aligned left, others right. `closed` folds it away in HTML under its caption."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1
    closed: bool = False


@dataclass(frozen=True)
class Figures:
    """PNG files, side by side where there is room, each with what it shows."""

    files: Sequence[tuple[Path, str]]


@dataclass(frozen=True)
class Code:
    """Lines of a command."""

    text: str


Block = Heading | Paragraph | Items | Table | Figures | Code


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The page as Markdown; figures are linked relative to `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text, _, tag):
            return f"**{tag.capitalize()}.** {text}" if tag else text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Code(text):
            return f"```\n{text}\n```"
        case Figures(files):
            return "\n\n".join(f"![{caption}]({_relative(path, folder)})" for path, caption in files)
        case Table(header, rows, caption, left):
            rule = ["---" if i < left else "---:" for i in range(len(header))]
            lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in (header, rule, *rows)]
            return "\n".join([*([f"{caption}\n"] if caption else []), *lines])


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The page as one HTML file: style and figures are inside, nothing is loaded from elsewhere."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return template.render(blocks=[(type(block).__name__, block) for block in blocks], title=title, embedded=_embedded, tied=_tied)


def _tied(text: str) -> str:
    """Text whose numbers stay on a line with their signs and units."""
    for loose in (" %", " M", "p = ", "p < "):
        text = text.replace(loose, loose.replace(" ", "\N{NO-BREAK SPACE}"))
    return re.sub(r"(?<![\w-])-(?=\d)", "\N{NON-BREAKING HYPHEN}", text)


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1c2430; --soft: #5b6570; --line: #dfe4ea; --back: #ffffff; --shade: #f6f8fa; --accent: #1f3a6e; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
p.lead { font-size: 1.08rem; background: var(--shade); border-left: 4px solid var(--accent); padding: .7rem .9rem; margin: .7rem 0; }
.tag { display: inline-block; background: var(--accent); color: #fff; border-radius: 4px; padding: 0 .5rem; font-size: .85rem; }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4rem; }
th.left, td.left { text-align: left; }
caption, summary { color: var(--soft); font-size: .88rem; text-align: left; padding: .3rem 0; }
summary { cursor: pointer; }
.figures { display: grid; align-items: start; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr));
  margin: .8rem 0; }
figure { margin: 0; overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: .4rem; }
figure img { display: block; width: 100%; min-width: 20rem; height: auto; }
figcaption { position: sticky; left: 0; color: var(--soft); font-size: .84rem; padding: .2rem .3rem; }
pre { background: var(--shade); padding: .7rem .9rem; overflow-x: auto; font-size: .88rem; }
@media (max-width: 40rem) { body { font-size: 15px; padding: 1rem .8rem 3rem; } h1 { font-size: 1.35rem; }
  table { font-size: .8rem; } th, td { padding: .25rem .4rem; } th { min-width: 3rem; } figure { padding: .2rem; } }
@media print { figure { break-inside: avoid; } }
</style>
</head>
<body>
{% for kind, block in blocks %}
{% if kind == "Heading" %}
<h{{ block.level }}>{{ block.text }}</h{{ block.level }}>
{% elif kind == "Paragraph" %}
<p{% if block.lead %} class="lead"{% endif %}>{% if block.tag %}<b class="tag">{{ block.tag }}</b> {% endif %}{{ tied(block.text) }}</p>
{% elif kind == "Items" %}
<ul>{% for text in block.texts %}<li>{{ tied(text) }}</li>{% endfor %}</ul>
{% elif kind == "Code" %}
<pre>{{ block.text }}</pre>
{% elif kind == "Figures" %}
<div class="figures">
{% for path, caption in block.files %}
<figure><img src="{{ embedded(path) }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% elif kind == "Table" %}
{% if block.closed %}<details><summary>{{ block.caption }}</summary>{% endif %}
<div class="wide"><table>
{% if block.caption and not block.closed %}<caption>{{ block.caption }}</caption>{% endif %}
<thead><tr>
{% for cell in block.header %}<th{% if loop.index0 < block.left %} class="left"{% endif %}>{{ tied(cell) }}</th>{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>{% for cell in row %}<td{% if loop.index0 < block.left %} class="left"{% endif %}>{{ tied(cell) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if block.closed %}</details>{% endif %}
{% endif %}
{% endfor %}
</body>
</html>
"""
