"""`pli studio` as a person and as a stranger meet it: the page in a real browser, and everything that it must not give away.

The browser is the system's Chromium, driven by Playwright; without one those tests are skipped. PLI_SCREENSHOTS=DIR keeps the pictures that are taken.
"""
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from pli.backbones.loading import load_backbone
from pli.world import save_world

pytest.importorskip("voila", reason="the page needs the extra pli[studio]")

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SECRET = "words that no page may show 5d41402a"
PATIENCE = 120   # seconds for what takes two on an idle machine


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "A drawn world, with names that would be HTML if anybody let them."
    folder = tmp_path_factory.mktemp("drawn")
    save_world(folder, pairs=30, queries=6, gallery_size=40)
    shutil.copy(folder / "images" / "pair_000000.png", folder / "images" / "<img src=x onerror=alert(1)>.png")
    (folder / "images" / "notes.txt").write_text(SECRET)
    return folder / "images"


class Server:
    "A running `pli studio`."
    def __init__(self, *words):
        command = [sys.executable, "-c", "import sys; from pli.cli.main import main; sys.exit(main())", "studio", *map(str, words), "--no-browser"]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=self.said, text=True, start_new_session=True,
                                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # tests that run in the background ignore it
        self.address = self.process.stdout.readline().strip()
        if not self.address: raise AssertionError(self.errors())
        self.port, self.token = int(re.search(r":(\d+)/", self.address)[1]), self.address.partition("token=")[2]
        self.cookie = {"Cookie": f"pli-studio-{self.port}={self.token}"}

    def ask(self, path: str, headers: dict = {}, method: str = "GET", timeout: float = PATIENCE) -> tuple[int, bytes, dict]:
        "One request, its path sent as it stands."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items(): connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally: connection.close()

    def errors(self) -> str:
        "What was printed on standard error so far."
        self.said.seek(0)
        return self.said.read()

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.communicate(timeout=60)
            return self.errors()
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture(scope="module")
def server(pictures, tmp_path_factory):
    "The drawn world as two models see it: one without any training, and the same with other weights for the words."
    tuned = load_backbone("pli-tiny-48")
    with torch.no_grad():
        for name, weight in tuned.model.named_parameters():
            if not name.startswith("visual.") and name != "logit_scale": weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    tuned.save(folder := tmp_path_factory.mktemp("models") / "tuned")
    running = Server(pictures, "--model", "pli-tiny-48", "--device", "cpu", "--second-model", folder)
    yield running
    running.stop()


# strangers

def spellings(pictures: Path) -> list[str]:
    "Addresses at which a file might be served, spelled in every way that a server might read."
    name, whole = "pair_000000.png", str(pictures / "pair_000000.png")
    places = ["/voila/files/", "/files/", "/voila/static/", "/voila/templates/pli/static/", "/voila/labextensions/", "/api/contents/", "/voila/api/contents/", "/voila/render/", "//", "/api/kernels/"]
    climbs = ["", "../" * 12, "%2e%2e/" * 12, "..%2f" * 12, "%252e%252e%252f" * 12, "..\\" * 12]
    files = [name, whole.lstrip("/"), "opening.json"]
    return [place + climb + file for place in places for climb in climbs for file in files]


def test_without_the_token_there_is_nothing_but_a_refusal(server, pictures):
    refusal = b"Open the address that pli studio printed, with its token. Nothing is shown without.\n"
    for path in [*spellings(pictures)[::17], "/", "/?token=", "/?token=x", "/?token=x&token=" + server.token, "/voila/static/voila.js", "/voila/files/pair_000000.png?token=" + server.token, "/api/kernels"]:
        for headers in ({}, {"Cookie": f"pli-studio-{server.port}=x"}, {"Authorization": f"token {server.token}x"}):
            status, body, _ = server.ask(path, headers)
            assert (status, body) in ((403, refusal), (400, b"")), path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"):
        status, body, _ = server.ask("/", method=method)
        assert status == 403 and body in (refusal, b"")


def test_with_the_token_no_file_is_served_either(server, pictures):
    picture = (pictures / "pair_000000.png").read_bytes()
    for path in spellings(pictures):
        if path == "/": continue
        status, body, _ = server.ask(path, server.cookie)
        assert status in (400, 403, 404, 405), (path, status, body[:80])
        assert picture[:60] not in body and b"Traceback" not in body and SECRET.encode() not in body and b"page_of_process" not in body and b"root:" not in body, path
    assert server.ask("/voila/static/voila.js", server.cookie)[0] == 200                       # its own program is
    assert "Traceback" not in server.errors()


def test_other_names_and_other_pages_are_refused(server):
    for headers, said in (({"Host": f"evil.example:{server.port}"}, b"this computer only"), ({"Host": "127.0.0.1"}, b"this computer only"), ({"Origin": "http://evil.example"}, b"Another page"),
                          ({"Origin": "null"}, b"Another page"), ({"Origin": f"http://127.0.0.1:{server.port + 1}"}, b"Another page")):
        status, body, _ = server.ask("/voila/static/voila.js", server.cookie | headers)
        assert status == 403 and said in body
    status, _, headers = server.ask("/", server.cookie | {"Host": f"evil.example:{server.port}"})
    assert status == 403
    status, _, headers = server.ask(f"/?token={server.token}")
    assert status == 302 and headers["Location"] == "/" and "HttpOnly" in headers["Set-Cookie"] and "SameSite=Lax" in headers["Set-Cookie"]
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def listening(process: int) -> set[str]:
    "Local addresses at which a process, or one that it started, takes connections."
    family, found = [process], set()
    for one in family: family += [int(word) for task in Path(f"/proc/{one}/task").glob("*/children") for word in task.read_text().split()]
    sockets = {os.readlink(link) for one in family for link in Path(f"/proc/{one}/fd").iterdir() if link.is_symlink() and os.path.lexists(link)}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets: found.add(words[1])
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_it_listens_on_loopback_only(server):
    found = listening(server.process.pid)
    assert f"0100007F:{server.port:04X}" in found and all(address.startswith("0100007F:") for address in found), found
    with pytest.raises(OSError): socket.create_connection(("127.0.0.2", server.port), timeout=5).close()


def test_another_page_cannot_use_the_socket_and_ours_cannot_run_code(server, tmp_path):
    import asyncio

    from tornado.httpclient import HTTPClientError, HTTPRequest
    from tornado.websocket import websocket_connect
    status, page, _ = server.ask("/", server.cookie)
    kernel = re.search(rb'"kernelId": "([0-9a-f-]{36})"', page)[1].decode()
    address, ours = f"ws://127.0.0.1:{server.port}/api/kernels/{kernel}/channels", {"Origin": f"http://127.0.0.1:{server.port}"}

    def message(kind: str, content: dict) -> str:
        return json.dumps({"header": {"msg_id": kind, "username": "", "session": "s", "msg_type": kind, "version": "5.3", "date": "2026-01-01T00:00:00Z"}, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell", "buffers": []})

    async def attempt():
        for headers in (ours, server.cookie | {"Origin": "http://evil.example"}, server.cookie | {"Origin": "null"}, server.cookie | ours | {"Host": "evil.example"}):
            with pytest.raises(HTTPClientError) as refused: await websocket_connect(HTTPRequest(address, headers=headers))
            assert refused.value.code == 403
        line = await websocket_connect(HTTPRequest(address, headers=server.cookie | ours))
        await line.write_message(message("execute_request", {"code": f"open({str(tmp_path / 'owned')!r}, 'w').close()", "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}))
        await line.write_message(message("kernel_info_request", {}))
        while json.loads(await asyncio.wait_for(line.read_message(), PATIENCE))["msg_type"] != "kernel_info_reply": pass      # what came before is done
        line.close()
    assert status == 200
    asyncio.run(attempt())
    assert not (tmp_path / "owned").exists()
    assert server.ask(f"/voila/api/shutdown/{kernel}", server.cookie, "POST")[0] == 204
    assert b"alert(1)" not in page and b"<script src=\"http" not in page and b"//cdn" not in page


@pytest.mark.parametrize("words, said", [(["--port", "99999"], "is not a port"), (["--second-model", "nowhere"], "no such folder"), (["--marks", "MARKS"], "holds something else than marks"), (["--model", "no-such-model"], "no-such-model")])
def test_what_cannot_be_is_told_in_the_terminal(pictures, capfd, tmp_path, words, said):
    from pli.cli.main import main
    (tmp_path / "marks.json").write_text('[{"id": 1}]')
    words = [str(tmp_path / "marks.json") if word == "MARKS" else word for word in words]
    try: status = main(["studio", str(pictures), *(["--model", "pli-tiny-48"] if "--model" not in words else []), *words])
    except SystemExit as stopped: status = stopped.code
    out, err = capfd.readouterr()
    assert status in (1, 2) and out == "" and said in err.splitlines()[-1]


ODD = [None, 5, "x", [], [1], {}, {"kind": 5}, {"kind": ["x"]}, {"kind": "event"}, {"kind": "event", "action": ["x"]}, {"kind": "event", "action": {}}, {"kind": "thumbnails"}, {"kind": "thumbnails", "ids": 5},
       {"kind": "thumbnails", "ids": ["x", None, [], 1.5, 2**70, -1, True]}, {"kind": "piece", "name": ["\ud800"], "turn": {}, "first": 1}, {"kind": "too large", "name": {}},
       *({"kind": "event", "action": action, "id": odd, "value": odd} for action in ("choose", "mark", "page", "look", "explain", "back", "forward") for odd in (None, "x", [], {}, 2**80, -5, 1.5, True, 10**9))]


def test_messages_that_the_page_does_not_send_leave_no_trace(pictures, monkeypatch):
    import io

    from pli.studio.page import Studio
    studio, said = Studio(pictures, model="pli-tiny-48", device="cpu"), io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", said)
    studio.controls.words.value = "a star"
    for odd in ODD:
        studio.heard(0, odd)
        for pieces in ([], [b"x"], [b"x", b"y"]): studio.receive(None, odd, pieces)
        assert said.getvalue() == "" and "should not" not in studio.says.value, odd
    assert studio.session.query.words == "a star" and studio.grids[0].pages > studio.grids[0].page >= 0 and not len(studio.session.marks)
    studio.close()


def test_an_empty_folder_and_a_port_that_is_taken(tmp_path, capfd):
    from pli.cli.main import main
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["studio", str(tmp_path), "--model", "pli-tiny-48", "--port", str(other.getsockname()[1])]) == 1
        assert "cannot be used" in capfd.readouterr()[1]
    assert main(["studio", str(tmp_path), "--model", "pli-tiny-48"]) == 1
    assert "holds no picture that can be searched" in capfd.readouterr()[1]


def test_when_it_ends_nothing_is_left(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    running = Server(pictures, "--model", "pli-tiny-48", "--device", "cpu", "--no-index")
    assert running.ask("/", running.cookie)[0] == 200
    family = [int(word) for task in Path(f"/proc/{running.process.pid}/task").glob("*/children") for word in task.read_text().split()]
    assert family and any(tmp_path.iterdir())
    assert "stopped" in running.stop()
    ends = time.time() + 30
    while any(Path(f"/proc/{child}").exists() for child in family) and time.time() < ends: time.sleep(0.2)
    assert not any(Path(f"/proc/{child}").exists() for child in family) and not [left.name for left in tmp_path.iterdir() if left.name.startswith("pli-")]


# a person with a browser: one page for all that follows, because every page is a process that loads a model

@pytest.fixture(scope="module")
def page(server):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None: pytest.skip("no Chromium on this system: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests are driven by playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])
        opened = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light").new_page()
        opened.set_default_timeout(PATIENCE * 1000)
        opened.asked, opened.faults = [], []
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.on("websocket", lambda line: opened.asked.append(line.url))
        opened.on("pageerror", lambda error: opened.faults.append(str(error)))
        opened.on("dialog", lambda dialog: (opened.faults.append(dialog.message), dialog.dismiss()))
        opened.on("console", lambda said: opened.faults.append(said.text) if said.type == "error" else None)
        opened.goto(server.address)
        opened.wait_for_selector(".pli-cell img[src]")
        yield opened
        browser.close()


def ranking(page, side: int = 0) -> list[str]: return page.locator(".pli-grid").nth(side).locator(".pli-cell").evaluate_all("cells => cells.map(cell => cell.dataset.id)")


def until(page, what: str, argument=None) -> None: page.wait_for_function(what, arg=argument, polling=100)


def changed(page, before: list[str]) -> None:
    until(page, "before => { const now = [...document.querySelector('.pli-grid').querySelectorAll('.pli-cell')].map(cell => cell.dataset.id); return now.length && String(now) !== String(before); }", before)


def words(page): return page.get_by_label("Words: what to look for, or what to change in the picture")


@pytest.mark.browser
def test_the_address_keeps_no_token_and_names_stay_text(page):
    assert "token" not in page.url and page.title() == "pli studio"
    page.get_by_label("Show pictures whose name or folder contains").fill("onerror")
    until(page, "() => document.querySelectorAll('.pli-cell').length === 1")
    assert page.inner_text(".pli-name") == "<img src=x onerror=alert(1)>.png" and page.locator(".pli-cell img").count() == 1
    page.get_by_label("Show pictures whose name or folder contains").fill("")
    until(page, "() => document.querySelectorAll('.pli-cell').length === 48")


@pytest.mark.browser
def test_words_weight_a_click_and_the_way_back(page):
    words(page).fill("in red")
    page.wait_for_selector(".pli-rank:text-is('1')")
    first = ranking(page)
    page.locator(".pli-pick").nth(2).click()                                   # the third result is the next picture
    changed(page, first)
    assert "in red" in page.inner_text(".pli-grid-title")
    both = ranking(page)
    handle = page.get_by_role("slider").first
    handle.focus()
    for _ in range(18): page.keyboard.press("ArrowLeft")
    until(page, "() => document.querySelector('.pli-copy pre').textContent.includes('--weight=0.1 ')")     # all that was dragged has arrived
    changed(page, both)
    until(page, "() => [...document.querySelectorAll('.pli-moved')].some(badge => badge.textContent.includes('▲'))")
    light = ranking(page)
    page.locator(".pli-pick").nth(1).click()
    changed(page, light)
    page.get_by_role("button", name="◀ Back").click()
    until(page, "light => String([...document.querySelector('.pli-grid').querySelectorAll('.pli-cell')].map(cell => cell.dataset.id)) === String(light)", light)
    assert words(page).input_value() == "in red"
    page.get_by_role("button", name="Forward ▶").click()
    changed(page, light)


@pytest.mark.browser
def test_keys_alone(page):
    before = ranking(page)
    page.locator(".pli-pick[tabindex='0']").first.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("y")
    until(page, "() => document.querySelectorAll('.pli-cell')[1].dataset.mark === 'right'")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    until(page, "() => document.querySelectorAll('.pli-cell')[2].dataset.mark === 'wrong'")
    assert page.evaluate("() => document.activeElement.closest('.pli-cell').dataset.id") == before[2]
    page.keyboard.press("PageDown")
    changed(page, before)
    page.keyboard.press("PageUp")
    until(page, "before => document.querySelector('.pli-cell').dataset.id === before[0]", before)
    page.locator(".pli-pick[tabindex='0']").first.focus()
    page.keyboard.press("Enter")
    changed(page, before)
    page.locator(".pli-pick[tabindex='0']").first.focus()
    page.keyboard.press("[")
    until(page, "before => document.querySelector('.pli-cell').dataset.id === before[0]", before)


@pytest.mark.browser
def test_marks_are_saved_for_evaluate(page, pictures):
    page.get_by_role("button", name="Right and wrong").click()
    page.get_by_role("button", name="Save the marks").click()
    page.wait_for_selector(".pli-done")
    assert "pli evaluate" in page.inner_text(".pli-done")
    records = json.loads((pictures / ".pli" / "queries.json").read_text())
    assert len(records) == 1 and len(records[0]["gt_img_ids"]) == len(records[0]["wrong_img_ids"]) == 1
    page.get_by_role("button", name="Right and wrong").click()


@pytest.mark.browser
def test_why_and_what_the_model_sees_and_the_command(page, tmp_path):
    page.locator(".pli-why").first.click()
    page.wait_for_selector(".pli-figure img[src]")
    assert "of its score, " in page.get_attribute(".pli-figure img", "alt")
    page.screenshot(path=Path(os.environ.get("PLI_SCREENSHOTS", tmp_path)) / "studio-why.png")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="What the model sees").click()
    page.get_by_label("What is taken away").select_option("squares at random")
    page.wait_for_selector(".pli-hidden img[alt*='squares at random']")
    page.get_by_role("button", name="The same search elsewhere").click()
    page.wait_for_selector(".pli-copy pre")
    assert page.inner_text(".pli-copy pre").startswith("pli search ")


@pytest.mark.browser
def test_what_was_just_typed_counts_when_something_is_clicked(page):
    "The page waits a moment for the next letter; a click in that moment used to put the old words back."
    before = ranking(page)
    words(page).fill("in green")
    page.locator(".pli-pick").nth(1).click()
    changed(page, before)
    assert words(page).input_value() == "in green" and "in green" in page.inner_text(".pli-grid-title")
    page.get_by_label("Words to avoid (commas part several)").fill("a star")
    page.locator(".pli-act.pli-yes").nth(1).click()
    until(page, "() => document.querySelectorAll('.pli-cell')[1].dataset.mark === 'right' || document.querySelector('.pli-grid-title').textContent.includes('a star')")
    until(page, "() => document.querySelector('.pli-grid-title').textContent.includes('a star')")
    assert page.get_by_label("Words to avoid (commas part several)").input_value() == "a star"
    page.locator(".pli-why").first.click()
    page.wait_for_selector(".pli-figure img[src]")
    assert "; the words to avoid left" in page.get_attribute(".pli-figure img", "alt")
    page.screenshot(path=Path(os.environ.get("PLI_SCREENSHOTS", tempfile.gettempdir())) / "studio-avoid.png")
    page.get_by_label("Words to avoid (commas part several)").fill("")
    until(page, "() => !document.querySelector('.pli-grid-title').textContent.includes('a star')")
    assert page.locator(".pli-figure img").count() == 0                        # an explanation goes with its question


PASTE = """async () => {
    const canvas = document.createElement("canvas"), data = new DataTransfer();
    canvas.width = canvas.height = 40;
    data.items.add(new File([await new Promise((done) => canvas.toBlob(done))], "pasted.png", { type: "image/png" }));
    document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
}"""


@pytest.mark.browser
def test_a_picture_is_pasted_wherever_the_focus_is(page):
    page.evaluate(PASTE)
    page.wait_for_selector(".pli-reference figcaption:has-text('pasted.png')")


@pytest.mark.browser
def test_a_picture_of_more_than_ten_mebibytes(page, tmp_path):
    large = tmp_path / "large & <b>bold.png"
    Image.frombytes("RGB", (2100, 2100), os.urandom(3 * 2100 * 2100)).save(large, compress_level=0)
    assert large.stat().st_size > 12 * 2**20
    before = ranking(page)
    page.set_input_files("input[type=file]", large)
    page.wait_for_selector(".pli-reference figcaption:has-text('large & <b>bold.png')")
    changed(page, before)
    assert "large & <b>bold.png" in page.inner_text(".pli-grid-title")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector(".pli-error:has-text('broken.png cannot be read as a picture')")


@pytest.mark.browser
def test_two_models_and_how_it_looks(page, tmp_path):
    folder = Path(os.environ.get("PLI_SCREENSHOTS", tmp_path))
    assert page.locator(".pli-grid:visible").count() == 2 and ranking(page, 0) != ranking(page, 1)
    for width in (400, 1400):
        for scheme in ("light", "dark"):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"studio-{width}-{scheme}.png", full_page=width == 400)
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
            back = page.evaluate("() => getComputedStyle(document.querySelector('.pli-studio')).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == (scheme == "dark")
    page.set_viewport_size({"width": 400, "height": 900})
    page.wait_for_timeout(300)
    for _ in range(page.locator(".pli-fold:has-text('▾')").count()): page.locator(".pli-fold:has-text('▾')").first.click(), page.wait_for_timeout(500)
    folds = page.locator(".pli-fold").evaluate_all("folds => folds.map(fold => fold.getBoundingClientRect().top)")
    assert page.evaluate("() => document.querySelector('.pli-reference img').getBoundingClientRect().height") <= 72 and len(folds) == 4 and folds[0] == folds[1]
    assert all(page.locator(".pli-fold").evaluate_all("folds => folds.map(fold => fold.scrollWidth <= fold.clientWidth + 1)"))     # and nothing is cut off
    page.set_viewport_size({"width": 1400, "height": 900})
    page.wait_for_timeout(300)
    across = page.evaluate("() => [...document.querySelectorAll('.pli-grid')].map(grid => grid.getBoundingClientRect().left)")
    assert across[0] < across[1]                                               # side by side where there is room


@pytest.mark.browser
def test_words_that_leave_nothing_and_a_picture_that_vanished(page, pictures):
    page.get_by_role("button", name="Only some of the pictures").click()
    field = page.get_by_label("File names like")
    field.fill("nothing-is-called-so*")
    field.press("Enter")
    page.wait_for_selector(".pli-error:has-text('no picture is left to search')")
    field.fill("")
    field.press("Enter")
    page.wait_for_selector(".pli-rank:text-is('1')")
    name = page.inner_text(".pli-name >> nth=0")
    (pictures / name).rename(pictures.parent / name)
    try:
        page.locator(".pli-pick").first.click()
        page.wait_for_selector(".pli-error:has-text('is no longer there')")
    finally: (pictures.parent / name).rename(pictures / name)


@pytest.mark.browser
def test_marks_that_are_not_saved_are_not_lost_without_a_question(page, server, pictures):
    "Voilà ends a page's process as soon as the browser thinks of leaving; ours has to live on where the answer is to stay."
    other, asked = page.context.new_page(), []
    other.set_default_timeout(PATIENCE * 1000)
    other.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
    other.goto(f"http://127.0.0.1:{server.port}/")
    other.wait_for_selector(".pli-cell img[src]")
    other.locator(".pli-pick").nth(3).click()
    words(other).fill("in yellow")
    other.wait_for_selector(".pli-rank:text-is('1')")
    until(other, "() => document.querySelector('.pli-grid-title').textContent.includes('in yellow')")
    mark = lambda place: (other.locator(".pli-act.pli-yes:visible").nth(place).click(), until(other, "place => document.querySelectorAll('.pli-cell')[place].dataset.mark === 'right'", place))
    mark(0)
    other.get_by_role("button", name="Right and wrong").click()
    other.wait_for_selector(".pli-more :text('1 not saved yet')")              # the fold opens when the process has answered
    other.evaluate("() => { window.stayed = true; setTimeout(() => location.reload(), 50); }")
    ends = time.time() + PATIENCE
    while not asked and time.time() < ends: other.wait_for_timeout(100)
    mark(1)                                                                    # the process is still there
    assert asked == ["beforeunload"] and other.evaluate("() => window.stayed")
    other.get_by_role("button", name="Save the marks").click()
    other.wait_for_selector(".pli-done")
    assert "not saved yet" not in other.inner_text(".pli-more") and any(record["relative_caption"] == "in yellow" for record in json.loads((pictures / ".pli" / "queries.json").read_text()))
    other.evaluate("() => { setTimeout(() => location.reload(), 50); }")
    other.wait_for_function("() => !window.stayed && document.querySelector('.pli-cell img[src]')")
    assert asked == ["beforeunload"]                                           # nothing would have been lost
    other.close()


@pytest.mark.browser
def test_nothing_was_asked_of_another_computer_and_nothing_failed(page, server):
    outside = [url for url in page.asked if not url.startswith((f"http://127.0.0.1:{server.port}/", f"ws://127.0.0.1:{server.port}/", "data:", "blob:"))]
    assert page.asked and not outside
    assert not page.faults
    assert not [url for url in page.asked if re.search(r"\.(woff2?|ttf|otf|eot)\b", url)]
