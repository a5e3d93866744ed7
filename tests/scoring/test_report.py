"""report.html: one file that needs no other, with the numbers of metrics.json and the errors as pictures."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ifvit.errors import UserError
from ifvit.scoring import report


class Page(HTMLParser):
    """What a page shows and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.loaded, self.text, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loaded += [attrs[k] for k in ("src", "href") if k in attrs]
        if tag == "img":
            assert attrs["alt"]
            self.pictures.append(attrs["src"])

    def handle_data(self, data):
        self.text.append(data)

    def opened(self):
        found = []
        for source in self.pictures:
            assert source.startswith("data:image/png;base64,")
            found.append(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))))
            found[-1].load()
        return found


@pytest.fixture(scope="module")
def evaluated(command, untrained, prints, tmp_path_factory):
    """The folder of an evaluation of an untrained Module 1, with a peer's scores of a name that HTML must not read."""
    cwd = tmp_path_factory.mktemp("report")
    (cwd / "a <b> & c.csv").write_text("genuine,score\n1,0.9\n1,0.4\n0,0.5\n0,0.1\n")
    words = ("--checkpoint", untrained, "--dataset_root", prints, "--out", "out", "--peers", "a <b> & c.csv")
    said = command("evaluate", *words, cwd=cwd)
    assert said.code == 0, said
    return cwd / "out"


@pytest.mark.run
def test_a_report_needs_no_other_file_and_shows_the_numbers(evaluated):
    page = Page((evaluated / "report.html").read_text())
    assert all(source.startswith("data:") for source in page.loaded) and "script" not in page.tags
    text = " ".join(page.text)
    metrics = json.loads((evaluated / "metrics.json").read_text())
    for row in [*metrics["databases"].values(), metrics["macro"]]:
        for rate in report.RATES:
            low, high = row[f"{rate}_ci"]
            assert f"{100 * row[rate]:.2f} [{100 * low:.1f}, {100 * high:.1f}]" in text
    for what in (
        "DB1",
        "DB2",
        "macro",
        "Module 1 (dense registration)",
        "python -m ifvit.evaluate",
        "Left out: nothing",
    ):
        assert what in text
    pictures = page.opened()
    assert len(pictures) > 2 and min(image.width for image in pictures) > 300  # DET, histogram, errors
    assert "one finger, refused" in text or "two fingers, taken for one" in text


def in_browser(page: Path, *flags: str) -> subprocess.CompletedProcess:
    """Chromium without a window; the test is skipped where there is none."""
    browser = next(filter(shutil.which, ["chromium", "google-chrome", "chromium-browser"]), None)
    if not browser:
        pytest.skip("Chromium is not here")
    words = [browser, "--headless", "--no-sandbox", "--enable-logging=stderr", *flags, page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


PHONE = """<iframe id="phone" width="320" height="800" srcdoc="{page}"></iframe><p id="found"></p><script>
document.getElementById("phone").onload = () => {{
  const page = document.getElementById("phone").contentDocument, images = [...page.images];
  const widths = images.map(image => image.getBoundingClientRect().width);
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth, images: images.length,
    missing: images.filter(image => !image.complete || !image.naturalWidth).length,
    narrowest: Math.min(...widths), widest: Math.max(...widths),
  }});
}};
</script>"""


def test_a_browser_shows_it_at_a_phones_width(evaluated, tmp_path):
    """Seen 320 px wide no picture is missing, and nothing reaches past the edge: wide tables scroll by themselves."""
    page = (evaluated / "report.html").read_text()
    (tmp_path / "phone.html").write_text(PHONE.format(page=html.escape(page)))
    done = in_browser(tmp_path / "phone.html", "--virtual-time-budget=20000", "--dump-dom")
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'<p id="found">(.*?)</p>', done.stdout)[1]))
    assert found["images"] == page.count("<img ") and found["missing"] == 0
    assert found["width"] <= 320 and found["widest"] <= 320 and found["narrowest"] > 200


def test_a_browser_prints_it(evaluated, tmp_path):
    out = tmp_path / "page.pdf"
    done = in_browser(evaluated / "report.html", f"--print-to-pdf={out}")
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", out.read_bytes())) < 40


@pytest.mark.parametrize(
    "text", ["genuine,score\n1,0.5\n", "score\n1\n", "genuine,score\n1,a\n0,1\n", "genuine,score\n1,nan\n0,1\n", ""]
)
def test_what_are_no_scores_of_a_peer_is_told(tmp_path, text):
    (tmp_path / "peer.csv").write_text(text)
    with pytest.raises(UserError, match="needs the columns genuine .* it has not"):
        report.peer(tmp_path / "peer.csv")
    with pytest.raises(UserError, match="cannot be read"):
        report.peer(tmp_path / "missing.csv")


def test_a_peers_rates_are_those_of_its_scores(tmp_path):
    (tmp_path / "peer.csv").write_text("database,genuine,score\nA,1,3\nA,1,1\nA,0,2\nA,0,0\n")
    name, (fmr, fnmr) = report.peer(tmp_path / "peer.csv")
    assert name == "peer" and [0.5, 0.5] in np.stack([fmr, fnmr], 1).tolist()


def test_peers_of_one_file_name_have_a_curve_each(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scores.csv").write_text("\ufeffgenuine,score\n1,3\n0,0\n")  # as spreadsheets save it
    (tmp_path / "DB1.csv").write_text("genuine,score\n1,3\n0,0\n")
    paths = [str(tmp_path / name) for name in ("a/scores.csv", "b/scores.csv", "DB1.csv")]
    assert list(report.peers(paths)) == [f"{paths[0]} (peer)", f"{paths[1]} (peer)", "DB1 (peer)"]


@pytest.mark.slow
def test_the_protocol_of_all_pairs_is_reported_too(command, untrained, prints, tmp_path):
    words = ("--checkpoint", untrained, "--dataset_root", prints, "--out", "out", "--protocol", "all")
    said = command("evaluate", *words, cwd=tmp_path)
    assert said.code == 0, said
    assert "eer_fvc" in json.loads((tmp_path / "out/metrics.json").read_text())["macro"]
    assert "protocol all" in " ".join(Page((tmp_path / "out/report.html").read_text()).text)


def test_a_run_is_reported_while_it_trains(command, tmp_path):
    rows = [{"step": n, "epoch": 1, "split": "train", "loss": 3.0 / n, "learning_rate": 1e-3} for n in (10, 20, 30)]
    lines = [json.dumps(row) for row in rows]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "spl')  # a row is being written
    (run / "config.json").write_text(json.dumps({"batch_size": 16}))
    said = command("report", "run", cwd=tmp_path)
    assert said.code == 0 and "report.html" in said.out, said
    page = Page((run / "report.html").read_text())
    assert len(page.opened()) == 1 and "batch_size: 16" in page.text and "loss: 0.1" in page.text
    said = command("report", "run", "--out", "other/r.html", cwd=tmp_path)
    assert said.code == 0 and (tmp_path / "other/r.html").is_file()
    assert command("report", "nowhere", cwd=tmp_path).code == 2
    assert "is a folder" in command("report", "run", "--out", ".", cwd=tmp_path).err


def test_names_of_files_are_no_html(tmp_path):
    report.write(tmp_path / "r.html", "<script>", [report.listed("a", ["<img src=x>", b"\xff".decode("latin-1")])])
    text = Path(tmp_path / "r.html").read_text()
    assert "<script>" not in text and "<img" not in text and "&lt;script&gt;" in text
