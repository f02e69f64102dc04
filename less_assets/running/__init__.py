"""What `less-assets run` does with a Dagster instance."""
