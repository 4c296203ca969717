import pytest

from betrace.service.tenants import is_tenant_name


@pytest.mark.parametrize("name", ["a", "0", "acme-1_x", "a" * 63])
def test_valid_names(name):
    assert is_tenant_name(name)


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "_a", "a" * 64, "a.b", "a/b", "ä", "a\n", " a", "٣"]
)
def test_invalid_names(name):
    assert not is_tenant_name(name)
