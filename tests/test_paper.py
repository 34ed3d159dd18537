"""docs/paper.md agrees with the code: its links, examples and places for verdicts."""

import ast
import doctest
import re
from functools import cache
from pathlib import Path

from experiments.claims import CLAIMS

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "docs" / "paper.md"
PAGE = PAPER.read_text()
LINK = re.compile(r"\[([\w.:]+)\]\(\.\./([\w/]+\.py)\)")


@cache
def defined(path: Path) -> set[str]:
    """Dotted names of the functions, classes, fields and constants of a Python file."""
    found: set[str] = set()
    scopes: list[tuple[ast.Module | ast.ClassDef, str]] = [(ast.parse(path.read_text()), "")]
    for scope, prefix in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                scopes.append((node, f"{prefix}{node.name}."))
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [name for target in targets for name in ast.walk(target)]
                found |= {prefix + name.id for name in names if isinstance(name, ast.Name)}
    return found


def is_defined(label: str, file: str) -> bool:
    """Whether a link's label is the file, dotted or as a test's, and then a name in it."""
    module = Path(file).name + "::" if "::" in label else file[: -len("py")].replace("/", ".")
    name = label.removeprefix(module)
    return label.startswith(module) and name in defined(ROOT / file)


def test_links_lead_to_what_they_name() -> None:
    """[gae.gae](../gae.py) and [test_gae.py::test_by_hand](../tests/test_gae.py)."""
    links = LINK.findall(PAGE)
    assert len(links) == PAGE.count(".py)") > 100  # no other form of link to code
    wrong = [f"{label} links to {file}" for label, file in links if not is_defined(label, file)]
    assert not wrong, "\n".join(wrong)


def test_links_have_no_line_numbers() -> None:
    assert not re.search(r"\.py#L\d", PAGE)


def test_every_verdict_has_its_place() -> None:
    both = PAGE + PAPER.with_name("critics.md").read_text()
    places = re.findall(
        r"^Miniature: <!-- verdict (\w+) -->(?:(?!<!--).)+<!-- /verdict -->$",
        both,
        re.MULTILINE | re.DOTALL,
    )
    assert sorted(places) == sorted(CLAIMS)
    assert both.count("<!-- verdict") == both.count("<!-- /verdict") == len(CLAIMS)


def test_examples_print_what_they_show() -> None:
    done = doctest.testfile(
        str(PAPER),
        module_relative=False,
        optionflags=doctest.NORMALIZE_WHITESPACE,
        encoding="utf-8",
    )
    assert done.attempted > 15 and done.failed == 0


def test_minutes_add_up() -> None:
    """The sum that the page announces is that of its headings."""
    minutes = [int(m) for m in re.findall(r"^## .* · (\d+) min$", PAGE, re.MULTILINE)]
    announced = re.search(r"how many minutes to allow, (\d+) in\s+all", PAGE)
    assert sum(minutes) == int(announced[1])
