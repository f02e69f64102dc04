"""The assets: thin functions that read, call , store and report. Mathematics belongs in `less_assets.method`."""
