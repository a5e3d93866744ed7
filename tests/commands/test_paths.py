"""Homes and caches: what a shell, a container or a cluster has not told."""

import os
import pwd
import stat

import pytest

from ifvit import cli, paths
from ifvit.checkpoint import places
from ifvit.config import DenseConfig, MatchConfig, parse_value, preset, with_changes
from ifvit.errors import UserError

ME = pwd.getpwuid(os.getuid())


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A process with none of the variables that say where things lie, whose temporary directory is its own."""
    for name in ("IFVIT_CACHE", "XDG_CACHE_HOME", "HOME", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(paths, "KAGGLE_WORKING", tmp_path / "no kaggle")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    paths._own_cache.cache_clear()
    paths._chosen_cache.cache_clear()
    yield tmp_path
    paths._own_cache.cache_clear()
    paths._chosen_cache.cache_clear()


@pytest.fixture
def unknown(bare, monkeypatch):
    """The same of a user without an entry in /etc/passwd."""

    def nobody(_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    return bare


# --- ~ -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, there",
    [
        ("~", "/h"),
        ("~/runs", "/h/runs"),
        ("~/", "/h/"),
        (f"~{ME.pw_name}/x", f"{ME.pw_dir}/x"),
        ("./~/x", "./~/x"),
        ("a/~/b", "a/~/b"),
        ("gs://bucket/~x", "gs://bucket/~x"),
        ("/abs/~", "/abs/~"),
        ("", ""),
    ],
)
def test_a_tilde_at_the_beginning_is_the_home(monkeypatch, given, there):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert paths.resolve(given) == there
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    if given.startswith("~"):
        assert paths.resolve(given) == there  # in a notebook too: it is not below the working directory


@pytest.mark.parametrize("useless", ["", "here"])
def test_an_empty_or_relative_home_counts_as_none(monkeypatch, useless):
    monkeypatch.setenv("HOME", useless)
    assert paths.resolve("~/x") == f"{ME.pw_dir}/x"


def test_a_home_that_nobody_has_is_refused(unknown, monkeypatch):
    with pytest.raises(UserError, match=r"no home \(HOME is not set\).*~/x"):
        paths.resolve("~/x")
    with pytest.raises(UserError, match="no user nobody-of-this-name"):
        paths.resolve("~nobody-of-this-name/x")
    monkeypatch.chdir(unknown)
    (unknown / "~lock.png").touch()
    assert paths.resolve_data("~lock.png") == "~lock.png"  # a file's own name


def test_paths_in_files_and_in_set_are_the_homes(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    config = with_changes(
        preset("smoke", MatchConfig),
        {"dataset_root": ["~/a", "b"], "checkpoint_dir": "~/m", "dense_reg_ckpt": "~/d/ckpt.pkl"},
    )
    assert (config.dataset_root, config.checkpoint_dir, config.dense_reg_ckpt) == (
        ("/h/a", "b"),
        "/h/m",
        "/h/d/ckpt.pkl",
    )
    value = parse_value(DenseConfig, "loftr_ckpt", "~/loftr.ckpt")
    assert with_changes(preset("smoke", DenseConfig), {"loftr_ckpt": value}).loftr_ckpt == "/h/loftr.ckpt"
    assert str(places.as_path("~/run/x")) == "/h/run/x"


@pytest.mark.parametrize(
    "module, words",
    [
        (
            "train_dense",
            ["--checkpoint_dir=~/x", "--resume=~/x", "--config=~/x", "--loftr_ckpt=~/x", "--dataset_root", "~/x"],
        ),
        ("train_match", ["--checkpoint_dir=~/x", "--pretrained_ckpt=~/x"]),
        ("train_all", ["--dense_checkpoint_dir=~/x", "--matcher_checkpoint_dir=~/x", "--sweep_dir=~/x"]),
        ("evaluate", ["--checkpoint=~/x", "--out=~/x", "--dataset_root=~/x"]),
        ("verify", ["~/x", "~/x", "--checkpoint=~/x", "--picture=~/x"]),
        ("load_module1_weights", ["--module1_ckpt=~/x"]),
    ],
)
def test_paths_in_every_flag_are_the_homes(monkeypatch, module, words):
    import importlib

    monkeypatch.setenv("HOME", "/h")
    args = vars(cli.parse(importlib.import_module(f"ifvit.{module}").Args, module, words))
    found = [
        v for value in args.values() for v in (value if isinstance(value, tuple) else (value,)) if v in ("/h/x", "~/x")
    ]
    assert found == ["/h/x"] * sum("~" in w for w in words)


def test_checkpoint_commands_make_no_folder_called_tilde(command, monkeypatch, tmp_path):
    import numpy as np

    from ifvit import legacy

    (home := tmp_path / "home").mkdir()
    (here := tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(home))
    legacy.write(home / "x.pkl", {"params": {"a": np.ones(3, np.float32)}, "step": 1}, {}, None)
    said = command("checkpoint", "import", "~/x.pkl", "~/ck", cwd=here)
    assert said.code == 0, said
    said = command("checkpoint", "export", "~/ck", "~/back.pkl", cwd=here)
    assert said.code == 0, said
    assert list(here.iterdir()) == [] and {"ck", "back.pkl", "x.pkl"} == {p.name for p in home.iterdir()}


# --- the cache -----------------------------------------------------------------------------------


def test_the_cache_lies_where_it_is_told(bare, monkeypatch):
    monkeypatch.setenv("HOME", str(bare / "home"))
    assert paths.cache_dir() == bare / "home/.cache/ifvit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "xdg"))
    assert paths.cache_dir() == bare / "xdg/ifvit"
    monkeypatch.setenv("IFVIT_CACHE", "~/mine")
    assert paths.cache_dir() == bare / "home/mine" and (bare / "home/mine").is_dir()


@pytest.mark.parametrize("name", ["IFVIT_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_variable_is_not_set(bare, monkeypatch, name):
    monkeypatch.setenv("HOME", str(bare / "home"))
    monkeypatch.setenv(name, "")
    assert paths.cache_dir() == bare / "home/.cache/ifvit"


def test_a_relative_xdg_cache_home_is_ignored(bare, monkeypatch):
    monkeypatch.setenv("HOME", str(bare / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert paths.cache_dir() == bare / "home/.cache/ifvit"


def test_without_a_home_the_cache_is_a_folder_of_this_users_alone_and_the_log_says_so(unknown, caplog):
    there = unknown / f"tmp/ifvit-cache-{os.getuid()}"
    assert paths.cache_dir() == there and stat.S_IMODE(there.stat().st_mode) == 0o700
    assert paths.cache_dir() == there
    (line,) = caplog.messages
    assert str(there) in line and "IFVIT_CACHE" in line


def test_libraries_get_a_home_where_there_is_none_and_tilde_still_has_none(unknown, monkeypatch):
    monkeypatch.setenv("HOME", "")
    paths.lend_home()
    assert os.environ["HOME"] == f"{unknown}/tmp/ifvit-cache-{os.getuid()}" and os.path.isdir(os.environ["HOME"])
    with pytest.raises(UserError, match="no home"):
        paths.resolve("~/x")
    monkeypatch.setenv("HOME", "/h")
    paths.lend_home()
    assert os.environ["HOME"] == "/h"


@pytest.mark.parametrize("useless", ["/dev/null", "/proc/nothing", "file"])
def test_a_useless_xdg_cache_home_costs_no_run(bare, monkeypatch, caplog, useless):
    monkeypatch.setenv("HOME", str(bare))
    (bare / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / useless))
    assert paths.cache_dir().parent == bare / "tmp"
    assert "IFVIT_CACHE" in caplog.text


def test_a_folder_of_somebody_elses_is_not_taken_for_the_cache(unknown):
    (unknown / "elsewhere").mkdir()
    (unknown / f"tmp/ifvit-cache-{os.getuid()}").symlink_to(unknown / "elsewhere")
    with pytest.raises(UserError, match="set IFVIT_CACHE"):
        paths.cache_dir()


@pytest.mark.parametrize(
    "useless, why",
    [
        ("/dev/null", "no folder"),
        ("/dev/null/below", "Not a directory"),
        ("/proc/nothing", "No such file"),
        ("gs://bucket/cache", "on a disk"),
    ],
)
def test_an_ifvit_cache_that_cannot_be_written_to_is_named(bare, monkeypatch, useless, why):
    monkeypatch.setenv("IFVIT_CACHE", useless)
    with pytest.raises(UserError, match=f"IFVIT_CACHE is {useless}.*{why}"):
        paths.cache_dir()
