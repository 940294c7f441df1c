"""The report as one HTML page that needs nothing else."""

# ruff: noqa: E501

from __future__ import annotations

from typing import Any

from jinja2 import Environment

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --gone: #c44; --kept: #47a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
code { background: var(--soft); padding: .1rem .3rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; margin-bottom: -.5rem; }
td { white-space: nowrap; } td.text { white-space: normal; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.gone { fill: var(--gone); } .kept { fill: var(--kept); }
text { font: 11px system-ui, sans-serif; fill: currentColor; }
details { margin: .5rem 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ r.experts_before }} experts → {{ r.experts_after }}, {{ "{:,}".format(r.parameters_before) }}
parameters → {{ "{:,}".format(r.parameters_after) }};
{{ "%.0f"|format(r.seconds) }} s, at most {{ "{:,.0f}".format(r.peak_memory_bytes / 1048576) }} MiB
of memory.</p>
{% if r.model.command %}<p><code>{{ r.model.command }}</code></p>{% endif %}
{% macro losses(found, first, second) %}
<div class="wide" tabindex="0" role="region" aria-label="{{ first }} and {{ second }} of each domain">
<table>
<tr><th>domain</th><th>{{ first }}</th><th>{{ second }}</th><th>change</th><th>95% interval</th>
<th>samples</th></tr>
{% for name, c in found.items() %}
<tr><td>{{ name }}</td><td>{{ "%.4f"|format(c.before) }}</td><td>{{ "%.4f"|format(c.after) }}</td>
<td>{{ "%+.4f"|format(c.change) }}</td>
<td>{% if c.low is not none %}[{{ "%+.4f"|format(c.low) }}, {{ "%+.4f"|format(c.high) }}]{% else %}–{% endif %}</td>
<td>{{ c.samples }}</td></tr>
{% endfor %}
</table>
</div>
{% endmacro %}
<h2>Loss before and after</h2>
<p>Nats per token on the same sequences, with the 95% confidence interval of the paired change over
sequences. “(calibration)” is what statistics and fit were made from.</p>
{{ losses(r.domains, "before", "after") }}
{% if r.recovery %}
<h2>After recovery</h2>
<p>{% if r.recovery.router_steps %}{{ r.recovery.router_steps }} steps of the routers alone, then {% endif %}
{{ r.recovery.steps }} steps of all parameters, in {{ "%.0f"|format(r.recovery.seconds) }} s.</p>
{% for label, found in r.recovery.tables.items() %}
<h3>Against {{ "the control: the whole model, trained as long" if "control" in label else "the whole model as it was" }}</h3>
{{ losses(found, "control" if "control" in label else "whole", "recovered") }}
{% endfor %}
{% endif %}
<h2>Layers</h2>
{% for layer in r.layers %}
<h3>{{ layer.name }}: {{ layer.experts_before }} → {{ layer.experts_after }}</h3>
{% if layer.gap %}<p>Distance of its output from the whole layer's:
{{ "%.1f"|format(100 * layer.gap[0]) }}% before the least-squares fit,
{{ "%.1f"|format(100 * layer.gap[1]) }}% after.</p>{% endif %}
{% if layer.spared %}<p>Super experts, not to be removed: {{ layer.spared|join(", ") }}.</p>{% endif %}
{% set bars = layer.saliency or layer.load %}
{% if bars %}
{% set most = [bars.values()|map("abs")|max, 1e-300]|max %}
{% set width = 960 / (bars|length) %}
<svg viewBox="0 0 960 130" role="img" aria-label="{{ 'saliency' if layer.saliency else 'load' }} of each expert">
{% for id, value in bars.items() %}
<rect x="{{ loop.index0 * width + 1 }}" width="{{ [width - 2, 1]|max }}"
 y="{{ 100 - 98 * (value|abs) / most }}" height="{{ 98 * (value|abs) / most + 1 }}"
 class="{{ 'gone' if id|string in went[layer.name] else 'kept' }}">
<title>expert {{ id }}: {{ "%.4g"|format(value) }}</title></rect>
{% if (bars|length) <= 64 %}<text x="{{ (loop.index0 + 0.5) * width }}" y="116" text-anchor="middle">{{ id }}</text>{% endif %}
{% endfor %}
</svg>
<p>{{ "Saliency" if layer.saliency else "Load" }} of each expert; red
{{ "joined another" if layer.merged else "went" }}.</p>
{% endif %}
{% if layer.merged %}<p>Merged:
{% for group in layer.merged %}{{ group|join(" + ") }}{{ "; " if not loop.last }}{% endfor %}.</p>{% endif %}
{% if layer.removed %}
<details open><summary>Why each went</summary>
<table><tr><th>expert</th><th>tokens</th><th class="text">reason</th></tr>
{% for id in layer.removed %}
<tr><td>{{ id }}</td><td>{{ "%.0f"|format(layer.load[id|string]) if id|string in layer.load else "–" }}</td>
<td class="text">{{ layer.reasons[id|string] or "–" }}</td></tr>
{% endfor %}
</table></details>
{% endif %}
{% endfor %}
<details><summary>Settings</summary>
<table>{% for name, value in r.settings.items() %}<tr><td>{{ name }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}</table></details>
</body>
</html>
"""


def page(report: dict[str, Any]) -> str:
    """The page of a report as `Report.to_json` gives it."""
    layers = [
        {
            **layer,
            **{
                key: {str(id): value for id, value in layer[key].items()}
                for key in ("reasons", "saliency", "load")
            },
        }
        for layer in report["layers"]
    ]
    went = {
        layer["name"]: {str(id) for id in layer["removed"]}
        | {str(id) for group in layer["merged"] for id in group[1:]}
        for layer in layers
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    did = "Pruned" if report["act"] == "prune" else "Merged"
    text: str = environment.from_string(_PAGE).render(
        title=f"{did} {report['model'].get('path', 'model')}",
        r={**report, "layers": layers},
        went=went,
    )
    return text
