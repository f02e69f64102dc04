"""What the work of a step needs: loaded models, where partitions are made, how fast that is."""
