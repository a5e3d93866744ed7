"""`evaluate` writes rates, scores and plots of either module; `verify` compares two prints."""

import csv
import functools
import itertools
import json
import logging
import os
import shutil
import tracemalloc
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from ifvit.data.prepare import PrintSet, prepare
from ifvit.data.single import on_canvas
from ifvit.data.sources import Print, read_roots
from ifvit.errors import UserError
from ifvit.evaluate import evaluate
from ifvit.scoring.fusion import Fusion
from ifvit.scoring.scorer import Scorer

SMOKE = ("--preset", "smoke")
RATES = {"eer", "fmr100", "fmr1000", "zerofmr", "auc"}
COSTS = {"cllr", "min_cllr"}  # of the likelihood ratios
TEMPLATES = {"eer_template", "rank1_template"}
CMC = {"cmc_template"}
INTERVALS = {f"{rate}_ci" for rate in RATES}


@pytest.fixture(scope="module", params=["dense_reg", "matcher"])
def evaluated(request, command, pipeline, prints, tmp_path_factory):
    """A module's checkpoint on two databases of 3 fingers with 3 impressions: the files under `out`."""
    cwd = tmp_path_factory.mktemp("evaluate")
    checkpoint = {"dense_reg": pipeline.module1, "matcher": pipeline.module2}[request.param]
    said = command("evaluate", "--checkpoint", checkpoint, "--dataset_root", prints, "--out", "OUT", cwd=cwd)
    assert said.code == 0, said
    with (cwd / "OUT/scores.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    return SimpleNamespace(
        module=request.param,
        said=said,
        out=cwd / "OUT",
        header=header,
        rows=[dict(zip(header, row)) for row in rows],
        metrics=json.loads((cwd / "OUT/metrics.json").read_text()),
    )


def split(rows: list[dict], database: str) -> tuple[list[float], list[float]]:
    """Genuine and impostor scores."""
    mine = [r for r in rows if r["database"] == database]
    return tuple([float(r["score"]) for r in mine if r["genuine"] == kind] for kind in "10")


def rates_at(threshold: float, genuine: list[float], impostor: list[float]) -> tuple[float, float]:
    """(FMR, FNMR) where scores from `threshold` on are accepted."""
    return sum(s >= threshold for s in impostor) / len(impostor), sum(s < threshold for s in genuine) / len(genuine)


def eer(genuine: list[float], impostor: list[float]) -> float:
    """As FVC2000's report defines it, section 4: the middle of the narrower of two intervals."""
    thresholds = sorted({*genuine, *impostor}) + [float("inf")]
    rates = [rates_at(t, genuine, impostor) for t in thresholds]
    below = [(fmr, fnmr) for fmr, fnmr in rates if fnmr <= fmr][-1]
    above = [(fmr, fnmr) for fmr, fnmr in rates if fnmr >= fmr][0]
    return min(sum(below), sum(above)) / 2


def test_the_metrics_have_these_keys(evaluated):
    assert set(evaluated.metrics) == {"macro", "databases", "protocol"}
    assert evaluated.metrics["protocol"] == "fvc"
    assert set(evaluated.metrics["macro"]) == RATES | INTERVALS | COSTS | TEMPLATES
    assert set(evaluated.metrics["databases"]) == {"DB1", "DB2"}
    for row in evaluated.metrics["databases"].values():
        assert set(row) == RATES | INTERVALS | COSTS | TEMPLATES | CMC | {"genuine", "impostor"}
        assert 0 <= row["min_cllr"] <= row["cllr"]


def test_rates_are_fractions_and_pairs_are_counted(evaluated):
    for row in [*evaluated.metrics["databases"].values(), evaluated.metrics["macro"]]:
        assert all(0 <= row[k] <= 1 for k in RATES)
        assert all(0 <= row[k][0] <= row[k][1] <= 1 for k in INTERVALS)
    for row in evaluated.metrics["databases"].values():
        assert (row["genuine"], row["impostor"]) == (9, 3)  # 3 fingers × 3 pairs; 3 pairs of fingers


def test_the_templates_of_one_print_are_told_of(evaluated):
    told = evaluated.metrics["macro"]
    assert f"Templates of one print alone: EER {told['eer_template']:.2%}" in evaluated.said.out
    assert "Templates of one print alone" in (evaluated.out / "report.html").read_text()


def test_macro_is_the_mean_over_databases(evaluated):
    for rate in RATES | TEMPLATES:
        values = [row[rate] for row in evaluated.metrics["databases"].values()]
        assert evaluated.metrics["macro"][rate] == pytest.approx(sum(values) / 2)


def test_the_scores_have_these_columns(evaluated):
    assert ",".join(evaluated.header) == "database,a,b,genuine,score,global,local,matches"
    assert (evaluated.out / "scores.csv").read_text().splitlines()[
        0
    ] == "database,a,b,genuine,score,global,local,matches"
    assert len(evaluated.rows) == 2 * (9 + 3)


def test_each_pair_of_the_protocol_is_scored_once(evaluated):
    genuine = {(f"{f}_{i}.png", f"{f}_{j}.png") for f in "123" for i, j in itertools.combinations("123", 2)}
    impostor = {(f"{f}_1.png", f"{g}_1.png") for f, g in itertools.combinations("123", 2)}
    for database in ("DB1", "DB2"):
        scored = {(r["a"], r["b"]): r["genuine"] for r in evaluated.rows if r["database"] == database}
        assert scored == dict.fromkeys(genuine, "1") | dict.fromkeys(impostor, "0")


def test_the_eer_follows_from_the_scores(evaluated):
    for database, row in evaluated.metrics["databases"].items():
        assert row["eer"] == pytest.approx(eer(*split(evaluated.rows, database)))


def test_fmr100_and_auc_follow_from_the_scores(evaluated):
    for database, row in evaluated.metrics["databases"].items():
        genuine, impostor = split(evaluated.rows, database)
        # of 3 impostors at most 1 % is none: genuine scores not above the highest impostor's are refused
        assert (
            row["fmr100"]
            == row["fmr1000"]
            == row["zerofmr"]
            == pytest.approx(sum(s <= max(impostor) for s in genuine) / 9)
        )
        wins = sum((a > b) + (a == b) / 2 for a in genuine for b in impostor)
        assert row["auc"] == pytest.approx(wins / 27)


def test_module_1_scores_by_the_ridges_that_agree_module_2_by_both_branches(evaluated):
    for row in evaluated.rows:
        assert int(row["matches"]) >= 0
        if evaluated.module == "dense_reg":
            assert 0 <= float(row["score"]) < 1 and row["global"] == row["local"] == ""
        else:
            assert 0 <= float(row["score"]) <= 1
            assert all(-1.001 <= float(row[k]) <= 1.001 for k in ("global", "local"))  # cosines
    assert len({r["score"] for r in evaluated.rows}) > 1


@pytest.mark.parametrize("name", ["det.png", "cmc.png", "histogram.png", "matches.png"])
def test_the_pictures_are_pngs(evaluated, name):
    assert (evaluated.out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(evaluated.out / name) as image:
        image.load()
        assert min(image.size) >= 100


def test_the_table_is_printed(evaluated):
    table = evaluated.said.out.splitlines()
    for name, row in [*evaluated.metrics["databases"].items(), ("macro", evaluated.metrics["macro"])]:
        line = next(t for t in table if t.startswith(name))
        low, high = row["eer_ci"]
        assert f"{row['eer']:.2%} [{100 * low:.1f}, {100 * high:.1f}]" in line


@pytest.fixture
def unscored(monkeypatch):
    """Scores and pictures that cost nothing: pair number n has the score n."""

    def score(self, prints, pairs, batch_size):
        assert len(set(pairs)) == len(pairs)
        return {"score": np.arange(len(pairs), dtype=float), "matches": np.zeros(len(pairs), int)}

    monkeypatch.setattr("ifvit.scoring.scorer.Scorer.score", score)
    monkeypatch.setattr("ifvit.scoring.scorer.Scorer.picture", lambda *_: None)


def test_protocol_all_compares_every_pair(unscored, command, pipeline, prints, tmp_path):
    said = command(
        "evaluate",
        "--checkpoint",
        pipeline.module1,
        "--dataset_root",
        prints / "DB1",
        "--out",
        "OUT",
        "--protocol",
        "all",
        cwd=tmp_path,
    )
    assert said.code == 0, said
    found = json.loads((tmp_path / "OUT/metrics.json").read_text())["databases"]
    assert {name: (row["genuine"], row["impostor"]) for name, row in found.items()} == {"DB1": (9, 27)}  # of 9 · 8 / 2


def test_a_limit_compares_all_genuine_pairs_and_a_draw_of_impostors_and_says_so(
    unscored, command, pipeline, prints, tmp_path
):
    def rows(out):
        said = command(
            "evaluate",
            "--checkpoint",
            pipeline.module1,
            "--dataset_root",
            prints / "DB1",
            "--out",
            out,
            "--protocol",
            "all",
            "--max_pairs",
            20,
            cwd=tmp_path,
        )
        assert said.code == 0 and "DB1: 11 of 27 impostor pairs are compared, a fixed draw" in said.out, said
        return (tmp_path / out / "scores.csv").read_text()

    assert rows("OUT") == rows("OUT2")
    row = json.loads((tmp_path / "OUT/metrics.json").read_text())["databases"]["DB1"]
    assert (row["genuine"], row["impostor"], row["impostors_in_all"]) == (9, 11, 27)


@pytest.mark.parametrize(
    "words, told",
    [
        (("--max_pairs", 9), "--max_pairs is 9, and DB1 alone has 9 genuine pairs"),
        (("--max_pairs", 1), "--max_pairs is 1"),
        (("--max_pairs", -1), "--max_pairs is -1"),
        (("--against", "nowhere"), "There are no scores at nowhere"),
        (("--against", "OUT"), "lies in --out itself"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_is_scored(
    command, pipeline, prints, tmp_path, monkeypatch, words, told
):
    monkeypatch.setattr("ifvit.scoring.scorer.Scorer.score", None)
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT/scores.csv").write_text("")
    said = command(
        "evaluate",
        "--checkpoint",
        pipeline.module1,
        "--dataset_root",
        prints / "DB1",
        "--out",
        "OUT",
        *words,
        cwd=tmp_path,
    )
    assert said.code == 2 and told in said.err and said.err.count("\n") == 1, said


def of_fingers(fingers, impressions):
    """Prints of one database that nobody reads."""
    return Mock(
        PrintSet,
        prints=tuple(
            Print(f"/d/{f}_{i}.png", "DB", str(f), str(i), 500.0) for f in range(fingers) for i in range(impressions)
        ),
    )


def test_many_pairs_are_told_with_their_time_before_they_are_scored(
    unscored, command, pipeline, prints, tmp_path, monkeypatch
):
    words = (
        "evaluate",
        "--checkpoint",
        pipeline.module1,
        "--dataset_root",
        prints / "DB1",
        "--out",
        "OUT",
        "--protocol",
        "all",
    )
    assert "--max_pairs" not in command(*words, cwd=tmp_path).out
    monkeypatch.setattr("ifvit.evaluate.MANY", 35)  # DB1 has 9 · 8 / 2 = 36
    monkeypatch.setattr("ifvit.evaluate.PAIRS_PER_SECOND", 36 / 7200)
    said = command(*words, cwd=tmp_path).out
    assert "Protocol all makes 36 pairs, which take about 2 hours" in said and "--max_pairs" in said


@pytest.mark.run
def test_six_thousand_fingers_of_one_impression_are_refused_without_a_list_of_their_pairs(tmp_path):
    prints = of_fingers(6000, 1)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"DB \(0 genuine, 17997000 impostor\)"):
        evaluate(Mock(Scorer), prints, tmp_path / "OUT")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6  # bytes, what is imported included; the list takes two thousand million


@pytest.fixture
def random_scorer():
    def score(_, pairs, batch_size):
        return {"score": np.random.default_rng(0).random(len(pairs)), "matches": np.zeros(len(pairs))}

    return Mock(Scorer, score=score, picture=lambda *_: None)


@pytest.mark.run
@pytest.mark.parametrize("max_pairs, impostors", [(None, 11), (0, 27), (20, 11), (36, 27)])
def test_of_very_many_impostors_a_draw_is_compared_unless_all_are_asked_for(
    random_scorer, tmp_path, monkeypatch, caplog, max_pairs, impostors
):
    monkeypatch.setattr("ifvit.evaluate.MOST_IMPOSTORS", 11)
    caplog.set_level(logging.INFO, "ifvit")
    found = evaluate(random_scorer, of_fingers(3, 3), tmp_path, "all", max_pairs=max_pairs)  # 9 · 8 / 2 pairs
    row = json.loads((tmp_path / "metrics.json").read_text())["databases"]["DB"]
    assert row == found["databases"]["DB"] and (row["genuine"], row["impostor"]) == (9, impostors)
    told = [line for line in caplog.messages if "a fixed draw" in line]
    if impostors == 27:
        assert not told and "impostors_in_all" not in row
    else:
        assert row["impostors_in_all"] == 27
        assert told == ["DB: 11 of 27 impostor pairs are compared, a fixed draw; --max_pairs 0 compares all"]


@pytest.mark.run
def test_pairs_are_drawn_and_not_listed(random_scorer, tmp_path, monkeypatch):
    monkeypatch.setattr("ifvit.evaluate.MOST_IMPOSTORS", 10_000)
    monkeypatch.setattr("ifvit.scoring.intervals.DRAWS", 4)
    monkeypatch.setattr("ifvit.scoring.plots.det", lambda path, _: path.touch())  # the report reads it
    prints = of_fingers(600, 10)
    tracemalloc.start()
    found = evaluate(random_scorer, prints, tmp_path, "all")["databases"]["DB"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found["impostor"], found["impostors_in_all"]) == (10_000, 6000 * 5999 // 2 - 600 * 45)
    assert peak < 100e6  # bytes; a number for each of the eighteen million takes 144


@pytest.mark.run
def test_scores_of_a_large_database_are_written_in_order(tmp_path):
    """206,700 pairs: more than are looked up at once."""
    prints = of_fingers(600, 10)
    scored = {}

    def score(_, pairs, batch_size):
        scored.update((n, pair) for n, pair in enumerate(pairs) if n % 1000 == 0)
        return {"score": np.random.default_rng(0).random(len(pairs)), "matches": np.arange(len(pairs))}

    scorer = Mock(Scorer, score=score, picture=lambda *_: None)
    evaluate(scorer, prints, tmp_path)
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 600 * 45 + 600 * 599 // 2
    for n, pair in scored.items():
        names = [os.path.basename(prints.prints[i].path) for i in pair[:2]]
        assert (rows[n]["a"], rows[n]["b"], rows[n]["genuine"], rows[n]["matches"]) == (
            *names,
            str(int(pair.genuine)),
            str(n),
        )


def test_protocol_all_tells_the_eer_of_the_fvcs_pairs_too(tmp_path):
    prints = of_fingers(8, 3)
    value = np.random.default_rng(0).random((24, 24))

    def score(_, pairs, batch_size):
        scores = np.array([value[p.print0, p.print1] + 0.2 * p.genuine for p in pairs])
        return {"score": scores, "matches": np.zeros(len(pairs))}

    scorer = Mock(Scorer, score=score, picture=lambda *_: None)
    by_fvc, of_all = (evaluate(scorer, prints, tmp_path / protocol, protocol) for protocol in ("fvc", "all"))
    assert (
        of_all["macro"]["eer_fvc"]
        == of_all["databases"]["DB"]["eer_fvc"]
        == by_fvc["macro"]["eer"]
        != of_all["macro"]["eer"]
    )
    assert "eer_fvc" not in by_fvc["macro"]


def test_two_evaluations_are_compared_pair_by_pair(evaluated, command, pipeline, prints, tmp_path):
    """Once together with scoring, once of scores that lie there."""
    theirs = evaluated.out / "scores.csv"
    said = command(
        "evaluate",
        "--checkpoint",
        pipeline.module1,
        "--dataset_root",
        prints,
        "--out",
        "OUT",
        "--against",
        theirs,
        cwd=tmp_path,
    )
    assert said.code == 0, said
    found = json.loads((tmp_path / "OUT/against.json").read_text())
    mine = json.loads((tmp_path / "OUT/metrics.json").read_text())
    for name, row in [*found["databases"].items(), ("macro", found["macro"])]:
        here, there = (m["macro"] if name == "macro" else m["databases"][name] for m in (mine, evaluated.metrics))
        for rate in RATES:
            assert row[rate]["this"] == pytest.approx(here[rate]) and row[rate]["other"] == pytest.approx(there[rate])
            assert row[rate]["difference"] == pytest.approx(here[rate] - there[rate])
        assert f"{100 * row['eer']['difference']:+.2f} [" in next(
            t for t in said.out.splitlines()[::-1] if t.startswith(name)
        )
    again = command("evaluate", "--out", "OUT", "--against", evaluated.out, cwd=tmp_path)
    assert again.code == 0 and again.out.splitlines()[1:] == said.out.splitlines()[-4:], again
    assert json.loads((tmp_path / "OUT/against.json").read_text())["macro"] == found["macro"]


def test_a_database_without_genuine_pairs_is_left_out_and_named(unscored, command, pipeline, prints, tmp_path):
    shutil.copytree(prints / "DB1", tmp_path / "root/good")
    (tmp_path / "root/singles").mkdir()
    for finger in "123":
        shutil.copy(prints / f"DB2/{finger}_1.png", tmp_path / "root/singles")
    said = command("evaluate", "--checkpoint", pipeline.module1, "--dataset_root", "root", "--out", "OUT", cwd=tmp_path)
    assert said.code == 0, said
    assert set(json.loads((tmp_path / "OUT/metrics.json").read_text())["databases"]) == {"good"}
    assert "singles" in said.out


# ---- verify


@pytest.fixture(scope="module")
def compare(command, pipeline, generated, tmp_path_factory):
    """compare(*WORDS): `verify` of two impressions of finger 1 by the pipeline's matcher, once for the same words."""
    cwd = tmp_path_factory.mktemp("verify")

    @functools.cache
    def call(*words):
        return command("verify", generated[1, 1], generated[1, 2], "--checkpoint", pipeline.module2, *words, cwd=cwd)

    return call


def test_verify_prints_score_decision_and_matches_as_json(compare):
    said = compare("--json")
    assert said.code == 0, said
    found = json.loads(said.out)
    assert {"score", "decision", "matches"} <= set(found)
    assert 0 <= found["score"] <= 1
    assert found["decision"] in ("match", "no match")
    assert isinstance(found["matches"], int) and found["matches"] >= 0


def test_verify_prints_the_same_as_text_and_draws_the_pair(compare, tmp_path):
    found, said = json.loads(compare("--json").out), compare("--picture", tmp_path / "out.png")
    assert said.code == 0, said
    assert f"score {found['score']:.4f}, {found['decision']} " in said.out
    assert f"{found['matches']} matches" in said.out
    with Image.open(tmp_path / "out.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > image.height  # side by side


def test_a_laxer_rate_never_turns_a_match_into_none(compare):
    lax, strict = (json.loads(compare("--json", *words).out) for words in (("--fmr", "0.999"), ()))
    assert lax["threshold"] < strict["threshold"] and lax["score"] == strict["score"]
    for found in (lax, strict):
        assert found["decision"] == ("match" if found["score"] >= found["threshold"] else "no match")


@pytest.mark.parametrize("fmr", [0.02, 0.1, 0.5, 0.999])
def test_no_more_impostors_match_than_the_rate_says(fmr):
    impostor = np.sort(np.random.default_rng(0).random(500))[::-1]
    threshold = Fusion((1.0, 1.0, 1.0, 1.0), 0.0, tuple(impostor)).threshold(fmr)
    assert fmr - 1 / 500 <= (impostor >= threshold).mean() <= fmr


def test_scores_are_fused_some_after_the_other(monkeypatch):
    rng = np.random.default_rng(0)
    scores = {k: rng.random(10).astype(np.float32) for k in ("global", "local", "agreement", "matches")}
    logits = 3 * scores["global"] + np.log1p(scores["matches"].astype(np.float64)) - 2
    monkeypatch.setattr("ifvit.scoring.fusion.AT_ONCE", 4)
    found = Fusion((3.0, 0.0, 0.0, 1.0), -2.0, ()).score(scores)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-6)


@pytest.mark.parametrize(
    "words, told", [(("--ppi", -500), "--ppi is -500"), (("--ppi", "nan"), "--ppi is nan"), ((), "shows no ridges")]
)
def test_verify_refuses_a_blank_print_and_a_resolution_that_is_none(
    command, pipeline, generated, tmp_path, words, told
):
    blank = tmp_path / "blank.png"
    Image.fromarray(np.full((300, 300), 230, np.uint8)).save(blank)
    said = command("verify", blank, generated[1, 2], "--checkpoint", pipeline.module2, *words, cwd=tmp_path)
    assert said.code == 2 and told in said.err and said.err.count("\n") == 1, said


def test_verify_reads_a_print_at_the_resolution_of_its_set(generated, tmp_path):
    for folder in ("FVC2002/DB2_A", "FVC2002/DB1_A"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(generated[1, 1], tmp_path / folder / "1_1.png")
    db2, db1 = (on_canvas(tmp_path / "FVC2002" / name / "1_1.png", None, 512) for name in ("DB2_A", "DB1_A"))
    assert db2.mask.sum() == pytest.approx(db1.mask.sum() * (500 / 569) ** 2, rel=0.1)


@pytest.mark.run
def test_prints_with_light_ridges_are_told_and_read_as_dark_ones_are(prints, tmp_path, caplog):
    for file in prints.glob("DB1/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file).convert("L"))).save(tmp_path / file.name)
    dark = prepare(read_roots([prints / "DB1"]), 512, 0.0, tmp_path / "cache")
    assert "--ridges" not in caplog.text
    light = prepare(read_roots([tmp_path], ridges="light"), 512, 0.0, tmp_path / "cache")
    assert "--ridges" not in caplog.text
    for i in range(len(dark)):
        np.testing.assert_array_equal(dark.canvas(i)[0], light.canvas(i)[0])
    prepare(read_roots([tmp_path]), 512, 0.0, tmp_path / "cache")
    assert f"ridges of {tmp_path.name} seem to be light" in caplog.text
    prepare(read_roots([prints / "DB1"], ridges="light"), 512, 0.0, tmp_path / "cache")
    assert "ridges of DB1 seem to be dark" in caplog.text
    caplog.clear()
    prepare(read_roots([prints, tmp_path]), 512, 0.0, tmp_path / "cache")  # each database for itself
    assert caplog.text.count("seem to be light") == 1 and f"ridges of {tmp_path.name} seem" in caplog.text
    one = dark.prints[0]
    file = tmp_path / f"{one.finger}_{one.impression}.png"
    right, wrong, inverted = (
        on_canvas(path, None, 512, *ridges).canvas for path, *ridges in ((one.path,), (file,), (file, "light"))
    )
    np.testing.assert_array_equal(right, inverted)
    assert (wrong != inverted).any()


def test_prints_that_tell_no_resolution_are_counted(prints, tmp_path, caplog):
    for file in prints.glob("DB1/*.png"):  # those have a tag
        Image.fromarray(np.asarray(Image.open(file))).save(tmp_path / file.name)
    with caplog.at_level(logging.INFO, "ifvit"):
        for _ in range(2):  # decoded, and found decoded
            prepare(read_roots([prints]), 512, 0.0, tmp_path / "cache")
            prepare(read_roots([tmp_path]), 512, 0.0, tmp_path / "cache")
            prepare(read_roots([tmp_path], 500.0), 512, 0.0, tmp_path / "cache")
    assert caplog.text.count("9 prints tell no resolution and are read at 500 ppi") == 2


@pytest.mark.slow
def test_prints_that_the_checkpoint_was_trained_on_are_told(command, module1, prints, tmp_path):
    told = "The checkpoint was trained on prints of"
    assert (
        told
        in command(
            "evaluate", "--checkpoint", module1.path, "--dataset_root", prints / "DB1", "--out", "OUT", cwd=tmp_path
        ).out
    )
    shutil.copytree(prints / "DB1", tmp_path / "renamed")
    assert (
        told
        in command(
            "evaluate", "--checkpoint", module1.path, "--dataset_root", "renamed", "--out", "OUT1", cwd=tmp_path
        ).out
    )
    (tmp_path / "others").mkdir()
    for file in (prints / "DB1").iterdir():
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "others" / file.name)
    assert (
        told
        not in command(
            "evaluate", "--checkpoint", module1.path, "--dataset_root", "others", "--out", "OUT2", cwd=tmp_path
        ).out
    )


def test_a_file_in_the_way_is_told_before_anything_is_scored(command, pipeline, prints, tmp_path, monkeypatch):
    (tmp_path / "OUT").write_text("")
    monkeypatch.setattr("ifvit.scoring.scorer.Scorer.score", None)
    said = command("evaluate", "--checkpoint", pipeline.module1, "--dataset_root", prints, "--out", "OUT", cwd=tmp_path)
    assert said.code == 2 and "a file is in the way; give another --out" in said.err, said


def test_scores_of_a_folder_a_finger_say_whose_they_are_whatever_the_names(command, pipeline, generated, tmp_path):
    root = tmp_path / "a$b_$c"
    fingers = [os.fsdecode(b"m\xfcller"), "b"]
    for n, finger in enumerate(fingers, 1):
        (root / finger).mkdir(parents=True)
        for i in (1, 2):
            shutil.copy(generated[n, i], root / finger / f"{i}.png")
    said = command("evaluate", "--checkpoint", pipeline.module1, "--dataset_root", root, "--out", "OUT", cwd=tmp_path)
    assert said.code == 0, said
    with (tmp_path / "OUT/scores.csv").open(newline="", encoding="utf-8") as file:
        assert {row["a"] for row in csv.DictReader(file)} == {"b/1.png", "m\\udcfcller/1.png"}


def test_scores_name_as_much_of_a_path_as_tells_the_prints_of_a_database_apart(tmp_path):
    paths = [
        f"/root/one/{session}/{finger}/{n}.png" for session in ("first", "second") for finger in "78" for n in "12"
    ]
    prints = [Print(path, "one", path.split("/")[4], path, 500.0) for path in paths]
    prints += [Print(f"/root/two/{finger}_{n}.png", "two", finger, n, 500.0) for finger in "78" for n in "12"]
    scorer = Mock(
        Scorer,
        score=lambda _, pairs, __: {"score": np.arange(len(pairs)), "matches": np.zeros(len(pairs))},
        picture=lambda *_: None,
    )
    evaluate(scorer, Mock(PrintSet, prints=tuple(prints)), tmp_path)
    with (tmp_path / "scores.csv").open(newline="") as file:
        names = {(row["database"], row[side]) for row in csv.DictReader(file) for side in "ab"}
    assert names == {("one", path.removeprefix("/root/one/")) for path in paths} | {
        ("two", f"{f}_{n}.png") for f in "78" for n in "12"
    }


def test_verify_agrees_with_evaluate(command, pipeline, prints, evaluated, tmp_path):
    of_module1 = evaluated.module == "dense_reg"
    said = command(
        "verify",
        prints / "DB1/1_1.png",
        prints / "DB1/1_2.png",
        "--checkpoint",
        pipeline.module1 if of_module1 else pipeline.module2,
        "--json",
        cwd=tmp_path,
    )
    row = next(r for r in evaluated.rows if (r["database"], r["a"], r["b"]) == ("DB1", "1_1.png", "1_2.png"))
    found = json.loads(said.out)
    assert found["score"] == pytest.approx(float(row["score"]), abs=1e-3)
    assert of_module1 or found["matches"] == int(row["matches"])  # Module 1's are those that the ridges confirm


@pytest.mark.slow
def test_fingers_with_one_impression_train_and_are_not_evaluated(command, generated, tmp_path):
    for finger in range(1, 7):
        shutil.copy(generated[finger, 1], tmp_path / f"{finger}_1.png")
    said = command("train_all", "--dataset_root", tmp_path, "--num_classes", 100, *SMOKE, cwd=tmp_path)
    assert said.code == 0, said
    assert "the score is not calibrated" in said.out
    assert said.out.count("not evaluated: No database has both genuine and impostor pairs") == 2
    assert (tmp_path / "checkpoints/matcher/matcher_ckpt").is_dir()
    assert not (tmp_path / "checkpoints/matcher/evaluation").exists()


def test_the_table_says_which_databases_are_left_out(command, pipeline, prints, generated, tmp_path):
    shutil.copytree(prints / "DB1", tmp_path / "data/DB1")
    (tmp_path / "data/DB9").mkdir()
    for finger in (4, 5):
        shutil.copy(generated[finger, 1], tmp_path / "data/DB9" / f"{finger}_1.png")
    said = command(
        "evaluate", "--checkpoint", pipeline.module1, "--dataset_root", tmp_path / "data", "--out", "out", cwd=tmp_path
    )
    assert said.code == 0, said
    assert "Not evaluated, without genuine or without impostor pairs: DB9" in said.out
    assert list(json.loads((tmp_path / "out/metrics.json").read_text())["databases"]) == ["DB1"]
