"""Panels for Grafana of what workers tell Ray's metrics.

    python -m growmoe.distributed.dashboard > growmoe.json

Import the file in the Grafana that Ray's dashboard is set up with. Ray exports the metrics, with
the prefix ray_, for Prometheus to collect; the names are those of `growmoe.distributed.actors`.
"""

from __future__ import annotations

import json
from typing import Any

PANELS = (
    ("Load per worker", "ray_growmoe_load", "{{rank}}", "percentunit"),
    ("Busiest worker over the mean", "ray_growmoe_imbalance", "imbalance", "none"),
    ("Workers", "ray_growmoe_workers", "workers", "none"),
    ("Steps a second", "rate(ray_growmoe_step[1m])", "steps", "none"),
    ("Experts per layer", "ray_growmoe_experts", "{{layer}}", "none"),
    (
        "Bytes sent, by purpose",
        "sum by (purpose) (rate(ray_growmoe_bytes_sent_total[1m]))",
        "{{purpose}}",
        "Bps",
    ),
    ("Births", "sum(ray_growmoe_births_total)", "births", "none"),
    ("Deaths", "sum(ray_growmoe_deaths_total)", "deaths", "none"),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = [
        {
            "id": i + 1,
            "title": title,
            "type": "timeseries",
            "datasource": source,
            "gridPos": {"x": 12 * (i % 2), "y": 8 * (i // 2), "w": 12, "h": 8},
            "targets": [{"expr": expression, "legendFormat": legend, "refId": "A"}],
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        }
        for i, (title, expression, legend, unit) in enumerate(PANELS)
    ]
    return {
        "uid": "growmoe",
        "title": "growmoe",
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
