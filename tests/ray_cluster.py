"""A Ray cluster of two nodes on this machine, as a program: `remove` on standard input takes the second away."""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    """Starts it, prints its address, and ends with standard input."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    print(f"address {cluster.address}", flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(second, allow_graceful=False)
            print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
