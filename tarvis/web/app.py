"""The addresses of the server: who may use them, and what they do.

A person is whoever has the cookie `person`. What a browser sends never becomes a path: sessions are found by
ids that the server has drawn, files of the page by name from a table.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import shutil
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tarvis.files.folders import IMAGE_SUFFIXES, output_name
from tarvis.files.records import Entry
from tarvis.structures import RLE, InputError, one_line
from tarvis.video.exports import FORMATS
from tarvis.video.results import read_tracks
from tarvis.web.bodies import read_body, read_box, read_frame, read_mask, read_points
from tarvis.web.jobs import Find, Follow, Give, Look, Show, Write
from tarvis.web.processes import Busy, DiedError, Process, Queue, Work
from tarvis.web.sessions import FRAMES, STATE, Session, codes, color, title
from tarvis.web.store import Store, files_of

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
DEMO = Path(__file__).parents[1] / "assets" / "dog.mp4"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MOST_EVENTS = 2000
"""Events that may wait for one browser; one with more to come loads the session again instead."""
MOST_UPLOADS, MOST_LISTENERS = 4, 32
"""Uploads and open pages that one person may have at the same time."""
SIDE = 720
"""Shorter side of frames as the page shows them."""
SAVE_SECONDS = 5.0
ACTIONS = ("give", "tracks", "add", "edit", "remove", "undo", "follow", "find", "cancel")
LEAST_SCORE = 0.3
"""Of what is found by class, to become an object."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SESSION = "session"
"""The format of an export that can be imported again."""


@dataclass
class Running:
    """What is being done for a session."""

    work: Work
    done: int = 0
    total: int = 0
    since: float = 0.0
    followed: set[int] = field(default_factory=set)
    """Objects whose masks are replaced."""


class Server:
    """The page's server.

    Args:
        network: follows and finds; `reader` decodes for looking, `writer` for exports.
        hosts: names by which browsers may call the server; None for any.
        token: what a browser must know, once, where the server is open to others.
    """

    def __init__(
        self,
        store: Store,
        network: Process,
        reader: Process,
        writer: Process,
        *,
        hosts: tuple[str, ...] | None = LOOPBACK,
        token: str | None = None,
    ) -> None:
        self.store, self.reader, self.writer = store, reader, writer
        self.queue = Queue(network)
        self.hosts, self.token = hosts, token
        self.running: dict[str, Running] = {}
        self.listeners: dict[str, set[asyncio.Queue[dict[str, Any]]]] = {}
        self.busy: Counter[tuple[str, str]] = Counter()
        self.loop: asyncio.AbstractEventLoop | None = None

    def app(self) -> Any:
        """The ASGI application."""

        @asynccontextmanager
        async def lifespan(_: Starlette) -> Any:
            self.loop = asyncio.get_running_loop()
            yield
            await run_in_threadpool(self.close)

        def route(path: str, handler: Callable[..., Any], method: str = "GET") -> Route:
            return Route(path, partial(self._guarded, handler), methods=[method])

        session = "/api/sessions/{session:str}"
        routes = [
            route("/", self.page),
            route("/page/{name:str}", self.page),
            route("/api/sessions", self.sessions),
            route("/api/sessions", self.create, "POST"),
            route("/api/demo", self.demo, "POST"),
            route(session, self.state),
            route(session, self.delete, "DELETE"),
            route(session + "/files", self.upload, "POST"),
            route(session + "/open", self.open, "POST"),
            route(session + "/frames/{frame:int}", self.frame),
            route(session + "/masks/{first:int}/{last:int}", self.masks),
            route(session + "/events", self.events),
            route(session + "/export/{kind:str}", self.export),
            *(route(f"{session}/{name}", getattr(self, name), "POST") for name in ACTIONS),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    def close(self) -> None:
        for running in [*self.running.values()]:
            running.work.is_cancelled = True
        self.queue.close()
        self.reader.end()
        self.writer.end()

    # Who may come in

    async def _guarded(self, handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        refusal = self._refusal(request)
        if refusal is not None:
            return _with_headers(refusal)
        try:
            response = await handler(request)
        except Busy as error:
            response = _error(self._said(error), 429)
        except InputError as error:
            response = _error(self._said(error), 400)
        except DiedError:
            response = _error("the process that decodes this video ended; the file may be damaged", 400)
        except ClientDisconnect:
            response = _error("gone", 400)
        if request.query_params.get("token") and self.token is not None:
            _set_cookie(response, "token", self.token, request)
        if not request.cookies.get("person"):
            _set_cookie(response, "person", request.state.person, request)
        return _with_headers(response)

    def _said(self, error: object) -> str:
        """A message without the server's own folders."""
        return re.sub(rf"{re.escape(str(self.store.root))}/[0-9a-f]+/[0-9a-f]+/?", "", str(error))

    def _refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts is not None and name not in self.hosts:
            return _error("this name of the server is not known to it", 421)
        if request.method != "GET" and request.headers.get("origin") not in (
            f"http://{host}",
            f"https://{host}",
        ):
            return _error("requests come from the page alone", 403)
        if self.token is not None:
            given = request.query_params.get("token") or request.cookies.get("token", "")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return _error("open the address with ?token=..., as the server printed it", 401)
        request.state.person = request.cookies.get("person") or secrets.token_urlsafe(24)
        return None

    @contextmanager
    def _one_more(self, request: Request, what: str, most: int) -> Iterator[None]:
        """Refuses what a person does more than `most` times at once."""
        key = _person(request), what
        if self.busy[key] >= most:
            raise Busy(f"{most} {what} are open at once already; close one, or wait until one ends")
        self.busy[key] += 1
        try:
            yield
        finally:
            self.busy[key] -= 1
            self.busy += Counter()  # drops what is 0

    def _folder(self, request: Request) -> Path:
        number = request.path_params["session"]
        if not (len(number) == 24 and all(c in "0123456789abcdef" for c in number)):
            raise InputError("there is no such session")
        folder = self.store.root / _person(request) / number
        if not folder.is_dir():
            raise InputError("there is no such session")
        return folder

    async def _session(self, request: Request) -> Session:
        return await run_in_threadpool(self.store.get, self._folder(request))

    # The page

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        known = {path.name: path for path in PAGE.iterdir()}
        if name not in known:
            return _error("no such page", 404)
        return FileResponse(known[name], media_type=TYPES[known[name].suffix])

    # Sessions

    async def sessions(self, request: Request) -> Response:
        names = await run_in_threadpool(self.store.names, _person(request))
        formats = {kind: each.title for kind, each in FORMATS.items()} | {SESSION: "This session"}
        limits = {"bytes": self.store.limits.upload, "seconds": self.store.limits.seconds}
        return JSONResponse({"sessions": names, "formats": formats, "limits": limits})

    async def create(self, request: Request) -> Response:
        """A place to upload to; then its files are sent one by one, then it is opened."""
        folder = await run_in_threadpool(self.store.new, _person(request), secrets.token_hex(12))
        return JSONResponse({"id": folder.name})

    async def demo(self, request: Request) -> Response:
        folder = await run_in_threadpool(self.store.new, _person(request), secrets.token_hex(12))
        await run_in_threadpool(shutil.copy, DEMO, folder / "video.mp4")
        session = await run_in_threadpool(self.store.open, folder, "A dog")
        return JSONResponse(session.tree())

    async def upload(self, request: Request) -> Response:
        """A file of a session that is not open yet."""
        folder, name = self._folder(request), request.query_params.get("name", "")
        suffix = Path(name).suffix.lower()[:10]
        is_image = suffix in IMAGE_SUFFIXES
        target = folder / FRAMES / output_name(Path(name).name) if is_image else folder / f"video{suffix}"
        is_open = (folder / STATE).exists()
        is_odd = suffix in ("", ".json") or not suffix[1:].isalnum() or name[0] == "."
        if is_odd or is_open or target.exists():
            raise InputError(f"{name[:80]!r}: not a file that can be taken, or here already")
        used = sum(path.stat().st_size for _, path in files_of(folder))
        announced = int(request.headers.get("content-length") or 0)
        too_much = InputError(f"more than {self.store.limits.upload} bytes are not taken")
        if used + announced > self.store.limits.upload:
            raise too_much
        target.parent.mkdir(exist_ok=True)
        try:
            with self._one_more(request, "uploads", MOST_UPLOADS), target.open("xb") as file:
                async for block in request.stream():
                    used += len(block)
                    if used > self.store.limits.upload:
                        raise too_much
                    await run_in_threadpool(file.write, block)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        return JSONResponse({"bytes": used})

    async def open(self, request: Request) -> Response:
        folder = self._folder(request)
        try:
            session = await run_in_threadpool(self.store.open, folder, request.query_params.get("name", ""))
        except (InputError, DiedError):
            await run_in_threadpool(self.store.delete, folder)
            raise
        return JSONResponse(session.tree())

    async def state(self, request: Request) -> Response:
        session = await self._session(request)
        return JSONResponse(await run_in_threadpool(session.tree) | {"running": self._progress(session)})

    async def delete(self, request: Request) -> Response:
        folder = self._folder(request)
        self._cancel(folder.name)
        await run_in_threadpool(self.store.delete, folder)
        return JSONResponse({})

    async def frame(self, request: Request) -> Response:
        session = await self._session(request)
        frame = read_frame(session, request.path_params["frame"])
        job = Show(session.path, frame, SIDE)
        data = await run_in_threadpool(self.reader.answer, job)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    async def masks(self, request: Request) -> Response:
        session = await self._session(request)
        first, last = request.path_params["first"], request.path_params["last"]
        if not 0 <= first <= last < first + 512:
            raise InputError("expected a range of at most 512 frames")
        return JSONResponse(session.masks_of(first, last))

    async def events(self, request: Request) -> Response:
        session = await self._session(request)
        place = partial(self._one_more, request, "pages", MOST_LISTENERS)
        with place():  # refuses before the stream begins; it takes its place once it has begun
            pass

        async def stream() -> Any:
            waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_EVENTS)
            listeners = self.listeners.setdefault(session.id, set())
            with place():
                listeners.add(waiting)
                try:
                    yield b": open\n\n"
                    while True:
                        try:
                            event = await asyncio.wait_for(waiting.get(), 15)
                        except TimeoutError:
                            yield b": still here\n\n"
                            continue
                        yield f"data: {json.dumps(event)}\n\n".encode()
                finally:
                    listeners.discard(waiting)

        return StreamingResponse(stream(), media_type="text/event-stream")

    # What a person does

    async def give(self, request: Request) -> Response:
        """An object, a new one unless it is named, or a correction of it: by points, a box, or a mask."""
        session, body = await self._session(request), await read_body(request)
        frame = read_frame(session, body.get("frame"))
        thing = None if body.get("object") is None else session.thing(body["object"])
        points, negative = (read_points(body.get(key, [])) for key in ("points", "negative"))
        box = read_box(body.get("box"))
        if body.get("mask") is not None:
            mask: RLE = await run_in_threadpool(read_mask, body["mask"], session)
        else:
            id = session.next_id if thing is None else thing.id
            job = Give(session.path, id, frame, session.targets.around(id, frame), points, negative, box)
            mask = await self._asked(session, job)
        self._cancel(session.id)

        def change() -> int:
            given = session.add() if thing is None else session.thing(thing.id)
            session.targets.give(given.id, frame, mask)
            shown = {"points": points, "negative": negative, "box": box}
            session.prompts[given.id] = {**session.prompts.get(given.id, {}), frame: shown}
            return given.id

        number = await self._edit(session, change)
        return await self._changed(session, request, {"object": number})

    async def tracks(self, request: Request) -> Response:
        """The objects of a `tracks.json`."""
        session, body = await self._session(request), await read_body(request)
        count = body.get("num_frames")
        if body.get("size") != list(session.size) or type(count) is not int or count > session.num_frames:
            raise InputError("tracks.json: is of a video of another size, or of more frames")
        *_, found = await run_in_threadpool(read_tracks, Entry(body, Path("tracks.json")))
        self._cancel(session.id)

        def change() -> None:
            for track in found:
                session.take("", track.masks)

        await self._edit(session, change)
        return await self._changed(session, request)

    async def add(self, request: Request) -> Response:
        session, body = await self._session(request), await read_body(request)
        thing = await self._edit(session, lambda: session.add(title(body.get("name", ""))))
        return await self._changed(session, request, {"object": thing.id})

    async def edit(self, request: Request) -> Response:
        """Name, colour, or whether it is shown."""
        session, body = await self._session(request), await read_body(request)

        def change() -> None:
            thing = session.thing(body.get("object"))
            session.things[thing.id] = replace(
                thing,
                name=title(body.get("name", thing.name)) or thing.name,
                color=color(body.get("color", thing.color)),
                is_hidden=bool(body.get("is_hidden", thing.is_hidden)),
            )

        await self._edit(session, change)
        return await self._changed(session, request)

    async def remove(self, request: Request) -> Response:
        session, body = await self._session(request), await read_body(request)
        frame = None if body.get("frame") is None else read_frame(session, body["frame"])
        number = session.thing(body.get("object")).id
        self._cancel(session.id)
        await self._edit(session, lambda: session.remove(number, frame))
        return await self._changed(session, request)

    async def undo(self, request: Request) -> Response:
        session, body = await self._session(request), await read_body(request)
        self._cancel(session.id)
        await run_in_threadpool(partial(session.undo, redo=bool(body.get("redo"))))
        return await self._changed(session, request)

    async def follow(self, request: Request) -> Response:
        session, body = await self._session(request), await read_body(request)
        start, end = (read_frame(session, body.get(key)) for key in ("start", "end"))
        step = 1 if end >= start else -1
        known = session.targets.at(start, step)
        if not known:
            raise InputError(f"frame {start}: no object is known here; point at one first")
        job = Follow(session.path, dict(session.targets.given), known, start, end)
        await self._begin(session, job, abs(end - start) + 1, partial(self._followed, session))
        return await self._changed(session, request)

    async def find(self, request: Request) -> Response:
        """Let the network look for the classes that it knows; what it finds becomes objects."""
        session, body = await self._session(request), await read_body(request)
        start, end = (read_frame(session, body.get(key)) for key in ("start", "end"))
        if body.get("task") not in ("vis", "vps") or end < start:
            raise InputError("expected a task, vis or vps, and a range of frames")
        job = Find(session.path, body["task"], start, end)
        await self._begin(session, job, end - start + 1, partial(self._found, session))
        return await self._changed(session, request)

    async def cancel(self, request: Request) -> Response:
        session = await self._session(request)
        await read_body(request)
        self._cancel(session.id)
        return await self._changed(session, request)

    async def export(self, request: Request) -> Response:
        session, kind = await self._session(request), request.path_params["kind"]
        if kind != SESSION and kind not in FORMATS:
            raise InputError(f"unknown format {kind[:40]!r}")
        folder = Path(tempfile.mkdtemp(prefix="tarvis-export-"))
        suffix = ".zip" if kind == SESSION else FORMATS[kind].suffix
        path = folder / f"{output_name(session.name)}-{kind}{suffix}"
        try:
            if kind == SESSION:
                await run_in_threadpool(_pack, session, path)
            else:
                names = {thing.id: thing.name for thing in session.things.values()}
                what = {"result": session.result(), "names": names, "sound": Path(session.path)}
                await run_in_threadpool(self.writer.answer, Write(session.path, what, kind, str(path)))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        gone = BackgroundTask(shutil.rmtree, folder, ignore_errors=True)
        return FileResponse(path, filename=path.name, background=gone)

    # Work

    async def _asked(self, session: Session, job: Any) -> Any:
        """The answer to a short job, in its turn."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        answers: list[Any] = []

        def end(error: str | None) -> None:
            def settle() -> None:
                if future.done():
                    return
                if error is not None or not answers:
                    future.set_exception(InputError(error or "the work was stopped"))
                else:
                    future.set_result(answers[-1])

            loop.call_soon_threadsafe(settle)

        self.queue.put(Work(session.id, job, answers.append, end))
        return await future

    async def _begin(
        self, session: Session, job: Any, total: int, answer: Callable[[Running, Any], None]
    ) -> None:
        """Start a long job of a session, which has one at a time. All that it finds is one step."""
        work = Work(session.id, job, lambda _: None, lambda _: None)
        running = Running(work, total=total, followed={*job.masks} if isinstance(job, Follow) else set())
        saved = time.monotonic()

        def answered(what: Any) -> None:
            nonlocal saved
            running.since = running.since or time.monotonic()
            with session.lock:
                answer(running, what)
                if time.monotonic() > saved + SAVE_SECONDS:
                    session.save()
                    saved = time.monotonic()

        def end(error: str | None) -> None:
            with session.lock, suppress(OSError):
                session.save()
            if self.running.get(session.id) is running:
                self.running.pop(session.id, None)
                self._tell(session.id, {"kind": "end", "error": error and self._said(error)})

        def begin() -> None:
            with session.lock:  # answers wait for it
                if session.id in self.running:
                    raise Busy("this session is busy; stop what it does first")
                self.queue.put(work)
                self.running[session.id] = running
                with session.step():
                    pass

        work.answer, work.end = answered, end
        await run_in_threadpool(begin)

    def _followed(self, session: Session, running: Running, answer: tuple[int, dict[int, RLE]]) -> None:
        frame, masks = answer
        if running.work.is_cancelled:
            return
        running.followed |= masks.keys()
        masks = {number: mask for number, mask in masks.items() if number in session.things}
        before = session.targets.masks.get(frame, {})
        masks = {number: mask for number, mask in before.items() if number not in running.followed} | masks
        session.targets.masks[frame] = masks
        running.done = min(running.done + 1, running.total)
        self._tell(
            session.id, {"kind": "frame", "frame": frame, "masks": codes(masks)} | self._progress(session)
        )

    def _found(self, session: Session, running: Running, answer: Any) -> None:
        if len(answer) == 2:
            running.done += 1
            self._tell(session.id, {"kind": "progress"} | self._progress(session))
            return
        name, score, masks = answer
        if not running.work.is_cancelled and (score is None or score >= LEAST_SCORE):
            session.take(title(name), masks)

    def _cancel(self, number: str) -> None:
        """Stop what a session does; what is done is kept, and it can go on at once."""
        running = self.running.pop(number, None)
        if running is not None:
            running.work.is_cancelled = True
            self._tell(number, {"kind": "end", "error": None})

    def _progress(self, session: Session) -> dict[str, Any]:
        running = self.running.get(session.id)
        if running is None:
            return {}
        seconds = max(time.monotonic() - running.since, 1e-3) if running.since else 0.0
        rate = running.done / seconds if seconds else 0.0
        return {"done": running.done, "total": running.total, "rate": rate}

    def _tell(self, number: str, event: dict[str, Any]) -> None:
        """Tell the browsers that show a session; from any thread."""

        def tell() -> None:
            for waiting in self.listeners.get(number, ()):
                if waiting.full():
                    while not waiting.empty():
                        waiting.get_nowait()
                    waiting.put_nowait({"kind": "reload"})
                else:
                    waiting.put_nowait(event)

        if self.loop is not None:
            self.loop.call_soon_threadsafe(tell)

    async def _edit(self, session: Session, change: Callable[[], Any]) -> Any:
        """Change a session as one step, away from the event loop."""

        def step() -> Any:
            with session.step():
                return change()

        return await run_in_threadpool(step)

    async def _changed(
        self, session: Session, request: Request, more: Mapping[str, Any] | None = None
    ) -> Response:
        """The new state, for whoever changed it; others who show the session are told to load it."""
        self._tell(session.id, {"kind": "changed", "by": request.headers.get("x-tab", "")})
        tree = await run_in_threadpool(session.tree)
        return JSONResponse(tree | {"running": self._progress(session)} | dict(more or {}))


def look(reader: Process, video: str) -> dict[str, Any]:
    """Open a video in a process of its own."""
    facts: dict[str, Any] = reader.answer(Look(video))
    return facts


def _person(request: Request) -> str:
    """Name of a person's folder; who reads it does not know the cookie."""
    return hashlib.sha256(request.state.person.encode()).hexdigest()[:32]


def _pack(session: Session, path: Path) -> None:
    with session.lock:
        session.save()
        with zipfile.ZipFile(path, "w") as archive:
            for name, file in files_of(session.folder):
                archive.write(file, name)


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": one_line(message)}, status_code=status)


def _set_cookie(response: Response, name: str, value: str, request: Request) -> None:
    is_secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=365 * 86400, httponly=True, samesite="lax", secure=is_secure)


def _with_headers(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response
