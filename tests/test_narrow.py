"""Collectives of 2-bit and 4-bit integers: 2-bit operands, and 4-bit sums, are converted to bytes."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "narrow.py"


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "n", "d"),
    [("int2", 8, 8), ("uint2", 8, 4), ("int2", 8, 3), ("int4", 8, 4), ("uint4", 6, 4)],
)
def test_collectives(dtype, n, d):
    command = [sys.executable, "-W", "error", str(SCRIPT), dtype, str(n), str(d)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]
