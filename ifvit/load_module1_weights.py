"""Module 1's trained transformer into Module 2, and a check that a checkpoint can serve for it.

    python -m ifvit.load_module1_weights --module1_ckpt ./checkpoints/dense_reg/dense_reg_ckpt.pkl
"""

import sys
from dataclasses import dataclass

import jax
import numpy as np

from ifvit import checkpoint, cli
from ifvit.errors import UserError
from ifvit.paths import resolve

RULE = "=" * 60
TRANSFORMERS = ("loftr_transformer", "siamese_transformer")
BRANCHES = ("loftr_transformer_global", "loftr_transformer_local")


def load_module1_transformer_weights(module1_ckpt_path: str, module2_params: dict, share_global_local: bool = True) -> dict:
    """Module 2's parameters with Module 1's transformer in both branches; everything else as it was.

    Args:
        module1_ckpt_path: an Orbax checkpoint of Module 1, `.pkl` or not at its end.
        module2_params: nested dictionaries with `loftr_transformer_global` and `loftr_transformer_local`.
        share_global_local: the branches are one transformer; else each has a copy of its own.
    Returns: new nested dictionaries; `module2_params` is left as it was.
    Raises: UserError when the checkpoint is missing, damaged, of another module, has no transformer,
        or one whose arrays do not all fit; every mismatch is named, and nothing is loaded.
    """
    source = resolve(str(module1_ckpt_path))
    print(f"{RULE}\nLoading Module 1 Transformer Weights\n{RULE}\nSource: {source}")
    name, transformer = _read_transformer(module1_ckpt_path)
    print(f"✓ Found transformer: {name}")
    _check_fit(transformer, {b: module2_params[b] for b in BRANCHES if b in module2_params})
    params = dict(module2_params)
    if share_global_local:
        print("✓ Sharing transformer weights between global and local branches")
    for branch in BRANCHES:
        params[branch] = jax.tree.map(np.array, transformer)
        shared = share_global_local and branch == BRANCHES[1]
        print(f"  ✓ Copied to {branch}" + (" (shared weights)" if shared else ""))
    count = sum(leaf.size for leaf in jax.tree.leaves(transformer))
    print(f"✓ Successfully loaded {count:,} parameters from Module 1\n{RULE}", flush=True)
    return params


def verify_module1_loading(path: str) -> bool:
    """Whether a checkpoint can seed Module 2; says what it holds, or what is wrong with it."""
    print(f"{RULE}\nVerifying Module 1 Checkpoint\n{RULE}\nSource: {resolve(str(path))}")
    try:
        name, transformer = _read_transformer(path)
    except UserError as e:
        print(f"✗ {e}\n{RULE}", flush=True)
        return False
    flat = checkpoint.leaves(transformer)
    print(f"✓ Found transformer: {name}")
    print(f"✓ {len(flat)} arrays, {sum(x.size for x in flat.values()):,} parameters, every digest right\n{RULE}", flush=True)
    return True


def _read_transformer(path: str) -> tuple[str, dict]:
    try:
        checkpoint.locate(path)
    except UserError as e:
        if "not found" in str(e):
            raise UserError(f"Module 1 checkpoint not found: {path}; train Module 1 first, or give its path with "
                            "--pretrained_ckpt.") from None
        raise
    params = checkpoint.load(path, "dense_reg").state["params"]
    for name in TRANSFORMERS:
        if name in params:
            return name, params[name]
    raise UserError(f"No transformer found in Module 1 checkpoint {path}, which has {', '.join(sorted(params))}; "
                    "train Module 1 again.")


def _check_fit(transformer: dict, branches: dict[str, dict]) -> None:
    source = {k: v.shape for k, v in checkpoint.leaves(transformer).items()}
    wrong = []
    for branch, params in branches.items():
        target = {k: v.shape for k, v in checkpoint.leaves(params).items()}
        wrong += [f"{branch}/{k}: {source.get(k, 'missing')} in Module 1, {target.get(k, 'missing')} in Module 2"
                  for k in sorted(source.keys() | target.keys()) if source.get(k) != target.get(k)]
    if wrong:
        raise UserError("Module 1's transformer does not fit Module 2: " + "; ".join(wrong)
                        + ". Give both modules the same transformer_width and transformer_layers.")


@dataclass(frozen=True)
class Args:
    """Checks that a Module 1 checkpoint can seed Module 2."""

    module1_ckpt: str
    """Module 1's checkpoint"""

    def run(self) -> int:
        return 0 if verify_module1_loading(self.module1_ckpt) else 2


if __name__ == "__main__":
    sys.exit(cli.main(Args, "ifvit.load_module1_weights"))
