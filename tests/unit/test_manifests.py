"""The shipped manifests: their keys exist, tokens are on, no secret is in them, their commands parse."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import yaml_source
from pipeline.cli import app
from pipeline.config import validate

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "cluster"
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
CONFIG_MAP, RAY_JOB = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
RAY_UP = yaml.safe_load((FOLDER / "ray_up.yaml").read_text())

# Keys of the RayJob resource, ray.io/v1, as in KubeRay 1.5.1, and of the parts of a pod that are used. A dict names the
# keys allowed; ... allows any value; a list holds items of one kind.
CONTAINER: dict[str, Any] = {
    "name": str,
    "image": str,
    "ports": [{"containerPort": int, "name": str, "protocol": str}],
    "resources": {"requests": {...: str}, "limits": {...: str}},
    "env": [{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}}],
    "envFrom": [{"secretRef": {"name": str}}],
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
    "lifecycle": {"preStop": {"exec": {"command": [str]}}},
}
TEMPLATE = {
    "metadata": {"labels": {...: str}, "annotations": {...: str}},
    "spec": {
        "terminationGracePeriodSeconds": int,
        "serviceAccountName": str,
        "nodeSelector": {...: str},
        "tolerations": [{"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int}],
        "containers": [CONTAINER],
        "volumes": [{"name": str, "configMap": {"name": str}, "persistentVolumeClaim": {"claimName": str}}],
    },
}
HEAD_GROUP = {
    "enableIngress": bool, "headService": ..., "labels": {...: str}, "rayStartParams": {...: str},
    "resources": {...: str}, "serviceType": str, "template": TEMPLATE,
}  # fmt: skip
WORKER_GROUP = {
    "groupName": str, "idleTimeoutSeconds": int, "labels": {...: str}, "maxReplicas": int, "minReplicas": int,
    "numOfHosts": int, "rayStartParams": {...: str}, "replicas": int, "resources": {...: str}, "scaleStrategy": ...,
    "suspend": bool, "template": TEMPLATE,
}  # fmt: skip
CLUSTER = {
    "authOptions": {"mode": str},
    "autoscalerOptions": {
        "env": ..., "envFrom": ..., "idleTimeoutSeconds": int, "image": str, "imagePullPolicy": str, "resources": ...,
        "securityContext": ..., "upscalingMode": str, "version": str, "volumeMounts": ...,
    },
    "enableInTreeAutoscaling": bool, "gcsFaultToleranceOptions": ..., "headGroupSpec": HEAD_GROUP,
    "headServiceAnnotations": {...: str}, "managedBy": str, "rayVersion": str, "suspend": bool,
    "workerGroupSpecs": [WORKER_GROUP],
}  # fmt: skip
SCHEMA = {
    "apiVersion": str, "kind": str, "metadata": {"name": str, "namespace": str, "labels": {...: str}},
    "spec": {
        "activeDeadlineSeconds": int, "backoffLimit": int, "clusterSelector": {...: str}, "deletionStrategy": ...,
        "entrypoint": str, "entrypointNumCpus": float, "entrypointNumGpus": float, "entrypointResources": str,
        "jobId": str, "managedBy": str, "metadata": {...: str}, "rayClusterSpec": CLUSTER, "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool, "submissionMode": str, "submitterConfig": ...,
        "submitterPodTemplate": TEMPLATE, "suspend": bool, "ttlSecondsAfterFinished": int,
    },
}  # fmt: skip


def faults(value: Any, schema: Any, path: str = "") -> list[str]:
    """Return what in a manifest the schema does not know."""
    if schema is ...:
        return []
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [fault for i, item in enumerate(value) for fault in faults(item, schema[0], f"{path}.{i}")]
    if not isinstance(value, dict):
        return [f"{path}: {value!r} is no mapping"]
    found = []
    for key, item in value.items():
        known = schema.get(key, schema.get(...))
        found += [f"{path}.{key}: unknown key"] if known is None else faults(item, known, f"{path}.{key}")
    return found


def containers(job):
    spec = job["spec"]["rayClusterSpec"]
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def commands(text: str) -> list[str]:
    """Every ``stepscope`` command in a text, comments included, with continued lines joined."""
    text = text.replace("\\\n", " ")
    return [
        found.strip() for found in re.findall(r"(?:^|[\s:])(stepscope (?:run|submit|cancel|logs|status) [^\n]*)", text)
    ]


def sweep_of_the_job():
    raw, lines = yaml_source.read(CONFIG_MAP["data"]["sweep.yaml"], "sweep.yaml")
    return validate(raw, lines, "sweep.yaml")


class TestEveryManifest:
    def test_all_are_looked_at(self):
        assert {path.name for path in FILES} == {
            "Dockerfile",
            "prometheus.yml",
            "prometheus_alerts.yml",
            "ray_up.yaml",
            "rayjob.yaml",
            "slurm.sh",
        }

    @pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
    def test_holds_no_secret(self, path):
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{12,}|[A-Za-z0-9]{32,}|BEGIN [A-Z ]*PRIVATE KEY", text)
        assert not re.search(r"(?i)(secret|password|token)[a-z_]*\s*[:=]\s*[\"'][^$\"'{]{6,}", text)

    @pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
    def test_commands_parse(self, path):
        for line in commands(path.read_text()):
            # A shell fills these in; what matters is that the options exist.
            filled = re.sub(r"\$\(\(.*?\)\)+", "8", line).replace('"$@"', "").replace("&", "").split(" See ")[0]
            words = [word.rstrip(".") for word in shlex.split(filled, comments=True)]
            function, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
            assert callable(function)
            assert bound.args or bound.kwargs

    def test_commands_are_found(self):
        assert {path.name: len(commands(path.read_text())) for path in FILES if commands(path.read_text())} == {
            "ray_up.yaml": 1,
            "rayjob.yaml": 1,
            "slurm.sh": 2,
        }

    def test_ray_is_the_one_that_is_tested(self):
        locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE).group(1)
        assert RAY_JOB["spec"]["rayClusterSpec"]["rayVersion"] == locked
        assert f"FROM rayproject/ray:{locked}-" in (FOLDER / "Dockerfile").read_text()

    def test_copied_folders_are_the_packages(self):
        copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
        names = {name for line in copied for name in line.split()}
        assert {"interventions", "cluster", "pipeline", "requirements.lock", "pyproject.toml"} <= names
        assert all((ROOT / name).exists() for name in names)


class TestRayJob:
    def test_keys_exist(self):
        assert faults(RAY_JOB, SCHEMA) == []
        assert (RAY_JOB["apiVersion"], RAY_JOB["kind"]) == ("ray.io/v1", "RayJob")

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({"entrypont": "x"}, "unknown key"),
            ({"backoffLimit": "2"}, "is no int"),
            ({"rayClusterSpec": {"authOption": {}}}, "rayClusterSpec.authOption: unknown key"),
            ({"rayClusterSpec": {"workerGroupSpecs": {}}}, "is no list"),
            ({"rayClusterSpec": {"headGroupSpec": {"rayStartParams": {"num-cpus": 0}}}}, "0 is no str"),
        ],
        ids=["key", "type", "deep-key", "list", "start-parameter-without-quotes"],
    )
    def test_lint_sees_faults(self, change, fault):
        assert fault in faults({**RAY_JOB, "spec": {**RAY_JOB["spec"], **change}}, SCHEMA)[0]

    def test_token_is_on_and_the_head_runs_no_replica(self):
        spec = RAY_JOB["spec"]["rayClusterSpec"]
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com/gpu" not in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]

    def test_workers_come_and_go_and_the_cluster_ends(self):
        spec = RAY_JOB["spec"]["rayClusterSpec"]
        (workers,) = spec["workerGroupSpecs"]
        assert spec["enableInTreeAutoscaling"]
        assert RAY_JOB["spec"]["shutdownAfterJobFinishes"]
        run = sweep_of_the_job().run
        assert workers["minReplicas"] == 0
        assert workers["maxReplicas"] >= run.replicas
        (container,) = workers["template"]["spec"]["containers"]
        assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= run.gpus_per_replica
        assert int(container["resources"]["limits"]["cpu"]) >= run.cpus_per_replica

    def test_secrets_come_from_secrets(self):
        for pod in containers(RAY_JOB):
            for entry in pod["containers"][0]["env"]:
                if re.search("KEY|SECRET|TOKEN|PASSWORD", entry["name"]):
                    assert entry.keys() == {"name", "valueFrom"}
                    assert entry["valueFrom"].keys() == {"secretKeyRef"}

    def test_there_is_time_to_drain(self):
        run = sweep_of_the_job().run
        stop_wait = int(yaml.safe_load(RAY_JOB["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
        head, workers = containers(RAY_JOB)
        assert stop_wait >= run.drain_s + 60
        assert head["terminationGracePeriodSeconds"] > self.waits(head) > stop_wait
        assert workers["terminationGracePeriodSeconds"] > self.waits(workers) > run.drain_s

    @staticmethod
    def waits(pod) -> int:
        return int(
            re.search(r"seq (\d+)", pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]).group(1)
        )

    def test_hooks_are_shell_and_know_the_names_of_processes(self):
        head, workers = (pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] for pod in containers(RAY_JOB))
        for *shell, script in (head, workers):
            assert shell == ["/bin/sh", "-c"]
            subprocess.run(["sh", "-n", "-c", script], check=True)
        assert "ray::_Replica" in workers[-1].replace("[r]", "r")
        assert "class _Replica" in (ROOT / "cluster" / "ray_pool.py").read_text(), "Ray names a process after its class"

    def test_a_node_that_goes_leaves_the_notice_that_the_sweep_looks_for(self):
        touched = re.search(
            r"touch (\S+);", containers(RAY_JOB)[1]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        )
        assert sweep_of_the_job().run.notices == (f"file:{touched.group(1)}",)

    def test_the_sweep_is_where_the_entry_point_looks(self):
        head = containers(RAY_JOB)[0]
        (mount,) = head["containers"][0]["volumeMounts"]
        (volume,) = head["volumes"]
        assert mount["name"] == volume["name"]
        assert volume["configMap"]["name"] == CONFIG_MAP["metadata"]["name"]
        words = shlex.split(RAY_JOB["spec"]["entrypoint"])
        assert words[2] == f"{mount['mountPath']}/sweep.yaml"
        assert words[words.index("--store") + 1].startswith("s3://")


class TestRayUp:
    def test_ray_accepts_it(self):
        util = pytest.importorskip("ray.autoscaler._private.util")
        util.validate_config(util.prepare_config(RAY_UP))

    @pytest.mark.parametrize("change", [{"max_worker": 1}, {"head_node_type": "none"}], ids=["key", "head-type"])
    def test_ray_sees_faults(self, change):
        util = pytest.importorskip("ray.autoscaler._private.util")
        with pytest.raises(Exception, match=r"max_worker|head_node_type"):
            util.validate_config(util.prepare_config({**RAY_UP, **change}))

    @pytest.mark.parametrize("kind", ["head_start_ray_commands", "worker_start_ray_commands"])
    def test_every_node_starts_in_token_mode(self, kind):
        (token,) = RAY_UP["file_mounts"]
        start = RAY_UP[kind][-1]
        assert f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token};" in start
        assert start.index("RAY_AUTH_MODE") < start.index("ray start")

    def test_the_dashboard_is_for_this_host_alone_and_the_head_runs_no_replica(self):
        head = RAY_UP["head_start_ray_commands"][-1]
        assert "--dashboard-host=127.0.0.1" in head
        assert "--num-cpus=0" in head
        assert RAY_UP["available_node_types"]["head"]["resources"] == {"CPU": 0}

    def test_workers_are_spot_gpus_from_none_to_some(self):
        workers = RAY_UP["available_node_types"]["gpu_spot"]
        assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert workers["resources"]["GPU"] >= 1
        assert workers["min_workers"] == 0 < workers["max_workers"] <= RAY_UP["max_workers"]
