"""A trace of the steps that were named, in the run's folder."""

import logging

import jax
import pytest
from jax.profiler import ProfileData

from ifvit.training.profile import Profile


def traced(folder) -> list[int]:
    """The numbers of the steps in a folder's traces, in the layout that TensorBoard's and XProf's viewers read."""
    events = [
        event
        for file in folder.glob("plugins/profile/*/*.xplane.pb")
        for plane in ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
    ]
    return sorted(dict(event.stats)["step_num"] for event in events if event.name == "train")


def test_a_run_traces_the_steps_that_are_named(command, prints, tmp_path):
    said = command(
        "train_dense", "--dataset_root", prints, "--preset", "smoke", "--profile", "1:3", "--tracker", cwd=tmp_path
    )
    assert said.code == 0, said
    folder = tmp_path / "checkpoints/dense_reg"
    assert f"The trace of steps 2 to 3 lies in {folder / 'profile'}" in said.out
    assert traced(folder / "profile") == [2, 3]
    assert not (folder / "tensorboard").exists()  # no tracker was named


@pytest.mark.parametrize("first, ended, found", [(0, 6, [3, 4]), (3, 6, [4]), (4, 6, []), (0, 3, [3])])
def test_a_run_that_goes_on_or_is_stopped_traces_what_it_does_of_them(tmp_path, first, ended, found, capsys):
    profile = Profile((2, 4), tmp_path / "profile", "profile")
    for at in range(first, ended):
        profile.before(at)
        profile.after(at + 1, {"loss": jax.numpy.ones(())})
    profile.close()
    assert traced(tmp_path / "profile") == found
    assert len(capsys.readouterr().out.splitlines()) == bool(found)


def test_a_trace_that_cannot_be_written_costs_a_line(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    profile = Profile((0, 1), tmp_path / "profile", "profile")
    with caplog.at_level(logging.WARNING, "ifvit"):
        profile.before(0)
        profile.after(1, {})
        profile.close()
    assert [r.getMessage().partition(" (")[0] for r in caplog.records] == ["⚠ No trace could be written to profile"]
