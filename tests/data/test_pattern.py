"""`--names`: whoever knows how their prints are named can say so, and hears where that does not fit."""

from pathlib import Path

import pytest

from ifvit.config import DenseConfig, preset
from ifvit.data.gather import read_prints
from ifvit.data.pattern import Pattern
from ifvit.data.sources import read, read_roots
from ifvit.errors import UserError


def grow(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize(
    "pattern, path, found",
    [
        ("{finger}/{impression}", "anna/1", ("", "anna", "1", "")),
        ("{finger}-{impression}", "7-3-2", ("", "7", "3-2", "")),
        ("{database}/{subject}_{finger}_{impression}", "optical/12_L3_4", ("optical", "12_L3", "4", "12")),
        ("fp_{finger}_*_{impression}", "fp_9_v2_1", ("", "9", "v2_1", "")),
        ("**/{finger}_{impression}", "a/b/5_1", ("", "5", "a_b_1", "")),
        ("**/{finger}_{impression}", "5_1", ("", "5", "1", "")),
        ("{finger}/{finger}_{impression}", "5/5_1", ("", "5", "1", "")),
        ("{finger}/{finger}_{impression}", "5/6_1", None),
        ("{finger}/*", "5/x", ("", "5", "x", "")),
        ("{finger}", "5", ("", "5", "5", "")),
        ("{finger}/{impression}", "a/5/1", None),
        ("{finger}.{impression}", "5x1", None),
        ("{*}-{finger}-{impression}", "s1-5-1", ("", "5", "s1_1", "")),
    ],
)
def test_a_pattern_says_what_is_what_in_a_path(pattern, path, found):
    assert Pattern(pattern).fit(path) == found


@pytest.mark.parametrize(
    "pattern, told",
    [
        ("{finger", "a { without its other brace"),
        ("finger}_{impression}", "a } without its other brace"),
        ("{fingr}_{impression}", r"field \{fingr\} that is not known; known are \{finger\}"),
        ("{impression}", r"no \{finger\}"),
        ("{subject}_{impression}", r"no \{finger\}"),
        ("{finger}{impression}", "nothing between them"),
        ("{finger}*", "nothing between them"),
    ],
)
def test_a_pattern_that_is_none_is_a_users_error(pattern, told):
    with pytest.raises(UserError, match=told):
        Pattern(pattern)


def test_names_that_nobody_knows_are_read_as_the_pattern_says(tmp_path, caplog):
    grow(
        tmp_path,
        *(f"lab/s{s}/P{p}-{f}.png" for s in (1, 2) for p in (1, 2) for f in ("a", "b")),
        "lab/s1/calibration.png",
    )
    reading = read([tmp_path], names="lab/*/P{subject}-{finger}")
    assert sorted((p.finger, p.impression) for p in reading.prints) == [
        (f"{p}_{f}", f"s{s}") for p in "12" for f in "ab" for s in "12"
    ]
    assert [(Path(x.path).name, x.reason) for x in reading.left_out] == [("calibration.png", "does not fit --names")]
    assert "1 files left out, they do not fit --names" in caplog.text and set(reading.layouts.values()) == {"--names"}


def test_a_pattern_goes_before_what_is_known(tmp_path):
    grow(tmp_path, *(f"{f}/{s}_{i}.png" for f in ("x", "y") for s in (1, 2) for i in (1, 2)))
    assert {p.identity for p in read_roots([tmp_path], names="{finger}/{impression}")} == {
        (tmp_path.name, "x"),
        (tmp_path.name, "y"),
    }
    grow(tmp_path / "fvc", "FVC2002/DB2_A/1_1.tif", "FVC2002/DB2_A/2_1.tif")
    assert {
        (p.database, p.ppi) for p in read_roots([tmp_path / "fvc"], names="FVC2002/{database}/{finger}_{impression}")
    } == {("DB2_A", 569)}


def test_databases_of_one_name_in_two_folders_are_one(tmp_path):
    grow(tmp_path, *(f"{root}/optical/{f}-{i}.png" for root, i in (("a", 1), ("b", 2)) for f in (1, 2)))
    prints = read_roots([tmp_path / "a", tmp_path / "b"], names="{database}/{finger}-{impression}")
    assert len({p.identity for p in prints}) == 2 and len(prints) == 4


@pytest.mark.parametrize(
    "pattern, told",
    [
        ("y-{finger}-{impression}", "fits none of the 4 images .* a path below it is 'd/x-1-1'"),
        ("d/x-{finger}-{impression}.png", "without the extension"),
        ("d/{finger}-{impression}", "all 4 prints are of one finger, 'x', such as .*x-1-1.png and .*x-2-2.png"),
    ],
)
def test_a_pattern_that_fits_nothing_or_makes_one_finger_of_all_is_refused_with_an_example(tmp_path, pattern, told):
    with pytest.raises(UserError, match=told):
        read_roots([grow(tmp_path, *(f"d/x-{f}-{i}.png" for f in (1, 2) for i in (1, 2)))], names=pattern)


def test_a_configuration_names_prints_too(tmp_path):
    grow(tmp_path, *(f"x-{f}-{i}.png" for f in (1, 2) for i in (1, 2)))
    config = preset("smoke", DenseConfig).replace(dataset_root=(str(tmp_path),), names="x-{finger}-{impression}")
    assert {p.finger for p in read_prints(config).prints} == {"1", "2"}
    with pytest.raises(UserError, match="all prints are generated"):
        read_prints(config.replace(dataset_root=("synthetic",)))


def test_every_command_that_reads_prints_has_the_flag():
    from ifvit import evaluate, train_all, train_dense, train_match
    from tune import __main__ as tune

    for command in (evaluate, train_all, train_dense, train_match, tune):
        assert "names" in command.Args.__dataclass_fields__
    assert train_dense.Args(names="{finger}/*").common()["names"] == "{finger}/*"
