"""A finger is one finger, of one database and on one side of the split, wherever its prints lie and however spelled."""

import shutil
import unicodedata
from collections import defaultdict
from pathlib import Path

import pytest

from ifvit.data.parts import kind_of
from ifvit.data.sources import read, read_root, read_roots
from ifvit.data.split import split_by_finger
from ifvit.errors import UserError


def grow(root: Path, *names: str) -> Path:
    """Files of those names, each with other bytes."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def fingers(prints) -> dict[str, dict[str, int]]:
    """How many prints each finger has, by database."""
    count = defaultdict(lambda: defaultdict(int))
    for p in prints:
        count[p.database][p.finger] += 1
    return {database: dict(some) for database, some in count.items()}


@pytest.mark.parametrize(
    "kind, names",
    [
        (
            "part",
            "train Training train_set trainset test-data Validation val dev eval gallery probe Probes query "
            "enroll Enrolment fold_3 images_test",
        ),
        ("session", "first_session session2 Session-B 2nd_session day1 visit_3"),
        ("condition", "wet Dry normal wet_fingers dry-skin dirty low_pressure high-quality"),
        ("sensor", "sensor1 device_A optical capacitive contactless contact-based smartphone"),
        ("", "101 DB1_A FVC2002 anna left_index CrossMatch Real images png training-notes S155 latest contest protest"),
    ],
)
def test_folders_that_hold_the_same_fingers_again_are_known_by_their_names(kind, names):
    assert {name: kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


@pytest.mark.parametrize(
    "place",
    [
        "Training/{f}/{f}_{i}.png",
        "{f}/Training/{f}_{i}.png",
        "Training/wet/{f}/{f}_{i}.png",
        "{f}/session1/dry/{f}_{i}.png",
        "gallery/{f}_{i}.png",
        "sensor1/session2/enroll/finger_0{f}/{f}_{i}.png",
        "{f}/{f}_{i}.png",
        "{f}_{i}.png",
    ],
)
def test_fvc_names_are_of_the_same_fingers_in_every_folder(tmp_path, place):
    grow(
        tmp_path / "mine",
        *(place.format(f=f, i=i) for f in (1, 2, 3, 4) for i in (1, 2)),
        *(f"probe/normal/{f}_3.png" for f in (1, 2, 3, 4)),
    )
    assert fingers(read_root(tmp_path / "mine")) == {"mine": {"1": 3, "2": 3, "3": 3, "4": 3}}


@pytest.mark.parametrize(
    "name, finger",
    [
        ("{part}/012/012_3_{i}.tif", "012_3"),
        ("012/{part}/3/012_3_{i}.tif", "012_3"),
        ("{part}/007/L/007_L3_{i}.bmp", "007_L3"),
        ("007/{part}/007_L3_{i}.bmp", "007_L3"),
        ("{part}/SOCOFing/Altered/Altered-Easy/7__F_Left_ring_finger_CR.BMP", "7_left_ring"),
        ("SOCOFing/Real/{part}/7/7__F_Left_ring_finger.BMP", "7_left_ring"),
        ("{part}/3/{i}_10001_Left_Index.bmp", "10001_left_index"),
        ("Task1/{part}/Contactbased/10001/{i}_10001_Left_Index.bmp", "10001_left_index"),
        ("{part}/FVC2004/DB1_A/12_{i}.tif", "12"),
        ("FVC2004/DB1_A/{part}/12_{i}.tif", "12"),
        ("{part}/sd302a/images/challengers/A/roll/png/00002222_A_roll_10.png", "00002222_10"),
    ],
)
def test_parts_of_any_known_set_hold_the_same_finger(tmp_path, name, finger):
    prints = read_root(grow(tmp_path, *(name.format(part=part, i=i) for part, i in (("train", 1), ("Validation", 2)))))
    assert len(prints) == 2 and {p.finger for p in prints} == {finger} and len({p.database for p in prints}) == 1


def test_the_database_is_named_by_its_own_folder_whatever_stands_between(tmp_path):
    grow(
        tmp_path,
        *(
            f"{part}/{db}/{f}_{i}.tif"
            for part, i in (("train", 1), ("val", 2))
            for db in ("DB1_B", "DB2_B")
            for f in (101, 102)
        ),
    )
    assert fingers(read_root(tmp_path)) == {db: {"101": 2, "102": 2} for db in ("DB1_B", "DB2_B")}


@pytest.mark.parametrize("roots", [["."], ["train", "val"], ["val", "train/1", "train/2"], ["train", "."]])
def test_it_does_not_matter_which_folders_of_a_set_are_given(tmp_path, roots):
    grow(tmp_path / "mine", *(f"{part}/{f}/{f}_{i}.png" for part, i in (("train", 1), ("val", 2)) for f in (1, 2)))
    assert fingers(read_roots([tmp_path / "mine" / root for root in roots])) == {"mine": {"1": 2, "2": 2}}


def test_each_finger_of_a_set_in_parts_is_on_one_side_of_the_split(tmp_path):
    grow(
        tmp_path,
        *(f"{part}/{f}/{f}_{i}.png" for part, i in (("train", 1), ("test", 2), ("val", 3)) for f in range(1, 41)),
    )
    train, held_out = split_by_finger(read_root(tmp_path), 0.3, 0)
    assert len(held_out) == 36 and not {p.finger for p in train} & {p.finger for p in held_out}


def test_names_are_compared_in_one_normal_form_and_opened_as_they_are(tmp_path):
    names = ("ngón-cái", "Köln", "é")
    for part, form in (("train", "NFC"), ("val", "NFD")):
        grow(tmp_path, *(unicodedata.normalize(form, f"Zürich/{part}/{name}/{part}.png") for name in names))
    prints = read_root(tmp_path)
    assert fingers(prints) == {"Zürich": dict.fromkeys(names, 2)}
    assert all(Path(p.path).is_file() for p in prints)
    assert len({p.path for p in prints}) == 6


def test_a_file_is_looked_into_by_the_name_that_it_has_on_the_disk(tmp_path):
    folder = unicodedata.normalize("NFD", "é")
    prints = read_root(
        grow(tmp_path, f"{folder}/Real/7__F_Left_ring_finger.BMP", f"{folder}/Real/8__F_Left_ring_finger.BMP")
    )
    assert fingers(prints) == {"é": {"7_left_ring": 1, "8_left_ring": 1}}


def test_a_folder_and_its_other_spelling_hold_different_prints_of_a_finger(tmp_path, caplog):
    grow(tmp_path, *(unicodedata.normalize(form, f"{name}/1.png") for form in ("NFC", "NFD") for name in ("é", "ü")))
    assert fingers(read_root(tmp_path)) == {tmp_path.name: {"é": 2, "ü": 2}}
    assert "2 files are named as another impression" in caplog.text


def test_a_print_that_lies_in_two_parts_is_one_impression(tmp_path, caplog):
    grow(tmp_path / "mine", *(f"train/{f}/{f}_{i}.png" for f in (1, 2) for i in (1, 2)))
    shutil.copytree(tmp_path / "mine/train/1", tmp_path / "mine/val/1")
    reading = read([tmp_path / "mine"])
    assert fingers(reading.prints) == {"mine": {"1": 2, "2": 2}}
    assert [x.reason for x in reading.left_out] == [
        "further copy of an impression"
    ] * 2 and "2 files left out: further copies" in caplog.text


def test_where_parts_could_be_of_other_fingers_it_is_said_what_they_are_taken_for(tmp_path, caplog):
    read_root(grow(tmp_path, *(f"{part}/1_{i}.png" for part, i in (("train", 1), ("train", 2), ("val", 3)))))
    assert not caplog.text  # no impression's name comes twice
    read_root(grow(tmp_path, "val/1_1.png"))
    assert (
        "1 prints have the same name in two parts" in caplog.text
        and "taken for the same fingers" in caplog.text
        and "--names" in caplog.text
    )


def test_sensors_are_said_to_be_taken_for_sensors_of_the_same_fingers(tmp_path, caplog):
    prints = read_root(grow(tmp_path / "mine", *(f"{s}/{f}_1.png" for s in ("optical", "thermal") for f in (1, 2))))
    assert fingers(prints) == {"mine": {"1": 2, "2": 2}} and "optical and thermal are taken for sensors" in caplog.text


def test_folders_that_are_fingers_though_all_files_are_called_alike(tmp_path, caplog):
    prints = read_root(
        grow(tmp_path / "mine", *(f"{name}/1_{i}.png" for name in ("anna", "bert", "carl") for i in (1, 2)))
    )
    assert fingers(prints) == {"mine": {"anna": 2, "bert": 2, "carl": 2}}
    assert "anna/1_1.png are taken for a folder a finger" in caplog.text


def test_folders_that_are_persons_hold_several_fingers(tmp_path, caplog):
    prints = read_root(
        grow(tmp_path / "mine", *(f"{person}/{f}_{i}.png" for person in ("001", "002") for f in (1, 2) for i in (1, 2)))
    )
    assert fingers(prints) == {"mine": {"001_1": 2, "001_2": 2, "002_1": 2, "002_2": 2}}
    assert "taken for PERSON/FINGER_IMPRESSION" in caplog.text


def test_databases_stay_databases_though_each_has_one_finger_of_the_same_number(tmp_path):
    grow(tmp_path, *(f"FVC2002/DB{n}_B/1_{i}.tif" for n in (1, 2, 3, 4) for i in (1, 2)))
    assert fingers(read_root(tmp_path)) == {f"DB{n}_B": {"1": 2} for n in (1, 2, 3, 4)}


HANDS = [(hand, finger) for hand in ("left", "right") for finger in ("index", "thumb")]


@pytest.mark.parametrize(
    "name",
    [
        "{who}/{hand}_{finger}_{i}.png",
        "{who}_{hand}-{finger}{i}.png",
        "{who}/{i}_{who}_{hand}_{finger}.png",
        "train/{who}/{hand}{finger}{i}.png",
        "{who}/{hand}_{finger}/{i}.png",
        "{who}/{hand}/{finger}/{i}.png",
        "session{i}/{who}_{hand} {finger}.png",
    ],
)
def test_hands_and_fingers_in_words_are_fingers_of_persons_and_it_is_said(tmp_path, caplog, name):
    names = [
        name.format(who=who, hand=hand, finger=finger, i=i)
        for who in ("101", "102")
        for hand, finger in HANDS
        for i in "12"
    ]
    prints = read_root(grow(tmp_path / "mine", *names))
    assert fingers(prints) == {
        "mine": {f"{who}_{hand}_{finger}": 2 for who in ("101", "102") for hand, finger in HANDS}
    }
    assert "are taken for PERSON" in caplog.text or "names tell hand and finger" in caplog.text


def test_words_that_do_not_tell_the_person_are_refused_with_the_remedy(tmp_path):
    names = [f"{a}_{b}_left_{finger}.png" for a in ("x", "y") for b in ("p", "q") for finger in ("index", "thumb")]
    with pytest.raises(UserError, match=r"which of the words .* is the person is not known.*--names '\{subject\}"):
        read_root(grow(tmp_path, *names))


def test_a_person_before_the_session_is_no_session_of_ridgebase(tmp_path):
    names = [f"{who}_{session}_Left_Index.png" for who in (10001, 10002) for session in (1, 2)]
    with pytest.raises(UserError, match="--names"):
        read_root(grow(tmp_path / "flat", *names))
    grow(tmp_path / "mine", *(f"{name[:5]}/{name}" for name in names))
    assert fingers(read_root(tmp_path / "mine")) == {"mine": {"10001_left_index": 2, "10002_left_index": 2}}


def test_ridgebases_photographs_are_a_database_beside_its_contact_prints_and_four_fingers_are_none(tmp_path):
    grow(
        tmp_path / "RidgeBase",
        "Task1/Test/Contactbased/1_14493_Left_Index.bmp",
        "Task1/Train/Contactbased/10727/2_10727_Right_Little.bmp",
        "Task1/Test/Contactless/1_Apple_14493_1_LEFT_image_fingerprintSMEG5K05_0.png",
        "Task1/Train/Contactless/1_Google_10727_2_RIGHT_image_fingerprint8GIFPDNU_0.8888496160507202_3.png",
        "Task2/Test/Contactbased/14493/1_14493_Left_Four_Fingers.bmp",
        "Task2/Train/Contactless/10727/1_Apple_10727_1_RIGHT_image_fingerprintDAH28AVI.png",
    )
    reading = read([tmp_path])
    assert fingers(reading.prints) == {
        "RidgeBase": {"14493_left_index": 1, "10727_right_little": 1},
        "Contactless": {"14493_left_0": 1, "10727_right_3": 1},
    }
    assert [x.reason for x in reading.left_out] == ["a slap or a palm"] * 2
    assert reading.layouts == {"RidgeBase": "RidgeBase", "Contactless": "RidgeBase contactless"}


@pytest.mark.parametrize(
    "name, finger, impression",
    [
        ("f0000012.wsq", "0000012", "f"),
        ("S0000012.png", "0000012", "s"),
        ("G043L2U.bmp", "G043", "l"),
        ("g043T2U.bmp", "G043", "t"),
    ],
)
def test_nists_pairs_of_two_files_are_of_one_finger(tmp_path, name, finger, impression):
    (p,) = read_root(grow(tmp_path, name))
    assert (p.finger, p.impression) == (finger, impression)


def test_fingers_that_differ_in_case_or_zeros_alone_are_told(tmp_path, caplog):
    read_root(grow(tmp_path, "train/07/a.png", "val/7/b.png"))
    assert "07 and 7 are taken for different fingers" in caplog.text


@pytest.mark.parametrize(
    "names, told",
    [
        (
            [f"{p}_{s}_{i}.png" for p in (1, 2, 3) for s in (1, 2) for i in (1, 2)],
            "PERSON_FINGER_IMPRESSION; where the number in the middle",
        ),
        (
            [f"{p:03d}_{f}.png" for p in (1, 2, 3) for f in range(1, 11)],
            r"FINGER_IMPRESSION, ten of each; where they are a person's ten fingers",
        ),
        (
            [f"{i}_{f}.png" for i in (1, 2) for f in range(1, 31)],
            "FINGER_IMPRESSION, 2 fingers; where it is the other way round",
        ),
        ([f"{p}_{f}_{i}.png" for p in (1, 2) for f in (3, 4) for i in (1, 2)], ""),
        ([f"{f}_{i}.png" for f in range(10) for i in range(8)], ""),
    ],
)
def test_numbers_that_could_be_something_else_are_said_to_be_taken_for_what(tmp_path, caplog, names, told):
    read_root(grow(tmp_path, *names))
    assert told in caplog.text and ("--names" in caplog.text) == bool(told)
