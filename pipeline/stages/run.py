"""Opening of a run: its plan, and the session of its stages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.data.names import pluralize
from pipeline.methods.registry import DEFAULT_VARIANTS, METHODS, VARIANTS, with_sources
from pipeline.runtime.cluster import WorkerResources
from pipeline.runtime.environment import run_environment, source_name
from pipeline.runtime.session import PARENT, Session, cluster_connection, open_session
from pipeline.stages.plan import Plan, make_plan

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def open_run(config: Config, console: Console, fetches_weights: bool = True) -> Iterator[tuple[Plan, Session]]:
    """Check the config against data, model, storage and tracking server, and open the run. The cluster is connected to
    when work needs it: before anything else, if the run begins with images that have not been split.

    Args:
        fetches_weights: whether CLIP's weights are fetched; stages that only read images need none.

    Raises:
        UserError: The first problem found, with a remedy.
    """
    console.print(f"[bold]{config.name}[/]: checking data, model, storage, tracking and cluster", highlight=False)
    plan = make_plan(config, console, fetches_weights=fetches_weights)
    with connect_cluster(plan, console) as connect:
        if not plan.splits.is_complete():
            connect()
        with run_session(plan, connect, console) as session:
            yield plan, session


def connect_cluster(
    plan: Plan, console: Console, dashboard: bool = False
) -> AbstractContextManager[Callable[[], WorkerResources]]:
    """Return the connection to the cluster of a plan, or of several with the same storage, data, CLIP and cluster."""
    return cluster_connection(plan.config.cluster, plan.storage, plan.shared_paths, console, dashboard)


@contextmanager
def run_session(
    plan: Plan, connect: Callable[[], WorkerResources], console: Console, cancelled: threading.Event | None = None
) -> Iterator[Session]:
    """Open a session for a plan, with its MLflow parent run; `connect`: as of `cluster_connection`; `cancelled`
    ends its work from another thread."""
    config = plan.config
    with open_session(
        plan.storage, plan.folder, plan.key, config.cluster, connect, config.tracking, console, cancelled
    ) as session:
        _log_run_header(plan, session)
        yield session


def _log_run_header(plan: Plan, session: Session) -> None:
    config, run_uri = plan.config, plan.storage.display_uri(plan.folder)
    session.tracker.start_run(
        PARENT,
        tags={
            "mlflow.runName": plan.title,
            "mlflow.source.name": source_name(),
            "level": "pipeline",
            "run_folder": run_uri,
            **{f"env.{name}": value for name, value in run_environment().items()},
        },
        params=_flat(config.model_dump(mode="json", exclude=_unused_method_sections(config))),
    )
    session.tracker.log_artifact(PARENT, plan.folder / "config.yaml")
    parameters = f"{plan.mmap_shape.num_parameters:,} parameters per MmAP · " if plan.mmap_shape else ""
    session.console.print(
        f"  {pluralize(len(plan.tasks), 'task')}, {pluralize(len(plan.dataset_index.images), 'image')} · "
        f"{config.clip.model} · "
        f"{parameters}results in {run_uri}",
        markup=False,
        highlight=False,
    )


def _unused_method_sections(config: Config) -> set[str]:
    """Return sections of methods that the run does not train, omitted from the MLflow parameters."""
    used = {METHODS[VARIANTS[name].method].section for name in with_sources((*DEFAULT_VARIANTS, *config.baselines))}
    return {method.section for method in METHODS.values() if method.section and method.section not in used}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
