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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """For pytest-xdist: a file's tests stay in one process, and so do all files that use the run above, so that it is
    made once; files with whole pipelines begin, so that no process is left with a long one at the end."""
    of_run = {item.path for item in items if "undisturbed" in item.fixturenames}
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("proof")}
    items.sort(key=lambda item: (item.path not in of_run, item.path not in slow))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("undisturbed" if item.path in of_run else item.path.name))
