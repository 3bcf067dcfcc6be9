import os

# Local Rays of tests must not leave an authentication token in the user's home.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # small models: more threads only wait for each other


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Storage and output of one quiet run of the pipeline, which others are held against."""
    from pipelines import QUICK, run

    storage = tmp_path_factory.mktemp("undisturbed") / "storage"
    finished = run(storage, *QUICK)
    assert finished.status == 0, finished.output
    return storage, finished.output


def pytest_collection_modifyitems(items):
    """Files with whole pipelines come first, so that no process of pytest-xdist is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("proof")}
    items.sort(key=lambda item: item.path not in slow)
