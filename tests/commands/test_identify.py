"""`enroll`, `identify` and `gallery`: whose finger a print is, by either module, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ifvit.gallery.store import Gallery


@pytest.fixture(scope="module")
def enrolled(command, untrained, prints, tmp_path_factory):
    """A gallery of a Module 1, the first two impressions of six fingers in two databases; its folder's parent."""
    cwd = tmp_path_factory.mktemp("identify")
    for file in sorted(prints.rglob("*_[12].png")):
        there = cwd / "enrol" / file.relative_to(prints)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, there)
    said = command("enroll", cwd / "enrol", "--gallery", "g", "--checkpoint", untrained, cwd=cwd)
    assert said.code == 0 and "12 prints enrolled, 0 were already" in said.out, said
    assert "g has 12 prints of 6 fingers" in said.out and "compared with all" in said.out
    return cwd


def answers(command, cwd, checkpoint, *words):
    said = command("identify", *words, "--gallery", "g", "--checkpoint", checkpoint, "--json", cwd=cwd)
    assert said.code == 0, said
    return json.loads(said.out)


@pytest.mark.run
def test_an_enrolled_print_is_its_own_finger(command, enrolled, untrained):
    probe = enrolled / "enrol/DB2/2_1.png"
    (told,) = answers(command, enrolled, untrained, probe, "--top", 3)
    assert [c["rank"] for c in told["candidates"]] == [1, 2, 3] and told["print"] == str(probe)
    best = told["candidates"][0]
    assert best["finger"] == "DB2/2" and best["print"] == str(probe)
    assert told["fmr"] == pytest.approx(1 - 0.99 ** (1 / 6))  # six fingers may each be taken for nobody's print
    for c in told["candidates"]:
        assert c["decision"] == ("match" if c["score"] >= told["threshold"] else "no match")
    assert len({c["finger"] for c in told["candidates"]}) == 3


def test_probes_of_one_call_are_answered_as_one_by_one(command, enrolled, untrained):
    probes = [enrolled / "enrol" / name for name in ("DB1/1_2.png", "DB2/3_1.png")]
    together = answers(command, enrolled, untrained, *probes, "--batch_size", 4)
    alone = [answers(command, enrolled, untrained, probe, "--batch_size", 4)[0] for probe in probes]
    for one, other in zip(together, alone):
        assert one["print"] == other["print"]
        of = lambda told, key: [c[key] for c in told["candidates"]]
        assert of(one, "print") == of(other, "print")
        np.testing.assert_allclose(of(one, "score"), of(other, "score"), rtol=1e-5)


def test_what_is_enrolled_is_passed_over_and_another_content_is_refused(command, enrolled, untrained, prints):
    words = ("enroll", enrolled / "enrol", "--gallery", "g", "--checkpoint", untrained)
    assert "0 prints enrolled, 12 were already" in command(*words, cwd=enrolled).out
    shutil.copytree(enrolled / "enrol", enrolled / "elsewhere")
    again = command("enroll", enrolled / "elsewhere", *words[2:], cwd=enrolled)
    assert "0 prints enrolled, 12 were already" in again.out
    file = enrolled / "enrol/DB1/1_1.png"
    before = file.read_bytes()
    shutil.copy(prints / "DB1/1_3.png", file)
    said = command(*words, cwd=enrolled)
    assert said.code == 2 and "enrolled with another content; give --replace" in said.err
    assert "1 prints enrolled, 11 were already" in command(*words, "--replace", cwd=enrolled).out
    file.write_bytes(before)
    assert "1 prints enrolled" in command(*words, "--replace", cwd=enrolled).out
    assert "2 templates were of no print" in command("gallery", "compact", "g", cwd=enrolled).out


@pytest.mark.process
def test_hosts_share_the_prints(command, enrolled, untrained, tmp_path, monkeypatch):
    """By two of Ray's workers, which are sent what the files hold, the gallery has the same prints."""
    monkeypatch.setattr("ifvit.enroll.AT_ONCE", 5)
    words = ("enroll", enrolled / "enrol", "--gallery", tmp_path / "g", "--checkpoint", untrained)
    said = command(*words, "--runtime", "ray", "--workers_per_host", 2, cwd=enrolled)
    assert said.code == 0 and "Ray: 2 workers" in said.out and "12 prints enrolled, 0 were already" in said.out, said
    here, there = (Gallery.open(folder).all() for folder in (enrolled / "g", tmp_path / "g"))
    assert sorted(here, key=lambda e: e.name) == sorted(there, key=lambda e: e.name)


@pytest.mark.run
def test_a_person_is_named_by_several_fingers_together(command, enrolled, untrained, tmp_path):
    names = ("--names", "{subject}/{finger}_{impression}")
    words = ("enroll", enrolled / "enrol", "--gallery", tmp_path / "g", "--checkpoint", untrained, *names)
    assert "of 6 fingers" in command(*words, cwd=tmp_path).out
    probes = [enrolled / f"enrol/DB2/{finger}_1.png" for finger in (1, 3)]
    told = answers(command, tmp_path, untrained, *probes, "--person", "--fpir", 0.5)
    best, second = told["candidates"]
    assert best["person"].endswith("/DB2") and best["fingers"] == 3 and best["llr"] > second["llr"]
    assert [x["print"] for x in best["likest"]] == list(map(str, probes))
    for c in (best, second):  # half a print of nobody may be given one of two names
        assert c["decision"] == ("match" if c["llr"] >= told["threshold"] else "no match")
    assert told["threshold"] == pytest.approx(-np.log10(1 - 0.5**0.5))
    said = command(
        "identify", *probes, "--person", "--gallery", "g", "--checkpoint", untrained, "--fpir", 0.5, cwd=tmp_path
    )
    assert "2 prints: " in said.out and "3 fingers enrolled" in said.out and f"{probes[1]}: " in said.out


def test_prints_are_listed_and_removed(command, enrolled, untrained):
    listed = json.loads(command("gallery", "list", "g", "--json", cwd=enrolled).out)
    assert len(listed) == 12 and listed[0]["finger"] == "DB1/1"
    name = listed[0]["print"]
    said = command("gallery", "remove", "g", name, cwd=enrolled)
    assert said.code == 0 and "g has 11 of 6 fingers" in said.out
    assert command("gallery", "remove", "g", name, cwd=enrolled).code == 2
    again = command("enroll", enrolled / "enrol", "--gallery", "g", "--checkpoint", untrained, cwd=enrolled)
    assert "1 prints enrolled, 11 were already" in again.out


def test_a_print_without_ridges_is_left_out(command, untrained, generated, tmp_path):
    shutil.copy(generated[1, 1], tmp_path / "1_1.png")
    Image.fromarray(np.full((300, 300), 230, np.uint8)).save(tmp_path / "2_1.png")
    (tmp_path / "3_1.png").write_bytes(b"no image")
    said = command("enroll", tmp_path, "--gallery", tmp_path / "g", "--checkpoint", untrained, cwd=tmp_path)
    assert said.code == 0 and "1 prints enrolled, 0 were already, 2 left out" in said.out, said
    assert "2_1.png shows no ridges" in said.out and "3_1.png: not an image" in said.out


def test_a_print_that_needs_a_package_or_is_too_large_ends_the_command(command, untrained, generated, tmp_path):
    """It is no broken print: left out, whole sets might be."""
    shutil.copy(generated[1, 1], tmp_path / "1_1.png")
    Image.new("L", (5000, 4100)).save(tmp_path / "2_1.png")
    said = command("enroll", tmp_path, "--gallery", tmp_path / "g", "--checkpoint", untrained, cwd=tmp_path)
    assert said.code == 2 and "2_1.png is too large" in said.err, said


@pytest.mark.parametrize(
    "words, told",
    [
        (("identify", "{print}", "--gallery", "nowhere"), "There is no gallery at"),
        (("identify", "{print}"), "--gallery is needed"),
        (("identify", "--gallery", "g"), "No print is named"),
        (("identify", "{print}", "--gallery", "g", "--top", 0), "--top is 0"),
        (("identify", "{print}", "--gallery", "g", "--fpir", 1), "--fpir is 1"),
        (("identify", "missing.png", "--gallery", "g", "--checkpoint", "{checkpoint}"), "missing.png"),
        (("enroll", "--gallery", "g"), "No folder is named"),
        (("enroll", "nowhere", "--gallery", "g"), "nowhere"),
        (("gallery", "list", "nowhere"), "There is no gallery at"),
    ],
)
def test_a_mistake_is_one_sentence(command, enrolled, untrained, words, told):
    values = {"print": enrolled / "enrol/DB1/1_1.png", "checkpoint": untrained}
    said = command(*(str(w).format(**values) for w in words), cwd=enrolled)
    assert said.code == 2 and told in said.err, said


@pytest.mark.run
def test_module_2_shortlists_by_templates(command, module2, prints, enrolled, tmp_path):
    words = ("enroll", prints, "--gallery", "g", "--checkpoint", module2.path)
    assert "18 prints enrolled" in command(*words, cwd=tmp_path).out
    probe = prints / "DB1/3_2.png"
    (told,) = answers(command, tmp_path, module2.path, probe, "--rescore", 4)
    assert 1 <= len(told["candidates"]) <= 4
    assert str(probe) in {c["print"] for c in told["candidates"]}  # its own template is the likest at a turn of 0
    said = command("identify", probe, "--gallery", enrolled / "g", "--checkpoint", module2.path, cwd=tmp_path)
    assert said.code == 2 and "made with another checkpoint" in said.err
