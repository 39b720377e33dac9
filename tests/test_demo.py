"""The demo prints correct results, and fails if they are wrong."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

DEMO = Path(__file__).parents[1] / "demo" / "demo.py"


@pytest.mark.long
def test_demo():
    done = subprocess.run(
        [sys.executable, "-W", "error", DEMO, "--devices", "8"],
        env=os.environ | {"COLUMNS": "100", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout
    for size, devices in ((8, 8), (12, 6), (13, 7)):
        assert f"y: float32[{size}], {size} replicas on {devices} devices" in text
    assert "Each device holds all 13 replicas." in text
    accuracy = re.search(r"Held-out accuracy: (\d+\.\d+)% of 397 images", text)
    assert accuracy is not None
    assert float(accuracy[1]) >= 95
    assert "All 7 layouts agree" in text
    for replicas, devices in ((1, 1), (2, 2), (8, 8), (7, 1), (7, 2), (7, 8), (20, 8)):
        assert re.search(rf"^│ +{replicas} │ +{devices} │", text, re.MULTILINE), (replicas, devices)
    assert "1,797 replicas in one call" in text
    assert text.count("times the mean") == 3
    assert text.splitlines()[-1].endswith(" s.")


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(DEMO.parent)
    return importlib.import_module("demo")


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"right": 370}, r"8 replicas on 2 devices: the held-out accuracy is 93\.20%, and should be 95% or more"),
        ({"losses": [2.0, 1.01]}, "8 replicas on 2 devices: the losses differ by 1e-02 from those of 1 replica on 1"),
        ({"losses": [2.0, np.nan]}, "8 replicas on 2 devices: the losses differ by nan from those"),
        ({"right": 385}, r"8 replicas on 2 devices: the held-out accuracy is 96\.98%, that of 1 replica .* 98\.24%"),
    ],
)
def test_demo_fails_if_a_run_is_no_good(demo, second, why):
    def run(replicas, devices, right=390, losses=(2.0, 1.0)):
        return demo.Run(replicas, devices, {}, np.asarray(losses), right)

    with pytest.raises(SystemExit, match=rf"^The demo failed\. {why}"):
        demo.check(Console(quiet=True), [run(1, 1), run(8, 2, **second)])
