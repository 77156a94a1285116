"""The configuration tree: a TOML file, then the environment, then flags.

Each field is declared once, in :mod:`penstock.settings`.  ``max_waiting`` of section
``admission`` is ``[admission] max_waiting`` in a file, ``PENSTOCK_MAX_WAITING``
in the environment and ``--max-waiting`` on the command line.  Later sources
win, and every message about a value says which source it came from.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from penstock.settings import Config, Section

ENV_PREFIX = "PENSTOCK_"
_OF_OTHERS = frozenset({"PENSTOCK_ROUTE_API_KEY"})  # read by ``penstock route``
_OF_A_SERVICE = re.compile(
    r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)
BOUNDS = ("ttft", "tpot", "gap", "e2e")
SLO_FORM = "name=ttft:0.5,tpot:0.03,gap:0.2,e2e:10,on_miss:keep|demote|expire"


class ConfigError(Exception):
    """A configuration that cannot be used; the message names the source, the value and the rule."""


Tree: TypeAlias = dict[str, dict[str, Any]]
Sources: TypeAlias = dict[tuple[str, str], str]


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """Every plain setting: (section, name, declaration).  Names are unique over sections."""
    for section, info in Config.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            for name, field in info.annotation.model_fields.items():
                yield section, name, field


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    slo_classes: Sequence[str] = (),
) -> Config:
    """Merge the sources and check the result.

    Args:
        path: a TOML file.
        environ: environment variables; others than ``PENSTOCK_...`` are left alone.
        flags: values by field name; ``None`` means not given.
        slo_classes: ``name=ttft:0.5,...`` as the flag ``--slo-class`` takes them.

    Raises:
        ConfigError: naming the source, the value and what would be right.
    """
    tree: Tree = {}
    sources: Sources = {}
    if path is not None:
        _merge_file(path, tree, sources)
    _merge_environ(environ or {}, tree, sources)
    for section, name, _ in fields():
        value = (flags or {}).get(name)
        if value is not None:
            tree.setdefault(section, {})[name] = value
            sources[section, name] = "--" + name.replace("_", "-")
    for text in slo_classes:
        name, bounds = _parse_slo_class(text)
        tree.setdefault("slo", {})[name] = bounds
        sources["slo", name] = f"--slo-class {text}"
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(error, sources)) from None


def _merge_file(path: Path, tree: Tree, sources: Sources) -> None:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"--config {path}: cannot be read as TOML: {error}"
        raise ConfigError(msg) from None
    for section, values in content.items():
        if section not in Config.model_fields or not isinstance(values, dict):
            known = ", ".join(f"[{name}]" for name in Config.model_fields)
            msg = f"{path}: [{section}] is not a section; it must be one of {known}"
            raise ConfigError(msg)
        for name, value in values.items():
            tree.setdefault(section, {})[name] = value
            sources[section, name] = f"{path}: [{section}] {name}"


def _merge_environ(environ: Mapping[str, str], tree: Tree, sources: Sources) -> None:
    known = {ENV_PREFIX + name.upper(): (section, name) for section, name, _ in fields()}
    for key in sorted(environ):
        if not key.startswith(ENV_PREFIX):
            continue
        if key in _OF_OTHERS or _is_of_kubernetes(key.removeprefix(ENV_PREFIX), environ[key]):
            continue
        if key not in known:
            msg = f"{key} is not a setting of penstock; 'penstock config --help' lists them"
            raise ConfigError(msg)
        section, name = known[key]
        value: object = environ[key]
        if name == "api_keys":
            value = [part.strip() for part in environ[key].split(",") if part.strip()]
        elif name == "parameters":
            value = _parse_parameters(key, environ[key])
        tree.setdefault(section, {})[name] = value
        sources[section, name] = key


def _is_of_kubernetes(name: str, value: str) -> bool:
    """Whether it tells of a Service "penstock" or "penstock-...", as every container is told."""
    address = f"_{name}".endswith("_PORT") and "://" in value
    return address or bool(_OF_A_SERVICE.fullmatch(name))


def _parse_parameters(key: str, text: str) -> dict[str, str]:
    values = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            msg = f"{key} is {text!r}: {part!r} cannot be read; it must look like reserve=0.05"
            raise ConfigError(msg)
        values[name.strip()] = value.strip()
    return values


def _parse_slo_class(text: str) -> tuple[str, dict[str, object]]:
    name, equals, rest = text.partition("=")
    bounds: dict[str, object] = {}
    for part in rest.split(","):
        key, colon, value = part.partition(":")
        if not (name and equals and colon) or key not in (*BOUNDS, "on_miss") or key in bounds:
            msg = f"--slo-class {text!r} cannot be read at {part!r}; it must look like {SLO_FORM}"
            raise ConfigError(msg)
        bounds[key] = value
    return name, bounds


def _describe(error: ValidationError, sources: Sources) -> str:
    lines = []
    for item in error.errors():
        section, name = (*(str(part) for part in item["loc"]), "", "")[:2]
        source = sources.get((section, name), f"[{section}] {name}")
        rest = ".".join(str(part) for part in item["loc"][2:])
        where = f"{source} ({rest})" if rest else source
        if item["type"] == "extra_forbidden":
            # Its value stays unsaid: under a mistyped name it may be a key.
            lines.append(
                f"{where} is not a setting of penstock; 'penstock config --help' lists them"
            )
            continue
        secret = any("key" in str(part).lower() for part in item["loc"])
        value = "a value" if secret else repr(item["input"])
        lines.append(f"{where}: {value} is refused: {_rule(item['msg'])}")
    return "\n".join(lines)


def _rule(message: str) -> str:
    text = message.removeprefix("Value error, ")
    return text.replace("Input should be", "it must be")


def to_toml(config: Config) -> str:
    """The effective configuration as TOML, with each field's words; API keys are hidden."""
    lines: list[str] = []
    previous = ""
    for section, name, info in fields():
        if section != previous:
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
            previous = section
        value = getattr(getattr(config, section), name)
        lines.append(f"# {info.description}")
        if name == "api_keys" and value:
            # Not a value: read back, it would be a key that everyone knows.
            lines.append(f"# {name} = {len(value)} of them, hidden; to be set here or elsewhere")
        else:
            lines.append(f"# {name} =" if value is None else f"{name} = {_toml_value(value)}")
    for name, slo_class in config.slo.items():
        lines += ["", f"[slo.{_toml_key(name)}]"]
        for key, value in slo_class.model_dump(mode="json", exclude_none=True).items():
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else _toml_value(name)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
