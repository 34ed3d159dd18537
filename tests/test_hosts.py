"""Training on two hosts: two network namespaces, each with an address, a wire between them, and
torchrun in both."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import close, on, same, small_run, start

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
