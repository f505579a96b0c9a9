"""Browsers that act for another site."""

from typing import Any

import httpx
import pytest

FORM = {"machine": (None, "abc"), "artifact": ("x", b"x")}


@pytest.fixture(scope="module")
def named(start_service: Any) -> Any:
    return start_service(server={"hosts": ["Signer.example"]}).wait_until_serving()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost:1",
        "127.0.0.1",
        "127.0.0.1:80",
        "[::1]:9999",
        "10.1.2.3",
        "signer.example:80",
        "signer.example.",
    ],
)
def test_its_own_names_are_good(named: Any, host: str) -> None:
    assert httpx.post(named.url + "/sign/tiny", files=FORM, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["rebind.attacker.example", "rebind.attacker.example:9999", "localhost.attacker.example",
     "127.0.0.1.attacker.example", "signer.example.attacker.example", "", "[::1", "[v1.x]", "user@localhost.example",
     "1", "0x7f.1"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/sign/tiny", "/healthz", "/keys", "/none"])
def test_a_foreign_host_is_refused(named: Any, host: str, path: str) -> None:
    answer = httpx.post(named.url + path, files=FORM, headers={"Host": host})
    named.assert_problem(answer, 403, "foreign-host")
    assert "server.hosts" in answer.json()["hint"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:8080"},
        {"Origin": "http://localhost"},
        {"Origin": "file://"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_a_cross_site_request_is_refused(named: Any, headers: dict[str, str]) -> None:
    headers = {name: value.replace("{port}", str(named.port)) for name, value in headers.items()}
    answer = httpx.post(named.url + "/sign/tiny", files=FORM, headers=headers)
    named.assert_problem(answer, 403, "cross-site")
    named.assert_clean()


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://127.0.0.1:{port}"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]
)
def test_its_own_pages_are_good(named: Any, headers: dict[str, str]) -> None:
    headers = {name: value.replace("{port}", str(named.port)) for name, value in headers.items()}
    assert httpx.post(named.url + "/sign/tiny", files=FORM, headers=headers).status_code == 200
