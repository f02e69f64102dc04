"""LESS itself: plain Python on torch, numpy and polars. Never imports dagster, never knows where artifacts lie."""
