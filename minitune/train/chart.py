"""A curve in a terminal: braille dots, two across and four down a character. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

# A braille character is U+2800 plus a bit for each dot: DOTS[row][column].
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
BLANK, CURVE, RAW, MARK = range(4)
Cell = tuple[str, int]  # a character, and which of the four it belongs to


def resample(values: Sequence[float], columns: int) -> list[float]:
    """`columns` values: means of equal parts of more of them, points on the straight lines between fewer."""
    n = len(values)
    if n == 1:
        return [values[0]] * columns
    if n >= columns:
        edges = [i * n // columns for i in range(columns + 1)]
        return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    out = []
    for column in range(columns):
        place = column * (n - 1) / max(1, columns - 1)
        left = min(int(place), n - 2)
        out.append(values[left] + (values[left + 1] - values[left]) * (place - left))
    return out


def bounds(curve: Sequence[float], marks: Sequence[float]) -> tuple[float, float]:
    """(low, high) that hold the curve and the marks, never equal."""
    known = [*curve, *marks]
    low, high = min(known), max(known)
    room = (high - low) * 0.02 or max(abs(high) * 0.01, 1e-6)
    return low - room, high + room


def plot(
    curve: Sequence[float],
    raw: Sequence[float],
    marks: Sequence[tuple[float, float]],
    size: tuple[int, int],
    between: tuple[float, float],
) -> list[list[Cell]]:
    """`size` = (characters, lines) of cells: the curve drawn through, raw values as loose dots where it leaves room,
    marks (place from 0 to 1, value) on top. What lies outside `between` sticks to the border."""
    columns, lines = size
    low, high = between

    def height(value: float) -> int:
        """The dot's row from the top."""
        part = (high - value) / (high - low)
        return round(min(1.0, max(0.0, part)) * (lines * 4 - 1))

    bits = {kind: [[0] * columns for _ in range(lines)] for kind in (CURVE, RAW)}

    def dot(kind: int, x: int, y: int) -> None:
        bits[kind][y // 4][x // 2] |= DOTS[y % 4][x % 2]

    for x, value in enumerate(resample(raw, columns * 2) if raw else ()):
        dot(RAW, x, height(value))
    before: int | None = None
    for x, value in enumerate(resample(curve, columns * 2) if curve else ()):
        y = height(value)
        for between_y in range(*((y, y + 1) if before is None else sorted((before, y)))):
            dot(CURVE, x, between_y)
        dot(CURVE, x, y)
        before = y
    cells = [[_cell(bits[CURVE][y][x], bits[RAW][y][x]) for x in range(columns)] for y in range(lines)]
    for place, value in marks:
        cells[height(value) // 4][min(columns - 1, int(place * columns))] = ("◆", MARK)
    return cells


def _cell(curve: int, raw: int) -> Cell:
    """One character has one colour: the curve's where it passes."""
    if curve:
        return chr(0x2800 + curve), CURVE
    return (chr(0x2800 + raw), RAW) if raw else (" ", BLANK)
