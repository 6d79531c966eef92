"""The page's server: what people do, in requests; and what it refuses."""

import base64
import io
import json
import re
import threading
import time
import zipfile
from functools import partial

import cv2
import numpy as np
import pytest

from tarvis.data.synthetic import synthetic_clip
from tarvis.files import rle
from tarvis.files.pictures import encode_ids, voc_palette
from tarvis.structures import Track, VideoResult
from tarvis.video.results import ResultFiles
from tarvis.web.app import MOST_LISTENERS, MOST_UPLOADS
from tarvis.web.jobs import Find, Follow, Give
from tarvis.web.processes import DiedError, Process, Queue, Work
from tarvis.web.store import Limits
from tests.web.conftest import ORIGIN, Inline

FRAMES, SIZE = 9, (48, 64)


class Slow(Inline):
    """Answers so slowly that something can be done meanwhile."""

    def ask(self, job):
        for answer in super().ask(job):
            yield answer
            time.sleep(0.05)


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(1, FRAMES, SIZE, 2, come_and_go=False)


@pytest.fixture(scope="module")
def images(clip):
    """Names and bytes of the frames."""
    return {
        f"{k}.png": cv2.imencode(".png", frame[..., ::-1])[1].tobytes() for k, frame in enumerate(clip.frames)
    }


def uploaded(client, files, name="clip"):
    """The state of a session of such files; the answer itself where it is refused."""
    id_ = client.post("/api/sessions", json={}).json()["id"]
    for each, data in files.items():
        sent = client.post(f"/api/sessions/{id_}/files", params={"name": each}, content=data)
        if sent.status_code != 200:
            return sent
    opened = client.post(f"/api/sessions/{id_}/open", params={"name": name}, json={})
    return opened.json() if opened.status_code == 200 else opened


@pytest.fixture
def page(serve, images):
    """A client, its session's address, and the server."""
    client, server = serve()
    return client, f"/api/sessions/{uploaded(client, images)['id']}", server


def rows_of(mask):
    flat = np.flatnonzero(mask)
    return [[int(k), 1] for k in flat]


def masks(client, at):
    return {int(k): v for k, v in client.get(f"{at}/masks/0/{FRAMES - 1}").json().items()}


def done(client, at):
    """The state once nothing runs."""
    for _ in range(600):
        state = client.get(at).json()
        if not state["running"]:
            return state
        time.sleep(0.05)
    raise AssertionError("it does not end")


def give(client, at, clip, number=1, frame=0):
    mask = rows_of(clip.instance[frame] == number)
    return client.post(f"{at}/give", json={"frame": frame, "mask": mask}).json()


def test_images_become_a_session_whose_frames_are_shown(page, clip):
    client, at, _ = page
    state = client.get(at).json()
    assert (state["size"], state["num_frames"], state["things"]) == ([*SIZE], FRAMES, [])
    data = client.get(f"{at}/frames/4")
    picture = cv2.imdecode(np.frombuffer(data.content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(picture.astype(int) - clip.frames[4]).mean() < 8
    assert data.headers["content-type"] == "image/jpeg"


def test_what_is_given_is_followed_corrected_and_removed(page, clip):
    client, at, _ = page
    state = give(client, at, clip)
    assert [thing["name"] for thing in state["things"]] == ["object 1"]
    assert state["given"] == {"1": {"0": True}}
    client.post(f"{at}/follow", json={"start": 0, "end": FRAMES - 1})
    state = done(client, at)
    assert state["known"]["frames"] == [[0, FRAMES - 1]]
    before = masks(client, at)
    wanted = clip.instance[4] == 2
    client.post(f"{at}/give", json={"object": 1, "frame": 4, "mask": rows_of(wanted)})
    client.post(f"{at}/follow", json={"start": 4, "end": FRAMES - 1})
    done(client, at)
    after = masks(client, at)
    assert np.array_equal(rle.decode({"size": [*SIZE], "counts": after[4]["1"].encode()}), wanted)
    assert all(after[frame] == before[frame] for frame in range(4))
    client.post(f"{at}/remove", json={"object": 1, "frame": 6})
    assert all("1" not in masks(client, at)[frame] for frame in range(6, FRAMES))
    state = client.post(f"{at}/remove", json={"object": 1}).json()
    assert state["things"] == []


def test_points_ask_the_network_and_are_shown_again(page):
    client, at, server = page
    state = client.post(f"{at}/give", json={"frame": 2, "points": [[20, 20]], "negative": [[40, 30]]}).json()
    assert state["object"] == 1
    assert state["prompts"]["1"]["2"] == {"points": [[20, 20]], "negative": [[40, 30]], "box": None}
    assert list(masks(client, at)) == [2]
    assert server.queue._process.seen[-1].points == ((20.0, 20.0),)


def test_everything_is_undone_and_done_again(page, clip):
    client, at, _ = page
    states = [client.get(at).json()]
    states.append(give(client, at, clip))
    states.append(client.post(f"{at}/edit", json={"object": 1, "name": "ball", "color": "#112233"}).json())
    client.post(f"{at}/follow", json={"start": 0, "end": 5})
    states.append(done(client, at))
    states.append(client.post(f"{at}/remove", json={"object": 1}).json())
    keys = ("things", "given", "known", "prompts")
    for expected in reversed(states[:-1]):
        got = client.post(f"{at}/undo", json={}).json()
        assert {key: got[key] for key in keys} == {key: expected[key] for key in keys}
    assert not got["can_undo"]
    for expected in states[1:]:
        got = client.post(f"{at}/undo", json={"redo": True}).json()
        assert {key: got[key] for key in keys} == {key: expected[key] for key in keys}


def test_a_restarted_server_has_the_session_as_it_was(serve, images, clip):
    client, server = serve()
    at = f"/api/sessions/{uploaded(client, images)['id']}"
    give(client, at, clip, frame=1)
    client.post(f"{at}/give", json={"object": 1, "frame": 3, "points": [[10, 10]]})
    client.post(f"{at}/follow", json={"start": 1, "end": FRAMES - 1})
    client.post(f"{at}/remove", json={"object": 1, "frame": 7})
    state, found = done(client, at), masks(client, at)
    again, _ = serve()
    again.cookies = client.cookies
    for key in ("things", "given", "known", "prompts", "size", "num_frames"):
        assert again.get(at).json()[key] == state[key]
    assert masks(again, at) == found
    assert again.get("/api/sessions").json()["sessions"] == [{"id": at[-24:], "name": "clip"}]


def test_stopping_keeps_what_is_done_and_the_next_work_can_begin(serve, images, clip, answers):
    client, _ = serve(network=Slow(answers))
    at = f"/api/sessions/{uploaded(client, images)['id']}"
    give(client, at, clip)
    client.post(f"{at}/follow", json={"start": 0, "end": FRAMES - 1})
    assert client.post(f"{at}/follow", json={"start": 0, "end": 3}).status_code == 429
    while not client.get(at).json()["known"]["frames"][0][1]:
        time.sleep(0.01)
    state = client.post(f"{at}/cancel", json={}).json()
    assert not state["running"]
    assert client.post(f"{at}/follow", json={"start": 0, "end": 2}).status_code == 200
    assert done(client, at)["known"]["frames"][0][1] >= 2


def test_a_process_that_dies_is_asked_again_for_the_rest(serve, images, clip, answers):
    class Dying(Inline):
        deaths = 1

        def ask(self, job):
            for k, answer in enumerate(super().ask(job)):
                if k == 3 and self.deaths:
                    self.deaths -= 1
                    raise DiedError
                yield answer

    dying = Dying(answers)
    client, _ = serve(network=dying)
    at = f"/api/sessions/{uploaded(client, images)['id']}"
    give(client, at, clip)
    client.post(f"{at}/follow", json={"start": 0, "end": FRAMES - 1})
    assert done(client, at)["known"]["frames"] == [[0, FRAMES - 1]]
    assert [job.start for job in dying.seen] == [0, 2]


def test_objects_of_the_networks_classes_become_objects_to_follow(page, monkeypatch):
    client, at, server = page
    found = rle.encode(np.eye(*SIZE)[None] > 0)[0]
    monkeypatch.setattr(
        server.queue._process,
        "answers",
        lambda _: iter([(1, {}), ("dog", 0.9, {2: found}), ("cat", 0.1, {2: found})]),
    )
    client.post(f"{at}/find", json={"task": "vis", "start": 0, "end": 4})
    state = done(client, at)
    assert [thing["name"] for thing in state["things"]] == ["dog"]
    assert masks(client, at) == {2: {"1": found["counts"].decode()}}


@pytest.mark.parametrize("kind", ["coco", "youtube_vis", "png", "yolo", "mots", "overlay", "cutout"])
def test_every_format_is_written(page, clip, kind):
    client, at, _ = page
    give(client, at, clip)
    answer = client.get(f"{at}/export/{kind}")
    assert answer.status_code == 200
    assert f"-{kind}." in answer.headers["content-disposition"]
    assert len(answer.content) > 20


def test_a_session_that_was_saved_can_be_opened_again(page, clip):
    client, at, _ = page
    give(client, at, clip)
    saved = client.get(f"{at}/export/session").content
    state = uploaded(client, {"saved.zip": saved})
    assert state["id"] != at[-24:]
    assert state["given"] == {"1": {"0": True}}
    assert masks(client, f"/api/sessions/{state['id']}") == masks(client, at)


def test_objects_come_from_an_earlier_result(page, clip, tmp_path):
    client, at, _ = page
    mask = rle.encode(clip.instance[2][None] == 1)[0]
    result = VideoResult("vos", SIZE, FRAMES, (Track(4, {2: mask, 3: mask}), Track(5, {})))
    with ResultFiles(result, tmp_path / "out", names=[f"{k:05d}" for k in range(FRAMES)]) as files:
        for frame in range(FRAMES):
            files.add(frame)
    tree = json.loads((tmp_path / "out" / "tracks.json").read_text())
    state = client.post(f"{at}/tracks", json=tree).json()
    assert state["given"] == {"1": {"2": True}}
    assert masks(client, at) == {2: {"1": mask["counts"].decode()}, 3: {"1": mask["counts"].decode()}}
    for change in ({"size": [3, 4]}, {"tracks": 3}, {"num_frames": 10**9}, {"size": [10**9, 10**9]}):
        assert client.post(f"{at}/tracks", json=tree | change).status_code == 400


def test_masks_come_from_files(page, clip):
    client, at, _ = page
    ids = (clip.instance[0] == 1).astype(np.uint8)
    data = base64.b64encode(encode_ids(ids, voc_palette())).decode()
    client.post(f"{at}/give", json={"frame": 0, "mask": f"data:image/png;base64,{data}"})
    code = masks(client, at)[0]["1"]
    assert np.array_equal(rle.decode({"size": [*SIZE], "counts": code.encode()}), ids > 0)


def test_another_person_sees_nothing_of_it(page, serve):
    client, at, _ = page
    other, _ = serve()
    assert other.get("/api/sessions").json()["sessions"] == []
    for path in (at, f"{at}/frames/0", f"{at}/masks/0/3", f"{at}/export/coco", f"{at}/events"):
        assert other.get(path).json() == {"error": "there is no such session"}
    assert other.post(f"{at}/give", json={"frame": 0, "points": [[1, 1]]}).status_code == 400
    assert other.delete(at).status_code == 400
    assert client.get(at).status_code == 200


@pytest.mark.parametrize(
    ("action", "body", "said"),
    [
        ("give", {"frame": 99, "points": [[1, 1]]}, "expected a frame from 0 to 8, got 99"),
        ("give", {"frame": True, "points": [[1, 1]]}, "expected a frame"),
        ("give", {"frame": 0}, "expected a mask, points, or a box"),
        ("give", {"frame": 0, "points": [[1]]}, "expected points"),
        ("give", {"frame": 0, "points": [["nan", 1]]}, "outside the frame"),
        ("give", {"frame": 0, "points": [[1, 1]] * 101}, "at most 100 points"),
        ("give", {"frame": 0, "box": [5, 5, 1, 1]}, "no box"),
        ("give", {"frame": 0, "box": "abcd"}, "expected a box"),
        ("give", {"frame": 0, "mask": [[0, 10**9]]}, "leaves the frame"),
        ("give", {"frame": 0, "mask": [[-5, 3]]}, "leaves the frame"),
        ("give", {"frame": 0, "mask": [["x"]]}, "expected a mask as runs"),
        ("give", {"frame": 0, "mask": [[5, 3], [6, 3]]}, "comes before"),
        ("give", {"frame": 0, "points": [[10**400, 1]]}, "expected points"),
        ("give", {"frame": 0, "mask": "data:image/png;base64,AAAA"}, "PNG"),
        ("give", {"frame": 0, "object": 7, "points": [[1, 1]]}, "no object 7"),
        ("give", {"frame": 0, "object": [], "points": [[1, 1]]}, "no object"),
        ("edit", {"object": 1, "color": "red"}, "no object 1"),
        ("remove", {"object": 1}, "no object 1"),
        ("follow", {"start": 0, "end": 3}, "point at one first"),
        ("follow", {"start": -1, "end": 3}, "expected a frame"),
        ("find", {"task": "vos", "start": 0, "end": 3}, "vis or vps"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(page, action, body, said):
    client, at, _ = page
    answer = client.post(f"{at}/{action}", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    state = client.get(at).json()
    assert (state["things"], state["can_undo"]) == ([], False)


@pytest.mark.parametrize("body", [b"[", b"[]", b"\xff", b"[" * 5000, b'{"frame": 1e999}'])
def test_bodies_that_are_no_json_objects_are_refused(page, body):
    client, at, _ = page
    assert client.post(f"{at}/give", content=body).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_other_pages_cannot_call_the_server(page, headers, status):
    client, at, _ = page
    assert client.post(f"{at}/add", json={}, headers=ORIGIN | headers).status_code == status


def test_a_server_that_is_open_to_others_wants_its_token_once(serve):
    client, _ = serve(hosts=None, token="secret")
    assert client.get("/").status_code == 401
    assert client.get("/", params={"token": "wrong"}).status_code == 401
    assert client.get("/", params={"token": "secret"}).status_code == 200
    assert client.get("/api/sessions").status_code == 200


def test_the_page_is_whole_and_allows_nothing_from_elsewhere(page):
    client, _, _ = page
    index = client.get("/")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert index.headers["x-content-type-options"] == "nosniff"
    assert (
        "httponly" in client.post("/api/sessions", json={}).request.headers.get("cookie", "")
        or client.cookies
    )
    names = re.findall(r'(?:src|href)="/page/([^"]+)"', index.text)
    seen = set()
    while names:
        name = names.pop()
        if name not in seen:
            seen.add(name)
            answer = client.get(f"/page/{name}")
            assert answer.status_code == 200
            assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
            names += re.findall(r'from "\./([^"]+)"', answer.text)
    assert {"main.js", "style.css", "view.js"} <= seen


@pytest.mark.parametrize(
    "path", ["/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/app.py", "/api/sessions/../x"]
)
def test_paths_lead_nowhere_else(page, path):
    client, _, _ = page
    assert client.get(path).status_code in (400, 404)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.mp4": b"no video"}, "not a video that can be read"),
        ({"a.sh": b"x"}, "not a video that can be read"),
        ({"a": b"x"}, "not a file that can be taken"),
        ({"session.json": b"{}"}, "not a file that can be taken"),
        ({"a.png": b"no picture"}, "png"),
        ({"a.zip": b"no zip"}, "cannot be unpacked"),
    ],
)
def test_files_that_are_no_videos_are_refused_and_do_not_stay(serve, files, said):
    client, server = serve()
    answer = uploaded(client, files)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert str(server.store.root) not in answer.json()["error"]
    assert client.get("/api/sessions").json()["sessions"] == []


def packed(entries):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return data.getvalue()


def test_a_zip_of_images_is_a_video_wherever_its_names_point(serve, images, tmp_path):
    client, server = serve()
    entries = [(f"../../clip/{name}", data) for name, data in images.items()]
    state = uploaded(client, {"clip.zip": packed([*entries, ("run.sh", "x"), ("__MACOSX/._0.png", "x")])})
    assert state["num_frames"] == FRAMES
    outside = [path for path in tmp_path.rglob("*.png") if server.store.root not in path.parents]
    assert outside == []


def test_archives_that_unpack_to_too_much_are_refused(serve):
    client, _ = serve(limits=Limits(upload=100_000))
    answer = uploaded(client, {"bomb.zip": packed([("a.png", bytes(10**7))])})
    assert "unpacks to more than" in answer.json()["error"]


def test_damaged_sessions_are_refused(page):
    client, at, _ = page
    saved = zipfile.ZipFile(io.BytesIO(client.get(f"{at}/export/session").content))
    whole = {name: saved.read(name) for name in saved.namelist()}
    tree = json.loads(whole["session.json"])
    for change in (
        {"video": "../../x"},
        {"size": "x"},
        {"things": 3},
        {"num_frames": 0},
        {"given": {"1": {"0": 3}}},
    ):
        data = packed((whole | {"session.json": json.dumps(tree | change)}).items())
        assert uploaded(client, {"saved.zip": data}).status_code == 400


def test_uploads_end_where_the_limit_is(serve):
    client, _ = serve(limits=Limits(upload=2000))
    id_ = client.post("/api/sessions", json={}).json()["id"]

    def endless():
        for _ in range(100):
            yield bytes(1000)

    answer = client.post(f"/api/sessions/{id_}/files", params={"name": "a.mp4"}, content=endless())
    assert "more than 2000 bytes" in answer.json()["error"]
    answer = client.post(f"/api/sessions/{id_}/files", params={"name": "a.mp4"}, content=bytes(3000))
    assert "more than 2000 bytes" in answer.json()["error"]


@pytest.mark.parametrize(("what", "most"), [("uploads", MOST_UPLOADS), ("pages", MOST_LISTENERS)])
def test_what_a_person_does_at_once_is_bounded(page, images, what, most):
    client, at, server = page
    new = f"/api/sessions/{client.post('/api/sessions', json={}).json()['id']}/files?name=a.png"
    person = next(server.store.root.iterdir()).name

    def asked():
        return client.post(new, content=images["0.png"]) if what == "uploads" else client.get(f"{at}/events")

    server.busy[person, what] = most
    refused = asked()
    assert (refused.status_code, f"{most} {what}" in refused.json()["error"]) == (429, True)
    server.busy.clear()
    if what == "uploads":
        assert asked().status_code == 200
        assert not server.busy


def test_what_is_larger_or_longer_or_more_than_allowed_is_refused(serve, images):
    client, _ = serve(limits=Limits(pixels=1000))
    assert "at most 1000 pixels" in uploaded(client, images).json()["error"]
    client, _ = serve(limits=Limits(sessions=1))
    uploaded(client, images)
    assert "delete one first" in client.post("/api/sessions", json={}).json()["error"]


def test_sessions_that_nobody_opens_go(serve, images):
    client, _ = serve()
    uploaded(client, images)
    later, server = serve(limits=Limits(days=-1))
    assert list(server.store.root.glob("*/*")) == []
    at_work = server.store.new("someone", "0" * 24)
    (at_work / "session.json").write_text("{}")
    later.get("/api/sessions")  # also while the server runs
    assert not at_work.exists()


def test_a_session_is_deleted_with_all_its_files(page):
    client, at, server = page
    assert client.delete(at).status_code == 200
    assert client.get(at).status_code == 400
    assert [path for path in server.store.root.rglob("*") if path.is_file()] == []


def test_following_leaves_objects_alone_that_are_not_followed(page, clip):
    client, at, _ = page
    give(client, at, clip, frame=0)
    client.post(f"{at}/follow", json={"start": 0, "end": FRAMES - 1})
    done(client, at)
    before = {frame: found.get("1") for frame, found in masks(client, at).items()}
    client.post(f"{at}/remove", json={"object": 1, "frame": 5})
    give(client, at, clip, number=2, frame=7)
    client.post(f"{at}/follow", json={"start": 7, "end": 0})
    done(client, at)
    after = masks(client, at)
    assert all(after[frame].get("1") == before[frame] for frame in range(5))
    assert "2" in after[7]


def test_what_is_changed_while_it_runs_is_not_overwritten(serve, images, clip, answers):
    client, server = serve(network=Slow(answers))
    at = f"/api/sessions/{uploaded(client, images)['id']}"
    give(client, at, clip)
    client.post(f"{at}/follow", json={"start": 0, "end": FRAMES - 1})
    client.post(f"{at}/remove", json={"object": 1})
    state = client.post(f"{at}/add", json={}).json()
    assert [thing["id"] for thing in state["things"]] == [2]  # an id is not used again
    server.queue.idle()
    assert all(not found for found in masks(client, at).values())
    assert client.get(f"{at}/export/coco").status_code == 200
    client.post(f"{at}/give", json={"object": 2, "frame": 0, "mask": [[5, 50]]})
    client.post(f"{at}/follow", json={"start": 0, "end": FRAMES - 1})
    assert client.delete(at).status_code == 200
    server.queue.idle()
    assert [path for path in server.store.root.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("job", [Follow("", {}, {}, 0, 99), Find("", "vis", 0, 99)])
def test_long_work_makes_room_and_goes_on_where_it_was(job):
    begun, order, ended = [], [], threading.Event()

    def answers(asked):
        begun.append(asked)
        if isinstance(asked, Give):
            yield "mask"
        else:
            for frame in range(100):
                yield frame, {}

    def answer(name, _):
        order.append(name)
        if name == "a" and order.count("a") == 3:
            other = job._replace(video="b")
            queue.put(Work("b", other, partial(answer, "b"), lambda _: ended.set()))
            queue.put(Work("c", Give("", 1, 0, {}, (), (), None), partial(answer, "click"), lambda _: None))

    queue = Queue(Inline(answers))
    queue.put(Work("a", job, partial(answer, "a"), lambda _: None))
    assert ended.wait(10)
    queue.idle()
    queue.close()
    assert len(begun) == 3
    assert order.count("a") == order.count("b") == 100
    assert order[3] == "click"
    assert order.index("b") < 40
    assert order[-30:].count("a") > 0
    assert order[-30:].count("b") > 0


def test_masks_are_the_same_where_other_work_comes_between(page, clip, answers):
    client, at, server = page
    give(client, at, clip)
    session = next(iter(server.store._open.values()))
    job = Follow(session.path, session.targets.given, session.targets.at(0, 1), 0, FRAMES - 1)
    alone, between = [*answers(job)], []
    for answer in answers(job):
        between.append(answer)
        [*answers(Give(session.path, 2, 3, {}, ((20.0, 20.0),), (), None))]
    assert between == alone


def counting():
    return lambda last: iter(range(last))


def test_a_process_works_at_several_jobs_in_turn_and_forgets_those_that_are_left():
    process = Process(counting)
    left, first, second = process.ask(9), process.ask(3), process.ask(3)
    next(left)
    left.close()
    assert list(zip(first, second, strict=True)) == [(0, 0), (1, 1), (2, 2)]
    broken = process.ask(9)
    next(broken)
    process.end()
    with pytest.raises(DiedError):
        next(broken)
    assert process.answer(3) == 2
    process.end()


def test_a_failure_of_one_does_not_end_the_service(serve, images, clip, monkeypatch):
    client, server = serve()
    at = f"/api/sessions/{uploaded(client, images)['id']}"
    give(client, at, clip)
    monkeypatch.setattr(server, "_followed", lambda *_: 1 / 0)
    client.post(f"{at}/follow", json={"start": 0, "end": 2})
    done(client, at)
    monkeypatch.undo()
    client.post(f"{at}/follow", json={"start": 0, "end": 2})
    assert done(client, at)["known"]["frames"] == [[0, 2]]


def test_work_that_ends_at_once_leaves_the_session_free(serve, images, clip):
    client, _ = serve(network=Inline(lambda job: iter([(job.start, job.masks)])))
    at = f"/api/sessions/{uploaded(client, images)['id']}"
    give(client, at, clip)
    for _ in range(30):
        assert client.post(f"{at}/follow", json={"start": 0, "end": 1}).status_code == 200
        done(client, at)
    assert client.get(at).json()["can_undo"]
