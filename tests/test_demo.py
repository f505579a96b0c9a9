"""`make demo`: every row is verified by its tool."""

import json
import subprocess
import sys

from tests.conftest import ROOT


def test_the_demo_verifies_every_row() -> None:
    demo = subprocess.run(
        [sys.executable, ROOT / "scripts/demo"], check=False, capture_output=True, text=True, timeout=120
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    report = json.loads((ROOT / "demo-report.json").read_text())
    assert {row["provider"] for row in report} == {"softhsm", "yubihsm", "file", "s3"}
    assert all(row["verified"] is True and row["seconds"] > 0 for row in report)
    assert all(set(row) == {"signer", "variant", "provider", "verifier", "verified", "seconds"} for row in report)
