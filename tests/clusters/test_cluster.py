"""Clusters are files that say where each figure is from, and mistakes in them are sentences."""

from pathlib import Path

import pytest

from plmtune.clusters.cluster import Cluster, builtin_clusters, load_cluster
from plmtune.errors import UserError

GOOD = """
name: mine
nodes: 2
devices_per_node: 4
memory_gib: {value: 10, source: the label}
system_gib: {value: 2, source: free}
compute_gflop_s: {value: 1000, source: the label}
product_share: {value: 0.5, source: a stopwatch}
memory_gb_s: {value: 100, source: the label}
memory_share: {value: 0.5, source: a stopwatch}
layer_us: {value: 10, source: a stopwatch}
links:
  node: {gb_s: {value: 8, source: the label}, latency_us: {value: 5, source: a stopwatch}}
  network: {gb_s: {value: 1, source: the label}, latency_us: {value: 20, source: a stopwatch}}
"""
NETWORK = "  network: {gb_s: {value: 1, source: the label}, latency_us: {value: 20, source: a stopwatch}}\n"


def read(folder: Path, text: str) -> Cluster:
    path = folder / "mine.yaml"
    path.write_text(text)
    return load_cluster(str(path))


class TestShipped:
    def test_each_reads_and_every_figure_names_its_source(self) -> None:
        assert {"h100", "h200", "a100", "ascend_910", "gloo"} == set(builtin_clusters())
        for name in builtin_clusters():
            cluster = load_cluster(name)
            links = [cluster.node, *([cluster.network] if cluster.network else [])]
            figures = [cluster.memory, cluster.system, cluster.compute, cluster.product_share, cluster.bandwidth]
            figures += [figure for link in links for figure in (link.bandwidth, link.latency)]
            assert all(len(figure.source) > 5 for figure in figures), name
            assert 0 < cluster.available < cluster.memory.value

    def test_pangu_alphas_has_2048_processors(self) -> None:
        assert load_cluster("ascend_910").num_devices == 2048

    def test_an_unknown_one_is_asked_about(self) -> None:
        with pytest.raises(UserError, match=r"There is no cluster h10; .* Did you mean h100"):
            load_cluster("h10")
        with pytest.raises(UserError, match="pi5 is a device: plmtune plan CONFIG --device pi5"):
            load_cluster("pi5")
        with pytest.raises(UserError, match=r"none.yaml: no such file. plmtune ls clusters"):
            load_cluster("none.yaml")


class TestFiles:
    def test_figures_come_in_si_units(self, tmp_path: Path) -> None:
        cluster = read(tmp_path, GOOD)
        assert (cluster.num_devices, cluster.available, cluster.products) == (8, 8 * 2**30, 0.5e12)
        assert cluster.node.seconds(8e9, 2) == pytest.approx(1 + 10e-6)

    def test_processes_that_share_a_machine_share_its_figures(self, tmp_path: Path) -> None:
        cluster = read(tmp_path, GOOD.replace("nodes: 2", "nodes: 1\nshared: true").replace(NETWORK, ""))
        assert cluster.available == 2 * 2**30
        assert cluster.peak == 0.25e12
        assert cluster.of_processes(2).available == 4 * 2**30

    def test_other_numbers_of_processes_are_nodes_or_a_part_of_one(self, tmp_path: Path) -> None:
        cluster = read(tmp_path, GOOD)
        assert [(each.nodes, each.devices_per_node) for each in map(cluster.of_processes, (2, 4, 16))] == [
            (1, 2),
            (1, 4),
            (4, 4),
        ]
        with pytest.raises(UserError, match="--processes 6: is no multiple of the 4 devices of a node of mine"):
            cluster.of_processes(6)

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ("nodes: 2", "node: 2", "key node: a cluster has no such key. Did you mean nodes"),
            ("nodes: 2", "nodes: 0", "key nodes: must be a count of at least 1, not 0"),
            ("nodes: 2", "nodes: true", "key nodes: must be a count of at least 1, not True"),
            ("devices_per_node: 4", "", "key devices_per_node: must be a count of at least 1, not None"),
            ("devices_per_node: 4", "devices_per_node: [8, 4]", "nodes of 8, 4 devices are unequal"),
            ("devices_per_node: 4", "devices_per_node: [4]", "has 1 numbers for 2 nodes"),
            (NETWORK, "", "key nodes: 2 nodes need a link between them, and mine has none"),
            ("links:", "links: {}\nlinks2:", "key links2: a cluster has no such key. Did you mean links"),
            ("  node: {gb", "  nod: {gb", "key links: has no link inside a node"),
            ("  network: {gb", "  netwrok: {gb", "key links.netwrok: a cluster has no such link. Did you mean network"),
            ("{gb_s: {value: 8", "{gbs: {value: 8", "links.node.gbs: a link has no such key. Did you mean gb_s"),
            (
                "gb_s: {value: 8, source: the label}, latency",
                "latency",
                "key links.node: the key gb_s is missing. Write gb_s: {value: NUMBER, source: WHERE}",
            ),
            ("{value: 8, source: the label}", "8", "must be {value: NUMBER, source: WHERE IT IS FROM}, not 8"),
            ("value: 8,", "value: -8,", "key links.node.gb_s: must be above 0, not -8"),
            ("value: 8,", "value: .nan,", "must be above 0, not nan"),
            ("value: 8,", "value: fast,", "must be a number, not 'fast'"),
            ("memory_gib: {value: 10, source: the label}", "", "the key memory_gib is missing"),
            ("system_gib: {value: 2", "system_gib: {value: 20", "the system keeps all of memory_gib"),
            ("product_share: {value: 0.5", "product_share: {value: 1.5", "must be above 0 and at most 1, not 1.5"),
            ("source: the label}\nsystem", "source: ''}\nsystem", "key memory_gib: says no source"),
            ("name: mine", "name: 3", "key name: must be the cluster's name"),
            ("nodes: 2", "nodes: 2\nshared: 1", "key shared: must be true or false, not 1"),
        ],
    )
    def test_mistakes_name_key_and_value(self, tmp_path: Path, old: str, new: str, says: str) -> None:
        assert old in GOOD
        with pytest.raises(UserError) as caught:
            read(tmp_path, GOOD.replace(old, new, 1))
        assert says in str(caught.value)

    def test_equal_nodes_may_be_listed(self, tmp_path: Path) -> None:
        cluster = read(tmp_path, GOOD.replace("devices_per_node: 4", "devices_per_node: [4, 4]"))
        assert cluster.devices_per_node == 4
