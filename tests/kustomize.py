"""Renders k8s/ in Python: the part of kustomize that is used there. What it does not know it refuses.

tests/pure/test_kubernetes.py compares it with `kubectl kustomize` where kubectl is.
"""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "resources", "components", "patches", "images", "replacements", "configMapGenerator"}
Resource = dict[str, Any]


def render(folder: Path) -> list[Resource]:
    """The resources of a kustomization."""
    return _render(folder, [])


def _render(folder: Path, resources: list[Resource]) -> list[Resource]:
    """A component also gets the resources of the kustomization that names it."""
    plan = _read(folder / "kustomization.yaml")[0]
    assert set(plan) <= KNOWN, f"{folder}: {set(plan) - KNOWN}"
    for name in plan.get("resources", ()):
        path = folder / name
        resources = resources + (render(path) if path.is_dir() else _read(path))
    for name in plan.get("components", ()):
        resources = _render(folder / name, resources)
    resources = resources + [_config_map(folder, made) for made in plan.get("configMapGenerator", ())]
    for patch in plan.get("patches", ()):
        text = (folder / patch["path"]).read_text(encoding="utf-8") if "path" in patch else patch["patch"]
        resources = _patched(resources, yaml.safe_load(text), patch.get("target"))
    for image in plan.get("images", ()):
        _rename(resources, image)
    for replacement in plan.get("replacements", ()):
        _replace(resources, replacement)
    return resources


def _read(path: Path) -> list[Resource]:
    # By way of JSON, as what an alias names is a copy in kustomize, and the same object in PyYAML.
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def _config_map(folder: Path, made: dict[str, Any]) -> Resource:
    assert set(made) == {"name", "files", "options"} and made["options"].pop("disableNameSuffixHash"), made
    metadata = {"name": made["name"], **made["options"]}
    data = {name: (folder / name).read_text(encoding="utf-8") for name in made["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patched(resources: list[Resource], patch: Any, target: dict[str, str] | None) -> list[Resource]:
    if target is None:
        target = {"kind": patch["kind"], "name": patch["metadata"]["name"]}
    chosen = [resource for resource in resources if _is_meant(resource, target)]
    assert chosen, f"{target}: patches nothing"
    if isinstance(patch, dict) and patch.get("$patch") == "delete":
        return [resource for resource in resources if resource not in chosen]
    for resource in chosen:
        if isinstance(patch, list):
            for step in patch:
                _step(resource, step)
        else:
            _merge(resource, patch)
    return resources


def _is_meant(resource: Resource, target: dict[str, str]) -> bool:
    return resource["kind"] == target["kind"] and target.get("name") in (None, resource["metadata"]["name"])


def _step(resource: Any, step: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    *way, last = (key.replace("~1", "/").replace("~0", "~") for key in step["path"].split("/")[1:])
    for key in way:
        resource = resource[int(key)] if isinstance(resource, list) else resource[key]
    value = copy.deepcopy(step.get("value"))
    if isinstance(resource, list):
        assert step["op"] == "add" and last == "-", f"{step}: not known here"
        resource.append(value)
    elif step["op"] == "remove":
        del resource[last]
    else:
        assert step["op"] == "add" or last in resource, f"{step['path']}: there is nothing to replace"
        resource[last] = value


def _merge(resource: Any, patch: dict[str, Any]) -> None:
    """RFC 7386, which is what kustomize does with kinds whose schema it does not know."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(resource.get(key), dict):
            _merge(resource[key], value)
        else:
            resource[key] = value


def _rename(node: Any, image: dict[str, str]) -> None:
    """Images of all containers below."""
    if isinstance(node, list):
        for inner in node:
            _rename(inner, image)
    elif isinstance(node, dict):
        for container in [*node.get("containers", ()), *node.get("initContainers", ())]:
            if container["image"].partition(":")[0] == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
        for inner in node.values():
            _rename(inner, image)


def _replace(resources: list[Resource], replacement: dict[str, Any]) -> None:
    source = replacement["source"]
    (value,) = [resource for resource in resources if _is_meant(resource, source)]
    for key in source["fieldPath"].split("."):
        value = value[key]
    for target in replacement["targets"]:
        for resource in resources:
            if _is_meant(resource, target["select"]):
                for path in target["fieldPaths"]:
                    *way, last = path.split(".")
                    node = resource
                    for key in way:
                        node = node[key]
                    node[last] = copy.deepcopy(value)
