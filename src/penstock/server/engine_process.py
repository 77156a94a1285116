"""The engine process: take commands in, turn the runtime, send each step's news up.

It is started by :mod:`penstock.server.supervisor` with its
:class:`~penstock.server.factories.EngineSpec` as the first line of standard
input.  Standard input then stays open for as long as the front end lives: when
it closes, however the front end ended, this process leaves too.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import traceback

import msgspec
import zmq

from penstock.server.engine_loop import build_loop, spin_briefly
from penstock.server.factories import EngineSpec
from penstock.server.messages import Command, Event


class SocketPipe:
    """Two sockets; see :class:`penstock.server.engine_loop.Pipe`."""

    def __init__(self, commands: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        self._commands = commands
        self._events = events
        self._decode = msgspec.msgpack.Decoder(Command).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def receive(self) -> Command | None:
        """The next command, if there is one."""
        try:
            raw = self._commands.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        command: Command = self._decode(raw)
        return command

    def wait(self, seconds: float) -> None:
        """Until there is a command, but no longer than this."""
        self._commands.poll(round(1000 * seconds))

    def send(self, event: Event) -> None:
        """Hand an event over."""
        self._events.send(self._encode(event))


def main() -> int:
    """Run an engine process; returns its exit status."""
    # The front end decides when to leave; a Ctrl-C at the terminal reaches it first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineSpec)
    spin_briefly()
    threading.Thread(target=_leave_with_front_end, daemon=True).start()
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    try:
        loop = build_loop(spec, SocketPipe(commands, events))
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it
        if not isinstance(error, ValueError | OSError):  # those say what to change, in words
            traceback.print_exc()
        sys.stderr.write(f"penstock: the engine cannot start: {error}\n")
        return 1
    # Models are full of objects that stay; the collector would look at them again and again.
    gc.collect()
    gc.freeze()
    commands.rcvhwm = 0
    events.linger = 0
    commands.connect(spec.commands)
    events.connect(spec.events)
    try:
        loop.run()
    finally:
        loop.close()
        context.destroy(linger=0)
    return 0


def _leave_with_front_end() -> None:
    # The raw descriptor: a thread that sits in sys.stdin would hold its lock at shutdown.
    while os.read(sys.stdin.fileno(), 1 << 10):
        pass
    os._exit(0)


if __name__ == "__main__":
    # Everything is closed by now; what the interpreter would still tear down (torch above all)
    # takes longer than a supervisor should wait.
    status = main()
    sys.stderr.flush()
    os._exit(status)
