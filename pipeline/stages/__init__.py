"""The stages as Ray work, in the order of the data: splits, global_prompt, grouping, group_trainings, report."""
