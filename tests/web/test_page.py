"""The page in a browser: what a person does, and what he sees."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'tarvis[dev]'")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make setup-web"),
]
FRAMES, SIZE = 36, (270, 480)  # of the demo's clip
SECONDS = 120


class Server:
    """The server in a process of its own, as a person starts it."""

    def __init__(self, weights, data):
        self.command = [sys.executable, "-m", "tarvis.web", "--weights", str(weights), "--data", str(data)]
        self.command += ["--threads", "1"]
        self.port = 0
        self.start()

    def start(self):
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*self.command, "--port", str(self.port)], stderr=subprocess.PIPE, text=True, env=environment
        )
        line = next(line for line in self.process.stderr if line.startswith(("open ", "error")))
        self.url = line.split()[1]
        self.port = int(self.url.rstrip("/").rsplit(":", 1)[1])

    def children(self):
        """Processes of the server, the one with the network first."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(k) for k in task if b"spawn_main" in Path(f"/proc/{k}/cmdline").read_bytes()]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(weights, tmp_path_factory):
    server = Server(weights, tmp_path_factory.mktemp("web"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, server, **options):
    """The page of a new person. What the browser complains of is an error."""
    context = browser.new_context(
        **({"viewport": {"width": 1280, "height": 800}, "base_url": server.url} | options)
    )
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.said = said
    load(page, server)
    yield page
    context.close()
    assert [each for each in said if "net::ERR_" not in each and "status of 4" not in each] == []


def load(page, server):
    page.goto(server.url)
    page.wait_for_selector("body[data-ready]")


def value(page, what):
    return page.evaluate(f"(() => {{ const s = window.tarvis; return {what}; }})()")


def wait(page, what):
    end = time.monotonic() + SECONDS
    while not value(page, f"Boolean({what})"):
        assert time.monotonic() < end, what
        page.wait_for_timeout(20)


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


@pytest.fixture
def dog(page):
    """The page with the demo's clip."""
    page.click("#welcome-demo")
    wait(page, "s.image && s.session.num_frames")
    return page


def settle(page):
    """Wait until nothing is done any more, and it is drawn."""
    wait(page, "!s.busy && !(s.session.running && s.session.running.total)")
    page.wait_for_timeout(80)


def place(page, x, y):
    """Where a pixel of the video is on the screen."""
    return page.evaluate(
        "([x, y]) => { const b = document.getElementById('view').getBoundingClientRect();"
        f"const k = Math.min(b.width / {SIZE[1]}, b.height / {SIZE[0]});"
        f"return [b.left + (b.width - k * {SIZE[1]}) / 2 + (x + 0.5) * k, "
        f"b.top + (b.height - k * {SIZE[0]}) / 2 + (y + 0.5) * k]; }}",
        [x, y],
    )


def click(page, x, y):
    page.mouse.click(*place(page, x, y))
    settle(page)


def drag(page, *points):
    page.mouse.move(*place(page, *points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*place(page, *point), steps=4)
    page.mouse.up()
    settle(page)


def paint(page, *points):
    """A new object, painted."""
    page.click("[data-tool=brush]")
    drag(page, *points)


def code(page, frame=None, id=1):
    """The mask of an object where the page is, or at another frame."""
    if frame is None:
        return value(page, f"s.masks[{id}]")
    masks = page.request.get(f"/api/sessions/{value(page, 's.session.id')}/masks/{frame}/{frame}").json()
    return masks.get(str(frame), {}).get(str(id))


def mask_of(text):
    return coco.decode({"size": [*SIZE], "counts": text.encode()}) > 0


def drawn(page):
    """The canvas as it is seen, [H, W, 3]."""
    data = np.frombuffer(page.locator("#view").screenshot(), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(int)


def follow(page, button="#follow"):
    page.click(button)
    page.wait_for_timeout(150)
    settle(page)


def saved(page, kind):
    with page.expect_download() as download:
        page.select_option("#export", kind)
    return Path(download.value.path()).read_bytes()


def tools(page, name):
    page.click(f"[data-tool={name}]")


def test_points_boxes_brush_and_eraser_give_an_object(dog):
    before = drawn(dog)
    click(dog, 200, 150)
    assert value(dog, "s.session.things.length") == 1
    first = code(dog)
    assert first
    assert np.abs(drawn(dog) - before).max() > 60  # seen
    tools(dog, "remove")
    click(dog, 60, 60)
    assert value(dog, "s.session.prompts[1][0].negative.length") == 1
    tools(dog, "box")
    drag(dog, (100, 60), (300, 200))
    assert value(dog, "s.session.prompts[1][0].box") == pytest.approx([100.5, 60.5, 300.5, 200.5], abs=1.5)
    rows, columns = np.nonzero(mask_of(code(dog)))
    assert (rows.min() >= 58, rows.max() <= 202, columns.min() >= 98, columns.max() <= 302) == (True,) * 4
    tools(dog, "eraser")
    whole = mask_of(code(dog))
    y, x = np.argwhere(whole)[whole.sum() // 2].tolist()
    drag(dog, (x - 4, y), (x + 4, y))
    erased = whole & ~mask_of(code(dog))
    assert erased[y, x]
    assert not (mask_of(code(dog)) & ~whole).any()
    tools(dog, "brush")
    drag(dog, (400, 30), (440, 30))
    assert mask_of(code(dog))[30, 400:440].all()


def test_several_objects_have_names_colours_and_can_be_hidden(dog):
    paint(dog, (50, 50), (90, 50))
    dog.click("#new")
    wait(dog, "s.session.things.length === 2")
    paint(dog, (200, 100), (240, 100))
    shown = drawn(dog)
    row = dog.locator('#things li[data-id="2"]')
    row.get_by_label("Hide: object 2").click()
    settle(dog)
    assert np.abs(drawn(dog) - shown).max() > 40
    row.get_by_label("Show: object 2").click()
    settle(dog)
    row.get_by_label("Rename: object 2").click()
    dog.keyboard.type("ball")
    dog.keyboard.press("Enter")
    settle(dog)
    assert [thing["name"] for thing in value(dog, "s.session.things")] == ["object 1", "ball"]
    row.get_by_label("Colour of ball").fill("#ff0000")
    settle(dog)
    assert value(dog, "s.session.things[1].color") == "#ff0000"
    tools(dog, "pick")
    click(dog, 70, 50)
    assert value(dog, "s.selected") == 1
    click(dog, 220, 100)
    assert value(dog, "s.selected") == 2
    row.get_by_label("Delete: ball").click()
    settle(dog)
    assert [thing["id"] for thing in value(dog, "s.session.things")] == [1]


def test_following_correcting_and_both_directions(dog):
    dog.fill("#from", "10")
    page = dog
    for _ in range(10):
        page.click("#next")
    settle(page)
    assert value(page, "s.frame") == 10
    paint(page, (100, 100), (200, 100))
    given = code(page)
    follow(page)
    assert value(page, "s.session.known.frames") == [[10, 35]]
    assert value(page, "s.frame") == 35  # the picture went along
    page.click("#to-given")
    settle(page)
    assert value(page, "s.frame") == 10
    follow(page, "#back")
    assert value(page, "s.session.known.frames") == [[0, 35]]
    assert code(page, 10) == given
    before = [code(page, k) for k in range(20)]
    page.locator("#lanes").click(position={"x": lane(page, 20), "y": 4})
    settle(page)
    assert value(page, "s.frame") == 20
    paint(page, (300, 200), (340, 200))
    corrected = code(page)
    follow(page)
    assert [code(page, k) for k in range(20)] == before
    assert code(page, 20) == corrected
    page.click("#first")
    follow(page, "#both")
    wait(page, "s.session.known.frames.length === 1")


def lane(page, frame):
    return page.locator("#lanes").bounding_box()["width"] * (frame + 0.5) / FRAMES


def test_an_object_is_removed_from_a_frame_on(dog):
    paint(dog, (100, 100), (200, 100))
    follow(dog)
    dog.locator("#lanes").click(position={"x": lane(dog, 12), "y": 4})
    settle(dog)
    dog.get_by_label("Remove from this frame on: object 1").click()
    settle(dog)
    assert code(dog, 12) is None
    assert code(dog, 11) or code(dog, 0)
    assert value(dog, "s.session.given[1][12]") is False


def test_stopping_keeps_what_is_done(dog):
    paint(dog, (100, 100), (200, 100))
    dog.click("#follow")
    wait(dog, "s.session.running && s.session.running.done > 1")
    began = time.monotonic()
    dog.keyboard.press("Escape")
    settle(dog)
    assert time.monotonic() - began < 30
    done = value(dog, "s.session.known.frames")
    assert done[0][0] == 0
    assert done[0][1] >= 1


def test_undo_and_redo(dog):
    paint(dog, (100, 100), (200, 100))
    first = code(dog)
    drag(dog, (300, 200), (340, 200))
    second = code(dog)
    assert second != first
    dog.keyboard.press("Control+z")
    settle(dog)
    assert code(dog) == first
    dog.keyboard.press("Control+z")
    settle(dog)
    assert value(dog, "s.session.things.length") == 0
    dog.keyboard.press("Control+Shift+Z")
    settle(dog)
    dog.click("#redo")
    settle(dog)
    assert code(dog) == second


def test_reload_and_a_server_that_was_killed_bring_the_session_back(dog, server):
    paint(dog, (100, 100), (200, 100))
    dog.keyboard.press("ArrowRight")
    settle(dog)
    mask = code(dog, 0)
    dog.reload()
    dog.wait_for_selector("body[data-ready]")
    wait(dog, "s.session && s.image")
    assert value(dog, "s.frame") == 1
    assert code(dog, 0) == mask
    server.process.kill()
    server.process.wait()
    server.start()
    dog.reload()
    dog.wait_for_selector("body[data-ready]")
    wait(dog, "s.session && s.image")
    assert code(dog, 0) == mask
    dog.click("#first")
    follow(dog)
    assert value(dog, "s.session.known.frames") == [[0, 35]]


def test_a_network_process_that_is_killed_is_started_again(dog, server):
    paint(dog, (100, 100), (200, 100))
    dog.click("#follow")
    wait(dog, "s.session.running && s.session.running.done > 1")
    os.kill(server.children()[0], signal.SIGKILL)
    settle(dog)
    wait(dog, "s.session.known.frames[0][1] === 35")


def test_exports_hold_what_is_shown(dog):
    paint(dog, (100, 100), (200, 100))
    mask = mask_of(code(dog))
    tree = json.loads(saved(dog, "coco"))
    assert np.array_equal(coco.decode(tree["annotations"][0]["segmentation"]) > 0, mask)
    with zipfile.ZipFile(io.BytesIO(saved(dog, "png"))) as archive:
        assert len(archive.namelist()) == FRAMES
    state = saved(dog, "session")
    assert zipfile.ZipFile(io.BytesIO(state)).namelist()
    assert saved(dog, "overlay")[4:8] == b"ftyp"


def test_files_are_opened_and_bad_ones_refused_in_a_line(page, tmp_path):
    pictures = []
    for k in range(4):
        path = tmp_path / f"{k}.png"
        cv2.imwrite(str(path), np.full((40, 60, 3), 40 * k, np.uint8))
        pictures.append(path)
    page.set_input_files("#files", pictures)
    wait(page, "s.session && s.image && s.session.num_frames === 4")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    page.set_input_files("#files", bad)
    page.wait_for_selector("#toast:not(:empty)")
    wait(page, "document.getElementById('toast').textContent.includes('not a video')")
    assert value(page, "s.session.num_frames") == 4
    mask = tmp_path / "mask.png"
    cv2.imwrite(str(mask), np.pad(np.full((10, 10), 255, np.uint8), ((5, 25), (10, 40))))
    page.set_input_files("#mask-input", mask)
    wait(page, "s.session.things.length === 1")


def test_zoom_and_pan_keep_points_where_they_are(dog):
    middle = place(dog, 240, 135)
    dog.mouse.move(*middle)
    dog.mouse.wheel(0, -600)
    dog.wait_for_timeout(100)
    tools(dog, "brush")
    dog.mouse.click(*middle)
    settle(dog)
    rows, columns = np.nonzero(mask_of(code(dog)))
    assert (rows.mean(), columns.mean()) == pytest.approx((135, 240), abs=2)
    dog.keyboard.press("0")


def test_everything_goes_by_keyboard_alone(dog):
    dog.keyboard.press("4")
    for key in ("c", "Shift+ArrowRight", "Shift+ArrowDown", "Enter"):
        dog.keyboard.press(key)
        dog.wait_for_timeout(50)
    settle(dog)
    assert value(dog, "s.session.things.length") == 1
    dog.keyboard.press("c")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Shift+ArrowRight"):
        dog.keyboard.press(key)
        settle(dog)
    assert value(dog, "s.frame") == 11
    dog.keyboard.press("Home")
    settle(dog)
    dog.keyboard.press("f")
    dog.wait_for_timeout(150)
    settle(dog)
    assert value(dog, "s.session.known.frames") == [[0, 35]]
    dog.keyboard.press("h")
    settle(dog)
    assert value(dog, "s.session.things[0].is_hidden")
    dog.keyboard.press("n")
    settle(dog)
    dog.keyboard.press("[")
    assert value(dog, "s.selected") == 1
    dog.keyboard.press("r")
    dog.keyboard.type("do")
    dog.locator("#next").dispatch_event("click")  # the page is drawn anew while a name is typed
    settle(dog)
    dog.keyboard.type("g")
    dog.keyboard.press("Enter")
    settle(dog)
    assert value(dog, "s.session.things[0].name") == "dog"
    dog.keyboard.press("?")
    assert dog.locator("#keys").is_visible()
    dog.keyboard.press("Escape")
    dog.wait_for_selector("#keys", state="hidden")
    dog.keyboard.press("Delete")
    wait(dog, "s.session.things.length === 1")


def test_every_control_has_a_name(dog):
    paint(dog, (100, 100), (200, 100))
    nameless = dog.evaluate(
        "[...document.querySelectorAll('button, input, select, canvas')].filter((node) => !node.hidden && "
        "!(node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length || node.title))"
        ".map((node) => node.outerHTML)"
    )
    assert nameless == []


def test_a_phone_by_touch(browser, server):
    phone = {"viewport": {"width": 412, "height": 915}, "has_touch": True, "is_mobile": True}
    with opened(browser, server, **phone) as page:
        page.tap("#welcome-demo")
        wait(page, "s.image")
        assert page.evaluate("document.documentElement.scrollWidth") <= 412
        page.touchscreen.tap(*place(page, 200, 150))
        settle(page)
        assert value(page, "s.session.things.length") == 1
        page.tap("#follow")
        page.wait_for_timeout(150)
        settle(page)
        assert value(page, "s.session.known.frames") == [[0, 35]]


def test_two_people_see_nothing_of_each_other_and_both_are_served(browser, server):
    with opened(browser, server) as one, opened(browser, server) as two:
        for page, x in ((one, 100), (two, 300)):
            page.click("#welcome-demo")
            wait(page, "s.image")
            paint(page, (x, 100), (x + 60, 100))
        one.click("#follow")
        two.click("#follow")
        for page in (one, two):
            page.wait_for_timeout(150)
            settle(page)
            assert value(page, "s.session.known.frames") == [[0, 35]]
        assert code(one, 0) != code(two, 0)
        ids = [value(page, "s.session.id") for page in (one, two)]
        assert one.request.get(f"/api/sessions/{ids[1]}").status == 400


def test_two_tabs_of_a_person_show_the_same(dog, server):
    other = dog.context.new_page()
    other.goto(server.url + "#" + value(dog, "s.session.id"))
    other.wait_for_selector("body[data-ready]")
    wait(other, "s.session && s.image")
    paint(dog, (100, 100), (200, 100))
    wait(other, "s.masks[1]")
    assert re.fullmatch(r"object 1", other.locator("#things .select").inner_text())
