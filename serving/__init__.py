"""The OpenAI-compatible endpoint: HTTP ingress, continuous batching engine, replicas."""
