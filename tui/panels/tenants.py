"""The tenants: quotas, keys, creation and deletion."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.base import ShowPanel, ViewTenant
from betrace.tui.changes import OperatorChange
from betrace.tui.format import NONE, count, date, duration, many, moment, number
from betrace.tui.json_values import Json, objects
from betrace.tui.state import ServiceState, WaitingTenant
from betrace.tui.tones import SYMBOLS, marked, status_tone
from betrace.tui.widgets.dialogs import Ask
from betrace.tui.widgets.fields import fields
from betrace.tui.widgets.list_panel import MOST, ListPanel, Part, check_tenant
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.table_panel import Cell, Column, Row

MOST_KEY_BYTES = 10_000


class TenantsPanel(ListPanel):
    TITLE = "Tenants"
    NOUN = "Tenant"
    EMPTY = "No tenants yet. Press C to create one."
    RELOAD = 5.0

    COLUMNS = (
        Column("name", "tenant", 26),
        Column("state", "state", 10),
        Column("quota", "spans/s", 11, right=True),
        Column("keys", "keys", 4, right=True),
        Column("waits", "waiting", 8, right=True),
        Column("created", "created", 19),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("C", "change_create", "Create", tooltip="Create a tenant"),
        Binding("U", "change_quota", "Quota", tooltip="Set how many spans per second it may send"),
        Binding(
            "K", "change_add_key", "Rotate", tooltip="Add a key; the others expire after a day"
        ),
        Binding("V", "change_revoke", "Revoke", tooltip="Reject a key immediately"),
        Binding("D", "change_delete", "Delete", tooltip="Delete the tenant and all its data"),
        Binding("o", "view", "View", tooltip="Show its signals and rules"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._tenants: dict[str, Json] = {}
        self._more = False

    async def read(self) -> None:
        answer = await self.betrace.client.get("/api/admin/tenants", limit=MOST)
        self._tenants = {str(each.get("name")): each for each in objects(answer.get("tenants"))}
        self._more = answer.get("next") is not None

    def head(self) -> Sequence[Part]:
        now = self.betrace.state.now
        active = f"  {now.tenants} active now" if now else ""
        if now and now.waiting:
            active += f", {len(now.waiting)} waiting for CPU"
        more = "first " if self._more else ""
        return [f"{more}{many(len(self._tenants), 'tenant')}{active}"]

    def rows(self, state: ServiceState) -> Iterable[Row]:
        for name, tenant in self._tenants.items():
            word = str(tenant.get("state", ""))
            tone, quota = status_tone(word), tenant.get("quota")
            keys, created = objects(tenant.get("keys")), moment(tenant.get("createdAt"))
            yield Row(
                name,
                (
                    Cell(name),
                    Cell(f"{SYMBOLS[tone]} {word}", tone),
                    Cell(quota_text(quota, short=True), order=_rank(quota)),
                    Cell(number(len(keys)), order=len(keys)),
                    _waiting_cell(_waiting(state, name)),
                    Cell(date(created), order=created or 0.0),
                ),
            )

    def describe(self, key: str, state: ServiceState, width: int) -> Content | None:
        tenant = self._tenants.get(key)
        if tenant is None:
            return None
        word = str(tenant.get("state", ""))
        keys = objects(tenant.get("keys"))
        lines = [
            fields(
                ("state", marked(word, status_tone(word))),
                ("quota", quota_text(tenant.get("quota"))),
                ("created", date(moment(tenant.get("createdAt")))),
                ("CPU", _waiting_text(_waiting(state, key))),
                ("keys", count(len(keys))),
            ),
            *(Content(f"  {key_text(key)}") for key in keys),
        ]
        return Content("\n").join(lines)

    @property
    def _tenant(self) -> Json | None:
        return self._tenants.get(self.selected or "")

    # Keys

    def action_view(self) -> None:
        if self.selected is not None:
            self.betrace.post_message(ViewTenant(self.selected))
            self.betrace.post_message(ShowPanel("SignalsPanel"))

    def _asking(self, ask: Callable[[Json], Awaitable[None]]) -> None:
        """Ask for a change to the tenant under the cursor."""
        tenant = self._tenant
        if tenant is None:
            return
        if tenant.get("state") == "implicit":
            hint = (
                f"{tenant['name']} has sent spans but was not created; press C to create it first"
            )
            self.betrace.notify(hint, title="✖ not done", markup=False)
            return

        async def run() -> None:
            await ask(tenant)

        self.betrace.start(run, "ask")

    def action_change_create(self) -> None:
        async def ask() -> None:
            name = await self.betrace.push_screen_wait(
                Ask("Create a tenant", "Name", check=self._check_new)
            )
            if name is None:
                return
            path = await self.betrace.push_screen_wait(
                Ask(
                    f"Public key of {name}",
                    "PEM file with an Ed25519 public key; empty for none yet",
                    check=lambda text: check_key(text) if text else "",
                )
            )
            if path is None:
                return
            body = {"tenant": name}
            if path:
                body["publicKey"] = read_key(path)

            async def run() -> str:
                made = await self.betrace.client.create_tenant(body)
                return f"{made.get('name')} is {made.get('state')}"

            self.betrace.change(
                OperatorChange(
                    f"Create tenant {name}?",
                    "Create",
                    run,
                    [("tenant", "none", "active"), ("keys", "0", "1" if path else "0")],
                )
            )

        self.betrace.start(ask, "ask")

    def _check_new(self, text: str) -> str:
        state = self._tenants.get(text, {}).get("state", "implicit")
        return check_tenant(text) or ("" if state == "implicit" else f"{text} already exists")

    def action_change_quota(self) -> None:
        async def ask(tenant: Json) -> None:
            name, old = str(tenant["name"]), tenant.get("quota")
            text = await self.betrace.push_screen_wait(
                Ask(
                    f"Quota of {name} in spans per second",
                    "A whole number; 0 for no limit; empty for the configured default",
                    "" if old is None else str(old),
                    _check_quota,
                )
            )
            if text is None:
                return
            quota = int(text) if text else None

            async def run() -> str:
                after = await self.betrace.client.set_quota(name, quota)
                return f"{name} may send {quota_text(after.get('quota'))}"

            effects = [("quota", quota_text(old), quota_text(quota))]
            self.betrace.change(
                OperatorChange(
                    f"Change the quota of {name}?",
                    "Change",
                    run,
                    effects,
                    "It takes effect immediately.",
                )
            )

        self._asking(ask)

    def action_change_add_key(self) -> None:
        async def ask(tenant: Json) -> None:
            name, keys = str(tenant["name"]), objects(tenant.get("keys"))
            path = await self.betrace.push_screen_wait(
                Ask(
                    f"New key of {name}",
                    "PEM file with an Ed25519 public key",
                    check=check_key,
                )
            )
            if path is None:
                return
            public = read_key(path)

            async def run() -> str:
                after = await self.betrace.client.add_key(name, public)
                return f"{name} has {many(len(objects(after.get('keys'))), 'key')}"

            effects = [("keys", str(len(keys)), f"the new one, and {len(keys)} more for one day")]
            note = "Senders have one day to switch to the new key."
            self.betrace.change(
                OperatorChange(f"Rotate the key of {name}?", "Rotate", run, effects, note)
            )

        self._asking(ask)

    def action_change_revoke(self) -> None:
        async def ask(tenant: Json) -> None:
            name, keys = str(tenant["name"]), objects(tenant.get("keys"))
            if not keys:
                self.betrace.notify(f"{name} has no keys", title="✖ not done", markup=False)
                return
            options = [(str(key.get("kid")), key_text(key)) for key in keys]
            kid = await self.betrace.push_screen_wait(Pick(f"Revoke which key of {name}?", options))
            if kid is None:
                return

            async def run() -> str:
                after = await self.betrace.client.revoke_key(name, kid)
                return f"{name} has {many(len(objects(after.get('keys'))), 'key')}"

            self.betrace.change(
                OperatorChange(
                    f"Revoke a key of {name}?",
                    "Revoke",
                    run,
                    [("keys", str(len(keys)), str(len(keys) - 1))],
                    f"Requests with {kid} are refused immediately.",
                )
            )

        self._asking(ask)

    def action_change_delete(self) -> None:
        tenant = self._tenant
        if tenant is None:
            return
        name = str(tenant["name"])

        async def run() -> str:
            answer = await self.betrace.client.delete_tenant(name)
            return (
                f"{name} is {'being deleted' if answer.get('state') == 'deleting' else 'deleted'}"
            )

        self.betrace.change(
            OperatorChange(
                f"Delete tenant {name} and all its data?",
                f"Delete {name}",
                run,
                [("tenant", str(tenant.get("state")), "deleted")],
                "Its spans, signals, traces, rules, dead letters and keys are deleted, and its "
                "requests are refused. This cannot be undone.",
            )
        )


def _waiting(state: ServiceState, name: str) -> WaitingTenant | None:
    waiting = state.now.waiting if state.now else ()
    return next((each for each in waiting if each.name == name), None)


def _waiting_cell(waiting: WaitingTenant | None) -> Cell:
    """Spans that wait because the tenant used up its CPU time."""
    if waiting is None:
        return Cell(NONE, order=0)
    return Cell(f"▲ {number(waiting.spans)}", "busy", waiting.spans)


def _waiting_text(waiting: WaitingTenant | None) -> Content:
    if waiting is None:
        return Content("does not wait")
    text = (
        f"{many(waiting.spans, 'span')} waiting for {duration(waiting.seconds)}, because it "
        f"used up its CPU time; it had {waiting.cpu_seconds:.1f} s meanwhile"
    )
    return Content.assemble(marked(text, "busy"))


def quota_text(quota: object, short: bool = False) -> str:
    """A quota in words."""
    if quota is None:
        return "default" if short else "the configured default"
    if quota == 0:
        return "no limit"
    return count(int(str(quota))) + ("" if short else " spans/s")


def _rank(quota: object) -> float:
    return float("inf") if quota == 0 else -1.0 if quota is None else float(str(quota))


def key_text(key: Json) -> str:
    """A key on one line."""
    until = moment(key.get("expiresAt"))
    ends = f"until {date(until)}" if until is not None else "does not expire"
    return f"{key.get('kid', NONE)}  since {date(moment(key.get('createdAt')))}, {ends}"


def _check_quota(text: str) -> str:
    if not text or (text.isascii() and text.isdigit() and int(text) <= 1_000_000_000):
        return ""
    return "enter a whole number from 0 to 1 000 000 000"


def check_key(path: str) -> str:
    """Why a file is not a public key, or an empty string. Private keys are never sent."""
    try:
        text = read_key(path)
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
    if "PRIVATE KEY" in text:
        return "this is a private key; give the file of the public key"
    return "" if "PUBLIC KEY" in text else "this is not a public key in PEM"


def read_key(path: str) -> str:
    """Read a small file."""
    with Path(path).expanduser().open(encoding="ascii") as file:
        return file.read(MOST_KEY_BYTES)
