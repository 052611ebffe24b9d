"""Grafana: its dashboards, and the files of dashboards, alerts and scrape settings for it and
Prometheus."""
