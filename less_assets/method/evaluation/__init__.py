"""Losses, answers and scores of models, their intervals, and recipes side by side."""
