"""What a surgery, a fit or an export did, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """Facts and an optional table, printable and JSON-able.

    Args:
        title: What was done, in a few words.
        facts: Named results; JSON-able values (numbers, strings, booleans, lists, nested mappings). A list of mappings,
            and a mapping of mappings with the same keys, is printed as a table.
        rows: Rows of a table, each a mapping from column to JSON-able value. All rows share their keys.

    Example:
        >>> report = Report("Frozen", {"groups": 2}, [{"group": "head", "parameters": 10}])
        >>> print(report)
        Frozen
          groups: 2
          group  parameters
          head           10
        >>> report.to_dict()["facts"]["groups"]
        2
    """

    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries and lists."""
        return {"title": self.title, "facts": dict(self.facts), "rows": [dict(row) for row in self.rows]}

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        facts = [line for name, value in self.facts.items() for line in _fact(name, value)]
        return "\n".join([self.title, *facts, *("  " + line for line in format_table(self.rows))])


def format_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned text lines of a table: numbers to the right, text to the left.

    Args:
        rows: Mappings from column name to value, all with the same keys in the same order.

    Returns:
        The header and one line a row; no line at all for no rows.
    """
    if not rows:
        return []
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    numeric = [all(isinstance(row[column], int | float) for row in rows) for column in columns]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]

    def line(values: Sequence[str]) -> str:
        aligned = [v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True)]
        return "  ".join(aligned).rstrip()

    return [line(columns), *(line(values) for values in cells)]


def _fact(name: str, value: Any) -> list[str]:
    """A line, or a table or a block of its own where the value is one."""
    if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
        rows = list(value.values())
        alike = all(isinstance(row, Mapping) and row.keys() == rows[0].keys() for row in rows)
        if alike and not any(isinstance(item, Mapping | list) for row in rows for item in row.values()):
            return [
                f"  {name}:",
                *(f"    {line}" for line in format_table([{"": n, **row} for n, row in value.items()])),
            ]
        return [f"  {name}:", *(f"  {line}" for inner, item in value.items() for line in _fact(inner, item))]
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return [f"  {name}:", *(f"    {line}" for line in format_table(value))]
    return [f"  {name}: {_cell(value)}"]


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
