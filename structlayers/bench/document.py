"""A report as a list of blocks: written as Markdown beside its pictures, and as one HTML file on its own."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from structlayers.files import replace_file


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text, the header first; a click on a header sorts the HTML by that column."""

    lines: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """An SVG; ``name`` is that of its file beside the Markdown."""

    name: str
    svg: str
    caption: str


Block = Heading | Text | Code | Table | Picture

# Longer tables are cut in the Markdown; the HTML has all of it.
_MOST_LINES = 60

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1200px; margin: 2em auto; }
body { padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; } h3 { margin-top: 1.5em; }
figure { margin: 1.2em 0; } figure img { max-width: 100%; height: auto; } figcaption { color: #555; }
.table { overflow-x: auto; max-height: 32em; overflow-y: auto; border: 1px solid #ddd; margin: 1em 0; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #eef1f5; cursor: pointer; user-select: none; }
th.up::after { content: " \\25b2"; } th.down::after { content: " \\25bc"; }
tr:nth-child(even) td { background: #f7f8fa; } td.text, th.text { text-align: left; }
caption { text-align: left; padding: 4px 9px; color: #555; }
pre { background: #f3f4f6; padding: 0.8em; white-space: pre-wrap; font-size: 12.5px; }
nav a { margin-right: 1.2em; }
"""

_SCRIPT = """
function number(text) { var n = parseFloat(text.replace(/,/g, "")); return isNaN(n) ? null : n; }
document.querySelectorAll("th").forEach(function (head) {
  head.addEventListener("click", function () {
    var table = head.closest("table"), column = head.cellIndex, down = head.className.indexOf("up") >= 0;
    table.querySelectorAll("th").forEach(function (th) { th.classList.remove("up", "down"); });
    head.classList.add(down ? "down" : "up");
    var rows = Array.prototype.slice.call(table.tBodies[0].rows);
    rows.sort(function (a, b) {
      var x = a.cells[column].textContent, y = b.cells[column].textContent, n = number(x), m = number(y);
      if (x === "" || y === "") return (x === "") - (y === "");
      var order = n !== null && m !== null ? n - m : x.localeCompare(y);
      return down ? -order : order;
    });
    rows.forEach(function (row) { table.tBodies[0].appendChild(row); });
  });
});
"""


def write_report(folder: Path, title: str, blocks: Sequence[Block]) -> list[Path]:
    """Write ``report.md`` with ``figures/*.svg``, and ``report.html``; the paths of the two reports."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Picture):
            _write(figures / f"{block.name}.svg", block.svg)
    _write(folder / "report.md", as_markdown(title, blocks))
    _write(folder / "report.html", as_html(title, blocks))
    return [folder / "report.md", folder / "report.html"]


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as Markdown; its pictures are files in ``figures/``."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Code):
            parts.append(f"```text\n{block.text}\n```")
        elif isinstance(block, Picture):
            parts.append(f"![{block.caption}](figures/{block.name}.svg)\n\n*{block.caption}*")
        else:
            parts.append(_markdown_table(block))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    header, *lines = table.lines
    text = [line(header), "|" + "|".join("---" for _ in header) + "|", *map(line, lines[:_MOST_LINES])]
    if len(lines) > _MOST_LINES:
        text.append(f"\n{len(lines) - _MOST_LINES} more lines are in report.html.")
    caption = [f"{table.caption}\n"] if table.caption else []
    return "\n".join([*caption, *text])


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one HTML file: no network, no other file."""
    parts, contents = [], []
    for number, block in enumerate(blocks):
        if isinstance(block, Heading):
            parts.append(f'<h{block.level} id="s{number}">{html.escape(block.text)}</h{block.level}>')
            if block.level == 2:
                contents.append(f'<a href="#s{number}">{html.escape(block.text)}</a>')
        elif isinstance(block, Text):
            parts += [f"<p>{html.escape(text)}</p>" for text in block.text.split("\n\n")]
        elif isinstance(block, Code):
            parts.append(f"<pre>{html.escape(block.text)}</pre>")
        elif isinstance(block, Picture):
            # As an image of its own, so that the names inside one picture mean nothing in the others.
            data = base64.b64encode(block.svg.encode()).decode()
            caption = html.escape(block.caption)
            image = f'<img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        else:
            parts.append(_html_table(block))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n<nav>{''.join(contents)}</nav>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _html_table(table: Table) -> str:
    header, *lines = table.lines
    is_text = [any(not _is_number(line[q]) for line in lines) for q in range(len(header))]

    def cells(line: Sequence[str], tag: str) -> str:
        marks = (' class="text"' if text else "" for text in is_text)
        return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, line, strict=True))

    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(f"<tr>{cells(line, 'td')}</tr>" for line in lines)
    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>"
    return f'<div class="table"><table>{caption}{head}<tbody>\n{body}\n</tbody></table></div>'


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").rstrip("%x") or "0")
    except ValueError:
        return False
    return True
