"""Per-example gradients, Adam's directions, their sketches and storage codes, exact influence, shares of tokens."""
