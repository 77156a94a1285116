"""Who may import whom: docs/design.md, "Layers", held by reading every import in the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"

# The engine process builds its engine here; nothing else of `server` or `bench` knows engines.
FACTORY = "penstock.server.factories"

# Several instances are asked for here; nothing else of `server` knows that there can be any.
BACKEND = "penstock.server.backend"

# Nothing else starts, or even imports, Ray.
RAY = (
    "penstock.cluster.fleet",
    "penstock.cluster.machines",
    "penstock.cluster.object_store",
    "penstock.cluster.direct",
    "penstock.sim.on_ray",
)

FORBIDDEN = {
    "penstock.sim": ("penstock.engine", "torch"),
    "penstock.engine": ("penstock.sim", "penstock.server", "penstock.bench"),
    "penstock.server": (
        "penstock.engine",
        "penstock.router",
        "penstock.cluster",
        "torch",
        "transformers",
    ),
    "penstock.router": ("penstock.engine", "penstock.sim", "penstock.bench", "torch"),
    "penstock.cluster": ("penstock.engine", "penstock.router", "torch", "transformers"),
    "penstock.vllm": ("penstock.sim", "penstock.bench", "penstock.cluster", "penstock.router"),
    "penstock.bench": ("penstock.engine", "torch", "transformers"),
    "penstock.testing": ("penstock.engine", "penstock.server", "torch"),
    "penstock.text": ("penstock.engine", "torch"),
    "penstock": ("penstock.cli", "ray"),
}
"""Package: what nothing in it may import, at module level or inside a function."""


def name_of(path: Path) -> str:
    """Dotted module name of a source file."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str) -> Iterator[str]:
    """Yield each module that a source imports, submodules named in ``from`` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: line {node.lineno}: use an absolute import"
            assert node.module is not None
            yield node.module
            if node.module.split(".")[0] == "penstock":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(module: str, package: str) -> bool:
    """Whether a module is a package or lies in it."""
    return module == package or module.startswith(package + ".")


def violations(source: str, module: str) -> list[str]:
    """Every import of a source that its layer does not allow."""
    found = []
    for imported in set(imports_of(source, module)):
        if module == FACTORY and inside(imported, "penstock.engine"):
            continue
        if module == BACKEND and inside(imported, "penstock.cluster"):
            continue
        if module in RAY and inside(imported, "ray"):
            continue
        top = imported.split(".")[0]
        if inside(module, "penstock.core"):
            free = top in sys.stdlib_module_names - {"asyncio", "time"} or top == "numpy"
            if not (free or inside(imported, "penstock.core")):
                found.append(f"{module} imports {imported}; core knows only core and numpy")
        if not inside(module, "penstock.vllm") and top == "vllm":
            found.append(f"{module} imports {imported}; only penstock.vllm knows vLLM")
        if not inside(module, "penstock.vllm") and inside(imported, "penstock.vllm"):
            found.append(f"{module} imports {imported}; only vLLM imports the plug-in")
        for package, banned in FORBIDDEN.items():
            if inside(module, package):
                found += [
                    f"{module} imports {imported}; {package} must not know {ban}"
                    for ban in banned
                    if inside(imported, ban) and module != "penstock.__main__"
                ]
    return found


MODULES = sorted((SOURCE / "penstock").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_respects_the_layers(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), name_of(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("penstock.core.memory", "import torch"),
        ("penstock.core.memory", "import asyncio"),
        ("penstock.core.policies.admit.x", "def f():\n    from time import monotonic"),
        ("penstock.core.scheduler", "from penstock.server import app"),
        ("penstock.sim.engine", "from penstock import engine"),
        ("penstock.engine.native", "import penstock.sim.clock"),
        ("penstock.server.app", "def f():\n    from penstock.engine import NativeEngine"),
        ("penstock.bench.run", "from penstock.engine import native"),
        ("penstock.text.tokenizer", "import torch.nn"),
        ("penstock.server.app", "from penstock.cli import main"),
        ("penstock.engine.native", "from vllm import LLM"),
        ("penstock.cli", "import penstock.vllm.settings"),
        ("penstock.vllm.scheduler", "from penstock.sim import engine"),
        ("penstock.server.app", "from penstock.router.pool import Pool"),
        ("penstock.router.pool", "from penstock.sim import engine"),
        ("penstock.server.serve", "from penstock.cluster.front import Front"),
        ("penstock.cluster.front", "import ray"),
        ("penstock.sim.cluster", "import ray"),
    ],
)
def test_rules_catch(module: str, source: str) -> None:
    assert violations(source, module)


def test_core_may_use_numpy_and_itself() -> None:
    source = "import heapq\nimport numpy as np\nfrom penstock.core.types import Request"
    assert violations(source, "penstock.core.scheduler") == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("penstock.core.runtime", "torch transformers asyncio starlette"),
        ("penstock.core.policies.presets", "torch transformers asyncio starlette"),
        ("penstock.server.app", "torch transformers matplotlib polars"),
        ("penstock.server.factories", "torch transformers starlette"),
        ("penstock.router.serve", "torch transformers matplotlib polars"),
        ("penstock.server.serve", "torch transformers ray"),
        ("penstock.cluster.build", "torch transformers ray"),
        ("penstock.cli", "torch transformers matplotlib polars"),
    ],
)
def test_what_an_import_must_not_load(module: str, heavy: str) -> None:
    """The rules above hold for direct imports; this holds for what these bring along."""
    script = (
        f"import sys, {module}\n"
        f"loaded = set({heavy!r}.split()) & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
