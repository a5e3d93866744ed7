"""A user's own cluster.py, tune.py or random.py does not stand in for ours or Python's."""

import os
from pathlib import Path

import pytest

from ifvit.neighbours import ROOT, behind_us, others_before_us, without_current

HERE = str(ROOT)


@pytest.fixture
def folder(tmp_path):
    """A user's folder with modules of our names, that say so and end."""
    for name in ("cluster", "tune", "optax"):
        (tmp_path / f"{name}.py").write_text(
            f"raise SystemExit('the user's {name}.py was run')\n".replace("user's", "users")
        )
    return tmp_path


@pytest.mark.parametrize(
    "module", ["ifvit.train_dense", "ifvit.train_all", "ifvit.evaluate", "ifvit.checkpoint", "ifvit.tune"]
)
def test_commands_work_beside_a_users_modules(process, folder, module):
    said = process("-m", module, "--help", cwd=folder, PYTHONPATH=HERE)
    assert said.code == 0 and module in said.out, said


def test_a_current_folder_that_is_gone_is_told(process, tmp_path):
    code = (
        "import os, subprocess, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); "
        "sys.exit(subprocess.run([sys.executable, '-m', 'ifvit.train_dense', '--help']).returncode)"
    )
    said = process("-c", code, cwd=tmp_path, PYTHONPATH=HERE)
    assert (said.code, said.err) == (2, "Error: The current folder is gone; change to another one.\n"), said


def test_a_sweep_works_beside_a_users_cluster(process, folder):
    (folder / "tune.py").unlink()
    said = process("-m", "tune", "--help", cwd=folder, PYTHONPATH=HERE)
    assert said.code == 0 and "--num_samples" in said.out, said


def test_a_program_of_the_users_keeps_its_own_modules(process, tmp_path):
    (tmp_path / "cluster.py").write_text("mine = True\n")
    (tmp_path / "own.py").write_text("import ifvit, cluster\nprint(cluster.mine)\n")
    said = process("own.py", cwd=tmp_path, PYTHONPATH=HERE)
    assert said.out == "True\n", said


@pytest.mark.parametrize("kind", ["module", "package", "folder"])
def test_others_of_our_names_come_behind_ours(tmp_path, kind):
    (other := tmp_path / "other").mkdir()
    if kind == "module":
        (other / "tune.py").touch()
    else:
        (other / "cluster").mkdir()
    if kind == "package":
        (other / "cluster/__init__.py").touch()
    (fine := tmp_path / "fine").mkdir()
    for path in ([str(other), str(fine), HERE], [str(other), str(fine)]):
        assert others_before_us(path) == [str(other)]
        assert behind_us(path, [str(other)]) == [str(fine), HERE, str(other)]
    assert others_before_us([str(fine), HERE, str(other)]) == []


def test_a_command_finds_its_own_packages_where_others_of_their_names_are_installed(process, tmp_path):
    (tmp_path / "site/cluster").mkdir(parents=True)
    (tmp_path / "site/cluster/__init__.py").write_text("raise SystemExit('another cluster')\n")
    said = process("-m", "ifvit.train_dense", "--help", cwd=tmp_path, PYTHONPATH=f"{tmp_path}/site{os.pathsep}{HERE}")
    assert said.code == 0 and "--num_epochs" in said.out, said


def test_the_current_folder_is_no_place_for_modules_unless_it_is_ours():
    assert without_current(["/here", "/x"], "/here") == ["/x"]
    assert without_current(["/x", "/here"], "/here") == ["/x", "/here"]
    assert without_current([HERE, "/x"], HERE) == [HERE, "/x"]


def test_rays_workers_are_not_led_into_the_current_folder(monkeypatch, folder):
    import ray

    from cluster.session import session

    seen = []
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(Path.cwd()))
    with session():
        assert seen == [Path("/")] and Path.cwd() == folder
    monkeypatch.chdir(ROOT)
    with session():
        assert seen[1:] == [ROOT]
