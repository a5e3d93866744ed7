"""Flags that are given more than once: nothing of them goes missing."""

import pytest

from ifvit import cli, evaluate, train_all, train_dense, train_match, verify
from ifvit.commands import build_config
from ifvit.config import DenseConfig
from ifvit.errors import UserError


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset_root", "A", "--dataset_root", "B"],
        ["--dataset_root", "A", "B"],
        ["--dataset_root=A", "--dataset-root=B"],
        ["--dataset_root=A", "--seed", "3", "--dataset-root", "B"],
    ],
)
@pytest.mark.parametrize("cls", [train_dense.Args, train_match.Args, train_all.Args])
def test_a_list_in_parts_is_one_list(cls, words):
    assert cli.parse(cls, "x", words).dataset_root == ("A", "B")


def test_a_list_in_parts_keeps_the_order_of_all_its_values():
    words = ["--checkpoint", "c", "--dataset_root", "A", "B", "--protocol", "all", "--dataset_root", "C", "D"]
    args = cli.parse(evaluate.Args, "x", words)
    assert (args.dataset_root, args.protocol) == (("A", "B", "C", "D"), "all")


@pytest.mark.parametrize(
    "cls, words, told",
    [
        (train_dense.Args, ["--seed", "1", "--seed", "2"], "--seed is given twice ('1' and '2')"),
        (train_dense.Args, ["--num-epochs=1", "--num_epochs", "2"], "--num_epochs is given twice ('1' and '2')"),
        (train_dense.Args, ["--resume", "--resume", "never"], "--resume is given twice ('auto' and 'never')"),
        (
            train_match.Args,
            ["--pretrained_ckpt", "", "--pretrained_ckpt=x"],
            "--pretrained_ckpt is given twice ('' and 'x')",
        ),
        (
            verify.Args,
            ["--checkpoint", "c", "a.png", "b.png", "--checkpoint", "d"],
            "--checkpoint is given twice ('c' and 'd')",
        ),
    ],
)
def test_one_value_given_twice_is_refused(cls, words, told):
    with pytest.raises(UserError) as e:
        cli.parse(cls, "x", words)
    assert told in str(e.value)


def test_a_sweeps_flags_are_no_exception():
    from tune.__main__ import Args

    assert cli.parse(Args, "tune", ["--search", "noise", "--search", "rotation", "warmup"]).search == (
        "noise",
        "rotation",
        "warmup",
    )
    with pytest.raises(UserError, match="--num_samples is given twice"):
        cli.parse(Args, "tune", ["--num_samples", "8", "--num_samples", "9"])


def test_a_switch_given_twice_is_on():
    assert cli.parse(verify.Args, "x", ["a", "b", "--json", "--json"]).json is True


def test_set_is_repeated_for_other_keys_and_refused_for_the_same():
    args = cli.parse(
        train_dense.Args, "x", ["--preset", "smoke", "--set", "noise=0.5", "--set=partial=0.25", "--set", "noise=0.5"]
    )
    config = build_config(DenseConfig, args, {}, None)
    assert (config.noise, config.partial) == (0.5, 0.25)
    args = cli.parse(train_dense.Args, "x", ["--preset", "smoke", "--set", "noise=0.5", "--set", "noise=1"])
    with pytest.raises(UserError, match="--set gives noise twice"):
        build_config(DenseConfig, args, {}, None)
