"""``penstock serve`` and ``penstock config``: the configuration tree as command-line flags.

The flags are made from :mod:`penstock.config`, so that a field's type, default
and words are written once.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional
from urllib.parse import quote

from cyclopts import Parameter

from penstock.config import SLO_FORM, ConfigError, fields, load, to_toml
from penstock.settings import Config

# Left to the configuration to read: cyclopts takes the first type of a union, and makes 0.05
# of an "int or float" a 0.
_WORDS: dict[str, Any] = {"parameters": dict[str, str]}


def serve(model: str | None = None, **given: Any) -> int:
    """Serve a model over an OpenAI-compatible HTTP API."""
    try:
        config = _load({"model": model, **given})
        return _serve(config)
    except ConfigError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 2


def show_config(model: str | None = None, **given: Any) -> int:
    """Print the effective configuration as TOML, with what each field means."""
    try:
        print(to_toml(_load({"model": model, **given})), end="")
    except ConfigError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 2
    return 0


def _load(given: dict[str, Any]) -> Config:
    path = given.pop("config", None)
    slo_classes = given.pop("slo_class", None) or ()
    return load(path, os.environ, given, slo_classes)


def explain(
    request_id: str,
    *,
    url: Annotated[str, Parameter(help="The server's address.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, Parameter(help="A bearer token, if the server wants one.")] = "",
) -> int:
    """Say where an open request stands and why it waits.

    Args:
        request_id: the response's id, or what the client sent as x-request-id.
    """
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        name = quote(request_id, safe="")
        answer = httpx.get(f"{url}/v1/penstock/requests/{name}", headers=headers)
        body = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        print(f"penstock: --url {url}: {error}", file=sys.stderr)
        return 1
    if not answer.is_success:
        print(f"penstock: {body['error']['message']}", file=sys.stderr)
        return 1
    for choice in body["choices"]:
        print(
            f"choice {choice['index']}: {choice['explanation']} ({choice['prompt_tokens']} prompt"
            f" tokens, {choice['output_tokens']} output tokens, {choice['age_s']} s old)"
        )
    return 0


def _serve(config: Config) -> int:
    from penstock.models import ModelNotFoundError, model_path
    from penstock.server.backend import check
    from penstock.server.listen import bind
    from penstock.server.serve import serve_until_stopped
    from penstock.text.tokenizer import load_tokenizer

    check(config)
    if config.engine.max_step_tokens < config.engine.max_batch:
        msg = (
            f"--max-step-tokens {config.engine.max_step_tokens} is less than --max-batch"
            f" {config.engine.max_batch}; every running request needs a token in a step"
        )
        raise ConfigError(msg)
    _check_sim(config)
    try:
        path = model_path(config.engine.model)
    except ModelNotFoundError as error:
        raise ConfigError(str(error)) from None
    try:
        text = load_tokenizer(path)
    except (OSError, ValueError) as error:
        msg = f"model {config.engine.model!r} cannot be used: {error}"
        raise ConfigError(msg) from None
    sock = bind(config.http.host, config.http.port)
    return serve_until_stopped(config, path, text, sock)


def _check_sim(config: Config) -> None:
    """A simulated engine has a profile that can be loaded, and no other engine has one."""
    given = config.sim
    if config.engine.engine != "sim":
        for name in ("profile", "speed"):
            if name in given.changed:
                msg = f"--{name} {getattr(given, name)}: only --engine sim has a {name}"
                raise ConfigError(msg)
        return
    if given.profile is None:
        msg = "--engine sim needs --profile: the name of a model and GPU, or a profile's file"
        raise ConfigError(msg)
    from penstock.sim import profiles

    try:
        profiles.load(given.profile)
    except (OSError, ValueError) as error:
        msg = f"--profile {given.profile}: {error}"
        raise ConfigError(msg) from None


def _with_flags(function: Callable[..., int]) -> Callable[..., int]:
    """Give a function the signature that the configuration tree asks for."""
    parameters = [
        _parameter(
            name,
            _WORDS.get(name, info.annotation),
            f"{info.description}{_default_of(info.get_default(call_default_factory=True))}",
            positional=name == "model",
        )
        for _, name, info in fields()
    ]
    slo_help = f"A named SLO, as {SLO_FORM}; may be repeated."
    parameters.append(_parameter("slo_class", tuple[str, ...], slo_help))
    file_help = "TOML file with settings; 'penstock config' prints one."
    parameters.append(_parameter("config", Path, file_help))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {item.name: item.annotation for item in parameters}
    return function


def _parameter(name: str, kind: Any, words: str, *, positional: bool = False) -> inspect.Parameter:
    place = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
    )
    annotation = Annotated[Optional[kind], Parameter(help=words)]  # noqa: UP045 - made at run time
    return inspect.Parameter(name, place, default=None, annotation=annotation)


def _default_of(default: object) -> str:
    return "" if default is None or default in ((), {}) else f" [default: {default}]"


_with_flags(serve)
_with_flags(show_config)
