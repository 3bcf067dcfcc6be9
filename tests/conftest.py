import os

# Local Rays of tests must not leave an authentication token in the user's home.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import torch  # noqa: E402

torch.set_num_threads(1)  # small models: more threads only wait for each other
