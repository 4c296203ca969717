"""The API's documentation matches its endpoints."""

from pathlib import Path

from betrace.service.api.app import create_api
from betrace.service.api.openapi import all_endpoints, openapi
from betrace.service.api.pages.routes import PREFIX
from betrace.service.api.reference import markdown
from betrace.service.config.stages import EXPORTS
from betrace.service.pipeline import breakers

ROOT = Path(__file__).parents[3]


async def test_the_document_and_the_page_have_every_endpoint(client):
    document = await client.get("/openapi.json")
    page = (await client.get("/docs")).decode()
    for endpoint in all_endpoints():
        assert endpoint.method.lower() in document["paths"][endpoint.path]
        assert endpoint.path in page
    assert "http://" not in page  # no external resources
    assert "https://" not in page
    assert "src=" not in page


async def test_every_route_is_in_the_openapi_document(service):
    app = create_api(service.tools, None, ())
    paths = openapi()["paths"]
    routes = {
        (rule.rule.replace("<", "{").replace(">", "}"), method.lower())
        for rule in app.url_map.iter_rules()
        if not rule.endpoint.startswith(PREFIX)  # pages for people
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert routes == {(path, method) for path, item in paths.items() for method in item}


def test_the_openapi_document_is_consistent():
    operations = [op for item in openapi()["paths"].values() for op in item.values()]
    assert len({op["operationId"] for op in operations}) == len(operations)
    for path, item in openapi()["paths"].items():
        for operation in item.values():
            assert operation["summary"]
            assert operation["responses"]
            names = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
            assert names == [part[1:-1] for part in path.split("/") if part.startswith("{")]


def test_the_markdown_file_is_current_and_has_every_endpoint():
    text = (ROOT / "docs/http-api.md").read_text("utf-8")
    assert text == markdown(all_endpoints())
    for endpoint in all_endpoints():
        assert f"`{endpoint.method} {endpoint.path}`" in text
        assert not endpoint.params or all(f"| `{p.name}` |" in text for p in endpoint.params)


def test_the_documentation_lists_every_breaker():
    (endpoint,) = [e for e in all_endpoints() if e.path == "/api/admin/breakers/{name}/{action}"]
    (text,) = [param.description for param in endpoint.path_params if param.name == "name"]
    for name in (*breakers.NAMES, *EXPORTS):
        assert f"`{name}`" in text


def test_sizes_of_channels_are_in_their_units():
    (endpoint,) = [e for e in all_endpoints() if e.path == "/api/performance/queue-stats"]
    assert "spans, traces or rows" in endpoint.description
