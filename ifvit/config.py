"""Configurations of both modules.

A field's comment says what it is; its metadata holds the range that is checked. Values marked
(paper) are IFViT's (arXiv 2404.08237), LoFTR's where that says nothing.
"""

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ifvit.constants import MASK_CELL, STRIDE
from ifvit.errors import UserError
from ifvit.fields import (
    COMMON,
    FREE,
    HOST,
    LIVE,
    OWN,
    PROGRAM,
    SCALAR,
    SWEEP,
    TINY,
    check,
    choice,
    host,
    kind_of,
    number,
    place,
    program,
    use_of,
)
from ifvit.files import read_text
from ifvit.paths import from_home, resolve_data
from ifvit.presets import PRESETS

AUTO = "auto"  # of `init`


@dataclass(frozen=True)
class Config:
    """What both modules share. Reads by key too: `config["checkpoint_dir"]`."""

    # --- data
    # folders of prints; `synthetic` for generated ones
    dataset_root: tuple[str, ...] = place(("synthetic",), roles={FREE, OWN})
    # overrides the prints' resolution; 0: the file's, or the set's;
    ppi: float | str = number(0.0, 0, 5000, use=HOST, word="auto", roles={OWN})
    #                                                 auto: that too, but where the ridges tell another, theirs
    # of the prints' images: lighter than the valleys, of some sensors
    ridges: str = choice("dark", "dark", "light", use=HOST, roles={OWN})
    names: str = host("", roles={FREE, OWN})  # how prints' names are to be read, as --names; '': as known sets' are
    held_out: float = number(0.1, TINY, 0.9, use=HOST, roles={SWEEP})  # share of fingers kept for validation
    # chooses them, and the generated prints: seeds can be compared
    data_seed: int = number(0, 0, 2**31 - 1, use=HOST, roles={SWEEP})
    synthetic_fingers: int = number(300, 2, use=HOST)  # how many generated fingers, where generated ones are used
    synthetic_impressions: int = number(8, 1, use=HOST)  # and impressions of each
    # share of pairs drawn from generated fingers beside real ones
    synthetic_share: float = number(0.0, 0, 1, use=HOST, roles={LIVE})
    # Grain worker processes a host; 0: threads of this process
    input_workers: int = number(0, 0, 256, use=HOST, roles={FREE, OWN})
    # share of unreadable images above which a run refuses
    max_broken: float = number(0.1, 0, 1, use=HOST, roles={FREE})
    canvas_size: int = number(512, 64, 4096)  # px at 500 ppi, what the host hands to the device
    # --- network
    input_ppi: float = number(200.0, 50, 1000, roles={COMMON})  # resolution the network sees
    image_size: int = number(128, 16, 2048, roles={COMMON})  # px, side of its window, a multiple of 8 (paper)
    # channels of the ResNet-18 stages (paper)
    resnet_widths: tuple[int, ...] = program((64, 128, 256, 512), roles={COMMON})
    transformer: str = choice("loftr", "loftr", "siamese", roles={COMMON})  # linear attention, or plain softmax
    transformer_width: int = number(256, 4, roles={COMMON})  # (paper)
    transformer_heads: int = number(8, 1, roles={COMMON})  # (paper)
    transformer_layers: int = number(4, 1, 64, roles={COMMON})  # pairs of a self and a cross layer (paper)
    # False: position encoding of LoFTR's published outdoor_ds weights
    temp_bug_fix: bool = program(True, roles={COMMON})
    similarity: str = choice("scaled_dot", "scaled_dot", "cosine", roles={COMMON})  # cosine has a learned scale
    temperature: float = number(0.1, 1e-4, 100)  # of the dual softmax over scaled_dot (paper)
    # where cosine's learned scale starts; Module 2 begins with its Module 1's
    cosine_scale: float = number(20.0, 0.01, 1e4, use=HOST)
    # --- matching
    match_threshold: float = number(0.2, 0, 1, use=SCALAR)  # confidence above which a mutual match counts (paper)
    match_border: int = number(2, 0, 64)  # cells at the edge of the grid whose matches are dropped (LoFTR)
    # --- registration: the robust fit of a similarity to the matches
    alignment_matches: int = number(256, 4)  # best matches that the robust fit sees
    alignment_samples: int = number(256, 1)  # two-match hypotheses it tries
    inlier_radius: float = number(1.25, 0.1, 10, use=SCALAR)  # cells
    min_matches: int = number(4, 2, use=SCALAR)  # fewer inliers: not aligned
    # --- corruption of the inputs: strength 1 is the default of each, 0 none
    rotation: float = number(60.0, 0, 180, use=SCALAR)  # degrees, uniform within ± (paper)
    noise: float = number(1.0, 0, 5, use=SCALAR)  # sensor noise (Perlin, paper) and speckle
    thickness: float = number(1.0, 0, 5, use=SCALAR)  # dryness and over-pressure
    distortion: float = number(1.0, 0, 5, use=SCALAR)  # smooth skin distortion, 1: up to about 8 px at 500 ppi
    partial: float = number(1.0, 0, 1, use=SCALAR)  # how often only a part of the finger touches
    # both prints of a pair enlarged or shrunk alike, by up to exp(±zoom): ridges of 7 to 12 px at 500 ppi are met
    zoom: float = number(0.0, 0, 0.7, use=SCALAR)
    # --- training
    batch_size: int = number(128, 1)  # pairs a step, over all devices (paper)
    num_epochs: int = number(100, 1, use=HOST, roles={SWEEP})
    pairs_per_epoch: int = number(0, 0, use=HOST)  # 0: four for each training print (paper: 100,360 of 25,090)
    impostor_share: float = number(0.25, 0, 0.9, use=HOST, roles={LIVE})  # of the pairs (paper: 25,000 of 100,000)
    learning_rate: float = number(1e-3, TINY, 10, use=HOST, roles={LIVE})  # peak (paper)
    warmup: float = number(0.05, 0, 1, use=HOST)  # share of all steps
    final_lr: float = number(0.01, 0, 1, use=HOST)  # of the peak, at the end of the cosine
    weight_decay: float = number(2e-4, 0, 10, use=SCALAR)  # (paper)
    grad_clip: float = number(1.0, TINY, use=SCALAR)  # global norm
    accumulate: int = number(1, 1)  # micro-batches a step, gradients averaged; BatchNorm sees one whole
    # of the networks, parameters are float32; auto: bfloat16 where the devices are fast in it
    compute_dtype: str = choice("float32", "float32", "bfloat16", "auto")
    remat: bool = program(False, roles={FREE})  # activations computed again in the backward pass: less memory
    val_pairs: int = number(512, 0, use=HOST, roles={SWEEP})  # validation pairs an epoch
    # epochs without a better validation that end a run; 0: none do
    patience: int = number(0, 0, use=HOST, roles={SWEEP})
    # --- checkpoints: one is written after every epoch; what is kept for good
    # epochs between periodic checkpoints, which are all kept
    save_every: int = number(5, 1, use=HOST, roles={FREE, OWN})
    save_steps: int = number(0, 0, use=HOST, roles={FREE, OWN})  # steps between checkpoints within an epoch; 0: none
    keep_last: int = number(2, 1, use=HOST, roles={FREE, OWN})  # newest ones kept, whatever they are
    # best epochs kept, by validation; 1: `…_best` alone, a copy
    keep_best: int = number(1, 1, use=HOST, roles={FREE, OWN})
    # --- devices
    # devices that share one copy of parameters and moments (FSDP)
    model_parallel: int = number(1, 1, use=HOST, roles={FREE, OWN})
    seed: int = number(0, 0, 2**31 - 1, use=SCALAR, roles={OWN})

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if kind_of(f) is float and type(value) is int:  # as TOML has it
                object.__setattr__(self, f.name, float(value))
            check(f, getattr(self, f.name))
        if self.image_size % STRIDE:
            raise UserError(
                f"image_size is {self.image_size}, not a multiple of the stride {STRIDE}; "
                f"use {self.image_size // STRIDE * STRIDE + STRIDE}."
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"A batch of {self.batch_size} does not divide into {self.accumulate} micro-batches; use "
                f"--set accumulate={math.gcd(self.batch_size, self.accumulate)}."
            )
        if self.canvas_size % MASK_CELL:
            raise UserError(
                f"canvas_size is {self.canvas_size}, not a multiple of {MASK_CELL}; "
                f"use {self.canvas_size // MASK_CELL * MASK_CELL + MASK_CELL}."
            )
        if self.transformer_width % self.transformer_heads:
            raise UserError(
                f"transformer_width {self.transformer_width} is not a multiple of transformer_heads "
                f"{self.transformer_heads}; change one of them."
            )
        if self.transformer_width % 4:
            raise UserError(
                f"transformer_width {self.transformer_width} is not a multiple of 4, which the position "
                "encoding needs; change it."
            )
        if not 3 <= len(self.resnet_widths) <= 5 or min(self.resnet_widths) < 1:
            raise UserError(
                f"resnet_widths has {len(self.resnet_widths)} stages {self.resnet_widths}; give 3 to 5 positive widths."
            )

    def __getitem__(self, key: str):
        return getattr(self, known_key(type(self), key))

    @property
    def micro_batch(self) -> int:
        """Pairs that the network sees at once, over all devices."""
        return self.batch_size // self.accumulate

    def program(self):
        """This configuration as far as compiled programs depend on it; all else has its default."""
        return type(self)(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if use_of(f) == PROGRAM})

    def scalars(self) -> dict[str, np.ndarray]:
        """The numbers that compiled programs take as arguments."""
        kinds = {float: np.float32, int: np.int32}
        return {
            f.name: np.asarray(getattr(self, f.name), kinds[f.type])
            for f in dataclasses.fields(self)
            if use_of(f) == SCALAR
        }

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Fields as JSON has them (tuples become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class DenseConfig(Config):
    """Module 1, dense registration.

    `python -m ifvit.train_dense --dataset_root DIR`; figures to expect stand in docs/figures.md.
    """

    checkpoint_dir: str = place("./checkpoints/dense_reg", roles={FREE, OWN})
    dense_loss: str = choice("focal", "focal", "nll")  # LoFTR's focal loss, or the negative log-likelihood
    # sides of the window that pairs with a print too large for it are registered in, where they are scored; 1: the same
    wide_window: float = number(1.0, 1, 2, roles={FREE})
    # share of genuine pairs made of two impressions, where it is known what skin lies where; the others show one print
    # twice
    impression_share: float = number(0.0, 0, 1, use=HOST, roles={LIVE})
    teacher: str = place("", roles={FREE, OWN})  # a trained Module 1 that tells it of real prints ('' for none)
    teacher_pairs: int = number(2000, 1, use=HOST)  # pairs of impressions that it looks at, at most
    # numbers of a template of one print (`models.template`), fitted when the training ends; 0: none is made
    template_size: int = number(256, 0, use=HOST, roles={FREE})
    template_prints: int = number(2000, 4, use=HOST, roles={FREE})  # training prints that it is fitted to, at most
    loftr_ckpt: str = place("", roles={FREE, OWN})  # LoFTR weights that start the transformer ('' for none)
    # a Module 1 that it starts from ('' for none). pretrained: the package's; auto: that, if its network is the same
    init: str = place("", roles={SWEEP})

    def __post_init__(self):
        super().__post_init__()
        if self.init not in ("", AUTO) and self.loftr_ckpt:
            raise UserError("init and loftr_ckpt both start the transformer; leave one of them out.")


@dataclass(frozen=True)
class MatchConfig(Config):
    """Module 2, the matcher; its pairs are aligned by Module 1 (`dense_reg_ckpt`)."""

    checkpoint_dir: str = place("./checkpoints/matcher", roles={FREE, OWN})
    dense_reg_ckpt: str = place("./checkpoints/dense_reg/dense_reg_ckpt.pkl", roles={FREE, OWN})
    num_classes: int = number(0, 0, use=HOST, roles={OWN})  # ArcFace classes; 0: the training identities, counted
    num_epochs: int = number(70, 1, use=HOST, roles={SWEEP})  # (paper)
    learning_rate: float = number(1e-4, TINY, 10, use=HOST, roles={LIVE})  # (paper, after its pre-training)
    impostor_share: float = number(0.5, 0, 0.9, use=HOST, roles={LIVE})
    rotation: float = number(20.0, 0, 180, use=SCALAR)  # degrees; of each print on its own, before alignment
    partial: float = number(0.3, 0, 1, use=SCALAR)
    share_global_local: bool = True  # one transformer in both branches, or seeded alike and then apart
    seed_resnet: bool = host(False)  # start both branches' ResNets from Module 1's too
    # --- inputs of the branches
    deformed: bool = program(False)  # print 0 is warped by the registration's deformation, not by its similarity alone
    enhance: bool = True  # the aligned prints, for the global branch (paper: for both): band-passed …
    oriented: bool = program(False)  # … or smoothed along their ridges
    roi_size: int = number(90, 16, 1024)  # px at input_ppi, side of the local branch's window (paper)
    embedding_size: int = number(256, 2)  # of each branch (paper)
    embedding_grid: int = number(8, 1, 64)  # the head pools a branch's cells to this many a side
    embedding_channels: int = number(32, 1)  # of this many channels before the last linear map
    masked_pooling: bool = program(False)  # by means over the foreground; else zeros outside it count
    # the score of a pair: of ridges and cosines, by weights that held-out fingers tell; or the paper's sum of cosines
    fusion: str = choice("fitted", "fitted", "paper", use=HOST, roles={LIVE})
    # of the paper's sum; the local branch has the rest (paper)
    global_weight: float = number(0.6, 0, 1, use=HOST, roles={LIVE})
    calibration_pairs: int = number(4000, 4, use=HOST)  # of held-out fingers, to fit the fused score and its thresholds
    # --- losses
    loss_dense: float = number(0.5, 0, use=SCALAR)  # L_D (paper)
    loss_embedding: float = number(0.1, 0, use=SCALAR)  # L_E (paper)
    loss_arcface: float = number(1.0, 0, use=SCALAR)  # L_A (paper)
    dense_loss: str = choice("focal", "focal", "nll")
    # genuine pairs with fewer registered matches teach nothing: they may lie wrong
    label_matches: int = number(0, 0, use=SCALAR)
    # cells that print 0's positions in the global branch are moved by, at most, so that they do not give L_D away
    frame_shift: int = number(0, 0, 64)
    embedding_margin: float = number(0.4, -1, 1, use=SCALAR)  # (paper)
    arcface_margin: float = number(0.4, 0, math.pi / 2, use=SCALAR)  # (paper)
    arcface_scale: float = number(64.0, TINY, use=SCALAR)  # (paper)

    def __post_init__(self):
        super().__post_init__()
        if self.roi_size > self.image_size:
            raise UserError(f"roi_size is {self.roi_size}, more than image_size {self.image_size}; make it smaller.")


class Traced:
    """A configuration within a compiled program: `Config.program`, with its scalars as arguments of the program.

    It has none of the keys that only the host uses.
    """

    def __init__(self, config: Config, scalars: dict):
        self._config, self._scalars = config, scalars
        self._host = {f.name for f in dataclasses.fields(config) if use_of(f) == HOST}

    def __getattr__(self, name: str):
        if name in self._scalars:
            return self._scalars[name]
        if name in self._host:
            raise AttributeError(f"{name} is the host's; a compiled program cannot depend on it")
        return getattr(self._config, name)

    def replace(self, **changes) -> "Traced":
        return Traced(self._config.replace(**changes), self._scalars)


Settings = Config | Traced  # what networks and steps are made of


def keys_with(role: str) -> tuple[str, ...]:
    """The keys of either module that have a role."""
    found = [
        f.name
        for cls in (DenseConfig, MatchConfig)
        for f in dataclasses.fields(cls)
        if role in f.metadata.get("roles", ())
    ]
    return tuple(dict.fromkeys(found))


def completed(cls, saved: dict) -> dict:
    """A saved configuration with the keys that are newer than it.

    They get the values that were in effect then: the defaults, and `seed` for `data_seed`.
    """
    return cls().to_dict() | {"data_seed": saved.get("seed", 0)} | saved


def known_key(cls, key: str) -> str:
    """`key` if `cls` has it; else a UserError that names the nearest."""
    names = [f.name for f in dataclasses.fields(cls)]
    if key in names:
        return key
    near = difflib.get_close_matches(key, names, 1, cutoff=0.4)
    raise UserError(
        f"{cls.__name__} has no key {key!r}; "
        + (f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(names)}.")
    )


def parse_value(cls, key: str, text: str):
    """The text of `--set key=text` as the field's type.

    Tuples are comma-separated, e.g. `resnet_widths=16,32,64`.
    """
    known_key(cls, key)
    kind, word = next((kind_of(f), f.metadata.get("word")) for f in dataclasses.fields(cls) if f.name == key)
    if text == word:
        return text
    try:
        if isinstance(kind, types.GenericAlias):
            inner = typing.get_args(kind)[0]
            return tuple(inner(t.strip().strip("()[]'\"")) for t in text.split(",") if t.strip())
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"--set {key}={text}: {text!r} is not of type {name}; give one.") from None


def default_preset() -> str:
    """`paper` where JAX finds an accelerator, else `cpu`."""
    import jax

    return "cpu" if jax.default_backend() == "cpu" else "paper"


def preset(name: str, cls):
    """The configuration of `cls` (DenseConfig or MatchConfig) in a preset."""
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose from {', '.join(PRESETS)}.")
    return cls(**PRESETS[name][0 if cls is DenseConfig else 1])


def read_toml(path: str) -> dict:
    """A `--config` file as a dictionary; top-level keys, and tables `dense` and `match`."""
    file = Path(resolve_data(path))
    if not file.is_file():
        raise UserError(f"Config file not found: {path}; give the path of a TOML file.")
    try:
        return tomllib.loads(read_text(file, "Config file"))
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"Config file {path} is not TOML ({e}); mend that line.") from None


def with_changes(config, changes: dict):
    """`config` with other values for some keys. Lists become tuples, and `~` in paths becomes the home.

    UserError for an unknown key names the nearest known one.
    """
    paths = {f.name for f in dataclasses.fields(config) if f.metadata.get("path")}
    clean = {known_key(type(config), k): tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    return config.replace(**{k: _as_paths(v) if k in paths else v for k, v in clean.items()})


def _as_paths(value):
    """A path, or a tuple of them, as the file system has them; what is no text stays, to be refused."""
    if isinstance(value, tuple):
        return tuple(map(_as_paths, value))
    if not isinstance(value, str):
        return value
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # a locale without these letters: paths are bytes, and a text file's are UTF-8
        value = os.fsdecode(value.encode())
    return from_home(value)


RETIRED = {"loss_template"}  # keys of checkpoints from before; no network or step depends on them now


def config_of(cls, raw: dict):
    """A configuration from a checkpoint's metadata, where tuples have become lists."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k not in RETIRED})


DENSE_CONFIG = DenseConfig()
MATCH_CONFIG = MatchConfig()
