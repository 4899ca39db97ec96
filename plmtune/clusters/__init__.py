"""Clusters of accelerators as YAML files, and predictions of training on them: memory, traffic, time of a layout."""
