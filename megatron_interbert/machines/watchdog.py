"""End a run that hangs, with the reason.

A thread on each rank tells rank 0 once a second what its main thread is doing and since when. The
limits are learned: a phase may take ten times its longest duration so far, and at least `least`
seconds. When every rank is over its limit or has fallen silent, the run hangs: rank 0 names the
rank that the others wait for, and all ranks print the stacks of their threads and end with code 1.
A rank whose connection breaks has died, and the others end at once. If rank 0 itself is silent, the
others judge on their own.

The threads use sockets of their own, because collectives are what hangs.
"""

import contextlib
import faulthandler
import json
import os
import secrets
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.modules.module import register_module_forward_hook

from megatron_interbert.errors import ENDING, UsageError
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.signals import exit_status, identity, killed_by

# phases in the order in which a step enters them, with their least limits as multiples of `least`
ROOM = {"start": 4, "data": 1, "step": 1, "evaluation": 4, "save": 4}
LEARNED = 10  # limit as a multiple of the longest duration so far
# decay of the longest duration per phase: the first step of a run takes longer than all others
FADING = 0.9
BEAT = 1.0  # seconds
# seconds of silence after which a rank that is over its limit no longer waits for rank 0
NO_ANSWER = 10.0
LAST_WORDS = 5.0  # seconds for launchers to see the exit code of the rank that died first
THE_END = {"end": True}


@dataclass(frozen=True)
class Pulse:
    """Hold what the main thread of a rank is doing, since when (monotonic), and its limit in
    seconds.
    """

    phase: str
    step: int
    since: float
    limit: float


@dataclass
class Seen:
    """Hold what rank 0 knows of a rank: its identity, its last report and when that came."""

    node: str
    pid: int
    identity: str
    phase: str = "start"
    step: int = 0
    seconds: float = 0.0
    limit: float = 0.0
    heard: float = 0.0

    def silent(self, now: float) -> float:
        """Return the seconds since the last report."""
        return now - self.heard

    def stuck(self, now: float) -> bool:
        """Check whether the rank is over its limit, counting the time since its last report."""
        return self.seconds + self.silent(now) > self.limit

    def place(self) -> tuple[int, int]:
        """Return how far the rank has come: its step and the number of its phase."""
        return self.step, list(ROOM).index(self.phase)


class Watchdog:
    """Watch the main thread of this rank, which reports its progress by `enter` and `beat`.

    Creating one is collective.
    """

    def __init__(self, state: ParallelState, least: float) -> None:
        """Start watching; `least` is the least limit of a step in seconds, 0 turns it off."""
        self.state = state
        self.least = least
        self._longest: dict[str, float] = {}
        self._pulse = Pulse("start", 0, time.monotonic(), least * ROOM["start"])
        self._ended = threading.Event()
        self._hub: Hub | None = None
        if not least:
            return
        if state.is_main and state.world_size > 1:
            self._hub = Hub(state.world_size, self._pulse.limit)

        meeting = state.gather(self._hub.meeting if self._hub else None)[0]
        self._connection = Connection(meeting, state) if meeting else None
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """Record that the main thread begins a phase (a key of ROOM) of a step."""
        now = time.monotonic()
        before = self._pulse
        self._longest[before.phase] = max(
            now - before.since, FADING * self._longest.get(before.phase, 0.0)
        )
        self._pulse = Pulse(
            phase, step, now, max(self.least * ROOM[phase], LEARNED * self._longest.get(phase, 0.0))
        )

    def beat(self) -> None:
        """Record progress within a phase, such as a finished batch of an evaluation."""
        before = self._pulse
        self._pulse = Pulse(before.phase, before.step, time.monotonic(), before.limit)

    @contextlib.contextmanager
    def fed_by_modules(self) -> Iterator[None]:
        """Record progress whenever a module's forward pass ends in this context."""
        hook = register_module_forward_hook(lambda *_: self.beat())
        try:
            yield
        finally:
            hook.remove()

    def close(self) -> None:
        """Stop watching, and tell the other ranks that this one ended well."""
        if self.least and not self._ended.is_set():
            self._ended.set()
            if self._hub:
                self._hub.leave()
            elif self._connection:
                self._connection.leave()

    # All methods below run in the watchdog's thread.

    def _watch(self) -> None:
        try:
            self._until_the_end()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _until_the_end(self) -> None:
        while not self._pause():
            pulse = self._pulse
            now = time.monotonic()
            # For a main thread that hangs holding Python's lock, so that this thread cannot run
            # either.
            faulthandler.dump_traceback_later(pulse.limit + 60, exit=True)
            over = now - pulse.since > pulse.limit

            if self._connection is None:
                if over:
                    self._end(
                        {
                            "hang": (
                                f"{doing(pulse.phase, pulse.step)} has taken more than"
                                f" {pulse.limit:.0f} s"
                            )
                        }
                    )

                continue

            verdict = self._connection.exchange(pulse, now)
            # a rank that is ending for an error has no need to report the others
            if verdict == THE_END or ENDING.is_set():
                return
            if verdict is None and over and self._connection.silence() > NO_ANSWER:
                verdict = {
                    "hang": (
                        f"rank 0 does not answer and {doing(pulse.phase, pulse.step)} has taken"
                        f" more than {pulse.limit:.0f} s; its process is stopped, or its machine is"
                        " gone"
                    )
                }

            if verdict and not self._ended.is_set():
                self._end(verdict)

    def _pause(self) -> bool:
        """Wait for the next beat or a message of rank 0; return whether watching has ended."""
        if self._connection is not None:
            select.select([self._connection.socket], [], [], BEAT)
            return self._ended.is_set()

        return self._ended.wait(BEAT)

    def _end(self, verdict: dict[str, Any]) -> None:
        where = f"rank {self.state.rank} on {self.state.node}"
        if "gone" in verdict:
            if self.state.is_main or self._connection.broken:
                print(f"error ({where}): {verdict['gone']}", file=sys.stderr, flush=True)
            time.sleep(LAST_WORDS)
        else:
            print(
                f"error ({where}): the run hangs: {verdict['hang']}; if it is only slow, raise"
                " --hang-timeout. The stacks of this rank:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

            for pid, name in verdict.get("kill", []):
                # on this machine only; a stopped process would not react to its launcher's SIGTERM
                if name and identity(pid) == name:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)

            time.sleep(2 * BEAT if self._hub else 0)  # the others have to get the verdict

        os._exit(1)


def how_it_ended(who: str, when: str, pid: int, name: str) -> str:
    """Describe how a rank ended, as far as this machine can tell.

    `name` is the identity of its process: nothing is known about processes on other machines.
    """
    code = exit_status(pid, name)
    if code is None:
        return f"{who} has gone {when}; if it printed no error, it was killed (out of memory?)"
    if code < 0:
        return f"{who} (pid {pid}) was {killed_by(-code)} {when}"

    return f"{who} (pid {pid}) has ended with code {code} {when}; its message says why"


def doing(phase: str, step: int) -> str:
    """Describe a phase in words."""
    return {
        "start": "the start",
        "data": f"waiting for the data of step {step}",
        "step": f"step {step}",
        "evaluation": f"the evaluation after step {step}" if step else "the evaluation",
        "save": f"the checkpoint of step {step}",
    }[phase]


class Connection:
    """Hold the connection of a rank to the hub on rank 0, on which it reports once a second."""

    def __init__(self, meeting: dict[str, Any], state: ParallelState) -> None:
        address = "127.0.0.1" if state.is_main else os.environ["MASTER_ADDR"]
        self._rank_0 = meeting["pid"], meeting["identity"]

        try:
            self.socket = socket.create_connection((address, meeting["port"]), timeout=20)
        except OSError as error:
            raise UsageError(
                f"{state.node}: the watchdog of rank 0 at {address}:{meeting['port']} cannot be"
                f" reached ({error}); open the ports between the machines, or turn it off by"
                " --hang-timeout 0"
            ) from error

        self._heard = time.monotonic()
        self._rest = b""
        self.broken = False
        who = {"node": state.node, "pid": os.getpid(), "identity": identity(os.getpid())}
        self._send({"token": meeting["token"], "rank": state.rank, "who": who})
        self.socket.setblocking(False)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except BlockingIOError:
            pass  # rank 0 has not read for a long time, which `silence` shows
        except OSError:
            self.broken = True

    def silence(self) -> float:
        """Return the seconds since rank 0 was last heard."""
        return time.monotonic() - self._heard

    def leave(self) -> None:
        """Tell the hub that this rank ends normally."""
        self._send({"bye": True})

    def exchange(self, pulse: Pulse, now: float) -> dict[str, Any] | None:
        """Send a report; return the hub's verdict, one that rank 0 is gone, or None."""
        self._send(
            {
                "phase": pulse.phase,
                "step": pulse.step,
                "seconds": now - pulse.since,
                "limit": pulse.limit,
            }
        )
        for message in self._received():
            if message:  # an empty one only shows that rank 0 is alive
                return message

        if not self.broken:
            return None

        when = f"while this rank was in {doing(pulse.phase, pulse.step)}"

        return {"gone": how_it_ended("rank 0", when, *self._rank_0)}

    def _received(self) -> list[dict[str, Any]]:
        try:
            while chunk := self.socket.recv(65536):
                self._rest += chunk
                self._heard = time.monotonic()

            self.broken = True
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True

        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]


class Hub:
    """Hear all ranks on rank 0, answer every second, and judge whether the run hangs or a rank has
    died.
    """

    def __init__(self, ranks: int, limit: float) -> None:
        """Listen for `ranks` ranks; `limit` holds for ranks that have not reported yet."""
        self.limit = limit
        self.server = socket.create_server(("", 0), backlog=ranks)
        self.server.setblocking(False)
        self.meeting = {
            "port": self.server.getsockname()[1],
            "token": secrets.token_hex(16),
            "pid": os.getpid(),
            "identity": identity(os.getpid()),
        }
        self._lines: dict[socket.socket, bytes] = {}
        self._rank_of: dict[socket.socket, int] = {}
        self.seen: dict[int, Seen] = {}
        threading.Thread(target=self._run, name="watchdog hub", daemon=True).start()

    def leave(self) -> None:
        """Tell all ranks that the run has ended normally, so that they stop watching."""
        self._tell_all(THE_END)

    def _run(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.server, selectors.EVENT_READ)
        answered = 0.0
        verdict = None

        while True:
            for key, _ in self._selector.select(BEAT / 2):
                if key.fileobj is self.server:
                    self._accept()
                else:
                    verdict = self._read(key.fileobj) or verdict

            now = time.monotonic()
            verdict = verdict or self._judge(now)
            if now - answered >= BEAT or verdict:
                self._tell_all(verdict or {})
                answered = now

            if verdict:
                time.sleep(BEAT)

    def _accept(self) -> None:
        connection, _ = self.server.accept()
        connection.setblocking(False)
        self._lines[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> dict[str, Any] | None:
        """Read what a rank has sent; return a verdict if it has died."""
        try:
            chunk = connection.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            chunk = b""

        if not chunk:
            return self._lost(connection)

        *lines, self._lines[connection] = (self._lines[connection] + chunk).split(b"\n")
        # strangers may send anything to an open port
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            for line in lines:
                self._take(connection, json.loads(line))

        if connection not in self._rank_of:
            self._lost(connection)

        return None

    def _take(self, connection: socket.socket, message: dict[str, Any]) -> None:
        if message.get("token") == self.meeting["token"]:
            self._rank_of[connection] = message["rank"]
            self.seen[message["rank"]] = Seen(
                **message["who"], limit=self.limit, heard=time.monotonic()
            )
        elif (rank := self._rank_of.get(connection)) is None:
            return
        elif "bye" in message:
            self.seen.pop(rank, None)
            del self._rank_of[connection]
        else:
            self.seen[rank] = replace(self.seen[rank], **message, heard=time.monotonic())

    def _lost(self, connection: socket.socket) -> dict[str, Any] | None:
        if connection not in self._lines:
            return None

        self._selector.unregister(connection)
        connection.close()
        del self._lines[connection]
        seen = (
            self.seen.pop(rank, None)
            if (rank := self._rank_of.pop(connection, None)) is not None
            else None
        )
        if seen is None:
            return None

        when = f"during {doing(seen.phase, seen.step)}"

        return {"gone": how_it_ended(f"rank {rank} on {seen.node}", when, seen.pid, seen.identity)}

    def _judge(self, now: float) -> dict[str, Any] | None:
        """Return a verdict if all ranks are over their limits, else None."""
        if not self.seen or not all(seen.stuck(now) for seen in self.seen.values()):
            return None

        silent = {rank: seen for rank, seen in self.seen.items() if seen.silent(now) > 3 * BEAT}
        if silent:
            text = "; ".join(
                f"rank {rank} on {s.node} has shown no sign of life for {s.silent(now):.0f} s"
                for rank, s in silent.items()
            )
            return {
                "hang": f"{text}: its process is stopped, or its machine is gone",
                "kill": [(s.pid, s.identity) for s in silent.values()],
            }

        last = min(seen.place() for seen in self.seen.values())
        behind = {rank: seen for rank, seen in self.seen.items() if seen.place() == last}
        one = next(iter(behind.values()))
        what = f"{doing(one.phase, one.step)} for {one.seconds:.0f} s (limit {one.limit:.0f} s)"

        if len(behind) == len(self.seen):
            return {
                "hang": (
                    f"all ranks are in {what}, none behind the others: a collective or a device"
                    " hangs"
                )
            }

        names = ", ".join(f"rank {rank} on {seen.node}" for rank, seen in behind.items())

        return {"hang": f"{names} is in {what} and the others wait for it"}

    def _tell_all(self, message: dict[str, Any]) -> None:
        for connection in list(self._rank_of):
            with contextlib.suppress(OSError):  # full or broken: noticed on reading
                connection.send(json.dumps(message).encode() + b"\n")
