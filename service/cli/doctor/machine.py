"""Checks of the machine (directory, disk, ports, limits, clock) and of a running service."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import socket
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
from cryptography import x509

from betrace.service.cli.doctor.finding import FAILED, NOTE, OK, WARNING, Finding, size
from betrace.service.config.base import OFF, split_address
from betrace.service.config.settings import Settings
from betrace.service.receiver.sockets import PROMETHEUS_PORT
from betrace.service.storage.spanlog.log import LOCK_FILE
from betrace.service.tenancy.authentication import SecretError, operator_tokens
from betrace.service.traces.checkpoint import checkpoint_files

_CHECK_BYTES = 1 << 20
_SLOW_SYNC_SECONDS = 0.5  # as BetraceLogSyncSlow
_ALMOST_FULL, _FILLING = 0.05, 0.2
_MIN_FREE_INODES = 0.05
_FUTURE_SECONDS = 5.0
_FIRST_YEAR = 2025
_CERTIFICATE_DAYS = 14
_ASK_SECONDS = 5.0
_OTHER_FILES = 256  # stores, logs and threads, beside connections
_TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronised


def secrets(settings: Settings) -> Iterator[Finding]:
    """The operator token and the certificate."""
    if settings.auth.enabled:
        try:
            operator_tokens(settings.auth)
        except SecretError as error:
            yield Finding("secrets", FAILED, *_halves(error))
        else:
            yield Finding("secrets", OK, "the operator token can be read")
    if settings.tls.certificate:
        yield _certificate(settings.tls.certificate, settings.tls.key)


def _certificate(certificate: str, key: str) -> Finding:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        first = x509.load_pem_x509_certificates(Path(certificate).read_bytes())[0]
    except (OSError, ValueError) as error:  # SSLError is an OSError
        remedy = "set tls.certificate and tls.key to a PEM chain and its key"
        return Finding("secrets", FAILED, f"TLS cannot use {certificate}: {error}", remedy)
    left = first.not_valid_after_utc - datetime.now(UTC)
    text = f"the certificate expires on {first.not_valid_after_utc:%Y-%m-%d}"
    if left.days < _CERTIFICATE_DAYS:
        return Finding("secrets", FAILED if left.days < 0 else WARNING, text, "renew it")
    return Finding("secrets", OK, text)


def _halves(error: Exception) -> tuple[str, str]:
    """Split a message into what is wrong and what to do."""
    found, _, remedy = str(error).partition("; ")
    return found, remedy


def directory(settings: Settings) -> Iterator[Finding]:
    """The data directory."""
    path = settings.storage.path
    if not path.exists():
        parent = next((each for each in path.absolute().parents if each.exists()), Path("/"))
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding("data directory", OK, f"{path} does not exist yet; the start creates it")
        else:
            remedy = "create it for the user that runs the service, or set storage.path"
            yield Finding("data directory", FAILED, f"{path} cannot be created in {parent}", remedy)
    elif not path.is_dir():
        yield Finding("data directory", FAILED, f"{path} is not a directory", "set storage.path")
    elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        remedy = f"give user {os.getuid()} permission to read and write it"
        yield Finding("data directory", FAILED, f"{path} is not writable", remedy)
    else:
        yield Finding("data directory", OK, str(path.absolute()))


def disk(settings: Settings) -> Iterator[Finding]:
    """Free space, inodes, and the time a sync takes."""
    path = _existing(settings.storage.path)
    system = os.statvfs(path)
    free = system.f_bavail / max(1, system.f_blocks)
    text = (
        f"{size(system.f_bavail * system.f_frsize)} free ({free:.0%}) on the file system of {path}"
    )
    remedy = "enlarge it, or move the data directory while the service is stopped"
    if free < _ALMOST_FULL:
        yield Finding("disk", FAILED, text, remedy)
    elif free < _FILLING:
        yield Finding("disk", WARNING, text, remedy)
    else:
        yield Finding("disk", OK, text)
    if system.f_files and system.f_favail / system.f_files < _MIN_FREE_INODES:
        text = f"only {system.f_favail} more files can be created on the file system of {path}"
        yield Finding("disk", WARNING, text, "delete files that do not belong to the service")
    if path == settings.storage.path and os.access(path, os.W_OK):
        yield _sync(path)


def _sync(path: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".doctor-") as file:
            file.write(os.urandom(_CHECK_BYTES))
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            took = time.perf_counter() - started
    except OSError as error:
        remedy = "repair the disk, or set storage.path to another"
        return Finding("disk", FAILED, f"{path} cannot be written: {error.strerror}", remedy)
    text = f"{size(_CHECK_BYTES)} written and synced in {1000 * took:.0f} ms"
    if took > _SLOW_SYNC_SECONDS:
        remedy = "see BetraceLogSyncSlow in docs/runbook.md"
        return Finding("disk", WARNING, text, remedy)
    return Finding("disk", OK, text)


def _existing(path: Path) -> Path:
    """The path, or its nearest existing parent."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def owner(data: Path) -> int | None:
    """The process that uses this data directory now; None if it is unused, 0 if it is unknown."""
    try:
        descriptor = os.open(data / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    else:
        return None
    finally:
        os.close(descriptor)


def service(settings: Settings) -> Iterator[Finding]:
    """Whether the service runs on this data directory, and the state it reports."""
    pid = owner(settings.storage.path)
    scheme = "https" if settings.tls.certificate else "http"
    url = f"{scheme}://{settings.api.address}/readyz"
    if pid is None:
        yield Finding("service", OK, "no service runs on this data directory")
        if settings.api.address != OFF:
            yield from _lost_directory(settings.storage.path, url)
        return
    yield Finding("service", OK, f"process {pid} runs on this data directory")
    if settings.api.address == OFF:
        return
    remedy = "see its log, and docs/runbook.md"
    try:
        components = _components(url)
    except (OSError, ValueError) as error:
        yield Finding("service", FAILED, f"{url} does not answer: {error}", remedy)
        return
    if any(part["status"] == "starting" for part in components.values()):
        yield Finding("service", NOTE, f"{url} reports that it is starting", "ask again later")
        return
    bad = {name: part for name, part in components.items() if part["status"] != "ok"}
    for name, part in bad.items():
        status = FAILED if part["status"] == "failed" else WARNING
        text = f"its {name} is {part['status']}: {part['detail']}"
        yield Finding("service", status, text, remedy)
    if not bad:
        yield Finding("service", OK, f"{url} reports that all {len(components)} components are ok")


def _lost_directory(path: Path, url: str) -> Iterator[Finding]:
    """Whether a service has lost this data directory: it runs, and refuses spans."""
    with suppress(OSError, ValueError):
        state = _components(url)["span-log"]
        if state["status"] == "failed":
            text = f"the service at {url} has lost its data directory: {state['detail']}"
            remedy = f"stop it, put {path} back or restore a backup, and start it again"
            yield Finding("service", FAILED, text, remedy)


def _components(url: str) -> dict[str, dict[str, str]]:
    """The components in ``/readyz``. The certificate is not verified, because this only reads."""
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)]
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(url, timeout=_ASK_SECONDS) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:  # 503 while it is not ready, with the same body
        with error:
            body = error.read()
    found: dict[str, dict[str, str]] = json.loads(body)["components"]
    return found


_LISTENERS = ("ingest", "api", "metrics")


def ports(settings: Settings) -> Iterator[Finding]:
    """Whether each listener's address is free or belongs to the running service."""
    pid = owner(settings.storage.path)
    own = _listening(pid) if pid else set()
    addresses = {f"{name}.address": getattr(settings, name).address for name in _LISTENERS}
    if settings.ingest.address != OFF:
        addresses["ingest.grpc_address"] = settings.ingest.grpc_address
    for setting, address in addresses.items():
        if address != OFF:
            yield _port(setting, address, own)


def _listening(pid: int) -> set[int]:
    with suppress(psutil.Error):
        found = psutil.Process(pid).net_connections("tcp")
        return {each.laddr.port for each in found if each.status == psutil.CONN_LISTEN}
    return set()


def _port(setting: str, address: str, own: set[int]) -> Finding:
    host, port = split_address(address)
    if port in own:
        return Finding("ports", OK, f"{address} ({setting}) belongs to the running service")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
    except OSError as error:
        remedy = f"set {setting} to a free address of this machine, or stop what uses it"
        if port == PROMETHEUS_PORT:
            remedy += "; Prometheus itself listens on this port"
        text = f"cannot listen on {address} ({setting}): {error.strerror}"
        return Finding("ports", FAILED, text, remedy)
    return Finding("ports", OK, f"{address} ({setting}) is free")


def limits(settings: Settings) -> Iterator[Finding]:
    """Open files and memory."""
    wanted = settings.ingest.max_connections + _OTHER_FILES
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # the service raises its soft limit to it
    if hard != resource.RLIM_INFINITY and hard < wanted:
        remedy = f"raise it (ulimit -Hn {wanted}), or lower ingest.max_connections"
        text = f"a process may open {hard} files; ingest.max_connections needs {wanted}"
        yield Finding("limits", WARNING, text, remedy)
    else:
        yield Finding("limits", OK, "a process may open enough files")
    needed = settings.duckdb.memory_bytes + settings.ingest.max_buffered_bytes
    available = psutil.virtual_memory().available
    text = f"{size(available)} of memory available, {size(needed)} set aside by settings"
    if owner(settings.storage.path) is None and available < needed:
        remedy = "lower duckdb.memory_bytes and ingest.max_buffered_bytes, or give it more"
        yield Finding("limits", WARNING, text, remedy)
    else:
        yield Finding("limits", OK, text)


def clock(settings: Settings) -> Iterator[Finding]:
    """Whether the wall clock is plausible."""
    now = time.time()
    newest = max(_times(settings.storage.path), default=0.0)
    if datetime.now(UTC).year < _FIRST_YEAR:
        text = f"the clock says {datetime.now(UTC):%Y-%m-%d}"
        yield Finding("clock", FAILED, text, "set it, because verdicts depend on when spans arrive")
    elif newest > now + _FUTURE_SECONDS:
        text = f"the data directory has files from {newest - now:.0f} s in the future"
        remedy = "set the clock, or traces stay open that long and tokens are not valid"
        yield Finding("clock", FAILED, text, remedy)
    elif _unsynchronised():
        text = "the kernel reports that the clock is not synchronised"
        remedy = "run a time service, such as chrony; in a container, on its host"
        yield Finding("clock", NOTE, text, remedy)
    else:
        yield Finding("clock", OK, f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")


def _times(data: Path) -> Iterator[float]:
    """Modification times of what the service wrote recently, in seconds since 1970."""
    for path in checkpoint_files(data / "checkpoints")[:1]:
        yield int(path.stem) / 1e9
    if data.is_dir():
        for entry in os.scandir(data):
            with suppress(OSError):
                yield entry.stat().st_mtime


def _unsynchronised() -> bool:
    """Ask adjtimex(2). It only reads if modes, the first field of the structure, is 0."""
    state = ctypes.create_string_buffer(512)  # struct timex takes 208 bytes
    call = getattr(ctypes.CDLL(None), "adjtimex", None)
    return call is not None and call(state) == _TIME_ERROR
