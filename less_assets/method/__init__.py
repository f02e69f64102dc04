"""LESS itself: plain Python on torch, numpy and polars. Never imports dagster, never knows where artifacts lie."""

import datetime

DEFAULT_DATE = datetime.date(2025, 1, 1)
"""The day that chat templates are told which write one. Any day would do; it must stay, so that ids stay."""

SKETCH_VERSION = 1
"""Raised whenever the same seed would give another sketch (`sketch.py`). Part of the fingerprint of all features, which
is made without loading torch; that is why it stands here."""

DRAW_VERSION = 2
"""Raised whenever the same seed would draw other rows (`random`, `dsir`, `length_matched`). Part of a recipe's
settings; 2: each strategy draws from a stream of its own."""
