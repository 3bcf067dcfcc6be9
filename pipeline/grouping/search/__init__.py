"""Ways to search the best partition; `pipeline.grouping.partition.best_partition` takes the fastest that is exact."""
