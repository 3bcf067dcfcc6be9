"""MLflow's page shows what docs/mlflow.md describes, in a browser, for a finished pipeline run."""

from __future__ import annotations

import shutil

import pytest
from mlflow import MlflowClient
from mlflow_page import CHROMIUM, METHODS, browser_page, open_comparison, open_run, open_runs
from pipelines import summary
from playwright.sync_api import expect
from servers import free_ports, mlflow_server

from pipeline.report.summary import method_title
from pipeline.runtime.tracking.mlflow_adapter import methods_table_path

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def server_and_run(quick_run, tmp_path_factory):
    """Address, experiment, client and summary, of a server with a copy of the run's database and its artifacts."""
    storage, _ = quick_run
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copyfile(storage / "mlflow.db", folder / "server.db")
    (port,) = free_ports(1, start=8700)
    server = mlflow_server(folder, port)
    try:
        address = f"http://127.0.0.1:{port}"
        client = MlflowClient(address)
        yield address, client.get_experiment_by_name("mmap-clip").experiment_id, client, summary(storage)
    finally:
        server.kill()


@pytest.fixture(scope="module")
def page():
    with browser_page(height=4000) as page:  # only the visible part is drawn
        yield page


def test_the_experiment_has_a_row_for_each_method(server_and_run, page):
    address, experiment, _, result = server_and_run
    open_runs(page, address, experiment)
    page.get_by_text(f"{len(result['methods'])} matching runs").wait_for()
    for method in result["methods"]:
        page.get_by_role("link", name=f"{method_title(method)} (4 shots, seed 1, ").wait_for()  # rows appear one by one
    open_runs(page, address, experiment, "tags.level = 'pipeline'")
    page.get_by_role("link", name="demo, 4 shots, seed 1").wait_for()


def test_the_link_that_a_run_prints_opens_the_table_with_accuracies(server_and_run, page):
    address, experiment, _, result = server_and_run
    page.goto(f"{address}{methods_table_path(experiment)}")
    page.get_by_text(f"{len(result['methods'])} matching runs").wait_for()
    for column in ("accuracy/average", "trained_parameters"):
        page.get_by_role("columnheader", name=column).first.wait_for()
    for values in result["methods"].values():
        page.get_by_role("gridcell", name=f"{values['average']:.10f}"[:6]).first.wait_for()


def test_charts_show_each_metric_of_the_methods(server_and_run, page):
    address, experiment, _, result = server_and_run
    open_runs(page, address, experiment, charts=True)
    for name in (*(f"accuracy/{task}" for task in (*result["tasks"], "average")), "trained_parameters"):
        page.get_by_text(name, exact=True).first.wait_for()


def test_comparison_shows_the_methods_metrics(server_and_run, page):
    address, experiment, client, result = server_and_run
    runs = client.search_runs([experiment], METHODS)
    assert len(runs) == len(result["methods"])
    open_comparison(page, address, experiment, [run.info.run_id for run in runs])
    for plot in ("Parallel Coordinates Plot", "Scatter Plot"):
        page.get_by_text(plot).wait_for()
    body = page.locator("body")
    for method, values in result["methods"].items():
        expect(body).to_contain_text(method_title(method), use_inner_text=True)
        expect(body).to_contain_text(f"{values['average']:.3f}"[:4], use_inner_text=True)  # the page rounds


def test_artifact_pictures_and_pages_open(server_and_run, page):
    address, experiment, client, _ = server_and_run
    (run,) = client.search_runs([experiment], "tags.level = 'pipeline'")
    open_run(page, address, experiment, run.info.run_id, "artifacts/report/accuracy.png")
    picture = page.locator("img[src^='blob:'], img[src*='get-artifact'], img[src^='data:image/png']").first
    picture.wait_for()
    page.wait_for_function("image => image.naturalWidth > 500", arg=picture.element_handle())
    open_run(page, address, experiment, run.info.run_id, "artifacts/report/grouping.html")
    page.frame_locator("iframe").get_by_role("heading", name="Groups of 6 tasks").wait_for()


def test_a_training_shows_system_metrics(server_and_run, page):
    address, experiment, client, _ = server_and_run
    (run,) = client.search_runs([experiment], "tags.level = 'training' and tags.method = 'all_in_one'")
    open_run(page, address, experiment, run.info.run_id, "system-metrics")
    page.get_by_text("process_memory_usage_megabytes", exact=True).first.wait_for()
