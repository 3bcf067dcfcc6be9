"""cluster/slurm/mmap-clip.sbatch under stand-ins for Slurm's commands, whose nodes are processes of this machine.

What a stand-in does, Slurm 22.05 was seen to do: variables of a step, which process gets which signal, statuses.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from breaking import checkpoints, same
from pipelines import FEW_TASKS, PATIENCE_S, REPOSITORY, every_step_once
from servers import BIN

SCRIPT = REPOSITORY / "cluster" / "slurm" / "mmap-clip.sbatch"
HEAD = "127.0.0.2"
TOKEN_LENGTH = 64
KILLED = 128 + signal.SIGKILL

COMMANDS = {
    # A process for each node, with the variables of a step; the highest status is that of the step.
    "srun": """
import os, subprocess, sys
from pathlib import Path
from time import monotonic, sleep
import psutil
lab, start = Path(os.environ["LAB"]), sys.argv.index("bash")
options, command = sys.argv[1:start], sys.argv[start:]
assert "--export=ALL" in options  # the site's default may be NONE
values = dict(word.split("=", 1) for word in options)
tasks = []
for number in range(int(os.environ["SLURM_NNODES"])):
    step = {"SLURM_NODEID": str(number), "SLURMD_NODENAME": f"n{number}"}
    step |= {"SLURM_CPUS_PER_TASK": values["--cpus-per-task"], "SLURM_LAUNCH_NODE_IPADDR": os.environ["HEAD"]}
    tasks.append(subprocess.Popen(command, env={**os.environ, **step}))
(lab / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
ended = None
while any(task.poll() is None for task in tasks):
    if ended is None and any(task.poll() is not None for task in tasks):
        ended = monotonic()
    if ended is not None and monotonic() - ended > float(values["--wait"]):
        for process in psutil.Process().children(recursive=True):
            process.kill()
    sleep(0.05)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
""",
    "scancel": """
import os, signal, sys
from pathlib import Path
lab = Path(os.environ["LAB"])
with open(lab / "scancel.txt", "a") as log:
    print(*sys.argv[1:], file=log)
for pid in (lab / "tasks").read_text().split():  # processes of the tasks, not their children
    os.kill(int(pid), signal.SIGTERM)
""",
    "scontrol": """
import os, sys
from pathlib import Path
lab = Path(os.environ["LAB"])
with open(lab / "scontrol.txt", "a") as log:
    print(*sys.argv[1:], file=log)
if sys.argv[1] == "show":
    print("   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0")
    print("   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=" + os.environ.get("PREEMPTED", "None"))
""",
}
STAND_IN_RAY = {
    "ray": """
import os, signal, socket, sys, threading
from pathlib import Path
lab, node = Path(os.environ["LAB"]), os.environ["SLURM_NODEID"]
(lab / f"ray-{node}.txt").write_text("\\n".join([os.environ["RAY_AUTH_TOKEN"], os.environ["RAY_AUTH_MODE"], *sys.argv]))
if node in os.environ.get("NOT_STARTING", ""):
    sys.exit("no room for Ray")
def end(*_):
    (lab / f"joined-{node}").unlink()
    sys.exit()
signal.signal(signal.SIGTERM, end)
options = dict(word.split("=", 1) for word in sys.argv if "=" in word)
if "--head" in sys.argv:
    server = socket.create_server((options["--node-ip-address"], int(options["--port"])))
    def serve():
        while True:
            server.accept()[0].close()
    threading.Thread(target=serve, daemon=True).start()
if node not in os.environ.get("NOT_JOINING", ""):
    (lab / f"joined-{node}").touch()
print("Ray runtime started.", flush=True)
signal.pause()
""",
    "mmap-clip": """
import os, signal, sys
from pathlib import Path
lab = Path(os.environ["LAB"])
def end(*_):
    print("interrupted by SIGTERM", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("mmap-clip", *sys.argv[1:], "RAY_ADDRESS", os.environ.get("RAY_ADDRESS"), flush=True)
if "forever" in sys.argv:
    (lab / "running").touch()
    signal.pause()
sys.exit(int(os.environ.get("STATUS", 0)))
""",
}
RAY_MODULE = """
import os
from pathlib import Path
def init(**options): assert os.environ["RAY_ADDRESS"]
def nodes(): return [{"Alive": True} for _ in Path(os.environ["LAB"]).glob("joined-*")]
def cluster_resources(): return {"CPU": 2.0 * len(nodes())}
"""


@dataclass
class Batch:
    """A job as `sbatch` starts it, with stand-ins for Slurm's commands and, unless `real_ray`, for Ray and jobs."""

    lab: Path
    real_ray: bool = False
    script: str = SCRIPT.read_text()

    def start(self, *arguments: str, nodes: int = 1, job: int = 7, **variables: str) -> subprocess.Popen:
        bin = self.lab / "bin"
        if not bin.exists():
            bin.mkdir(parents=True)
            for name, text in (COMMANDS | ({} if self.real_ray else STAND_IN_RAY)).items():
                (bin / name).write_text(f"#!{sys.executable}\n{text}")
                (bin / name).chmod(0o755)
            modules = self.lab / "modules"
            modules.mkdir()
            if not self.real_ray:
                (modules / "ray.py").write_text(RAY_MODULE)
            activate = self.lab / "mmap-clip" / ".venv" / "bin" / "activate"
            activate.parent.mkdir(parents=True)
            paths = [modules, REPOSITORY] if self.real_ray else [modules]
            activate.write_text(f"export PATH='{bin}:{BIN}':$PATH PYTHONPATH='{':'.join(map(str, paths))}'\n")
        for file in self.lab.glob("*.txt"):
            file.unlink()
        slurm = {"SLURM_JOB_ID": str(job), "SLURM_NNODES": str(nodes), "SLURM_CPUS_ON_NODE": "4"}
        slurm |= {"SLURM_CPUS_PER_TASK": "2", "LAB": str(self.lab), "HEAD": HEAD, "HOME": str(self.lab)}
        (self.lab / "script").write_text(self.script)
        return subprocess.Popen(
            ["bash", str(self.lab / "script"), *arguments],
            cwd=self.lab,
            env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | slurm | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **options) -> tuple[int, str]:
        return self.end(self.start(*arguments, **options))

    def end(self, process: subprocess.Popen) -> tuple[int, str]:
        """Status and output; nothing that the job started may be left, neither processes nor Ray's folders."""
        output = process.communicate(timeout=PATIENCE_S)[0]
        survivors = [
            process
            for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get("LAB") == str(self.lab)
        ]
        assert not psutil.wait_procs(survivors, timeout=60)[1]
        remaining = [folder for folder in self.ray_folders() if Path(folder).exists()]
        for folder in remaining:
            shutil.rmtree(folder)
        assert not remaining or process.returncode == KILLED
        return process.returncode, output

    def ray_folders(self) -> list[str]:
        return [word for node in (0, 1) for word in re.findall("--temp-dir=(.*)", "\n".join(self.ray_options(node)))]

    def ray_options(self, node: int) -> list[str]:
        file = self.lab / f"ray-{node}.txt"
        return file.read_text().splitlines() if file.exists() else []

    def log_of(self, command: str) -> list[str]:
        file = self.lab / f"{command}.txt"
        return file.read_text().splitlines() if file.exists() else []

    def wait_until(self, condition: Callable[[], object], process: subprocess.Popen) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
            time.sleep(0.05)


@pytest.fixture
def batch(tmp_path):
    return Batch(tmp_path / "lab")


def test_two_nodes_are_one_cluster_and_the_job_joins_it(batch):
    status, output = batch.run("full-pipeline", "--data.root", "/a b", nodes=2, SLURM_GPUS_ON_NODE="3")
    assert status == 0, output
    head, node = batch.ray_options(0), batch.ray_options(1)
    (address,) = [word.partition("=")[2] for word in node if word.startswith("--address=")]
    assert address.partition(":")[0] == HEAD and f"--port={address.partition(':')[2]}" in head
    assert f"mmap-clip full-pipeline --data.root /a b RAY_ADDRESS {address}" in output
    for options in (head, node):
        assert {"--num-cpus=2", "--num-gpus=3", "--block"} <= set(options)
    # The token is the same everywhere, new for each job, in no arguments and no output.
    token = head[0]
    assert len(token) == TOKEN_LENGTH and head[:2] == node[:2] == [token, "token"]
    assert token not in output + "".join(head[2:] + node[2:])
    assert batch.run("full-pipeline")[0] == 0 and batch.ray_options(0)[0] != token


def test_the_status_is_that_of_the_job_and_cpus_are_those_of_the_node_where_no_task_asks(batch):
    process = batch.start("full-pipeline", STATUS="2", SLURM_CPUS_PER_TASK="")
    assert batch.end(process)[0] == 2
    assert {"--num-cpus=4", "--num-gpus=0"} <= set(batch.ray_options(0))
    assert not any(line.startswith("requeue") for line in batch.log_of("scontrol"))


def test_jobs_on_one_node_have_ports_of_their_own():
    text = re.search(r"port=\$\(\((.*?)\)\)", SCRIPT.read_text()).group(1)
    ports = [eval(text.replace("SLURM_JOB_ID", str(job))) for job in range(90_000, 94_000)]
    used = {port + offset for port in ports for offset in range(3)}
    # Above those of Ray's workers (10002 to 19999), below those that systems give to connections.
    assert len(used) == 3 * len(ports) and min(used) >= 20_000 and max(used) < 32_768


def test_an_array_has_a_seed_for_each_task(batch):
    status, output = batch.run("full-pipeline", "--seed", "%a", SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="3")
    assert status == 0 and "full-pipeline --seed 3 RAY_ADDRESS" in output


def test_out_of_time_the_job_ends_in_order_and_is_queued_again(batch):
    process = batch.start("forever", nodes=2, SLURM_ARRAY_JOB_ID="6", SLURM_ARRAY_TASK_ID="3")
    batch.wait_until((batch.lab / "running").exists, process)
    process.send_signal(signal.SIGUSR1)
    status, output = batch.end(process)
    assert status == 143 and "interrupted by SIGTERM" in output
    # Of an array, this task alone: the number of one of its tasks is also that of the whole array.
    assert batch.log_of("scancel") == ["--signal=TERM 6_3"] and batch.log_of("scontrol")[-1] == "requeue 6_3"


@pytest.mark.parametrize(("preempted", "requeued"), [("2026-01-01T00:00:00", True), ("None", False)])
def test_of_jobs_that_end_by_a_signal_to_their_tasks_those_preempted_are_queued_again(batch, preempted, requeued):
    process = batch.start("forever", PREEMPTED=preempted)
    batch.wait_until((batch.lab / "running").exists, process)
    if not requeued:
        process.terminate()  # as scancel does
    for pid in (batch.lab / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    status, output = batch.end(process)
    assert status == 143 and "interrupted by SIGTERM" in output
    assert ("requeue 7" in batch.log_of("scontrol")) == requeued


@pytest.mark.parametrize("node", ["0", "1"])
def test_a_node_whose_ray_does_not_start_ends_the_job(batch, node):
    batch.script = batch.script.replace("--wait=60", "--wait=1")
    status, output = batch.run("full-pipeline", nodes=2, NOT_STARTING=node)
    assert status == KILLED and f"error: n{node}: Ray did not start" in output and "no room for Ray" in output
    assert "mmap-clip full-pipeline" not in output


def test_a_node_that_does_not_join_in_time_ends_the_job(batch):
    batch.script = batch.script.replace('"$SLURM_NNODES" "$start_s"', '"$SLURM_NNODES" 5')  # time to see the first node
    status, output = batch.run("full-pipeline", nodes=2, NOT_JOINING="1")
    assert status == 1 and "error: 1 of 2 nodes have started Ray within 5 s" in output
    assert "mmap-clip full-pipeline" not in output


def test_apptainers_recipe_installs_what_the_dockerfile_does():
    texts = [(REPOSITORY / "cluster" / file).read_text() for file in ("Dockerfile", "slurm/mmap-clip.def")]
    for pattern in (r"(?:FROM|From:) (.*)", r".*pip install (--constraint constraints.txt '.*')"):
        assert len({re.search(rf"^{pattern}", text, re.MULTILINE).group(1) for text in texts}) == 1
    copied = {word for words in re.findall("^COPY (.*) [^ ]+$", texts[0], re.MULTILINE) for word in words.split()}
    assert set(re.findall("^    (.*) /app/", texts[1], re.MULTILINE)) == copied - {"cluster/mlflow_auth.ini"}


@pytest.mark.fault_injection
@pytest.mark.timeout(1200)
def test_a_preempted_pipeline_on_two_nodes_resumes_with_the_same_numbers(undisturbed, new_storage, tmp_path):
    batch = Batch(tmp_path / "lab", real_ray=True)
    command = ("full-pipeline", "--storage", str(new_storage), *FEW_TASKS)
    process = batch.start(*command, nodes=2, PREEMPTED="2026-01-01T00:00:00")
    try:
        batch.wait_until(lambda: checkpoints(new_storage, "group_trainings"), process)
        for pid in (batch.lab / "tasks").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        status, output = batch.end(process)
        assert status == 143 and "Ray on 2 nodes: 4 CPUs" in output, output
        assert f"connecting to Ray at {HEAD}:" in output and "interrupted by SIGTERM" in output
        assert batch.log_of("scontrol")[-1] == "requeue 7"
        process = batch.start(*command, nodes=2, SLURM_RESTART_COUNT="1")
        status, output = batch.end(process)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
    assert status == 0, output
    assert same(new_storage, undisturbed) and every_step_once(new_storage)
