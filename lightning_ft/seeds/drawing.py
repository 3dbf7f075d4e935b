"""Small charts as SVG text that stands in a page: colours by class, so that the page's light or dark style decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]


class Scale:
    """A linear map from values to places.

    Args:
        low: Value at ``start``.
        high: Value at ``end``; equal values are spread a little.
        start: Place.
        end: Place.
    """

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if not high > low:
            low, high = low - (abs(low) or 1.0) * 0.05, high + (abs(high) or 1.0) * 0.05
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """About ``count`` round values between low and high, with their texts."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (round(step / power, 6) == 2.5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        form = f",.{digits}f" if max(abs(self.low), abs(self.high)) < 1e5 else ".4g"
        return [(i * step, f"{i * step:{form}}") for i in range(first, last + 1)]


class Drawing:
    """Marks on a canvas of its own units.

    Args:
        width: Of the canvas; a page scales it.
        height: Of the canvas.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def line(self, points: Iterable[Point | None], style: str, title: str = "") -> None:
        """A line through points; None breaks it."""
        path, pen = [], "M"
        for point in points:
            if point is None:
                pen = "M"
                continue
            path.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
            pen = "L"
        self._add(f'<path class="{style}" d="{" ".join(path)}"', title)

    def area(self, upper: Sequence[Point], lower: Sequence[Point], style: str) -> None:
        """What lies between two lines."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*upper, *reversed(lower)])
        self._add(f'<polygon class="{style}" points="{points}"')

    def box(
        self, x: float, y: float, width: float, height: float, style: str, *, title: str = "", shade: float = 1
    ) -> None:
        """A rectangle; ``shade`` in [0, 1] is how strong its colour is."""
        shaded = "" if shade == 1 else f' fill-opacity="{shade:.2f}"'
        size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="3"'
        self._add(f'<rect class="{style}" {size}{shaded}', title)

    def dot(self, x: float, y: float, style: str, *, radius: float = 5, title: str = "") -> None:
        """A round mark."""
        self._add(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"', title)

    def cross(self, x: float, y: float, style: str, *, radius: float = 4.5, title: str = "") -> None:
        """A mark like ×."""
        r = radius
        path = f"M{x - r:.1f} {y - r:.1f}l{2 * r:g} {2 * r:g}m0 {-2 * r:g}l{-2 * r:g} {2 * r:g}"
        self._add(f'<path class="{style}" d="{path}"', title)

    def diamond(self, x: float, y: float, style: str, *, radius: float = 8, title: str = "") -> None:
        """A mark like ◆."""
        r = radius
        path = f"M{x:.1f} {y - r:.1f}l{r:g} {r:g}l{-r:g} {r:g}l{-r:g} {-r:g}z"
        self._add(f'<path class="{style}" d="{path}"', title)

    def text(self, x: float, y: float, text: str, style: str = "tick", anchor: Anchor = "start") -> None:
        """A line of text."""
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self._parts.append(f'<text class="{style}" {place}>{escape(text)}</text>')

    def svg(self, label: str) -> str:
        """The drawing, with what it shows in words for those who do not see it; none for mere decoration."""
        size = f'viewBox="0 0 {self.width:g} {self.height:g}"'
        words = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
        return f"<svg {size} {words}>{''.join(self._parts)}</svg>"

    def _add(self, element: str, title: str = "") -> None:
        self._parts.append(
            f"{element}><title>{escape(title)}</title></{element[1:].split()[0]}>" if title else element + "/>"
        )


class Axes(Drawing):
    """A drawing with a scale to the right and one upwards, a grid, and names.

    Args:
        x: Lowest and highest value to the right.
        y: Lowest and highest value upwards.
        names: Of the two scales; that of the upward one stands above it.
        right: Room to the right of the plot.
        ticks: Whether the scale to the right has ticks.
        height: Of the canvas.
        top: Room above the plot.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        names: tuple[str, str],
        *,
        right: float = 16,
        ticks: bool = True,
        height: float = 330,
        top: float = 34,
    ) -> None:
        super().__init__(520, height)
        self.left, self.top, self.right, self.bottom = 52.0, top, self.width - right, height - 44.0
        self.x, self.y = Scale(*x, self.left, self.right), Scale(*y, self.bottom, self.top)
        for value, name in self.y.ticks():
            self.line([(self.left, self.y(value)), (self.right, self.y(value))], "grid")
            self.text(self.left - 8, self.y(value) + 4, name, anchor="end")
        for value, name in self.x.ticks() if ticks else []:
            self.text(self.x(value), self.bottom + 19, name, anchor="middle")
        self.text(6, 16, names[1], "name")
        self.text((self.left + self.right) / 2, height - 6, names[0], "name", "middle")

    def at(self, x: float, y: float) -> Point:
        """The place of a pair of values."""
        return self.x(x), self.y(y)


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Lowest and highest value, with some room around; 0 and 1 for none."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * share
    return low - room, high + room


def apart(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """The places of labels, moved a little so that no two are closer than ``distance``, in the same order."""
    groups: list[tuple[list[int], float]] = []  # labels that touch, and the middle of each group
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        members, middle = [i], max(low, min(places[i], high))
        while groups and middle - groups[-1][1] < distance * (len(members) + len(groups[-1][0])) / 2:
            members = groups.pop()[0] + members
            room = distance * (len(members) - 1) / 2
            middle = max(low + room, min(sum(places[j] for j in members) / len(members), high - room))
        groups.append((members, middle))
    moved = list(places)
    for members, middle in groups:
        for rank, i in enumerate(members):
            moved[i] = middle + (rank - (len(members) - 1) / 2) * distance
    return moved


def swarm(places: Sequence[float], distance: float, widest: float) -> list[float]:
    """Offsets to the side at which no two dots come closer than ``distance``; pressed together beyond ``widest``."""
    done: list[tuple[float, float]] = []
    offsets = [0.0] * len(places)
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        near = [(a, b) for a, b in done if abs(places[i] - b) < distance]
        tries = (sign * step * distance / 2 for step in range(2 * len(places) + 1) for sign in (1, -1))
        free = (o for o in tries if all(math.hypot(o - a, places[i] - b) >= distance * 0.999 for a, b in near))
        offsets[i] = next(free)
        done.append((offsets[i], places[i]))
    width = max(map(abs, offsets), default=0.0)
    return [offset * min(1.0, widest / width) for offset in offsets] if width else offsets
