"""The search space as data: for each module the settings that matter, their ranges, scales and reasons.

A user's TOML file adds to it or narrows it:

    [dense.learning_rate]           # a range: what is left out stays as it is
    low = 1e-4
    high = 1e-2
    scale = "log"

    [dense]
    transformer = ["loftr"]         # a list: these are tried
    noise = 0.5                     # a value: fixed, not searched
"""

import difflib
import math
import zlib
from collections.abc import Set
from dataclasses import dataclass, fields, replace

import numpy as np

from ifvit.config import DenseConfig, MatchConfig, keys_with, known_key
from ifvit.data.sources import SYNTHETIC
from ifvit.errors import UserError
from ifvit.fields import COMMON, LIVE, OWN, PROGRAM, SCALAR, SWEEP, use_of

CONFIGS = {"dense": DenseConfig, "match": MatchConfig}
RUNS = {"dense": "dense_reg", "match": "matcher"}  # table -> the name of its checkpoints


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn evenly on `scale`."""

    low: float
    high: float
    scale: str = "linear"  # or log
    why: str = ""
    times: bool = False  # low and high are multiples of the configuration's own value
    when: tuple[str, object] | None = None  # (key, value): this setting matters only where that key has that value

    def at(self, u: float) -> float:
        """The value at a share `u`, 0 … 1, of the range."""
        if self.scale == "log":
            return math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        return self.low + u * (self.high - self.low)

    def share(self, value: float) -> float:
        """The inverse of `at`."""
        if self.high == self.low:
            return 0.5
        if self.scale == "log":
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Choice:
    """One of `values`, all equally likely."""

    values: tuple
    why: str = ""
    times: bool = False
    when: tuple[str, object] | None = None
    in_turn: bool = False  # random search takes one value after the other, so that all are tried

    def at(self, u: float):
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]


Space = dict[str, Range | Choice]

_TRAINING: Space = {
    "learning_rate": Range(0.2, 5, "log", "decides more than anything else, and depends on all else", times=True),
    "weight_decay": Range(0.1, 100, "log", "small sets of prints are learned by heart", times=True),
    "warmup": Range(0.01, 0.2, why="attention from scratch diverges without one; steps in it are slow ones"),
    "batch_size": Choice(
        (0.5, 1, 2), "more steps an epoch, or better statistics in BatchNorm and more impostors", times=True
    ),
    "impostor_share": Range(
        0.05, 0.6, why="too few, and impostors are given matches; too many, and nothing is learned of ridges"
    ),
    "noise": Range(0.0, 1.5, why="as noisy as the worst sensor, or the network smooths ridges away"),
    "thickness": Range(0.0, 1.5, why="dry and wet fingers"),
    "distortion": Range(0.0, 1.5, why="how far skin gives way"),
    "partial": Range(0.0, 1.0, why="small sensors see parts of a finger"),
    "zoom": Range(0.0, 0.4, why="ridges lie 7 to 12 px apart, by finger and by sensor"),
}

SPACES: dict[str, Space] = {
    "dense": _TRAINING
    | {
        "resnet_widths": Choice((0.5, 1, 1.5), "the ResNet has most of the cost and of the parameters", times=True),
        "transformer_width": Choice((0.5, 1, 2), "how much a cell's feature can tell", times=True),
        "transformer_layers": Choice((0.5, 1, 2), "how far prints are compared before they are matched", times=True),
        "transformer": Choice(
            ("loftr", "siamese"), "linear attention, or softmax: better on small grids, dearer on large"
        ),
        "similarity": Choice(("scaled_dot", "cosine"), "a fixed temperature, or a learned scale"),
        "temperature": Range(
            0.03, 0.3, "log", "sharper confidences, or gradients for more cells", when=("similarity", "scaled_dot")
        ),
        "cosine_scale": Range(5, 50, "log", "where the learned scale starts", when=("similarity", "cosine")),
        "rotation": Range(15.0, 90.0, why="how far prints are turned against each other"),
        "impostor_share": Range(0.0, 0.6, why="the ridges tell impostors; genuine pairs in their place teach more"),
        "impression_share": Range(0.1, 1.0, why="two impressions differ as in earnest, a print and itself less"),
    },
    "match": _TRAINING
    | {
        "synthetic_share": Range(0.02, 0.6, why="many fingers that are made, or the sensor's own"),
        "loss_dense": Range(0.05, 2, "log", "keeps what Module 1 knew of ridges"),
        "loss_embedding": Range(0.05, 3, "log", "what verification asks, on pairs"),
        "loss_arcface": Range(0.02, 2, "log", "tells all fingers apart at once; learned by heart where they are few"),
        "embedding_margin": Range(0.0, 0.7, why="how far apart impostors have to be"),
        "arcface_margin": Range(0.1, 0.7, why="how tight a finger's prints have to lie"),
        "arcface_scale": Range(10, 64, "log", "sharpness of the classes; large with few fingers saturates"),
        "roi_size": Choice(
            (0.75, 1, 1.25), "detail of the middle, or the local branch sees what the global one does", times=True
        ),
        "enhance": Choice((True, False), "ridges alone, or pores and intensities too"),
        "oriented": Choice((True, False), "noise and gaps smoothed along the ridges, or kept", when=("enhance", True)),
        "share_global_local": Choice((True, False), "one transformer for both branches, or two that part"),
        "seed_resnet": Choice((True, False), "begins with Module 1's filters, or its own"),
        "global_weight": Range(0.2, 0.9, why="the branches' part in the fused cosine"),
        "rotation": Range(5.0, 45.0, why="how far prints are turned before alignment"),
    },
}


def space_for(
    module: str, base, changes: dict | None = None, only: tuple[str, ...] = (), without: Set[str] = frozenset()
) -> Space:
    """The space of a module around the configuration `base`, narrowed by a user's table. Ranges are absolute numbers.

    `only`: keeps these keys alone, where any are given. `without`: leaves these keys out. UserError for keys that are
    unknown or cannot be searched, and for ranges upside down.
    """
    # A multiple of 0 is 0: there is nothing to search.
    space = {k: _absolute(k, p, base) for k, p in SPACES[module].items() if not p.times or base[k]}
    if module == "dense" and not base.impression_share and "impression_share" not in (changes or {}):
        space.pop("impression_share")  # no pairs of two impressions are asked for
    if module == "dense" and base.init:  # the network, and its learned scale, are those that it starts from
        for key in {*keys_with(COMMON), "cosine_scale"} - set(changes or {}):
            space.pop(key, None)
        space = {k: p for k, p in space.items() if not p.when or p.when[0] in space or base[p.when[0]] == p.when[1]}
    if tuple(base.dataset_root) == (SYNTHETIC,):
        space.pop("synthetic_share", None)  # all prints are generated
    elif not base.synthetic_share and "synthetic_share" not in (changes or {}):
        space.pop("synthetic_share", None)  # no prints are generated
    for key, value in (changes or {}).items():
        known_key(type(base), key)
        if isinstance(value, (list, dict)) and key in (*keys_with(OWN), *keys_with(SWEEP)):
            raise UserError(f"{key} cannot be searched: it has to be the same for all trials; give one value.")
        if isinstance(value, list):
            space[key] = Choice(tuple(tuple(v) if isinstance(v, list) else v for v in value), "asked for")
        elif isinstance(value, dict):
            space[key] = _narrowed(key, space.get(key), value)
        else:
            space.pop(key, None)  # the user's file fixes it
    space = {k: p for k, p in space.items() if (not only or k in only) and k not in without}
    for key, p in space.items():
        _check(key, p, base)
    if "synthetic_share" in space and not (base.synthetic_share and _least(space["synthetic_share"])):
        raise UserError(
            "synthetic_share is searched, and 0 is one of its values: such trials would have other prints and epochs "
            "of another length. Let the configuration have one above 0 (--config), and search above 0."
        )
    return space


def _least(p: Range | Choice):
    return p.low if isinstance(p, Range) else min(p.values)


def check_names(names: tuple[str, ...], modules: tuple[str, ...], changes: dict[str, dict]) -> None:
    """UserError for a name that is in no module's space."""
    known = [k for m in modules for k in (*SPACES[m], *changes[m])]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
            raise UserError(
                f"{name} is not in the search space; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(dict.fromkeys(known))}.")
            )


def fixed(changes: dict) -> dict:
    """The values that a user's table fixes."""
    return {k: v for k, v in changes.items() if not isinstance(v, (dict, list))}


def complete(space: Space, base, values: dict) -> dict:
    """A sample without the settings that do not matter in it (see `when`)."""
    merged = {k: values.get(k, base[k]) for k in {p.when[0] for p in space.values() if p.when} | values.keys()}
    return {k: v for k, v in values.items() if not space[k].when or merged[space[k].when[0]] == space[k].when[1]}


GROUP = 4  # trials in a row that share their structure, and with it the compiled program


def draw(space: Space, base, seed: int, number: int) -> dict:
    """Sample `number` of a random search, a pure function of the seed. Number 0 is the configuration as it is.

    Settings that change the compiled program are drawn anew every GROUP trials only, because compiling takes longer
    than many a trial. The first GROUP trials have the configuration's. Where only such settings are searched, they are
    drawn anew for every trial.
    """
    if number == 0:
        return {}
    values = {}
    size = (
        GROUP if any(_use(k) != PROGRAM and not (isinstance(p, Choice) and p.in_turn) for k, p in space.items()) else 1
    )
    for key, p in space.items():
        if isinstance(p, Choice) and p.in_turn:
            values[key] = p.values[number % len(p.values)]
            continue
        group = number // size if _use(key) == PROGRAM else number + 10**6
        # The name is part of the seed, so that one setting more or less in the space does not change the others.
        u = np.random.default_rng([seed, group, zlib.crc32(key.encode())]).random()
        if group:
            values[key] = as_field(base, key, p.at(u))
    return complete(space, base, values)


def as_field(base, key: str, value):
    """A value in the type of the configuration's field."""
    kind = type(base[key])
    return kind(round(value)) if kind is int else kind(value) if kind is float else value


def _absolute(key: str, p: Range | Choice, base) -> Range | Choice:
    """Turns multiples of the configuration's value into numbers, and keeps those that the field can have.

    They are whole numbers where the field is one.
    """
    if not p.times:
        return p
    value = base[key]
    if isinstance(p, Range):
        limits = next(f.metadata for f in fields(base) if f.name == key)
        return replace(p, low=max(p.low * value, limits["lo"]), high=min(p.high * value, limits["hi"]), times=False)
    step = {"roi_size": 8, "transformer_width": 4 * base.transformer_heads, "resnet_widths": 4}.get(key, 1)
    whole = lambda x: max(step, round(x / step) * step)
    made = [tuple(whole(f * v) for v in value) if isinstance(value, tuple) else whole(f * value) for f in p.values]
    if key == "roi_size":
        made = [v for v in made if v <= base.image_size]
    made = [value if f == 1 else v for f, v in zip(p.values, made)]
    return replace(p, values=tuple(v for v in dict.fromkeys(made) if _can_be(base, key, v)), times=False)


def _can_be(base, key: str, value) -> bool:
    try:
        base.replace(**{key: value})
        return True
    except UserError:
        return False


def _narrowed(key: str, before: Range | Choice | None, table: dict) -> Range | Choice:
    known = ("low", "high", "scale")
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.4)
            raise UserError(
                f"{key}.{name} is not known of a range; "
                + (f"did you mean {near[0]}?" if near else f"give {', '.join(known)}.")
            )
    if not isinstance(before, Range):
        if not {"low", "high"} <= table.keys():
            raise UserError(f"{key} has no range yet; give low and high.")
        before = Range(table["low"], table["high"], why="asked for")
    return replace(before, **table)


def _check(key: str, p: Range | Choice, base) -> None:
    """UserError for a range upside down, or values that the field cannot have."""
    if isinstance(p, Choice):
        if not p.values:
            raise UserError(f"{key} has nothing to choose from; give a list of values.")
        values = p.values
    else:
        if p.scale not in ("linear", "log"):
            raise UserError(f"{key} has the scale {p.scale!r}; give linear or log.")
        if not all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in (p.low, p.high)
        ):
            raise UserError(f"{key} goes from {p.low!r} to {p.high!r}; give two numbers.")
        if p.low > p.high:
            raise UserError(f"{key} has its range upside down: low is {p.low:g}, high {p.high:g}; exchange them.")
        if p.scale == "log" and p.low <= 0:
            raise UserError(f'{key} goes from {p.low:g} on a log scale; give a low above 0, or scale = "linear".')
        if not isinstance(base[key], (int, float)) or isinstance(base[key], bool):
            raise UserError(f"{key} is no number; give a list of values to choose from.")
        values = (as_field(base, key, p.low), as_field(base, key, p.high))
    for v in values:
        base.replace(**{key: v})  # raises UserError where the field cannot have the value


def describe(space: Space) -> list[str]:
    """A line for each setting."""
    out = []
    for key, p in space.items():
        span = f"{p.low:g} … {p.high:g} {p.scale}" if isinstance(p, Range) else " | ".join(map(str, p.values))
        out.append(f"{key:20} {span:34} {p.why}" + (f" (with {p.when[0]} {p.when[1]})" if p.when else ""))
    return out


def read_space(table: dict) -> dict[str, dict]:
    """The tables `dense` and `match` of a user's file; UserError for others."""
    for name in table:
        if name not in CONFIGS:
            near = difflib.get_close_matches(name, CONFIGS, 1, cutoff=0.3)
            raise UserError(
                f"A search space has the tables [dense] and [match], not {name!r}"
                + (f"; did you mean {near[0]}?" if near else "; put it into one of them.")
            )
        if not isinstance(table[name], dict):
            raise UserError(f"{name} is no table in the search space; write [{name}] and its keys below.")
    return {m: table.get(m, {}) for m in CONFIGS}


def changeable(space: Space) -> Space:
    """The settings that may change while a trial runs.

    These are numbers which neither the compiled program nor the beginning of the run depends on.
    """
    return {k: p for k, p in space.items() if isinstance(p, Range) and (_use(k) == SCALAR or k in keys_with(LIVE))}


def _use(key: str) -> str:
    return next(use_of(f) for cls in CONFIGS.values() for f in fields(cls) if f.name == key)
