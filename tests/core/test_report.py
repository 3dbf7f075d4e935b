from __future__ import annotations

import json

from lightning_ft.core.report import Report, format_table

ROWS = [
    {"group": "block.0", "values": 1200, "share": 0.75, "trains": True},
    {"group": "ä", "values": 5, "share": None, "trains": False},
]


def test_prints_aligned_columns() -> None:
    assert str(Report("Done", {"steps": 12000, "loss": 0.123456, "names": ["a"], "ok": True, "none": None}, ROWS)) == (
        "Done\n"
        "  steps: 12,000\n"
        "  loss: 0.1235\n"
        "  names: ['a']\n"
        "  ok: yes\n"
        "  none: -\n"
        "  group    values  share  trains\n"
        "  block.0   1,200  0.75      yes\n"
        "  ä             5  -          no"
    )


def test_without_rows_there_is_no_table() -> None:
    assert format_table([]) == []
    assert str(Report("Nothing")) == "Nothing"


def test_json_holds_everything() -> None:
    report = Report("Done", {"nested": {"a": [1, 2]}}, ROWS)
    assert (
        json.loads(report.to_json())
        == report.to_dict()
        == {"title": "Done", "facts": {"nested": {"a": [1, 2]}}, "rows": ROWS}
    )
    assert "ä" in report.to_json()


def test_a_fact_that_is_a_table_is_printed_as_one() -> None:
    report = Report("Tried", {"tries": [{"name": "a", "drop": 0.25}, {"name": "bc", "drop": None}], "left": []})
    assert str(report).splitlines() == [
        "Tried",
        "  tries:",
        "    name  drop",
        "    a     0.25",
        "    bc    -",
        "  left: []",
    ]


def test_nested_facts() -> None:
    files = {"a": {"bytes": 10, "sha256": "x"}, "bc": {"bytes": 2000, "sha256": "yz"}}
    report = Report("Done", {"files": files, "source": {"path": "p", "files": {"f": "1"}}, "flat": {"one": 1}})
    assert str(report).splitlines() == [
        "Done",
        "  files:",
        "        bytes  sha256",
        "    a      10  x",
        "    bc  2,000  yz",
        "  source:",
        "    path: p",
        "    files: {'f': '1'}",
        "  flat: {'one': 1}",
    ]
