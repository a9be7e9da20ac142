"""The page's server by real requests: streaming, stopping, two models, what is refused, what is bounded."""

import http.client
import json
import re
import socket
import threading
import time

import pytest

import generate
from talk import web
from tests.helpers import ROOT, run_train, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config file, run folder) of two steps."""
    config = small_run(tmp_path_factory.mktemp("web") / "small", max_steps=2, save_interval=1)
    return config, config.replace("tiny.py", "run")


@pytest.fixture
def server(run):
    folder = run[1]
    args = generate.parse([folder, "--web", "--port=0", "--device=cpu", "--max_new_tokens=12", "--seed=4"])
    made = web.Server([web.Served(path, args) for path in (folder, f"{folder}/checkpoints/step_00000001")], args)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.close()


def connect(server):
    return http.client.HTTPConnection(*server.server_address, timeout=60)


def ask(server, body, method="POST", path="/generate", **headers):
    """The open response to a request; body: an object, or bytes as they stand. A header None is left out."""
    connection = connect(server)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Host": f"127.0.0.1:{server.server_address[1]}", "Content-Type": "application/json",
               "Content-Length": str(len(data or b""))} | {name.replace("_", "-"): v for name, v in headers.items()}
    connection.putrequest(method, path, skip_host=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data)
    return connection.getresponse()


def answer(server, **body):
    """(lines, the whole text) of an answer that ends."""
    response = ask(server, body)
    assert response.status == 200, response.read()
    lines = [json.loads(line) for line in response.read().splitlines()]
    return lines, "".join(line.get("text", "") for line in lines)


def expected(folder, prompt, **options):
    model, encoder = generate.load(folder, "cpu")
    return "".join(generate.stream_text(model, encoder, generate.encode_prompt(encoder, prompt), **options))


def settles(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_the_page_and_what_it_asks_for(server, run):
    page = ask(server, None, "GET", "/")
    policy = page.headers["Content-Security-Policy"]
    text = page.read().decode()
    assert page.status == 200 and text == web.PAGE.read_text(encoding="utf-8")
    assert "default-src 'none'" in policy and "//" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing else
    told = json.loads(ask(server, None, "GET", "/models").read())
    assert [(model["name"], model["step"]) for model in told["models"]] == [
        (run[1], 2), (f"{run[1]}/checkpoints/step_00000001", 1)]
    assert told["defaults"]["max_new_tokens"] == 12 and told["defaults"]["seed"] == 4
    assert server.server_address[0] == "127.0.0.1"
    (told,) = re.findall("-d '(.*)'", (ROOT / "docs/generate-and-export.md").read_text(encoding="utf-8"))
    assert len(answer(server, **json.loads(told))[0]) > 3
    for path in ("/", "/models", "/nothing"):  # HEAD says what GET would, without the body
        got, headed = ask(server, None, "GET", path), ask(server, None, "HEAD", path)
        assert headed.status == got.status == (404 if path == "/nothing" else 200)
        assert headed.headers["Content-Length"] == str(len(got.read())) and headed.read() == b""


def test_a_text_comes_in_pieces_and_is_that_of_the_command_line(server, run):
    options = dict(max_new_tokens=20, temperature=1.0, top_k=40, top_p=0.95, seed=3)
    lines, text = answer(server, prompt="ab", **options)
    assert text == expected(run[1], "ab", **options) and lines[0]["model"]["step"] == 2
    assert lines[-1]["end"] == "length" and lines[-1]["tokens"] == 20 and lines[-1]["seconds"] > 0
    assert len([line for line in lines if "text" in line]) == 21  # one a token, and the rest of a character
    response = ask(server, {"prompt": "ab", "max_new_tokens": web.MOST_TOKENS})
    assert "model" in json.loads(response.readline()) and "text" in json.loads(response.readline())
    assert server.answers._value == web.MOST_ANSWERS - 1  # the first pieces are here, the text is not at its end
    response.close()


def test_two_models_answer_side_by_side(server, run):
    folders, found = [run[1], f"{run[1]}/checkpoints/step_00000001"], {}
    options = dict(max_new_tokens=30, temperature=0.0)
    threads = [threading.Thread(target=lambda i=i: found.update({i: answer(server, model=i, prompt="x", **options)}))
               for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i][1] for i in (0, 1)] == [expected(folder, "x", **options) for folder in folders]
    assert [found[i][0][0]["model"]["step"] for i in (0, 1)] == [2, 1]


def test_hanging_up_stops_the_text(server, monkeypatch):
    plain, made = web.stream, []

    def counted(*args, **options):
        for piece in plain(*args, **options):
            made.append(piece)
            yield piece

    monkeypatch.setattr(web, "stream", counted)
    response = ask(server, {"max_new_tokens": web.MOST_TOKENS})
    for _ in range(4):
        response.readline()
    response.close()
    assert settles(lambda: server.answers._value == web.MOST_ANSWERS) and 3 <= len(made) < web.MOST_TOKENS / 4


def test_a_context_that_is_full_is_told(server):
    lines, _ = answer(server, prompt="y" * 100, max_new_tokens=70)
    notes = [line["note"] for line in lines if "note" in line]
    assert notes[0] == "the prompt has 101 tokens: only the last 64 are read" and "is full" in notes[1]


BAD = [
    (b"{", 400, "no JSON"), (b"[" * 60_000, 400, "no JSON"), (b"\xff", 400, "no JSON"), ([], 400, "expected an object"),
    ({"prompt": 3}, 400, "prompt must be text"), (b'{"prompt": "\\ud800"}', 400, "prompt must be text"),
    ({"model": 2}, 400, "from 0 to 1"), ({"model": -1}, 400, "from 0"), ({"model": True}, 400, "whole number"),
    ({"max_new_tokens": 4097}, 400, "from 1 to 4096"), ({"max_new_tokens": 0}, 400, "from 1"),
    ({"seed": 2**63}, 400, "seed"), ({"seed": 1.5}, 400, "seed"), ({"seed": None}, 400, "seed"),
    ({"temperature": -1}, 400, "temperature=-1 must lie between"), (b'{"temperature": NaN}', 400, "must lie between"),
    ({"temperature": None}, 400, "temperature must be a number"), ({"top_k": 0}, 400, "top_k"),
    ({"top_k": 1.5}, 400, "whole number or none"), ({"top_p": "1"}, 400, "top_p"), ({"top_p": 1.1}, 400, "top_p"),
    ({"use_cache": False}, 400, "expected an object with"), ({"prompt": "x" * web.MOST_BYTES}, 413, "131,072 bytes"),
]


@pytest.mark.parametrize("body, status, said", BAD, ids=[str(row[0])[:30] for row in BAD])
def test_a_bad_request_is_refused_with_its_reason(server, body, status, said):
    response = ask(server, body)
    assert response.status == status and said in json.loads(response.read())["error"]


def test_strangers_are_refused(server):
    port = server.server_address[1]
    for headers in ({"Host": f"evil.example:{port}"}, {"Host": None}, {"Host": "127.0.0.1.evil.example"},
                    {"Host": f"0.0.0.0:{port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
                    {"Origin": f"http://localhost:{port}"}, {"Origin": f"https://127.0.0.1:{port}"}):
        assert ask(server, {"max_new_tokens": 1}, **headers).status == 403, headers
        assert ask(server, None, "GET", "/models", **headers).status == 403, headers
    for headers in ({"Origin": f"http://127.0.0.1:{port}"}, {"Host": "localhost:9000", "Origin": "http://localhost:9000"}):
        assert ask(server, {"max_new_tokens": 1}, **headers).status == 200, headers
    assert ask(server, {}, Content_Type="text/plain").status == 415  # what another page may send unasked
    assert ask(server, {}, Content_Length=None).status == 411 and ask(server, {}, Content_Length="-1").status == 411
    assert ask(server, None, "GET", "/../errors.py").status == 404 and ask(server, {}, path="/models").status == 404
    assert ask(server, None, "OPTIONS", "/generate").status == 501


def test_texts_connections_and_patience_are_bounded(server, monkeypatch, capfd):
    for _ in range(web.MOST_ANSWERS):
        server.answers.acquire()
    response = ask(server, {})
    assert response.status == 503 and "4 texts are being written" in json.loads(response.read())["error"]
    server.answers.release(web.MOST_ANSWERS)
    for _ in range(web.MOST_CONNECTIONS):
        server.connections.acquire(timeout=60)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask(server, {})
    server.connections.release(web.MOST_CONNECTIONS)
    monkeypatch.setattr(web.Handler, "timeout", 0.2)
    for sent in (b"", b"GET / HTTP/1.1\r\nHost: local", b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
                 b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"):  # and no more
        with socket.create_connection(server.server_address, timeout=60) as slow:
            slow.sendall(sent)
            assert slow.recv(100) == b""  # hung up
    assert settles(lambda: server.connections._value == web.MOST_CONNECTIONS) and capfd.readouterr().err == ""


def test_a_run_is_read_anew_when_it_has_saved(server, run):
    """While it trains: what is being written has another name, and is not seen."""
    config, folder = run
    before, text = answer(server, max_new_tokens=12, temperature=0)
    run_train(config, "--resume", "--max_steps=3")
    after, _ = answer(server, max_new_tokens=12, temperature=0)
    other, same = answer(server, model=1, max_new_tokens=1)
    assert [lines[0]["model"]["step"] for lines in (before, after, other)] == [2, 3, 1]
    assert server.models[0].model.source.name == "step_00000003"


def test_errors_of_the_model_reach_the_page(server, monkeypatch):
    def gone(*args):
        raise FileNotFoundError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(web, "load", gone)
        patch.setattr(server.models[0], "newest", None)
        response = ask(server, {})
        assert response.status == 409 and json.loads(response.read()) == {"error": "gone"}
    import torch

    model = server.models[0].model
    monkeypatch.setattr(model.lm_head.weight, "data", torch.full_like(model.lm_head.weight, float("nan")))
    lines, _ = answer(server)
    assert "NaN or infinite logits" in lines[-1]["error"]


def test_a_port_that_is_taken_and_ctrl_c(run, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(generate.UserError, match=f"--port={port + 1}, or --port=0"):
            generate.main([run[1], "--web", f"--port={port}", "--device=cpu"])
    monkeypatch.setattr(web.Server, "serve_forever", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    generate.main([run[1], "--web", run[1], "--port=0", "--device=cpu"])
    assert f"/  talks to {run[1]} and {run[1]}; for this machine's browser" in capsys.readouterr().out
