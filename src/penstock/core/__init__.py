"""Decisions only: which request gets what, in which step.

Nothing here reads a clock, draws from a global random source, imports torch or
asyncio, or touches a file.  See ``docs/design.md``.
"""
