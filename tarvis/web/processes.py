"""Processes that may die, and a queue that serves the people who wait in turn."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import cv2
import torch

from tarvis.structures import InputError, one_line
from tarvis.web.jobs import Answers, Follow, Give

SLICE = 24
"""Answers that one session's job gives before the next session that waits is served."""
MOST_WAITING = 4
"""Jobs of one session that may wait."""
MOST_WAITING_IN_ALL = 64
SECONDS_TO_END = 2.0


class DiedError(Exception):
    """A process ended before it had answered."""


class Busy(InputError):
    """Too many jobs wait."""


class Process:
    """A process that answers jobs, one after the other. One that has died is started anew.

    Args:
        make: makes, in the process, the function that answers jobs.
        threads: of its computations.
    """

    def __init__(self, make: Callable[[], Answers], threads: int = 1) -> None:
        self._make, self._threads = make, threads
        self._lock = threading.Lock()
        self._process: Any = None
        self._connection: Any = None
        self._numbers = itertools.count()

    def ask(self, job: Any) -> Iterator[Any]:
        """The answers to a job, each worked out when it is asked for; between two, other jobs may be asked.

        Raises:
            InputError: what the process says.
            DiedError: it has ended before.
        """
        with self._lock:
            with _deaths():
                self._start()
            process, number = self._process, next(self._numbers)
        reply = self._exchange(process, number, job)
        try:
            while reply[0] == "answer":
                yield reply[1]
                reply = self._exchange(process, number)
        except GeneratorExit:
            with contextlib.suppress(DiedError):
                self._exchange(process, number, is_stopped=True)
            raise
        if reply[0] == "error":
            raise InputError(reply[1])

    def _exchange(self, process: Any, number: int, job: Any = None, *, is_stopped: bool = False) -> Any:
        """What the process replies about a job; `job` the first time."""
        with self._lock:
            if process is not self._process:
                raise DiedError("the process that held this job has ended")
            try:
                with _deaths():
                    self._connection.send((number, job, is_stopped))
                    return self._connection.recv()
            except DiedError:
                self._process = None
                raise

    def answer(self, job: Any) -> Any:
        """The last answer to a job; None if there is none. Raises as `ask` does."""
        answer = None
        for answer in self.ask(job):  # noqa: B007
            pass
        return answer

    def start(self) -> None:
        """Start now, and wait until it is ready.

        Raises:
            InputError: it cannot do its work; why.
        """
        with self._lock:
            try:
                self._start()
            except (EOFError, OSError) as error:
                raise InputError(f"a process of the server ended as it began ({error})") from None

    def end(self) -> None:
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make, self._threads), daemon=True)
        self._process.start()
        theirs.close()
        kind, what = self._connection.recv()
        if kind == "error":
            self._process = None
            raise InputError(what)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._connection.close()
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(connection: Connection, make: Callable[[], Answers], threads: int) -> None:
    """What runs in the process, until the server has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            answers = make()
        except (InputError, OSError) as error:
            connection.send(("error", one_line(str(error))))
            return
        connection.send(("ready", None))
        begun: dict[int, Iterator[Any]] = {}
        while True:
            number, job, is_stopped = connection.recv()
            if job is not None:
                begun[number] = iter(answers(job))
            try:
                reply = ("end", None) if is_stopped else ("answer", next(begun[number]))
            except StopIteration:
                reply = ("end", None)
            except (InputError, OSError, MemoryError) as error:
                reply = ("error", one_line(str(error) or "out of memory"))
            if reply[0] != "answer":
                begun.pop(number, None)
            connection.send(reply)


@contextlib.contextmanager
def _deaths() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise DiedError(str(error)) from None


@dataclass
class Work:
    """A job of a session. The queue's thread calls `answer` each time, and `end` with an error or None."""

    session: str
    job: Any
    answer: Callable[[Any], None]
    end: Callable[[str | None], None]
    is_cancelled: bool = False
    tries: int = 1
    answers: Iterator[Any] | None = None
    """What is left of them; None before it is begun."""


class Queue:
    """Jobs for one process: sessions are served in turn, and a long job makes room for those that wait."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._waiting: OrderedDict[str, deque[Work]] = OrderedDict()
        self._changed = threading.Condition()
        self._is_open, self._is_working = True, False
        self._thread = threading.Thread(target=self._run, name="queue", daemon=True)
        self._thread.start()

    def put(self, work: Work) -> None:
        """Let a job wait for its turn.

        Raises:
            Busy: too many wait.
        """
        with self._changed:
            own = self._waiting.get(work.session, ())
            if len(own) >= MOST_WAITING or sum(map(len, self._waiting.values())) >= MOST_WAITING_IN_ALL:
                raise Busy("too much is waiting to be done; try again in a moment")
            self._append(work)

    def idle(self) -> None:
        """Wait until nothing is done, and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_working)

    def close(self) -> None:
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        self._process.end()
        self._thread.join()

    def _append(self, work: Work) -> None:
        own = self._waiting.setdefault(work.session, deque())
        if isinstance(work.job, Give):  # somebody has clicked
            own.appendleft(work)
            self._waiting.move_to_end(work.session, last=False)
        else:
            own.append(work)
        self._changed.notify_all()

    def _next(self) -> Work | None:
        with self._changed:
            self._is_working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or not self._is_open)
            if not self._is_open:
                return None
            session, own = self._waiting.popitem(last=False)
            work = own.popleft()
            if own:
                self._waiting[session] = own
            self._is_working = True
            return work

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work.end(None) if self._do(work) else self._again(work)
            except InputError as error:
                work.end(str(error))
            except DiedError:
                work.tries, work.answers = work.tries - 1, None
                if work.tries < 0 or not self._is_open:
                    work.end("the process that does this work ended; try again")
                else:
                    self._again(work)
            except Exception as error:  # whatever it is, the others are served
                work.answers = None
                work.end(one_line(f"this went wrong: {error}"))

    def _again(self, work: Work) -> None:
        with self._changed:
            self._append(work)

    def _do(self, work: Work) -> bool:
        """Whether a job was done, or cancelled; else it makes room, and goes on later where it was."""
        if work.is_cancelled:
            work.answers = None  # closes them
            return True
        answers = work.answers = work.answers or self._process.ask(work.job)
        done = 0
        while not work.is_cancelled and not self._is_due(work, done):
            try:
                answer = next(answers)
            except StopIteration:
                return True
            done += 1
            if work.is_cancelled:
                break
            work.answer(answer)
            if isinstance(work.job, Follow):  # what is left, should the process die
                frame, masks = answer
                work.job = work.job._replace(masks=masks, start=frame)
        if work.is_cancelled:
            work.answers = None
        return work.is_cancelled

    def _is_due(self, work: Work, done: int) -> bool:
        """Whether others are served now."""
        with self._changed:
            waiting = [each for own in self._waiting.values() for each in own]
        if done == 0 or isinstance(work.job, Give):
            return False
        is_clicked = any(isinstance(each.job, Give) for each in waiting)
        return is_clicked or (done >= SLICE and any(each.session != work.session for each in waiting))
