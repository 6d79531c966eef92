"""Published weights from a server, which here is a local one: whole, in parts, wrong, hostile."""

import io
import json
import pickle
import shutil
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import tarvis
from tarvis import download as module
from tarvis import places
from tarvis.files.outputs import digest_of_file
from tarvis.model.weights import save_weights
from tarvis.structures import InputError

NAME = "resnet50_finetune"


class Server(BaseHTTPRequestHandler):
    """Sends `files` by path; after `most` bytes of an answer the connection ends. `asked` are the ranges."""

    files: dict[str, bytes]
    most = 2**30
    takes_ranges = True
    sends_length = True

    def do_GET(self):
        content = self.files.get(self.path)
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.takes_ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.sends_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.most])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Starts a server of archives by name; gives its address and the ranges that it was asked for."""
    servers = []

    def start(archives, **behaviour):
        files = {f"/data/{name}.zip": content for name, content in archives.items()}
        handler = type("Handler", (Server,), {"files": files, **behaviour})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.asked = []
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/data", server.asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "tarvis" / "weights"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, state, config):
    path = tmp_path_factory.mktemp("published") / "090000.pth"
    save_weights(path, state, config)
    return path.read_bytes()


def zipped(files):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


@pytest.fixture(scope="module")
def archive(checkpoint):
    return zipped({f"{NAME}/090000.pth": checkpoint, f"{NAME}/config.yaml": b"MODEL: {}"})


def fetch(server, name=NAME, *options):
    return module.main([name, "--server", server, *options])


def test_weights_are_fetched_once_and_found_by_name(serve, archive, home, config, capsys):
    server, asked = serve({NAME: archive})
    assert fetch(server) == 0
    summary = json.loads(capsys.readouterr().out)
    record = json.loads((home / NAME / "download.json").read_text())
    assert record == {name: value for name, value in summary.items() if name != "out"}
    assert (record["bytes"], record["url"]) == (len(archive), f"{server}/{NAME}.zip")
    assert sorted(path.name for path in home.rglob("*")) == sorted(
        [NAME, "090000.pth", "config.yaml", "download.json"]
    )
    assert tarvis.load(NAME, device="cpu").config == config
    assert places.weights(NAME) == home / NAME / "090000.pth"
    assert fetch(server) == 0
    assert len(asked) == 1


@pytest.mark.parametrize("sends_length", [True, False])
def test_a_download_that_broke_off_goes_on(serve, archive, home, capsys, sends_length):
    server, _ = serve({NAME: archive}, most=len(archive) // 2)
    assert fetch(server) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        f"broke off after {len(archive) // 2} of {len(archive)} bytes; the same command goes on from there"
    )
    server, asked = serve({NAME: archive}, sends_length=sends_length)
    assert fetch(server) == 0
    assert asked == [f"bytes={len(archive) // 2}-"]
    assert json.loads((home / NAME / "download.json").read_text())["bytes"] == len(archive)


def test_a_server_without_ranges_sends_all_of_it_again(serve, archive, home):
    server, _ = serve({NAME: archive}, most=1000)
    assert fetch(server) == 3
    server, _ = serve({NAME: archive}, takes_ranges=False)
    assert fetch(server) == 0
    assert digest_of_file(home / NAME / "090000.pth")


def test_a_download_that_was_stopped_when_all_had_come_is_unpacked(serve, archive, home):
    home.mkdir(parents=True)
    (home / f"{NAME}.zip.part").write_bytes(archive)
    server, asked = serve({NAME: archive})
    assert fetch(server) == 0
    assert asked == [f"bytes={len(archive)}-"]


def test_what_is_left_of_another_file_does_no_harm(serve, archive, home, capsys):
    home.mkdir(parents=True)
    for junk in (b"x" * 100, b"x" * 2 * len(archive)):
        (home / f"{NAME}.zip.part").write_bytes(junk)
        server, _ = serve({NAME: archive})
        assert fetch(server) == 2
        assert "fetches it anew" in capsys.readouterr().err
        assert fetch(server) == 0
        shutil.rmtree(home / NAME)


def test_what_a_server_does_not_have_is_one_line(serve, home, capsys):
    server, _ = serve({})
    assert fetch(server) == 2
    assert capsys.readouterr().err.startswith(f"error: {server}/{NAME}.zip: the server says 404")
    assert not home.exists() or not any(home.iterdir())


@pytest.mark.parametrize(
    "server", ["http://127.0.0.1:1/data", "http://[", "file:///tmp", "nonsense", "https://"]
)
def test_no_server_is_one_line(server, capsys):
    assert fetch(server) == 2
    assert capsys.readouterr().err.count("\n") == 1


def symlink(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


class Code:
    def __reduce__(self):
        return print, ("it runs",)


def torch_file(content):
    made = io.BytesIO()
    torch.save(content, made, pickle_module=pickle)
    return made.getvalue()


HOSTILE = {
    "outside": {"../090000.pth": b"", "config.yaml": b""},
    "deep outside": {"a/../../090000.pth": b"", "config.yaml": b""},
    "absolute": {"/090000.pth": b"", "config.yaml": b""},
    "of Windows": {"C:\\090000.pth": b"", "config.yaml": b""},
    "backslashes": {"..\\090000.pth": b"", "config.yaml": b""},
    "a link": {symlink("090000.pth"): b"/etc/passwd", "config.yaml": b""},
    "twice": {"090000.pth": b"", "090000.PTH": b"", "config.yaml": b""},
    "a bomb": {"090000.pth": bytes(10**7), "config.yaml": b""},
    "two": {"1.pth": b"", "2.pth": b"", "config.yaml": b""},
    "more": {"1.pth": b"", "run.py": b"", "config.yaml": b""},
    "no settings": {"1.pth": b""},
    "nothing": {},
    "code": {"090000.pth": torch_file({"model": Code()}), "config.yaml": b""},
    "no weights": {"090000.pth": b"abc", "config.yaml": b""},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_and_leave_nothing(serve, home, kind, capsys):
    server, _ = serve({NAME: zipped(HOSTILE[kind])})
    assert fetch(server) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"error: {server}/{NAME}.zip: ")
    assert len(last) < 320
    assert "--trust" not in last
    assert [*home.iterdir()] == []


@pytest.mark.parametrize("cut", [0, 1, 100, -100, -1])
def test_truncated_and_damaged_archives_are_refused_and_leave_nothing(serve, archive, home, cut, capsys):
    server, _ = serve({NAME: archive[:cut] or b"\0"})
    assert fetch(server) == 2
    assert "fetches it anew" in capsys.readouterr().err.splitlines()[-1]
    flipped = bytearray(archive)
    flipped[len(archive) // 2] ^= 255
    server, _ = serve({NAME: bytes(flipped)})
    assert fetch(server) == 2
    assert [*home.iterdir()] == []


def test_a_folder_that_is_there_stays_as_it_is(serve, archive, home, capsys):
    (home / NAME).mkdir(parents=True)
    (home / NAME / "mine").touch()
    server, _ = serve({NAME: archive})
    assert fetch(server) == 2
    assert "was not fetched by this command" in capsys.readouterr().err
    assert [path.name for path in (home / NAME).iterdir()] == ["mine"]


def test_the_workspace_is_unpacked_as_it_is(serve, tmp_path):
    files = {"dataset_annotations/training/a.json": b"{}", "dataset_annotations/b.json": b"[]"}
    server, _ = serve({module.WORKSPACE: zipped(files)})
    assert fetch(server, module.WORKSPACE) == 0
    assert {name: (tmp_path / module.WORKSPACE / name).read_bytes() for name in files} == files
    assert fetch(server, module.WORKSPACE, "--out", "elsewhere") == 0
    assert (tmp_path / "elsewhere" / "download.json").is_file()


def test_a_zip_is_not_downloaded_under_a_name_that_is_not_published(capsys):
    with pytest.raises(SystemExit):
        module.main(["../../etc"])
    assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(InputError, match="https"):
        module.download(NAME, None, "ftp://host")
