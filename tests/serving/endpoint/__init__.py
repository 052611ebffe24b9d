"""Whole endpoints on one Ray. This file makes the folder a package, at whose end pytest stops that
Ray."""
