"""``penstock route``: several servers behind one address, from the command line."""

from __future__ import annotations

import sys

from penstock.config import ConfigError
from penstock.router.settings import Settings


def route(*, settings: Settings | None = None) -> int:
    """Route completions to several OpenAI-compatible servers, a slice of their output at a time.

    The exit code is 0 after SIGTERM or SIGINT, 1 if HTTP cannot be served, 2 if options are wrong
    or a backend cannot be used.

    Args:
        settings: What to do.
    """
    from penstock.router.serve import route_until_stopped
    from penstock.server.listen import bind

    try:
        checked = (settings or Settings()).checked()
        with bind(checked.host, checked.port) as sock:
            return route_until_stopped(checked, sock)
    except ConfigError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 2
