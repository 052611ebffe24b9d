"""A GPT-2 style decoder and everything that needs no cluster: shape, weights, tokens, sampling,
checkpoints."""
