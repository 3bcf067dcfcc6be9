"""From per-task gradients of a shared prompt to groups of tasks that are trained together."""
