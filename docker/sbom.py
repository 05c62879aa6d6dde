"""Join CycloneDX files into the list of an image's packages: `sbom.py VERSION TARGET FILE...`.

A file lists the Debian packages, or the Python packages of a layer. The interpreter, which belongs to
neither in the official Python images, is added. The result goes to standard output. The result has no time
and no serial number, so equal images have equal lists.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any, Final

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

IMAGE: Final = "image"


def join(version: str, target: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one list of the components of `files`, as those of the image."""
    python = platform.python_version()
    interpreter = {
        "type": "platform",
        "bom-ref": "python",
        "name": "python",
        "version": python,
        "purl": f"pkg:generic/python@{python}",
        "cpe": f"cpe:2.3:a:python:python:{python}:*:*:*:*:*:*:*",
    }
    components = [interpreter, *(part for file in files for part in file["components"])]
    tools = [tool for file in files for tool in file["metadata"]["tools"]["components"]]
    return {
        "$schema": files[0]["$schema"],
        "bomFormat": "CycloneDX",
        "specVersion": files[0]["specVersion"],
        "version": 1,
        "metadata": {
            # Two layers are listed by the same tool.
            "tools": {"components": list({tool["name"]: tool for tool in tools}.values())},
            "component": {
                "type": "container",
                "bom-ref": IMAGE,
                "name": "inferpool",
                "version": f"{version}-{target}",
            },
        },
        "components": components,
        "dependencies": [
            {"ref": IMAGE, "dependsOn": [component["bom-ref"] for component in components]},
            *_dependencies(files),
        ],
    }


def _dependencies(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dependencies of the components of each file, without its root, which is no part of the image."""
    known = {component["bom-ref"] for file in files for component in file["components"]}
    return [line for file in files for line in file["dependencies"] if line["ref"] in known]


def main(version: str, target: str, *names: str) -> None:
    """Write the list; exit with 1 if the schema of CycloneDX rejects the list."""
    joined = json.dumps(
        join(version, target, [json.loads(Path(name).read_text()) for name in names]), indent=1
    )
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(joined)
    if error is not None:
        sys.exit(str(error))
    sys.stdout.write(joined)


if __name__ == "__main__":
    main(*sys.argv[1:])
