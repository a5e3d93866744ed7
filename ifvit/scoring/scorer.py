"""A trained checkpoint as a scorer of pairs: what evaluate, verify and train_all call."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float32

from ifvit import checkpoint
from ifvit.config import DenseConfig, MatchConfig, config_of
from ifvit.data.loader import fixed_batches
from ifvit.data.pairs import Pair
from ifvit.data.placement import mapped, window_to_canvas
from ifvit.data.prepare import Prints
from ifvit.data.single import Canvases, OnCanvas
from ifvit.devices.traced import traced
from ifvit.errors import UserError
from ifvit.models.networks import Network, dense_network, match_network
from ifvit.models.template import Template
from ifvit.pixels import agreement
from ifvit.pixels.agreement import seen_of
from ifvit.pixels.alignment import align, roi_corner
from ifvit.pixels.geometry import exact
from ifvit.pixels.registration import CheckedRegistration, best_turn
from ifvit.pixels.views import plain_views
from ifvit.pixels.wide import looked_at
from ifvit.scoring.answers import answers, dense_answers, registrations
from ifvit.scoring.fusion import Fusion
from ifvit.scoring.scores import (
    PairScore,
    dense_scores,
    for_pair,
    in_either_window,
    in_graph,
    match_scores,
    prepares,
    score_pairs,
)
from ifvit.scoring.template import as_template, embed_prints, template_of

TILTED = 30.0  # degrees: of prints that lie so far from one another Module 1 finds fewer matches


@dataclass(frozen=True)
class Scorer:
    """Module 1 (scores by the ridges that agree) or Module 2 (scores by the fusion)."""

    module: str
    config: MatchConfig | DenseConfig
    params: dict
    batch_stats: dict
    aligner: tuple[dict, dict] | None  # Module 1's params and batch_stats
    aligner_config: DenseConfig | None
    num_classes: int
    fusion: Fusion | None  # None: Module 1, or a matcher's checkpoint from before the end of training
    trained_on: tuple[str, ...] = ()  # a sample of its training prints, by `contents.known`
    digest: str = ""  # of the checkpoint's metadata, which hold one of every array
    template: Template | None = None  # what Module 1 makes templates of one print by

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike) -> "Scorer":
        """UserError where the checkpoint is missing, half-written or damaged."""
        found = checkpoint.load(path, parts=checkpoint.NETWORK)
        meta, state = found.metadata, found.state
        checkpoint.check_ours(found.path, meta)
        if found.module == "dense_reg":
            config = config_of(DenseConfig, meta["config"])
            return cls(
                "dense_reg",
                config,
                state["params"],
                state["batch_stats"],
                None,
                None,
                0,
                None,
                tuple(meta.get("sample", ())),
                meta["digest"],
                found.template and as_template(found.template),
            )
        config = config_of(MatchConfig, meta["config"])
        aligner = found.aligner and (found.aligner["params"], found.aligner["batch_stats"])
        params = {k: v for k, v in state["params"].items() if not checkpoint.RETIRED.search(k)}
        if config.share_global_local:
            del params["loftr_transformer_local"]
        fusion = Fusion.of_metadata(meta["fusion"]) if meta.get("fusion") else None
        return cls(
            "matcher",
            config,
            params,
            state["batch_stats"],
            aligner,
            aligner and config_of(DenseConfig, meta["aligner_config"]),
            meta["num_classes"],
            fusion,
            tuple(meta.get("sample", ())),
            meta["digest"],
            found.template and as_template(found.template),
        )

    @cached_property
    def _aligner_network(self):
        return self.aligner and dense_network(self.aligner_config)

    @cached_property
    def _score(self):
        if self.module == "dense_reg":
            return dense_scores(self.registers[0], self.config, self.wide_window).jitted()
        net = match_network(self.config, self.num_classes)
        return match_scores(net, self._aligner_network, self.config, self._checked, self.wide_window).jitted()

    @property
    def wide_window(self) -> float:
        """Of the Module 1 that registers."""
        about = self.config if self.module == "dense_reg" else self.aligner_config
        return about.wide_window if about else 1.0

    @property
    def _checked(self) -> bool:
        """Whether Module 2 lays a pair as its ridges agree best; by the matches alone where the fusion is of those."""
        return self.fusion is not None and self.fusion.checked

    def score(self, prints: Prints, pairs: Sequence[Pair], batch_size: int) -> dict[str, np.ndarray]:
        """`score` and what it is made of, one value a pair; higher is more alike.

        Where it is calibrated there is `log_odds`, the natural logarithm of the likelihood ratio, too.
        """
        found = score_pairs(self._score, self.state, prints, pairs, batch_size)
        if self.module == "dense_reg":
            found["score"] = found["ridges"].astype(np.float64)
            found["log_odds"] = np.asarray(agreement.log_odds(found["ridges"], found["overlap"]))
        elif self.fusion:
            found["score"], found["log_odds"] = self.fusion.score(found), self.fusion.log_odds(found)
        else:
            weight = self.config.global_weight
            found["score"] = weight * found["global"] + (1 - weight) * found["local"]
        return found

    def card(self) -> list[str]:
        """Lines that tell what scores."""
        module = {"dense_reg": "Module 1 (dense registration)", "matcher": "Module 2 (matcher)"}[self.module]
        known = ("dataset_root", "image_size", "input_ppi", "resnet_widths", "transformer_width", "transformer_layers")
        count = sum(x.size for x in jax.tree.leaves(self.params))
        fusion = self.fusion and ", ".join(f"{n} {w:.3g}" for n, w in zip(self.fusion.features, self.fusion.weights))
        return [
            f"{module}, {count:,} parameters, digest {self.digest}",
            *(f"{key}: {self.config[key]}" for key in known),
            *([f"score: logistic of {fusion}"] if fusion else []),
        ]

    @property
    def state(self) -> tuple:
        """What `_score` and `_answer` take before prints and pairs."""
        return (self.params, self.batch_stats) + ((self.aligner or ({}, {}),) if self.module == "matcher" else ())

    def scores_of_canvases(self, batch: dict) -> dict[str, jax.Array]:
        """`score` and what it is made of, for a batch of canvases and masks; to be traced (`scoring.exported`)."""
        found = in_graph(self._score, self.state, batch)
        if self.module == "dense_reg":
            odds = agreement.log_odds(found["ridges"], found["overlap"])
            return found | {"score": found["ridges"], "log_odds": odds}
        odds = self.fusion.traced_log_odds(found)
        return found | {"score": jax.nn.sigmoid(odds), "log_odds": odds}

    @cached_property
    def registers(self) -> tuple[Network, tuple[dict, dict]]:
        """The Module 1 that registers, this one or the matcher's own, with its weights. UserError without one."""
        if self.module == "dense_reg":
            return dense_network(self.config), (self.params, self.batch_stats)
        if not self.aligner:
            raise UserError(
                "This matcher was trained without Module 1 and registers nothing; give Module 1's checkpoint."
            )
        return self._aligner_network, self.aligner

    @cached_property
    def _register(self) -> PairScore:
        net, config = self.registers[0], self.config

        def how(wide):
            look = exact(lambda state, batch: looked_at(net, state, batch, config, wide)[0])
            return PairScore(prepares(net, wide or config, check=True), look)

        return in_either_window(how, config, self.wide_window).jitted()

    def registration(self, prints: Prints, pair: Pair) -> CheckedRegistration:
        """Module 1's registration of one pair (no batch axis), checked by the ridges, in px of the window."""
        batch, _ = next(fixed_batches(prints, [pair], 1))
        found = for_pair(self._register, prints, pair).score(self.registers[1], batch)
        return jax.tree.map(lambda x: x[0], jax.device_get(found))

    def laid(self, a: OnCanvas, b: OnCanvas) -> tuple[OnCanvas, CheckedRegistration]:
        """Print a, turned where that is better, and its registration with b."""
        lies = lambda one: (one, self.registration(Canvases([one, b]), Pair(0, 1, False)))
        found = lies(a)
        upright = self.upright(a, b, found[1].similarity if found[1].registered else None)
        return max(found, lies(upright), key=lambda one: one[1].agreement) if upright else found

    @cached_property
    def _turn(self):
        net, config = self.registers[0], self.config
        return jax.jit(exact(lambda state, batch: best_turn(net, state, batch, config)))

    def upright(self, a: OnCanvas, b: OnCanvas, similarity: Float[np.ndarray, "4"] | None = None) -> OnCanvas | None:
        """Print a turned to lie as b does, for Module 1 to see it better; None where it would not.

        `similarity` is that of their registration. Without one print a is tried at all turns, and None is returned
        where the ridges do not surely agree at any.
        """
        if similarity is not None:
            degrees = float(np.degrees(np.arctan2(similarity[1], similarity[0])))
            return a.turned(degrees) if abs(degrees) > TILTED else None
        batch, _ = next(fixed_batches(Canvases([a, b]), [Pair(0, 1, False)], 1))
        degrees, agreed = (float(x[0]) for x in jax.device_get(self._turn(self.registers[1], batch)))
        return a.turned(degrees) if agreed >= agreement.TURNED else None

    def picture(self, prints: Prints, pair: Pair, path: str | os.PathLike) -> None:
        """Draws both prints whole, side by side, with inlier matches as lines coloured by confidence.

        What the window has cut away is pale. It draws nothing for a Module 2 without a Module 1.
        """
        from ifvit.scoring import plots

        if self.module == "matcher" and not self.aligner:
            return
        found = self.registration(prints, pair)
        window = window_to_canvas(self.config)
        names = [Path(prints.prints[i].path).name for i in pair[:2]]
        (a, xy_a), (b, xy_b) = (
            plots.whole_print(*prints.canvas(i), seen_of(found.deformation, self.config), mapped(window, xy))
            for i, xy in ((pair.print0, found.points0[found.inliers]), (pair.print1, found.points1[found.inliers]))
        )
        plots.matches(
            path,
            a,
            b,
            xy_a,
            xy_b,
            found.matches.confidence[found.inliers],
            f"{names[0]} – {names[1]}: {int(found.count)} matches, ridges agree to {found.agreement:.0%}",
        )

    def parts(self, row: dict[str, Any]) -> dict[str, float]:
        """What each part of one pair's score adds to the natural logarithm of the likelihood ratio.

        `row` is a row of `answers`.
        """
        if self.module == "dense_reg":
            return agreement.parts(float(row["score"]), float(row["overlap"]))
        return {
            name: float(x[0]) for name, x in self.fusion.parts({k: np.asarray(v)[None] for k, v in row.items()}).items()
        }

    def local_corners(self, prints: Prints, pair: Pair, found: CheckedRegistration) -> Float[np.ndarray, "4 2"] | None:
        """Corners (x, y) of what the local branch sees of a pair, in px of print 1's window; None without one.

        `found` is their registration.
        """
        if not self._checked or not self.aligner:
            return None
        batch, _ = next(fixed_batches(prints, [pair], 1))
        left, top = jax.device_get(self._local(found.similarity[None], found.deformation[None], batch))[0] - 0.5
        right, bottom = left + self.config.roi_size, top + self.config.roi_size
        return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)

    @cached_property
    def _local(self):
        config = self.config

        @exact
        def corner(similarity, deformation, batch):
            views = plain_views(batch, config)
            pair = align(views.image0, views.image1, views.mask0, views.mask1, similarity, config, deformation)
            return roi_corner(pair.overlap, config.roi_size)

        return jax.jit(corner)

    @cached_property
    def _answer(self):
        if self.module == "dense_reg":
            return dense_answers(self.registers[0], self.config, self.wide_window).jitted()
        net = match_network(self.config, self.num_classes)
        return answers(net, self._aligner_network, self.config, self._checked, self.wide_window).jitted()

    @cached_property
    def _answer_of_one(self) -> PairScore:
        about = (self.module, self.config.to_dict(), self.num_classes, self._checked)
        about += (self.aligner_config and self.aligner_config.to_dict(),)
        narrow = traced(lambda: self._answer.score, f"answer of one pair {about}")
        wide = traced(lambda: self._answer.wide.score, f"answer of one large pair {about}")
        how = self._answer
        return how._replace(score=narrow, wide=how.wide and how.wide._replace(score=wide))

    @cached_property
    def _registrations(self):
        if self._checked:
            return dense_answers(self._aligner_network, self.config, self.wide_window).jitted()
        return registrations(self._aligner_network, self.config).jitted()

    def answers(self, prints: Prints, pairs: Sequence[Pair], batch_size: int) -> dict[str, np.ndarray]:
        """`score` and all that `scoring.answers` tells, a row a pair; of Module 1, or of Module 2 with its fusion."""
        if len(pairs) == 1 and jax.process_count() == 1:
            batch, _ = next(fixed_batches(prints, pairs, 1))
            found = jax.device_get(for_pair(self._answer_of_one, prints, pairs[0]).score(*self.state, batch))
        else:
            found = score_pairs(self._answer, self.state, prints, pairs, batch_size)
        if self.module == "dense_reg":
            return found | {"log_odds": np.asarray(agreement.log_odds(found["score"], found["overlap"]))}
        return found | {"score": self.fusion.score(found), "log_odds": self.fusion.log_odds(found)}

    @property
    def template_size(self) -> int:
        """Numbers that a template of one print has; 0 where the checkpoint makes none."""
        return self.template.bias.size if self.template else 0

    @cached_property
    def _template(self):
        return jax.jit(template_of(self.registers[0], self.config))

    def templates(
        self, prints: Prints, batch_size: int, turns: tuple[float, ...] = (0.0,)
    ) -> Float32[np.ndarray, "N R E"]:
        """A unit row of each print turned by each of `turns` degrees.

        Two prints are compared by the product of their rows. A print without foreground has rows of 0. UserError where
        the checkpoint makes no template.
        """
        if not self.template_size:
            raise UserError(
                "This checkpoint makes no template of one print. Module 1's final checkpoint makes them (with "
                "template_size above 0, and two impressions of two fingers to learn from), and so do all of the "
                "Module 2 that is trained from it."
            )
        if not prints.prints:
            return np.empty((0, len(turns), self.template_size), np.float32)
        return embed_prints(self._template, (*self.registers[1], self.template), prints, batch_size, turns)

    def registrations(self, prints: Prints, pairs: Sequence[Pair], batch_size: int) -> dict[str, np.ndarray]:
        """What the Module 1 of a Module 2 tells of each pair, laid as `answers` does; a row a pair."""
        if self.module == "dense_reg":
            return self.answers(prints, pairs, batch_size)
        state = self.aligner if self._checked else (self.aligner,)
        return score_pairs(self._registrations, state, prints, pairs, batch_size)
