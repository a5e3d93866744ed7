"""Where trials get their values from: a search algorithm for Ray Tune that remembers what it has drawn."""

import importlib.util
import json

import numpy as np
from ray.tune.search import Searcher

from ifvit.errors import UserError
from tune import record
from tune.space import Choice, Range, Space, as_field, draw


class Samples(Searcher):
    """First gives interrupted trials again, with the values they had; then new ones, until there are `count`.

    `suggest` notes a trial's values in its folder before anything else uses them.
    """

    def __init__(self, source, sweep: str, metric: str, mode: str, begun: list[record.Record], count: int):
        super().__init__(metric=metric, mode=mode)
        self._source, self._sweep = source, sweep
        self._open = [r for r in begun if r.end is None]
        self._fresh = [n for n in range(count) if n not in {r.number for r in begun}]
        self._number: dict[str, int] = {}
        for r in begun:
            if r.end is not None:
                source.learn(r.number, r.values, r.last(metric) if r.end["how"] != "failed" else None)

    def suggest(self, trial_id: str) -> dict | str:
        if self._open:
            r = self._open.pop(0)
            number, values = r.number, r.values
        elif self._fresh:
            number = self._fresh.pop(0)
            values = self._source.draw(number)
            record.note_values(self._sweep, number, values)
        else:
            return Searcher.FINISHED
        self._number[trial_id] = number
        return {"trial": number, **values}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        number = self._number[trial_id]
        good = result and not error and "failed" not in result
        self._source.learn(number, record.read(self._sweep, number).values, result[self.metric] if good else None)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the trials' folders have it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, like `save`."""


class Random:
    """Sample n is a pure function of the seed and n."""

    def __init__(self, space: Space, base, seed: int):
        self._space, self._base, self._seed = space, base, seed

    def draw(self, number: int) -> dict:
        return draw(self._space, self._base, self._seed, number)

    def learn(self, number: int, values: dict, value: float | None) -> None:
        """Does nothing: random search does not learn."""


class Optuna:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011). It learns from every trial's last value."""

    def __init__(self, space: Space, base, seed: int, mode: str):
        if importlib.util.find_spec("optuna") is None:
            raise UserError("Optuna is not installed; pip install 'ifvit[optuna]', or use --searcher random.")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space, self._base = optuna, space, base
        direction = "maximize" if mode == "max" else "minimize"
        self._seed, self._study = seed, optuna.create_study(direction=direction)
        self._asked: dict[int, object] = {}

    def draw(self, number: int) -> dict:
        if number == 0:  # the configuration as it is
            return {}
        # The seed depends on the number, so that a sweep that is resumed does not draw the same values again.
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=8)
        trial = self._asked[number] = self._study.ask()
        values: dict = {}
        # Settings that others depend on are drawn before these.
        for key, p in sorted(self._space.items(), key=lambda item: item[1].when is not None):
            if not p.when or values.get(p.when[0], self._base[p.when[0]]) == p.when[1]:
                values[key] = self._suggest(trial, key, p)
        return {k: values[k] for k in self._space if k in values}

    def _suggest(self, trial, key: str, p: Range | Choice):
        if isinstance(p, Choice):  # as texts, because Optuna's categories cannot be lists
            texts = {json.dumps(v): v for v in p.values}
            return texts[trial.suggest_categorical(key, list(texts))]
        return as_field(self._base, key, trial.suggest_float(key, p.low, p.high, log=p.scale == "log"))

    def learn(self, number: int, values: dict, value: float | None) -> None:
        state = self._optuna.trial.TrialState
        if number in self._asked:
            told = (
                (self._asked.pop(number), value) if value is not None else (self._asked.pop(number), None, state.FAIL)
            )
            self._study.tell(*told)
        elif values and value is not None:  # a trial of an earlier attempt at this sweep
            kept = {k: v for k, v in values.items() if k in self._space}
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params={
                        k: json.dumps(v) if isinstance(self._space[k], Choice) else float(v) for k, v in kept.items()
                    },
                    distributions={k: self._distribution(self._space[k]) for k in kept},
                    value=value,
                )
            )

    def _distribution(self, p: Range | Choice):
        d = self._optuna.distributions
        if isinstance(p, Choice):
            return d.CategoricalDistribution([json.dumps(v) for v in p.values])
        return d.FloatDistribution(p.low, p.high, log=p.scale == "log")
