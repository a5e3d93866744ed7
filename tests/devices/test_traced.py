"""Programs that are traced once for all processes."""

import jax
import numpy as np
import pytest

from ifvit.devices.traced import traced


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def program(made, factor=2.0, about="doubles"):
    """As another process would ask for it; `made` counts how often it was made."""

    def make():
        made.append(1)
        return lambda tree, x: {"sum": factor * (tree["a"] + x)}

    return traced(make, about)


ARGUMENTS = ({"a": np.float32([1, 2])}, np.float32([3, 4]))


def test_what_one_process_has_traced_another_only_runs(folder):
    made = []
    for _ in range(3):
        again = program(made)
        for _ in range(2):
            np.testing.assert_array_equal(again(*ARGUMENTS)["sum"], [8, 12])
    assert len(made) == 1


def test_other_shapes_types_and_settings_are_other_programs(folder):
    made = []
    program(made)(*ARGUMENTS)
    np.testing.assert_array_equal(program(made, 3.0, "triples")(*ARGUMENTS)["sum"], [12, 18])
    assert program(made)({"a": np.float32([1])}, np.float32([3]))["sum"].shape == (1,)
    assert program(made)({"a": np.int32([1, 2])}, np.int32([3, 4]))["sum"].dtype == np.float32
    assert len(made) == 4


def test_other_code_is_another_program(folder, monkeypatch):
    made = []
    program(made)(*ARGUMENTS)
    monkeypatch.setattr("ifvit.devices.traced._circumstances", lambda: "other code")
    np.testing.assert_array_equal(program(made, 5.0)(*ARGUMENTS)["sum"], [20, 30])
    assert len(made) == 2


@pytest.mark.parametrize("damage", [lambda d: d[:-1] + bytes([d[-1] ^ 1]), lambda d: d[:50], lambda d: b""])
def test_a_damaged_file_is_traced_anew_and_replaced(folder, damage):
    made = []
    program(made)(*ARGUMENTS)
    (file,) = folder.glob("traced_*")
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):
        np.testing.assert_array_equal(program(made)(*ARGUMENTS)["sum"], [8, 12])
    assert len(made) == 2


def test_where_the_cache_cannot_be_written_it_works_all_the_same(folder):
    jax.config.update("jax_compilation_cache_dir", str(folder / "not/there"))
    made = []
    np.testing.assert_array_equal(program(made)(*ARGUMENTS)["sum"], [8, 12])
    assert len(made) == 1


def test_without_a_cache_nothing_is_kept(folder):
    jax.config.update("jax_compilation_cache_dir", None)
    made = []
    for _ in range(2):
        np.testing.assert_array_equal(program(made)(*ARGUMENTS)["sum"], [8, 12])
    assert len(made) == 2 and not list(folder.iterdir())
