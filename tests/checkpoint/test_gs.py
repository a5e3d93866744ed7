"""Checkpoints at gs:// URLs are read and written like those in a directory; a refusal of the store is one sentence.

The store is `fake_gcs.FakeGcs`, on this machine; TensorStore asks it where it would ask Google's.
"""

import contextlib
import re
import socket
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from fake_gcs import FakeGcs

from ifvit import checkpoint, gcs, legacy
from ifvit.checkpoint import handlers
from ifvit.config import DENSE_CONFIG, MATCH_CONFIG
from ifvit.errors import UserError
from ifvit.load_module1_weights import load_module1_transformer_weights, verify_module1_loading
from ifvit.training import run_folder
from ifvit.training.match import checkpoint_of_module1

BRANCHES = ("loftr_transformer_global", "loftr_transformer_local")


def state(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    layers = {
        f"layer_{i}": {"kernel": rng.random((40, 30), np.float32), "bias": rng.random(30, np.float32)} for i in range(3)
    }
    return {
        "params": {"loftr_transformer": layers, "resnet": {"kernel": rng.random((3, 3), np.float32)}},
        "batch_stats": {"mean": rng.random(4, np.float32)},
        "step": np.int32(12),
    }


def bits(tree: dict) -> dict:
    return {n: (x.dtype.name, x.shape, np.asarray(x).tobytes()) for n, x in checkpoint.leaves(tree).items()}


TRANSFORMER = bits(state()["params"]["loftr_transformer"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of Module 1 in both forms that Orbax writes: leaves packed in few files, and a file a leaf."""
    root = tmp_path_factory.mktemp("saved")
    metadata = {"epoch": 3, "step": 12, "finished": True, "config": DENSE_CONFIG.to_dict()}
    checkpoint.save(root / "packed/dense_reg_ckpt", "dense_reg", state(), metadata)
    with pytest.MonkeyPatch.context() as patch:
        writer = handlers.writer
        patch.setattr(handlers, "writer", lambda size, *rest: writer(2**30, *rest))
        checkpoint.save(root / "apart/dense_reg_ckpt", "dense_reg", state(), metadata)
    return root


@pytest.fixture(scope="module")
def server():
    with FakeGcs() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "mine")  # whatever account this machine has stays out of it
        patch.setenv("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "1")
        yield server


@pytest.fixture
def store(server, folders):
    """The store with a bucket `prints` that holds both checkpoints under `packed/` and `apart/`."""
    server.buckets, server.faults, server.hiccups, server.cut_lists = {}, {}, set(), 0
    server.mend()
    server.upload(folders, "prints", "runs")
    server.asked.clear()
    server.changed.clear()
    return server


@pytest.fixture(params=["packed", "apart"])
def form(request):
    return request.param


@pytest.fixture
def url(form):
    return f"gs://prints/runs/{form}/dense_reg_ckpt"


@pytest.fixture
def hasty(monkeypatch):
    """Tries again after milliseconds."""
    retries = {"gcs_request_retries": {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}}
    monkeypatch.setattr(gcs, "RETRIES", retries)
    monkeypatch.setattr(gcs, "_CONTEXT", tensorstore.Context(retries))


# ---- what is there is read


def test_every_leaf_comes_to_the_bit_with_pkl_at_the_end_or_without(store, folders, form, url):
    local = checkpoint.load(folders / form / "dense_reg_ckpt")
    for path in (url, f"{url}.pkl"):
        found = checkpoint.load(path, "dense_reg")
        assert bits(found.state) == bits(local.state) == bits(state() | {"opt_state": {}})
        assert found.metadata == local.metadata and str(found.path) == url
    assert store.tokens == {"Bearer mine"}  # credentials go along


def test_it_seeds_module_2(store, url, capsys):
    empty = jax.tree.map(np.zeros_like, state()["params"]["loftr_transformer"])
    on_device = jax.tree.map(jax.device_put, empty)
    for target in (empty, on_device):
        for path in (url, f"{url}.pkl"):
            params = load_module1_transformer_weights(path, {**dict.fromkeys(BRANCHES, target), "head": target})
            assert bits(params[BRANCHES[0]]) == bits(params[BRANCHES[1]]) == TRANSFORMER
            assert params["head"] is target
            assert f"Source: {path}\n✓ Found transformer: loftr_transformer\n" in capsys.readouterr().out
    kinds = {type(x) for x in jax.tree.leaves(params[BRANCHES[0]])}
    assert kinds == {type(x) for x in jax.tree.leaves(on_device)}


def test_of_what_module_2_does_not_take_nothing_is_read(store):
    load_module1_transformer_weights(
        "gs://prints/runs/apart/dense_reg_ckpt", {b: state()["params"]["loftr_transformer"] for b in BRANCHES}
    )
    arrays = {
        name.split("/")[-1]
        for name in re.findall(r"state/(params\.[\w.]+|batch_stats[\w.]*|step)/", " ".join(store.asked))
    }
    assert arrays == {
        "params." + n.replace("/", ".")
        for n in checkpoint.leaves({"loftr_transformer": state()["params"]["loftr_transformer"]})
    }


def test_training_of_module_2_finds_it(store, url):
    found = checkpoint_of_module1(MATCH_CONFIG.replace(dense_reg_ckpt=f"{url}.pkl"))
    assert bits(found.state["params"]) == bits(state()["params"])


def test_verify_module1_loading_says_yes(store, url, capsys):
    assert verify_module1_loading(f"{url}.pkl") and "every digest right" in capsys.readouterr().out


def test_the_commands_take_it(store, folders, url, command, tmp_path):
    said = command("load_module1_weights", "--module1_ckpt", f"{url}.pkl", cwd=tmp_path)
    assert said.code == 0 and "✓ 6 arrays" in said.out
    said = command("checkpoint", "verify", url, cwd=tmp_path)
    assert (said.code, said.out) == (0, f"good  {url}  dense_reg, epoch 3, 9 leaves\n")
    said = command("checkpoint", "inspect", f"{url}.pkl", cwd=tmp_path)
    assert said.code == 0 and "state/params/loftr_transformer/layer_2/kernel" in said.out
    other = checkpoint.load(url)
    other.state["step"] = np.int32(13)
    checkpoint.save(tmp_path / "other", "dense_reg", other.state, {"epoch": 3, "config": {}})
    for second, code in ((folders / "packed/dense_reg_ckpt", 0), (tmp_path / "other", 1)):
        assert command("checkpoint", "diff", url, second, cwd=tmp_path).code == code
    assert command("checkpoint", "export", url, "out.pkl", cwd=tmp_path).code == 0
    assert bits(checkpoint.load(tmp_path / "out.pkl").state["params"]) == bits(state()["params"])


def test_verify_goes_through_a_run(store, command, tmp_path):
    store.buckets["prints"] |= {"runs/metrics.jsonl": b"{}\n", "runs/": b""}  # consoles make a folder of such an object
    for name in [n for n in store.buckets["prints"] if n.startswith("runs/apart/dense_reg_ckpt/metadata/")]:
        del store.buckets["prints"][name]  # the upload has stopped half-way
    assert len(store.buckets["prints"]) > store.page
    said = command("checkpoint", "verify", "gs://prints/runs", cwd=tmp_path)
    bad, good = said.out.splitlines()
    assert said.code == 1
    assert good.startswith("good  gs://prints/runs/packed/dense_reg_ckpt  ")
    assert bad.startswith("BAD   gs://prints/runs/apart/dense_reg_ckpt  ") and "not a whole checkpoint" in bad


def test_a_pickle_of_the_legacy_format_seeds_it_too(store, tmp_path):
    legacy.write(tmp_path / "old.pkl", {"params": state()["params"]}, {}, None)
    store.upload(tmp_path / "old.pkl", "prints", "old.pkl")
    assert bits(checkpoint.load("gs://prints/old.pkl").state["params"]) == bits(state()["params"])


def test_what_orbax_alone_wrote_is_read_and_the_missing_digests_are_told(store, tmp_path, capsys):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        orbax.save(
            tmp_path / "other",
            ocp.args.Composite(state=ocp.args.PyTreeSave(state()), metadata=ocp.args.JsonSave({"config": {}})),
        )
    store.upload(tmp_path / "other", "prints", "other")
    for path in (tmp_path / "other", "gs://prints/other"):
        found = checkpoint.load(path)
        assert bits(found.state) == bits(state() | {"opt_state": {}})
        assert f"⚠ {path} has no digests" in capsys.readouterr().out


# ---- what is damaged is not handed on


@pytest.mark.run
def test_a_flipped_bit_or_a_missing_object_is_detected_or_harmless(store, url):
    objects = store.buckets["prints"]
    detected = set()
    for name, content in list(objects.items()):
        if content and f"gs://prints/{name}".startswith(f"{url}/"):
            half = len(content) // 2
            flipped = {name: content[:half] + bytes([content[half] ^ 2]) + content[half + 1 :]}
            for damage in (flipped, {}):
                del objects[name]
                objects |= damage
                try:
                    assert bits(checkpoint.load(url).state) == bits(state() | {"opt_state": {}}), name
                except checkpoint.Damaged:
                    detected.add(name)
                objects[name] = content
    assert any(n.endswith("metadata/metadata") for n in detected)
    assert len([n for n in detected if "/state/" in n]) >= 2


# ---- what cannot be read is told in one sentence, and not called damaged


@pytest.fixture
def told(command, tmp_path):
    """Commands that read `url` exit 2 with one sentence, which this returns; `verify` among them."""

    def call(url: str) -> str:
        begun = time.monotonic()
        said = {
            words: command(*words, url, cwd=tmp_path)
            for words in (
                ("checkpoint", "verify"),
                ("checkpoint", "diff", url),
                ("load_module1_weights", "--module1_ckpt"),
            )
        }
        assert time.monotonic() - begun < 20
        for words, (code, out, err) in said.items():
            sentence = err if words[0] == "checkpoint" else out.splitlines()[3]
            assert code == 2 and "Traceback" not in err and "damaged" not in out + err and "BAD" not in out, (
                words,
                out,
                err,
            )
            assert len(sentence.strip().splitlines()) == 1 and url in sentence, sentence
        assert not verify_module1_loading(url)
        return said["checkpoint", "verify"].err

    return call


def test_an_object_or_a_bucket_that_is_not_there(store, told):
    for url in (
        "gs://prints/runs/nowhere",
        "gs://prints/runs/nowhere.pkl",
        "gs://print/runs/packed/dense_reg_ckpt",
        "gs://print",
    ):
        assert told(url).startswith(f"Error: Checkpoint not found: {url};")


def test_a_name_that_no_bucket_can_have(store, told):
    assert "Invalid GCS bucket name" in told("gs://My Prints/dense_reg_ckpt")


@pytest.mark.parametrize(
    "places",
    [["prints/"], ["metadata/metadata"], ["/state/manifest"], ["/state/d/", "/state/params"]],
    ids=["everywhere", "metadata", "index", "arrays"],
)
@pytest.mark.parametrize("code", [403, 503])
def test_a_refusal_at_any_point(store, hasty, told, url, places, code):
    store.faults = dict.fromkeys(places, (code, "me@here has no access."))
    assert re.fullmatch(
        rf"Error: {url}[/a-z.]* cannot be read \(.*me@here has no access.\); check the URL, the network and "
        r"the credentials.\n",
        told(url),
    )


def test_a_listing_that_is_refused_is_not_an_empty_one(store):
    store.faults["prints/"] = (403, "me@here does not have storage.objects.list access.")
    for question in (gcs.GcsPath.exists, gcs.GcsPath.is_dir, lambda path: list(path.iterdir())):
        for path in ("gs://prints", "gs://prints/runs"):
            with pytest.raises(gcs.Refused, match=f"{path} cannot be read .*storage.objects.list access"):
                question(gcs.GcsPath(path))


def test_one_failure_in_between_is_overcome(store, hasty, url):
    store.hiccups = {"prints/", "metadata/metadata", "/state/"}
    assert bits(checkpoint.load(url).state["params"]) == bits(state()["params"])
    assert not store.hiccups  # each has happened


@pytest.mark.run
def test_a_server_that_is_not_there_is_told_within_seconds(server, monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:1")
    begun = time.monotonic()  # as patient as ever
    with pytest.raises(gcs.Refused, match="gs://far-away/dense_reg_ckpt cannot be read .*Could not connect"):
        checkpoint.load("gs://far-away/dense_reg_ckpt")
    assert time.monotonic() - begun < 15


@pytest.mark.run
def test_a_server_that_goes_quiet_is_told(server, hasty, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as quiet:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{quiet.getsockname()[1]}")
        with pytest.raises(gcs.Refused, match="gs://silent/dense_reg_ckpt cannot be read .*Timeout was reached"):
            checkpoint.load("gs://silent/dense_reg_ckpt")


# ---- what is refused


@pytest.mark.parametrize("scheme", ["s3", "az", "hf", "http", "https", "file"])
def test_urls_of_other_stores_are_refused_by_name(store, command, tmp_path, capsys, scheme):
    for url in (f"{scheme}://prints/runs/packed/dense_reg_ckpt", f"{scheme}://prints/runs/packed/dense_reg_ckpt.pkl"):
        with pytest.raises(UserError, match=f"{scheme}:// is not supported"):
            load_module1_transformer_weights(url, {})
        assert not verify_module1_loading(url) and f"{scheme}:// is not supported" in capsys.readouterr().out
        for words in (["verify", url], ["inspect", url], ["diff", url, "gs://prints/runs/packed/dense_reg_ckpt"]):
            said = command("checkpoint", *words, cwd=tmp_path)
            assert said.code == 2 and said.err.startswith(f"Error: {url}: {scheme}:// is not supported")
    assert not store.asked and not list(tmp_path.iterdir())


def test_no_pickle_is_written_to_a_store(store, command, folders, tmp_path):
    said = command("checkpoint", "export", folders / "packed/dense_reg_ckpt", "gs://prints/new.pkl", cwd=tmp_path)
    assert said.code == 2 and "gs://prints/new.pkl: pickles are written to files only; give a local path" in said.err
    assert not store.asked and not list(tmp_path.iterdir())  # no directory named `gs:`


# ---- what is written


META = {"epoch": 3, "step": 12, "config": DENSE_CONFIG.to_dict()}
NEW = "gs://prints/new/dense_reg_ckpt"


def test_what_is_saved_comes_back_to_the_bit_and_orbax_reads_it(store, tmp_path):
    checkpoint.save(NEW, "dense_reg", state(), META, aligner={"w": np.float32([1, 2])})
    found = checkpoint.load(NEW)
    assert bits(found.state) == bits(state() | {"opt_state": {}}) and bits(found.aligner) == bits(
        {"w": np.float32([1, 2])}
    )
    gcs.GcsPath(NEW).download(tmp_path / "copy")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        assert bits(reader.restore(tmp_path / "copy/state")) == bits(state())


def test_a_checkpoint_has_its_name_with_its_last_object(store):
    checkpoint.save(NEW, "dense_reg", state(), META)
    *others, last = store.changed
    assert last == "+prints/new/dense_reg_ckpt/metadata/metadata" and last not in others and len(others) > 10


@pytest.mark.parametrize("left", [1, 5, 20])
def test_half_an_upload_is_not_taken_for_a_checkpoint_and_is_cleared_away(store, left):
    checkpoint.save(NEW, "dense_reg", state(), META)
    uploaded = [c.removeprefix("+prints/") for c in store.changed]
    for name in uploaded[left:]:
        del store.buckets["prints"][name]
    assert run_folder.candidates(gcs.GcsPath("gs://prints/new"), "dense_reg", 4) == []
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.load(NEW)
    checkpoint.discard_unfinished(gcs.GcsPath("gs://prints/new"), "dense_reg_*")
    assert not [n for n in store.buckets["prints"] if n.startswith("new/") and left > 1]


@pytest.mark.run
def test_whenever_a_replacement_is_cut_off_one_of_the_two_is_found(store, hasty):
    """After any number of changes to the bucket: the run is killed there, its next start clears up."""
    checkpoint.save(NEW, "dense_reg", state(0), META)
    before, from_here = dict(store.buckets["prints"]), len(store.changed)
    checkpoint.save(NEW, "dense_reg", state(1), META)
    changes, after = store.changed[from_here:], dict(store.buckets["prints"])
    assert not [n for n in after if ".replaced/" in n] and len(changes) > 50
    both = {"old": bits(state(0)), "new": bits(state(1))}
    for count in (*range(0, len(changes), 7), len(changes)):
        store.buckets["prints"] = dict(before)
        store.after(count, (503, "Killed."))
        with contextlib.suppress(gcs.Refused):
            checkpoint.save(NEW, "dense_reg", state(1), META)
        store.mend()
        checkpoint.discard_unfinished(gcs.GcsPath("gs://prints/new"), "dense_reg_*")
        found = bits({k: v for k, v in checkpoint.load(NEW).state.items() if k != "opt_state"})
        assert (
            found == both["new" if count == len(changes) else "old"]
            or found in both.values()
            and count > len(changes) / 2
        )
        assert [p.name for p in run_folder.candidates(gcs.GcsPath("gs://prints/new"), "dense_reg", 4)]


def test_a_renamed_one_is_whole_under_one_of_its_names_at_any_time(store, hasty):
    checkpoint.save(NEW, "dense_reg", state(), META)
    before = dict(store.buckets["prints"])
    size = len([n for n in before if n.startswith("new/")])
    for count in range(0, 2 * size, 5):
        store.buckets["prints"] = dict(before)
        store.after(count, (503, "Killed."))
        with pytest.raises(gcs.Refused):
            gcs.GcsPath(NEW).rename(gcs.GcsPath(f"{NEW}.damaged"))
        store.mend()
        whole = [name for name in (NEW, f"{NEW}.damaged") if checkpoint.has_name(gcs.GcsPath(name))]
        assert whole and all(bits(checkpoint.load(name).state) == bits(state() | {"opt_state": {}}) for name in whole)


def test_a_listing_that_is_cut_off_is_not_taken_for_a_whole_one(store):
    checkpoint.save(NEW, "dense_reg", state(), META)
    store.cut_lists = 1
    gcs.GcsPath(NEW).rename(gcs.GcsPath(f"{NEW}2"))
    assert bits(checkpoint.load(f"{NEW}2").state) == bits(state() | {"opt_state": {}})


@pytest.mark.parametrize("code", [403, 503])
def test_a_store_that_takes_nothing_is_told_in_a_sentence(store, hasty, code):
    store.read_only = {"prints/": (code, "me@here may not write.")}
    with pytest.raises(
        gcs.Refused, match=r"gs://prints/new/dense_reg_ckpt/\S+ cannot be written \(.*me@here may not write.\); check"
    ):
        checkpoint.save(NEW, "dense_reg", state(), META)
    assert not store.changed
