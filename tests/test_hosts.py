"""Training on two hosts: two network namespaces, each with an address, a wire between them, and
torchrun in both, started by a command in each or by scripts/slurm.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import TRAIN, close, on, same, small_run, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# With namespaces of its own for users, mounts and processes, the command needs no root where the
# kernel permits them, and nothing is left when it ends. `ip` keeps its names in /run.
ISOLATED = "unshare --map-root-user --net --mount --pid --fork --kill-child sh -euc".split()
HOSTS = """
mount -t tmpfs none /run
ip netns add host0
ip netns add host1
ip link add wire netns host0 type veth peer name wire netns host1
for n in 0 1; do
    ip -n host$n link set lo up
    ip -n host$n addr add 10.77.0.$n/31 dev wire
    ip -n host$n link set wire up
done
"""
TORCHRUN = f"""
export GLOO_SOCKET_IFNAME=wire
torchrun="{sys.executable} -m torch.distributed.run"
torchrun="$torchrun --nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.0"
nsenter --net=/run/netns/host1 $torchrun --node-rank 1 "$@" &
nsenter --net=/run/netns/host0 $torchrun --node-rank 0 "$@"
wait $!
echo received $(nsenter --net=/run/netns/host0 grep wire /proc/net/dev)
"""
TWO_HOSTS = [*ISOLATED, HOSTS + TORCHRUN, "sh"]  # to be followed by the program and its flags

# Slurm's programs, as far as scripts/slurm.sh calls them. `srun` starts a command on both hosts.
# When the file `signal` appears, it signals both, as Slurm does before the time limit.
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
for n in 0 1; do
    SLURM_NODEID=$n setsid nsenter --net=/run/netns/host$n "$@" &
    hosts[n]=$!
done
while kill -0 ${hosts[0]} 2>/dev/null; do
    if rm signal 2>/dev/null; then kill -TERM -${hosts[0]} -${hosts[1]}; fi
    sleep 0.1
done
wait ${hosts[1]} || exit
wait ${hosts[0]}
"""
PROGRAMS = {
    "srun": SRUN,
    "squeue": "#!/bin/sh\necho RUNNING\n",
    "scontrol": '#!/bin/sh\necho "$@" > said\n',
}
SLURM = f"""
SLURM_JOB_ID=7 SLURM_NNODES=2 SLURM_GPUS_ON_NODE=1 SLURM_CPUS_ON_NODE=1 SLURMD_NODENAME=10.77.0.0
GLOO_SOCKET_IFNAME=wire PYTHON={sys.executable}
""".split()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[str]:
    """A run of two steps. The tests are skipped where two hosts cannot be made."""
    for tool in ("unshare", "nsenter", "ip"):
        if not shutil.which(tool):
            pytest.skip(f"two hosts cannot be made without `{tool}`")
    made = subprocess.run([*ISOLATED, HOSTS], capture_output=True, text=True, timeout=60)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    return [*small_run(tmp_path_factory.mktemp("runs"), model_folder), "--steps", "2"]


def received(folder: Path) -> int:
    """Bytes that host 0 received over the wire."""
    return int(folder.with_suffix(".txt").read_text().split("received wire:")[1].split()[0])


@pytest.fixture
def cluster(tmp_path: Path) -> list[str]:
    """The command that runs scripts/slurm.sh as a job on both hosts."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").symlink_to(TRAIN)
    variables = [*SLURM, f"PATH={tmp_path}:{os.environ['PATH']}"]
    script = TRAIN.parent / "scripts" / "slurm.sh"
    run = f'{HOSTS} cd {tmp_path}; shift; {script} "$@"'
    return ["env", *variables, *ISOLATED, run, "sh"]


def test_a_job_of_two_hosts_stops_and_goes_on(
    flags: list[str], cluster: list[str], tmp_path: Path
) -> None:
    """It is stopped after a step. It saves and is queued again; started again, it ends as a run
    that was never stopped."""
    more = ("--steps", "4", "--checkpoint-every", "0")
    whole = start(on(2), flags, "whole", *more).finish()
    job = start(cluster, flags, "job", *more)
    job.wait_until(job.steps)
    (tmp_path / "signal").touch()
    assert job.process.wait() == 143, job.output.read_text()
    assert (tmp_path / "said").read_text() == "requeue 7\n"
    (saved,) = job.complete()
    assert saved == job.steps() < 4
    again = start(cluster, flags, "job", *more)
    same(again.finish(), whole)
    resumed_from = again.folder / "checkpoints" / f"step-{saved}"
    assert f"going on from {resumed_from}\n" in again.output.read_text()


def test_two_hosts_train_as_one(flags: list[str]) -> None:
    """One rank per host. A model sharded over both hosts trains as on two ranks of one host, to the
    last bit. With a replica on each host the sums are rounded differently, and fewer bytes cross
    the wire."""
    one = start(on(2), flags, "one-host").finish()
    sharded = start(TWO_HOSTS, flags, "two-hosts").finish()
    same(sharded, one)
    replicated = start(TWO_HOSTS, flags, "a-replica-each", "--replicas", "2").finish()
    close(replicated, one)
    print(f"\nbytes over the wire: {received(sharded)} sharded, {received(replicated)} replicated")
    assert 0 < received(replicated) < received(sharded)
