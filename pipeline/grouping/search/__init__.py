"""Search algorithms; `pipeline.grouping.partition.best_partition` chooses the fastest exact one."""
