"""``plot.py results.json picture.png``: plots each number divided by its limit, on a logarithmic scale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from report import by_line, machine_line

COLOURS = {"met": "#2a7f3f", "faster": "#2a7f3f", "within noise": "#b8860b", "even": "#b8860b"}
WORSE = "#b22222"
LEAST, MOST = 0.01, 300.0


def draw(results: dict[str, Any], picture: Path) -> None:
    """Draws one line per number: its median as a dot, its quartiles as a bar. Left of 1, the limit is met."""
    lines = by_line([row for row in results["rows"] if "ratio" in row])
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * sum(len(rows) + 1.5 for rows in lines.values())))
    y = 0.0
    for line, rows in lines.items():
        axes.text(LEAST, y, line, weight="bold", fontsize=7.5, va="center", clip_on=False)
        y += 1
        for row in rows:
            limit = row["limit"] or 1.0
            low, median, high = (min(max(row["ratio"][key] / limit, LEAST), MOST) for key in ("low", "median", "high"))
            colour = COLOURS.get(row["verdict"], WORSE)
            axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.4)
            axes.plot([median], [y], "<" if median == LEAST else "o", color=colour, markersize=4)
            on = f"{row['devices']} devices" if row["devices"] > 1 else "1 device" if row["devices"] else "GPU"
            axes.text(LEAST * 0.85, y, f"{row['case']} ({on})", fontsize=6, va="center", ha="right")
            axes.text(MOST * 1.2, y, row["words"], fontsize=6, va="center", ha="left")
            y += 1
        y += 0.5
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(LEAST, MOST), ylim=(y, -1), yticks=[])
    axes.set_xlabel("over its limit, or over the peer where there is none: left of 1 is met, or faster", fontsize=8)
    axes.tick_params(labelsize=7)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.set_title(machine_line(results["machine"]), fontsize=5.5, loc="right")
    figure.savefig(picture, dpi=150, bbox_inches="tight")


def main() -> None:
    """Reads the results and writes the picture."""
    matplotlib.use("Agg")
    results, picture = map(Path, sys.argv[1:])
    draw(json.loads(results.read_text()), picture)


if __name__ == "__main__":
    main()
