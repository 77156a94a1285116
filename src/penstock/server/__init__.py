"""The OpenAI-compatible server: an HTTP front end and an engine in a process of its own.

The front end tokenizes, admits, streams and measures, and never imports torch;
the engine process turns :class:`penstock.core.runtime.Runtime`.  They exchange
the messages of :mod:`penstock.server.messages`, one per step.  See
``docs/server.md``.
"""
