"""Every rank says once a second, beside the training, that it is there and how far it is; one that
is lost is named in one message, and all leave.

Each rank but 0 has a connection to rank 0, served by a thread: nothing of it goes through the
process group, and no device is waited for. What is found, and when:

- A rank whose process has ended: at once, for its connection closes.
- A rank that does not answer (stopped, its node gone): after ``ranks_timeout``.
- A rank that answers but stands still: after ``ranks_timeout`` since the last step or batch of a
  pass; after three times as long since the last collective where one piece of work may be long
  (loading, compiling with the first step, saving), and then only if another rank waits for it. Of
  ranks that all stand still, those are named whose main thread does not wait in a collective.

Not found is work of rank 0 alone that never ends (``dist.on_rank0``: it says every second that it
is at it, for it may take hours), nor what holds Python's lock for less than ``ranks_timeout``.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from torch.distributed import DistError, Store

from dskd.errors import LostRankError
from dskd.system.doing import Beat, got_on, here, newest_checkpoint, work
from dskd.system.joining import meeting_place

LONG = 3
"""How many times as long a piece of work may take that is no step and no batch."""

_VERDICT_COMES = 5.0
"""Seconds within which a rank whose collective failed learns which one is lost."""

_LEAVE_TOGETHER = 20.0
"""Seconds for a rank to leave by itself when another one has, before it is made to."""


_watching: list[Watch] = []
"""This process's, if there are other ranks."""


def begin(store: Store, minutes: float) -> None:
    """Watch the others, and be watched, from now on (every rank that :func:`join` has brought
    together)."""
    got_on()
    try:
        _watching.append(Watch(store, 60 * minutes))
    except (DistError, OSError) as problem:  # rank 0's store or its thread does not answer
        lost = LostRankError("rank 0 has died while the ranks were started; see its message")
        lost.printed_by_other_rank = os.environ["RANK"] != "1"
        raise lost from problem


def end(how: int | BaseException) -> None:
    """This rank ends with a status, or by an error. A lost rank may be behind the error: then the
    process ends here, with the status of the others."""
    if not _watching:
        return
    watch = _watching.pop()
    if isinstance(how, SystemExit):
        how = how.code
    if isinstance(how, RuntimeError):  # as a collective raises that has lost a rank
        watch.wait_for_verdict()
    watch.leave({"left": how} if isinstance(how, int) else {"failed": type(how).__name__})


class _Line:
    """A connection that carries JSON, one object a line."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.heard = time.monotonic()
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # closed, or full: the reader finds out, and silence is found
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None if the other end is closed."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # a stranger
            return None


class Watch:
    """The thread that speaks for this rank and listens to rank 0, or, on rank 0, to all."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store = store  # kept: rank 0's serves the others, who may still read it
        self._rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._hosts = [store.get(f"dskd/host/{rank}").decode() for rank in range(world)]
        self._seconds, self._period = seconds, min(1.0, seconds / 10)
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, _Line] = {}
        self._beats: dict[int, Beat] = {}
        self._gone: set[int] = set()
        self._others_left: tuple[float, int] | None = None
        self._goodbye: dict[str, Any] | None = None
        self._began = self._ticked = time.monotonic()
        self._waker, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ, (None, _Line(woken)))
        if self._rank == 0:
            self._token = secrets.token_hex(16)
            self._listener = socket.create_server(("", 0), backlog=world)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ)
            store.set("dskd/watch", f"{self._listener.getsockname()[1]} {self._token}")
        else:
            port, token = store.get("dskd/watch").decode().split()
            line = _Line(socket.create_connection((meeting_place()[0], int(port)), seconds))
            line.send({"rank": self._rank, "token": token})
            self._add(0, line)
        self._thread = threading.Thread(target=self._run, name="dskd-watch", daemon=True)
        self._thread.start()

    # For the main thread

    def leave(self, goodbye: dict[str, Any]) -> None:
        """Say goodbye and end the thread."""
        self._goodbye = goodbye
        self._waker.send(b"\n")
        self._thread.join(timeout=5)

    def wait_for_verdict(self) -> None:
        """Wait a moment for what the thread finds; it ends this process if that is a lost rank."""
        end = time.monotonic() + _VERDICT_COMES
        while time.monotonic() < end:
            if self._others_left is not None:
                os._exit(self._others_left[1])
            time.sleep(self._period / 10)

    # The thread

    def _run(self) -> None:
        while self._goodbye is None:
            for key, _ in self._selector.select(timeout=self._period / 2):
                if key.data is None:
                    self._accept()
                else:
                    self._hear(*key.data)
            now = time.monotonic()
            if now - self._ticked < self._period:
                continue
            if now - self._ticked > self._seconds / 2:  # this process was itself stopped
                self._forgive(now)
            self._ticked = now
            self._beats[self._rank] = here(self._seconds / 2)
            self._tell({"beat": asdict(self._beats[self._rank])})
            self._judge(now)
        self._tell(self._goodbye)
        self._close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._selector.register(connection, selectors.EVENT_READ, (None, _Line(connection)))

    def _add(self, rank: int, line: _Line) -> None:
        self._lines[rank] = line
        self._beats[rank] = Beat()
        with suppress(KeyError):
            self._selector.unregister(line.socket)
        self._selector.register(line.socket, selectors.EVENT_READ, (rank, line))

    def _hear(self, rank: int | None, line: _Line) -> None:
        messages = line.receive()
        if rank is None:
            first = messages[0] if messages else None
            if isinstance(first, dict) and first.get("token") == self._token:
                rank = int(first["rank"])
                self._add(rank, line)
                messages = messages[1:]
            elif messages != []:
                self._selector.unregister(line.socket)
                line.socket.close()
                return
        for message in messages or ():
            self._obey(rank, message)
        if messages is None and rank is not None:
            self._selector.unregister(line.socket)
            line.socket.close()
            if rank not in self._gone:
                self._end(f"{self._name(rank)} has died {work()}", rank)

    def _obey(self, rank: int, message: dict[str, Any]) -> None:
        if "beat" in message:
            self._beats[rank] = Beat(**message["beat"])
        elif "verdict" in message:  # rank 0 has printed it
            os._exit(LostRankError.status)
        elif "failed" in message:
            error = f"ended {work()} with an error of its own ({message['failed']})"
            self._end(f"{self._name(rank)} {error}, which it prints", rank)
        elif "left" in message:
            self._gone.add(rank)
            if message["left"] and self._others_left is None:
                self._others_left = (time.monotonic(), message["left"])
                if self._rank == 0:
                    self._tell(message)

    def _tell(self, message: dict[str, Any]) -> None:
        for rank, line in self._lines.items():
            if rank not in self._gone:
                line.send(message)

    def _forgive(self, now: float) -> None:
        """Count no silence from a time in which this process itself did not run."""
        got_on()
        self._began = now
        for line in self._lines.values():
            line.heard = now

    def _judge(self, now: float) -> None:
        if self._others_left is not None:
            since, status = self._others_left
            if now - since > _LEAVE_TOGETHER:
                os._exit(status)
            return
        others = range(1, len(self._hosts)) if self._rank == 0 else [0]
        for rank in others:
            line = self._lines.get(rank)
            heard = self._began if line is None else line.heard
            if rank not in self._gone and now - heard > self._seconds:
                text = f"has not answered for {self._allowed()}"
                self._end(f"{self._name(rank)} {text}, {work()}", rank)
        if self._rank == 0 and not self._gone:
            self._judge_progress(self._beats)

    def _judge_progress(self, beats: dict[int, Beat]) -> None:
        waited_for = any(beat.waits for beat in beats.values())
        who = [rank for rank, beat in beats.items() if self._hangs(beat, waited_for)]
        if not who and all(b.waits and b.still > LONG * self._seconds for b in beats.values()):
            who = list(beats)  # in a collective that does not end
        if who:
            names = ", ".join(map(self._name, who))
            places = "; ".join(f"{self._name(rank)} in {beats[rank].place}" for rank in who)
            verb = "stands still" if len(who) == 1 else "stand still"
            minutes = f"{max(beats[rank].still for rank in who) / 60:.3g} minutes"
            text = f"{names} {verb} for {minutes} {work()} ({places}; allowed: {self._allowed()})"
            self._end(text, who[0])

    def _hangs(self, beat: Beat, waited_for: bool) -> bool:
        if beat.waits:
            return False
        if beat.paced:
            return beat.still > self._seconds
        return waited_for and beat.still > LONG * self._seconds

    # Words

    def _name(self, rank: int) -> str:
        return f"rank {rank} (node {self._hosts[rank]})"

    def _allowed(self) -> str:
        return f"{self._seconds / 60:g} minutes (`ranks_timeout`)"

    def _end(self, text: str, rank: int) -> None:
        """Say which rank is lost, once for all of them, and end this process."""
        if self._rank in (0, 1) or os.environ["LOCAL_RANK"] == "0":
            message = f"error: {text}; {newest_checkpoint()}; the same command goes on from there\n"
            with suppress(OSError):  # not through Python's stream: the main thread may hold it
                os.write(2, message.encode())
        self._tell({"verdict": text})
        self._close()
        os._exit(LostRankError.status)

    def _close(self) -> None:
        """End the connections when the others have done so too, within a second: with something
        unread, what was last said would be lost."""
        end = time.monotonic() + 1
        lines = [line for rank, line in self._lines.items() if rank not in self._gone]
        for line in lines:
            with suppress(OSError):
                line.socket.shutdown(socket.SHUT_WR)
        while lines and time.monotonic() < end:
            lines = [line for line in lines if line.receive() is not None]
            time.sleep(0.01)
