"""Rows of pool and targets: reading files, normalising, encoding for a model, batching, overlaps with evaluations."""
