"""Workflows of several runs: benchmark, grouping study, hyperparameter search, adding a task to a finished run."""
