"""Files that start clusters: valid by schema, one image and one set of versions, secrets and ports as documented."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import ray
import yaml
from compose_file import COMPOSE_FILE, VariableUnset, read_compose_file, read_env_file, words
from moto import mock_aws
from moto.ec2.models.instance_types import InstanceTypeBackend
from pipelines import REPOSITORY
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.util import validate_config

from pipeline.config import JobParser

CLUSTER = REPOSITORY / "cluster"
SCHEMAS = Path(__file__).parent / "schemas"
SECRETS = ("RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY")
FILLED = {name: f"secret-{number}" for number, name in enumerate(SECRETS)}
IMAGE = f"mmap-clip:{tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']['version']}"
RAY = ("head", "worker", "gpu-worker", "submit")
LAUNCHED = ("aws.yaml", "on_premise.yaml")
MANIFESTS = {"pvc.yaml": "PersistentVolumeClaim", "raycluster.yaml": "RayCluster", "rayjob.yaml": "RayJob"}
MANIFESTS["rayservice.yaml"] = "RayService"


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def pod_specs(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = manifest["spec"].get("rayClusterConfig", manifest["spec"])
    templates = {"head": spec.get("headGroupSpec"), "submitter": {"template": spec.get("submitterPodTemplate")}}
    templates |= {group["groupName"]: group for group in spec.get("workerGroupSpecs", [])}
    return {name: group["template"]["spec"] for name, group in templates.items() if group and group["template"]}


@pytest.fixture(scope="module")
def services():
    return read_compose_file(FILLED)["services"]


@pytest.fixture(scope="module")
def raycluster():
    return loaded(CLUSTER / "kuberay" / "raycluster.yaml")


# docker-compose.yml


def test_compose_file_is_valid():
    schema = json.loads((SCHEMAS / "compose.json").read_text())
    for content in (loaded(COMPOSE_FILE), read_compose_file(FILLED)):
        jsonschema.Draft7Validator(schema).validate(content)
    content["services"]["head"]["healthchecks"] = {}
    with pytest.raises(jsonschema.ValidationError, match="healthchecks"):
        jsonschema.Draft7Validator(schema).validate(content)


def test_every_service_is_pinned_watched_and_restarted(services):
    for name, service in services.items():
        assert re.search(r":[\d.]+\d(-[a-z]+)?$", service["image"]), name
        assert service["image"] == (IMAGE if name != "postgres" else "postgres:16.14-bookworm")
        assert service["init"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}, name
        if name == "submit":  # runs once
            assert service["restart"] == "no" and service["healthcheck"] == {"disable": True}
        else:
            assert service["restart"] == "unless-stopped", name
            assert {"test", "interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys(), name


def test_every_service_has_a_limit_of_memory(services):
    assert {name: service["mem_limit"] for name, service in services.items()} == {
        **{"head": "8g", "worker": "0", "gpu-worker": "0"},  # a worker takes what the machine has
        **{"submit": "1g", "mlflow": "4g", "postgres": "2g"},
    }
    assert read_compose_file({**FILLED, "WORKER_MEMORY": "24g"})["services"]["worker"]["mem_limit"] == "24g"


def test_ports_are_open_to_this_machine_unless_asked_otherwise(services):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"head": ["127.0.0.1:8265:8265"], "mlflow": ["127.0.0.1:5000:5000"]}
    elsewhere = read_compose_file({**FILLED, "BIND_ADDRESS": "192.0.2.1"})["services"]
    assert elsewhere["head"]["ports"] == ["192.0.2.1:8265:8265"]
    assert elsewhere["mlflow"]["ports"] == ["192.0.2.1:5000:5000"]


def test_only_mlflow_reaches_the_database(services):
    assert [name for name, service in services.items() if "database" in service["networks"]] == ["mlflow", "postgres"]
    assert services["postgres"]["networks"] == ["database"]
    assert read_compose_file(FILLED)["networks"]["database"] == {"internal": True}


def test_ray_asks_for_a_token_and_the_head_works_not(services):
    for name in RAY:
        environment = services[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN"] == FILLED["RAY_AUTH_TOKEN"]
        assert services[name]["volumes"] == ["shared:/shared"]
        assert services[name]["networks"] == ["cluster"]
    assert {"--num-cpus=0", "--num-gpus=0"} <= set(words(services["head"]["command"]))
    for name in ("head", "worker", "gpu-worker"):
        assert "--block" in words(services[name]["command"])
        assert services[name]["stop_grace_period"] == "30s" and services[name]["shm_size"] == "2gb"
    (devices,) = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (devices["driver"], devices["capabilities"]) == ("nvidia", ["gpu"])


def test_mlflow_has_its_checks_and_a_switch_for_passwords(services):
    command = words(services["mlflow"]["command"])
    assert "--allowed-hosts=mlflow:*,localhost:*,127.0.0.1:*" in command
    assert not any(word.startswith(("--app-name", "--cors")) for word in command)
    changed = {**FILLED, "MLFLOW_APP": "basic-auth", "MLFLOW_CORS_ALLOWED_ORIGINS": "https://a.example"}
    command = words(read_compose_file(changed)["services"]["mlflow"]["command"])
    assert command[-2:] == ["--cors-allowed-origins=https://a.example", "--app-name=basic-auth"]
    assert (REPOSITORY / services["mlflow"]["environment"]["MLFLOW_AUTH_CONFIG_PATH"]).is_file()


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_is_not_set_is_named(name):
    with pytest.raises(VariableUnset, match=f"{name} .*run cluster/make_env.sh first"):
        read_compose_file({**FILLED, name: ""})


def test_no_secret_is_in_the_files():
    secret = re.compile(r"(TOKEN|PASSWORD|SECRET_KEY|SECRET_ACCESS_KEY)$")
    for name, service in loaded(COMPOSE_FILE)["services"].items():
        for variable, value in service["environment"].items():
            if secret.search(variable):
                assert value is None or value.startswith("${"), (name, variable)
    example = read_env_file((CLUSTER / "example.env").read_text())
    assert example == dict.fromkeys(SECRETS, "")
    for path in CLUSTER.rglob("*"):
        if path.is_file():
            assert not re.search(r"[0-9a-f]{32}|AKIA|PRIVATE KEY|://[^/\s]+:[^/\s]+@", path.read_text()), path


def test_one_command_makes_the_secrets(tmp_path):
    environments = []
    for name in ("one.env", "other.env"):
        command = [CLUSTER / "make_env.sh", tmp_path / name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        environments.append(read_env_file((tmp_path / name).read_text()))
        repeated = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        assert repeated.returncode != 0 and "exists" in repeated.stderr
        assert read_env_file((tmp_path / name).read_text()) == environments[-1]
    secrets = [value for values in environments for value in values.values()]
    assert set(environments[0]) == set(SECRETS) and len(set(secrets)) == 2 * len(SECRETS)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in secrets)
    read_compose_file(environments[0])


# The image


def test_image_is_pinned_installs_the_constraints_and_runs_as_no_root():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^FROM (.*)$", dockerfile, re.M) == ["python:3.11.15-slim-bookworm"]
    assert "pip install --constraint constraints.txt '.[aggregation,hugging-face,server]'" in dockerfile
    assert re.findall(r"^USER (.*)$", dockerfile, re.M) == ["1000:1000"]
    copied = {
        word.rstrip("/") for line in re.findall(r"^COPY (.*)$", dockerfile, re.M) for word in shlex.split(line)[:-1]
    }
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((REPOSITORY / path).exists() for path in copied)


def test_versions_and_paths_are_the_same_everywhere(raycluster):
    constraints = (REPOSITORY / "constraints.txt").read_text()
    assert f"ray=={raycluster['spec']['rayVersion']}\n" in constraints and ray.__version__ in constraints
    for name in LAUNCHED:
        docker = loaded(CLUSTER / name)["docker"]
        assert docker["image"] == IMAGE
        assert {"--volume=/shared:/shared", "--env=RAY_AUTH_MODE=token", "--cap-drop=ALL"} <= set(docker["run_options"])
    rayservice = loaded(CLUSTER / "kuberay" / "rayservice.yaml")
    assert rayservice["spec"]["rayClusterConfig"]["rayVersion"] == raycluster["spec"]["rayVersion"]
    for manifest in (raycluster, rayservice, loaded(CLUSTER / "kuberay" / "rayjob.yaml")):
        for pod in pod_specs(manifest).values():
            assert [container["image"] for container in pod["containers"]] == [IMAGE]


# Ray's cluster launcher


@pytest.fixture
def launcher_home(tmp_path, monkeypatch):
    """Home folder with a token, and space for the key that Ray creates."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".ray/auth_token", ".ssh/id_ed25519"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("not a real one")


@pytest.mark.slow
def test_aws_file_opens_ssh_only(launcher_home, monkeypatch):
    """Config that `ray up` prepares before it starts machines, on a simulated AWS."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setattr(aws_config.time, "sleep", lambda seconds: None)
    content = loaded(CLUSTER / "aws.yaml")
    # Ray asks for all types of machine that there are, which takes seconds; of these the file's own are simulated.
    named = {node["node_config"]["InstanceType"] for node in content["available_node_types"].values()}
    of_file = [of_type for of_type in InstanceTypeBackend.instance_types if of_type["InstanceType"] in named]
    monkeypatch.setattr(InstanceTypeBackend, "instance_types", of_file)
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        launched = _bootstrap_config(content, no_config_cache=True)
        region = launched["provider"]["region"]
        head, worker = (launched["available_node_types"][name] for name in ("head", "gpu_worker"))
        (group,) = boto3.client("ec2", region_name=region).describe_security_groups(
            GroupIds=head["node_config"]["SecurityGroupIds"]
        )["SecurityGroups"]
    assert head["node_config"]["SecurityGroupIds"] == worker["node_config"]["SecurityGroupIds"]
    opened = [(rule.get("FromPort"), rule.get("ToPort")) for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert opened == [(22, 22)]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0, "GPU": 0}, 0)
    assert (worker["min_workers"], worker["resources"]["GPU"]) == (0, 1)


def test_on_premise_file_is_valid(launcher_home):
    launched = _bootstrap_config(loaded(CLUSTER / "on_premise.yaml"), no_config_cache=True)
    validate_config(launched)
    assert launched["max_workers"] == len(launched["provider"]["worker_ips"])


def test_launchers_report_errors(launcher_home):
    """The schema is Ray's, and strict."""
    with pytest.raises(jsonschema.ValidationError, match="workers_ips"):
        content = loaded(CLUSTER / "on_premise.yaml")
        _bootstrap_config(content | {"workers_ips": []}, no_config_cache=True)


def test_ray_knows_every_option_of_its_starts(services, raycluster, tmp_path, monkeypatch):
    from ray.scripts.scripts import start as ray_start  # takes seconds, and every process imports this module

    commands = [words(services[name]["command"]) for name in ("head", "worker", "gpu-worker")]
    for name in LAUNCHED:
        content = loaded(CLUSTER / name)
        for part in ("head", "worker"):
            stop, start = map(shlex.split, content[f"{part}_start_ray_commands"])
            assert stop == ["ray", "stop"]
            commands.append(start)
            assert part == "worker" or {"--num-cpus=0", "--dashboard-host=127.0.0.1"} <= set(start)
    for group in (raycluster["spec"]["headGroupSpec"], *raycluster["spec"]["workerGroupSpecs"]):
        commands.append(["ray", "start", *(f"--{key}={value}" for key, value in group["rayStartParams"].items())])
    for program, command, *options in commands:
        assert (program, command) == ("ray", "start")
        ray_start.make_context("ray start", list(options))


# KubeRay


@pytest.mark.parametrize("name, kind", MANIFESTS.items())
def test_manifest_is_valid(name, kind):
    definitions: dict[str, Any] = {}
    for file in ("kubernetes.json", "kuberay.json"):
        definitions |= json.loads((SCHEMAS / file).read_text())["$defs"]
    named = kind if kind in definitions else f"io.k8s.api.core.v1.{kind}"
    validator = jsonschema.Draft202012Validator({"$ref": f"#/$defs/{named}", "$defs": definitions})
    content = loaded(CLUSTER / "kuberay" / name)
    validator.validate(content)
    assert content["kind"] == kind
    content["spec"]["unknown"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unknown"):
        validator.validate(content)


def test_pods_run_as_no_root_with_limits():
    for name in ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml"):
        for pod in pod_specs(loaded(CLUSTER / "kuberay" / name)).values():
            security = pod["securityContext"]
            assert (security["runAsNonRoot"], security["runAsUser"], security["runAsGroup"]) == (True, 1000, 1000)
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_pods_share_a_folder_and_a_token(raycluster):
    spec, claim = raycluster["spec"], loaded(CLUSTER / "kuberay" / "pvc.yaml")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pod_specs(raycluster).values():
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]
    (group,) = spec["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_job_runs_a_script_of_the_image_on_that_cluster(raycluster):
    spec = loaded(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": raycluster["metadata"]["name"]}
    program, script, *options = shlex.split(spec["entrypoint"])
    assert program == "python" and (REPOSITORY / script).is_file()
    config = JobParser("").parse(options).config()
    assert (config.storage, config.cluster.gpus_per_worker) == ("/shared/runs", 1)
    assert config.cluster.wait_for_nodes_s > 0


def test_docs_name_files_that_exist():
    for path in re.findall(
        r"\b(?:cluster|jobs|configs|docs|tests)/[\w/.]+\w", (REPOSITORY / "docs/cluster.md").read_text()
    ):
        assert (REPOSITORY / path).exists(), path
