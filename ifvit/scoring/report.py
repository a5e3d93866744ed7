"""report.html: what an evaluation or a training gave, in one file that needs no other and no network.

A section is a function that returns HTML. What comes from names of files is escaped.
"""

import base64
import csv
import html
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from etils import epath
from jaxtyping import Float

from ifvit.errors import UserError
from ifvit.files import write_whole
from ifvit.scoring import rates

if TYPE_CHECKING:
    from ifvit.data.prepare import Prints
    from ifvit.data.protocols import Pairs
    from ifvit.scoring.scorer import Scorer

Curve = tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]  # FMR, FNMR
WORST = 20  # errors that are drawn, at most
RATES = {
    "eer": ("EER", "the rate at which as many genuine pairs are refused as impostors pass"),
    "fmr100": ("FMR100", "genuine pairs refused where one impostor in 100 passes"),
    "fmr1000": ("FMR1000", "genuine pairs refused where one impostor in 1000 passes"),
    "zerofmr": ("ZeroFMR", "genuine pairs refused where no impostor of these passes"),
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } table { border-collapse: collapse; } caption { text-align: left; color: #555; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } tr:last-child { font-weight: 600; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; }
li { overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""


def write(path: str | os.PathLike, title: str, sections: Iterable[str]) -> None:
    """The page, whole or not at all."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{escaped(title)}</h1>", *sections])
    write_whole(path, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')


def of_evaluation(
    out: Path, result: Mapping, first: Sequence[str], errors: str, lines: Mapping[str, Sequence[str]]
) -> None:
    """report.html of an evaluation, in the folder that holds its det.png and histogram.png."""
    count = len(result["databases"])
    sections = [
        *first,
        table_of_rates(result),
        section("DET", picture(out / "det.png", "False non-matches against false matches, by database")),
        of_identification(out, result),
        section("Scores", picture(out / "histogram.png", "Scores of genuine and impostor pairs")),
        errors,
        *(listed(*item) for item in lines.items()),
    ]
    write(out / "report.html", f"Evaluation of {count} database{'s' * (count > 1)}", sections)


def of_training(
    path: str | os.PathLike, folder: str, rows: Sequence[Mapping], curves: Path | epath.Path, settings: Mapping
) -> None:
    """The page of a run in `folder`, from the rows of its metrics.jsonl and the picture of their curves."""
    newest = [f"{k}: {v:g}" for k, v in rows[-1].items() if isinstance(v, int | float)]
    sections = [
        of_curves(curves, rows, Path(folder).name),
        listed("Newest row", newest),
        listed("Settings", [f"{k}: {v}" for k, v in settings.items()]),
    ]
    write(path, f"Training in {folder}", sections)


def of_curves(curves: Path | epath.Path, rows: Sequence[Mapping], name: str) -> str:
    """A training's metrics over its steps, from their picture."""
    steps = max(row["step"] for row in rows)
    return section(f"Training of {name}", picture(curves, f"Metrics over {steps:,} steps"))


def escaped(text: object) -> str:
    """For HTML; bytes of a name that are not UTF-8 are shown as numbers."""
    return html.escape(str(text).encode("utf-8", "backslashreplace").decode())


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def listed(title: str, lines: Sequence[object]) -> str:
    """A section of lines; nothing where there are none."""
    return section(title, "<ul>" + "".join(f"<li>{escaped(line)}</li>" for line in lines) + "</ul>") if lines else ""


def picture(file: Path | epath.Path, caption: str) -> str:
    """A PNG file, inside the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    said = escaped(caption)
    return f'<figure><img alt="{said}" src="data:image/png;base64,{data}"><figcaption>{said}</figcaption></figure>'


def table_of_rates(result: Mapping) -> str:
    """Rates in per cent with their 95 % intervals, a row a database, the mean last."""

    def row(name: str, found: Mapping) -> str:
        cells = [escaped(name)]
        for key in RATES:
            low, high = (100 * x for x in found[f"{key}_ci"])
            cells.append(f"{100 * found[key]:.2f} [{low:.1f}, {high:.1f}]")
        cells += [f"{found['auc']:.4f}", f"{found['cllr']:.3f}" if "cllr" in found else ""]
        cells += [f"{found[kind]:,}" if kind in found else "" for kind in ("genuine", "impostor")]
        return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    names = ["database", *(short for short, _ in RATES.values()), "AUC", "Cllr", "genuine", "impostor"]
    rows = [row(*item) for item in [*result["databases"].items(), ("macro", result["macro"])]]
    said = "; ".join(f"{short}: {meaning}" for short, meaning in RATES.values())
    return section(
        "Rates",
        f'<div class="wide"><table><caption>% with 95 % intervals over fingers; protocol {result["protocol"]}</caption>'
        f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{''.join(rows)}</table></div>",
        f"<p>{said}. AUC: how often a genuine pair scores above an impostor. Cllr: what the likelihood ratios cost, in "
        "bits; 1 tells nothing, 0 is perfect. The macro row is the mean over databases.</p>",
        f"<p>{of_templates(result['macro'])}.</p>" if "eer_template" in result["macro"] else "",
    )


def of_identification(out: Path, result: Mapping) -> str:
    """The CMC curves, where the evaluation had them."""
    if not any("cmc" in key for row in result["databases"].values() for key in row):
        return ""
    said = (
        "The first impression of every finger of a database is enrolled, the others are probes. They are found by the "
        "templates of one print alone and, where every pair was compared, by the pairs' scores."
    )
    return section("Identification", f"<p>{said}</p>", picture(out / "cmc.png", "CMC by database"))


def of_templates(macro: Mapping) -> str:
    """How well the templates of one print do without the pair score."""
    return "Templates of one print alone: EER {eer_template:.2%}, rank-1 {rank1_template:.1%}; macro".format(**macro)


def worst_errors(scorer: "Scorer", prints: "Prints", pairs: "Pairs", score: Float[np.ndarray, " N"]) -> str:
    """Genuine pairs below the EER's threshold and impostors at it or above, the worst first, with their matches."""
    genuine = np.zeros(len(pairs), bool)
    for d in pairs.databases:
        genuine[pairs.of(d.database, True)] = True
    thresholds, fmr, fnmr = rates.det_curve(score[genuine], rates.thinned(score[~genuine]), rates.POINTS)
    threshold = thresholds[np.argmin(np.abs(fmr - fnmr))]
    refused = np.flatnonzero(genuine & (score < threshold))
    passed = np.flatnonzero(~genuine & (score >= threshold))
    refused = refused[np.argsort(score[refused], kind="stable")][: WORST // 2]
    passed = passed[np.argsort(-score[passed], kind="stable")][: WORST - len(refused)]
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pair.png"
        for n in [*refused.tolist(), *passed.tolist()]:
            pair = pairs[n]
            file.unlink(missing_ok=True)
            scorer.picture(prints, pair, file)
            a, b = (prints.prints[i] for i in pair[:2])
            what = "one finger, refused" if pair.genuine else "two fingers, taken for one"
            said = f"{a.database}: {Path(a.path).name} and {Path(b.path).name}, {what}; score {score[n]:.4f}"
            drawn.append(picture(file, said) if file.exists() else f"<p>{escaped(said)}</p>")
    if not drawn:
        return section("Worst errors", f"<p>None: at a score of {threshold:.4f} all pairs are told apart.</p>")
    return section("Worst errors", f"<p>At the threshold of the EER, {threshold:.4f}.</p>", *drawn)


def peers(paths: Sequence[str]) -> dict[str, Curve]:
    """DET curves of other systems by their files' names, or by their paths where two files have one name."""
    found = {path: peer(path) for path in paths}
    names = [name for name, _ in found.values()]
    # Of a database's name none of these is: it would take the database's place.
    return {f"{name if names.count(name) == 1 else path} (peer)": curve for path, (name, curve) in found.items()}


def peer(path: str | os.PathLike) -> tuple[str, Curve]:
    """Name and DET curve of another system's scores: a CSV file with the columns genuine (0 or 1) and score.

    UserError for a file that has none of them, or no pairs of both kinds.
    """
    need = (
        f"--peers {path} needs the columns genuine (0 or 1) and score, and pairs of both kinds, as scores.csv has them"
    )
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = [(row["genuine"], float(row["score"])) for row in csv.DictReader(file)]
    except OSError as e:
        raise UserError(f"--peers {path} cannot be read ({e.strerror}); give another file.") from e
    except (KeyError, ValueError, TypeError, csv.Error) as e:
        raise UserError(f"{need}; it has not.") from e
    kinds = {kind: np.array([s for genuine, s in rows if genuine == kind], np.float64) for kind in ("1", "0")}
    if not all(map(len, kinds.values())) or not all(np.isfinite(s).all() for s in kinds.values()):
        raise UserError(f"{need}; it has not.")
    return Path(path).stem, rates.det_curve(kinds["1"], kinds["0"], rates.POINTS)[1:]
