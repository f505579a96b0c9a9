"""Talks to a server: posts a form, waits where it is told to wait, and turns problem documents into failures."""

import contextlib
import email.utils
import itertools
import json
import secrets
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click
import httpx

from hsmsign.cli.failure import Failure, NoAnswer, Refused, ServerFailed, WrongUsage, printable
from hsmsign.cli.progress import Progress

DEFAULT_SERVER = "http://127.0.0.1:9999"

_CHUNK_BYTES = 1024 * 1024
_PROBLEM_MAX_BYTES = 64 * 1024
_BUSY = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for.

    Arguments:
        connect_timeout_s: for the connection.
        timeout_s: for its answer, when the request has been sent.
        retries: how often a request is sent again that it answers with 429 or 503.
        max_wait_s: for all pauses between them.
    """

    connect_timeout_s: float = 30.0
    timeout_s: float = 1800.0
    retries: int = 10
    max_wait_s: float = 300.0


def get(server: str, path: str, patience: Patience) -> Any:
    """The JSON document at a path. Raises Failure."""
    with _client(server, patience) as client, client.stream("GET", path) as response:
        if response.status_code != httpx.codes.OK:
            raise _failure(response)
        try:
            return json.loads(response.read())
        except ValueError:
            raise NoAnswer("The answer is not JSON.", "Check that --server names hsmsign.") from None


def post(
    server: str, endpoint: str, fields: Mapping[str, str], uploads: Mapping[str, Path], output: Path, patience: Patience
) -> None:
    """Posts a form and writes the answer to `output`: whole, or not at all. Raises Failure."""
    waited_s = 0.0
    for attempt in itertools.count():
        with Progress() as progress, _client(server, patience) as client, ExitStack() as files:
            parts: list[tuple[str, Any]] = [(name, (None, value)) for name, value in fields.items()]
            for name, path in uploads.items():
                file = files.enter_context(progress.open(path))
                parts.append((name, (path.name, file, "application/octet-stream")))
            progress.upload(sum(path.stat().st_size for path in uploads.values()))
            with client.stream("POST", endpoint, files=parts) as response:
                if response.status_code == httpx.codes.OK:
                    _save(response, output, progress)
                    return
                failure = _failure(response)
        pause_s = _pause(response.headers.get("Retry-After"), attempt)
        waited_s += pause_s
        if response.status_code not in _BUSY or attempt >= patience.retries or waited_s > patience.max_wait_s:
            raise failure
        click.echo(printable(f"{response.status_code} {failure.message} Trying again in {pause_s:.0f} s."), err=True)
        time.sleep(pause_s)


@contextmanager
def _client(server: str, patience: Patience) -> Iterator[httpx.Client]:
    """A client whose errors are Failures.

    No proxy of the environment is asked: artifacts go to the server that was named and to nobody else. The system's
    certificate authorities count, as for curl.
    """
    timeout = httpx.Timeout(patience.timeout_s, connect=patience.connect_timeout_s)
    try:
        # reading the authorities takes longer than a small request; the bare context trusts nobody
        tls = server.startswith("https:")
        verify = ssl.create_default_context() if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with httpx.Client(base_url=server, timeout=timeout, trust_env=False, verify=verify) as client:
            yield client
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise WrongUsage(f"{server} is not the URL of a server.", "Write http://HOST:PORT.") from None
    except httpx.ConnectTimeout:
        raise NoAnswer(f"{server} did not take the connection in time.", "Is it the right one?") from None
    except httpx.ConnectError as error:
        raise NoAnswer(f"Cannot connect to {server}: {error}.", "Start it with: hsmsign serve") from None
    except httpx.TimeoutException:
        raise NoAnswer(
            f"No answer in {patience.timeout_s:g} s.", "Raise --timeout, or look at the server's log."
        ) from None
    except httpx.RequestError as error:
        raise NoAnswer(f"The connection broke off: {error}.", "Send the request again: that is harmless.") from None


def _save(response: httpx.Response, output: Path, progress: Progress) -> None:
    """Writes the body beside `output` and renames it: what stands there is whole. Raises Failure."""
    expected = response.headers.get("Content-Length")
    progress.download(None if expected is None else int(expected))
    with _replacing(output) as file:
        # an answer shorter than its Content-Length, or without its last chunk, is a RemoteProtocolError
        for chunk in response.iter_raw(_CHUNK_BYTES):
            file.write(chunk)
            progress.advance(len(chunk))


@contextmanager
def _replacing(output: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `output` when the block ends, and is gone when it fails. Raises Failure."""
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(output)
    except OSError as error:
        raise Failure(f"{output} cannot be written: {error.strerror}.", "Name another file by --output.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _pause(retry_after: str | None, attempt: int) -> float:
    """Seconds until the next attempt: what Retry-After says (RFC 9110, section 10.2.3), else 1, 2, 4, ... 30."""
    if retry_after is not None and retry_after.isdecimal():
        return float(retry_after)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    return float(min(30, 2**attempt))


def _failure(response: httpx.Response) -> Failure:
    """What an answer that is not 200 says: a problem document (RFC 9457), or whatever it is."""
    failure = Refused if httpx.codes.is_client_error(response.status_code) else ServerFailed
    problem = _problem(response)
    message = " ".join(
        f"{str(text).removesuffix('.')}." for text in (problem.get("title"), problem.get("detail")) if text
    )
    fields = [f"  {field['field']}: {field['detail']}" for field in problem.get("fields", ())]
    hints = [problem.get("hint"), *fields, "request_id" in problem and f"Request id: {problem['request_id']}"]
    return failure(
        message or f"The server answered {response.status_code} {response.reason_phrase}.",
        "\n".join(str(hint) for hint in hints if hint) or "Check that --server names hsmsign.",
    )


def _problem(response: httpx.Response) -> dict[str, Any]:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > _PROBLEM_MAX_BYTES:
            return {}
    try:
        problem = json.loads(body)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}
