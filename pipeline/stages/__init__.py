"""Stages of the pipeline, in order: data check, splits, global prompt, grouping, group trainings, report."""
