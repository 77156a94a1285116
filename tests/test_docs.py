"""The documentation is tested like code: links lead somewhere and commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.core.policies import presets

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
RUNS = re.compile(r"<!-- runs -->\n+```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*(?:\$ )?penstock ([a-z][a-z-]*)", re.MULTILINE)
TARGET = re.compile(r"\bmake ([a-z-]+)\b")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    heads = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    bare = [re.sub(r"[^\w\s-]", "", head.lower()).strip() for head in heads]
    return {re.sub(r"[\s-]+", "-", head) for head in bare}


def dead_links(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    dead = []
    for match in LINK.finditer(FENCE.sub("", text)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        exists = page.exists()
        if exists and anchor:
            exists = anchor in anchors(page.read_text(encoding="utf-8"))
        if not exists:
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_links_resolve(path: Path) -> None:
    assert dead_links(path) == []


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    nav = set(re.findall(r"^  - [^:]+: (\S+\.md)$", config, re.MULTILINE))
    assert nav == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_pages_named_in_the_source_exist() -> None:
    named = {
        (label(path), page)
        for path in (ROOT / "src").rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert sorted(pair for pair in named if not (ROOT / pair[1]).exists()) == []


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_python_blocks_compile(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        compile(block, str(path), "exec")


@pytest.mark.parametrize("path", [page for page in PAGES if RUNS.search(page.read_text("utf-8"))])
def test_examples_run(path: Path) -> None:
    """A page's examples share their names, as its reader would take it."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in RUNS.findall(path.read_text(encoding="utf-8")):
        exec(compile(block, str(path), "exec"), names)  # noqa: S102 - it is our own page


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_make_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    spoken = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    used = {
        name for code in [*blocks(text, "bash", "sh"), *spoken] for name in TARGET.findall(code)
    }
    assert used <= known


def commands_in_docs() -> list[str]:
    """Every subcommand of `penstock` that a page tells the reader to type."""
    found: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        spoken = re.findall(r"`(penstock [^`\n]+)`", FENCE.sub("", text))
        for code in [*blocks(text, "bash", "sh"), *spoken]:
            found.update(COMMAND.findall(code))
    return sorted(found)


@pytest.mark.parametrize("command", commands_in_docs())
def test_commands_exist(command: str) -> None:
    script = "import sys; from penstock.cli import main; sys.argv[0] = 'penstock'; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, command, "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"penstock {command}" in done.stdout


def preset_row(preset: presets.Preset) -> tuple[str, ...]:
    """The first six cells of a preset's row, as the policies page must have them."""
    fixed = {"period": preset.period, "per_pass": preset.per_pass}
    usual = {"period": 1, "per_pass": 0}
    shown = {**preset.parameters, **{k: v for k, v in fixed.items() if v != usual[k]}}
    share = f"{preset.share}, {preset.pack}" if preset.pack else preset.share
    answers = (preset.order, preset.admit_name, share, preset.victim)
    return (*answers, " ".join(f"`{k}={v}`" for k, v in shown.items()) or "none")


def test_policies_page_lists_the_presets_as_they_are() -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    table = page.partition("## Presets")[2].partition("\n\n`vllm`")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    said = {row[0].split("`")[1]: tuple(row[1:6]) for row in rows if row and "`" in row[0]}
    assert said == {name: preset_row(preset) for name, preset in presets.PRESETS.items()}


def test_dead_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A head, here\n[ok](#a-head-here) [bad](#nowhere) [gone](gone.md)")
    assert dead_links(page) == ["#nowhere", "gone.md"]
