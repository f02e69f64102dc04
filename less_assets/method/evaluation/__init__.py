"""Losses, answers and scores of models, their intervals, and recipes side by side."""

VALIDATION_LOSS = "validation_loss"
"""Metric of examples of the targets' own form; `loss` is that of the evaluation's reference answers."""
VALIDATION_SCORE = "validation_score"
"""Graded answers to the same examples, where they can be graded."""
LOSSES = ("loss", VALIDATION_LOSS)
