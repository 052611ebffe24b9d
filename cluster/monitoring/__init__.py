"""The metric table and all that is made from it: exports, dashboards, alerts."""
