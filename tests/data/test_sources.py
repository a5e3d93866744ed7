"""Every set's files are known by their names, and identity is the finger."""

import hashlib
import logging
import os
import struct
from collections import Counter
from pathlib import Path

import pytest

from cluster.host import Host
from ifvit.config import MatchConfig, preset
from ifvit.data.gather import gather, overlap
from ifvit.data.sources import (
    SYNTHETIC,
    Print,
    read_root,
    read_roots,
)
from ifvit.data.split import drop_duplicates, require_fingers, split_by_finger
from ifvit.errors import UserError


def grow(root: Path, *names: str) -> Path:
    """Files of those names, each with bytes of its own; reading never decodes them."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(os.fsencode(path)).digest())
    return root


def only(prints: list[Print]) -> Print:
    (one,) = prints
    return one


@pytest.mark.parametrize(
    "name, database, finger, impression, ppi",
    [
        ("FVC2004/DB1_A/12_3.tif", "DB1_A", "12", "3", None),
        ("FVC2004/DB3_B/102_3.tif", "DB3_B", "102", "3", 512),
        ("FVC2006/Dbs/DB1_A/12_3.bmp", "DB1_A", "12", "3", 250),
        ("FVC2006/DB2_A/12_3.BMP", "DB2_A", "12", "3", 569),
        ("FVC2006/DB3_A/12_3.BMP", "DB3_A", "12", "3", None),
        ("FVC2002/DB2_A/101_8.tif", "DB2_A", "101", "8", 569),
        ("fvc2002/extra/Db2_b/101_8.tif", "Db2_b", "101", "8", 569),
        ("FVC2002/DB1_B/101_8.tif", "DB1_B", "101", "8", None),
        ("d/FVC2002_DB2_A/101_8.tif", "FVC2002_DB2_A", "101", "8", 569),
        ("fvc2002-fingerprints/DB2_B/101_8.tif", "DB2_B", "101", "8", 569),
        ("fvc-2006/DB1_A/images/1_8.bmp", "images", "1", "8", 250),
        ("FVC2004/DB3_A_png/1_8.png", "DB3_A_png", "1", "8", 512),
        ("FVC2002/DB2_A_500ppi/1_8.png", "DB2_A_500ppi", "1", "8", None),
        ("PolyU_HRF/DBII/7_2_5.jpg", "DBII", "7", "2_5", 1200),
        ("my polyu-hrf set/some/7_2_5.jpg", "some", "7", "2_5", 1200),
        ("CASIA-FingerprintV5/007/L/007_L3_4.bmp", "CASIA-FingerprintV5", "007_L3", "4", None),
        ("cross/first_session/7_1.jpg", "cross", "7", "first_session_1", None),
        ("CrossMatch/012_3_4.TIFF", "CrossMatch", "012_3", "4", None),
        ("SOCOFing/Real/7__F_Left_ring_finger.BMP", "SOCOFing", "7_left_ring", "real", 175),
        ("sd04/figs_0/f0001_07.png", "sd04", "0001", "f", None),
        ("sd04/png_txt/figs_7/s1999_02.png", "sd04", "1999", "s", None),
        ("sd300a/500/png/roll/00001000_roll_500_03.png", "sd300", "00001000_03", "roll", 500),
        ("sd300a/1000/png/plain/00001000_plain_1000_11.png", "sd300", "00001000_01", "plain_thumb", 1000),
        ("sd300a/1000/png/plain/00001000_plain_1000_12.png", "sd300", "00001000_06", "plain_thumb", 1000),
        (
            "sd301/friction-ridge/N/500/slap-segmented/png/00002222_1_N_500_slap-segmented_07.png",
            "sd301",
            "00002222_07",
            "1_N_slap-segmented",
            500,
        ),
        ("sd302/images/challengers/A/roll/png/00002222_A_roll_10.png", "sd302", "00002222_10", "A_roll", None),
        ("mine/anna-left-index/first.jpg", "mine", "anna-left-index", "first", None),
        ("mine/2/1.wsq", "mine", "2", "1", None),
    ],
)
def test_a_name_says_database_finger_impression_and_ppi(tmp_path, name, database, finger, impression, ppi):
    grow(tmp_path / "top", name)
    p = only(read_root(tmp_path / "top"))
    assert p == Print(str(tmp_path / "top" / name), database, finger, impression, ppi)
    assert p.identity == (database, finger)


@pytest.mark.parametrize(
    "name, subject",
    [
        ("CASIA-FingerprintV5/007/L/007_L3_4.bmp", "007"),
        ("CrossMatch/012_3_4.tif", "012"),
        ("SOCOFing/Real/7__F_Left_ring_finger.BMP", "7"),
        ("sd300a/500/png/roll/00001000_roll_500_03.png", "00001000"),
        ("sd302/images/challengers/A/roll/png/00002222_A_roll_10.png", "00002222"),
        ("RidgeBase/Task1/1_1234_Left_Index.png", "1234"),
        ("mine/anna/left_index_1.png", "anna"),
        ("FVC2002/DB1_B/101_8.tif", ""),
    ],
)
def test_a_name_says_whose_finger_it_is(tmp_path, name, subject):
    grow(tmp_path / "top", name)
    p = only(read_root(tmp_path / "top"))
    assert p.subject == subject and p.finger.startswith(subject)


def test_the_same_file_has_the_same_identity_from_whatever_root(tmp_path):
    grow(tmp_path, "sd300a/500/png/roll/00001000_roll_500_03.png")
    below = [tmp_path / "sd300a", tmp_path / "sd300a/500", tmp_path / "sd300a/500/png/roll"]
    assert {only(read_root(r)).identity for r in below} == {("sd300", "00001000_03")}


def test_the_parts_of_a_nist_set_are_of_the_same_fingers(tmp_path):
    grow(
        tmp_path,
        *(f"sd302a/images/challengers/{d}/roll/png/00002222_{d}_roll_{n:02d}.png" for d in "AB" for n in range(1, 11)),
        *(f"sd302b/images/baseline/R/500/slap/png/00002222_R_500_slap-segmented_{n:02d}.png" for n in range(1, 11)),
    )
    count = Counter(p.identity for p in read_root(tmp_path))
    assert len(count) == 10 and set(count.values()) == {3}
    grow(
        tmp_path / "cards",
        "sd300a/500/png/roll/00001000_roll_500_03.png",
        "sd300b/1000/png/roll/00001000_roll_1000_03.png",
    )
    assert only(read_root(tmp_path / "cards")).ppi == 500  # one impression


def test_links_that_lead_nowhere_are_left_out_and_one_is_named(tmp_path, caplog):
    grow(tmp_path, "1/a.png", "2/a.png")
    (tmp_path / "2/b.png").symlink_to(tmp_path / "annex")
    assert len(read_root(tmp_path)) == 2
    assert "1 links lead nowhere" in caplog.text and "b.png" in caplog.text


def test_names_need_not_be_utf_8(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "ifvit")  # pytest cannot pass such names on
    odd = os.fsdecode(b"m\xfcller")
    grow(tmp_path, *(f"{odd}{n}/{i}.png" for n in range(4) for i in range(2)))
    train, held = split_by_finger(read_root(tmp_path), 0.5, 0)
    assert len(train) == len(held) == 4


def test_a_folder_within_others_is_no_finger(tmp_path):
    grow(tmp_path, "a/stray.png", "a/1/1.png", "a/2/1.png")
    assert {p.finger for p in read_root(tmp_path)} == {"1", "2"}


def test_a_persons_fingers_are_ten_identities(tmp_path):
    names = [
        f"SOCOFing/Real/1__M_{h}_{f}_finger.BMP"
        for h in ("Left", "Right")
        for f in ("thumb", "index", "middle", "ring", "little")
    ]
    assert len({p.identity for p in read_root(grow(tmp_path, *names))}) == 10


def test_devices_and_captures_are_impressions_of_one_finger(tmp_path):
    grow(
        tmp_path,
        *(f"sd302/challengers/{d}/roll/png/00002222_{d}_roll_02.png" for d in "ABC"),
        *(f"sd300/500/png/{c}/00001000_{c}_500_02.png" for c in ("roll", "plain")),
    )
    count = Counter(p.identity for p in read_root(tmp_path))
    assert count == {("sd302", "00002222_02"): 3, ("sd300", "00001000_02"): 2}


def test_sessions_and_parts_of_a_tree_hold_the_same_fingers(tmp_path):
    grow(tmp_path, *(f"{s}_session/{f}_{i}.jpg" for s in ("first", "second") for f in "12" for i in "12"))
    assert {k: len(v) for k, v in by_finger(read_root(tmp_path)).items()} == {"1": 4, "2": 4}
    grow(tmp_path / "tree", *(f"{part}/{f}/{i}.png" for part in ("train", "val") for f in "12" for i in "ab"))
    assert {k: len(v) for k, v in by_finger(read_root(tmp_path / "tree")).items()} == {"1": 4, "2": 4}
    assert {p.database for p in read_root(tmp_path / "tree/val")} == {"tree"}  # from whatever root
    grow(tmp_path / "below", *(f"7/session{s}/{i}.png" for s in "12" for i in "ab"), "8/session1/a.png")
    assert {k: len(v) for k, v in by_finger(read_root(tmp_path / "below")).items()} == {"7": 4, "8": 1}


def test_latents_beside_a_nist_set_are_no_finger_of_their_folder(tmp_path):
    grow(
        tmp_path,
        "sd302a/images/challengers/A/roll/png/00002222_A_roll_02.png",
        *(f"sd302e/images/latent/png/00002304/00002304_1C_R_L0{n}_BP_S22_1200PPI_8BPC_1CH_LP03_1.png" for n in "12"),
    )
    assert only(read_root(tmp_path)).finger == "00002222_02"


def test_dates_are_no_fingers(tmp_path):
    grow(tmp_path, "mine/index/20230101_120000.png", "mine/index/20230102_093000.png", "mine/thumb/20230101_120010.png")
    assert {k: len(v) for k, v in by_finger(read_root(tmp_path)).items()} == {"index": 2, "thumb": 1}


def test_folders_taken_for_fingers_are_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ifvit"):
        read_root(grow(tmp_path, "a/x.png", "a/y.png", "b/x.png", "@eaDir/x.png/THUMB.jpg"))
    assert "3 files tell no finger, so each of their 2 folders" in caplog.text


def test_a_folder_called_synthetic_is_not_taken_for_generated_prints(tmp_path):
    grow(tmp_path / "synthetic", "1_1.png", "2_1.png")
    assert {p.database for p in read_root(tmp_path / "synthetic")} == {f"{tmp_path.name}/synthetic"} != {SYNTHETIC}


def test_generated_prints_of_which_no_pair_would_be_drawn_are_refused(tmp_path):
    config = preset("smoke", MatchConfig).replace(dataset_root=(SYNTHETIC, str(grow(tmp_path, "1_1.png", "2_1.png"))))
    with pytest.raises(UserError, match="synthetic_share is 0"):
        gather(config, Host())


def by_finger(prints: list[Print]) -> dict[str, list[Print]]:
    return {f: [p for p in prints if p.finger == f] for f in sorted({p.finger for p in prints})}


def test_slaps_and_palms_are_left_out(tmp_path):
    grow(
        tmp_path,
        "sd300/500/png/plain/00001000_plain_500_13.png",
        "sd300/500/png/plain/00001000_plain_500_14.png",
        "sd301/friction-ridge/P/500/palm/png/00002222_1_P_500_palm_25.png",
        "sd301/friction-ridge/P/500/slap/png/00002222_1_P_500_slap_13.png",
    )
    with pytest.raises(UserError, match="4 files: 4 .png"):
        read_root(tmp_path)
    grow(tmp_path, "sd300/500/png/plain/00001000_plain_500_12.png")
    assert only(read_root(tmp_path)).finger == "00001000_06"


def test_one_card_at_two_ppi_is_one_impression(tmp_path, caplog):
    grow(tmp_path, *(f"sd300/{r}/png/roll/00001000_roll_{r}_02.png" for r in (2000, 500, 1000)))
    assert only(read_root(tmp_path)).ppi == 500
    assert "2 files left out" in caplog.text


def test_alterations_share_the_real_prints_identity(tmp_path):
    grow(
        tmp_path,
        "SOCOFing/Real/7__F_Left_ring_finger.BMP",
        "SOCOFing/Altered/Altered-Easy/7__F_Left_ring_finger_CR.BMP",
        "SOCOFing/Altered/Altered-Hard/7__F_Left_ring_finger_CR.BMP",
    )
    prints = read_root(tmp_path)
    assert {p.identity for p in prints} == {("SOCOFing", "7_left_ring")}
    assert {p.impression: p.altered for p in prints} == {
        "real": False,
        "altered-easy_cr": True,
        "altered-hard_cr": True,
    }


def test_a_wide_socofing_print_is_not_at_175_ppi(tmp_path):
    path = grow(tmp_path, "Real/7__F_Left_ring_finger.BMP") / "Real/7__F_Left_ring_finger.BMP"
    path.write_bytes(b"BM" + bytes(16) + struct.pack("<ii", 241, 298))
    assert only(read_root(tmp_path)).ppi is None


def test_a_given_ppi_overrides_the_sets(tmp_path):
    grow(tmp_path, "FVC2002/DB2_A/1_1.tif", "FVC2002/DB1_A/1_1.tif")
    assert {p.ppi for p in read_root(tmp_path, ppi=1000)} == {1000}


def test_databases_of_equal_name_stay_apart(tmp_path):
    grow(tmp_path, *(f"FVC200{y}/DB{n}_B/1_1.tif" for y in (0, 2) for n in (1, 2)), "FVC2002/DB4_B/1_1.tif")
    one = read_root(tmp_path / "FVC2002")
    assert [p.database for p in one] == ["DB1_B", "DB2_B", "DB4_B"]
    two = read_roots([tmp_path / "FVC2002", tmp_path / "FVC2000"])
    assert [p.database for p in two] == [
        "FVC2000/DB1_B",
        "FVC2000/DB2_B",
        "FVC2002/DB1_B",
        "FVC2002/DB2_B",
        "FVC2002/DB4_B",
    ]


def test_a_file_reached_twice_counts_once(tmp_path):
    grow(tmp_path, "FVC/DB1/1_1.tif", "FVC/DB1/1_2.tif")
    (tmp_path / "again").symlink_to(tmp_path / "FVC")
    roots = [tmp_path / "FVC", tmp_path / "FVC/DB1", str(tmp_path / "again")]
    assert len(read_roots(roots)) == 2


def test_a_loop_of_links_ends(tmp_path):
    grow(tmp_path, "DB1/1_1.tif")
    (tmp_path / "DB1/up").symlink_to(tmp_path)
    assert len(read_root(tmp_path)) == 1


def test_prints_come_in_natural_order(tmp_path):
    grow(tmp_path, *(f"DB{d}/{f}_{i}.png" for d in (10, 2) for f in (10, 9) for i in (10, 2)))
    assert [(p.database, p.finger, p.impression) for p in read_root(tmp_path)] == [
        (f"DB{d}", f, i) for d in (2, 10) for f in ("9", "10") for i in ("2", "10")
    ]


def test_hidden_files_and_other_files_are_no_prints(tmp_path, caplog):
    grow(
        tmp_path,
        "DB1/1_1.tif",
        "DB1/._1_2.tif",
        "__MACOSX/DB1/1_3.tif",
        "DB1/Thumbs.db",
        "DB1/notes.txt",
        ".cache/9_9.png",
    )
    assert only(read_root(tmp_path)).impression == "1"
    assert not caplog.text


def test_names_that_do_not_fit_are_left_out_and_told(tmp_path, caplog):
    grow(tmp_path, "DB1/1_1.tif", "DB1/1_2.tif", "DB1/1_1 (copy).tif", "DB1/1_2_3.tif", "misc/photo.png")
    with caplog.at_level(logging.WARNING, "ifvit"):
        assert len(read_root(tmp_path)) == 2
    assert "3 files left out" in caplog.text and "1_1 (copy).tif" in caplog.text


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "is empty"),
        (["a.txt", "b.txt", "c.csv"], "3 files: 2 .txt, 1 .csv"),
        (["IMG 1.jpg", "a.txt"], "names such as IMG 1.jpg"),
    ],
)
def test_a_root_without_prints_is_a_users_error(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        read_root(grow(tmp_path, *names))


def test_a_root_that_is_missing_or_a_file_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere"):
        read_root(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        read_root(grow(tmp_path, "1_1.tif") / "1_1.tif")


def prints_of(database: str, fingers: int) -> list[Print]:
    return [Print("", database, str(f), str(i), None) for f in range(fingers) for i in range(2)]


def test_no_finger_is_on_both_sides_and_every_database_gives_some():
    prints = prints_of("A", 40) + prints_of("B", 5) + prints_of("C", 3)
    train, held = split_by_finger(prints, 0.1, seed=0)
    assert len(train) + len(held) == len(prints)
    assert not {p.identity for p in train} & {p.identity for p in held}
    fingers = Counter(database for database, _ in {p.identity for p in held})
    assert fingers == {"A": 4, "B": 2}


def test_the_split_depends_on_the_seed_and_not_on_order_or_other_databases():
    prints = prints_of("DB1", 40)
    held = {p.finger for p in split_by_finger(prints, 0.2, 1)[1]}
    assert held == {p.finger for p in split_by_finger(prints[::-1], 0.2, 1)[1]}
    assert held != {p.finger for p in split_by_finger(prints, 0.2, 2)[1]}
    more = prints_of("FVC2000/DB1", 40) + prints_of("FVC2002/DB1", 9)
    assert held == {p.finger for p in split_by_finger(more, 0.2, 1)[1] if p.database == "FVC2000/DB1"}


def test_small_databases_are_split_together_and_nothing_is_held_out_at_zero():
    prints = [p for n in range(10) for p in prints_of(f"person{n}", 1)]
    train, held = split_by_finger(prints, 0.1, 0)
    assert len({p.identity for p in held}) == 2
    assert split_by_finger(prints, 0, 0) == (prints, [])
    with pytest.raises(ValueError):
        split_by_finger(prints, 1.0, 0)


def test_equal_bytes_under_different_fingers_stay_once(tmp_path):
    grow(tmp_path, "DB/1_1.tif", "DB/1_2.tif", "DB/2_1.tif", "DB/2_2.tif")
    for name in ("1_2", "2_2"):
        (tmp_path / f"DB/{name}.tif").write_bytes((tmp_path / "DB/1_1.tif").read_bytes())
    kept, dropped = drop_duplicates(read_root(tmp_path))
    assert [(p.finger, p.impression) for p in kept] == [("1", "1"), ("1", "2"), ("2", "1")]
    assert [(p.finger, p.impression) for p in dropped] == [("2", "2")]


def test_a_databases_prints_do_not_depend_on_copies_in_another(tmp_path):
    grow(tmp_path, "DB/1_1.tif", "DB/2_1.tif")
    (tmp_path / "A").mkdir()
    (tmp_path / "A/9_9.tif").write_bytes((tmp_path / "DB/1_1.tif").read_bytes())
    (tmp_path / "DB/3_1.tif").write_bytes((tmp_path / "DB/2_1.tif").read_bytes())
    assert [p.finger for p in drop_duplicates(read_root(tmp_path), across=False)[1]] == ["3"]
    assert [p.finger for p in drop_duplicates(read_root(tmp_path))[1]] == ["1", "3"]


def test_roots_that_share_prints_are_known_whatever_their_paths(tmp_path, monkeypatch):
    grow(tmp_path, "a/1_1.tif", "b/1_1.tif")
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    for shared in ("a", "./a/", str(tmp_path / "a"), "link", ".", "b/../a"):
        assert overlap(["b/none", "a"], [shared])
    assert not overlap(["a"], ["b", SYNTHETIC]) and overlap([SYNTHETIC], ["b", SYNTHETIC])
    assert overlap(["gs://prints/all"], ["gs://prints/all/DB1"]) and not overlap(
        ["gs://prints/all"], ["gs://prints/al"]
    )


def test_one_finger_is_too_few():
    require_fingers(prints_of("A", 2))
    with pytest.raises(UserError, match="one finger, A/0"):
        require_fingers(prints_of("A", 1))
    with pytest.raises(UserError, match="no finger"):
        require_fingers([])


@pytest.mark.skipif("IFVIT_TEST_DATA" not in os.environ, reason="needs IFVIT_TEST_DATA")
def test_the_sets_at_hand_are_read_as_their_readme_counts_them():
    prints = read_root(os.environ["IFVIT_TEST_DATA"])
    count = Counter(p.database for p in prints)
    fingers = Counter(database for database, _ in {p.identity for p in prints})
    fvc = [f"FVC2000/DB{n}_B" for n in (1, 2, 3)] + [f"FVC2002/DB{n}_B" for n in (1, 2, 3, 4)]
    assert fingers == dict.fromkeys(fvc, 10) | {
        "CrossMatch": 51,
        "SOCOFing": 500,
        "SFinGe": 10,
        "FVC2000_DB4_B": 10,
        "S155": 153,
        "Small40": 40,
        "Ten5": 10,
        "UareU": 26,
    }
    assert count == dict.fromkeys(fvc, 80) | {
        "CrossMatch": 408,
        "SOCOFing": 500,
        "SFinGe": 100,
        "FVC2000_DB4_B": 80,
        "S155": 1208,
        "Small40": 80,
        "Ten5": 50,
        "UareU": 208,
    }
    assert {p.ppi for p in prints if p.database == "FVC2002/DB2_B"} == {569}
