"""MLflow tracking through an outbox on disk.

Design:
- Only the driver talks to MLflow. Its calls append to a `journal` on disk and return at once; the thread of a
  `delivery` sends the journal, in order. An outage of the tracking server delays no training and loses no value.
- The journal deduplicates: an operation that it holds is not recorded again, so a pipeline that was killed and
  replays its calls continues the same MLflow runs, with each value in them once.
- Sending is idempotent. Metrics carry their journal time (MLflow drops exact copies), and every run has the tag
  `pipeline.run_key`, which is searched before a run is created.
- Operations that MLflow rejects permanently go to `refused.jsonl` and do not block the others.
- MLflow is called by `mlflow_adapter` alone, through `MlflowClient`: no active run, no global tracking URI. It takes
  seconds to import, so it is imported where it is used.

    with Tracker(uri, "office_home", folder) as tracker:
        tracker.start_run("pipeline", tags={"config": "demo"}, params={"seed": 0})
        tracker.start_run("group: ink+chalk", parent="pipeline")
        tracker.log_metrics("group: ink+chalk", {"accuracy/ink": 0.7}, step=10)
        tracker.end_run("group: ink+chalk")
        tracker.end_run("pipeline")
"""
