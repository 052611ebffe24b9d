"""The metric table, what is made from it (exports, dashboards), and the files for Grafana and
Prometheus."""
