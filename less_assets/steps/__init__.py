"""One file an asset family: what it is made from, what it computes, what it says of itself. No Dagster."""
