"""What runs in Ray Serve's proxy: bounds, retries, the token relay."""
