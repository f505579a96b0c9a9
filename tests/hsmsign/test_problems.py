"""Problems: each error answers with its own status and type, and none says too much."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from hsmsign.problems import KINDS, NotNow, RequestError
from tokens.errors import Error, KeyProblem, ProviderProblem, StoreProblem, ToolProblem

TABLE = {
    "ArtifactChanged": (409, "artifact-changed"),
    "ArtifactNotFound": (404, "artifact-not-found"),
    "ArtifactRejected": (422, "artifact-rejected"),
    "CrossSite": (403, "cross-site"),
    "Error": (500, "internal-error"),
    "ForeignHost": (403, "foreign-host"),
    "InvalidRequest": (400, "invalid-request"),
    "JobTimeout": (504, "job-timeout"),
    "KeyAmbiguous": (409, "key-ambiguous"),
    "KeyLocked": (423, "key-locked"),
    "KeyMismatch": (500, "key-mismatch"),
    "KeyNotAttested": (403, "key-not-attested"),
    "KeyNotFound": (404, "key-not-found"),
    "KeyNotGranted": (403, "key-not-granted"),
    "KeyUnsuited": (422, "key-unsuited"),
    "KeyUnusable": (500, "key-unusable"),
    "LocationNotAllowed": (403, "location-not-allowed"),
    "LogFull": (503, "log-full"),
    "PinRefused": (503, "pin-refused"),
    "ProviderBusy": (503, "provider-busy"),
    "ProviderRefused": (502, "provider-refused"),
    "ProviderTimeout": (504, "provider-timeout"),
    "ProviderUnavailable": (503, "provider-unavailable"),
    "SignatureMismatch": (500, "signature-mismatch"),
    "SigningFailed": (500, "signing-failed"),
    "SpoolFull": (503, "spool-full"),
    "Stopping": (503, "stopping"),
    "StoreFailed": (502, "store-failed"),
    "ToolFailed": (500, "tool-failed"),
    "ToolTimeout": (504, "tool-timeout"),
    "ToolUnavailable": (501, "tool-unavailable"),
    "TooLarge": (413, "too-large"),
    "TooManyJobs": (503, "too-many-jobs"),
    "UnsupportedMediaType": (415, "unsupported-media-type"),
    "UploadTooSlow": (408, "upload-too-slow"),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_error_has_its_status_and_type(service: Any, name: str) -> None:
    status, slug = TABLE[name]
    answer = service.post(machine="abc", artifact=b"x", error=name)
    problem = service.assert_problem(answer, status, slug)
    assert problem["detail"] == f"{name} happened."
    assert problem["hint"] == "Do something about it."
    assert problem["instance"] == "/sign/tiny"
    line = service.line(answer)
    assert (line["problem"], line["status"]) == (slug, status)
    assert line["level"] == ("error" if status >= 500 else "info")


def test_no_error_is_forgotten() -> None:
    groups = {Error, KeyProblem, ProviderProblem, StoreProblem, ToolProblem, RequestError, NotNow}

    def below(kind: type[Error]) -> set[type[Error]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    errors = {kind for kind in below(Error) if kind.__module__ in ("tokens.errors", "hsmsign.problems")}
    assert errors - groups <= set(KINDS)
    assert {kind.__name__ for kind in errors - groups} <= set(TABLE)
    assert len({kind.slug for kind in KINDS.values()}) == len(KINDS)


def test_the_documented_table_is_the_real_one() -> None:
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    rows = re.findall(r"^\| .+ \| (\d{3}) \| `([a-z-]+)` \|$", text, re.MULTILINE)
    assert {(int(status), slug) for status, slug in rows} == {(kind.status, kind.slug) for kind in KINDS.values()}


def test_an_unexpected_error_is_told_to_the_log_only(service: Any) -> None:
    answer = service.post(machine="abc", artifact=b"x", error="RuntimeError")
    problem = service.assert_problem(answer, 500, "internal-error")
    assert "nobody outside" not in answer.text
    assert "detail" not in problem
    assert service.line(answer)["status"] == 500
    unexpected = [line for line in service.lines if line["event"] == "unexpected error"]
    logged = next(line for line in unexpected if line["request_id"] == problem["request_id"])
    assert "a message that nobody outside should see" in logged["exception"]
    service.assert_clean()


def test_a_busy_provider_says_when_to_come_again(service: Any) -> None:
    answer = service.post(machine="abc", artifact=b"x", error="ProviderBusy")
    assert int(answer.headers["Retry-After"]) == 5


@pytest.mark.parametrize(
    "path", ["/", "/none", "/sign", "/sign/", "/keys/", "/docs", "/redocs", "/scalar", "/static/x"]
)
def test_an_unknown_endpoint_is_a_problem(service: Any, path: str) -> None:
    service.assert_problem(httpx.get(service.url + path), 404, "no-such-endpoint")


def test_another_method_is_a_problem(service: Any) -> None:
    answer = httpx.get(service.url + "/sign/tiny")
    service.assert_problem(answer, 405, "method-not-allowed")
    assert "POST" in answer.headers["Allow"]


def test_a_path_cannot_forge_a_line_of_the_log(service: Any) -> None:
    answer = httpx.get(service.url + "/none%0a%1b[31mforged")
    problem = service.assert_problem(answer, 404, "no-such-endpoint")
    assert problem["instance"] == "/none%0a%1b[31mforged"
    assert service.line(answer)["path"] == "/none%0a%1b[31mforged"
