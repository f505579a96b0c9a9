"""Measures the service on a SoftHSM token: rates, latencies, memory. docs/performance.md says how to read it.

    .venv/bin/python bench [--seconds S] [--rounds N] [--quick] [--peer URL]

Prints a table and writes bench-report.json into the working directory.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import httpx
from artifacts import (
    DISTRO,
    MIB,
    Request,
    TokenRequest,
    check_rsa,
    digest_request,
    swupdate_request,
    write_file,
    write_swu,
)
from bare import BareWorker, bare_workers, drive
from imx import imx_request, write_cst_input
from kmod import SignFile, check_tree, modules, signature_request, write_tree
from load import Load, Upload, check_local, post, upload
from mender import KEYS as MENDER_KEYS
from mender import check_artifact, sha256sum, sign_in_place, write_artifact
from rich.console import Console
from rich.table import Column, Table
from service import PeakMemory, service
from tegra import KEYS as TEGRA_KEYS
from tegra import check_set, sign_set, write_request
from tools import CST_VERSION, BareTool, Runs, copied_token, runs_of, sign_images
from yubihsm2 import simulated_yubihsm

from hsmsign.settings import load as load_settings
from tokens.pkcs11 import Pkcs11Settings

ROOT = Path(__file__).parents[1]
REPORT = Path("bench-report.json")
CLIENTS = (16, 1)
IMX_CLIENTS = (8, 1)
YUBIHSM_CLIENTS = (8, 4, 1)
SECONDS_MAX = 60
ROUNDS_MAX = 100
TABLE_WIDTH = 132
"""In columns, where the output is no terminal."""

TOKEN_RATIO_WANTED = 0.7
UPLOAD_EXTRA_MIB_WANTED = 20
IMX_EXTRA_MS_WANTED = 15
KMOD_TOKEN_RATIO_WANTED = 0.67
KMOD_TOOL_RATIO_WANTED = 0.125
TOOL_RATIOS_WANTED = {"/sign/mender": ("of sha256sum", 2), "/sign/tegra": ("with a key file", 1.3)}
YUBIHSM_BUSY_WANTED = 0.98
YUBIHSM_EXTRA_MS_WANTED = 3


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    seconds: int
    rounds: int
    workers: tuple[int, ...] = (1, 2)
    upload_mib: tuple[int, ...] = (1, 1024)
    generic_mib: int = 1024
    modules: int = 1000
    mender_mib: int = 2048
    tegra_images: int = 130


QUICK = Plan(
    seconds=1, rounds=1, workers=(1,), upload_mib=(1, 64), generic_mib=16, modules=50, mender_mib=32, tegra_images=13
)


@dataclass(frozen=True)
class Row:
    """One entry of the report."""

    case: str
    clients: int
    workers: int | None
    per_second: float
    p50_ms: float
    p99_ms: float
    errors: int
    token_ratio: float | None = None
    extra_ms: float | None = None
    tool_ratio: float | None = None
    peak_mib: float | None = None


class Bench:
    """What every case needs: the fixtures' settings and a place for files."""

    def __init__(self, plan: Plan, peer: str | None, console: Console) -> None:
        self.plan = plan
        self.peer = peer
        self.console = console
        place = ROOT / ".cache/bench"
        self.fixtures = place / "fixtures"
        self.config = self.fixtures / "hsmsign.toml"
        self.log = place / "service.log"
        subprocess.run([sys.executable, ROOT / "softhsm-fixtures/make_fixtures.py", self.fixtures], check=True)
        self.log.unlink(missing_ok=True)

    def rows(self) -> Iterator[Row]:
        """Every case, one after the other."""
        requests = [make(self.fixtures / "public") for make in (swupdate_request, digest_request)]
        for workers in self.plan.workers:
            for request in requests:
                yield from self.paired(request, workers)
        for mib in self.plan.upload_mib:
            yield self.upload(mib)
        yield from self.imx()
        yield from self.generic()
        yield from self.kmod()
        yield from self.mender()
        yield from self.tegra()
        for workers in self.plan.workers:
            yield from self.yubihsm(workers)

    @property
    def provider(self) -> Pkcs11Settings:
        """The token's settings."""
        provider = load_settings(self.config).providers["softhsm"]
        assert isinstance(provider, Pkcs11Settings)
        return provider

    def paired(self, request: TokenRequest, workers: int) -> Iterator[Row]:
        """The service, the bare workers and the peer take turns; a ratio is that of two neighbours in time."""
        state_directory = str(load_settings(self.config).server.state_directory)
        peer = self.peer if self.peer and request.path == "/sign/swupdate" else None
        loads: dict[int, list[Load]] = {clients: [] for clients in CLIENTS}
        ratios: dict[int, list[float]] = {clients: [] for clients in CLIENTS}
        peers: dict[int, list[Load]] = {clients: [] for clients in CLIENTS}
        with (
            service(self.config, self.log, workers) as running,
            bare_workers(self.provider, state_directory, workers) as bare,
        ):
            request.check(first_answer(running.url, request))
            if peer:
                first_answer(peer, request)  # by another key: that it signs is all that can be said
            for number in range(self.plan.rounds):
                self.say(f"{request.case}, {workers} worker(s), round {number + 1} of {self.plan.rounds}")
                for clients in CLIENTS:
                    load = post(running.url, request, clients, self.plan.seconds)
                    loads[clients].append(load)
                    ratios[clients].append(load.per_second / self.drive(bare, request))
                    if peer:
                        peers[clients].append(post(peer, request, clients, self.plan.seconds))
        for clients in CLIENTS:
            yield load_row(request.case, clients, workers, loads[clients], median(ratios[clients]))
            if peer:
                yield load_row(f"{request.case} (peer)", clients, None, peers[clients], None)

    def drive(self, bare: list[BareWorker], request: TokenRequest) -> float:
        """The bare workers' rate."""
        return drive(bare, request, self.plan.seconds)

    def upload(self, mib: int) -> Row:
        """A whole .swu, uploaded, signed and answered by a service that has just been started."""
        uploads: list[Upload] = []
        with (
            tempfile.TemporaryDirectory(dir=self.fixtures.parent, prefix="swu-") as directory,
            service(self.config, self.log, 1) as running,
        ):
            self.say(f"upload of {mib} MiB")
            artifact = write_swu(Path(directory), mib)
            size = artifact.stat().st_size
            with PeakMemory(running.pid) as memory:
                for _ in range(self.plan.rounds):
                    # small ones are repeated, for as long as a load would last
                    spent = 0.0
                    while spent < self.plan.seconds:
                        done = upload(running.url, "/sign/swupdate", {"distro": DISTRO, "method": "RSA"}, artifact)
                        uploads.append(done)
                        spent += done.seconds
        seconds = [each.seconds for each in uploads]
        return Row(
            case=f"/sign/swupdate .swu {mib} MiB",
            clients=1,
            workers=1,
            per_second=size / MIB / median(seconds),
            p50_ms=median(seconds) * 1000,
            p99_ms=percentile(seconds, 99) * 1000,
            errors=sum(each.status != httpx.codes.OK or each.answer_bytes < size for each in uploads),
            peak_mib=memory.peak_mib,
        )

    def imx(self) -> Iterator[Row]:
        """A boot image for `/sign/imx`; the service and `cst` itself take turns."""
        request = imx_request(self.fixtures)
        loads: dict[int, list[Load]] = {clients: [] for clients in IMX_CLIENTS}
        bares: dict[int, list[Load]] = {clients: [] for clients in IMX_CLIENTS}
        with (
            tempfile.TemporaryDirectory(dir=self.fixtures.parent, prefix="cst-") as name,
            service(self.config, self.log, 1) as running,
        ):
            tools: list[BareTool] = []
            for number in range(max(IMX_CLIENTS)):
                directory = Path(name, str(number))
                write_cst_input(self.fixtures, directory)
                tools.append(BareTool(copied_token(self.provider, directory), directory))
            request.check(first_answer(running.url, request))
            for number in range(self.plan.rounds):
                self.say(f"{request.case}, round {number + 1} of {self.plan.rounds}")
                for clients in IMX_CLIENTS:
                    loads[clients].append(post(running.url, request, clients, self.plan.seconds))
                    bares[clients].append(load_of(sign_images(tools[:clients], self.plan.seconds)))
        for clients in IMX_CLIENTS:
            row = load_row(request.case, clients, 1, loads[clients], None)
            yield beside_tool(row, loads[clients], bares[clients])
            yield load_row(f"cst {CST_VERSION} itself", clients, None, bares[clients], None)

    def generic(self) -> Iterator[Row]:
        """A large file for `/sign/generic`; the service and `openssl dgst` itself take turns."""
        mib = self.plan.generic_mib
        loads: list[Load] = []
        bares: list[Load] = []
        with (
            tempfile.TemporaryDirectory(dir=self.fixtures.parent, prefix="generic-") as name,
            service(self.config, self.log, 1) as running,
        ):
            directory = Path(name)
            tool = BareTool(self.provider, directory)
            key = f"pkcs11:token={self.provider.token};object=generic-rsa"
            fields = {"machine": DISTRO, "method": "RSA"}
            artifact, signature = directory / "artifact", directory / "answer"
            digest = write_file(artifact, mib)
            with PeakMemory(running.pid) as memory:
                for number in range(self.plan.rounds):
                    self.say(f"file of {mib} MiB, round {number + 1} of {self.plan.rounds}")
                    done = upload(running.url, "/sign/generic", fields, artifact, signature)
                    errors = int(done.status != httpx.codes.OK)
                    loads.append(load_of(Runs(done.seconds, [done.seconds], errors), mib))
                    taken = tool.sign_file(artifact, key)
                    bares.append(load_of(runs_of(taken or 0, [taken]), mib))
            check_rsa(self.fixtures / "public/generic-rsa.pem", signature.read_bytes(), digest)
        row = file_row(f"/sign/generic RSA {mib} MiB", 1, loads)
        yield replace(beside_tool(row, loads, bares), peak_mib=memory.peak_mib)
        yield file_row(f"openssl itself {mib} MiB", None, bares)

    def yubihsm(self, workers: int) -> Iterator[Row]:
        """A YubiHSM 2, simulated with the hardware's times; its ratio is the share of time in which it is busy."""
        with (
            tempfile.TemporaryDirectory(dir=self.fixtures.parent, prefix="yubihsm-") as directory,
            simulated_yubihsm(Path(directory)) as yubihsm,
            service(yubihsm.config, self.log, workers, "yubihsm") as running,
        ):
            for request in yubihsm.requests:
                request.check(first_answer(running.url, request))
                loads: dict[int, list[Load]] = {clients: [] for clients in YUBIHSM_CLIENTS}
                busy: dict[int, list[float]] = {clients: [] for clients in YUBIHSM_CLIENTS}
                bares: list[Load] = []
                for number in range(self.plan.rounds):
                    self.say(f"{request.case}, {workers} session(s), round {number + 1} of {self.plan.rounds}")
                    for clients in YUBIHSM_CLIENTS:
                        load, share = yubihsm.load(running.url, request, clients, self.plan.seconds)
                        loads[clients].append(load)
                        busy[clients].append(share)
                    bares.append(load_of(yubihsm.sign(request, self.plan.seconds)))
                for clients in YUBIHSM_CLIENTS:
                    row = load_row(request.case, clients, workers, loads[clients], median(busy[clients]))
                    yield beside_tool(row, loads[clients], bares) if clients == 1 else row
                yield load_row(f"{request.case}, python-yubihsm itself", 1, None, bares, None)

    def kmod(self) -> Iterator[Row]:
        """A tree of kernel modules for `/sign/modules`; the service, a bare worker and sign-file take turns."""
        paths = modules(self.plan.modules)
        raw = signature_request(paths[0])
        state_directory = str(load_settings(self.config).server.state_directory)
        public_key, certificate = self.fixtures / "public/kmod-rsa.pem", self.fixtures / "certificates/kmod-rsa.pem"
        loads: list[Load] = []
        tools: list[Load] = []
        packed: list[Load] = []
        ratios: list[float] = []
        with (
            tempfile.TemporaryDirectory(dir=self.fixtures.parent, prefix="kmod-") as name,
            service(self.config, self.log, 1) as running,
            bare_workers(self.provider, state_directory, 1) as bare,
        ):
            directory = Path(name)
            sign_file = SignFile(self.provider, certificate, directory)

            def posted(artifact: Path) -> Load:
                answer = directory / "answer"
                done = upload(running.url, "/sign/modules", {"machine": DISTRO}, artifact, answer)
                check_tree(answer, paths, public_key)
                return load_of(Runs(done.seconds, [done.seconds], int(done.status != httpx.codes.OK)), len(paths))

            plain, gzipped = directory / "modules.tar", directory / "modules.tar.gz"
            write_tree(plain, paths)
            write_tree(gzipped, paths, "--gzip")
            for number in range(self.plan.rounds):
                self.say(f"{len(paths)} modules, round {number + 1} of {self.plan.rounds}")
                loads.append(posted(plain))
                ratios.append(loads[-1].per_second / drive(bare, raw, self.plan.seconds))
                tools.append(load_of(sign_file.sign(paths), len(paths)))
            with PeakMemory(running.pid) as memory:
                for number in range(self.plan.rounds):
                    self.say(f"{len(paths)} modules in tar.gz, round {number + 1} of {self.plan.rounds}")
                    packed.append(posted(gzipped))
        case = f"/sign/modules {len(paths)} modules"
        yield beside_tool(replace(file_row(case, 1, loads), token_ratio=median(ratios)), loads, tools)
        yield file_row(f"sign-file itself {len(paths)} modules", None, tools)
        yield replace(file_row(f"{case}, tar.gz", 1, packed), peak_mib=memory.peak_mib)

    def mender(self) -> Iterator[Row]:
        """An artifact for `/sign/mender`, as an upload and in place; the service and sha256sum take turns."""
        mib = self.plan.mender_mib
        uploads: list[Load] = []
        in_place: list[Load] = []
        sums: list[Load] = []
        with tempfile.TemporaryDirectory(dir=self.fixtures.parent, prefix="mender-") as name:
            directory = Path(name)
            artifact, answer = write_artifact(directory, mib), directory / "answer.mender"
            settings = {"HSMSIGN_SIGNERS__MENDER__DIRECTORIES": json.dumps([name])}
            with (
                service(self.config, self.log, 1, settings=settings) as running,
                PeakMemory(running.pid) as memory,
            ):
                for number in range(self.plan.rounds):
                    self.say(f"artifact of {mib} MiB, round {number + 1} of {self.plan.rounds}")
                    fields = {"distro": DISTRO, "force": "1"}
                    done = upload(running.url, "/sign/mender", fields, artifact, answer)
                    uploads.append(load_of(Runs(done.seconds, [done.seconds], int(done.status != httpx.codes.OK)), mib))
                    sums.append(load_of(sha256sum(artifact), mib))
                    distro = list(MENDER_KEYS)[number % 2]
                    in_place.append(load_of(sign_in_place(running.url, distro, artifact), mib))
            check_artifact(answer, self.fixtures / f"public/{MENDER_KEYS[DISTRO]}.pem")
            check_artifact(artifact, self.fixtures / f"public/{MENDER_KEYS[distro]}.pem")
        row = file_row(f"/sign/mender {mib} MiB", 1, uploads)
        yield replace(beside_tool(row, uploads, sums), peak_mib=memory.peak_mib)
        yield beside_tool(file_row(f"/sign/mender artifact-uri {mib} MiB", 1, in_place), in_place, sums)
        yield file_row(f"sha256sum itself {mib} MiB", None, sums)

    def tegra(self) -> Iterator[Row]:
        """A Jetson's boot files for `/sign/tegra`; a key on the token and one in a file take turns."""
        images = self.plan.tegra_images
        token, file = TEGRA_KEYS
        loads: dict[str, list[Load]] = {machine: [] for machine in TEGRA_KEYS}
        with tempfile.TemporaryDirectory(dir=self.fixtures.parent, prefix="tegra-") as name:
            directory = Path(name)
            artifact, answer = write_request(directory, images), directory / "answer.tar.gz"
            with service(self.config, self.log, 1) as running:
                for machine, label in TEGRA_KEYS.items():
                    sign_set(running.url, machine, artifact, answer)
                    check_set(answer, images, self.fixtures / f"public/{label}.pem")
                for number in range(self.plan.rounds):
                    self.say(f"boot files with {images} images, round {number + 1} of {self.plan.rounds}")
                    for machine in TEGRA_KEYS:
                        loads[machine].append(load_of(sign_set(running.url, machine, artifact, answer), images))
        case = f"/sign/tegra t234 RSA-3072 {images} images"
        yield beside_tool(file_row(case, 1, loads[token]), loads[token], loads[file])
        yield file_row(f"{case}, key file", None, loads[file])

    def say(self, what: str) -> None:
        """Progress, for a reader who waits."""
        self.console.print(what, style="dim", highlight=False)


def first_answer(url: str, request: Request) -> bytes:
    """A server that does not sign is not measured. Raises httpx.HTTPError."""
    headers = {"Content-Type": request.content_type}
    return httpx.post(url + request.path, content=request.body, headers=headers).raise_for_status().content


def load_row(case: str, clients: int, workers: int | None, loads: Sequence[Load], ratio: float | None) -> Row:
    """The medians of the rounds; errors are of all of them."""
    return Row(
        case=case,
        clients=clients,
        workers=workers,
        per_second=median(load.per_second for load in loads),
        p50_ms=median(load.p50_ms for load in loads),
        p99_ms=median(load.p99_ms for load in loads),
        errors=sum(load.errors for load in loads),
        token_ratio=ratio,
    )


def file_row(case: str, workers: int | None, loads: Sequence[Load]) -> Row:
    """Of rounds with one file each."""
    p99_ms = percentile([load.p50_ms for load in loads], 99)
    return replace(load_row(case, 1, workers, loads, None), p99_ms=p99_ms)


def load_of(runs: Runs, mib: int = 1) -> Load:
    """Runs, as those of wrk are told; by MiB where each has many. Raises RuntimeError where none was good."""
    if not runs.each:
        raise RuntimeError("a tool, started directly, does not sign")
    p50_ms, p99_ms = (1000 * value for value in (median(runs.each), percentile(runs.each, 99)))
    return Load(mib * len(runs.each) / runs.seconds, p50_ms, p99_ms, runs.errors)


def beside_tool(row: Row, loads: Sequence[Load], bares: Sequence[Load]) -> Row:
    """The row with what the service takes more than the bare tool did, its neighbour in time."""
    pairs = list(zip(loads, bares, strict=True))
    return replace(
        row,
        extra_ms=median(load.p50_ms - bare.p50_ms for load, bare in pairs),
        tool_ratio=median(load.p50_ms / bare.p50_ms for load, bare in pairs),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """By nearest rank: of fewer than a hundred values the 99th is the largest."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def main() -> None:
    plan, peer = options()
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    try:
        rows = list(Bench(plan, peer, console).rows())
    except httpx.HTTPError as error:
        sys.exit(f"bench: a server does not sign: {error}")
    REPORT.write_text(json.dumps([rounded(row) for row in rows], indent=2) + "\n")
    console.print(table(rows))
    for line in verdicts(rows):
        console.print(line, highlight=False)
    console.print(f"{REPORT} is written.", highlight=False)


def options() -> tuple[Plan, str | None]:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="bench", description="Measures the service on a SoftHSM token.")
    parser.add_argument("--seconds", type=int, default=3, help=f"length of one run, 1 to {SECONDS_MAX} (3)")
    parser.add_argument("--rounds", type=int, default=5, help=f"how often each is run, 1 to {ROUNDS_MAX} (5)")
    parser.add_argument("--quick", action="store_true", help="a short look at whether it runs; no numbers to quote")
    parser.add_argument("--peer", metavar="URL", help="another server, on this machine, that gets the same load")
    asked = parser.parse_args()
    if not 1 <= asked.seconds <= SECONDS_MAX or not 1 <= asked.rounds <= ROUNDS_MAX:
        parser.error(f"--seconds is 1 to {SECONDS_MAX}, --rounds 1 to {ROUNDS_MAX}")
    if asked.peer:
        try:
            check_local(asked.peer)
        except (ValueError, OSError) as error:
            parser.error(f"--peer: {error}")
    plan = QUICK if asked.quick else Plan(asked.seconds, asked.rounds)
    return plan, asked.peer.rstrip("/") if asked.peer else None


def rounded(row: Row) -> dict[str, str | int | float | None]:
    """An entry of the report."""
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(row).items()}


def table(rows: list[Row]) -> Table:
    """The rows for a terminal."""
    numbers = (
        "clients",
        "workers",
        "per second",
        "p50 ms",
        "p99 ms",
        "errors",
        "token ratio",
        "extra ms",
        "tool ratio",
        "peak MiB",
    )
    table = Table(Column("case", no_wrap=True), *(Column(name, justify="right") for name in numbers))
    for row in rows:
        table.add_row(
            row.case,
            str(row.clients),
            shown(row.workers, "d"),
            shown(row.per_second, ".1f" if row.per_second < 100 else ".0f") + (" MiB" if "MiB" in row.case else ""),
            f"{row.p50_ms:.2f}",
            f"{row.p99_ms:.2f}",
            f"[red]{row.errors}" if row.errors else "0",
            shown(row.token_ratio, ".2f"),
            shown(row.extra_ms, ".1f"),
            shown(row.tool_ratio, ".2f"),
            shown(row.peak_mib, ".1f"),
        )
    return table


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def verdicts(rows: list[Row]) -> Iterator[str]:
    """What is wanted of the service, and whether it was so this time."""
    many = [row for row in rows if "RSA-2048" in row.case and row.clients == max(CLIENTS)]
    best = max(row.token_ratio for row in many if row.token_ratio is not None)
    yield verdict(best >= TOKEN_RATIO_WANTED, f"token ratio at 16 clients {best:.2f}, wanted {TOKEN_RATIO_WANTED}")
    errors = sum(row.errors for row in rows if "(peer)" not in row.case)
    yield verdict(errors == 0, f"{errors} errors, wanted none")
    for row in rows:
        if row.extra_ms is not None and row.case.startswith("/sign/imx"):
            text = (
                f"{row.case} at {row.clients} clients {row.extra_ms:.1f} ms more than cst, wanted {IMX_EXTRA_MS_WANTED}"
            )
            yield verdict(row.extra_ms <= IMX_EXTRA_MS_WANTED, text)
    yubihsm = [row for row in rows if row.case.startswith("YubiHSM") and row.workers is not None]
    for row in yubihsm:
        if row.workers == yubihsm[-1].workers:
            yield yubihsm_verdict(row)
    for row in rows:
        if row.case.startswith("/sign/modules") and row.token_ratio is not None and row.tool_ratio is not None:
            text = f"{row.case}: {row.token_ratio:.2f} of the bare token's rate, wanted {KMOD_TOKEN_RATIO_WANTED}"
            yield verdict(row.token_ratio >= KMOD_TOKEN_RATIO_WANTED, text)
            text = f"{row.case}: {row.tool_ratio:.3f} of the time of sign-file, wanted {KMOD_TOOL_RATIO_WANTED}"
            yield verdict(row.tool_ratio <= KMOD_TOOL_RATIO_WANTED, text)
    for row in rows:
        for path, (than, wanted) in TOOL_RATIOS_WANTED.items():
            if row.case.startswith(path) and row.tool_ratio is not None:
                text = f"{row.case}: {row.tool_ratio:.2f} of the time {than}, wanted {wanted}"
                yield verdict(row.tool_ratio <= wanted, text)
    peaks = [row.peak_mib for row in rows if ".swu" in row.case and row.peak_mib is not None]
    if not peaks:
        yield "[yellow]no memory was measured: only root may look into the service's processes"
        return
    for row in rows:
        if row.case.startswith("/sign/mender") and row.peak_mib is not None:
            peaks.append(row.peak_mib)
    extra = max(peaks) - peaks[0]
    wanted = f"wanted at most {UPLOAD_EXTRA_MIB_WANTED}"
    yield verdict(extra <= UPLOAD_EXTRA_MIB_WANTED, f"{extra:.1f} MiB more for the largest uploads, {wanted}")


def yubihsm_verdict(row: Row) -> str:
    what = f"{row.case}, {row.workers} session(s), {row.clients} client(s)"
    if row.extra_ms is not None:
        text = f"{what}: {row.extra_ms:.1f} ms more than python-yubihsm, wanted {YUBIHSM_EXTRA_MS_WANTED}"
        return verdict(row.extra_ms <= YUBIHSM_EXTRA_MS_WANTED, text)
    busy = row.token_ratio or 0.0
    return verdict(busy >= YUBIHSM_BUSY_WANTED, f"{what}: busy {busy:.3f} of the time, wanted {YUBIHSM_BUSY_WANTED}")


def verdict(met: bool, text: str) -> str:
    return f"[green]met[/]      {text}" if met else f"[red]not met[/]  {text}"


if __name__ == "__main__":
    main()
