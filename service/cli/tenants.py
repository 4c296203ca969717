"""``betrace tenants``: who may send and ask, over the API of the running service. Private keys are
made and used here; the service is only sent public ones."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from betrace.service.cli.api_client import PAGE, AdminApi, Failure, remote_options
from betrace.service.tenants import TENANT_RULE, is_tenant_name

TIMEOUT_SECONDS = 75.0  # more than the service waits for a deletion
MAX_QUOTA = 1_000_000_000
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MOST_SECONDS = 3660 * 86_400


class _Name(click.ParamType[str]):
    name = "tenant"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if not is_tenant_name(value):
            self.fail(f"{value!r} names no tenant: {TENANT_RULE}", param, ctx)
        return str(value)


class _Duration(click.ParamType[int]):
    """Seconds of a number with a unit."""

    name = "duration"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        number, unit = value[:-1], value[-1:]
        read = unit in UNITS and number.isascii() and number.isdigit() and len(number) < 10
        if not read or int(number) * UNITS[unit] > MOST_SECONDS:
            self.fail(f"{value!r} is no duration: write 90s, 30m, 12h or 365d", param, ctx)
        return int(number) * UNITS[unit]


_tenant = click.argument("tenant", type=_Name())


def _tenants(url: str, token: str | None) -> AdminApi:
    return AdminApi(url, token, "/tenants", TIMEOUT_SECONDS)


def _key_option(meaning: str) -> Any:
    return click.option(
        "--key",
        "key_file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help=f"{meaning}; TENANT.pem if not given.",
    )


@click.group("tenants", context_settings={"help_option_names": ["-h", "--help"]})
def tenants() -> None:
    """Tenants: create and delete them, their keys, tokens and quotas.

    \b
    Example:
      betrace tenants create acme
      betrace tenants token acme --for 365d
    """


@tenants.command("list")
@remote_options
def list_tenants(url: str, token: str | None, as_json: bool) -> None:
    """List the tenants. Implicit ones were never created, and have sent spans all the same.

    \b
    Example:
      betrace tenants list
    """
    api = _tenants(url, token)
    found: list[dict[str, Any]] = []
    asked: dict[str, Any] = {"limit": PAGE}
    while True:
        page = api.ask("GET", params=asked)
        found += page["tenants"]
        if page["next"] is None:
            break
        asked["cursor"] = page["next"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo("no tenants")
        return
    rows = [("TENANT", "STATE", "CREATED", "QUOTA", "KEYS")]
    for each in found:
        keys = ", ".join(
            key["kid"] + (f" (until {key['expiresAt'][:19]}Z)" if key["expiresAt"] else "")
            for key in each["keys"]
        )
        created = each["createdAt"][:19] + "Z" if each["createdAt"] else "-"
        rows.append((each["name"], each["state"], created, _quota(each["quota"]), keys or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def _quota(quota: int | None) -> str:
    return "as configured" if quota is None else f"{quota}/s" if quota else "none"


@tenants.command("create")
@_tenant
@click.option("--quota", type=click.IntRange(0, MAX_QUOTA), help="Spans a second; 0 is no limit.")
@_key_option("Where its new private key is written")
@click.option("--no-key", is_flag=True, help="Make no key: it cannot make tokens yet.")
@remote_options
def create(
    tenant: str,
    quota: int | None,
    key_file: Path | None,
    no_key: bool,
    url: str,
    token: str | None,
    as_json: bool,
) -> None:
    """Create a tenant, and a key for it. The private key is written to a file here, and nowhere
    else.

    \b
    Example:
      betrace tenants create acme --quota 50000
    """
    body: dict[str, Any] = {"tenant": tenant} | ({} if quota is None else {"quota": quota})
    path = None if no_key else key_file or Path(f"{tenant}.pem")
    api = _tenants(url, token)
    if path is not None:
        body["publicKey"] = _new_key(path)
    _kept(path, lambda: api.ask("POST", json=body))
    _said(
        as_json,
        {"tenant": tenant, "key": None if path is None else str(path)},
        f"the tenant {tenant} is created"
        + ("" if path is None else f"; its private key is in {path}: keep it secret"),
    )


@tenants.command("delete")
@_tenant
@click.option("--yes", is_flag=True, help="Do not ask.")
@remote_options
def delete(tenant: str, yes: bool, url: str, token: str | None, as_json: bool) -> None:
    """Delete a tenant with all its data: spans, traces, signals, rules, dead letters, keys.

    What it sends is refused from then on. The ledger, which is append-only, keeps its accounts,
    hidden.

    \b
    Example:
      betrace tenants delete acme
    """
    if not yes:
        click.confirm(f"Delete the tenant {tenant} with all its data, for good?", abort=True)
    answer = _tenants(url, token).ask("DELETE", f"/{tenant}", params={"wait": 60})
    _said(
        as_json,
        answer,
        f"the tenant {tenant} is deleted"
        if answer["state"] == "deleted"
        else f"the tenant {tenant} is being deleted; it takes longer than a minute, and goes on",
    )


@tenants.command("rotate-key")
@_tenant
@_key_option("Where the new private key is written")
@click.option(
    "--grace",
    type=_Duration(),
    default="1d",
    show_default=True,
    help="The tokens of the keys before count so much longer, as 90s, 30m, 12h or 7d.",
)
@remote_options
def rotate_key(
    tenant: str,
    key_file: Path | None,
    grace: int,
    url: str,
    token: str | None,
    as_json: bool,
) -> None:
    """Give a tenant a new key; with --grace 0s the keys before are revoked at once.

    \b
    Example:
      betrace tenants rotate-key acme --key acme-2.pem
    """
    path = key_file or Path(f"{tenant}.pem")
    api = _tenants(url, token)
    body = {"publicKey": _new_key(path), "graceSeconds": grace}
    changed = _kept(path, lambda: api.ask("POST", f"/{tenant}/keys", json=body))
    _said(
        as_json,
        {"tenant": tenant, "key": str(path), "keys": changed["keys"]},
        f"the tenant {tenant} has a new key, in {path}: keep it secret",
    )


@tenants.command("revoke-key")
@_tenant
@click.argument("kid")
@remote_options
def revoke_key(tenant: str, kid: str, url: str, token: str | None, as_json: bool) -> None:
    """Revoke a key by its name (see `betrace tenants list`): its tokens do not count any more.

    \b
    Example:
      betrace tenants revoke-key acme kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k
    """
    changed = _tenants(url, token).ask("DELETE", f"/{tenant}/keys/{quote(kid, safe='')}")
    _said(as_json, changed, f"the key {kid} is revoked")


@tenants.command("quota")
@_tenant
@click.argument("spans_per_second", metavar="SPANS|default")
@remote_options
def set_quota(
    tenant: str, spans_per_second: str, url: str, token: str | None, as_json: bool
) -> None:
    """Change how many spans a second a tenant may send: 0 is no limit, `default` what is
    configured.

    \b
    Example:
      betrace tenants quota acme 50000
    """
    body: dict[str, int] = {}
    if spans_per_second != "default":
        text = spans_per_second
        if not (text.isascii() and text.isdigit() and len(text) < 12 and int(text) <= MAX_QUOTA):
            raise click.UsageError(f"the quota is 0 to {MAX_QUOTA}, or `default`")
        body["spansPerSecond"] = int(text)
    changed = _tenants(url, token).ask("PUT", f"/{tenant}/quota", json=body)
    _said(as_json, changed, f"the quota of {tenant}: {_quota(changed['quota'])}")


@tenants.command("token")
@_tenant
@_key_option("Its private key")
@click.option(
    "--for",
    "lifetime",
    type=_Duration(),
    default="90d",
    show_default=True,
    help="How long it counts, as 90s, 30m, 12h or 365d.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def make_token(tenant: str, key_file: Path | None, lifetime: int, as_json: bool) -> None:
    """Make a token of a tenant's private key, and print what to give to its exporters. The service
    is not asked.

    \b
    Example:
      betrace tenants token acme --for 365d
    """
    from betrace.service.tenancy import tokens

    key = tokens.read_private_key(key_file or Path(f"{tenant}.pem"))
    now = time.time()
    token = tokens.make_token(key, tenant, now, lifetime)
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(now + lifetime)))
    if as_json:
        headers = {"authorization": f"Bearer {token}"}
        click.echo(json.dumps({"tenant": tenant, "token": token, "expiresAt": until, **headers}))
        return
    click.echo(f"# The token of {tenant}, until {until}. Whoever has it can send and read as it.")
    click.echo("# SDKs (a space in this variable is written %20):")
    click.echo(f"export OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20{token}")
    click.echo("# OpenTelemetry Collector:")
    click.echo("#   exporters:")
    click.echo("#     otlphttp/betrace:")
    click.echo("#       headers:")
    click.echo(f'#         authorization: "Bearer {token}"')


def _new_key(path: Path) -> str:
    """Write a new private key; its public half as PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from betrace.service.tenancy import tokens

    key = Ed25519PrivateKey.generate()
    try:
        tokens.write_private_key(path, key)
    except FileExistsError:
        raise Failure(f"{path} exists; name another file with --key") from None
    return tokens.public_pem(key)


def _kept(path: Path | None, ask: Any) -> dict[str, Any]:
    """Do not leave a key behind that the service does not know."""
    try:
        answer: dict[str, Any] = ask()
    except Failure:
        if path is not None:
            path.unlink(missing_ok=True)
        raise
    return answer


def _said(as_json: bool, shown: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(shown) if as_json else text)
