"""The data directory disappears while the service runs."""

from __future__ import annotations

import shutil

import trio

from betrace.service.api.components import components
from tests.support.inprocess import running, settings, write_rules

HEADERS = [(b"content-type", b"application/x-protobuf")]


async def test_spans_are_refused_while_the_data_directory_is_gone(tmp_path, caplog):
    write_rules(tmp_path, {"one": "count(a) == 1"})
    data, aside = tmp_path / "data", tmp_path / "aside"
    async with running(settings(tmp_path)) as service:

        async def status() -> int:
            found = await service.admission.admit("POST", "/v1/traces", HEADERS)
            return getattr(found, "status", 200)

        assert await status() == 200
        data.rename(aside)
        with trio.fail_after(60):
            while await status() != 503:
                await trio.sleep(0.02)
        assert components(service.sources)["span-log"]["status"] == "failed"
        assert "was deleted or replaced" in caplog.text
        data.mkdir(exist_ok=True)  # an empty one is not the same
        await trio.sleep(0.6)
        assert await status() == 503
        shutil.rmtree(data)
        aside.rename(data)
        with trio.fail_after(60):
            while await status() != 200:
                await trio.sleep(0.02)
        assert components(service.sources)["span-log"]["status"] == "ok"
