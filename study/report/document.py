"""A page as a list of blocks, written as Markdown or as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Heading:
    """A section's title; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names with what they are, as a compact list."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """A question with its answer: on one line its mark, verdict, picture and number, below it the full sentence.

    Attributes:
        kind: "better", "worse", "equivalent" or "open", which colours it. mark: a character of a shape of its own for each kind.
        picture: SVG; "" for none.
    """

    kind: str
    mark: str
    verdict: str
    question: str
    sentence: str
    number: str = ""
    picture: str = ""


@dataclass(frozen=True)
class Findings:
    """Findings whose pictures share an axis, an SVG too, with a key to their marks beside it."""

    rows: Sequence[Finding]
    axis: str = ""
    key: str = ""


@dataclass(frozen=True)
class Contents:
    """Links to all sections."""


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
    """Text as it is. In HTML, one with a caption is folded away under it; `file`, if given, names it as a download, which Markdown
    leaves out."""

    text: str
    caption: str = ""
    file: str = ""


@dataclass(frozen=True)
class Scripted:
    """A figure of a library's own HTML, after the library's script where that is not in the page yet. Not in Markdown."""

    html: str
    caption: str
    script: str = ""


Block = Heading | Paragraph | Facts | Findings | Contents | Items | Table | Figures | Code | Scripted


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The page as Markdown; figures are linked relative to `folder`."""
    return "\n\n".join(_markdown(block, blocks, folder) for block in blocks) + "\n"


def _markdown(block: Block, blocks: Sequence[Block], folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return typeset(text)
        case Facts(rows):
            return "\n".join(f"- {name}: {typeset(text)}" for name, text in rows)
        case Findings(rows):
            return "\n".join(f"- {row.mark} **{row.verdict}.** {typeset(row.sentence)}" for row in rows)
        case Contents():
            return "\n".join(f"- [{each.text}](#{anchor(each.text)})" for each in sections(blocks))
        case Items(texts):
            return "\n".join(f"- {typeset(text)}" for text in texts)
        case Code(text, caption, file):
            where = f"{caption}: in report.html" if file else ""
            return where or "\n".join([*([f"{caption}\n"] if caption else []), f"```\n{text}\n```"])
        case Scripted(_, caption):
            return f"{caption}: in report.html"
        case Figures(files):
            return "\n\n".join(f"![{caption}]({_relative(path, folder)})" for path, caption in files)
        case Table(header, rows, caption, left):
            rule = ["---" if i < left else "---:" for i in range(len(header))]
            body = [[typeset(cell.replace("|", "/")) for cell in row] for row in rows]
            lines = [f"| {' | '.join(row)} |" for row in ([cell.replace("|", "/") for cell in header], rule, *body)]
            return "\n".join([*([f"{caption}\n"] if caption else []), *lines])


def sections(blocks: Sequence[Block]) -> list[Heading]:
    """What Contents links to."""
    return [block for block in blocks if isinstance(block, Heading) and block.level == 2]


def anchor(heading: str) -> str:
    """A heading's name in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The page as one HTML file: style and figures are inside, nothing is loaded from elsewhere."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return template.render(
        blocks=[(type(block).__name__, block) for block in blocks], sections=sections(blocks), title=title, embedded=_embedded,
        tied=_tied, anchor=anchor, download=_download,
    )  # fmt: skip


def typeset(text: str) -> str:
    """Text whose hyphens before numbers are minus signs; not those inside words, dates and exponents."""
    return re.sub(r"(?<![\w-])-(?=\.?\d)", "\N{MINUS SIGN}", text)


def _tied(text: str) -> Markup:
    """Text as set, for HTML: numbers stay on a line with their units, and what is between backticks is code."""
    for loose in (" %", " M", "p = ", "p < "):
        text = text.replace(loose, loose.replace(" ", "\N{NO-BREAK SPACE}"))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(typeset(text)))))


def _download(text: str) -> str:
    return "data:text/plain;charset=utf-8;base64," + base64.b64encode(text.encode()).decode()


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
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem; font-size: .9rem; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; min-width: 0; }
.finding { display: grid; grid-template-columns: 9.5rem 1fr 320px 16.5rem; column-gap: 1rem; align-items: center;
  border-top: 1px solid var(--line); padding: .45rem 0; --own: var(--soft); }
.finding > * { min-width: 0; }
.finding.better { --own: #1b7f5c; } .finding.worse { --own: #b0413e; }
.verdict { color: var(--own); font-weight: 700; } .question { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; font-size: .92rem; }
.finding p { grid-column: 1 / -1; max-width: none; margin: .2rem 0 0; font-size: .9rem; color: var(--soft); }
.finding svg { display: block; max-width: 100%; height: auto; }
.finding.axis { border: 0; padding: 0; } .key { grid-column: 1 / 3; font-size: .82rem; color: var(--soft); }
nav { font-size: .9rem; margin: 1rem 0; } nav a { margin-right: .9rem; white-space: nowrap; }
a { color: var(--accent); }
.wide { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4rem; }
th.left, td.left { text-align: left; }
caption, summary { color: var(--soft); font-size: .88rem; text-align: left; padding: .3rem 0; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(46rem, calc(100vw - 2.5rem)); }
summary { cursor: pointer; }
.figures { display: grid; align-items: start; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr));
  margin: .8rem 0; }
details { margin: .4rem 0; }
figure { margin: 0; overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; padding: .4rem; }
figure img { display: block; width: 100%; min-width: 20rem; height: auto; }
figure.scripted { margin: .8rem 0; }
figcaption { position: sticky; left: 0; color: var(--soft); font-size: .84rem; padding: .2rem .3rem; }
code { font-size: .92em; }
pre { background: var(--shade); padding: .7rem .9rem; overflow-x: auto; font-size: .88rem; }
@media (max-width: 40rem) { body { font-size: 15px; padding: 1rem .8rem 3rem; } h1 { font-size: 1.35rem; }
  table { font-size: .8rem; } th, td { padding: .25rem .4rem; } th { min-width: 3rem; } figure { padding: .2rem; }
  .finding { grid-template-columns: max-content 1fr; } .key, .picture, .number { grid-column: 1 / -1; } .number { text-align: left; } }
@media print { figure { break-inside: avoid; } }
</style>
</head>
<body>
{% for kind, block in blocks %}
{% if kind == "Heading" %}
<h{{ block.level }} id="{{ anchor(block.text) }}">{{ block.text }}</h{{ block.level }}>
{% elif kind == "Paragraph" %}
<p>{{ tied(block.text) }}</p>
{% elif kind == "Facts" %}
<dl class="facts">
{% for name, text in block.rows %}
<dt>{{ name }}</dt><dd>{{ tied(text) }}</dd>
{% endfor %}
</dl>
{% elif kind == "Findings" %}
{% if block.axis %}
<div class="finding axis"><span class="key">{{ tied(block.key) }}</span><span class="picture">{{ block.axis|safe }}</span></div>
{% endif %}
{% for row in block.rows %}
<div class="finding {{ row.kind }}">
<span class="verdict">{{ row.mark }} {{ row.verdict }}</span> <span class="question">{{ row.question }}</span>
<span class="picture">{{ row.picture|safe }}</span> <span class="number">{{ tied(row.number) }}</span>
<p>{{ tied(row.sentence) }}</p></div>
{% endfor %}
{% elif kind == "Contents" %}
<nav>{% for each in sections %}<a href="#{{ anchor(each.text) }}">{{ each.text }}</a> {% endfor %}</nav>
{% elif kind == "Items" %}
<ul>{% for text in block.texts %}<li>{{ tied(text) }}</li>{% endfor %}</ul>
{% elif kind == "Code" %}
{% if block.caption %}<details><summary>{{ block.caption }}</summary>{% endif %}
{% if block.file %}<p><a download="{{ block.file }}" href="{{ download(block.text) }}">Save as {{ block.file }}</a></p>{% endif %}
<pre>{{ block.text }}</pre>
{% if block.caption %}</details>{% endif %}
{% elif kind == "Scripted" %}
{% if block.script %}<script>{{ block.script|safe }}</script>{% endif %}
<figure class="scripted"><figcaption>{{ block.caption }}</figcaption>{{ block.html|safe }}</figure>
{% elif kind == "Figures" %}
<div class="figures">
{% for path, caption in block.files %}
<figure><img src="{{ embedded(path) }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% elif kind == "Table" %}
{% if block.closed %}<details><summary>{{ block.caption }}</summary>{% endif %}
<div class="wide"><table>
{% if block.caption and not block.closed %}<caption><span>{{ block.caption }}</span></caption>{% endif %}
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
