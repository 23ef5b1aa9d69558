"""The server over its socket, with a real engine: replies, streams, clients that leave, and more of them than there is room for."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlm.engine import Engine, Request

pytest.importorskip("fastapi", reason="needs the demo extra")
pytest.importorskip("uvicorn", reason="needs the demo extra")

from demo.openai_protocol import Limits
from demo.opening import reserve_port
from demo.server import ORIGIN, build_app, main

SERVER = Path(__file__).parents[2] / "demo" / "server.py"


@contextmanager
def served(engine, **settings):
    """The port of a server in a thread."""
    import uvicorn

    with reserve_port("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(engine, "m", **settings), log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine(*tiny, max_tokens=2000, self_check=False)


@pytest.fixture(scope="module")
def port(engine):
    with served(engine, limits=Limits(most_new_tokens=4000), most_open=24) as number:
        yield number


def body(words="hello", **settings):
    return {"model": "m", "messages": [{"role": "user", "content": words}], "max_tokens": 8, "temperature": 0, **settings}


def call(port, content=None, path="/v1/chat/completions", method=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = content if isinstance(content, bytes | None) else json.dumps(content).encode()
    connection.request(method or ("GET" if content is None else "POST"), path, sent, headers or {})
    reply = connection.getresponse()
    found = reply.read()
    connection.close()
    return reply.status, found


def ask(port, **settings):
    status, content = call(port, body(**settings))
    assert status == 200, content
    return json.loads(content)


def events(content):
    """Of a stream that was read to its end."""
    lines = [line for line in content.decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


def open_answers(port):
    return json.loads(call(port, path="/health")[1])["open"]


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_reply_is_the_engines_answer(port, engine):
    expected = engine.generate([Request(body()["messages"], max_new_tokens=8)])[0]
    reply = ask(port)
    assert reply["choices"][0]["message"]["content"] == expected.text and reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] == expected.prompt_tokens and reply["usage"]["completion_tokens"] == 8
    assert reply["id"].startswith("chatcmpl-") and reply["model"] == "m" and abs(reply["created"] - time.time()) < 60


def test_a_stream_says_the_same_piece_by_piece(port):
    whole = ask(port, n=2, temperature=1.0, seed=3)
    status, content = call(port, body(n=2, temperature=1.0, seed=3, stream=True, stream_options={"include_usage": True}))
    *found, last, done = events(content)
    assert status == 200 and done == "data: [DONE]" and last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] and all(event["usage"] is None for event in found)
    texts = ["", ""]
    for event in found:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]] and texts[0] != texts[1]
    assert sorted(event["choices"][0]["index"] for event in found if event["choices"][0]["finish_reason"]) == [0, 1]
    assert len({event["id"] for event in found}) == 1 and found[0]["choices"][0]["delta"]["role"] == "assistant"


def test_log_probabilities_are_the_engines_in_openais_shape(port, engine):
    """Whole and in a stream, where each comes once; an unasked one not at all."""
    tokenizer = engine.processor.tokenizer
    expected = engine.generate([Request(body()["messages"], max_new_tokens=8, temperature=1.0, seed=3, logprobs=2)])[0]
    settings = {"temperature": 1.0, "seed": 3, "logprobs": True, "top_logprobs": 2}
    told = ask(port, **settings)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in told] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-5)
    words = [bytes(entry["bytes"]) for entry in told if entry["token"] not in tokenizer.get_added_vocab()]
    assert b"".join(words).decode(errors="replace").removeprefix(" ") == expected.text
    for entry, one in zip(told, expected.logprobs, strict=True):
        assert entry["token"] == bytes(entry["bytes"]).decode(errors="replace") and len(entry["top_logprobs"]) == 2
        assert [best["logprob"] for best in entry["top_logprobs"]] == pytest.approx([logprob for _, logprob in one.top], abs=1e-5)
        assert [best["token"].removeprefix(" ") for best in entry["top_logprobs"]] == [tokenizer.decode([token]) for token, _ in one.top]
    streamed = [event["choices"][0]["logprobs"]["content"] for event in events(call(port, body(stream=True, **settings))[1])[:-1]]
    again = [entry for part in streamed for entry in part]
    assert [entry["bytes"] for entry in again] == [entry["bytes"] for entry in told] and len(streamed) > 4
    assert [entry["logprob"] for entry in again] == pytest.approx([entry["logprob"] for entry in told], abs=1e-5)
    assert ask(port)["choices"][0]["logprobs"] is None
    assert all(event["choices"][0]["logprobs"] is None for event in events(call(port, body(stream=True))[1])[:-1])


def test_nothing_is_told_with_the_first_event_of_a_choice(port, engine, monkeypatch):
    """OpenAI's own client counts it twice. Others keep the engine stepping, so that the first choice has spoken before the last asks."""
    real, spoke = engine.submit, []

    def submit(request):
        ticket = real(request)
        wait_until(lambda: ticket.logprobs)
        spoke.append(len(ticket.logprobs))
        return ticket

    running = engine.submit(Request(body("go on")["messages"], max_new_tokens=4000))
    thread = threading.Thread(target=running.result)
    thread.start()
    monkeypatch.setattr(engine, "submit", submit)
    try:
        found = events(call(port, body(n=3, logprobs=True, stream=True))[1])[:-1]
    finally:
        running.cancel()
        thread.join()
    first = [event["choices"][0]["logprobs"]["content"] for event in found if event["choices"][0]["delta"].get("role")]
    told = [sum(len(event["choices"][0]["logprobs"]["content"]) for event in found if event["choices"][0]["index"] == place)
            for place in range(3)]  # fmt: skip
    assert len(spoke) == 3 and first == [[]] * 3 and told == [8] * 3


def test_an_error_nobody_expected_reaches_a_page_too(engine, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("no memory")

    with served(engine, origins=["https://a.example"]) as number:
        monkeypatch.setattr(engine, "submit", fail)
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=60)
        sent = {"Origin": "https://a.example", "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body()), sent)
        reply = connection.getresponse()
        assert reply.status == 500 and reply.headers["Access-Control-Allow-Origin"] == "https://a.example"
        assert json.loads(reply.read())["error"]["type"] == "server_error"
        connection.close()


def test_a_page_cannot_ask_in_its_visitor_s_name(port):
    """Browsers send text/plain to any address without asking it first."""
    sent = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    status, content = call(port, body(), headers=sent)
    assert status == 415 and "application/json" in json.loads(content)["error"]["message"]
    assert (
        call(port, body(), headers=sent | {"Content-Type": "application/json; charset=utf-8"})[0] == 200
    )  # asked first, and refused there


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "a.example", "https://A.example", "https://a.example:443", "", "https://a.example/x"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin, capsys):
    assert main(["--model", "nowhere", "--allow-origin", origin]) == 2
    assert f"--allow-origin is {origin!r}; expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "origin", ["*", "null", "https://a.example", "http://localhost:3000", "http://[::1]:8080", "chrome-extension://abc"]
)
def test_origins_as_browsers_send_them_are_taken(origin):
    assert ORIGIN.fullmatch(origin)


def test_web_pages_of_allowed_origins_may_ask(engine, port):
    """A browser asks first whether it may, without the key; without --allow-origin nobody's page may."""
    first = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

    def asked(number, method, origin, content=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=60)
        connection.request(
            method, "/v1/chat/completions", content, first | {"Origin": origin, "Content-Type": "application/json"} | headers
        )
        reply = connection.getresponse()
        reply.read()
        connection.close()
        return reply.status, reply.headers.get("Access-Control-Allow-Origin")

    with served(engine, origins=["https://a.example"], api_key="k") as open_port:
        assert asked(open_port, "OPTIONS", "https://a.example") == (200, "https://a.example")
        assert asked(open_port, "OPTIONS", "https://b.example") == (400, None)
        sent = json.dumps(body()).encode()
        assert asked(open_port, "POST", "https://a.example", sent, Authorization="Bearer k") == (200, "https://a.example")
        assert asked(open_port, "POST", "https://a.example", sent) == (401, "https://a.example")  # or a page could not read why
    assert asked(port, "OPTIONS", "https://a.example") == (405, None)


def test_errors_have_openais_shape_and_their_status(port):
    for status, content in (
        call(port, body(temperature=9)), call(port, b"{"), call(port, body(words="word " * 3000)), call(port, body(stream=True, n=0)),
    ):  # fmt: skip
        assert status == 400 and json.loads(content)["error"]["type"] == "invalid_request_error"
    assert call(port, body(model="other"))[0] == 404 and call(port, path="/v1/models/other")[0] == 404
    for status, reply in ((404, call(port, {}, "/v1/completions")), (405, call(port))):
        assert reply[0] == status and "this server has /v1/chat/completions" in json.loads(reply[1])["error"]["message"]
    assert open_answers(port) == 0


def test_models_are_listed(port):
    listed = json.loads(call(port, path="/v1/models")[1])
    assert listed["object"] == "list" and listed["data"] == [json.loads(call(port, path="/v1/models/m")[1])]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(port, engine, stream):
    """Or a closed tab goes on computing for nobody, in rows that others wait for."""
    content = json.dumps(body(max_tokens=4000, n=3, stream=stream)).encode()
    client = socket.create_connection(("127.0.0.1", port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    wait_until(lambda: open_answers(port) == 3)
    client.close()
    wait_until(lambda: open_answers(port) == 0 and engine._scheduler.is_idle)


def test_more_than_there_is_room_for_are_told_to_come_again(port, engine):
    found = []
    threads = [threading.Thread(target=lambda: found.append(call(port, body(max_tokens=300, n=8))[0])) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(found) <= {200, 429} and found.count(200) >= 3
    assert call(port, body(n=16))[0] == 200 and open_answers(port) == 0  # every place was given back


def test_many_clients_get_their_own_answers(port):
    alone = [ask(port, words=f"number {number}")["choices"][0]["message"] for number in range(12)]
    found = [None] * 12

    def run(number):
        found[number] = ask(port, words=f"number {number}")["choices"][0]["message"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone


def test_a_failure_of_the_model_is_a_server_error_and_the_server_goes_on(port, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "choose", lambda logits, tickets: [None] * len(tickets))
        status, content = call(port, body())
        assert status == 500 and json.loads(content)["error"]["type"] == "server_error" and "not finite" in content.decode()
        status, content = call(port, body(stream=True))
        assert status == 200 and "not finite" in events(content)[-1]["error"]["message"]  # and no [DONE]
    assert ask(port)["choices"][0]["message"]["content"] and open_answers(port) == 0


def test_a_key_is_asked_for_where_there_is_one(engine):
    with served(engine, api_key="secret") as port:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer sécret".encode()}):
            status, content = call(port, body(), headers=headers)
            assert status == 401 and json.loads(content)["error"]["code"] == "invalid_api_key"
            assert call(port, path="/v1/models", headers=headers)[0] == 401
        assert call(port, body(), headers={"Authorization": "Bearer secret"})[0] == 200
        assert call(port, path="/health")[0] == 200


def test_too_large_a_request_is_refused(port, monkeypatch):
    monkeypatch.setattr("demo.server.MOST_BODY_BYTES", 2**20)
    status, content = call(port, b" " * (2 * 2**20))
    assert status == 413 and json.loads(content)["error"]["message"] == "the request has more than 1 MiB; send smaller pictures"


def test_stopping_the_server_ends_what_is_under_way(engine):
    with served(engine, limits=Limits(most_new_tokens=4000)) as port:
        content = json.dumps(body(max_tokens=4000, stream=True)).encode()
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: open_answers(port) == 1)
    client.close()
    assert engine._scheduler.is_idle


def test_a_drifted_model_is_refused_unless_told_otherwise(tiny_folder, tmp_path, capsys):
    import shutil

    model = shutil.copytree(tiny_folder, tmp_path / "model")
    path = next(path for path in (model / "preprocessor_config.json", model / "processor_config.json") if path.is_file())
    content = json.loads(path.read_text())
    (content if "image_std" in content else content["image_processor"])["image_std"] = [0.3, 0.3, 0.3]
    path.write_text(json.dumps(content))
    assert main(["--model", str(model), "--port", "0", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("server: ") and said.count("\n") == 1 and "is not what it was when it was saved" in said


def test_what_a_user_can_put_right_is_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    assert main(["--model", str(tmp_path), "--port", "0", "--max-open", "0"]) == 2
    assert "--max-open is 0; expected at least 1" in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "--port", "99999"]) == 2
    assert "99999 is no port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["--model", str(tmp_path)]) == 2
    assert "pip install 'nemotron-h-vision[demo]'" in capsys.readouterr().err


def test_it_starts_as_a_script(tmp_path):
    done = subprocess.run([sys.executable, SERVER, "--model", tmp_path, "--port", "0"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and f"server: {tmp_path} is no model checkpoint" in done.stderr and "Traceback" not in done.stderr
