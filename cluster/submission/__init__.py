"""A stage as a job that is submitted once, then followed or stopped: on this machine, a Ray
cluster, or KubeRay."""
