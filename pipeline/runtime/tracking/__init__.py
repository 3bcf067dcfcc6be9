"""Results of a pipeline in MLflow, through an outbox on disk.

What this package chose:
- The driver alone talks to MLflow. Its calls append to a `journal` on disk and return at once; the thread of a
  `delivery` sends the journal, in order. A tracking server that is away costs the training nothing and no value.
- The journal is the memory: what it holds is not recorded a second time, so a pipeline that was killed and
  replays its calls goes on in the same MLflow runs, with each value in them once.
- Sending twice is harmless. Metrics carry their journal time (MLflow drops exact copies), and every run
  carries the tag `pipeline.run_key`, looked for before a run is made.
- What MLflow refuses for good goes to `refused.jsonl` and does not hold up the rest.
- MLflow is called by `mlflow_adapter` alone, through `MlflowClient`: no active run, no global tracking URI. It takes
  seconds to import, so it is imported where it is used.

    with Tracker(uri, "office_home", folder) as tracker:
        tracker.start_run("pipeline", tags={"config": "demo"}, params={"seed": 0})
        tracker.start_run("group: ink+chalk", parent="pipeline")
        tracker.log_metrics("group: ink+chalk", {"accuracy/ink": 0.7}, step=10)
        tracker.end_run("group: ink+chalk")
        tracker.end_run("pipeline")
"""
