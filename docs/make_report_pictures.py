"""Takes the screenshots of docs/report.md from the demo's report: `python docs/make_report_pictures.py REPORT_HTML`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from mlflow_page import browser_page  # noqa: E402

PICTURES = Path(__file__).with_name("pictures")
WIDTH = 1060


def main(report: str) -> None:
    with browser_page(WIDTH, 800) as page:
        page.goto(Path(report).resolve().as_uri())
        tops = page.eval_on_selector_all("h2", "titles => titles.map(title => title.offsetTop)")
        groups, task, next_task = tops[1:4]
        for name, top, bottom in (("report", 0, groups), ("report_task", task, next_task)):
            clip = {"x": 0, "y": max(0, top - 10), "width": WIDTH, "height": bottom - top - 10}
            page.screenshot(path=PICTURES / f"{name}.png", clip=clip, full_page=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
