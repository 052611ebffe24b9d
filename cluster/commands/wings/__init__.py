"""The commands of wings: a module for each, which `cluster/wings.py` names."""
