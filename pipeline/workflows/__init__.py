"""What uses the whole flow: benchmark, grouping study, search of config values, adding a task to a finished run."""
