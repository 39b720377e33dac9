"""The results as a table, in a terminal or as Markdown between two markers of a file."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

BEGIN = "<!-- benchmarks: written by make bench PAGE=1 -->"
END = "<!-- benchmarks end -->"

COLUMNS = ("ratio", "quartiles", "limit", "", "on", "case", "ratio of", "other ways / replicax")

STYLES = {"met": "green", "faster": "green", "NOT MET": "bold red", "slower": "red", "FAILED": "bold red"}

Row = Mapping[str, Any]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table as text, without ``line``."""
    limit = "–" if row["limit"] is None else f"≤ {row['limit']:.2f}"
    what = str(row["devices"] or "GPU"), row["case"], row["words"]
    if "ratio" not in row:
        return "–", "", limit, row["verdict"], *what, row["why"]
    measured = row["ratio"]
    others = [f"{name} {number(way['over_first']['median'])}" for name, way in list(row["ways"].items())[1:]]
    others += [f"{name}: {why}" for name, why in row["absent"].items()]
    quartiles = f"{number(measured['low'])} to {number(measured['high'])}"
    return number(measured["median"]), quartiles, limit, row["verdict"], *what, ", ".join(others)


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Rows as text. Only the first row of a case shows the times of the other ways."""
    found: list[tuple[str, ...]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        text = cells(row)
        same = before is not None and all(before.get(key) == row.get(key) for key in ("case", "devices", "ways"))
        found.append((*text[:-1], '"') if same and "ratio" in row else text)
    return found


def by_line(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each line, in order of first appearance."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["line"], []).append(row)
    return lines


def summary(rows: Sequence[Row]) -> str:
    """The count of each verdict, in one sentence."""
    count = Counter(row["verdict"] for row in rows)
    known = ("met", "within noise", "NOT MET", "faster", "even", "slower", "skipped", "FAILED")
    return ", ".join(f"{count[verdict]} {verdict}" for verdict in known if count[verdict])


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine, the versions and the date, in one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    return (
        f"{machine['date']}, {gpu}{machine['cores']} cores of {machine['processor']}, {machine['system']}; {versions}"
    )


def console() -> Console:
    """The console for the table; 220 columns in a file."""
    return Console(width=None if sys.stdout.isatty() else 220)


def other_machines(rows: Sequence[Row]) -> list[str]:
    """A sentence for each other machine on which some of the rows were measured."""
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        if "machine" in row:
            found[row["machine"], "On the GPU" if row["devices"] == 0 else f"Of {row['line'].split(':')[0]!r}"] = None
    return [f"{which}: {line}" for line, which in found]


def show(results: Mapping[str, Any], console: Console) -> None:
    """Prints the table in a terminal."""
    for line, rows in by_line(results["rows"]).items():
        table = Table(*COLUMNS, title=f"\n{line}", title_justify="left", title_style="bold", box=SIMPLE)
        for row, text in zip(rows, table_rows(rows), strict=True):
            table.add_row(*text, style=STYLES.get(row["verdict"]))
        console.print(table)
    for line in (machine_line(results["machine"]), *other_machines(results["rows"])):
        console.print(line, soft_wrap=True)
    console.print(summary(results["rows"]))


def markdown(results: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    machines = [machine_line(results["machine"]), *other_machines(results["rows"])]
    lines = [f"{'. '.join(machines)}. In all: {summary(results['rows'])}.", ""]
    lines += [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for line, rows in by_line(results["rows"]).items():
        lines.append(_line([f"**{line}**"] + [""] * (len(COLUMNS) - 1)))
        lines += map(_line, table_rows(rows))
    return "\n".join(lines)


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def write_between_markers(path: Path, text: str) -> None:
    """Replaces the text between the two markers of a file.

    Raises:
        ValueError: the file does not contain both markers once, in this order.
    """
    whole = path.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise ValueError(f"{path} needs the two lines {BEGIN!r} and {END!r}, once each, in this order.")
    before, rest = whole.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
