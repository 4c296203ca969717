"""The files that stay attached are bounded by what the process may open."""

from __future__ import annotations

import resource

from betrace.service.storage.duck import files


def test_attached_files_take_a_part_of_the_descriptors(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert files.attachable() == 85
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65_536, 65_536))
    assert files.attachable() == 1000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert files.attachable() == 1000
