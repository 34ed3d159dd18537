"""Two hosts: network namespaces with an address each and a wire between them, and torchrun in both."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import close, on, same, small, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# In namespaces of its own (users, mounts, processes) anybody may do this whom the kernel lets have them, and nothing is left
# when it ends, however it ends. `ip` keeps its names in /run.
ISOLATED = [
    "unshare",
    "--map-root-user",
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "sh",
    "-euc",
]
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
torchrun="{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.0"
nsenter --net=/run/netns/host1 $torchrun --node-rank 1 "$@" &
nsenter --net=/run/netns/host0 $torchrun --node-rank 0 "$@"
wait $!
echo received $(nsenter --net=/run/netns/host0 grep wire /proc/net/dev)
"""
TWO_HOSTS = [*ISOLATED, HOSTS + TORCHRUN, "sh"]  # then the program and its flags


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[str]:
    """Two steps; skipped where there can be no such hosts."""
    for tool in ("unshare", "nsenter", "ip"):
        if not shutil.which(tool):
            pytest.skip(f"there is no `{tool}` here to make two hosts with")
    made = subprocess.run([*ISOLATED, HOSTS], capture_output=True, text=True, timeout=60)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    return [*small(tmp_path_factory.mktemp("runs"), model_folder), "--steps", "2"]


def received(folder: Path) -> int:
    """Bytes that came to host 0 over the wire."""
    return int(folder.with_suffix(".txt").read_text().split("received wire:")[1].split()[0])


def test_two_hosts_train_as_one(flags: list[str]) -> None:
    """One rank a host. Sharded over both: as two ranks of one host, to the last bit. With a replica a host the sums are
    rounded otherwise, and less crosses the wire."""
    one = start(on(2), flags, "one-host").ends()
    two = start(TWO_HOSTS, flags, "two-hosts").ends()
    same(two, one)
    copies = start(TWO_HOSTS, flags, "a-replica-each", "--replicas", "2").ends()
    close(copies, one)
    print(
        f"\nbytes over the wire: {received(two)} sharded over both hosts, {received(copies)} with a replica each"
    )
    assert 0 < received(copies) < received(two)
