"""The page in a real browser, headless Chromium driven by chromedriver (W3C WebDriver): idle, streaming, stopping, two
models, a phone, the dark. SCREENSHOTS=folder keeps what it shows.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import generate
from talk import web
from tests.helpers import small_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not BROWSER or not shutil.which("chromedriver"), reason="no Chromium with chromedriver "
                                "here: apt-get install chromium chromium-driver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the standard gives an element's id


class Browser:
    """One session of a browser."""

    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                self("GET", "/status")
                break
            except OSError:
                assert time.monotonic() < end, "chromedriver does not start"
                time.sleep(0.05)
        options = {"binary": BROWSER, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/session/" + self("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def __call__(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def close(self):
        try:
            self("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.wait()

    def run(self, script, *args):
        return self("POST", "/execute/sync", {"script": script, "args": args})

    def devtools(self, command, **params):
        return self("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def element(self, selector):
        return "/element/" + self("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self("POST", self.element(selector) + "/click", {})

    def type(self, selector, text):
        element = self.element(selector)
        self("POST", element + "/clear", {})
        self("POST", element + "/value", {"text": text})

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def until(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self.texts("article")
            time.sleep(0.05)
        return value

    def picture(self, name, width, height, dark=False):
        """Show the page at a size; returns how wide it is then, and its background."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        shown = base64.b64decode(self("GET", "/screenshot"))
        if folder := os.environ.get("SCREENSHOTS"):
            (Path(folder) / f"{name}.png").write_bytes(shown)
        assert shown.startswith(b"\x89PNG") and len(shown) > 5000
        return self.run("return [document.documentElement.scrollWidth, "
                        "getComputedStyle(document.body).backgroundColor]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of two models to talk to; TALK_TO=run[,run] names others, for pictures."""
    if given := os.environ.get("TALK_TO"):
        return given.split(",")
    run = small_run(tmp_path_factory.mktemp("page") / "small", max_steps=2, save_interval=1).replace("tiny.py", "run")
    return [run, f"{run}/checkpoints/step_00000001"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def serve(monkeypatch, folders):
    """serve(n): the address of a server of n models, which makes no more than a token in `pace` seconds."""
    servers, plain, pace = [], web.stream, [0.0]

    def slow(*args, **options):
        for piece in plain(*args, **options):
            time.sleep(pace[0])
            yield piece

    def start(n):
        args = generate.parse([folders[0], "--web", "--port=0", "--device=cpu", "--max_new_tokens=120", "--top_k=50"])
        server = web.Server([web.Served(folder, args) for folder in folders[:n]], args)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/"

    monkeypatch.setattr(web, "stream", slow)
    start.pace = pace
    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.close()


def words(folder, prompt, **options):
    model, encoder = generate.load(folder, "cpu")
    return prompt + "".join(generate.stream_text(model, encoder, generate.encode_prompt(encoder, prompt), **options))


def test_a_text_is_asked_for_read_stopped_and_gone_on_from(browser, serve, folders):
    browser("POST", "/url", {"url": serve(1)})
    browser.until(lambda: browser.texts("h2"))
    assert browser.texts("h2")[0].startswith(str(folders[0])) and browser.texts("footer p") == ["Nothing written yet"]
    width, light = browser.picture("idle", 1200, 760)
    assert width <= 1200 and browser.picture("idle-dark", 1200, 760, dark=True)[1] != light
    assert browser.picture("idle-phone", 390, 844)[0] <= 390

    browser.type("#prompt", "def __init__(self")
    browser.click("#go")
    browser.until(lambda: "length reached" in browser.texts("footer p")[0])
    options = dict(max_new_tokens=120, temperature=0.8, top_k=50, seed=0)
    assert browser.texts("pre") == [words(folders[0], "def __init__(self", **options)]
    browser.picture("answered", 1200, 760)

    serve.pace[0] = 0.05
    browser.click("#go")
    browser.until(lambda: len(browser.texts("pre")[0]) > len("def __init__(self") + 10)
    assert browser.texts("footer p") == ["Writing …"] and browser.picture("streaming", 1200, 760)[0] <= 1200
    browser.click("#stop")
    stopped = browser.until(lambda: browser.texts("footer p")[0].startswith("Stopped") and browser.texts("pre")[0])
    time.sleep(0.2)
    assert browser.texts("pre") == [stopped] and len(stopped) < len(words(folders[0], "def __init__(self", **options))
    browser.click("article button")
    assert browser.run("return document.getElementById('prompt').value") == stopped


def test_two_models_side_by_side_and_below_each_other_on_a_phone(browser, serve, folders):
    browser("POST", "/url", {"url": serve(2)})
    browser.until(lambda: len(browser.texts("h2")) == 2)
    browser.type("#temperature", "0")
    browser.type("#top_k", "")
    browser.type("#prompt", "import")
    browser.type("#max_new_tokens", "40")
    browser("POST", browser.element("#prompt") + "/value", {"text": "\ue009\ue007"})  # Ctrl and Enter
    browser.until(lambda: all("tokens/s" in text for text in browser.texts("footer p")))
    options = dict(max_new_tokens=40, temperature=0.0)
    assert browser.texts("pre") == [words(folder, "import", **options) for folder in folders[:2]]
    beside = "return [...document.querySelectorAll('article')].map(e => e.getBoundingClientRect().top)"
    assert browser.picture("two", 1200, 760)[0] <= 1200 and len(set(browser.run(beside))) == 1
    assert browser.picture("two-phone", 390, 1100, dark=True)[0] <= 390 and len(set(browser.run(beside))) == 2
    browser.type("#max_new_tokens", "0")
    browser.click("#go")  # the browser itself says what is wrong
    assert browser.run("return document.querySelector('#max_new_tokens').validationMessage") != ""
    assert not [line for line in browser("POST", "/se/log", {"type": "browser"}) if line["level"] == "SEVERE"]


def test_a_server_that_has_gone_is_told(browser, serve):
    browser("POST", "/url", {"url": serve(1)})
    browser.until(lambda: browser.texts("h2"))
    browser.run("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    browser.click("#go")
    browser.until(lambda: "is generate.py still running?" in browser.texts("footer p")[0])
    browser.picture("gone", 390, 844)


def test_every_field_and_button_has_a_name(browser, serve):
    browser("POST", "/url", {"url": serve(2)})
    browser.until(lambda: len(browser.texts("h2")) == 2)
    tree = browser.devtools("Accessibility.getFullAXTree")["nodes"]
    found = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node.get("ignored")]
    names = {role: [name for kind, name in found if kind == role] for role in ("textbox", "spinbutton", "button")}
    assert names["textbox"] == ["Text to continue"] and names["button"] == ["Continue", "Stop"]
    assert names["spinbutton"] == ["Temperature", "Top-k", "Top-p", "Tokens at most", "Seed"]
