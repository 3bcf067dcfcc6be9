"""Shared by all tests: environment, leftover processes, random numbers, Hypothesis, fixtures, order of the tests."""

import gc
import os
import sys
import uuid

# A Ray or MLflow server that runs on this machine, or is named in the environment, must not be used by any test.
os.environ["RAY_AUTH_MODE"] = "disabled"  # else a local Ray leaves an authentication token in the user's home
for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(variable, None)
# Those of the tests' own S3 server, for all that is started here, and nobody's real ones.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded from the Hugging Face Hub
# Else every process that tests start compiles the package anew, and pytest the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# All that this process starts inherits this mark; `reaper.py` ends it when this process is gone, however it ended.
os.environ["MMAP_CLIP_TESTS"] = uuid.uuid4().hex

import subprocess  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

if slipcover := sys.modules.get("slipcover"):
    # Before Python 3.12 it looks for code to replace after lines were seen, and fails where a thread imports meanwhile.
    slipcover.Slipcover.deinstrument_seen = lambda self: None

hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def reaper():
    """Ends every process that tests left behind, also where pytest itself was killed."""
    program = Path(__file__).with_name("reaper.py")
    process = subprocess.Popen(
        [sys.executable, str(program), os.environ["MMAP_CLIP_TESTS"]],
        stdin=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "MMAP_CLIP_TESTS"},
        start_new_session=True,  # a Ctrl-C is not for it
    )
    yield
    process.stdin.close()
    process.wait()


@pytest.fixture(autouse=True)
def seeded():
    """Random numbers do not depend on which tests ran before in this process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(1)


@pytest.fixture
def shared_ray():
    """A Ray of two CPUs that all tests of this process share, whose workers stay."""
    from pipelines import ensure_ray

    ensure_ray()


@pytest.fixture(scope="session")
def run_job():
    """`run_job("full_pipeline", *arguments)`: a job script in this process, on the shared Ray.

    Starting Python, Ray and its workers takes most of a small job's time, so this is how tests run jobs, except for
    those about starting, interrupting and killing them (`pipelines.Job`).
    """
    from pipelines import run_in_process

    return run_in_process


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory, run_job):
    """Storage and output of one undisturbed run of the pipeline, which others are compared with."""
    from pipelines import QUICK

    storage = tmp_path_factory.mktemp("quick run") / "storage"
    finished = run_job("full_pipeline", "--storage", storage, *QUICK)
    assert finished.status == 0, finished.output
    return storage, finished.output


@pytest.fixture
def new_storage(tmp_path, digits):
    """A new storage with the demo's images and MLflow's tables, which else take every job three seconds."""
    from pipelines import prepare

    return prepare(tmp_path / "storage", digits)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """`make_once(name, write)`: a folder that one process writes by `write(folder)`, and all share."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder = root / name
        with FileLock(f"{folder}.lock"):
            if not (finished := root / f"{name} is finished").exists():
                write(folder)
                finished.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def undisturbed(make_once):
    """Storage of one run that nothing breaks, which the others are compared with; all processes share it."""
    from pipelines import FEW_TASKS, run_in_process

    def run(storage: Path) -> None:
        finished = run_in_process("full_pipeline", "--storage", storage, *FEW_TASKS)
        assert finished.status == 0, finished.output

    return make_once("undisturbed", run)


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    """MmAP of two groups, untrained, for the demo's CLIP."""
    from small_adapters import DIGITS, trained

    from pipeline.methods.adapter_file import save_adapter

    file = tmp_path_factory.mktemp("prompts") / "grouped.safetensors"
    save_adapter(file, trained("mmap", {"ink": DIGITS, "neon": DIGITS}, {"pairs": ["zero | nought", "one"]}))
    return file


@pytest.fixture(scope="session")
def digits(make_once):
    """The demo's images, <task>/<train or test>/<class>/*.png, which all processes share; nothing changes them."""
    from pipeline.demo.digits import write_digits

    return make_once("digits", write_digits)


USERS_OF_RAY = (
    "test_pipeline.py",
    "test_golden.py",
    "test_tuning.py",
    "test_benchmark.py",
    "test_added_task.py",
    "test_grouping_study.py",
    "test_prediction_batch.py",
    "test_prediction_mlflow.py",
    "test_mlflow_page.py",
    "test_fit.py",
    "test_splits_stage.py",
    "test_data_check.py::test_the_job_tells_shows_and_remembers",
    "test_inputs.py::test_one_task_in_a_table_goes_through_the_whole_pipeline",
    "test_multi_label.py",
)
"""Files, or tests, that use `shared_ray` or `run_job`, the longest first; not those marked `fault_injection`."""
LONGEST_TESTS = (
    "test_serving.py",
    "test_slurm.py",
    "test_run_lock.py",
    "test_tracking.py",
    "test_methods.py",
    "test_keys.py",
    "test_grouping_search.py",
    "test_docs_code.py",
    "test_grouping.py",
    "test_data_parallel.py",
    "test_weights.py",
    "test_towers.py",
    "test_families.py",
    "test_inputs.py",
    "test_hostile_input.py",
    "test_data.py",
    "test_families_text.py",
    "test_benchmark_report.py",
)
"""Those of the other files that take most time: of waiting, next to the tests that use Ray, then of the CPU."""
LONGEST_FAULT_INJECTION_TESTS = (
    "test_cluster_faults.py",
    "test_soak.py",
    "test_fault_tolerance.py",
    "test_tutorial.py",
    "test_cluster_commands.py",
    "test_cluster.py",
    "test_serving.py",
    "test_golden.py",
)
WITHOUT_OWN_FIXTURES = ("test_fault_tolerance.py", "test_interrupts.py")
"""Files with fault-injection tests that may run in any process, one by one."""


def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one process, and so do all that use Ray: one Ray, whose workers import PyTorch once, and
    each fixture once. `test_docs_code.py` has described all models of open_clip before `test_list_models.py` does.

    pytest-xdist's `--dist loadgroup` does that by marks, but pytest 9 does not see the names that it gives to tests.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFixtures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0]).name
            if config.option.markexpr == "fault_injection":
                return nodeid if file in WITHOUT_OWN_FIXTURES else file
            return "Ray" if is_user_of_ray(nodeid) else {"test_list_models.py": "test_docs_code.py"}.get(file, file)

    return ByFixtures(config, log)


def pytest_xdist_auto_num_workers(config):
    """One process more than cores: at any time, one of them waits for a server, a signal or a lock."""
    from pipeline.cpus import usable_cpus

    return usable_cpus()[0] + 1


def needs_ray(item: pytest.Item) -> bool:
    return not {"shared_ray", "run_job"}.isdisjoint(item.fixturenames)


def is_user_of_ray(nodeid: str) -> bool:
    return nodeid.partition("[")[0].rpartition("/")[2].startswith(USERS_OF_RAY)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """End Ray after the last of the tests in a row that use it: idle, it takes a tenth of a core."""
    result = yield
    if (ray := sys.modules.get("ray")) and ray.is_initialized() and not (nextitem and needs_ray(nextitem)):
        ray.shutdown()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What imports leave stays: looking through it for garbage again and again takes a fifth of the collection, and
    then of every test's time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_ignore_collect(collection_path, config):
    """Import only the files with fault-injection tests to run these: the others take seconds."""
    if config.option.markexpr == "fault_injection" and collection_path.name.startswith("test_"):
        return "fault_injection" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(config, items):
    """Tests that use Ray begin, then the longest files, so that no process is left with them at the end."""
    if torch := sys.modules.get("torch"):  # not imported where nothing is collected, such as by pytest-xdist itself
        torch.set_num_threads(1)  # small models: more threads only wait for each other
    for item in items:
        if needs_ray(item) and not item.get_closest_marker("fault_injection"):
            if item.path.parent == Path(__file__).parent and not is_user_of_ray(item.nodeid):
                raise pytest.UsageError(f"conftest.USERS_OF_RAY lacks {item.path.name} or {item.nodeid}")

    def position(item: pytest.Item, names: Sequence[str]) -> int:
        files = [name.partition("::")[0] for name in names]
        return files.index(item.path.name) if item.path.name in files else len(files)

    if config.option.markexpr == "fault_injection":
        items.sort(key=lambda item: (position(item, LONGEST_FAULT_INJECTION_TESTS), not needs_ray(item)))
    else:
        items.sort(
            key=lambda item: (
                (0, not needs_ray(item), position(item, USERS_OF_RAY))
                if is_user_of_ray(item.nodeid)
                else (1, position(item, LONGEST_TESTS))
            )
        )
