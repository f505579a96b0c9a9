"""`make bench`: the report has the shape that docs/performance.md describes, and the load stays at home."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FIELDS = [
    *("case", "clients", "workers", "per_second", "p50_ms", "p99_ms", "errors"),
    *("token_ratio", "extra_ms", "tool_ratio", "peak_mib"),
]


def bench(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bench", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_the_report_has_every_case(tmp_path: Path) -> None:
    result = bench(tmp_path, "--quick")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "bench-report.json").read_text())
    assert [(row["case"], row["clients"], row["workers"]) for row in report] == [
        ("/sign/swupdate RSA-2048", 16, 1),
        ("/sign/swupdate RSA-2048", 1, 1),
        ("/keys/NAME/sign P-256", 16, 1),
        ("/keys/NAME/sign P-256", 1, 1),
        ("/sign/swupdate .swu 1 MiB", 1, 1),
        ("/sign/swupdate .swu 64 MiB", 1, 1),
        ("/sign/imx HABv4 RSA-2048", 8, 1),
        ("cst 3.4.1 itself", 8, None),
        ("/sign/imx HABv4 RSA-2048", 1, 1),
        ("cst 3.4.1 itself", 1, None),
        ("/sign/generic RSA 16 MiB", 1, 1),
        ("openssl itself 16 MiB", 1, None),
        ("/sign/modules 50 modules", 1, 1),
        ("sign-file itself 50 modules", 1, None),
        ("/sign/modules 50 modules, tar.gz", 1, 1),
        ("/sign/mender 32 MiB", 1, 1),
        ("/sign/mender artifact-uri 32 MiB", 1, 1),
        ("sha256sum itself 32 MiB", 1, None),
        ("/sign/tegra t234 RSA-3072 13 images", 1, 1),
        ("/sign/tegra t234 RSA-3072 13 images, key file", 1, None),
        ("YubiHSM 2 RSA-2048", 8, 1),
        ("YubiHSM 2 RSA-2048", 4, 1),
        ("YubiHSM 2 RSA-2048", 1, 1),
        ("YubiHSM 2 RSA-2048, python-yubihsm itself", 1, None),
        ("YubiHSM 2 P-256", 8, 1),
        ("YubiHSM 2 P-256", 4, 1),
        ("YubiHSM 2 P-256", 1, 1),
        ("YubiHSM 2 P-256, python-yubihsm itself", 1, None),
    ]
    for row in report:
        assert list(row) == FIELDS
        assert row["errors"] == 0
        assert row["per_second"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert all(0 < row["token_ratio"] < 2 for row in report[:4])
    modules = report[12]
    assert 0 < modules["token_ratio"] < 2
    assert 0 < modules["tool_ratio"] < 1
    for row in (report[6], report[8], report[10], report[15], report[16], report[18]):  # each beside its tool
        assert -1000 < row["extra_ms"] < 5000
        assert 0.2 < row["tool_ratio"] < 100
    small, large, generic = (report[number]["peak_mib"] for number in (4, 5, 10))
    if os.geteuid() == 0:
        assert 10 < small < 500
        assert large - small < 60
        assert 10 < generic < 500
    else:  # the service lets nobody else look into its memory
        assert small is large is generic is None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--peer", "http://192.0.2.1:9999"), "192.0.2.1 is not this machine"),
        (("--seconds", "61"), "--seconds is 1 to 60"),
    ],
)
def test_load_is_bounded_and_stays_on_this_machine(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    result = bench(tmp_path, *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert not list(tmp_path.iterdir())
