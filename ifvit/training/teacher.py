"""Pairs of two impressions of a real finger, registered by a Module 1 that is trained already: the teacher.

They are registered once, at the start of a run. Its folder keeps them in FILE, plain arrays: those of `Taught`, and
`about`, what they were made of and by. A run that is gone on with reads them from there.
"""

import io
import itertools
import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Float

from ifvit import checkpoint
from ifvit.checkpoint.digest import digest
from ifvit.config import Config, DenseConfig
from ifvit.constants import MAP_STEP
from ifvit.data.impressions import Grid, Taught, Warp, canvas_points
from ifvit.data.pairs import Pair
from ifvit.data.placement import similarity_map, window_to_canvas
from ifvit.data.prepare import PrintSet
from ifvit.data.protocols import by_finger
from ifvit.data.sources import SYNTHETIC, Print
from ifvit.devices.processes import exchange
from ifvit.errors import UserError
from ifvit.files import write_whole
from ifvit.pixels.agreement import checked_config
from ifvit.pixels.geometry import exact
from ifvit.pixels.registration import checked_registration
from ifvit.scoring.fit import bent_back
from ifvit.scoring.scorer import Scorer
from ifvit.scoring.scores import PairScore, prepares, score_pairs
from ifvit.training import run_folder

FILE = "pairs.npz"
SURE = 0.8  # confidence above which a registration is learned from
log = logging.getLogger("ifvit")


def taught(config: DenseConfig, train: PrintSet) -> Taught:
    """What the teacher of a run tells of its training prints: from the run's folder, where it stands there.

    All processes call it. UserError where the teacher is missing or damaged, or there is nothing to register.
    """
    teacher = Scorer.from_checkpoint(config.teacher)
    net, state = teacher.registers
    weights = {name: digest(leaf) for name, leaf in checkpoint.leaves(dict(zip(("params", "stats"), state))).items()}
    about = json.dumps([weights, train.digest(), config.canvas_size, config.teacher_pairs, config.data_seed])
    file = checkpoint.as_writable_path(config.checkpoint_dir) / FILE
    found = _read(file, about)
    if all(exchange("teacher", "read" if found else "")):
        return found
    pairs = candidates(train.prints, config.teacher_pairs, config.data_seed)
    if not pairs:
        raise UserError(
            "There is a teacher, and no real finger to train on has two impressions that it could register; leave the "
            "teacher out."
        )
    seen = teacher.config.replace(canvas_size=config.canvas_size)

    @exact
    def register(state, batch):
        checked, _ = checked_registration(net, state, batch, seen)
        return {k: getattr(checked, k) for k in ("similarity", "deformation", "registered", "confidence")}

    how = PairScore(prepares(net, seen, check=True), register).jitted()
    rows = score_pairs(how, (state,), train, pairs, config.micro_batch, config.model_parallel)
    sure = np.flatnonzero(rows["registered"] & (rows["confidence"] > SURE))
    log.info("The teacher %s registers %d of %d pairs of impressions", config.teacher, len(sure), len(pairs))
    maps = [maps_of(rows["similarity"][n], rows["deformation"][n], seen) for n in sure]
    shape = (-1, *canvas_points(config.canvas_size).shape)
    map01, map10 = (np.array([both[k] for both in maps], np.float32).reshape(shape) for k in (0, 1))
    found = Taught(np.array([pairs[n][:2] for n in sure], np.int32).reshape(-1, 2), map01, map10)
    run_folder.write_beside(file, lambda here: _write(here, found, about))
    return found


def candidates(prints: Sequence[Print], count: int, seed: int) -> list[Pair]:
    """Up to `count` pairs of impressions of real fingers: databases take turns, and the fingers of each.

    The order of a database's fingers, and of a finger's pairs, is drawn by the seed.
    """
    rng = np.random.default_rng([seed, 3])
    databases = []
    for database, fingers in by_finger(prints).items():
        if database != SYNTHETIC:
            drawn = [
                rng.permutation(list(itertools.combinations(fingers[n], 2))) for n in rng.permutation(len(fingers))
            ]
            databases.append(_in_turn(drawn))
    return [Pair(int(i), int(j), True) for i, j in _in_turn(databases)[:count]]


def maps_of(
    similarity: Float[np.ndarray, "4"], deformation: Float[np.ndarray, "W W 2"], config: Config
) -> tuple[Grid, Grid]:
    """`map01` and `map10` of a registration (`CheckedRegistration`) that a Module 1 of this configuration has made."""
    points = canvas_points(config.canvas_size)
    xy = points.reshape(-1, 2).astype(np.float64)
    window, check = window_to_canvas(config), window_to_canvas(checked_config(config))
    over = window @ similarity_map(similarity) @ np.linalg.inv(window)
    map10 = bent_back(xy, over, deformation, np.linalg.inv(check)).reshape(points.shape)
    map01 = Warp.through(map10, MAP_STEP).inverse(xy).reshape(points.shape)
    return map01.astype(np.float32), map10.astype(np.float32)


def _in_turn(lists: Sequence) -> list:
    """The first of each list, then the second of each that has one, and so on."""
    return [x for turn in itertools.zip_longest(*lists) for x in turn if x is not None]


def _read(file: epath.Path, about: str) -> Taught | None:
    """What a run's folder has; None where that is nothing, is damaged, or was made of other things than `about`."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return Taught(*(arrays[k] for k in Taught._fields)) if str(arrays["about"]) == about else None
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e:
        log.warning("⚠ %s is damaged, and its pairs are registered again (%s).", file, e)
        return None


def _write(file: Path, found: Taught, about: str) -> None:
    content = io.BytesIO()
    np.savez(content, about=np.array(about), **found._asdict())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content.getvalue())
