"""Check what Docker and Kubernetes are given, without either: `make check-deploy`, with the tools in requirements/tools.txt.

hadolint checks the Dockerfile, the Compose schema compose.yaml, and Kubernetes' own schemas the manifests. Of KubeRay's kinds,
which these do not know, only the pods are checked.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

DOCKER = Path(__file__).resolve().parent
TOOLS = Path(sys.executable).parent


def main() -> None:
    """Run every check, and stop at the first that fails."""
    subprocess.run([TOOLS / "hadolint", "--no-color", DOCKER / "Dockerfile"], check=True)
    schema = ["--builtin-schema", "vendor.compose-spec"]
    subprocess.run([TOOLS / "check-jsonschema", "--quiet", *schema, DOCKER / "compose.yaml"], check=True)
    version = kubernetes_validate.latest_version()
    num_objects = 0
    for name, found in manifests():
        try:
            kubernetes_validate.validate(found, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            sys.exit(f"{name}: {found['kind']}: {'.'.join(map(str, error.path))}: {error.message}")
        num_objects += 1
    print(f"Dockerfile, compose.yaml and {num_objects} objects for Kubernetes {version}: nothing to complain about")


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects in kubernetes/ that Kubernetes itself knows, and the pods in the others."""
    for path in sorted((DOCKER / "kubernetes").glob("*.yaml")):
        for found in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if found["apiVersion"].startswith("ray.io/"):
                yield from ((path.name, pod_template(group)) for group in ray_groups(found["spec"]))
            else:
                yield path.name, found
    template = json.loads((DOCKER / "kubernetes" / "job-template.json").read_text(encoding="utf-8"))
    job = template["job_configuration"]["job_manifest"]
    pod = job["spec"]["template"]["spec"]
    for key in ("parallelism", "completions"):
        del pod[key]  # Prefect refuses a template without them, and Kubernetes ignores them here
    container = pod["containers"][0]
    container |= {"image": "image", "env": [], "args": ["flow"]}  # what Prefect puts in
    job["metadata"] = {"generateName": "run-"}
    yield "job-template.json", job


def ray_groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the head and the groups of workers of a RayCluster, or of a RayJob's."""
    cluster = spec.get("rayClusterSpec", spec)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pod_template(group: dict[str, Any]) -> dict[str, Any]:
    """Return the pods of a group as an object of their own."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "ray"}, "template": group["template"]}


if __name__ == "__main__":
    main()
