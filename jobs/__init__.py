"""Stages that run as Ray jobs: corpus to tokens, tokens to weights, weights to figures."""
