"""What is installed, and what a process loads."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def loaded_by(*modules: str) -> set[str]:
    """The top-level modules in a fresh process that imports these."""
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-I", "-c", program], check=True, capture_output=True, text=True).stdout
    return {name.partition(".")[0] for name in output.split()}


def test_a_token_worker_loads_nothing_that_it_does_not_need() -> None:
    loaded = loaded_by("tokens.worker", "tokens.drivers.pkcs11")
    assert "pkcs11" in loaded
    assert loaded.isdisjoint({"asyncio", "boto3", "botocore", "cryptography", "httpx", "pydantic", "quart"})


def test_the_service_loads_no_driver() -> None:
    loaded = loaded_by("hsmsign.app")
    assert {"quart", "tokens"} <= loaded
    assert "pkcs11" not in loaded


def test_every_dependency_is_pinned() -> None:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"], "hatchling"]
    names = {normalise(re.split(r"[\[<>=~! ]", each)[0]) for each in wanted}
    assert names - {normalise(name) for name in CONSTRAINTS} == set()


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_the_environment_is_the_pinned_one(requirement: str) -> None:
    name = re.split(r"[\[<>=~! ]", requirement)[0]
    pinned = {normalise(each): release for each, release in CONSTRAINTS.items()}
    assert version(name) == pinned[normalise(name)]


def test_the_command_is_there() -> None:
    entry = next(iter(distribution("hsmsign").entry_points.select(group="console_scripts")))
    assert (entry.name, entry.value) == ("hsmsign", PROJECT["scripts"]["hsmsign"])
    command = Path(sys.executable).with_name("hsmsign")
    output = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    assert PROJECT["version"] in output
