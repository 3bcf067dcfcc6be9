"""Runs jobs/full_pipeline.py and kills its own process (SIGKILL) at a point: `kill_driver.py <point> <job arguments>`.

Points: `module:function` (before the first call of a function that the driver uses there), or `report:<label>:<count>`
(when a worker reports at least so many completed units of that work).
"""

import importlib
import os
import runpy
import signal
import sys

point = sys.argv.pop(1)
sys.path.insert(0, os.getcwd())


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


if point.startswith("report:"):
    _, label, count = point.split(":")
    from pipeline.runtime.progress import ProgressDisplay

    show = ProgressDisplay.show

    def show_or_die(self, report):
        if report.label == label and report.completed >= int(count):
            die()
        show(self, report)

    ProgressDisplay.show = show_or_die
else:
    module, function = point.split(":")
    setattr(importlib.import_module(module), function, die)

sys.argv[0] = "jobs/full_pipeline.py"
runpy.run_path("jobs/full_pipeline.py", run_name="__main__")
