"""Reports as one HTML file: figures are inline SVG, nothing is loaded from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from penstock.bench.goodput import Attempt, End
from penstock.bench.result import LABELS, Result, machine, seconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GOOD, BAD, INK = "#2a7f62", "#c8553d", "#33415c"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
.notes { color: #666; }
@media (prefers-color-scheme: dark) {
  body { background: #16181d; color: #ddd; } td, th { border-color: #333; }
  figure { background: #fff; border-radius: 6px; } }
figure { margin: 1rem 0; padding: .5rem; }
</style></head><body>
<h1>{{ title }}</h1>
{% for text in lead %}<p>{{ text }}</p>{% endfor %}
{% for head, rows in tables %}
<table>{% if head %}<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>
{% endfor %}
{% for figure in figures %}<figure>{{ figure | safe }}</figure>{% endfor %}
<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
</body></html>
"""


def page(
    title: str,
    *,
    lead: Sequence[str] = (),
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = (),
    figures: Sequence[Figure] = (),
    notes: Sequence[str] = (),
) -> str:
    """A self-contained page; everything but the figures is escaped."""
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    drawn = [svg(figure) for figure in figures]
    return template.render(title=title, lead=lead, tables=tables, figures=drawn, notes=notes)


def svg(figure: Figure) -> str:
    """A figure as inline SVG."""
    target = io.StringIO()
    figure.savefig(target, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]


def write(result: Result, path: Path) -> None:
    """The report of one measurement."""
    summary = result.summary
    latencies = [
        (name, *(seconds(row[p]) for p in ("mean", "p50", "p90", "p99")))
        for name, row in summary.percentiles.items()
    ]
    classes = [
        (name, str(part.attempts), share(part.attainment), f"{part.goodput_output_tps:.1f}")
        for name, part in summary.classes.items()
    ]
    server = result.server
    facts = [
        ("goodput (output tokens of requests that met their SLO)",
         f"{summary.goodput_output_tps:.1f} tok/s"),
        ("goodput with prompt tokens (as the Past-Future paper counts)",
         f"{summary.goodput_total_tps:.1f} tok/s"),
        ("throughput (output)", f"{summary.throughput_output_tps:.1f} tok/s"),
        ("attainment", share(summary.attainment)),
        ("evictions", "-" if server.evictions is None else str(server.evictions)),
        ("KV memory used (mean)", share(server.kv_use_mean)),
        *((f"attempts {end}", str(count)) for end, count in summary.ends.items()),
        *((f"error: {text}", str(count)) for text, count in summary.errors.items()),
        *((str(key), str(value)) for key, value in result.settings.items()),
        *((key, str(value)) for key, value in machine().items()),
    ]  # fmt: skip
    text = page(
        f"penstock bench: {result.source}",
        lead=[LABELS[result.lengths].capitalize() + "."],
        tables=[
            ((), facts),
            (("latency", "mean", "p50", "p90", "p99"), latencies),
            (("class", "attempts", "attainment", "goodput tok/s"), classes),
        ],
        figures=[figure_of(result)],
        notes=result.notes,
    )
    path.write_text(text, encoding="utf-8")


def figure_of(result: Result) -> Figure:
    """TTFT and gap distributions, output over time, KV memory over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (left, right), (low, last) = figure.subplots(2, 2)
    done = [a for a in result.attempts if a.end is End.COMPLETED]
    for axes, name, title in ((left, "ttft", "time to first token"), (right, "gap", "largest gap")):
        values = sorted(v for a in done if (v := getattr(a.latency, name)) is not None)
        _cumulative(axes, values, title)
        for slo_class in result.classes:
            if (bound := getattr(slo_class.slo, name)) is not None:
                axes.axvline(
                    bound, color=BAD, linestyle="--", label=f"{slo_class.name}: {bound:g} s"
                )
                axes.legend(frameon=False)
    _output(low, result.attempts, result.start)
    last.set_title("KV memory in use")
    if result.server.kv_series:
        last.plot(*zip(*result.server.kv_series, strict=True), color=INK)
    last.set(ylim=(0, 1.05), xlabel="seconds", ylabel="share")
    return figure


def _cumulative(axes: Axes, values: Sequence[float], title: str) -> None:
    axes.set_title(title)
    if values:
        axes.step(values, [(i + 1) / len(values) for i in range(len(values))], color=INK)
    axes.set(xlabel="seconds", ylabel="share of completed attempts", ylim=(0, 1.02))
    axes.set_xlim(left=0)


def _output(axes: Axes, attempts: Sequence[Attempt], start: float) -> None:
    """Output tokens per second by when the attempt ended, met and not met."""
    axes.set_title("output of attempts, by when they ended")
    ended = [a for a in attempts if a.end is not End.CUT]
    axes.set(xlabel="seconds", ylabel="tok/s")
    if not ended:
        return
    span = max(a.ended for a in ended) - start
    width = max(span / 40, 1e-3)
    edges = [i * width for i in range(int(span / width) + 2)]
    good, bad = [0.0] * (len(edges) - 1), [0.0] * (len(edges) - 1)
    for a in ended:
        (good if a.met else bad)[int((a.ended - start) / width)] += a.output_tokens / width
    axes.bar(edges[:-1], good, width, align="edge", color=GOOD, label="SLO met")
    axes.bar(edges[:-1], bad, width, bottom=good, align="edge", color=BAD, label="missed")
    axes.legend(frameon=False)
