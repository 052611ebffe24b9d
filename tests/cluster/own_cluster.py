"""Owns a two-node local cluster until it is killed: prints one line once the cluster is up."""

import threading

from cluster.local.local_cluster import LocalCluster

if __name__ == "__main__":
    with LocalCluster(num_nodes=2, cpus_per_node=1) as cluster:
        print(cluster.address, flush=True)
        threading.Event().wait()
