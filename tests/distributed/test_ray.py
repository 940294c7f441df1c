"""The same runs on Ray, on one machine and on several nodes that can be lost."""

import pytest
from survival_loops import Once, Pause, alone, train

from growmoe.distributed import ClusterError, fit

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def nodes():
    """Three nodes of one CPU each; the first is that of this process."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster, others
    ray.shutdown()
    cluster.shutdown()


def test_a_cluster_that_is_too_small_says_what_is_missing(nodes):
    with pytest.raises(ClusterError, match=r"9 workers need 9 CPU, the cluster has 3"):
        fit(train, {"steps": 1}, num_workers=9, start_timeout=1.0)
    with pytest.raises(ClusterError, match=r"1 GPU, the cluster has 0"):
        fit(train, {"steps": 1}, use_gpu=True, start_timeout=1.0)


def test_a_run_outlives_a_lost_node_and_a_killed_worker(nodes, tmp_path):
    cluster, others = nodes
    lost, gone = [], tmp_path / "gone"

    def watch(status):
        # each of the three nodes has a worker, so with any of them one is lost
        if status["workers"] == 3 and not lost:
            lost.append(others.pop())
            cluster.remove_node(lost[0], allow_graceful=False)
            gone.touch()

    at = Pause(("forward", 12), gone, Once(tmp_path, {("backward", 25): 0}))
    config = {"steps": 40, "at": at}
    result = fit(
        train, config, num_workers=(1, 3), repeat=6, timeout=20.0, start_timeout=300.0, watch=watch
    )
    assert len(result.recoveries) == 2 and all(r.exact for r in result.recoveries)
    assert all(r.repeated <= 6 for r in result.recoveries)
    assert 1 <= result.value["sizes"][39] <= 2  # two nodes are left
    one = alone(40)
    assert result.value["events"] == one["events"]
    assert list(result.value["losses"].values()) == pytest.approx(list(one["losses"].values()))
