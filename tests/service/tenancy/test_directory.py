import sqlite3

import pytest

from betrace.service.tenancy import changes
from betrace.service.tenancy.changes import MOST_KEYS, TenantConflictError, UnknownTenantError
from betrace.service.tenancy.directory import DirectoryError, Hidden, TenantDirectory
from betrace.service.tenancy.tenant import TenantState
from betrace.service.tenancy.tokens import key_id
from tests.support.tenant_keys import new_key, raw

SECOND = 1_000_000_000


class Clock:
    now = 1000 * SECOND

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def directory(tmp_path, clock):
    made = TenantDirectory(tmp_path / "data" / "tenants.sqlite", clock)
    yield made
    made.close()


def test_tenants_survive_a_restart(tmp_path, directory):
    key = raw(new_key())
    made = directory.change("acme", changes.create(500, key))
    directory.change("beta", changes.create(None, None))
    directory.close()
    again = TenantDirectory(tmp_path / "data" / "tenants.sqlite")
    assert again.get("acme") == made
    assert made.state is TenantState.ACTIVE
    assert [each.public for each in made.keys] == [key]
    assert [each.name for each in again.page()] == ["acme", "beta"]
    assert [each.name for each in again.page("acme", 5)] == ["beta"]
    assert again.quotas() == {"acme": 500}
    assert again.get("other") is None
    again.close()


def test_a_tenant_is_created_once(directory):
    directory.change("acme", changes.create(None, None))
    with pytest.raises(TenantConflictError, match="exists"):
        directory.change("acme", changes.create(None, None))
    with pytest.raises(ValueError, match="a tenant name"):
        directory.change("../acme", changes.create(None, None))


def test_old_keys_are_valid_for_their_grace_period(directory, clock):
    old, new = raw(new_key()), raw(new_key())
    directory.change("acme", changes.create(None, old))
    directory.change("acme", changes.add_key(new, 60))
    assert directory.public_key("acme", key_id(old)).expires_ns == clock.now + 60 * SECOND
    assert directory.public_key("acme", key_id(new)).expires_ns is None
    directory.change(
        "acme", changes.add_key(raw(new_key()), 3600)
    )  # does not lengthen the grace of the first
    clock.now += 61 * SECOND
    assert directory.public_key("acme", key_id(old)) is None
    assert directory.public_key("acme", key_id(new)) is not None
    directory.change("acme", changes.add_key(raw(new_key()), 0))
    assert key_id(old) not in [key.kid for key in directory.get("acme").keys]


def test_a_key_is_revoked_immediately(directory):
    key = raw(new_key())
    directory.change("acme", changes.create(None, key))
    directory.change("beta", changes.create(None, key))
    directory.change("acme", changes.revoke_key(key_id(key)))
    assert directory.public_key("acme", key_id(key)) is None
    assert directory.public_key("beta", key_id(key)) is not None
    with pytest.raises(UnknownTenantError, match="no such key"):
        directory.change("acme", changes.revoke_key(key_id(key)))
    with pytest.raises(UnknownTenantError, match="no tenant"):
        directory.change("none", changes.revoke_key(key_id(key)))


def test_keys_are_bounded_and_not_repeated(directory):
    key = raw(new_key())
    directory.change("acme", changes.create(None, key))
    with pytest.raises(TenantConflictError, match="already has this key"):
        directory.change("acme", changes.add_key(key, 0))
    for _ in range(MOST_KEYS - 1):
        directory.change("acme", changes.add_key(raw(new_key()), 3600))
    with pytest.raises(TenantConflictError, match="the most allowed"):
        directory.change("acme", changes.add_key(raw(new_key()), 3600))


def test_a_tenant_that_is_deleted_has_no_keys_and_is_remembered_by_name(directory):
    key = raw(new_key())
    directory.change("acme", changes.create(5, key))
    directory.begin_deletion("acme")
    assert directory.public_key("acme", key_id(key)) is None
    assert directory.quotas() == {}
    assert directory.get("acme").state is TenantState.DELETING
    for change in (
        lambda: directory.change("acme", changes.create(None, None)),
        lambda: directory.change("acme", changes.set_quota(1)),
        lambda: directory.change("acme", changes.add_key(key, 0)),
    ):
        with pytest.raises(TenantConflictError, match="being deleted"):
            change()
    directory.hide("acme", Hidden(17, 3))
    directory.finish_deletion("acme")
    assert directory.get("acme") is None
    assert directory.page() == []
    assert directory.in_state(TenantState.DELETED) == {"acme"}
    again = directory.change("acme", changes.create(None, None))
    assert again.keys == ()
    assert directory.hidden() == {"acme": Hidden(17, 3)}
    assert directory.in_state(TenantState.DELETED, TenantState.DELETING) == set()


def test_one_that_was_never_made_can_be_deleted(directory):
    directory.begin_deletion("wild")
    assert directory.in_state(TenantState.DELETING) == {"wild"}
    with pytest.raises(ValueError, match="a tenant name"):
        directory.begin_deletion("..")


def test_names_and_kids_are_values_and_never_sql(directory):
    directory.change("acme", changes.create(None, raw(new_key())))
    for text in ("' OR '1'='1", "acme'; DROP TABLE tenants; --", "%", "acme\0"):
        assert directory.get(text) is None
        assert directory.public_key("acme", text) is None
        assert directory.public_key(text, text) is None
    assert directory.get("acme") is not None


def test_a_file_of_a_newer_program_and_a_damaged_one_are_refused(tmp_path):
    path = tmp_path / "tenants.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(DirectoryError, match="newer program"):
        TenantDirectory(path)
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(DirectoryError, match=r"tenants\.sqlite: .*damaged; restore it"):
        TenantDirectory(path)
