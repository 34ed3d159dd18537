"""PAPER.md says what is so: its links, examples and commands. `python tests/test_paper.py` mends the line numbers."""

import ast
import doctest
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "docs" / "paper.md"
LINK = re.compile(r"\[((\w+)\.(?:py::)?([\w.]+))\]\(([\w/]+\.py)#L\d+\)")
PROGRAMS = {
    "train": "config.Config", "evaluate": "evaluate.Evaluation", "sample": "sample.Question", "curate": "curate.Recipe",
}  # fmt: skip
VERDICTS = """rise format reflection lambda gamma kl data onpolicy sampling grpo repetition formatreward valuehead anneal
    valueclip perpack retokenise criticwarmup""".split()


@cache
def lines(file: Path) -> dict[str, int]:
    """Line of every function, class, field and constant of a Python file, by dotted name."""
    found: dict[str, int] = {}
    scopes: list[tuple[ast.Module | ast.ClassDef, str]] = [(ast.parse(file.read_text()), "")]
    for scope, prefix in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                scopes.append((node, f"{prefix}{node.name}."))
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [
                    name
                    for target in targets
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name)
                ]
                found |= {prefix + name.id: node.lineno for name in names}
    return found


def mended(page: str) -> str:
    """The page with every link at the line where its name now stands. Raises ValueError for a name that is gone."""

    def now(link: re.Match) -> str:
        label, module, name, file = link.groups()
        path = ROOT / file
        if path.stem != module or not path.is_file() or name not in lines(path):
            raise ValueError(
                f"PAPER.md: {link[0]}: there is no {name} in {file}; name what replaced it, or drop the link"
            )
        return f"[{label}]({file}#L{lines(path)[name]})"

    return LINK.sub(now, page)


def test_links_lead_to_what_they_name() -> None:
    page = PAPER.read_text()
    links, now = ([link[0] for link in LINK.finditer(text)] for text in (page, mended(page)))
    moved = [f"{old}: now {new}" for old, new in zip(links, now, strict=True) if old != new]
    assert not moved, (
        "lines have moved; `python tests/test_paper.py` mends PAPER.md:\n" + "\n".join(moved)
    )
    assert len(links) == page.count("#L") > 100  # no other form of link to a line


def test_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAPER.read_text()):
        assert (ROOT / target).exists(), target


def test_every_verdict_has_its_place() -> None:
    page = PAPER.read_text()
    places = re.findall(
        r"^Miniature: <!-- verdict (\w+) -->(?:(?!<!--).)+<!-- /verdict -->$",
        page,
        re.MULTILINE | re.DOTALL,
    )
    assert sorted(places) == sorted(VERDICTS)
    assert page.count("<!-- verdict") == page.count("<!-- /verdict") == len(VERDICTS)


def test_examples_print_what_they_show() -> None:
    done = doctest.testfile(
        str(PAPER),
        module_relative=False,
        optionflags=doctest.NORMALIZE_WHITESPACE,
        encoding="utf-8",
    )
    assert done.attempted > 15 and done.failed == 0


def known(flag: str, program: str) -> bool:
    module, config = PROGRAMS[program].split(".")
    fields = lines(ROOT / f"{module}.py")
    return any(
        f"{config}.{name.replace('-', '_')}" in fields for name in (flag, flag.removeprefix("no-"))
    )


def test_commands_are_real() -> None:
    """Programs exist and have the flags they are called with; tests and make targets exist."""
    page = PAPER.read_text().replace("\\\n", "")
    commands = re.findall(r"python ([\w/]+)\.py\b([^`\n]*)", page)
    assert len(commands) > 10
    for program, rest in commands:
        assert (ROOT / f"{program}.py").is_file(), program
        flags = re.findall(r"--([a-z][a-z-]+)", rest)
        assert not flags or program in PROGRAMS, (program, flags)
        assert all(known(flag, program) for flag in flags), (program, flags)
    for flag in re.findall(r"`--([a-z][a-z-]+)", page):
        assert any(known(flag, program) for program in PROGRAMS), flag
    for file, test in re.findall(r"pytest (?:-\S+ )*(tests/\w+\.py)(?:::(\w+))?", page):
        assert (ROOT / file).is_file() and (not test or test in lines(ROOT / file)), (file, test)
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`make (\w+)", page))


if __name__ == "__main__":
    PAPER.write_text(mended(PAPER.read_text()))
