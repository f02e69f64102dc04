"""LESS itself: plain Python on torch, numpy and polars. Never imports dagster and never knows where artifacts are kept."""
