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
import time
import traceback

import msgspec
import zmq

from penstock.core.runtime import Runtime, StepOutput
from penstock.core.types import RequestError
from penstock.server.factories import EngineSpec, build_engine, build_scheduler
from penstock.server.messages import (
    Add,
    Cancel,
    Command,
    End,
    Event,
    Explain,
    Explained,
    Gauges,
    Ready,
    Refused,
    Step,
    Stop,
)

# With requests waiting, time alone may change a decision (a deadline passes, a forecast ages).
_WAITING_POLL_MS = 5
_IDLE_POLL_MS = 1000
# How often a thread of libgomp looks whether the others are done before it sleeps.
_SPINS = "10000"


class EngineLoop:
    """Turns a runtime between two sockets."""

    def __init__(
        self, runtime: Runtime, commands: zmq.Socket[bytes], events: zmq.Socket[bytes]
    ) -> None:
        self._runtime = runtime
        self._commands = commands
        self._events = events
        self._decode = msgspec.msgpack.Decoder(Command).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._received = 0
        self._stopping = False

    def run(self) -> None:
        """Until told to stop."""
        capabilities = self._runtime.engine.capabilities
        self._send(
            Ready(
                capabilities.kv_blocks,
                capabilities.block_size,
                capabilities.max_batch,
                capabilities.max_step_tokens,
                capabilities.max_request_tokens,
            )
        )
        reported = True
        while not self._stopping:
            changed = self._take_commands()
            output = self._runtime.step()
            if output is not None:
                self._send(self._report(output))
                reported = False
            elif changed or not reported:
                # Nothing runs any more: say so once, or the last books would stand for ever.
                self._send(self._report(StepOutput({}, (), 0.0, 0.0)))
                reported = True
            else:
                waiting = self._runtime.stats().waiting
                self._commands.poll(_WAITING_POLL_MS if waiting else _IDLE_POLL_MS)

    def _take_commands(self) -> bool:
        taken = False
        while not self._stopping:
            try:
                command = self._decode(self._commands.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            self._obey(command)
            taken = True
        return taken

    def _obey(self, command: Command) -> None:
        match command:
            case Add():
                self._received += 1
                try:
                    self._runtime.add(*command.unpack(self._runtime.engine.capabilities))
                except RequestError as error:
                    self._send(Refused(command.id, error.field, str(error)))
            case Cancel():
                self._runtime.cancel(command.id, command.reason)
            case Explain():
                text = self._runtime.scheduler.explain(command.id)
                self._send(Explained(command.ticket, text or "it has ended"))
            case Stop():
                self._stopping = True

    def _report(self, output: StepOutput) -> Step:
        stats = self._runtime.stats()
        details = {
            request_id: (token.logprob, list(token.top))
            for request_id, token in output.tokens.items()
            if token.logprob is not None
        }
        return Step(
            tokens={request_id: token.id for request_id, token in output.tokens.items()},
            details=details,
            ended=[
                End(end.id, end.reason, end.output_tokens, end.evictions, end.detail)
                for end in output.ended
            ],
            seconds=output.seconds,
            planning=output.planning,
            gauges=Gauges(
                received=self._received,
                running=stats.running,
                waiting=stats.waiting,
                waiting_tokens=stats.waiting_tokens,
                kv_usage=stats.kv_usage,
                evictions=stats.evictions,
                rate=stats.admission_rate,
            ),
        )

    def _send(self, event: Event) -> None:
        self._events.send(self._encode(event))


def main() -> int:
    """Run an engine process; returns its exit status."""
    # The front end decides when to leave; a Ctrl-C at the terminal reaches it first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineSpec)
    _spin_briefly()
    threading.Thread(target=_leave_with_front_end, daemon=True).start()
    try:
        engine = build_engine(spec)
        scheduler = build_scheduler(spec, engine)
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it
        if not isinstance(error, ValueError | OSError):  # those say what to change, in words
            traceback.print_exc()
        sys.stderr.write(f"penstock: the engine cannot start: {error}\n")
        return 1
    # Models are full of objects that stay; the collector would look at them again and again.
    gc.collect()
    gc.freeze()
    context = zmq.Context()
    commands, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    commands.rcvhwm = 0
    events.linger = 0
    commands.connect(spec.commands)
    events.connect(spec.events)
    try:
        EngineLoop(Runtime(scheduler, engine, time.monotonic), commands, events).run()
    finally:
        engine.close()
        context.destroy(linger=0)
    return 0


def _spin_briefly() -> None:
    """Have waiting threads sleep soon; before torch, whose OpenMP reads this when it is loaded.

    By default they spin for milliseconds, and where other processes want the cores too, that
    takes the time from the very threads that are waited for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


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
