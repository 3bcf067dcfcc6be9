"""Files that start the service elsewhere: the RayService of KubeRay, and the example of a reverse proxy."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from pipelines import REPOSITORY
from ray.serve.schema import ServeDeploySchema
from servers import free_ports
from serving import TOKEN

from pipeline.config.schema import validate
from pipeline.errors import UserError
from pipeline.serving.options import ApplicationOptions
from pipeline.serving.service import build_application

RAYSERVICE = yaml.safe_load((REPOSITORY / "cluster" / "kuberay" / "rayservice.yaml").read_text())
NGINX = REPOSITORY / "cluster" / "proxy" / "nginx.conf"


def test_the_rayservice_starts_the_service_with_what_its_pods_have():
    config = ServeDeploySchema.model_validate(yaml.safe_load(RAYSERVICE["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{build_application.__module__}:{build_application.__name__}"
    args = application.args
    options = validate(ApplicationOptions, {**args, "models": tuple(args["models"])})
    spec = RAYSERVICE["spec"]["rayClusterConfig"]
    (group,) = spec["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    assert group["replicas"] == options.replicas  # a replica on each worker
    assert (int(limits["cpu"]), limits["nvidia.com/gpu"]) == (options.cpus_per_worker, options.gpus_per_worker)
    assert config.http_options.host == "0.0.0.0"
    for pod in (spec["headGroupSpec"], group):
        (container,) = pod["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": config.http_options.port} in container["ports"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["template"]["spec"]["volumes"]}
        secret = volumes[mounts[str(Path(options.token_file).parent)]]["secret"]
        assert not secret["defaultMode"] & 0o007  # which the service refuses
        assert all(model.partition("=")[2].startswith("/shared/") for model in options.models)
        assert pod["template"]["spec"]["terminationGracePeriodSeconds"] > options.timeout_s


def test_an_application_is_built_from_the_arguments_of_a_serve_config(adapter_file, tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    args = {"models": [f"m={adapter_file}"], "token_file": str(token_file), "max_images": 7, "replicas": 2}
    application = build_application(args)
    ingress = application._bound_deployment
    replicas, models, _, limits, digests = ingress.init_args
    assert list(models) == ["m"] and limits.max_images == 7 and len(digests) == 1 and TOKEN not in repr(digests)
    deployment = replicas._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("ModelReplica", 2)
    get_adapters = deployment.init_args[0]
    assert list(get_adapters()) == ["m"]  # in the process of the replica
    for changes, message in [
        ({"models": ["m=/nowhere/x.safetensors"]}, "/nowhere"),
        ({"models": ["no name"]}, "expected NAME=SOURCE"),
        ({"model": "x"}, "model"),
        ({"max_images": 0}, "max_images=0"),
        ({"max_buffered_mib": 1}, "--max_buffered_mib 1 is less than --max_request_mib 10"),
        ({"token_file": str(tmp_path / "absent")}, "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            build_application({**args, **changes})


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx")
def test_nginx_takes_the_example_of_a_reverse_proxy(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    (port,) = free_ports(1, start=9300)
    site = NGINX.read_text().replace("listen [::]:443 ssl;", "").replace("listen 443", f"listen 127.0.0.1:{port}")
    for path, file in {"/etc/nginx/tls/mmap-clip.pem": certificate, "/etc/nginx/tls/mmap-clip.key": key}.items():
        assert path in site
        site = site.replace(path, str(file))
    (tmp_path / "site.conf").write_text(site)
    main = tmp_path / "nginx.conf"
    main.write_text(f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\n    include {tmp_path}/site.conf;\n}}\n")
    check = subprocess.run(
        ["nginx", "-t", "-c", main, "-e", tmp_path / "error.log"], capture_output=True, text=True, cwd=tmp_path
    )
    assert check.returncode == 0, check.stderr


def test_the_example_of_a_reverse_proxy_fits_the_options():
    site = NGINX.read_text()
    options = ApplicationOptions(models=("m=x",))
    assert f"client_max_body_size {options.max_request_mib:g}m;" in site
    assert f"proxy_read_timeout {options.timeout_s + 5:g}s;" in site
    assert "proxy_set_header X-Forwarded-For $remote_addr;" in site and "Authorization" in site
