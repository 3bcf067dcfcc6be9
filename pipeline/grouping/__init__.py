"""Task grouping: per-task gradients of a shared prompt → affinities → groups of tasks that share a prompt."""
