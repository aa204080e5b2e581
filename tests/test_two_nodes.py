"""Two nodes for real on one machine: a launcher each, as where no node can ssh to another."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.runs import train, write_recipe
from tests.launching import BINARY, ROOT, environment, evaluations, losses
from tests.ranks import free_port

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]

SHORT = ["train.steps=4", "until=train"]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory) -> Path:
    """The folder of a run on two ranks of one node."""
    folder = tmp_path_factory.mktemp("one-node")
    train(folder, write_recipe(folder), *SHORT)
    return folder


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, 10.77.0.1 and 10.77.0.2."""
    names = [f"dskd-{os.getpid()}-{node}" for node in "ab"]
    if shutil.which("ip") is None or not _ip(f"netns add {names[0]}"):
        pytest.skip("no network namespaces here (they need iproute2 and root)")
    try:
        assert _ip(f"netns add {names[1]}")
        assert _ip(f"-n {names[0]} link add eth0 type veth peer name eth0 netns {names[1]}")
        for node, name in enumerate(names, 1):
            assert _ip(f"-n {name} addr add 10.77.0.{node}/24 dev eth0")
            assert _ip(f"-n {name} link set lo up") and _ip(f"-n {name} link set eth0 up")
        yield names
    finally:
        for name in names:
            _ip(f"netns del {name}")


def _ip(words: str) -> bool:
    return subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode == 0


def on_two_nodes(
    folder: Path, addresses: list[str], interface: str, prefixes: list[list[str]], words: list[str]
) -> None:
    """Run ``deepspeed --hostfile ... --no_ssh --node_rank N ... dskd/train.py WORDS`` on each node.

    The hostfile is the shipped example with these addresses and one slot each.
    """
    example = (ROOT / "launch" / "hostfile.example").read_text().splitlines()
    comments = [line for line in example if line.startswith("#")]
    assert [line.split()[1] for line in example if line not in comments] == ["slots=8"] * 2
    hosts = [f"{address} slots=1" for address in addresses]
    (folder / "hostfile").write_text("\n".join([*comments, *hosts]) + "\n")
    command = [str(BINARY), "--hostfile", str(folder / "hostfile"), "--no_ssh"]
    command += ["--master_addr", addresses[0], "--master_port", str(free_port())]
    logs = [folder / f"node{node}.log" for node in range(2)]
    launchers = []
    for node, (prefix, log) in enumerate(zip(prefixes, logs, strict=True)):
        with log.open("w") as output:
            launchers.append(
                subprocess.Popen(
                    [*prefix, *command, "--node_rank", str(node), "dskd/train.py", *words],
                    cwd=ROOT,
                    env=environment() | {"GLOO_SOCKET_IFNAME": interface},
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


def assert_same(run: Path, reference: Path) -> None:
    assert len(losses(run)) == 4
    assert losses(run) == pytest.approx(losses(reference), abs=1e-6)
    assert evaluations(run) == pytest.approx(evaluations(reference), abs=1e-6)


def test_over_loopback(one_node, tmp_path):
    """From the text to the trained student: rows, capture, ZeRO-2."""
    folders = [f"out={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}"]
    words = [str(one_node / "run.yaml"), *folders, *SHORT]
    on_two_nodes(tmp_path, ["127.0.0.1", "127.0.0.2"], "lo", [[], []], words)
    assert_same(tmp_path / "run", one_node / "run")


def test_over_a_network(one_node, namespaces, tmp_path):
    """ZeRO-3 between two network namespaces, with the rows and the cache of the first run."""
    shutil.copytree(one_node / "run" / "cache", tmp_path / "run" / "cache")
    words = [str(one_node / "run.yaml"), f"out={tmp_path / 'run'}", *SHORT, "deepspeed=zero3"]
    prefixes = [["ip", "netns", "exec", name] for name in namespaces]
    on_two_nodes(tmp_path, ["10.77.0.1", "10.77.0.2"], "eth0", prefixes, words)
    assert_same(tmp_path / "run", one_node / "run")
