"""Makes the dashboards of `dashboards.yaml` as Grafana's JSON: native panels with units, legends
and colors that everyone can tell apart. `make dashboards` writes them and what else follows from
other files into `k8s/monitoring`.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import count, cycle
from pathlib import Path

import yaml

from cluster.metrics.metric_table import metrics
from cluster.monitoring.files import Json
from tests.dashboards import panels
from tests.dashboards.panels import Panel
from tests.metric_series import series_of
from tests.repository import REPOSITORY

FOLDER = REPOSITORY / "k8s" / "monitoring"

# Okabe and Ito's palette, without its black and with its yellow last, which is faint on white.
FEW = ["#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#F0E442"]
BLUE, ORANGE, _, SKY, VERMILION, PINK, YELLOW = FEW
# Paul Tol's muted scheme, for more than seven series.
MUTED = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77"]
MUTED += ["#CC6677", "#882255", "#AA4499", "#7F7F7F", "#DDDDDD"]

_EVENT_COLORS = {
    "kill": VERMILION,
    "rollback": PINK,
    "resize": ORANGE,
    "restart": YELLOW,
    "preemption": SKY,
}
_DATA_SOURCE = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
}
_PROMETHEUS = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24
_SIZE = {True: (4, 4), False: (8, 8)}  # width and height of a stat panel, and of others


def made() -> dict[str, str]:
    """Returns the content of each file that follows from others, by its path."""
    rules = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "raymill",
            "labels": {
                "app.kubernetes.io/part-of": "raymill",
                "app.kubernetes.io/component": "monitoring",
            },
        },
        "spec": yaml.safe_load((FOLDER / "prometheus/rules.yaml").read_text(encoding="utf-8")),
    }
    text = yaml.safe_dump(rules, sort_keys=False, width=120, allow_unicode=True)
    about = "# The alerts, for Prometheus' operator.\n# Made by `make dashboards`: change its source, not this file.\n"
    dashboards = {f"dashboards/{uid}.json": _text(body) for uid, body in documents().items()}
    return dashboards | {"operator/prometheus-rule.yaml": about + text}


def _text(dashboard: Json) -> str:
    """Returns the dashboard with one panel per line, so that changes are readable."""
    lines = ",\n".join(json.dumps(panel) for panel in dashboard["panels"])
    return (
        json.dumps(dashboard | {"panels": []}, indent=1).replace(
            '"panels": []', f'"panels": [\n{lines}\n]'
        )
        + "\n"
    )


def documents() -> dict[str, Json]:
    """Returns each dashboard's JSON by its uid."""
    declared = yaml.safe_load(
        Path(__file__).with_name("dashboards.yaml").read_text(encoding="utf-8")
    )
    return {dashboard["uid"]: _document(**dashboard) for dashboard in declared}


def _document(
    uid: str,
    title: str,
    rows: Json,
    variables: Sequence[Json] = (),
    annotations: Sequence[str] = (),
) -> Json:
    is_of_run = any(variable["name"] == "run" for variable in variables)
    return {
        "uid": uid,
        "title": title,
        "description": "Made by `raymill dashboards` from the metric table; changes made here are overwritten.",
        "tags": ["raymill"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": [_DATA_SOURCE, *(_variable(**variable) for variable in variables)]},
        "annotations": {"list": [_annotations(kind, is_of_run) for kind in annotations]},
        "panels": list(_panels(rows)),
    }


def _variable(name: str, metric: str, is_multi: bool = False) -> Json:
    """Returns a choice above the panels among the values of a label."""
    several: Json = {
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _PROMETHEUS,
        "query": {
            "query": f"label_values({series_of(metrics()[metric])[0]}, {name})",
            "refId": name,
        },
        "refresh": 2,
        "sort": 2,
        **(several if is_multi else {}),
    }


def _annotations(kind: str, is_of_run: bool) -> Json:
    return {
        "name": kind.capitalize(),
        "enable": True,
        "iconColor": _EVENT_COLORS.get(kind, BLUE),
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "target": {
            "type": "tags",
            "tags": ["raymill", kind, *(["run:$run"] if is_of_run and kind != "promotion" else [])],
            "matchAny": False,
            "limit": 100,
        },
    }


def _panels(rows: dict[str, list[Json]]) -> Iterator[Json]:
    """Places panels row by row, from left to right."""
    numbers, y = count(1), 0
    for title, declared in rows.items():
        place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        yield {
            "id": next(numbers),
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": place,
        }
        y, x, tallest = y + 1, 0, 0
        for panel in map(panels.read, declared):
            width, height = _SIZE[panel.is_stat]
            if x + width > _WIDTH:
                x, y, tallest = 0, y + tallest, 0
            yield {
                "id": next(numbers),
                "gridPos": {"x": x, "y": y, "w": width, "h": height},
                **_panel(panel),
            }
            x, tallest = x + width, max(tallest, height)
        y += tallest


def _panel(panel: Panel) -> Json:
    return {
        "type": "stat" if panel.is_stat else "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": _PROMETHEUS,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _PROMETHEUS,
                "expr": expr,
                "legendFormat": legend,
                "range": not panel.is_stat,
                "instant": panel.is_stat,
            }
            for number, (legend, expr) in enumerate(panel.queries.items())
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": list(_colors(panel))},
        "options": _STAT_OPTIONS if panel.is_stat else _LINE_OPTIONS,
    }


_STAT_OPTIONS: Json = {
    "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    "colorMode": "value",
    "graphMode": "none",
    "textMode": "value",
}
_LINE_OPTIONS: Json = {
    "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
    "tooltip": {"mode": "multi", "sort": "desc"},
}


def _defaults(panel: Panel) -> Json:
    defaults: Json = {"unit": panel.unit, "color": {"mode": "fixed", "fixedColor": BLUE}}
    if panel.top is not None:
        defaults |= {"min": 0, "max": panel.top}
    if panel.thresholds:
        steps = zip((None, *panel.thresholds), (BLUE, ORANGE, VERMILION), strict=True)
        colors = [{"value": value, "color": color} for value, color in steps]
        defaults["thresholds"] = {"mode": "absolute", "steps": colors}
    if panel.is_stat:
        return defaults | ({"color": {"mode": "thresholds"}} if panel.thresholds else {})
    if not panel.names and len(panel.queries) == 1:  # for any number of series
        defaults["color"] = {"mode": "shades", "fixedColor": BLUE}
    defaults["custom"] = {
        "drawStyle": "line",
        "lineWidth": 1 if panel.is_stacked else 2,
        "fillOpacity": 60 if panel.is_stacked else 0,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
    }
    return defaults


def _colors(panel: Panel) -> Iterator[Json]:
    """Gives each known series a color, or else each of several queries."""
    queries = [chr(ord("A") + number) for number in range(len(panel.queries))]
    matcher, options = (
        ("byName", panel.names) if panel.names else ("byFrameRefID", queries if queries[1:] else ())
    )
    palette = FEW if len(options) <= len(FEW) else MUTED
    for option, color in zip(options, cycle(palette), strict=False):
        value = {"mode": "fixed", "fixedColor": color}
        yield {
            "matcher": {"id": matcher, "options": option},
            "properties": [{"id": "color", "value": value}],
        }


if __name__ == "__main__":
    for name, content in made().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
