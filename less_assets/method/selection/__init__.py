"""From features to a subset: influence, ranking, budgets, baselines, and how far a selection can be trusted."""
