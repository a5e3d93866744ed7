"""The results of a sweep: `best.toml`, `trials.csv`, `index.html`, and a line that says what to try next."""

import base64
import csv
import html
import io
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ifvit.config import Config, keys_with
from ifvit.fields import OWN
from ifvit.files import write_whole
from tune.record import Record, order
from tune.space import Choice, Range, Space

EDGE = 0.05  # share of a range; a best value nearer to the end suggests that better ones lie beyond


def best_toml(configs: dict[str, Config], searched: dict[str, set[str]], header: list[str]) -> str:
    """The text of a TOML file that every training command takes. It marks the settings that were searched.

    `configs`: table -> configuration.
    """
    out = [f"# {line}" for line in header]
    for table, config in configs.items():
        out += ["", f"[{table}]"]
        for key, value in config.to_dict().items():
            if key not in keys_with(OWN):
                out.append(f"{key} = {json.dumps(value)}" + ("  # searched" if key in searched.get(table, ()) else ""))
    return "\n".join(out) + "\n"


def write_csv(file: Path, records: list[Record], space: Space, metric: str) -> None:
    """Writes a row for each trial: its end, epochs, steps, seconds, the metric, the searched values."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["trial", "ended", "epochs", "steps", "seconds", metric, *space, "reason"])
    for r in records:
        end = r.end or {}
        rows.writerow(
            [
                r.number,
                end.get("how", "interrupted"),
                r.epochs,
                r.steps,
                f"{end.get('seconds', 0):.1f}",
                r.last(metric),
                *(json.dumps(r.values[k]) if k in r.values else "" for k in space),
                end.get("reason", ""),
            ]
        )
    write_whole(file, text.getvalue())


def importance(
    records: list[Record], space: Space, base: Config, metric: str, higher_is_better: bool
) -> dict[str, float]:
    """For each setting the share of the variance of the trials' ranks that it explains, most important first.

    It is ε² of a one-way analysis of variance on ranks (Kelley 1935), which is 0 on average where chance alone decides.
    Ranges are cut into thirds. A setting gets 0 where fewer than six trials have it.
    """
    ranked = order(records, metric, higher_is_better)
    found = {}
    for key, p in space.items():
        having = [
            (r.values.get(key, base[key]), rank)
            for rank, r in enumerate(ranked)
            if not p.when or key in r.values or not r.values
        ]
        values = [v for v, _ in having]
        if isinstance(p, Range):
            cuts = np.quantile(values, [1 / 3, 2 / 3]) if values else []
            groups = np.digitize(values, cuts)
        else:
            groups = np.array([_place(p, v) for v in values])
        y = np.array([rank for _, rank in having], float)
        kinds = [y[groups == g] for g in np.unique(groups)]
        n, k = len(y), len(kinds)
        found[key] = 0.0
        if n >= 6 and 1 < k < n:
            within = sum(((g - g.mean()) ** 2).sum() for g in kinds) / (n - k)
            total = y.var(ddof=1)
            found[key] = float(max(0.0, 1 - within / total)) if total else 0.0
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _place(choice: Choice, value) -> int:
    """The place of a value among the choices; -1 where it is not there. A list of a file equals a tuple."""
    plain = [tuple(v) if isinstance(v, list) else v for v in (*choice.values, value)]
    return plain.index(plain[-1]) if plain[-1] in plain[:-1] else -1


def what_next(best: Record, space: Space, base: Config) -> str:
    """One line that names the ranges whose best value lies at an edge, or says that there are none."""
    edges = []
    for key, p in space.items():
        value = best.values.get(key, base[key])
        if isinstance(p, Range) and (key in best.values or not p.when) and p.low < p.high:
            share = p.share(min(max(value, p.low), p.high))
            limits = next(f.metadata for f in fields(base) if f.name == key)
            if (share < EDGE and p.low > limits["lo"]) or (share > 1 - EDGE and p.high < limits["hi"]):
                edges.append(
                    f"{key} (best {value:.4g}) at the {'lower' if share < EDGE else 'upper'} edge of "
                    f"{p.low:.4g} … {p.high:.4g}"
                )
    if edges:
        return "Next: go beyond " + "; ".join(edges) + " with --space FILE."
    return "Next: no best value lies at the edge of its range; more trials, or a narrower space around them."


def page(
    file: Path,
    title: str,
    summary: list[str],
    records: list[Record],
    space: Space,
    base: Config,
    metric: str,
    higher_is_better: bool,
) -> None:
    """Writes one HTML file with pictures: curves of all trials, importance, settings against the metric, a table."""
    weights = importance(records, space, base, metric, higher_is_better)
    ranked = order(records, metric, higher_is_better)
    pictures = [
        _svg(_curves(ranked, metric)),
        _svg(_bars(weights)),
        _svg(_scatter(ranked, list(weights)[:9], space, base, metric)),
    ]
    keys = list(weights)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in ["trial", "ended", "epochs", metric, *keys])
    body = ""
    for r in ranked + [r for r in records if r not in ranked]:
        cells = [
            r.number,
            (r.end or {}).get("how", "interrupted"),
            r.epochs,
            _short(r.last(metric)),
            *(_short(r.values.get(k, base[k] if not r.values else "")) for k in keys),
        ]
        body += "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>\n"
    text = f"""<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px sans-serif;margin:2em auto;max-width:70em}}td,th{{padding:2px 8px;text-align:right}}
table{{border-collapse:collapse;font-size:13px}}tr:nth-child(even){{background:#f3f3f3}}img{{max-width:100%}}</style>
<h1>{html.escape(title)}</h1>
{"".join(f"<p>{html.escape(line)}</p>" for line in summary)}
<h2>Curves</h2>{pictures[0]}
<h2>Importance</h2><p>Share of the variance of the trials' ranks that a setting alone explains.</p>{pictures[1]}
<h2>Settings</h2>{pictures[2]}
<h2>Trials, best first</h2><table><tr>{head}</tr>
{body}</table>
"""
    write_whole(file, text)


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns)


def _svg(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", bbox_inches="tight")
    return f'<img src="data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}">'


def _curves(ranked: list[Record], metric: str):
    figure, axes = _figure(9, 4)
    for i, r in reversed(list(enumerate(ranked))):
        rows = [row for row in r.rows if row.get(metric) is not None]
        axes.plot(
            [row["epoch"] for row in rows],
            [row[metric] for row in rows],
            marker="o",
            markersize=3,
            color="C1" if i == 0 else "0.6",
            lw=2 if i == 0 else 0.8,
            label=f"trial {r.number}, the best" if i == 0 else None,
        )
    axes.set_xlabel("epoch"), axes.set_ylabel(metric)
    if ranked:
        axes.legend()
    return figure


def _bars(weights: dict[str, float]):
    figure, axes = _figure(9, 0.5 + 0.25 * len(weights))
    axes.barh(list(weights)[::-1], list(weights.values())[::-1])
    axes.set_xlim(0, 1)
    return figure


def _scatter(ranked: list[Record], keys: list[str], space: Space, base: Config, metric: str):
    columns = 3
    rows = max(1, -(-len(keys) // columns))
    figure, grid = _figure(9, 2.4 * rows, rows, columns)
    for axes, key in zip(grid.flat, keys):
        p = space[key]
        having = [r for r in ranked if key in r.values or not r.values]
        values = [r.values.get(key, base[key]) for r in having]
        if isinstance(p, Choice):
            values = [_place(p, v) for v in values]
            axes.set_xticks(range(len(p.values)), map(str, p.values), fontsize=7)
        elif p.scale == "log":
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.scatter(values, [r.last(metric) for r in having], c=[r.epochs for r in having], cmap="viridis", s=14)
        axes.set_title(key, fontsize=9)
    for axes in list(grid.flat)[len(keys) :]:
        axes.set_axis_off()
    figure.tight_layout()
    return figure
