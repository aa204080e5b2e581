"""Two nodes for real on one machine: a launcher each, as where no node can ssh to another."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.equivalence.small import same
from tests.faults.runs import train, write_recipe
from tests.launching import BINARY, ROOT, environment, losses
from tests.ranks import free_port

SHORT = ["train.steps=4", "until=train"]


@dataclass(frozen=True)
class Network:
    """Two nodes: their addresses, the interface between them, how a command gets onto each."""

    addresses: list[str]
    interface: str
    prefixes: list[list[str]]


@pytest.fixture
def network() -> Iterator[Network]:
    """Two network namespaces joined by a cable; where they are not permitted, two addresses."""
    names = [f"dskd-{os.getpid()}-{node}" for node in "ab"]
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        if shutil.which("ip") is not None and _joined(names, addresses):
            yield Network(addresses, "eth0", [["ip", "netns", "exec", name] for name in names])
        else:
            yield Network(["127.0.0.1", "127.0.0.2"], "lo", [[], []])
    finally:
        if shutil.which("ip") is not None:
            for name in names:
                _ip(f"netns del {name}")


def _joined(names: list[str], addresses: list[str]) -> bool:
    steps = [f"netns add {name}" for name in names]
    steps += [f"-n {names[0]} link add eth0 type veth peer name eth0 netns {names[1]}"]
    for name, address in zip(names, addresses, strict=True):
        steps += [f"-n {name} addr add {address}/24 dev eth0"]
        steps += [f"-n {name} link set {interface} up" for interface in ("lo", "eth0")]
    return all(_ip(step) for step in steps)


def _ip(words: str) -> bool:
    return subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode == 0


def on_two_nodes(network: Network, folder: Path, *words: str) -> None:
    """Run ``deepspeed --hostfile ... --no_ssh --node_rank N ... dskd/train.py WORDS`` on each node.

    The hostfile is the shipped example with these addresses and one slot each.
    """
    example = (ROOT / "launch" / "hostfile.example").read_text().splitlines()
    comments = [line for line in example if line.startswith("#")]
    assert [line.split()[1] for line in example if line not in comments] == ["slots=8"] * 2
    hosts = [f"{address} slots=1" for address in network.addresses]
    (folder / "hostfile").write_text("\n".join([*comments, *hosts]) + "\n")
    command = [str(BINARY), "--hostfile", str(folder / "hostfile"), "--no_ssh"]
    command += ["--master_addr", network.addresses[0], "--master_port", str(free_port())]
    logs = [folder / f"node{node}.log" for node in range(2)]
    launchers = []
    for node, (prefix, log) in enumerate(zip(network.prefixes, logs, strict=True)):
        with log.open("w") as output:
            launchers.append(
                subprocess.Popen(
                    [*prefix, *command, "--node_rank", str(node), "dskd/train.py", *words],
                    cwd=ROOT,
                    env=environment() | {"GLOO_SOCKET_IFNAME": network.interface},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        statuses = [launcher.wait(timeout=200) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()
    assert statuses == [0, 0], "\n".join(log.read_text() for log in logs)
    for node, log in enumerate(logs):
        assert f"nnodes=2, num_local_procs=1, node_rank={node}" in log.read_text()


@pytest.mark.launch
@pytest.mark.timeout(400)
def test_the_losses_of_one_node(network, tmp_path):
    """From the text to the trained student (rows, capture, ZeRO-3), as on two ranks of one node."""
    recipe = write_recipe(tmp_path)
    train(tmp_path, recipe, *SHORT)
    out, data = tmp_path / "two-nodes", tmp_path / "two-nodes-data"
    words = [f"out={out}", f"data.folder={data}", "deepspeed=zero3"]
    on_two_nodes(network, tmp_path, recipe, *SHORT, *words)
    assert len(losses(out)) == 4
    same(out, tmp_path / "run")


STUBS = {
    "scontrol": 'echo "$3-first"; echo "$3-second"',
    "srun": """
        shift
        for task in 0 1 2 3; do
            SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@"
        done""",
    "../.venv/bin/python": """
        echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $MASTER_ADDR $MASTER_PORT "$@" """,
}
SLURM = {
    "SLURM_JOB_NODELIST": "node",
    "SLURM_JOB_ID": "20007",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
}


def test_what_slurm_starts(tmp_path):
    """The script's environment for each of two nodes' four ranks, by a Slurm that only tells."""
    for name, lines in STUBS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)
    (tmp_path / ".venv" / "installed").write_text("yes")
    (tmp_path / "my.yaml").write_text("")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sh"), "my.yaml", "train.lr=1", "a=b c"],
        env=os.environ | SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{rank} {rank % 2} 4 2 node-first 20007 -u dskd/train.py my.yaml train.lr=1 a=b c"
        for rank in range(4)
    ]
