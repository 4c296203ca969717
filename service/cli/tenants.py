"""``betrace tenants``: who may send and query, over the API of the running service. Private keys
are made and used here; the service only gets public ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import httpx

from betrace.service.cli.api_client import PAGE, ServiceApi, make_client
from betrace.service.cli.common import (
    HELP,
    Duration,
    Failure,
    Server,
    print_json,
    print_lines,
    print_table,
    server_options,
    warn,
)
from betrace.service.tenants import TENANT_RULE, is_tenant_name

MAX_QUOTA = 1_000_000_000
_TIMEOUT_SECONDS = 75.0  # longer than the service waits for a deletion
_PROBE_SECONDS = 2.0


class _Name(click.ParamType[str]):
    name = "tenant"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not is_tenant_name(value):
            self.fail(f"{value!r} is not a tenant name: {TENANT_RULE}", param, ctx)
        return str(value)


_tenant = click.argument("tenant", type=_Name())


def _tenants(server: Server) -> ServiceApi:
    return ServiceApi(server, "/api/admin/tenants", _TIMEOUT_SECONDS)


def _key_option(meaning: str) -> Any:
    return click.option(
        "--key",
        "key_file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help=f"{meaning}; by default TENANT.pem.",
    )


@click.group("tenants", context_settings=HELP)
def tenants() -> None:
    """Manage tenants: create and delete them, their keys, tokens and quotas.

    \b
    Example:
      betrace tenants create acme
      betrace tenants token acme --for 365d
    """


@tenants.command("list")
@server_options
def list_tenants(server: Server, as_json: bool) -> None:
    """List the tenants. Implicit ones have sent spans but were never created.

    \b
    Example:
      betrace tenants list
    """
    api = _tenants(server)
    found: list[dict[str, Any]] = []
    params: dict[str, Any] = {"limit": PAGE}
    while True:
        page = api.ask("GET", params=params)
        found += page["tenants"]
        if page["next"] is None:
            break
        params["cursor"] = page["next"]
    if as_json:
        print_json(found, indent=2)
        return
    if not found:
        click.echo("no tenants")
        return
    rows = []
    for each in found:
        keys = ", ".join(
            key["kid"] + (f" (until {key['expiresAt'][:19]}Z)" if key["expiresAt"] else "")
            for key in each["keys"]
        )
        created = each["createdAt"][:19] + "Z" if each["createdAt"] else "-"
        rows.append((each["name"], each["state"], created, _quota(each["quota"]), keys or "-"))
    print_table(("TENANT", "STATE", "CREATED", "QUOTA", "KEYS"), rows)


def _quota(quota: int | None) -> str:
    return "as configured" if quota is None else f"{quota}/s" if quota else "none"


@tenants.command("create")
@_tenant
@click.option(
    "--quota", type=click.IntRange(0, MAX_QUOTA), help="Spans per second; 0 means no limit."
)
@_key_option("Where to write its new private key")
@click.option("--no-key", is_flag=True, help="Make no key; the tenant cannot make tokens yet.")
@server_options
def create(
    tenant: str,
    quota: int | None,
    key_file: Path | None,
    no_key: bool,
    server: Server,
    as_json: bool,
) -> None:
    """Create a tenant, and a key for it. The private key is written to a file here and nowhere
    else.

    \b
    Example:
      betrace tenants create acme --quota 50000
    """
    body: dict[str, Any] = {"tenant": tenant} | ({} if quota is None else {"quota": quota})
    path = None if no_key else key_file or Path(f"{tenant}.pem")
    api = _tenants(server)
    if path is not None:
        body["publicKey"] = _new_key(path)
    _remove_on_failure(path, lambda: api.ask("POST", json=body))
    _report(
        as_json,
        {"tenant": tenant, "key": None if path is None else str(path)},
        f"created the tenant {tenant}"
        + ("" if path is None else f"; its private key is in {path}: keep it secret"),
    )


@tenants.command("delete")
@_tenant
@click.option("--yes", is_flag=True, help="Do not ask.")
@server_options
def delete(tenant: str, yes: bool, server: Server, as_json: bool) -> None:
    """Delete a tenant with all its data: spans, traces, signals, rules, dead letters, keys.

    The service refuses its requests from then on. The ledger is append-only, so it keeps the
    tenant's accounts, hidden.

    \b
    Example:
      betrace tenants delete acme
    """
    if not yes:
        click.confirm(f"Delete the tenant {tenant} and all its data permanently?", abort=True)
    answer = _tenants(server).ask("DELETE", f"/{tenant}", params={"wait": 60})
    _report(
        as_json,
        answer,
        f"deleted the tenant {tenant}"
        if answer["state"] == "deleted"
        else f"the tenant {tenant} is still being deleted; this continues in the background",
    )


@tenants.command("rotate-key")
@_tenant
@_key_option("Where to write the new private key")
@click.option(
    "--grace",
    type=Duration(),
    default="1d",
    show_default=True,
    help="How long tokens of the previous keys stay valid, such as 90s, 30m, 12h or 7d.",
)
@server_options
def rotate_key(
    tenant: str, key_file: Path | None, grace: int, server: Server, as_json: bool
) -> None:
    """Give a tenant a new key. With --grace 0s the previous keys are revoked at once.

    \b
    Example:
      betrace tenants rotate-key acme --key acme-2.pem
    """
    path = key_file or Path(f"{tenant}.pem")
    api = _tenants(server)
    body = {"publicKey": _new_key(path), "graceSeconds": grace}
    changed = _remove_on_failure(path, lambda: api.ask("POST", f"/{tenant}/keys", json=body))
    _report(
        as_json,
        {"tenant": tenant, "key": str(path), "keys": changed["keys"]},
        f"the tenant {tenant} has a new key, in {path}: keep it secret",
    )


@tenants.command("revoke-key")
@_tenant
@click.argument("kid")
@server_options
def revoke_key(tenant: str, kid: str, server: Server, as_json: bool) -> None:
    """Revoke a key by its id (see `betrace tenants list`). Its tokens are no longer valid.

    \b
    Example:
      betrace tenants revoke-key acme kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k
    """
    changed = _tenants(server).ask("DELETE", f"/{tenant}/keys/{quote(kid, safe='')}")
    _report(as_json, changed, f"revoked the key {kid}")


@tenants.command("quota")
@_tenant
@click.argument("spans_per_second", metavar="SPANS|default")
@server_options
def set_quota(tenant: str, spans_per_second: str, server: Server, as_json: bool) -> None:
    """Change how many spans per second a tenant may send: 0 means no limit, `default` means the
    configured quota.

    \b
    Example:
      betrace tenants quota acme 50000
    """
    body: dict[str, int] = {}
    if spans_per_second != "default":
        text = spans_per_second
        if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= MAX_QUOTA):
            raise click.UsageError(f"the quota must be 0 to {MAX_QUOTA}, or `default`")
        body["spansPerSecond"] = int(text)
    changed = _tenants(server).ask("PUT", f"/{tenant}/quota", json=body)
    _report(as_json, changed, f"the quota of {tenant} is now: {_quota(changed['quota'])}")


@tenants.command("token")
@_tenant
@_key_option("Its private key")
@click.option(
    "--for",
    "lifetime",
    type=Duration(),
    default="90d",
    show_default=True,
    help="How long the token is valid, such as 90s, 30m, 12h or 365d.",
)
@click.option(
    "--read-only",
    is_flag=True,
    help="For dashboards and people who only look: it can send and change nothing.",
)
@server_options
def make_token(
    tenant: str,
    key_file: Path | None,
    lifetime: int,
    read_only: bool,
    server: Server,
    as_json: bool,
) -> None:
    """Make a token with a tenant's private key, and print how exporters send it.

    This works without the service. If the service can be reached and runs without
    authentication, a warning says that the token has no effect.

    \b
    Example:
      betrace tenants token acme --for 365d
      betrace tenants token acme --read-only
    """
    from betrace.service.tenancy import tokens

    key = tokens.read_private_key(key_file or Path(f"{tenant}.pem"))
    now = time.time()
    token = tokens.make_token(key, tenant, now, lifetime, read_only=read_only)
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(now + lifetime)))
    if _is_open(server):
        warn(
            f"authentication is off at {server.url}, so this token has no effect there; "
            "turn it on with auth.enabled = true"
        )
    if as_json:
        authorization = f"Bearer {token}"
        shown = {"tenant": tenant, "token": token, "expiresAt": until}
        print_json(shown | {"authorization": authorization, "readOnly": read_only})
        return
    if read_only:
        print_lines(
            [
                f"# A read-only token of {tenant}, valid until {until}. Whoever has it can read as "
                "this tenant.",
                "# For betrace signals, traces, trace and tui:",
                f"export BETRACE_TOKEN={token}",
            ]
        )
        return
    print_lines(
        [
            f"# The token of {tenant}, valid until {until}. Whoever has it can send and read as "
            "this tenant.",
            "# SDKs (a space in this variable is written %20):",
            f"export OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20{token}",
            "# OpenTelemetry Collector:",
            "#   exporters:",
            "#     otlphttp/betrace:",
            "#       headers:",
            f'#         authorization: "Bearer {token}"',
        ]
    )


def _is_open(server: Server) -> bool:
    """Whether the service answers without a token."""
    try:
        with make_client(Server(server.url, ca=server.ca), _PROBE_SECONDS) as client:
            return client.get("/api/v1/signals", params={"limit": 1}).status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _new_key(path: Path) -> str:
    """Write a new private key. Returns its public half as PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from betrace.service.tenancy import tokens

    key = Ed25519PrivateKey.generate()
    try:
        tokens.write_private_key(path, key)
    except FileExistsError:
        raise Failure(f"{path} already exists; name another file with --key") from None
    return tokens.public_pem(key)


def _remove_on_failure(path: Path | None, ask: Any) -> dict[str, Any]:
    """Ask, and remove the new key file if the service refuses."""
    try:
        answer: dict[str, Any] = ask()
    except Failure:
        if path is not None:
            path.unlink(missing_ok=True)
        raise
    return answer


def _report(as_json: bool, shown: dict[str, Any], text: str) -> None:
    if as_json:
        print_json(shown)
    else:
        print_lines([text])
