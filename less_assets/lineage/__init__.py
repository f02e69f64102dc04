"""What every artifact is made from: plans, files and shards of the pool, the warm-up draw."""
