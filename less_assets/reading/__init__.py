"""What steps have stored, read back: rows, scores, cuts, certificates."""
