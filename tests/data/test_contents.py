"""The same prints are the same data, whatever their folders are called; and a checkpoint knows them again."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ifvit.config import DenseConfig, preset
from ifvit.data import gather
from ifvit.data.contents import data_digest, in_order_of_contents, known, sample
from ifvit.data.pairs import class_labels
from ifvit.data.sources import SYNTHETIC, Print, read_root, read_roots
from ifvit.data.split import split_by_finger


def grow(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def files(prints) -> set[str]:
    """Names of files, which the trees here have once each."""
    return {Path(p.path).name for p in prints}


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two databases of 12 and 9 fingers."""
    return grow(
        tmp_path / "prints",
        *(
            f"{db}/{f}_{i}.png"
            for db, first, last in (("optical-set", 1, 12), ("swipe-set", 101, 109))
            for f in range(first, last + 1)
            for i in (1, 2)
        ),
    )


def renamed(tree: Path) -> Path:
    """The same files at another place, their databases' names in another order, one of them in parts."""
    other = tree.parent / "input/owner/slug"
    shutil.copytree(tree / "optical-set", other / "z" / "train")
    shutil.copytree(tree / "swipe-set", other / "a")
    (other / "z/val").mkdir()
    for file in sorted((other / "z/train").iterdir())[::3]:
        file.rename(other / "z/val" / file.name)
    return other


def test_renamed_and_nested_otherwise_it_is_the_same_data_with_the_same_fingers_held_out(tree):
    here, there = read_root(tree), read_root(renamed(tree))
    assert data_digest(here) == data_digest(there)
    assert files(split_by_finger(here, 0.3, 0)[1]) == files(split_by_finger(there, 0.3, 0)[1])
    assert data_digest(here) != data_digest(here[:-1])


def test_two_databases_of_the_same_names_are_not_the_same_data(tree):
    prints = read_root(tree / "optical-set")
    digest = data_digest(prints)
    Path(prints[0].path).write_text("another print")
    assert data_digest(prints) != digest
    assert data_digest(read_root(tree)) != data_digest([replace(p, database="one") for p in read_root(tree)])


def test_classes_and_the_order_of_prints_do_not_depend_on_databases_names(tree):
    here, there = (in_order_of_contents(read_root(root)) for root in (tree, renamed(tree)))
    labels = [{Path(p.path).name: class_labels(prints)[p.identity] for p in prints} for prints in (here, there)]
    assert labels[0] == labels[1] and set(labels[0].values()) == set(range(21))


def test_small_databases_with_fingers_of_the_same_names_do_not_all_hold_out_the_same_one():
    prints = [Print("", f"person{n}", f, str(i), None) for n in range(20) for f in ("1", "2") for i in range(2)]
    out = {p.identity for p in split_by_finger(prints, 0.5, 0)[1]}
    assert len(out) == 20 and 3 < len({database for database, finger in out if finger == "1"}) < 17


def test_generated_prints_are_split_and_known_as_ever():
    """Runs on them that were begun before are gone on with: the digests are of the names alone."""
    prints = [Print("", SYNTHETIC, str(f), str(i), 500.0) for f in range(1, 31) for i in (1, 2)]
    names = sorted((p.database, p.finger, p.impression) for p in prints)
    assert data_digest(prints) == hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    ranked = sorted({p.finger for p in prints}, key=lambda f: hashlib.sha256(f"7\0synthetic\0{f}".encode()).digest())
    assert {p.finger for p in split_by_finger(prints, 0.1, 7)[1]} == set(ranked[:3])
    assert class_labels(prints) == {(SYNTHETIC, f): k for k, f in enumerate(sorted(str(f) for f in range(1, 31)))}


def test_prints_that_were_trained_on_are_known_under_another_folder(tree):
    train, held_out = split_by_finger(read_root(tree), 0.3, 0)
    other = read_root(renamed(tree))
    met = files(known(sample(train), other))
    assert met and met <= files(train) and {p.database for p in known(sample(train), other)} == {"z", "a"}
    assert not known(sample(train), held_out) and not known([], other)
    assert sample([replace(p, database=SYNTHETIC) for p in train]) == []


def test_a_sample_of_many_databases_stays_small(tmp_path):
    prints = read_root(grow(tmp_path, *(f"DB{n}_A/{f}_1.png" for n in range(1, 101) for f in range(30))))
    digests = sample(prints)
    assert len(digests) == 2000 and len({p.database for p in known(digests, prints)}) == 100


def test_hosts_may_have_the_data_under_other_names(tree):
    other = tree.parent / "elsewhere"
    shutil.copytree(tree / "optical-set", other / "z")
    shutil.copytree(tree / "swipe-set", other / "a")
    config = preset("smoke", DenseConfig)
    here, there = (gather.read_prints(config.replace(dataset_root=(str(root),))).prints for root in (tree, other))
    assert gather.listing(here) == gather.listing(there)
    assert gather.listing(here) != gather.listing(here[:-1])


def test_evaluation_on_prints_that_were_trained_on_is_said_whatever_their_folder_is_called(tree, caplog):
    from ifvit.evaluate import warn_of_known_prints

    train, held_out = split_by_finger(read_root(tree), 0.3, 0)
    with caplog.at_level(logging.WARNING, "ifvit"):
        warn_of_known_prints(("/gone/prints",), sample(train), (str(tree),), held_out)
        assert not caplog.text
        warn_of_known_prints(("/gone/prints",), sample(train), (str(tree),), read_roots([renamed(tree)]))
    assert "The checkpoint was trained on prints of /gone/prints" in caplog.text
