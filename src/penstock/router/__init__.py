"""A router: answers of OpenAI-compatible servers, slice by slice, over several of them.

Every request is cut into slices of some output tokens; the dispatcher of
:mod:`penstock.core` says which server gets the next one.  See ``docs/route.md``.
"""
