"""Module 1's trained transformer into Module 2, and a check that a checkpoint can serve for it.

python -m ifvit.load_module1_weights --module1_ckpt ./checkpoints/dense_reg/dense_reg_ckpt.pkl
"""

import sys
from dataclasses import dataclass

import numpy as np

from ifvit import checkpoint, cli
from ifvit.errors import CheckpointNotFound, UserError
from ifvit.foreign import legacy_transformer
from ifvit.paths import resolve

RULE = "=" * 60
TRANSFORMERS = ("loftr_transformer", "siamese_transformer")
BRANCHES = ("loftr_transformer_global", "loftr_transformer_local")


def load_module1_transformer_weights(
    module1_ckpt_path: str, module2_params: dict, share_global_local: bool = True
) -> dict:
    """Module 2's parameters with Module 1's transformer in both branches; everything else as it was.

    Of the checkpoint the transformer alone is read, every process what its devices need.

    Args:
        module1_ckpt_path: an Orbax checkpoint of Module 1, local or gs://, `.pkl` or not at its end; or a
            pickle of the legacy format.
        module2_params: nested dictionaries with `loftr_transformer_global` and `loftr_transformer_local`;
            where a leaf is a JAX array, the loaded one has its sharding, else it is a numpy array.
        share_global_local: the branches are one transformer; else each has a copy of its own.
    Returns: new nested dictionaries; `module2_params` is left as it was.
    Raises: UserError when the checkpoint is missing, damaged, of another module, has no transformer,
        or one whose arrays do not all fit; every mismatch is named, and nothing is loaded.
    """
    import jax

    source = resolve(str(module1_ckpt_path))
    print(f"{RULE}\nLoading Module 1 Transformer Weights\n{RULE}\nSource: {source}")
    module1 = _Module1(module1_ckpt_path)
    print(f"✓ Found transformer: {module1.name}")
    for note in module1.notes:
        print(f"⚠ {note}")
    branches = {b: checkpoint.leaves(module2_params[b]) for b in BRANCHES if b in module2_params}
    _check_fit(module1.shapes, branches)
    params = dict(module2_params)
    if share_global_local:
        print("✓ Sharing transformer weights between global and local branches")
    for branch in BRANCHES:
        if branch == BRANCHES[0]:
            placement = {n: getattr(x, "sharding", None) for n, x in branches[branch].items()}
            transformer = module1.read(placement)
        elif not share_global_local:  # a copy: what has been read is not read again
            transformer = jax.tree.map(
                lambda x, like: jax.device_put(x.copy(), like.sharding) if isinstance(x, jax.Array) else x,
                transformer,
                module2_params[branch],
            )
        params[branch] = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.array(x), transformer)
        shared = share_global_local and branch == BRANCHES[1]
        print(f"  ✓ Copied to {branch}" + (" (shared weights)" if shared else ""))
    count = sum(leaf.size for leaf in jax.tree.leaves(transformer))
    print(f"✓ Successfully loaded {count:,} parameters from Module 1\n{RULE}", flush=True)
    return params


def check_module1(path: str) -> None:
    """UserError where a checkpoint cannot seed Module 2, as far as its metadata and shapes tell."""
    _Module1(path)


def verify_module1_loading(path: str) -> bool:
    """Whether a checkpoint can seed Module 2; says what it holds, or what is wrong with it."""
    print(f"{RULE}\nVerifying Module 1 Checkpoint\n{RULE}\nSource: {resolve(str(path))}")
    try:
        module1 = _Module1(path)
        flat = checkpoint.leaves(module1.read(dict.fromkeys(module1.shapes)))
    except UserError as e:
        print(f"✗ {e}\n{RULE}", flush=True)
        return False
    print(f"✓ Found transformer: {module1.name}")
    for note in module1.notes:
        print(f"⚠ {note}")
    print(
        f"✓ {len(flat)} arrays, {sum(x.size for x in flat.values()):,} parameters, "
        f"{'every digest right' if module1.checked else 'without digests'}\n{RULE}",
        flush=True,
    )
    return True


class _Module1:
    """The transformer in a checkpoint of Module 1: its name and shapes first, its arrays when asked for."""

    def __init__(self, path: str):
        try:
            self.folder = checkpoint.locate(path)
        except CheckpointNotFound:
            raise CheckpointNotFound(
                f"Module 1 checkpoint not found: {path}; train Module 1 first, or give its path with --pretrained_ckpt."
            ) from None
        self.notes: list[str] = []
        if checkpoint.is_pickle(self.folder):
            self._of_legacy()
            return
        self.metadata = checkpoint.read_metadata(self.folder)
        checkpoint.check_module(self.folder, self.metadata, "dense_reg")
        digests = self.metadata["digests"]
        names = {n.split("/")[2] for n in digests if n.startswith("state/params/")}
        self.name = next((n for n in TRANSFORMERS if n in names), None)
        if self.name is None:
            raise UserError(
                f"No transformer found in Module 1 checkpoint {path}, which has {', '.join(sorted(names))}; "
                "train Module 1 again."
            )
        self.prefix = f"state/params/{self.name}/"
        self.shapes = checkpoint.shapes(self.folder, [n for n in digests if n.startswith(self.prefix)])
        self.shapes = {n.removeprefix(self.prefix): shape for n, shape in self.shapes.items()}
        self.checked = bool(self.shapes) and all(digests[self.prefix + n] for n in self.shapes)
        if not self.checked:  # of other software: it is looked at as closely as a pickle
            arrays = checkpoint.read_leaves(self.folder, self.metadata, {self.prefix + n: None for n in self.shapes})
            self._map(
                checkpoint.nested({f"{self.name}/{n.removeprefix(self.prefix)}": x for n, x in arrays.items()})
                or {self.name: {}}
            )

    def _of_legacy(self) -> None:
        """A pickle is read whole, there is no other way."""
        self.checked = False
        self._map(checkpoint.from_legacy(self.folder).state["params"])

    def _map(self, params: dict) -> None:
        """Other code's transformer, mapped to the names used here."""
        self.name, tree, self.notes = legacy_transformer.transformer(params, self.folder)
        self.metadata, self.arrays = None, checkpoint.leaves(tree)
        self.shapes = {n: x.shape for n, x in self.arrays.items()}

    def read(self, placement: dict) -> dict:
        """Nested dictionaries of the arrays, each on the sharding that `placement` (flat) gives it, None: numpy."""
        import jax

        if self.metadata is None:
            return checkpoint.nested(
                {n: x if placement[n] is None else jax.device_put(x, placement[n]) for n, x in self.arrays.items()}
            )
        flat = checkpoint.read_leaves(self.folder, self.metadata, {self.prefix + n: s for n, s in placement.items()})
        return checkpoint.nested({n.removeprefix(self.prefix): x for n, x in flat.items()})


def _check_fit(source: dict[str, tuple], branches: dict[str, dict]) -> None:
    wrong = []
    for branch, params in branches.items():
        target = {k: v.shape for k, v in params.items()}
        wrong += [
            f"{branch}/{k}: {source.get(k, 'missing')} in Module 1, {target.get(k, 'missing')} in Module 2"
            for k in sorted(source.keys() | target.keys())
            if source.get(k) != target.get(k)
        ]
    if wrong:
        raise UserError(
            "Module 1's transformer does not fit Module 2: "
            + "; ".join(wrong)
            + ". Give both modules the same transformer_width and transformer_layers."
        )


@dataclass(frozen=True)
class Args:
    """Checks that a Module 1 checkpoint can seed Module 2."""

    module1_ckpt: str
    """Module 1's checkpoint"""

    def run(self) -> int:
        return 0 if verify_module1_loading(self.module1_ckpt) else 2


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.load_module1_weights"))
