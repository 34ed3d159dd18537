"""scripts/slurm.sh, with programs in the place of Slurm's and of torchrun. test_hosts.py trains
with it on two hosts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "srun": 'while [ "$1" != bash ]; do shift; done; SLURM_NODEID=0 exec "$@"',
    "squeue": 'echo "$STATE"',
    "scontrol": 'echo "$@" >> scontrol.txt',
    "stub": 'printf "%s\\n" "$@" > arguments.txt; eval "$RUN"',
}
STOPPED = "kill -TERM $PPID; exit 1"  # as torchrun ends when Slurm signals it


def submit(folder: Path, **variables: str) -> int:
    """The exit status of the script, as the first node of two runs it in `folder`."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"JOB_ID": "12345", "NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_ON_NODE": "64"}
    env = {f"SLURM_{name}": value for name, value in slurm.items()} | variables
    env |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "node3", "PYTHON": "stub"}
    command = ["bash", str(ROOT / "scripts" / "slurm.sh"), "--name", "two words"]
    return subprocess.run(command, cwd=folder, env=env, timeout=60).returncode


@pytest.mark.parametrize(
    ("run", "state", "status", "requeued"),
    [
        (STOPPED, "RUNNING", 143, True),  # the time limit comes, or another job takes the nodes
        (STOPPED, "CANCELLED", 143, False),
        (STOPPED, "PREEMPTED", 143, False),  # Slurm queues it again by itself
        ("exit 3", "RUNNING", 3, False),
        ("exit 0", "RUNNING", 0, False),
    ],
)
def test_a_stopped_job_is_queued_again(
    tmp_path: Path, run: str, state: str, status: int, requeued: bool
) -> None:
    assert submit(tmp_path, RUN=run, STATE=state) == status
    said = tmp_path / "scontrol.txt"
    assert said.exists() == requeued
    assert not requeued or said.read_text() == "requeue 12345\n"


def test_each_node_starts_torchrun(tmp_path: Path) -> None:
    """Flags with spaces arrive whole, and the port is the job's own."""
    assert submit(tmp_path, RUN="exit 0", STATE="RUNNING") == 0
    arguments = (tmp_path / "arguments.txt").read_text().splitlines()
    torchrun, training = arguments[: arguments.index("train.py")], arguments[-5:]
    assert training == ["train.py", "--resume", "auto", "--name", "two words"]
    assert torchrun[:2] == ["-m", "torch.distributed.run"]
    options = dict(zip(torchrun[2::2], torchrun[3::2], strict=True))
    assert options.pop("--nnodes") == "2" and options.pop("--node-rank") == "0"
    assert options.pop("--nproc-per-node") == "8"
    assert options == {
        "--master-addr": "node3",
        "--master-port": "22345",
        "--shutdown-timeout": "540",
    }


@pytest.mark.parametrize("script", ["scripts/slurm.sh", ".ci/run"])
def test_shellcheck_finds_nothing(script: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, ROOT / script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
