"""What the documentation names exists: commands, their flags, files, headings, and what its Python imports."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import typer

from zsq_deploy.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "zsq_deploy" / "docs").glob("*.md")),
]
IDS = [page.name for page in PAGES]


def walk(command, path=()):
    yield path, {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)} | {"--help"}
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))


def commands_in(text):
    """Every ``zsq ...`` in code, with the flags that it is given."""
    code = [
        *re.findall(r"^```(?!python)\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL),
        *re.findall(r"`([^`\n]+)`", text),
    ]
    for block in code:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|(?=\s)", line):
                found = re.match(r"(?:\S+/)?zsq\s+([a-z].*)", part.strip())
                if found:
                    yield re.split(r"\s#|\s{3,}(?=[^\s-])", found[1])[0].split()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_their_flags_exist(page):
    for words in commands_in(page.read_text(encoding="utf-8")):
        path = ()
        for word in words:
            if (*path, word) not in COMMANDS:
                break
            path = (*path, word)
        assert path, f"there is no command zsq {' '.join(words)}"
        for word in words[len(path) :]:
            flag = re.match(r"--?[a-z][a-z-]*", word)
            if flag:
                assert flag[0] in COMMANDS[path], f"zsq {' '.join(path)} has no {flag[0]}"


def test_commands_are_found_in_pages():
    """The search itself: it finds what is there, with continued lines, and nothing in prose."""
    text = "```\nzsq deploy net.onnx \\\n    --images 4 -o out   # words\ncd x && zsq run a.yaml\n```\nzsq is a word; `zsq env list` is a command"
    assert list(commands_in(text)) == [
        ["deploy", "net.onnx", "--images", "4", "-o", "out"], ["run", "a.yaml"], ["env", "list"],
    ]  # fmt: skip
    assert sum(len(list(commands_in(page.read_text(encoding="utf-8")))) for page in PAGES) > 100


def anchors(page):
    """Names of headings, as they are linked to."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: there is no {path}"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_are_there(page):
    homes = (ROOT, ROOT / "zsq_deploy", page.parent)
    for name in re.findall(r"`((?:zsq_deploy|backends|calib|tools|tests)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert any((home / name).exists() for home in homes), f"there is no {name}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_python_examples_import_is_there(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zsq_deploy"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"
