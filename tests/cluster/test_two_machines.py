"""An existing Ray cluster of two machines: two nodes here, each with an object store of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_instances import processes
from tests.server.harness import Server, wait_until

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

PROMPT = "The word 'penstock' means " * 12
MACHINE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines, each with room for one instance, and one for the front alone."""
    front = {**MACHINE, "num_cpus": 0, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=front)
    made.add_node(**MACHINE)
    made.add_node(**MACHINE)
    yield made
    made.shutdown()


def pieces(server: Server) -> Iterator[str]:
    """A greedy answer as it comes."""
    with server.client() as client:
        for piece in client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=300, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        ):  # fmt: skip
            yield piece.choices[0].text


def lose_machine(cluster: Cluster, instance: int) -> None:
    """End the machine that this process is on, as a power cut would; another one comes."""
    parent = int(Path(f"/proc/{instance}/stat").read_text().rpartition(")")[2].split()[1])
    (lost,) = [
        node
        for node in cluster.worker_nodes
        if node.all_processes["raylet"][0].process.pid == parent
    ]
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(**MACHINE)


def test_kv_crosses_machines_and_a_lost_machine_loses_no_token(
    cluster: Cluster,
) -> None:
    with Server("--dtype", "float32", engine="native") as server:
        expected = "".join(pieces(server))
    flags = ("--ray-address", cluster.address, "--prefill", "1", "--decode", "1")
    flags += ("--dtype", "float32", "--threads", "1")
    with Server(*flags, engine="native") as server:
        wait_until(lambda: len(processes(server)) == 2, 120)
        found = []
        for number, piece in enumerate(pieces(server)):
            found.append(piece)
            if number == 20:
                assert server.metric("kv_hand_offs_total") == 1
                lose_machine(cluster, processes(server)[1])
        assert "".join(found) == expected
        assert server.metric("instance_restarts_total") == 1
        assert server.metric("kv_hand_offs_total") == 2
        wait_until(lambda: server.stats()["kv_usage"] == 0)
