"""The flow and its stages, in order: data check, splits, global prompt, grouping, group trainings, report."""
