"""The Kubernetes API, and pure functions that explain the cluster's objects."""
