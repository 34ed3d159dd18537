"""README.md, LOG.md and the docstrings say what is so."""

import doctest
import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from config import Config
from curation.curate import Recipe
from evaluate import Evaluation
from tools import plan
from tools.ask import Question

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = sorted(p.stem for p in ROOT.glob("*.py"))
PROGRAMS = {"train": Config, "evaluate": Evaluation, "sample": Question, "curate": Recipe}


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m != "grader"]
)  # its example starts processes: test_reward.py
def test_worked_examples(module: str) -> None:
    loaded = importlib.import_module(module)
    assert doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_file_table_is_the_folder() -> None:
    listed = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.MULTILINE))
    assert sorted(listed) == [f"{m}.py" for m in MODULES]
    for file, lines in listed.items():
        actual = len((ROOT / file).read_text().splitlines())
        assert abs(int(lines) - actual) <= 0.1 * actual, (
            f"{file} has {actual} lines, README says {lines}"
        )


def test_the_core_stays_small() -> None:
    """The recipe by itself, everything, any file, and the loop."""
    lines = {p.name: len(p.read_text().splitlines()) for p in ROOT.glob("*.py")}
    recipe = README.split("| the recipe |")[1].split("| around it |")[0]
    assert sum(lines[name] for name in re.findall(r"^\| `(\w+\.py)`", recipe, re.MULTILINE)) <= 4000
    assert sum(lines.values()) <= 6600
    assert max(lines.values()) <= 340
    loop = re.search(
        r"^def train\(.*?^(?=def )", (ROOT / "train.py").read_text(), re.MULTILINE | re.DOTALL
    ).group()
    assert len(loop.splitlines()) <= 60


def flags(program: str) -> set[str]:
    named = {f.name.replace("_", "-") for f in fields(PROGRAMS[program])}
    return {f"--{name}" for name in named} | {f"--no-{name}" for name in named} | {"--help"}


def test_flags_exist() -> None:
    """A command's flags are its program's; a flag that a sentence mentions belongs to some program."""
    readme = README.replace("\\\n", "")
    commands = re.findall(rf"\b({'|'.join(PROGRAMS)})\.py ([^`\n]*)", readme)
    assert {program for program, _ in commands} == set(PROGRAMS)
    for program, rest in commands:
        named = set(re.findall(r"--[a-z][a-z-]+", rest))
        assert named <= flags(program), (program, named - flags(program))
    anywhere = set().union(*map(flags, PROGRAMS))
    named = {
        flag
        for text in re.findall(r"`(--[^`\n]*)`", readme)
        for flag in re.findall(r"--[a-z][a-z-]+", text)
    }
    assert len(named) > 15 and named <= anywhere, named - anywhere


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    command = ["make", "-n", "demo", "ENGINE=vllm", "SEED=3"]
    dry = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "train.py --name demo --overwrite --engine vllm --seed 3" in dry.stdout


def test_equation_table_names_functions_and_tests() -> None:
    rows = re.findall(r"^\| .* \| (`.*`) \| `(test_\w+\.py)::(\w+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 12
    for functions, file, test in rows:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
        for module, function in re.findall(r"`(\w+)\.(\w+)`", functions):
            assert callable(getattr(importlib.import_module(module), function))


def test_metric_glossary_is_complete() -> None:
    """Every key that a run writes is explained."""
    glossary = README.split("## Metrics")[1].split("##")[0]
    source = "".join(
        (ROOT / f).read_text() for f in ("train.py", "reports/log.py", "reports/metrics.py")
    )
    keys = set(re.findall(r'"([a-z_]+)": (?:mean|lr|float|gap_max|explained)', source))
    keys |= {"entropy", "clipped", "logp_gap", "kl"}
    assert len(keys) > 15
    for key in keys:
        assert f"`{key}`" in glossary, key


def test_hardware_table_is_the_plans() -> None:
    assert plan.hardware_table() in README


def test_results_are_what_the_benchmarks_left() -> None:
    """RESULTS.md is put together from results/; what a command there names exists."""
    command = [
        sys.executable,
        "-c",
        "from benchmarks import record; print(record.results(), end='')",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "benchmarks" / "RESULTS.md").read_text()
    scripts = set(re.findall(r"python (benchmarks/\w+\.py)", printed + README))
    assert len(scripts) >= 10 and all((ROOT / script).is_file() for script in scripts)


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert "FIXME" not in README + (ROOT / "docs" / "log.md").read_text()


def test_imports_run_downwards() -> None:
    """No cycles; the losses need torch alone; only train.py knows everything."""
    imports = {
        m: {
            i
            for i in re.findall(
                r"^(?:from|import) (\w+)", (ROOT / f"{m}.py").read_text(), re.MULTILINE
            )
            if i in MODULES
        }
        for m in MODULES
    }
    assert imports["gae"] == imports["ppo"] == set()
    assert not any("train" in used for used in imports.values())
    done: set[str] = set()
    while len(done) < len(MODULES):
        free = {m for m in MODULES if m not in done and imports[m] <= done}
        assert free, f"a cycle among {set(MODULES) - done}"
        done |= free
