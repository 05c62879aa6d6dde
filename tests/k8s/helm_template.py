"""Renders a chart as `helm template` does, with Helm's own engine.

    helm_template.py CHART RELEASE NAMESPACE <VALUES

A program of its own, because the library brings the runtime of Go into its process.
"""

from __future__ import annotations

import json
import sys

from helm_python.chart import Chart
from helm_python.errors import HelmError

chart, release, namespace = sys.argv[1:]
values = json.load(sys.stdin)
try:
    loaded = Chart.load(chart)
    loaded.validate_schema(values)
    rendered = loaded.render(values, name=release, namespace=namespace)
except HelmError as error:
    sys.exit(str(error))
print("\n---\n".join(text for name, text in rendered.items() if name.endswith(".yaml")))
