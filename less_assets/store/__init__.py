"""What artifacts look like on disk or in a bucket: manifests, Zarr arrays, tables. No mathematics, no dagster."""
