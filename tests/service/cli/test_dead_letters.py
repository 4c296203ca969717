import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner

from betrace.service.cli.dead_letters import dead_letters


def letter(number):
    return {
        "id": str(number),
        "tenant": "acme",
        "stage": "rule-evaluation",
        "kind": "due",
        "bytes": 100,
        "weight": 3,
        "error": f"boom {number}\nand more",
        "transient": number % 2 == 0,
        "attempts": 4,
        "first_failed": "2025-01-31T12:00:00.000000001Z",
        "last_failed": "2025-01-31T12:00:05.000000001Z",
        "next_retry": "2025-01-31T12:01:05.000000001Z" if number % 2 == 0 else None,
    }


class Service:
    """A service that answers as the API does."""

    def __init__(self, letters):
        self.letters = {number: letter(number) for number in letters}
        self.asked = []
        self.refuse = None
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                service.answer(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler):
        url = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = url.path.removeprefix("/api/admin/dead-letters").strip("/").split("/")
        self.asked.append((handler.command, parts, query, handler.headers.get("authorization")))
        status, body = self.find(parts, query)
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def find(self, parts, query):
        if self.refuse:
            return self.refuse, {"error": {"message": "who are you?", "hint": "see /docs"}}
        match parts:
            case [""]:
                limit, after = int(query["limit"]), int(query.get("cursor", 0))
                found = [value for number, value in self.letters.items() if number > after]
                following = found[limit - 1]["id"] if len(found) > limit else None
                return 200, {"deadLetters": found[:limit], "next": following}
            case ["retry"]:
                return 202, {"retried": len(self.letters)}
            case [number] if int(number) in self.letters:
                return 200, {**self.letters[int(number)], "payload": {"traces": ["ab"]}}
            case [number, _] if int(number) in self.letters:
                return 200, {}
        return 404, {"error": {"message": "there is no such dead letter", "hint": ""}}


@pytest.fixture
def service():
    service = Service(range(1, 6))
    yield service
    service.server.shutdown()
    service.server.server_close()


def run(service, *arguments, code=0):
    given = [*arguments, "--url", service.url] if arguments[-1] != "--help" else arguments
    result = CliRunner().invoke(dead_letters, given)
    assert result.exit_code == code, result.output
    return result


def test_list_prints_one_line_per_letter(service):
    lines = run(service, "list").stdout.splitlines()
    assert len(lines) == 6
    assert lines[1].split()[:4] == ["1", "rule-evaluation", "acme", "4"]
    assert "on request" in lines[1]
    assert "2025-01-31T12:01:05" in lines[2]
    assert lines[2].endswith("boom 2")


def test_list_says_if_there_are_more(service):
    output = run(service, "list", "--limit", "2", "--stage", "projection", "--tenant", "b").stdout
    assert "more than 2" in output
    assert service.asked[0][2] == {"stage": "projection", "tenant": "b", "limit": "2"}


def test_list_reads_page_by_page(service):
    service.letters = {number: letter(number) for number in range(1, 1501)}
    found = json.loads(run(service, "list", "--limit", "2000", "--json").stdout)
    assert [each["id"] for each in found] == [str(number) for number in range(1, 1501)]


def test_an_empty_list(service):
    service.letters = {}
    assert run(service, "list").stdout == "no dead letters\n"
    assert json.loads(run(service, "list", "--json").stdout) == []


def test_show(service):
    output = run(service, "show", "3").stdout
    assert "boom 3" in output
    assert '"traces"' in output
    assert json.loads(run(service, "show", "3", "--json").stdout)["payload"] == {"traces": ["ab"]}
    assert "no dead letter 99" in run(service, "show", "99", code=3).stderr


def test_escape_sequences_are_escaped(service):
    service.letters[3]["error"] = "\x1b[2Jboom\nmore \x9b1m"
    assert r"\x1b[2Jboom" in run(service, "list").stdout
    shown = run(service, "show", "3").stdout
    assert r"\x1b[2Jboom" in shown
    assert r"more \x9b1m" in shown
    assert "\x1b" not in shown
    assert "\x9b" not in run(service, "show", "3", "--json").stdout


def test_retry_and_discard(service):
    assert run(service, "retry", "1", "2").stdout == "2 letters will be retried\n"
    assert run(service, "discard", "1").stdout == "1 letter discarded\n"
    assert [asked[:2] for asked in service.asked] == [
        ("POST", ["1", "retry"]),
        ("POST", ["2", "retry"]),
        ("POST", ["1", "discard"]),
    ]


def test_missing_letters_are_named(service):
    result = run(service, "retry", "1", "99", code=1)
    assert result.stdout == "1 letter will be retried\n"
    assert "no dead letter 99" in result.stderr
    found = json.loads(run(service, "discard", "99", "--json", code=1).stdout)
    assert found == {"done": 0, "missing": [99]}


def test_retry_of_all(service):
    output = run(service, "retry", "--all", "--tenant", "acme", "--token", "secret").stdout
    assert output == "5 letters will be retried\n"
    assert service.asked == [("POST", ["retry"], {"tenant": "acme"}, "Bearer secret")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["retry"],
        ["retry", "1", "--all"],
        ["retry", "1", "--stage", "x"],
        ["retry", "x"],
        ["discard"],
        ["list", "--limit", "0"],
    ],
)
def test_wrong_usage(service, arguments):
    run(service, *arguments, code=2)
    assert service.asked == []


def test_a_refusal_is_a_sentence(service):
    service.refuse = 401
    assert run(service, "list", code=3).stderr == "betrace: who are you?; see /docs\n"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://["])
def test_an_unreachable_service(url):
    result = CliRunner().invoke(dead_letters, ["list", "--url", url])
    assert result.exit_code == 3
    assert "betrace serve" in result.stderr


@pytest.mark.parametrize("command", ["list", "show", "retry", "discard"])
def test_help_has_an_example(command):
    result = CliRunner().invoke(dead_letters, [command, "--help"])
    assert result.exit_code == 0
    assert f"betrace dead-letters {command}" in result.output
