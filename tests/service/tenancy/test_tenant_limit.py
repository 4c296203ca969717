"""How many tenants there may be without authentication."""

from __future__ import annotations

import pytest

from betrace.service.receiver.responses import HttpResponse
from betrace.service.tenancy.tenant_limit import REFRESH_SECONDS, TenantLimit
from tests.support.api_client import ApiClient
from tests.support.inprocess import opened, settings

PROTOBUF = (b"content-type", b"application/x-protobuf")


class Disk:
    """The tenants on disk, and the time."""

    def __init__(self, *tenants: str) -> None:
        self.tenants = set(tenants)
        self.now = 0.0
        self.reads = 0

    def stored(self) -> set[str]:
        self.reads += 1
        return self.tenants

    def limit(self, most: int, *created: str) -> TenantLimit:
        return TenantLimit(most, self.stored, created, lambda: self.now)


def test_known_tenants_go_on_and_one_more_is_refused():
    disk = Disk("a", "b")
    limit = disk.limit(3)
    assert [limit.refusal(name) for name in ("a", "b", "c", "a", "c", "default")] == [None] * 6
    denied = limit.refusal("d")
    assert denied is not None
    assert denied.status == 403
    assert "ingest.max_tenants" in denied.message
    assert [limit.refusal(name) for name in ("a", "b", "c", "default")] == [None] * 4
    assert disk.reads == 1


def test_more_tenants_on_disk_than_the_limit_all_go_on():
    limit = Disk("a", "b", "c").limit(1)
    assert limit.refusal("d")
    assert [limit.refusal(name) for name in ("a", "b", "c")] == [None] * 3


def test_names_that_stored_nothing_make_room_later():
    disk = Disk("a")
    limit = disk.limit(2)
    assert limit.refusal("typo") is None
    assert limit.refusal("b")
    disk.now += REFRESH_SECONDS
    assert limit.refusal("b") is None
    assert limit.refusal("typo")
    for _ in range(100):
        assert limit.refusal("c")
    assert disk.reads == 2


def test_created_tenants_need_no_room_and_deleted_ones_leave_it():
    limit = Disk("a", "b").limit(2, "made")
    assert limit.refusal("made") is None
    assert limit.refusal("c")
    limit.create("c")
    assert limit.refusal("c") is None
    limit.delete("c")
    assert limit.refusal("c")
    limit.delete("b")
    assert limit.refusal("c") is None
    limit.delete("default")
    assert limit.refusal("default") is None


async def test_two_thousand_tenant_names_by_header(tmp_path):
    with opened(settings(tmp_path, ingest={"max_tenants": 20})) as service:

        async def admits(tenant: str) -> bool:
            headers = [PROTOBUF, (b"x-scope-orgid", tenant.encode())]
            found = await service.admission.admit("POST", "/v1/traces", headers)
            if not isinstance(found, HttpResponse):
                return True
            assert found.status == 403
            assert b"ingest.max_tenants" in found.body
            return False

        assert sum([await admits(f"t{number}") for number in range(2000)]) == 20
        assert service.admission.refusals.requests["tenant"] == 1980
        assert await admits("t3")
        assert await admits("default")
        client = ApiClient(service)
        rule = {"condition": "count(a) > 1"}
        error = await client.ask("PUT", "/api/v1/rules/r", 403, rule, X_Scope_OrgID="t1999")
        assert "ingest.max_tenants" in error["message"]
        await client.ask("PUT", "/api/v1/rules/r", 201, rule, X_Scope_OrgID="t3")
        assert not (tmp_path / "data" / "tenants" / "t1999").exists()


@pytest.mark.parametrize("created", [True, False])
async def test_an_operator_makes_room(tmp_path, created):
    with opened(settings(tmp_path, ingest={"max_tenants": 1})) as service:
        client = ApiClient(service)
        rule = {"condition": "count(a) > 1"}
        await client.ask("PUT", "/api/v1/rules/r", 201, rule, X_Scope_OrgID="first")
        if created:
            await client.post("/api/admin/tenants", 201, {"tenant": "second"})
        status = 201 if created else 403
        await client.ask("PUT", "/api/v1/rules/r", status, rule, X_Scope_OrgID="second")
