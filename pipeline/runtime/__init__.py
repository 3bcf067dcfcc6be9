"""What executes and stores: Ray work and its cluster, artifacts, the lock on a run, progress, MLflow."""
