"""Write the Grafana dashboard: `python -m docker.grafana_dashboard`. Queries name metrics through the objects of
`service/metrics.py`, so a metric that is renamed or removed cannot stay behind in a panel. A test compares the file
with what this writes and runs every query on a real Prometheus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from service.metrics import Metrics

PATH = Path(__file__).parent / "grafana/dashboards/roiserve.json"

_M = Metrics(CollectorRegistry())
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24  # the width of Grafana's grid
_HEIGHT = 8
# Probes and scrapes take a millisecond each and would drown what callers wait for.
_CALLS = 'route=~"/v1/.*"'
_FAILED = 'status=~"5.."'


@dataclass(frozen=True, slots=True)
class Query:
    """One line, or one group of lines, of a panel.

    Attributes:
        expression: PromQL; may use Grafana's variables `$instance`, `$model`, `$stage` and `$__rate_interval`.
        legend: the name of a line, with labels as `{{label}}`.
        needs_trouble: whether it has no data while all is well, such as a count of crashes.
    """

    expression: str
    legend: str = ""
    needs_trouble: bool = False

    @property
    def has_exemplars(self) -> bool:
        """Whether points in the panel may name the trace of a request: of latencies they do."""
        return "duration_seconds_bucket" in self.expression


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture of some queries.

    Attributes:
        unit: Grafana's name of the unit: `s`, `bytes`, `reqps`, `percentunit`, `short`.
        width: in columns of 24.
        options: what else Grafana's form of the panel holds, merged into it.
    """

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    is_stacked: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """A heading and the panels under it."""

    title: str
    panels: Sequence[Panel]


def _name(metric: MetricWrapperBase, suffix: str = "") -> str:
    """The name of a metric's series in PromQL."""
    [family] = metric.describe()
    return f"{family.name}_total" if family.type == "counter" else f"{family.name}{suffix}"


def _series(metric: MetricWrapperBase, *matchers: str, suffix: str = "") -> str:
    """A selector of a metric's series for the chosen instances and, where it has that label, models."""
    chosen = ['instance=~"$instance"', *matchers]
    if "model" in metric._labelnames:
        chosen.append('model=~"$model"')
    return f"{_name(metric, suffix)}{{{','.join(chosen)}}}"


def _rate(metric: MetricWrapperBase, *matchers: str, suffix: str = "") -> str:
    return f"rate({_series(metric, *matchers, suffix=suffix)}[$__rate_interval])"


def _sum(expression: str, *labels: str) -> str:
    return f"sum by ({', '.join(labels)}) ({expression})" if labels else f"sum({expression})"


def _quantile(quantile: float, metric: MetricWrapperBase, *matchers: str, by: Sequence[str] = ()) -> str:
    return f"histogram_quantile({quantile}, {_sum(_rate(metric, *matchers, suffix='_bucket'), 'le', *by)})"


def _mean(metric: MetricWrapperBase, *labels: str) -> str:
    return f"{_sum(_rate(metric, suffix='_sum'), *labels)} / {_sum(_rate(metric, suffix='_count'), *labels)}"


def _heatmap(title: str, description: str, metric: MetricWrapperBase, *matchers: str, unit: str) -> Panel:
    buckets = f"increase({_series(metric, *matchers, suffix='_bucket')}[$__rate_interval])"
    return Panel(
        title,
        description,
        [Query(_sum(buckets, "le"), "{{le}}")],
        kind="heatmap",
        options={
            "options": {
                "calculate": False,
                "yAxis": {"unit": unit},
                "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
                "cellGap": 1,
                "tooltip": {"mode": "single", "yHistogram": True},
            }
        },
    )


def rows() -> Sequence[Row]:
    """What the dashboard shows, from what callers notice down to what causes it."""
    return (
        Row(
            "Overview",
            [
                Panel(
                    "Ready instances",
                    "Instances that want requests: models loaded, a worker alive, not draining.",
                    [Query(f"sum({_series(_M.ready)})")],
                    kind="stat",
                    width=4,
                ),
                Panel(
                    "Requests",
                    "Answered calls of /v1 a second.",
                    [Query(_sum(_rate(_M.requests, _CALLS)))],
                    "reqps",
                    kind="stat",
                    width=5,
                ),
                Panel(
                    "Errors of the service",
                    "Calls of /v1 that were answered with 5xx, among all. Refusals (429) and the caller's own mistakes "
                    "(4xx) are not counted.",
                    [
                        Query(
                            f"({_sum(_rate(_M.requests, _CALLS, _FAILED))} or vector(0)) "
                            f"/ {_sum(_rate(_M.requests, _CALLS))}"
                        )
                    ],
                    "percentunit",
                    kind="stat",
                    width=5,
                ),
                Panel(
                    "p99 latency",
                    "From a request's headers to the end of its answer, 99 in 100 are faster.",
                    [Query(_quantile(0.99, _M.request_duration, _CALLS))],
                    "s",
                    kind="stat",
                    width=5,
                ),
                Panel(
                    "Images",
                    "Images answered with detections a second.",
                    [Query(_sum(_rate(_M.images, 'outcome="ok"')))],
                    "short",
                    kind="stat",
                    width=5,
                ),
            ],
        ),
        Row(
            "Traffic and errors",
            [
                Panel(
                    "Requests by route",
                    "Answered requests a second, probes and scrapes included.",
                    [Query(_sum(_rate(_M.requests), "route"), "{{route}}")],
                    "reqps",
                    is_stacked=True,
                ),
                Panel(
                    "Requests by status",
                    "Answered calls of /v1 a second.",
                    [Query(_sum(_rate(_M.requests, _CALLS), "status"), "{{status}}")],
                    "reqps",
                    is_stacked=True,
                ),
                Panel(
                    "Refused and cancelled",
                    "Requests refused before any work, by reason, and images whose callers went away, by stage.",
                    [
                        Query(_sum(_rate(_M.rejected), "reason"), "refused: {{reason}}", needs_trouble=True),
                        Query(_sum(_rate(_M.cancelled), "stage"), "cancelled in {{stage}}", needs_trouble=True),
                    ],
                    "reqps",
                ),
            ],
        ),
        Row(
            "Latency",
            [
                Panel(
                    "Latency of calls",
                    "Quantiles of the time from a request's headers to the end of its answer.",
                    [Query(_quantile(q, _M.request_duration, _CALLS), f"p{round(q * 100)}") for q in (0.5, 0.95, 0.99)],
                    "s",
                ),
                _heatmap(
                    "Latency, all calls",
                    "How many calls took how long.",
                    _M.request_duration,
                    _CALLS,
                    unit="s",
                ),
                Panel(
                    "p95 by stage",
                    "decode, queue and encode are those of an image, the others those of a whole batch.",
                    [Query(_quantile(0.95, _M.stage_duration, by=["stage"]), "{{stage}}")],
                    "s",
                ),
                Panel(
                    "Where the time goes",
                    "Seconds spent in each stage, a second. Above the number of its threads a stage is saturated.",
                    [Query(_sum(_rate(_M.stage_duration, suffix="_sum"), "stage"), "{{stage}}")],
                    "s",
                    is_stacked=True,
                    width=12,
                ),
                _heatmap(
                    "Stage: $stage",
                    "How long this stage took; choose it above.",
                    _M.stage_duration,
                    'stage="$stage"',
                    unit="s",
                ),
            ],
        ),
        Row(
            "Batches and queue",
            [
                Panel(
                    "Batch size",
                    "Images that shared a batch, on average.",
                    [Query(_mean(_M.batch_size, "model"), "{{model}}")],
                ),
                _heatmap("Batch sizes", "How often a batch had how many images.", _M.batch_size, unit="short"),
                Panel(
                    "Padding",
                    "Padded pixels among all pixels of a batch, on average.",
                    [Query(_mean(_M.batch_padding_ratio, "model"), "{{model}}")],
                    "percentunit",
                ),
                Panel(
                    "Images waiting",
                    "For the device, by model; at the limit, requests are refused.",
                    [
                        Query(_sum(_series(_M.queue_depth), "model"), "{{model}}"),
                        Query(f"sum({_series(_M.queue_limit_images)})", "limit"),
                    ],
                ),
                Panel(
                    "Pixels waiting",
                    "Resized and padded, by model; at the limit, requests are refused.",
                    [
                        Query(_sum(_series(_M.queue_pixels), "model"), "{{model}}"),
                        Query(f"sum({_series(_M.queue_limit_pixels)})", "limit"),
                    ],
                ),
                Panel(
                    "Time in the queue",
                    "Quantiles of the wait for the device.",
                    [
                        Query(_quantile(q, _M.stage_duration, 'stage="queue"'), f"p{round(q * 100)}")
                        for q in (0.5, 0.99)
                    ],
                    "s",
                ),
            ],
        ),
        Row(
            "Models",
            [
                Panel(
                    "Loaded",
                    "What is loaded, and what runs it.",
                    [Query(_series(_M.model_info))],
                    kind="table",
                    width=24,
                    options={
                        "transformations": [
                            {"id": "labelsToFields", "options": {"mode": "columns"}},
                            {"id": "merge", "options": {}},
                            {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}},
                        ]
                    },
                ),
                Panel(
                    "Images by outcome",
                    "ok, or the code of the error, a second.",
                    [Query(_sum(_rate(_M.images), "model", "outcome"), "{{model}}: {{outcome}}")],
                    width=12,
                ),
                Panel(
                    "Verification",
                    "Largest difference from eager in float32 when the model was loaded, as a share of what is "
                    "tolerated. Above 1, a slower engine took the place of the one that was wanted.",
                    [Query(_series(_M.model_verification), "{{model}} {{value}}", needs_trouble=True)],
                    width=6,
                ),
                Panel(
                    "Detections an image",
                    "On average. A jump after a new version, or a fall to zero, deserves a look.",
                    [Query(_mean(_M.detections, "model"), "{{model}}")],
                    width=6,
                ),
            ],
        ),
        Row(
            "Devices, workers, process",
            [
                Panel(
                    "Device memory",
                    "Allocated, reserved and total of a GPU; resident of the workers on a CPU.",
                    [Query(_sum(_series(_M.device_memory), "device", "kind"), "{{device}} {{kind}}")],
                    "bytes",
                ),
                Panel(
                    "Workers replaced",
                    "In the chosen time, by reason. Any is worth a look at the log.",
                    [
                        Query(
                            _sum(f"increase({_series(_M.worker_restarts)}[$__range])", "reason"),
                            "{{reason}}",
                            needs_trouble=True,
                        )
                    ],
                    kind="bargauge",
                ),
                Panel(
                    "Process that serves HTTP",
                    "Cores used and memory held; its workers are not included.",
                    [
                        Query('rate(process_cpu_seconds_total{instance=~"$instance"}[$__rate_interval])', "cores"),
                        Query('process_resident_memory_bytes{instance=~"$instance"}', "memory"),
                        Query('process_open_fds{instance=~"$instance"}', "descriptors"),
                    ],
                    options={
                        "fieldConfig": {
                            "defaults": {"unit": "short"},
                            "overrides": [
                                {
                                    "matcher": {"id": "byName", "options": "memory"},
                                    "properties": [
                                        {"id": "unit", "value": "bytes"},
                                        {"id": "custom.axisPlacement", "value": "right"},
                                    ],
                                }
                            ],
                        }
                    },
                ),
            ],
        ),
    )


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in rows():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
                "panels": [],
            }
        )
        top += 1
        left = 0
        height = 4 if all(panel.kind == "stat" for panel in row.panels) else _HEIGHT
        for panel in row.panels:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + height
            place = {"x": left, "y": top, "w": panel.width, "h": height}
            panels.append(_panel(panel, id=len(panels) + 1, place=place))
            left += panel.width
        top += height
    return {
        "uid": "roiserve",
        "title": "RoIServe",
        "description": "Detection over HTTP: what callers see, and what causes it.",
        "tags": ["roiserve"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def _panel(panel: Panel, *, id: int, place: dict[str, int]) -> dict[str, Any]:
    is_table, is_heatmap = panel.kind == "table", panel.kind == "heatmap"
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.is_stacked:
        custom |= {"stacking": {"mode": "normal"}, "fillOpacity": 40}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    return {
        "id": id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": defaults | ({"custom": custom} if panel.kind == "timeseries" else {}),
            "overrides": [],
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or "__auto",
                "format": "table" if is_table else "heatmap" if is_heatmap else "time_series",
                "instant": is_table,
                "range": not is_table,
                **({"exemplar": True} if query.has_exemplars else {}),
            }
            for index, query in enumerate(panel.queries)
        ],
        **panel.options,
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        _variable("instance", f"label_values({_name(_M.build_info)}, instance)"),
        _variable("model", f"label_values({_name(_M.model_info)}, model)"),
        _variable(
            "stage", f"label_values({_name(_M.stage_duration, '_count')}, stage)", has_all=False, value="backbone"
        ),
    ]


def _variable(name: str, query: str, *, has_all: bool = True, value: str = "") -> dict[str, Any]:
    every: dict[str, Any] = {"includeAll": True, "multi": True, "allValue": ".*"}
    current = {"text": "All", "value": "$__all"} if has_all else {"text": value, "value": value}
    return {
        "name": name,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # at each change of the time range
        "sort": 1,
        "current": current,
        **(every if has_all else {}),
    }


def main() -> None:
    """Write the file."""
    PATH.write_text(json.dumps(dashboard(), indent=2) + "\n")
    print(f"{PATH}: {sum(panel['type'] != 'row' for panel in dashboard()['panels'])} panels")


if __name__ == "__main__":
    main()
