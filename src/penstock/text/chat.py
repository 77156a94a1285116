"""Chat templates: Jinja programs that come with a model and turn messages into a prompt.

The environment is the one of transformers: sandboxed, with loop controls, the ``generation``
tag, ``raise_exception``, ``strftime_now`` and a ``tojson`` that leaves HTML alone.  Templates
are code from elsewhere, so they see nothing but JSON data and cannot reach Python's internals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, TypeAlias

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from penstock.core.types import RequestError

Message: TypeAlias = Mapping[str, object]
"""One message of a chat: ``role``, ``content``, and whatever else the template reads; JSON data."""


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant wrote, for training; here it says nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares a set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's ``namespace`` without names that could reach Python's internals."""

    def __init__(*args: object, **kwargs: object) -> None:
        self, *initial = args
        assert isinstance(self, _Namespace)
        values = _new_dict(*initial, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        msg = f"a chat template may not store {name!r} in a namespace"
        raise SecurityError(msg)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: object,  # the parameters that templates pass, by name or by place
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - templates want the local date


def _new_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(*args, **kwargs)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja program.
        special_tokens: names such as ``bos_token`` that it may use, and their text.

    Raises:
        ValueError: the program has a syntax error.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_new_dict,
            namespace=_Namespace,
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            msg = f"the model's chat template is not valid at line {error.lineno}: {error.message}"
            raise ValueError(msg) from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the prompt's text.

        Args:
            messages: the chat so far.
            add_generation_prompt: end with what opens the assistant's turn.

        Raises:
            RequestError: the messages are not JSON data, or the template refuses them.
        """
        try:
            plain = json.loads(json.dumps(list(messages)))
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError) as error:
            msg = f"messages do not fit the model's chat template: {error}"
            raise RequestError("messages", msg) from error
