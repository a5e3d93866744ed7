"""Pieces of work on a Ray of this machine: a piece that is lost is done again, and errors come back."""

import os
import signal

import pytest
from ray.exceptions import RuntimeEnvSetupError

from cluster import tasks
from cluster.host import ClusterError
from cluster.job import Request
from ifvit.errors import UserError

pytestmark = pytest.mark.process


def test_a_piece_whose_process_dies_is_done_again_and_an_error_comes_back(tmp_path):
    def call(n):
        (tmp_path / f"begun {n} {os.getpid()}").touch()
        if n == 3 and len(list(tmp_path.glob("begun 3 *"))) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if n == 6:
            raise UserError("There is no six.")
        return n, os.getcwd()

    found = []
    with pytest.raises(UserError, match="no six"):
        for one in tasks.results(call, range(7), Request("ray", workers_per_host=1), 2, ()):
            found.append(one)
    assert sorted(found) == [(n, os.getcwd()) for n in range(6)]
    assert len(list(tmp_path.glob("begun 3 *"))) == 2


def test_a_piece_that_kills_every_process_is_given_up(monkeypatch):
    monkeypatch.setattr(tasks, "TRIES", 2)
    with pytest.raises(ClusterError, match="A worker died 2 times"):
        list(tasks.results(lambda n: os.kill(os.getpid(), signal.SIGKILL), [0], Request("ray"), 1, ()))


def test_an_error_of_rays_own_is_told_as_it_is(monkeypatch):
    def get(_):
        raise RuntimeEnvSetupError("There is no such package.\nPerhaps")

    monkeypatch.setattr(tasks.ray, "wait", lambda running, num_returns: (running[:1], running[1:]))
    monkeypatch.setattr(tasks.ray, "get", get)
    with pytest.raises(ClusterError, match=r"of the work \(RuntimeEnvSetupError: .*no such package\. Perhaps\)\.$"):
        tasks._next({"a piece"})
