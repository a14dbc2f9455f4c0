"""Pieces of a self-contained HTML page: tables, and line and bar charts as SVG. All text is escaped here."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

# Okabe and Ito (2008), told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 280, 76, 12, 16, 44
_WIDE = 1200  # pixels: a picture of more has several panels, and would be too small to read in a phone's width
_WORD = re.compile(r"[^\W\d_]{2}")  # two letters; "p = 1e-05" is a figure
# A table's first column stays while the rest is moved, and a shadow at the edge says that there is more.
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:62rem;color:#1b1b1b;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ccc}
h1,h2,p,summary,figcaption{overflow-wrap:anywhere}
.scroll{overflow-x:auto;background:
linear-gradient(to left,#fff 40%,rgba(255,255,255,0)) right/3rem 100% no-repeat local,
linear-gradient(to left,rgba(0,0,0,.25),rgba(0,0,0,0)) right/.8rem 100% no-repeat scroll}
table{border-collapse:collapse;font-size:.92rem}
th,td{padding:.25rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e3e3e3}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
svg{max-width:100%;height:auto}img{width:100%}.wide img{min-width:36rem}
.wide figcaption{position:sticky;left:0}figure{margin:1rem 0;overflow-x:auto}
figcaption,.note{color:#555;font-size:.9rem}
details{margin:.5rem 0}summary{cursor:pointer}
@media(max-width:40rem){table{font-size:.85rem}th,td{padding:.25rem .35rem}
.words{white-space:normal}td.words{overflow-wrap:break-word;min-width:4rem;max-width:9rem}
.wide figcaption::after{content:"; move the picture sideways to see all of it"}
th{vertical-align:bottom}td.words:first-child{max-width:12rem}}
"""


@dataclass(frozen=True)
class Line:
    """One curve of a chart: its name and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def page(title: str, body: Sequence[str]) -> str:
    """The whole document. Its policy forbids every request, so that nothing can be loaded from anywhere."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, *, note: bool = False) -> str:
    return f"<p{' class=note' * note}>{escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells below a header; scrolls by itself where it is too wide for the screen. Words may wrap there,
    figures may not."""
    head = "".join(f"<th{' class=words' * (' ' in name)}>{escape(name)}</th>" for name in header)
    lines = ["<tr>" + "".join(_cell(str(cell)) for cell in row) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(text: str) -> str:
    return f"<td{' class=words' * bool(_WORD.search(text))}>{escape(text)}</td>"


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"


def picture(path: Path, text: str) -> str:
    """A PNG file inside the page."""
    content = path.read_bytes()
    wide = " class=wide" * (int.from_bytes(content[16:20], "big") > _WIDE)
    image = f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}">'
    return f"<figure{wide}>{image}<figcaption>{escape(text)}</figcaption></figure>"


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, level: Line | None = None) -> str:
    """Curves with marks at their points; ``level`` is drawn dashed."""
    everything = [*lines, level] if level else list(lines)
    x_range, y_range = (
        _padded([value for line in everything for value in (line.x if axis == "x" else line.y)]) for axis in "xy"
    )
    parts = [_axes(x_range, y_range, x_label, y_label, sorted({x for line in lines for x in line.x}))]
    names = []
    for i, line in enumerate(everything):
        colour = "#555" if line is level else COLOURS[i % len(COLOURS)]
        points = [_place(x, y, x_range, y_range) for x, y in zip(line.x, line.y, strict=True)]
        dash = ' stroke-dasharray="6 4"' if line is level else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if line is not level:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        mark = "- -" if line is level else "\u2014"
        names.append(f'<span style="color:{colour}">{mark} {escape(line.name)}</span>')
    return _svg(parts, f"{y_label} against {x_label}", ", ".join(names))


def bar_chart(heights: Sequence[float | None], x_label: str, y_label: str) -> str:
    """Bars of 0 .. 1 over equal parts of 0 .. 1, None for an empty part, and the diagonal."""
    unit = (0.0, 1.0)
    parts = [_axes(unit, unit, x_label, y_label, [0, 0.25, 0.5, 0.75, 1])]
    for i, height in enumerate(heights):
        if height is None:
            continue
        left, top = _place(i / len(heights), height, unit, unit)
        right, bottom = _place((i + 1) / len(heights), 0, unit, unit)
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" height="{bottom - top:.1f}" '
            f'fill="{COLOURS[0]}"/>'
        )
    (x0, y0), (x1, y1) = _place(0, 0, unit, unit), _place(1, 1, unit, unit)
    parts.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{COLOURS[1]}" stroke-dasharray="6 4"/>')
    return _svg(parts, f"{y_label} against {x_label}")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or max(abs(high), 1.0) * 0.1
    # What is never negative, as a distance, has no axis below 0.
    return max(low - pad, 0.0) if low >= 0 else low - pad, high + pad


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Two to six round values of ``low`` .. ``high``, each with its text, in which all of them differ."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    if max(abs(low), abs(high)) >= 1e5 or step < 1e-4:
        digits = max(3, math.ceil(math.log10(max(abs(low), abs(high)) / step)) + 2)
        return [(value, f"{value:.{digits}g}") for value in values]
    decimals = next(n for n in range(7) if abs(round(step, n) - step) < 1e-9)
    return [(value, f"{value:.{decimals}f}") for value in values]


def _place(x: float, y: float, x_range: tuple[float, float], y_range: tuple[float, float]) -> tuple[float, float]:
    across = (x - x_range[0]) / (x_range[1] - x_range[0])
    up = (y - y_range[0]) / (y_range[1] - y_range[0])
    return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def _axes(
    x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, y_label: str, x_ticks: Sequence[float]
) -> str:
    left, bottom = _LEFT, _HEIGHT - _BOTTOM
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts = [
        f'<path d="M{left} {_TOP}V{bottom}H{_WIDTH - _RIGHT}" fill="none" stroke="#888"/>',
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for tick in x_ticks[:: max(1, len(x_ticks) // 10)]:
        x, _ = _place(tick, y_range[0], x_range, y_range)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for value, label in ticks(*y_range):
        _, y = _place(x_range[0], value, x_range, y_range)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], text: str, caption: str = "") -> str:
    return (
        f'<figure><svg role="img" aria-label="{escape(text)}" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'font-size="13" font-family="system-ui,sans-serif">'
        + "".join(parts)
        + f"</svg><figcaption>{caption}</figcaption></figure>"
    )
