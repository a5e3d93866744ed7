"""Whatever else lies in a pickle, its arrays are read, and the rest becomes text, lists and dictionaries."""

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import json
import pickle
import random
import re
import sys
import types
import uuid
import zoneinfo
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pytest
from flax import struct

from ifvit import legacy

PROTOCOLS = range(6)
PARAMS = {"dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}


@pytest.fixture
def read(tmp_path):
    """Reads what pickle writes of a value; the parameters beside it are those above."""

    def call(content, protocol=4) -> legacy.Legacy:
        path = tmp_path / "a.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        found = legacy.read(path)
        json.dumps(found.metadata)
        return found

    return call


def told(read, value, protocol=4):
    """What becomes of a value in the metadata."""
    found = read({"params": PARAMS, "metadata": {"x": value}}, protocol)
    np.testing.assert_array_equal(found.state["params"]["dense"]["kernel"], PARAMS["dense"]["kernel"])
    return found.metadata["x"]


class Colour(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    y: tuple


@dataclass
class Config:
    rate: float
    when: datetime.date


class Attributes(dict):
    """Such as Lightning's AttributeDict, yacs' CfgNode, EasyDict: a dictionary with attributes of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.locked = True


class Slots:
    __slots__ = ("a", "b")


class Node:
    """Knows what it is part of, as omegaconf's do."""

    def __init__(self, value):
        self.value, self.parent = value, self


def slots():
    x = Slots()
    x.a = 1
    return x


HERE = __name__
TWO_HOURS = datetime.timezone(datetime.timedelta(hours=2))
STANDARD = {
    "a moment": (datetime.datetime(2024, 5, 1, 12, 30, 1, 5), "2024-05-01T12:30:01.000005"),
    "UTC": (datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC), "2024-05-01T00:00:00+00:00"),
    "an offset": (datetime.datetime(2024, 5, 1, tzinfo=TWO_HOURS), "2024-05-01T00:00:00+02:00"),
    "the second 2:30": (datetime.datetime(2024, 10, 27, 2, 30, fold=1), "2024-10-27T02:30:00"),
    "a time zone's name": (
        datetime.datetime(2024, 5, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        "2024-05-01T00:00:00[Europe/Berlin]",
    ),
    "a day": (datetime.date(2024, 2, 29), "2024-02-29"),
    "a time": (datetime.time(1, 2, 3), "01:02:03"),
    "a duration": (datetime.timedelta(days=1, seconds=3), "1 day, 0:00:03"),
    "a zone": (TWO_HOURS, "+02:00"),
    "deque": (collections.deque([1.0, 2.0], maxlen=100), [1.0, 2.0]),
    "empty deque": (collections.deque(maxlen=3), []),
    "Counter": (collections.Counter(a=2, b=1), {"a": 2, "b": 1}),
    "OrderedDict": (collections.OrderedDict(a=[1]), {"a": [1]}),
    "defaultdict": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "sets": ([{1}, frozenset((2,))], [[1], [2]]),
    "paths": ([PurePosixPath("/a/b"), PureWindowsPath("C:\\a")], ["/a/b", "C:\\a"]),
    "uuid": (uuid.UUID("12345678123456781234567812345678"), "12345678-1234-5678-1234-567812345678"),
    "Decimal": (decimal.Decimal("1.50"), "1.50"),
    "Fraction": (fractions.Fraction(1, 3), "1/3"),
    "complex": (1 + 2j, "(1+2j)"),
    "bytes": ([b"\x01\xff", bytearray(b"\x02"), b""], ["01ff", "02", ""]),
    "many bytes": (bytes(5000), "5,000 bytes"),
    "Namespace": (argparse.Namespace(a=1, b=(2, 3)), {"a": 1, "b": [2, 3]}),
    "SimpleNamespace": (types.SimpleNamespace(a=None), {"a": None}),
    "long integers": (2**128 - 1, 2**128 - 1),
    "a number of numpy as key": ({np.float32(0.5): 1, np.int64(3): 2}, {"0.5": 1, "3": 2}),
    "keys of any kind": ({None: 1, (1, "a"): 2, 0.5: 3, True: 4}, {"None": 1, "(1, a)": 2, "0.5": 3, "True": 4}),
    "text arrays": (np.array(["1_1", "b"]), ["1_1", "b"]),
    "bytes arrays": (np.array([[b"a"], [b"\xe9"]]), [["a"], ["é"]]),
    "one text": (np.str_("a"), "a"),
    "text of the other byte order": (np.array(["é"]).astype(">U2"), ["é"]),
    "object arrays": (
        np.array([[1, "a"], [None, datetime.date(2024, 1, 1)]], object),
        [[1, "a"], [None, "2024-01-01"]],
    ),
    "a dictionary in an array, as numpy.save leaves it": (np.array({"a": 1}, object), {"a": 1}),
    "moments": (np.array(["2024-05-01"], "M8[s]"), ["2024-05-01T00:00:00"]),
    "days": (np.array(["2024-05-01"], "M8[D]"), ["2024-05-01"]),
    "durations": (np.array([5], "m8[s]"), ["5 seconds"]),
    "records": (
        np.array([(1, 2.5, "a")], [("n", ">i4"), ("x", "f8"), ("t", "U3")]),
        {"n": [1], "x": [2.5], "t": ["a"]},
    ),
    "a masked array": (np.ma.array([1, 2], mask=[True, False]), {"data": [1, 2], "mask": [True, False]}),
    "complex arrays": (np.array([1j]), ["1j"]),
    "a large array": (np.zeros((200, 100), np.int8), {"array": "int8", "shape": [200, 100]}),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", STANDARD)
def test_values_of_python_and_numpy_become_text_lists_and_dictionaries(read, name, protocol):
    value, wanted = STANDARD[name]
    assert told(read, value, protocol) == wanted


OBJECTS = {
    "a member of an enum": (Colour.RED, {"class": f"{HERE}.Colour", "arguments": [1]}),
    "a named tuple": (Point(1, (2,)), {"class": f"{HERE}.Point", "arguments": [1, [2]]}),
    "a dataclass": (
        Config(0.1, datetime.date(2024, 1, 1)),
        {"class": f"{HERE}.Config", "state": {"rate": 0.1, "when": "2024-01-01"}},
    ),
    "slots": (slots(), {"class": f"{HERE}.Slots", "state": {"a": 1}}),
    "a dictionary with attributes": (Attributes({"a": Attributes({"b": 1})}), {"a": {"b": 1}}),
    "what is part of itself": (Node(1), {"class": f"{HERE}.Node", "state": {"value": 1, "parent": f"… {HERE}.Node"}}),
    "a class": (Config, f"{HERE}.Config"),
    "a function": (slots, f"{HERE}.slots"),
    "a method": ([].append, "builtins.getattr"),
    "a pattern": (re.compile("a+"), {"class": "re._compile", "arguments": ["a+", 32]}),
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("name", OBJECTS)
def test_other_objects_become_their_class_and_content(read, name, protocol):
    value, wanted = OBJECTS[name]
    found = told(read, value, protocol)
    assert (found["class"] if wanted == "builtins.getattr" else found) == wanted


def test_states_of_random_generators_are_read(read):
    assert told(read, random.Random(3).getstate())[0] == 3
    assert told(read, np.random.RandomState(3).get_state())[0] == "MT19937"
    found = told(read, np.random.default_rng(3))
    assert str(np.random.default_rng(3).bit_generator.state["state"]["state"]) in str(found)


def test_a_timestamp_of_any_kind_is_text(read):
    assert (
        read({"params": PARAMS, "timestamp": datetime.datetime(2024, 5, 1, 12, 30)}).timestamp == "2024-05-01T12:30:00"
    )
    assert read({"params": PARAMS, "timestamp": 1714566600.5}).timestamp == "1714566600.5"


def test_what_is_no_array_in_the_state_stands_aside_with_its_name(read):
    state = {
        "params": PARAMS | {"made": datetime.date(2024, 1, 1)},
        "step": 3,
        "name": "adam",
        "flags": Flags.A | Flags.B,
        "classes": np.array(["a", "b"]),
        "seed": 2**70,
    }
    for content in (
        {"state": state, "metadata": {"epoch": 1}},
        {"state": types.SimpleNamespace(**state), "metadata": {"epoch": 1}},
    ):
        found = read(content)
        assert set(found.state) == {"params", "step"} and set(found.state["params"]) == {"dense"}
        aside = found.metadata["not_arrays"]
        assert found.metadata["epoch"] == 1 and aside.pop("flags")
        assert aside == {"params/made": "2024-01-01", "name": "adam", "classes": ["a", "b"], "seed": 2**70}


class MyState(struct.PyTreeNode):
    params: dict
    opt_state: tuple
    apply_fn: object = struct.field(pytree_node=False)


class MyAdam(NamedTuple):
    """A state of an optimiser that the installed optax does not have."""

    count: np.ndarray
    mu: dict


def test_a_state_of_a_class_of_its_own_is_its_attributes(read):
    state = MyState(params=PARAMS, opt_state=(MyAdam(np.int32(3), PARAMS), None), apply_fn=slots)
    for content in (state, {"state": state}):
        found = read(content)
        np.testing.assert_array_equal(found.state["params"]["dense"]["kernel"], PARAMS["dense"]["kernel"])
        assert found.state["opt_state"]["0"]["0"] == 3 and set(found.state["opt_state"]["0"]["1"]) == {"dense"}
        assert "apply_fn" not in str(found.metadata)


def test_an_object_that_is_referred_to_again_and_again_is_told_once(read):
    shared = Config(0.1, None)
    for _ in range(40):  # 2**40 ways through it
        shared = Config(shared, shared)
    found = told(read, [shared, shared])
    assert found[1] == {"class": f"{HERE}.Config"} and len(json.dumps(found)) < 100_000


def test_names_of_libraries_that_are_not_installed_are_no_matter(read, monkeypatch):
    module = types.ModuleType("nowhere.config")
    made = type("DictConfig", (), {"__module__": module.__name__})
    module.DictConfig = made
    monkeypatch.setitem(sys.modules, "nowhere", types.ModuleType("nowhere"))
    monkeypatch.setitem(sys.modules, "nowhere.config", module)
    value = made()
    value._content = {"a": 1}
    raw = {"params": PARAMS, "config": value}
    assert read(raw).metadata["config"] == {"class": "nowhere.config.DictConfig", "state": {"_content": {"a": 1}}}
