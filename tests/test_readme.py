"""README.md and the pages of docs/ agree with the code, and the code keeps its form."""

import ast
import doctest
import fnmatch
import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import write_orz
from test_paper import defined

import train
from benchmarks import logprob
from benchmarks.__main__ import COMMANDS
from config import Config, parse
from curation.curate import Recipe
from evaluate import Evaluation
from experiments.claims import CLAIMS
from preflight import prepare
from reports.metrics import rollout_metrics
from rollout import Rollout
from tools import plan
from tools.ask import Question
from tools.export import Settings as Export
from toy import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
METRICS = (ROOT / "docs" / "metrics.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [*FRONT, *DOCS]}
HISTORY = {"docs/changelog.md", "docs/log.md"}  # they also name flags and files that are gone
FOLDERS = ("grading", "curation", "reports", "tools", "toy", "experiments", "benchmarks")
SOURCES = sorted([*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))])
PROGRAMS = {
    "train": Config,
    "evaluate": Evaluation,
    "tools.ask": Question,
    "tools.export": Export,
    "curation.curate": Recipe,
}


# ── the tree ─────────────────────────────────────────────────────────────────────────────────────


def visible(folder: Path) -> set[str]:
    """Names in a folder, without hidden ones, caches, and what .gitignore leaves out."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    return {
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    }


def module_name(path: Path) -> str:
    """grading/pool.py → grading.pool; a folder's __init__.py → the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in SOURCES}


def test_the_root_stays_small() -> None:
    names = visible(ROOT)
    assert len([name for name in names if name.endswith(".py")]) <= 18
    assert len(names) <= 31, sorted(names)


def file_map() -> dict[str, str]:
    """README's file map: name → what it says."""
    block = README.split("## The files")[1].split("```")[1]
    return dict(re.findall(r"^(\S+) +(\S.*)$", block, re.MULTILINE))


def test_file_map_is_the_tree() -> None:
    """Every Python file and folder of the root is in the map, and every file of the folders that
    serve the recipe."""
    listed = file_map()
    folders = {f"{name}/" for name in visible(ROOT) if (ROOT / name).is_dir()}
    assert set(listed) == {path.name for path in ROOT.glob("*.py")} | folders
    for folder in folders:
        names = visible(ROOT / folder) - {"__init__.py"}
        files = {name for name in names if (ROOT / folder / name).is_file()}
        named = set(re.findall(r"[\w-]+\.(?:py|html|txt)", listed[folder]))
        assert named <= files, (folder, named - files)
        if folder.rstrip("/") in ("grading", "curation", "reports", "tools", "toy"):
            assert named == files, (folder, files - named)


# ── the form of the code ─────────────────────────────────────────────────────────────────────────


def test_lines_have_at_most_100_columns() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*SOURCES, *(ROOT / "tests").glob("*.py")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not long, "\n".join(long)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function after its signature and its docstring."""
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is None:
        return function.end_lineno - first.lineno + 1
    return function.end_lineno - first.end_lineno


def test_functions_have_at_most_40_lines() -> None:
    functions = [
        (path, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 300
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {body_lines(node)}"
        for path, node in functions
        if body_lines(node) > 40
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_worked_examples(name: str) -> None:
    loaded = importlib.import_module(name)
    assert doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name in MODULES and name not in FOLDERS}


def circle(uses: dict[str, set[str]]) -> set[str]:
    """What is left when everything that uses nothing, or that nothing uses, has been taken away."""
    left = set(uses)
    while True:
        using = {name for name in left if uses[name] & (left - {name})}
        used = {other for name in using for other in uses[name] - {name}}
        if using & used == left:
            return left
        left = using & used


def test_imports_run_downwards() -> None:
    """No circle among files, none among folders, each file of the root counted as a folder."""
    uses = {name: imports(path) for name, path in MODULES.items() if name not in FOLDERS}
    assert len(uses) > 45
    left = circle(uses)
    assert not left, {name: uses[name] & left for name in left}
    folders: dict[str, set[str]] = {}
    for name, used in uses.items():
        folders.setdefault(name.split(".")[0], set()).update(m.split(".")[0] for m in used)
    left = circle(folders)
    assert not left, {name: folders[name] & left for name in left}


def test_the_losses_need_torch_alone_and_nothing_needs_train() -> None:
    assert imports(ROOT / "gae.py") == imports(ROOT / "ppo.py") == set()
    for path in SOURCES:
        if path.parent.name not in ("experiments", "benchmarks"):
            assert "train" not in imports(path), path.relative_to(ROOT)


# ── the form of the pages ────────────────────────────────────────────────────────────────────────


def test_readme_is_a_front_page() -> None:
    assert len(README.splitlines()) <= 220
    assert len(README.split()) <= 2200
    wide = [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide, wide


@pytest.mark.parametrize("page", PAGES)
def test_pages_begin_with_what_they_answer(page: str) -> None:
    title, empty, text = PAGES[page].splitlines()[:3]
    assert title.startswith("# ") and not empty
    assert re.match(r"[A-Z*`]", text), f"{page} begins with {text!r}"


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables of a page, as rows of cells; code blocks are left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in block.splitlines()]
        yield [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_whole_and_not_empty(page: str) -> None:
    for header, rule, *body in tables(PAGES[page]):
        assert all(re.fullmatch(r":?-+:?", cell) for cell in rule), (page, header)
        assert all(len(row) == len(header) for row in [rule, *body]), (page, header)
        filled = [cell for row in body for cell in row[1:] if cell not in ("", "–")]
        assert filled, f"{page}: the table {header} is empty"


def anchors(text: str) -> set[str]:
    """What links to the headings of a page end in."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert path.is_relative_to(ROOT), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"
    assert "FIXME" not in PAGES[page]


def test_every_page_can_be_found_from_readme() -> None:
    assert all(f"](docs/{path.name}" in README for path in DOCS)


# ── names, commands and flags in the pages ───────────────────────────────────────────────────────


def missing(name: str) -> str:
    """Why a dotted name of the project does not exist; "" if it does, or is not the project's."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if module in MODULES and module not in FOLDERS:
            return "" if rest in defined(MODULES[module]) else f"{module} has no {rest}"
    return ""


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"docs/changelog.md"}))
def test_names_in_the_text_exist(page: str) -> None:
    """Files in backticks are in the tree; functions of the project are in their modules."""
    files = {path.name for path in ROOT.glob("*/*") if path.is_file()} | visible(ROOT)
    for name in re.findall(r"`([\w./-]+\.(?:py|md|toml))`", PAGES[page]):
        known = (ROOT / name).exists() if "/" in name else name in files
        assert known or page in HISTORY, f"{page}: {name}"
    for name in re.findall(r"`((?:\w+\.)+\w+)(?:\([^`]*\))?`", PAGES[page]):
        if not re.search(r"\.(?:py|md|html|toml|json|jsonl|txt|sh)$", name):
            assert not missing(name), f"{page}: {name}: {missing(name)}"


def test_one_step_names_functions() -> None:
    step = README.split("## One step")[1].split("```")[1]
    names = re.findall(r"\b((?:train|gae|ppo|rollout)\.\w+)", step)
    assert len(names) > 6
    assert not [missing(name) for name in names if missing(name)]


def commands(text: str) -> list[tuple[str, str]]:
    """Programs of the project that a page runs, with the rest of each command line."""
    text = text.replace("\\\n", " ")
    text = re.sub(r"(?<!`)`[^`\n]*\n[^`\n]*`(?!`)", lambda m: m[0].replace("\n", " "), text)
    modules = re.findall(r"python -m ([\w.]+)([^`\n#]*)", text)
    scripts = re.findall(r"(?:python|torchrun[^`\n]*?) +([\w/]+)\.py\b([^`\n#]*)", text)
    return [*modules, *scripts]


def is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def is_flag(node: ast.AST) -> bool:
    text = node.value if isinstance(node, ast.Constant) else None
    return isinstance(text, str) and re.fullmatch(r"--[a-z0-9-]+", text) is not None


def flags(program: str) -> set[str]:
    """The flags of a program: its dataclass's, or what its source names."""
    if program in PROGRAMS:
        names = {field.name for field in fields(PROGRAMS[program])}
    else:
        nodes = list(ast.walk(ast.parse(MODULES[program].read_text())))
        names = {node.arg for node in nodes if isinstance(node, ast.arg)}
        names |= {node.target.id for node in nodes if is_field(node)}
        names |= {node.value[2:] for node in nodes if is_flag(node)}
    names = {name.replace("_", "-") for name in names}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | {"--help"}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"docs/changelog.md"}))
def test_commands_exist(page: str) -> None:
    """A program is in the tree and has the flags that it is called with."""
    for program, rest in commands(PAGES[page]):
        if program == "pydoc":
            assert rest.strip() in MODULES, rest
        elif program == "pytest":
            for file in re.findall(r"tests/\w+\.py", rest):
                assert (ROOT / file).is_file(), file
        elif program.startswith("tests/"):
            assert (ROOT / f"{program}.py").is_file(), f"{page}: {program}"
        else:
            assert program in MODULES, f"{page}: {program}"
            unknown = flags_in(rest) - flags(program)
            assert not unknown, f"{page}: {program} has no {unknown}"


def test_commands_are_found() -> None:
    """The test above sees the programs that matter."""
    seen = {program for text in PAGES.values() for program, _ in commands(text)}
    assert seen >= {*PROGRAMS, "tools.plan", "reports.figures", "experiments.run", "pydoc"}
    assert len([name for name in seen if name.startswith("benchmarks.")]) >= 8


@pytest.mark.parametrize("page", sorted(PAGES.keys() - HISTORY))
def test_flags_in_the_text_exist(page: str) -> None:
    known = set().union(*map(flags, PROGRAMS)) | flags("benchmarks.gpu")
    for text in re.findall(r"`(--[^`]*)`", PAGES[page]):
        assert flags_in(text) <= known, f"{page}: {flags_in(text) - known}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        target
        for text in PAGES.values()
        for target in re.findall(r"(?:`|^ {4}|do )make ([a-z-]+)", text, re.MULTILINE)
    }
    assert {"demo", "test", "test-slow", "lint", "install"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    command = ["make", "-n", "demo", "ENGINE=vllm", "SEED=3"]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train.py --name demo --overwrite --engine vllm --seed 3" in dry.stdout


def test_equation_table_names_functions_and_tests() -> None:
    section = README.split("## Equation → code → test")[1].split("\n## ")[0]
    rows = re.findall(r"\| `([\w.]+)` \| `(test_\w+\.py)::(\w+)` \|$", section, re.MULTILINE)
    assert len(rows) == len(next(tables(section))) - 2 >= 12
    for name, file, test in rows:
        module, _, function = name.rpartition(".")
        assert module in MODULES and function in defined(MODULES[module]), name
        assert test in defined(ROOT / "tests" / file), (file, test)


# ── what is computed or measured ─────────────────────────────────────────────────────────────────


def glossary() -> set[str]:
    """Metrics that docs/metrics.md explains."""
    (table,) = tables(METRICS)
    return {name for row in table[2:] for name in re.findall(r"`([a-z_*]+)`", row[0])}


def test_metric_glossary_is_complete(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key that a run writes is explained, and what is explained is written."""
    (tmp_path / "glossary_reward.py").write_text("def odd(text, problem): return len(text) % 2")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [(question, str(sum(tiny.numbers(question)))) for question in tiny.problems(0)[0][:8]]
    flags = [
        "--runs",
        str(tmp_path),
        "--name",
        "run",
        "--model",
        str(model_folder),
        "--data",
        str(write_orz(tmp_path / "train.json", rows)),
        "--reward",
        "glossary_reward:odd",
        "--engine",
        "transformers",
        "--steps",
        "2",
        "--prompts",
        "4",
        "--samples",
        "4",
        "--prompt-tokens",
        "64",
        "--response-tokens",
        "24",
        "--kl-loss",
        "0.1",
    ]
    cfg = parse(flags)
    folder = train.train(cfg, prepare(cfg))
    written = set().union(*map(json.loads, (folder / "metrics.jsonl").open()))
    assert {"explained_variance", "kl", "policy_loss", "critic_lr", "seconds_sample"} <= written
    problem = prepare(parse([*flags, "--overwrite"])).problems[0]
    written |= set(rollout_metrics([Rollout(problem, [0], [0.0], "stop", "")]))
    stages = {key for key in written if key.startswith("seconds_")}
    assert written - stages == glossary() - {"seconds_*"}


def test_claims_table_has_every_verdict() -> None:
    """Each claim has its row, and the sentence above the table counts the verdicts."""
    section = README.split("<!-- claims -->")[1].split("<!-- /claims -->")[0]
    (table,) = tables(section)
    verdicts = Counter(row[table[0].index("verdict")] for row in table[2:])
    sentence = section.strip().splitlines()[0]
    words = {
        "reproduces": "reproduce",
        "contradicts": "are contradicted",
        "no difference": "show no",
        "undecided": "are undecided",
    }
    for verdict, word in words.items():
        number = re.search(rf"(\d+) {word}", sentence)
        assert int(number[1] if number else 0) == verdicts[verdict], verdict
    assert sentence.startswith(f"Of {len(CLAIMS)} claims ")
    assert len(table) - 2 == sum(verdicts[verdict] for verdict in words) == len(CLAIMS)


def test_hardware_table_is_the_plans() -> None:
    assert plan.hardware_table() in README


def test_results_are_what_the_benchmarks_left() -> None:
    """benchmarks/RESULTS.md is made from benchmarks/results/."""
    program = "from benchmarks import record; print(record.results(), end='')"
    command = [sys.executable, "-c", program]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for program, _ in commands(made):
        assert program in MODULES, program


def test_one_command_runs_every_benchmark_of_the_page() -> None:
    left = {file.stem for file in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert left == set(COMMANDS)


def test_recorded_columns_are_those_that_the_program_writes() -> None:
    """A column that is renamed in benchmarks/logprob.py is renamed in what it left, too."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "logprob.json").read_text())["rows"]
    figures = dict.fromkeys(("forward s", "backward s", "sum s", "GB", "error"), 1.0)
    found = {(case, m): [figures] for case in logprob.CASES for m in logprob.METHODS}
    made = logprob.table(found)
    assert [list(row) for row in rows] == [list(row) for row in made]
    labels = ("tokens × H", "inputs", "method")
    assert [[row[n] for n in labels] for row in rows] == [[row[n] for n in labels] for row in made]
