"""Runs in Ray Serve's proxy: bounds on clients, retries, the token relay."""
