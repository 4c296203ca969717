import os
import re
import tomllib
from pathlib import Path

import pytest

from betrace.service.cli.docs import configuration as config_docs
from betrace.service.config.base import is_loopback, split_address
from betrace.service.config.cluster import ClusterSettings
from betrace.service.config.load import ConfigError, load
from betrace.service.config.settings import Settings

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("BETRACE_"):
            monkeypatch.delenv(name)


def write(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, "utf-8")
    return path


def refused(tmp_path, text, overrides=None):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), overrides)
    return str(caught.value)


def plain(model):
    return model.model_dump()


def uncommented(text):
    """The file with its optional sections."""
    setting = r"\[\w+\]|\w+ = (?:\"[^\"]*\"|[\d._]+|true|false)"
    return re.sub(rf"^# ({setting})$", r"\1", text, flags=re.MULTILINE)


def test_the_shipped_file_is_exactly_the_defaults():
    assert plain(load(ROOT / "config.toml")) == plain(Settings())


def test_the_optional_sections_of_the_shipped_file_are_their_defaults(tmp_path):
    text = uncommented((ROOT / "config.toml").read_text("utf-8"))
    assert load(write(tmp_path, text)).cluster == ClusterSettings()


def test_the_cluster_section(tmp_path, monkeypatch):
    assert Settings().cluster is None
    assert load(write(tmp_path, "[cluster]")).cluster == ClusterSettings()
    text = refused(tmp_path, '[cluster]\nserverss = "nats://a:1"')
    assert "did you mean cluster.servers?" in text
    assert "nats://host:port" in refused(tmp_path, '[cluster]\nservers = "http://a:1"')
    assert "name at least one server" in refused(tmp_path, '[cluster]\nservers = " , "')
    assert "half of cluster.lease_seconds" in refused(tmp_path, "[cluster]\nlease_seconds = 0.9")
    assert "cluster.tls_key is not" in refused(tmp_path, '[cluster]\ntls_certificate = "x"')
    assert "exclude each other" in refused(tmp_path, '[cluster]\nuser = "u"\ntoken = "t"')
    monkeypatch.setenv("BETRACE_CLUSTER__SERVERS", "nats://a:1,nats://b:2")
    found = load(None).cluster
    assert found is not None
    assert (found.servers, found.partitions) == ("nats://a:1,nats://b:2", 16)


def test_every_setting_is_in_the_shipped_file_with_a_comment():
    text = uncommented((ROOT / "config.toml").read_text("utf-8"))
    file = tomllib.loads(text)
    for title, section in config_docs.sections():
        table = file
        for part in title.split("."):
            table = table[part]
        for name, field, _ in config_docs.options(section):
            assert name in table, f"{title}.{name} is missing from config.toml"
            assert field.description, f"{title}.{name} has no description"
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        if re.match(r"\w+ =", line):
            assert above.startswith("# "), f"no comment above: {line}"


def test_generated_files_are_current():
    assert (ROOT / "config.toml").read_text("utf-8") == config_docs.toml()
    assert (ROOT / "docs/configuration.md").read_text("utf-8") == config_docs.markdown()


def test_sizes_and_times_name_their_unit():
    for title, section in config_docs.sections():
        for name, _, default in config_docs.options(section):
            if re.search(r"timeout|delay|interval|keep_alive|flush|idle_close|max_age", name):
                assert name.endswith(("_seconds", "_ms")), f"{title}.{name}"
            if isinstance(default, int) and default >= 1 << 20 and name != "max_open":
                assert name.endswith(("_bytes", "_bytes_per_second")), f"{title}.{name}"


def test_the_documented_defaults():
    s = Settings()
    p = s.pipeline
    assert (p.ingest_capacity_spans, p.correlate_capacity_spans) == (10_000, 5_000)
    assert (p.evaluate_capacity_traces, p.store_capacity_signals) == (5_000, 10_000)
    workers = (p.ingest_workers, p.correlate_workers, p.evaluate_workers, p.store_workers)
    assert workers == (1, 1, 1, 2)  # docs/decisions/0003-one-worker-large-batches.md
    assert (s.traces.idle_seconds, s.traces.max_age_seconds) == (5, 3600)
    assert (s.traces.window_spans, s.traces.window_overlap) == (100, 0.2)
    assert (s.ledger.batch_signals, s.duckdb.batch_rows) == (128, 1000)
    assert (s.duckdb.pool_max, s.duckdb.pool_idle, s.duckdb.pool_timeout_seconds) == (5, 1, 5)
    e, b = s.breakers.evaluation, s.breakers.storage
    assert (e.timeout_seconds, e.failure_rate, e.minimum_calls, e.open_seconds) == (
        10,
        0.5,
        100,
        30,
    )
    assert (b.timeout_seconds, b.failure_rate, b.minimum_calls, b.open_seconds) == (5, 0.5, 50, 15)
    assert s.ingest.max_body_bytes == 20 * 1024 * 1024


def test_environment_overrides_file_and_flags_override_both(tmp_path, monkeypatch):
    path = write(
        tmp_path, '[storage]\npath = "file"\n[traces]\nwindow_spans = 7\nidle_seconds = 3\n'
    )
    monkeypatch.setenv("BETRACE_STORAGE__PATH", "variable")
    monkeypatch.setenv("BETRACE_TRACES__WINDOW_SPANS", "8")
    loaded = load(path, {"storage.path": "flag"})
    assert loaded.storage.path == Path("flag")
    assert (loaded.traces.window_spans, loaded.traces.idle_seconds) == (8, 3)
    assert loaded.traces.long_lived_spans == 1000


def test_variables_of_tables_and_nested_sections(monkeypatch):
    monkeypatch.setenv("BETRACE_BREAKERS__STORAGE__OPEN_SECONDS", "20")
    monkeypatch.setenv("BETRACE_QUOTAS__TENANTS__ACME", "500")
    loaded = load()
    assert loaded.breakers.storage.open_seconds == 20
    assert loaded.breakers.storage.minimum_calls == 50  # storage's default, not evaluation's
    assert loaded.quotas.tenants == {"acme": 500}


def test_variables_of_other_programs_are_left_alone(monkeypatch):
    monkeypatch.setenv("BETRACE_TOKEN", "x")
    monkeypatch.setenv("OTHER__THING", "x")
    assert load() is not None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[traces]\nidle_second = 5", ["traces.idle_second", "did you mean traces.idle_seconds?"]),
        ("[trace]\nidle_seconds = 5", ["trace in", "did you mean traces?"]),
        ("[api]\nwindow_spans = 5", ["api.window_spans", "did you mean traces.window_spans?"]),
        ("[storage]\nzzz = 5", ["storage.zzz", "settings of [storage] are path"]),
        ("zzz = 5", ["zzz", "sections are ingest, api"]),
        ("[breakers.storage]\nopen_second = 5", ["did you mean breakers.storage.open_seconds?"]),
        ("ingest = 5", ["ingest", "must be a table; write [ingest]"]),
        (
            '[traces]\nwindow_spans = "many"',
            ['window_spans "many"', "a whole number, such as 100"],
        ),
        ('[traces]\nwindow_spans = "5"', ['traces.window_spans "5"', "a whole number"]),
        ("[traces]\nwindow_spans = 1.5", ["traces.window_spans 1.5", "a whole number"]),
        ("[traces]\nwindow_spans = true", ["traces.window_spans true", "a whole number"]),
        ('[auth]\ninsecure = "yes"', ['auth.insecure "yes"', "true or false"]),
        ("[rules]\ndirectory = 5", ["rules.directory 5", "text in quotes"]),
        ("[storage]\npath = 5", ["storage.path 5", "text in quotes"]),
        ("[traces]\nidle_seconds = nan", ["traces.idle_seconds", "number"]),
        ("[traces]\nidle_seconds = 0", ["traces.idle_seconds 0", "greater than 0"]),
        ("[traces]\nwindow_overlap = 1", ["traces.window_overlap 1", "less than 1"]),
        ("[traces]\nwindow_spans = 0", ["traces.window_spans 0", "at least 1"]),
        ("[shutdown]\ngrace_seconds = 1e9", ["grace_seconds", "at most 31_536_000"]),
        ('[log]\nack = "sync"', ['log.ack "sync"', '"written" or "synced"', "config.toml"]),
        ('[ingest]\naddress = "4318"', ['ingest.address "4318"', "write host:port"]),
        ('[ingest]\naddress = "a:b:1"', ["write host:port"]),
        ('[api]\naddress = "127.0.0.1:70000"', ["write host:port"]),
        ("[quotas]\ntenants = 5", ["quotas.tenants 5", "a table"]),
        ("[quotas.tenants]\nACME = 5", ["quotas.tenants names 'ACME'", "a-z"]),
        ("[traces", ["is not valid TOML", "correct it there"]),
    ],
)
def test_errors_name_the_setting_and_a_valid_value(tmp_path, text, words):
    message = refused(tmp_path, text)
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[ingest]\nretry_after_min_seconds = 9", ["ingest.retry_after_max_seconds (5)"]),
        ("[ingest]\nmax_buffered_bytes = 4096", ["ingest.max_body_bytes (20971520)"]),
        ("[pipeline]\ncorrelate_capacity_spans = 9", ["correlate_batch_spans (5000)", "lower"]),
        ("[traces]\nidle_seconds = 7200", ["traces.max_age_seconds (3600)"]),
        ("[traces]\nwindow_spans = 7200", ["traces.long_lived_spans (1000)"]),
        ("[duckdb]\npool_idle = 6", ["duckdb.pool_max (5)"]),
        (
            "[breakers.storage]\nwindow_calls = 10",
            ["breakers.storage: minimum_calls (50)", "never open"],
        ),
        ('[tls]\nkey = "k.pem"', ["tls.key is set but tls.certificate is not"]),
        ('[api]\naddress = "127.0.0.1:4318"', ["api.address and ingest.address are both"]),
        ('[ingest]\naddress = "0.0.0.0:4318"', ["ingest.address is 0.0.0.0:4318", "--insecure"]),
        ('[metrics]\naddress = "metrics:9090"', ["metrics.address", "--insecure"]),
        ("[auth]\nenabled = true", ["no operator token", "auth.operator_token_file"]),
        (
            '[export.otlp]\nendpoint = "http://localhost:4318/v1/logs"',
            ["export.otlp.endpoint is http://localhost:4318", "ingest.address of this service"],
        ),
        (
            '[alerts.webhook]\nurl = "http://127.0.0.1:8090/hook"',
            ["alerts.webhook.url is http://127.0.0.1:8090/hook", "api.address of this service"],
        ),
        (
            '[alerts.alertmanager]\nurls = ["http://a.example", "http://localhost:9090"]',
            ["alerts.alertmanager.urls is http://localhost:9090", "metrics.address of this"],
        ),
        (
            '[auth]\ninsecure = true\n[api]\naddress = "0.0.0.0:8090"\n[alerts.webhook]\n'
            'url = "http://localhost:8090"',
            ["alerts.webhook.url is http://localhost:8090", "api.address of this service"],
        ),
        ('[export.webhook]\nurl = "http://127.0.0.1:8090/"', ["api.address of this service"]),
        ('[auth]\nscrape_token = "short"', ["auth.scrape_token", "less than 20"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, text, words):
    message = refused(tmp_path, text)
    for word in words:
        assert word in message
    assert "\n" not in message


def test_all_errors_are_reported_together(tmp_path):
    message = refused(tmp_path, "[traces]\nwindow_spans = 0\nidel_seconds = 1\n")
    assert len(message.splitlines()) == 2


def test_a_variable_can_resolve_a_contradiction_in_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, "[duckdb]\npool_idle = 6")
    monkeypatch.setenv("BETRACE_DUCKDB__POOL_MAX", "6")
    assert load(path).duckdb.pool_max == 6


def test_errors_name_the_variable_or_flag(monkeypatch):
    with pytest.raises(ConfigError, match=r"traces.window_spans \"x\" in a flag is wrong"):
        load(None, {"traces.window_spans": "x"})
    monkeypatch.setenv("BETRACE_TRACES__WINDOW_SPANS", "y")
    with pytest.raises(ConfigError, match=r"\"y\" in BETRACE_TRACES__WINDOW_SPANS is wrong"):
        load()


def test_unknown_variables_are_refused(monkeypatch):
    monkeypatch.setenv("BETRACE_STORAGE__PAHT", "x")
    with pytest.raises(ConfigError, match=r"storage.paht in BETRACE_STORAGE__PAHT.*storage.path"):
        load()
    monkeypatch.delenv("BETRACE_STORAGE__PAHT")
    monkeypatch.setenv("BETRACE_STORGE__PATH", "x")
    with pytest.raises(ConfigError, match=r"BETRACE_STORGE__PATH.*did you mean storage\?"):
        load()


def test_a_setting_of_an_earlier_version_is_refused_with_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text('[ingest]\nserver = "hypercorn"\n')
    with pytest.raises(
        ConfigError, match=r"ingest.server in .*config.toml is no longer .*delete it"
    ):
        load(path)
    monkeypatch.setenv("BETRACE_INGEST__SERVER", "lean")
    with pytest.raises(ConfigError, match=r"ingest.server in BETRACE_INGEST__SERVER is no longer"):
        load()


def test_a_table_that_is_not_json_is_refused(monkeypatch):
    monkeypatch.setenv("BETRACE_QUOTAS__TENANTS", "acme 5")
    with pytest.raises(ConfigError, match="as JSON"):
        load()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(path)


def test_non_loopback_addresses_need_consent():
    address = {"ingest.address": "[::]:4318", "metrics.address": "off"}
    settings = load(None, {**address, "auth.insecure": True})
    assert settings.ingest.address == "[::]:4318"


def test_port_zero_may_be_used_twice():
    settings = load(None, {"ingest.address": "127.0.0.1:0", "api.address": "127.0.0.1:0"})
    assert settings.api.address == "127.0.0.1:0"


def test_addresses():
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("localhost:80") == ("localhost", 80)
    assert is_loopback("localhost")
    assert is_loopback("127.9.9.9")
    assert is_loopback("::1")
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("example.org")


@pytest.mark.parametrize("address", ["0.0.0.0:4318", "[::]:4318", "host.example:4318"])
def test_with_authentication_it_may_listen_on_any_address(address):
    given = {"auth.enabled": True, "auth.operator_token": "x" * 32, "ingest.address": address}
    assert load(None, given).auth.enabled


def test_no_message_shows_a_secret(tmp_path, monkeypatch):
    secret = 987654321987654321
    message = refused(tmp_path, f"[auth]\noperator_token = {secret}")
    assert "auth.operator_token" in message
    assert str(secret) not in message
    message = refused(tmp_path, '[auth]\nscrape_token = "pssst"')
    assert "pssst" not in message
    monkeypatch.setenv("BETRACE_AUTH__OPERATOR_TOKEN", "a-secret-of-the-environment")
    shown = repr(load(None, {"auth.enabled": True}))
    assert "a-secret-of-the-environment" not in shown
