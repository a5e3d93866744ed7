"""What `python -m ifvit.weights` offers."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ifvit import checkpoint, cli, weights
from ifvit.checkpoint import packed
from ifvit.checkpoint.metadata import digest_of
from ifvit.config import AUTO, DENSE_CONFIG, DenseConfig, completed, keys_with, preset, read_toml, with_changes
from ifvit.data.sources import SYNTHETIC
from ifvit.errors import UserError
from ifvit.fields import FREE
from ifvit.files import write_whole

RECIPE, LONGER = "recipe.toml", "longer.toml"  # of a run from nothing, and of one that goes on from another's weights
OTHERS = ("loftr_ckpt", "teacher")  # keys by which a run learns from more than its prints
CARD = """\
# The packaged weights of Module 1

`dense_reg.safetensors` is a Module 1 (dense registration), {count:,} parameters in float32; its name for every command
is `--checkpoint pretrained`. It holds what templates of one print are made by, too.

| | |
|---|---|
| data | generated prints alone, no real one: {fingers} fingers × {impressions} impressions, data_seed {data_seed} |
| command | `{command}` |
| commit | {commit}, when the file was made |
| seed | {seed} |
| steps | {steps:,} ({epochs} epochs, batches of {batch}) |
| validation | {value} |
| versions | {versions} |
| digest | `{digest}`, of the metadata, which hold one of every array |
| licence | Apache-2.0, as the code |

## Figures

Filled in by hand: Module 1 alone, `python -m ifvit.evaluate --checkpoint pretrained`.

| prints | protocol | EER | FMR100 | FMR1000 |
|---|---|---|---|---|
| | | | | |

## Limits

- It has seen no real finger. On prints of sensors that look unlike the generated ones it registers fewer pairs.
- Its score says how well ridges agree; its thresholds were measured on the sets of `docs/figures.md`. A matcher for
  your prints is trained by `ifvit.train_all`.
- It sees {ppi:g} ppi in a window of {size} px, of prints that this cuts by more than 15 % in one {wide:g} times as
  wide. Prints at a wrong resolution do not register.
- It is for research. It is no means to identify a person.
"""


@dataclass(frozen=True)
class Pack:
    """Writes the packaged weights and their card from a checkpoint of Module 1 that saw generated prints alone."""

    path: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        found = checkpoint.load(self.path, "dense_reg", checkpoint.NETWORK)
        checkpoint.check_ours(found.path, found.metadata)
        check_generated(found)
        network = {k: found.state[k] for k in ("params", "batch_stats")}
        arrays = checkpoint.leaves(found.trees | {"state": network})
        if wrong := sorted(n for n, x in arrays.items() if x.dtype != "float32"):
            raise UserError(f"{found.path} has {wrong[0]} as {arrays[wrong[0]].dtype}; give a checkpoint in float32.")
        if found.metadata.get("foreign") or not all(found.metadata["digests"].get(n) for n in arrays):
            raise UserError(f"{found.path} has no digest of every array; give the checkpoint that the training wrote.")
        metadata = told(found.metadata)
        count = sum(x.size for n, x in arrays.items() if n.startswith("state/params/"))
        text = card(metadata, count)
        write_whole(weights.FOLDER / weights.FILE, packed.as_bytes(arrays, metadata))
        write_whole(weights.FOLDER / weights.CARD, text)
        size = (weights.FOLDER / weights.FILE).stat().st_size
        print(f"{weights.FOLDER / weights.FILE}: {len(arrays)} arrays of {found.path}, {size / 1e6:.1f} MB")
        print(f"{weights.FOLDER / weights.CARD}: fill in the figures by hand.")
        return 0


def check_generated(found: checkpoint.Checkpoint) -> None:
    """UserError for a checkpoint that has learned from anything but generated prints, or began from one that has."""
    config = completed(DenseConfig, found.metadata["config"])
    if config["dataset_root"] != [SYNTHETIC]:
        raise UserError(
            f"{found.path} was trained on prints of {', '.join(config['dataset_root'])}; packaged weights come from "
            "generated prints alone, so give a checkpoint of a run with --dataset_root synthetic."
        )
    if others := [k for k in OTHERS if config[k] not in ("", checkpoint.PRETRAINED)]:
        raise UserError(
            f"{found.path} was trained with {others[0]} = {config[others[0]]}; packaged weights come from generated "
            f"prints alone, so give a checkpoint of a run without {others[0]}."
        )
    if config["init"] not in ("", AUTO, checkpoint.PRETRAINED):
        check_generated(checkpoint.load(config["init"], "dense_reg", checkpoint.NETWORK))


def told(metadata: dict) -> dict:
    """The metadata without what belongs to the run's machine, and with the digests of the arrays that are kept."""
    digests = {n: d for n, d in metadata["digests"].items() if n.startswith(checkpoint.NETWORK)}
    kept = {k: v for k, v in metadata.items() if k not in ("digest", "shardings")}
    kept |= {
        "digests": digests,
        "config": metadata["config"] | {"checkpoint_dir": DENSE_CONFIG.checkpoint_dir},
        "history": [attempt for attempt in metadata["history"] if "set_aside" not in attempt],
    }
    return kept | {"digest": digest_of(kept)}


def card(metadata: dict, count: int) -> str:
    """The text of CARD.md; `count` is that of the parameters."""
    config = completed(DenseConfig, metadata["config"])
    value = metadata["value"]
    return CARD.format(
        count=count,
        fingers=config["synthetic_fingers"],
        impressions=config["synthetic_impressions"],
        data_seed=config["data_seed"],
        command=command(config),
        commit=commit(),
        seed=config["seed"],
        steps=metadata["step"],
        epochs=metadata["epoch"],
        batch=config["batch_size"],
        value="none" if value is None else f"accuracy {value:.4f} on known warps of held-out generated fingers",
        versions=", ".join(f"{k} {v}" for k, v in metadata["versions"].items()),
        digest=metadata["digest"],
        ppi=config["input_ppi"],
        size=config["image_size"],
        wide=config["wide_window"],
    )


def command(config: dict) -> str:
    """The training command of a configuration: its recipe, and what differs from that."""
    recipe = LONGER if config["init"] else RECIPE
    base = with_changes(preset("cpu", DenseConfig), read_toml(str(weights.FOLDER / recipe))["dense"]).to_dict()
    differ = [k for k in base if k not in keys_with(FREE) and base[k] != config[k]]
    values = {k: ",".join(map(str, v)) if isinstance(v := config[k], list) else v for k in differ}
    return " ".join(
        [
            f"python -m ifvit.train_dense --preset cpu --dataset_root synthetic --config ifvit/weights/{recipe}",
            *(f"--set {k}={v}" for k, v in values.items()),
        ]
    )


def commit() -> str:
    """The commit that the package lies in, `unknown` where it is not a clone's."""
    try:
        said = subprocess.run(
            ["git", "-C", weights.__path__[0], "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
        )
    except OSError:  # no git
        return "unknown"
    return said.stdout.strip() or "unknown"


COMMANDS = {"pack": Pack}


if __name__ == "__main__":
    sys.exit(cli.main_with_commands(COMMANDS, "ifvit.weights"))
