"""Grouped bars as an SVG: a group a row, a bar a column. Small enough to need no library."""

from html import escape

BAR, GAP, LABEL, WIDTH, TOP = 12, 10, 190, 520, 44
COLOURS = ("#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b")


def svg(rows: dict[str, list[float | None]], columns: list[str], title: str) -> str:
    """Horizontal bars with their figures; ``None`` is shown as absent."""
    most = max(value for row in rows.values() for value in row if value is not None)
    group = BAR * len(columns) + GAP
    parts = [_text(0, 14, title), *_legend(columns)]
    for index, (name, row) in enumerate(rows.items()):
        top = TOP + index * group
        parts.append(_text(0, top + group / 2, name))
        for column, value in enumerate(row):
            y = top + column * BAR
            length = 0 if value is None else value / most * WIDTH
            colour = COLOURS[column % len(COLOURS)]
            parts.append(
                f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>'
            )
            words = "absent" if value is None else f"{value:.2f}"
            parts.append(_text(LABEL + length + 4, y + BAR - 3, words, 9))
    width, height = LABEL + WIDTH + 50, TOP + len(rows) * group
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    ground = f'<rect width="{width}" height="{height}" fill="white"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def _legend(columns: list[str]) -> list[str]:
    parts = []
    for index, column in enumerate(columns):
        x = LABEL + index * 100
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 14, 33, column, 10))
    return parts


def _text(x: float, y: float, words: str, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}">'
        f"{escape(words)}</text>"
    )
