"""Makes tests/data/kubernetes.json.gz, the schemas of the kinds in k8s/, of the CRDs of KubeRay and of Kubernetes' own.

    python tests/kubernetes_schemas.py CRDS STRICT

CRDS: KubeRay's ray-operator/config/crd/bases (v1.7). STRICT: kubernetes_validate/kubernetes-json-schema/
v1.37.0-local-strict of the package kubernetes-validate 1.37.0. That has 111 MB of schemas, and five are used, so it
is no dependency. Descriptions are left out, references are filled in, and unknown keys are refused everywhere.
KubeRay's rules in CEL are not evaluated by anything here.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).parent / "data" / "kubernetes.json.gz"
CRDS = {"RayService": "ray.io_rayservices.yaml", "RayJob": "ray.io_rayjobs.yaml"}
OWN = {
    "ConfigMap": "configmap-v1.json",
    "NetworkPolicy": "networkpolicy-networking-v1.json",
    "PersistentVolumeClaim": "persistentvolumeclaim-v1.json",
    "Pod": "pod-v1.json",
    "PodDisruptionBudget": "poddisruptionbudget-policy-v1.json",
}


def bare(schema: Any) -> Any:
    """A schema without descriptions."""
    if isinstance(schema, dict):
        return {key: bare(value) for key, value in schema.items() if key != "description" or isinstance(value, dict)}
    return [bare(value) for value in schema] if isinstance(schema, list) else schema


def closed(schema: Any) -> Any:
    """A CRD's schema that refuses unknown keys, as the API server does with strict field validation."""
    if isinstance(schema, list):
        return [closed(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    return inner


def filled(schema: Any, definitions: dict[str, Any]) -> Any:
    """One of Kubernetes' schemas with its references filled in."""
    if isinstance(schema, dict) and "$ref" in schema:
        return filled(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if isinstance(schema, dict):
        return {key: filled(value, definitions) for key, value in schema.items()}
    return [filled(value, definitions) for value in schema] if isinstance(schema, list) else schema


def main(crds: Path, strict: Path) -> None:
    definitions = json.loads((strict / "_definitions.json").read_text())["$defs"]
    schemas = {}
    for kind, file in OWN.items():
        schemas[kind] = bare(filled(json.loads((strict / file).read_text()), definitions))
    for kind, file in CRDS.items():
        versions = yaml.safe_load((crds / file).read_text())["spec"]["versions"]
        (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
        schemas[kind] = closed(bare(schema))
        schemas[kind]["properties"]["metadata"] = schemas["ConfigMap"]["properties"]["metadata"]
    OUT.write_bytes(gzip.compress(json.dumps(schemas, sort_keys=True, separators=(",", ":")).encode(), 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
