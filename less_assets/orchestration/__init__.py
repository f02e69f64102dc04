"""Dagster's view of the graph: definitions, partitions, checks, sensors, metadata."""
