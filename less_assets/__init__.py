"""LESS Assets: LESS data selection (ICML 2024) as a graph of Dagster assets. Nothing is wired here; see `build.py`."""
