"""Takes the screenshots of docs/mlflow.md from a running MLflow server: `python docs/make_mlflow_pictures.py URL`.

The committed ones show the demo:

    mmap-clip benchmark --methods zero_shot coop_mt vpt_mt clip_adapter all_in_one grouped --shots 2 4 --seeds 1 2 3 \\
        --training.epochs 12 --global_prompt.epochs 8            and again with --grouping.objective sum
"""

import sys
from pathlib import Path

from mlflow import MlflowClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from mlflow_page import METHODS, browser_page, open_comparison, open_run, open_runs  # noqa: E402

PICTURES = Path(__file__).with_name("pictures")
PAGE_WITHOUT_MENU = {"x": 190, "y": 0, "width": 1210, "height": 800}
ANIMATION_MS = 3000
"""Charts are animated."""


def main(server: str) -> None:
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("mmap-clip").experiment_id
    four_shots = f"{METHODS} and params.shots = '4' and params.objective = 'mean'"
    methods = client.search_runs([experiment], four_shots, order_by=["attributes.start_time DESC"])
    (training, *_) = client.search_runs([experiment], "tags.level = 'training' and tags.method = 'all_in_one'")
    (pipeline, *_) = client.search_runs([experiment], "tags.level = 'pipeline'")
    with browser_page(1400, 800) as page:

        def take_screenshot(name: str) -> None:
            page.wait_for_timeout(ANIMATION_MS)
            page.screenshot(path=PICTURES / f"mlflow_{name}.png", clip=PAGE_WITHOUT_MENU)

        open_runs(page, server, experiment, four_shots)
        page.get_by_test_id("column-selection-dropdown").first.click()
        for column in ("Dataset", "Source", "Models", "accuracy/average", "accuracy/thick_left", "trained_parameters"):
            page.get_by_role("textbox", name="Search columns").or_(page.get_by_placeholder("Search columns")).fill(
                column
            )
            page.get_by_text(column, exact=True).last.click()
        page.keyboard.press("Escape")
        take_screenshot("methods")
        open_runs(page, server, experiment, four_shots, charts=True)
        take_screenshot("charts")
        open_comparison(page, server, experiment, [run.info.run_id for run in methods])
        take_screenshot("comparison")
        open_run(page, server, experiment, training.info.run_id, "system-metrics")
        take_screenshot("system")
        open_run(page, server, experiment, pipeline.info.run_id, "artifacts/report/grouping.html")
        take_screenshot("artifacts")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
