"""The tenants: who may send how much, with which keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content

from betrace.tui.client import Json
from betrace.tui.state import State
from betrace.tui.widgets.basic import Detail, fields, marked
from betrace.tui.widgets.changes import Ask, Change
from betrace.tui.widgets.listing import MOST, Listing, Part, check_tenant, objects
from betrace.tui.widgets.pick import Pick
from betrace.tui.widgets.table import Cell, Column, Row
from betrace.tui.widgets.text import NONE, SYMBOLS, count, date, many, moment, number, status_tone

MOST_KEY_BYTES = 10_000


class TenantsPanel(Listing):
    TITLE = "Tenants"
    EMPTY = "no tenants yet: press C to create one"
    RELOAD = 5.0

    COLUMNS = (
        Column("name", "tenant", 26),
        Column("state", "state", 10),
        Column("quota", "spans/s", 11, right=True),
        Column("keys", "keys", 4, right=True),
        Column("created", "created", 19),
    )

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("C", "change_create", "Create", tooltip="Create a tenant"),
        Binding("U", "change_quota", "Quota", tooltip="How many spans a second it may send"),
        Binding("K", "change_add_key", "Rotate", tooltip="Add a key; the others expire"),
        Binding("V", "change_revoke", "Revoke", tooltip="A key counts no more, at once"),
        Binding("D", "change_delete", "Delete", tooltip="Delete the tenant with all its data"),
        Binding("o", "view", "View", tooltip="Look at its signals and rules"),
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
        more = "first " if self._more else ""
        return [f"{more}{many(len(self._tenants), 'tenant')}{active}"]

    def rows(self, state: State) -> Iterable[Row]:
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
                    Cell(date(created), order=created or 0.0),
                ),
            )

    def drill(self, key: str) -> None:
        self.betrace.push_screen(Detail(f"Tenant {key}", lambda _, __: self._described(key)))

    def _described(self, name: str) -> Content | None:
        tenant = self._tenants.get(name)
        if tenant is None:
            return None
        word = str(tenant.get("state", ""))
        keys = objects(tenant.get("keys"))
        lines = [
            fields(
                ("state", marked(word, status_tone(word))),
                ("quota", quota_text(tenant.get("quota"))),
                ("created", date(moment(tenant.get("createdAt")))),
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
            self.betrace.view_tenant(self.selected)
            self.betrace.show_panel("SignalsPanel")

    def _asking(self, ask: Callable[[Json], Awaitable[None]]) -> None:
        """Ask about the tenant under the cursor."""
        tenant = self._tenant
        if tenant is None:
            return
        if tenant.get("state") == "implicit":
            told = f"{tenant['name']} has only sent spans so far: create it first, with C"
            self.betrace.notify(told, title="✖ not done", markup=False)
            return

        async def run() -> None:
            await ask(tenant)

        self.betrace.start(run, "ask")

    def action_change_create(self) -> None:
        async def ask() -> None:
            name = await self.betrace.push_screen_wait(
                Ask("Create which tenant?", "Name", check=self._check_new)
            )
            if name is None:
                return
            path = await self.betrace.push_screen_wait(
                Ask(
                    f"With which key may {name} send?",
                    "File with an Ed25519 public key in PEM; empty for none yet",
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
                Change(
                    f"Create the tenant {name}?",
                    "Create",
                    run,
                    [("tenant", "none", "active"), ("keys", "0", "1" if path else "0")],
                )
            )

        self.betrace.start(ask, "ask")

    def _check_new(self, text: str) -> str:
        state = self._tenants.get(text, {}).get("state", "implicit")
        return check_tenant(text) or ("" if state == "implicit" else f"{text} is there already")

    def action_change_quota(self) -> None:
        async def ask(tenant: Json) -> None:
            name, old = str(tenant["name"]), tenant.get("quota")
            text = await self.betrace.push_screen_wait(
                Ask(
                    f"How many spans a second may {name} send?",
                    "A whole number; 0 for no limit; empty for what is configured",
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
                Change(f"Change the quota of {name}?", "Change", run, effects, "It counts at once.")
            )

        self._asking(ask)

    def action_change_add_key(self) -> None:
        async def ask(tenant: Json) -> None:
            name, keys = str(tenant["name"]), objects(tenant.get("keys"))
            path = await self.betrace.push_screen_wait(
                Ask(
                    f"Which is the new key of {name}?",
                    "File with an Ed25519 public key in PEM",
                    check=check_key,
                )
            )
            if path is None:
                return
            public = read_key(path)

            async def run() -> str:
                after = await self.betrace.client.add_key(name, public)
                return f"{name} has {many(len(objects(after.get('keys'))), 'key')}"

            effects = [("keys", str(len(keys)), f"{len(keys)} for a day, and the new one")]
            note = "Senders that use the other keys have a day to change to the new one."
            self.betrace.change(Change(f"Rotate the key of {name}?", "Rotate", run, effects, note))

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
                Change(
                    f"Revoke a key of {name}?",
                    "Revoke",
                    run,
                    [("keys", str(len(keys)), str(len(keys) - 1))],
                    f"What is sent with {kid} is refused at once.",
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
            Change(
                f"Delete the tenant {name} with all its data?",
                f"Delete {name}",
                run,
                [("tenant", str(tenant.get("state")), "deleted")],
                "Its spans, signals, traces, rules, dead letters and keys are deleted for good; "
                "what it sends is refused from now on.",
            )
        )


def quota_text(quota: object, short: bool = False) -> str:
    """Spans a second in words."""
    if quota is None:
        return "configured" if short else "what is configured"
    if quota == 0:
        return "no limit"
    return count(int(str(quota))) + ("" if short else " spans/s")


def _rank(quota: object) -> float:
    return float("inf") if quota == 0 else -1.0 if quota is None else float(str(quota))


def key_text(key: Json) -> str:
    """A key in a line."""
    until = moment(key.get("expiresAt"))
    ends = f"until {date(until)}" if until is not None else "does not expire"
    return f"{key.get('kid', NONE)}  since {date(moment(key.get('createdAt')))}, {ends}"


def _check_quota(text: str) -> str:
    if not text or (text.isascii() and text.isdigit() and int(text) <= 1_000_000_000):
        return ""
    return "a quota is a whole number from 0 to 1 000 000 000"


def check_key(path: str) -> str:
    """What keeps a file from being a public key; private keys stay where they are."""
    try:
        text = read_key(path)
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
    if "PRIVATE KEY" in text:
        return "that is a private key; name the file of the public one"
    return "" if "PUBLIC KEY" in text else "that is no public key in PEM"


def read_key(path: str) -> str:
    """The text of a small file."""
    with Path(path).expanduser().open(encoding="ascii") as file:
        return file.read(MOST_KEY_BYTES)
