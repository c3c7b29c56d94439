"""Chats over HTTP against a scripted server on this machine."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gratis.subjects.chat import Budget, Chat, ChatError, Request
from gratis.subjects.chat.limits import Gate, Pace


def reply(text, **more):
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}, **more,
    }  # fmt: skip


@pytest.fixture
def server():
    """A loopback endpoint that plays a script of (status, headers, body, delay); the last entry repeats."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                seen.append(body)
                status, headers, content, delay = script.pop(0) if len(script) > 1 else script[0]
            time.sleep(delay)
            content = content(body) if callable(content) else content
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:
                return

        def do_GET(self):
            data = json.dumps({"object": "list", "data": [{"id": "served", "object": "model"}]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            return

    script, seen, lock = [], [], threading.Lock()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()

    class Server:
        url = f"http://127.0.0.1:{httpd.server_port}/v1"
        requests = seen

        @staticmethod
        def plays(*entries):
            script[:] = [(e if isinstance(e, tuple) else (200, {}, e, 0)) for e in entries]

    yield Server
    httpd.shutdown()
    httpd.server_close()


def chat(server, **options):
    waits = []
    made = Chat(server.url, "m", sleep=waits.append, **options)
    return made, waits


def test_too_many_requests_waits_as_long_as_the_server_asks(server):
    server.plays((429, {"retry-after": "7"}, {"error": {"message": "slow down"}}, 0), reply("ok"))
    made, waits = chat(server)
    [answer] = made("hello")
    assert (answer.text, answer.error) == ("ok", None)
    assert waits == [7.0]
    assert len(answer.attempts) == 1
    assert answer.attempts[0].startswith("HTTP 429")
    assert answer.usage.input == 7
    assert answer.usage.output == 3
    assert not answer.usage.estimated
    assert made.backend._gate.limit == 4


def test_the_same_server_error_three_times_ends_the_request(server):
    server.plays((500, {}, {"error": {"message": "broken"}}, 0))
    made, waits = chat(server)
    [answer] = made("hello")
    assert answer.text == ""
    assert "HTTP 500" in answer.error
    assert len(server.requests) == 3
    assert len(waits) == 2
    with pytest.raises(ChatError, match="did not answer: HTTP 500"):
        made.ask("hello")


def test_what_cannot_succeed_is_not_tried_again(server):
    server.plays((400, {}, {"error": {"message": "bad"}}, 0))
    made, waits = chat(server)
    assert "HTTP 400" in made("hello")[0].error
    assert len(server.requests) == 1
    assert waits == []


def test_no_answer_in_time(server):
    server.plays((200, {}, reply("late"), 1.0))
    made, _ = chat(server, timeout_s=0.2, attempts=2)
    [answer] = made("hello")
    assert "in time" in answer.error
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "body", [b'{"choices": [', b"[]", b"{}", {"choices": []}, {"choices": [{"message": {}}]}, b"<html>"]
)
def test_malformed_answers(server, body):
    server.plays(body)
    made, _ = chat(server, attempts=2)
    [answer] = made("hello")
    assert answer.error
    assert "\n" not in answer.error


@pytest.mark.parametrize(
    "change",
    [
        {"usage": 5},
        {"usage": {"prompt_tokens": "many"}},
        {"usage": {"prompt_tokens": 4, "completion_tokens": None, "prompt_tokens_details": 3}},
        {"model": 7},
        {"choices": [{"message": {"content": "ok"}, "finish_reason": 3, "logprobs": {"content": [1]}}]},
    ],
)
def test_odd_fields_beside_the_text_do_no_harm(server, change):
    server.plays({**reply("ok"), **change})
    [answer] = chat(server, attempts=1)[0]("hello")
    assert (answer.text, answer.error) == ("ok", None)
    assert answer.usage.input > 0
    assert isinstance(answer.model, str)


@pytest.mark.parametrize("asked", ["nan", "inf", "-5", "soon", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_wait_that_is_no_number_of_seconds_is_not_believed(server, asked):
    server.plays((429, {"retry-after": asked}, {"error": {"message": "slow down"}}, 0), reply("ok"))
    made, waits = chat(server)
    assert made("hello")[0].text == "ok"
    assert 0 <= waits[0] <= 60


def test_a_wait_longer_than_the_budget_is_not_waited(server):
    server.plays((429, {"retry-after": "900"}, {"error": {"message": "slow down"}}, 0))
    made, waits = chat(server)
    assert "HTTP 429" in made("hello")[0].error
    assert waits == []


def test_answers_of_two_servers_are_kept_apart(server, tmp_path):
    server.plays(reply("one"), reply("two"))
    path = tmp_path / "c.sqlite"
    assert Chat(server.url, "m", cache=path)("q")[0].text == "one"
    other = server.url.replace("127.0.0.1", "localhost")
    assert Chat(other, "m", cache=path)("q")[0].text == "two"
    assert Chat(server.url, "m", cache=path)("q")[0].text == "one"


def test_answers_that_came_before_an_interruption_are_kept(server, tmp_path, monkeypatch):
    server.plays((200, {}, lambda body: reply(body["messages"][-1]["content"].upper()), 0.002))
    made, _ = chat(server, cache=tmp_path / "c.sqlite", concurrency=2)
    put, kept = made._cache.put, []

    def interrupted(key, answer):
        if len(kept) == 5:
            raise KeyboardInterrupt
        kept.append(key)
        put(key, answer)

    monkeypatch.setattr(made._cache, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made([f"q{i}" for i in range(200)])
    assert len(server.requests) < 100
    again, _ = chat(server, cache=tmp_path / "c.sqlite")
    assert all(answer.cached for answer in again([f"q{i}" for i in range(5)]))


def test_an_endpoint_opens_by_address_and_model(server):
    from gratis.subjects import open as open_subject

    server.plays(reply("ok"))
    assert open_subject(f"{server.url}#named").ask("q") == "ok"
    assert open_subject(server.url).ask("q") == "ok"
    assert [r["model"] for r in server.requests] == ["named", "served"]


def test_no_connection():
    made = Chat("http://127.0.0.1:9/v1", "m", sleep=lambda s: None, attempts=2)
    assert "no connection" in made("hello")[0].error


def test_attempts_and_seconds_are_bounded(server):
    bodies = iter(range(100))
    server.plays((503, {}, lambda body: {"error": {"message": f"{next(bodies)}"}}, 0))
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    made = Chat(server.url, "m", sleep=sleep, clock=lambda: now[0], attempts=6, retry_budget_s=3.0)
    assert made("hello")[0].error
    assert now[0] <= 3.0
    assert len(server.requests) < 6


def test_the_breaker_stops_a_run_that_mostly_fails(server):
    server.plays((400, {}, {"error": {"message": "bad"}}, 0))
    made, _ = chat(server, concurrency=1)
    answers = made([f"question {i}" for i in range(40)])
    assert len(server.requests) == 20
    assert answers[-1].error.startswith("not sent")


def test_order_is_that_of_the_requests(server):
    server.plays((200, {}, lambda body: reply(body["messages"][-1]["content"].upper()), 0.01))
    made, _ = chat(server)
    questions = [f"q{i}" for i in range(12)]
    assert [a.text for a in made(questions)] == [q.upper() for q in questions]


def test_the_served_model_is_asked_for_and_the_key_is_not_written_down(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.plays(reply("ok"))
    made = Chat(server.url, transcript=tmp_path / "t.jsonl", cache=tmp_path / "c.sqlite")
    made("hello")
    assert server.requests[0]["model"] == "served"
    assert not any(b"secret-key" in p.read_bytes() for p in tmp_path.iterdir())


def test_structured_answers_are_repaired_once(server):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    request = Request(messages=({"role": "user", "content": "n?"},), response_schema=schema)
    server.plays(reply('{"n": "x"}'), reply('Sure: ```json\n{"n": 3}\n```'))
    made, _ = chat(server)
    [answer] = made(request)
    assert answer.parsed == {"n": 3}
    assert len(server.requests) == 2
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == schema
    server.plays(reply("never"))
    assert made(Request(messages=request.messages, response_schema=schema, seed=5))[0].parsed is None
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("yes", "yes"),
        (' "no" ', "no"),
        ('{"answer": "yes"}', "yes"),
        ("Yes!", None),
        ('{"answer": 3}', None),
        ("[]", None),
    ],
)
def test_choices_are_read_as_the_server_may_put_them(server, text, parsed):
    server.plays(reply(text))
    request = Request(messages=({"role": "user", "content": "?"},), choices=("yes", "no"), max_tokens=1)
    [answer] = chat(server)[0](request)
    assert (answer.text, answer.parsed) == (text, parsed)
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["answer"]["enum"] == ["yes", "no"]
    assert server.requests[0]["max_tokens"] > 10


def test_a_repair_stays_within_the_budget(server):
    server.plays(reply("never"))
    made, _ = chat(server, budget=Budget(calls=1))
    [answer] = made(Request(messages=({"role": "user", "content": "n?"},), response_schema={"type": "object"}))
    assert answer.parsed is None
    assert "not repaired" in answer.attempts[0]
    assert len(server.requests) == 1


def test_cut_answers_are_not_sent_again(server):
    cut = reply('{"n":')
    cut["choices"][0]["finish_reason"] = "length"
    server.plays(cut)
    made, _ = chat(server)
    [answer] = made(Request(messages=({"role": "user", "content": "n?"},), response_schema={"type": "object"}))
    assert (answer.finish_reason, answer.parsed) == ("length", None)
    assert len(server.requests) == 1


def test_gate_halves_and_grows():
    gate = Gate(8)
    gate.overrun()
    assert gate.limit == 4
    for _ in range(20):
        gate.clean()
    assert gate.limit == 5


def test_pace():
    now, waited = [0.0], []

    def sleep(seconds):
        waited.append(seconds)
        now[0] += seconds

    pace = Pace(2, None, sleep, lambda: now[0])
    for _ in range(5):
        pace.wait(10)
    assert now[0] == pytest.approx(120, abs=1)
