"""Stages of the pipeline, in order: data check, splits, global prompt, single tasks, grouping, group trainings,
report."""
