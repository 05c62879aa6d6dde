"""Reduce CustomResourceDefinitions to what validating needs: `reduce.py FOLDER_OF_CRDS` writes beside itself.

Descriptions go, being most of the bytes, and so does what no manifest here uses. Every object whose
properties are known takes no others: the API server would drop those in silence.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

FRAMEWORKS = (
    "huggingface", "lightgbm", "onnx", "paddle", "pmml", "pytorch", "sklearn", "tensorflow", "triton",
    "xgboost",
)  # fmt: skip
LEFT_OUT: dict[str, list[tuple[str, ...]]] = {
    "ClusterServingRuntime": [("spec", "workerSpec")],
    "InferenceService": [
        ("spec", "canary"),
        ("spec", "explainer"),
        ("spec", "transformer"),
        *(("spec", "predictor", part) for part in ("workerSpec", *FRAMEWORKS)),
    ],
}
"""The paths in a kind that validation does not need."""


def strict(schema: Any) -> Any:
    """The schema without descriptions, closed to unknown properties."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(inner) for name, inner in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if key != "description" and not key.startswith("x-")
    }
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    pattern = made.get("pattern")
    if isinstance(pattern, str):
        # Go accepts flags anywhere, Python at the start only.
        made["pattern"] = pattern.replace("^(?i)", "(?i)^")
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def reduced(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a kind without its status and the paths in `LEFT_OUT`."""
    for *parents, part in (("status",), *LEFT_OUT.get(kind, ())):
        inner = schema
        for parent in parents:
            inner = inner["properties"][parent]
        inner["properties"].pop(part, None)
    made: dict[str, Any] = strict(schema)
    # The API server defines the metadata; a CustomResourceDefinition leaves it open.
    made["properties"]["metadata"] = {"type": "object"}
    return made


def main(folder: Path) -> None:
    for file in sorted(folder.glob("*.yaml")):
        for definition in yaml.safe_load_all(file.read_text()):
            if not definition or definition.get("kind") != "CustomResourceDefinition":
                continue
            spec = definition["spec"]
            kind = spec["names"]["kind"]
            for version in spec["versions"]:
                schema = reduced(kind, version["schema"]["openAPIV3Schema"])
                name = f"{spec['group']}_{version['name']}_{kind}.json"
                Path(__file__).with_name(name).write_text(json.dumps(schema, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
