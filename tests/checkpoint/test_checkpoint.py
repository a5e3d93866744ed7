"""A checkpoint comes back to the bit, or is refused: never something in between."""

import contextlib
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ifvit import checkpoint
from ifvit.checkpoint import handlers
from ifvit.errors import UserError

CONFIG = {"batch_size": 4, "dataset_root": ["a", "b"], "learning_rate": 1e-3, "ppi": 0.1 + 0.2}
META = {"epoch": 3, "config": CONFIG, "step": 12, "best": None, "finished": False}


def tiny(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    odd = np.array([np.nan, -np.nan, -0.0, np.inf, 1e-45, 0.1], np.float32)
    return {
        "params": {
            "loftr_transformer": {"layer_0": {"kernel": rng.random((3, 4), np.float32), "bias": odd}},
            "half": rng.random(5).astype(ml_dtypes.bfloat16),
            "byte": np.arange(256, dtype=np.uint8),
        },
        "batch_stats": {"mean": rng.random((2, 1, 2)).astype(np.float64)},
        "opt_state": {"0": {"count": np.int32(7)}, "1": {"mask": np.array([True, False])}},
        "step": np.int32(12),
    }


def bits(tree: dict) -> dict:
    return {name: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for name, leaf in checkpoint.leaves(tree).items()}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "dense_reg_ckpt"
    checkpoint.save(path, "dense_reg", tiny(), META, aligner={"params": {"w": np.float32([1, 2])}})
    return path


# ---- round trip


def test_every_leaf_comes_back_to_the_bit(saved):
    found = checkpoint.load(saved)
    assert bits(found.state) == bits(tiny())
    assert bits(found.aligner) == bits({"params": {"w": np.float32([1, 2])}})


def test_metadata_come_back(saved):
    found = checkpoint.load(saved, "dense_reg")
    assert found.module == "dense_reg" and found.path == saved
    assert {k: found.metadata[k] for k in META} == META


def test_without_an_aligner_there_is_none(tmp_path):
    checkpoint.save(tmp_path / "c", "dense_reg", tiny(), META)
    assert checkpoint.load(tmp_path / "c").aligner is None


def test_a_template_comes_back_beside_the_state(tmp_path):
    template = {"mean": np.float32([1, 2]), "bias": np.float32([3])}
    checkpoint.save(tmp_path / "c", "dense_reg", tiny(), META, template=template)
    found = checkpoint.load(tmp_path / "c", parts=checkpoint.NETWORK)
    assert bits(found.template) == bits(template) and found.aligner is None
    assert set(found.trees) == {"state", "template"}
    assert any(n.startswith("template/") for n in found.metadata["digests"])


def test_a_run_goes_on_without_the_leaves_that_are_retired(tmp_path):
    """Those of a Module 2 from before templates were Module 1's, wherever in the state they lie."""
    state = tiny()
    state["params"] |= {"head_single": {"embed": {"kernel": np.ones((2, 2), np.float32)}}, "arcface_single": np.ones(3)}
    state["opt_state"] |= {"mu": {"arcface_single": np.zeros(3)}}
    checkpoint.save(tmp_path / "c", "matcher", state, META)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: here, {"params": {"byte": 0}})
    found = checkpoint.restore(tmp_path / "c", checkpoint.read_metadata(tmp_path / "c"), placed)
    assert bits(found.state) == bits(tiny())
    assert "head_single" in checkpoint.load(tmp_path / "c").state["params"]  # as it was written


def test_orbax_alone_reads_it(saved):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore(saved / "state")
    assert bits(state) == bits(tiny())


# ---- damage


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_a_flipped_bit_in_any_file_is_detected_or_harmless(saved):
    whole = checkpoint.load(saved)
    detected = set()
    for file in files(saved):
        data = file.read_bytes()
        for at in sorted({0, len(data) // 3, len(data) // 2, len(data) - 1}):
            file.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
            try:
                found = checkpoint.load(saved)
            except UserError:
                detected.add(file.parent.name + "/" + file.name)
            else:
                where = f"byte {at} of {file.relative_to(saved)}"
                assert bits(found.state) == bits(whole.state), where
                assert bits(found.aligner) == bits(whole.aligner), where
                assert {k: found.metadata.get(k) for k in whole.metadata if k != "digest"} == {
                    k: v for k, v in whole.metadata.items() if k != "digest"
                }, where
        file.write_bytes(data)
    assert bits(checkpoint.load(saved).state) == bits(whole.state)
    assert "metadata/metadata" in detected and len(detected) >= 3  # and files with arrays


def test_a_flipped_bit_in_any_byte_of_the_metadata_is_detected_or_harmless(saved):
    file = saved / "metadata/metadata"
    data = file.read_bytes()
    whole = checkpoint.read_metadata(checkpoint.as_path(saved))
    first = data.index(b'"epoch"')
    for at in range(first, first + 40):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            found = checkpoint.read_metadata(checkpoint.as_path(saved))
        except UserError:
            continue
        assert found == whole, at


def test_a_file_that_is_cut_or_gone_is_detected_or_harmless(saved):
    for file in files(saved):
        data = file.read_bytes()
        for left in (data[: len(data) // 2], None):
            file.unlink() if left is None else file.write_bytes(left)
            with contextlib.suppress(UserError):
                assert bits(checkpoint.load(saved).state) == bits(tiny()), file
            file.write_bytes(data)


@pytest.mark.parametrize("missing", ["metadata", "state"])
def test_a_half_written_checkpoint_is_refused(saved, missing):
    shutil.rmtree(saved / missing)
    with pytest.raises(UserError, match="half-written"):
        checkpoint.load(saved)
    assert not checkpoint.complete(checkpoint.as_path(saved))


def test_any_other_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.load(tmp_path)


def test_a_leaf_that_its_digests_do_not_know_is_left_out(saved, tmp_path):
    checkpoint.save(tmp_path / "more", "dense_reg", tiny() | {"extra": np.zeros(2)}, META)
    shutil.rmtree(saved / "state")
    shutil.copytree(tmp_path / "more/state", saved / "state")
    assert bits(checkpoint.load(saved).state) == bits(tiny())


def test_a_leaf_of_another_checkpoint_is_refused_by_name(saved, tmp_path):
    other = tiny()
    other["batch_stats"]["mean"][1, 0, 1] += 1
    checkpoint.save(tmp_path / "other", "dense_reg", other, META)
    shutil.rmtree(saved / "state")
    shutil.copytree(tmp_path / "other/state", saved / "state")
    with pytest.raises(UserError, match="1 of .* leaves, e.g. state/batch_stats/mean"):
        checkpoint.load(saved)


def test_a_checkpoint_of_the_other_module_is_refused(saved):
    with pytest.raises(UserError, match=r"Module 1 \(dense registration\), not of Module 2"):
        checkpoint.load(saved, "matcher")


# ---- what a path means


def test_a_pkl_path_means_the_directory_without_it(saved):
    assert bits(checkpoint.load(f"{saved}.pkl").state) == bits(tiny())


@pytest.mark.parametrize("url", ["s3://bucket/dense_reg_ckpt", "https://bucket/dense_reg_ckpt.pkl", "az://b/c"])
def test_urls_of_other_stores_are_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for refused in (lambda: checkpoint.load(url), lambda: checkpoint.save(url, "dense_reg", tiny(), META)):
        with pytest.raises(UserError, match=f"{url}: .* is not supported"):
            refused()
    assert not list(tmp_path.iterdir())  # no directory named `s3:`


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=f"Checkpoint not found: {tmp_path}/nowhere.pkl"):
        checkpoint.load(tmp_path / "nowhere.pkl")


# ---- replacing one


def test_the_new_one_replaces_the_old_and_nothing_else_is_left(saved):
    checkpoint.save(saved, "dense_reg", tiny(1), {**META, "epoch": 4})
    found = checkpoint.load(saved)
    assert bits(found.state) == bits(tiny(1)) and found.metadata["epoch"] == 4
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


class Killed(BaseException):
    """The process ends here."""


def test_killed_while_writing_the_old_one_is_found(saved, monkeypatch):
    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", die)
        with pytest.raises(Killed):
            checkpoint.save(saved, "dense_reg", tiny(1), META)
    assert bits(checkpoint.load(saved).state) == bits(tiny())
    assert bits(checkpoint.load(f"{saved}.pkl").state) == bits(tiny())


def test_killed_before_the_old_one_is_removed_the_new_one_counts(saved):
    shutil.copytree(saved, f"{saved}.replaced")
    checkpoint.save(saved, "dense_reg", tiny(1), META)
    shutil.copytree(saved, f"{saved}.replaced")
    assert bits(checkpoint.load(saved).state) == bits(tiny(1))
    checkpoint.save(saved, "dense_reg", tiny(2), META)
    assert bits(checkpoint.load(saved).state) == bits(tiny(2))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_write_that_fails_leaves_the_old_one_in_its_place(saved, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(handlers.MetadataHandler, "finalize", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(saved, "dense_reg", tiny(1), META)
    assert bits(checkpoint.load(saved).state) == bits(tiny())
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


# ---- the commands


def test_verify_says_good(command, saved, tmp_path):
    said = command("checkpoint", "verify", saved, cwd=tmp_path)
    assert said.code == 0 and said.out.startswith("good") and "BAD" not in said.out


def test_verify_goes_through_the_checkpoints_of_a_run(command, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "dense_reg_epoch_5")
    shutil.rmtree(tmp_path / "dense_reg_epoch_5/metadata")
    said = command("checkpoint", "verify", tmp_path, cwd=tmp_path)
    assert said.code == 1
    good, bad = sorted(said.out.splitlines(), key=lambda line: line.startswith("BAD"))
    assert good.startswith("good") and "dense_reg_ckpt" in good
    assert bad.startswith("BAD") and "dense_reg_epoch_5" in bad


def test_verify_of_nothing_is_a_mistake(command, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        said = command("checkpoint", "verify", path, cwd=tmp_path)
        assert said.code == 2 and said.err.startswith("Error: ")


def test_inspect_lists_leaves_and_metadata(command, saved, tmp_path):
    said = command("checkpoint", "inspect", f"{saved}.pkl", cwd=tmp_path)
    assert said.code == 0
    lines = {line.split()[0]: line.split()[1:] for line in said.out.splitlines()}
    assert lines["state/params/loftr_transformer/layer_0/kernel"] == [
        "float32",
        "[3,",
        "4]",
        str(3 * 4 * 4),
        "replicated",
    ]
    assert lines["state/params/half"] == ["bfloat16", "[5]", "10", "replicated"]
    assert "aligner/params/w" in lines and lines["epoch:"] == ["3"]


def test_diff_of_equals_exits_0(command, saved, tmp_path):
    checkpoint.save(tmp_path / "other", "dense_reg", tiny(), {**META, "epoch": 9})
    said = command("checkpoint", "diff", saved, tmp_path / "other", cwd=tmp_path)
    assert (said.code, said.err) == (0, "") and "equal to the bit" in said.out


def test_diff_lists_which_leaves_differ_and_by_how_much(command, saved, tmp_path):
    state = tiny()
    state["params"]["loftr_transformer"]["layer_0"]["kernel"][1, 2] += 0.5
    state["params"]["loftr_transformer"]["layer_0"]["bias"][2] = 0.0  # it was -0.0
    state["step"] = np.int32(13)
    state["batch_stats"]["more"] = np.zeros(1)
    state["opt_state"]["1"]["mask"] = np.array([True, False, True])
    checkpoint.save(tmp_path / "other", "dense_reg", state, META)
    said = command("checkpoint", "diff", saved, tmp_path / "other", cwd=tmp_path)
    assert said.code == 1
    lines = dict(line.split(": ", 1) for line in said.out.splitlines() if ": " in line)
    assert set(lines) == {
        "params/loftr_transformer/layer_0/kernel",
        "params/loftr_transformer/layer_0/bias",
        "step",
        "batch_stats/more",
        "opt_state/1/mask",
    }
    assert lines["params/loftr_transformer/layer_0/kernel"] == "1 of 12 elements, at most 0.5"
    assert lines["batch_stats/more"] == "only in the second"
    assert "5 leaves differ" in said.out


def test_diff_with_nothing_exits_2(command, saved, tmp_path):
    said = command("checkpoint", "diff", saved, tmp_path / "nowhere", cwd=tmp_path)
    assert said.code == 2 and said.err.startswith("Error: Checkpoint not found")


def test_an_unknown_command_names_the_nearest(command, tmp_path):
    said = command("checkpoint", "verfy", tmp_path, cwd=tmp_path)
    assert said.code == 2 and "'verify'" in said.err
