"""The files in cluster/jobs are taken by what reads them, ask for what the run needs, and open nothing to the world.

None of them meets its cluster here. Ray's own parsers, schema and packer are asked, Kubernetes' schema of pods, and a
schema of KubeRay's RayJob by hand; the Slurm script runs with stand-ins for Slurm, Ray and the training.
"""

import copy
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import tomllib
import zipfile
from pathlib import Path

import click
import jsonschema
import pytest
import ray
import yaml
from ray._private.accelerators import tpu
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

from ifvit.data.sources import EXTENSIONS
from ifvit.train_all import Args

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "cluster/jobs"
SCHEMAS = ROOT / "tests" / "schemas"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
FLAGS = {f.name for f in dataclasses.fields(Args)}
TOKEN = "~/.ray/auth_token"


def load(name: str) -> dict:
    return yaml.safe_load((JOBS / name).read_text())


def change(tree: dict, where: str, value) -> dict:
    """A copy of `tree` with another value at a/0/b (~ is a slash in a key); None takes the key away."""
    *path, last = [int(k) if k.isdigit() else k.replace("~", "/") for k in where.split("/")]
    node = tree = copy.deepcopy(tree)
    for key in path:
        node = node[key]
    node.pop(last) if value is None else node.__setitem__(last, value)
    return tree


def found(problems: dict[str, bool]) -> list[str]:
    return [what for what, there in problems.items() if there]


def command_problems(words: list[str], hosts: int) -> list[str]:
    """What is wrong with a training command that is to run on so many hosts."""
    said = {w.lstrip("-"): value for w, value in zip(words, [*words[1:], ""]) if w.startswith("--")}
    folders = [said.get(f, "") for f in ("dataset_root", "dense_checkpoint_dir", "matcher_checkpoint_dir")]
    return [f"unknown flag --{f}" for f in said if f not in FLAGS] + found(
        {
            "not train_all": words[:3] != ["python", "-m", "ifvit.train_all"],
            "not on shared storage": not all(f.startswith("/shared/") for f in folders),
            f"{said.get('num_workers')} workers for {hosts} hosts": said.get("num_workers") != str(hosts),
            "the preset would be that of the driver's host": said.get("preset") != "paper",
        }
    )


# What `ray job submit --working-dir .` sends

CODE = [
    "ifvit/train_all.py",
    "ifvit/data/sources.py",
    "cluster/__init__.py",
    "tune/__init__.py",
    "pyproject.toml",
    "mine.toml",
    "constraints-3.11.txt",
    "README.md",
]
REST = [
    "checkpoints/dense_reg/dense_reg_ckpt/state/d/0",
    "runs/x/metrics.jsonl",
    "dense_reg_epoch_5/state/d/0",
    "core",
    "weights.pkl",
    "outdoor.ckpt",
    "outdoor.safetensors",
    ".venv/lib/jaxlib.so",
    ".git/objects/pack/p.pack",
    ".cache/0",
    ".pytest_cache/v",
    "tests/test_x.py",
    "tests/out/curves.png",
    "build/lib/a.py",
    "evaluation/s.csv",
    "ifvit/checkpoints/matcher/matcher_best/state/d/0",
    "ifvit/.cache/0",
    "ifvit/__pycache__/a.pyc",
    "ifvit/a.pkl",
    *(f"prints/101_{i}{end}" for i, end in enumerate(sorted(EXTENSIONS))),
    *(f"ifvit/data/101_{i}{end.upper()}" for i, end in enumerate(sorted(EXTENSIONS))),
]


def sent(folder: Path, to: Path, gitignore: bool = True) -> set[str]:
    create_package(str(folder), to, include_gitignore=gitignore)
    return {n for n in zipfile.ZipFile(to).namelist() if not n.endswith("/")}


@pytest.fixture
def tree(tmp_path):
    for name in CODE + REST:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    for name in REST:
        os.truncate(tmp_path / "tree" / name, 1 << 20)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("gitignore", [True, False])
def test_a_job_sends_the_code_and_nothing_else(tree, tmp_path, gitignore):
    assert sent(tree, tmp_path / "sent.zip", gitignore) == set(CODE)


def test_without_the_list_prints_and_checkpoints_would_travel(tree, tmp_path):
    (tree / ".rayignore").unlink()
    assert {"prints/101_0.bmp", "weights.pkl", "dense_reg_epoch_5/state/d/0"} <= sent(tree, tmp_path / "sent.zip")


def test_of_this_repository_every_module_is_sent(tmp_path):
    modules = {str(p.relative_to(ROOT)) for d in ("ifvit", "cluster", "tune") for p in (ROOT / d).rglob("*.py")}
    assert modules <= sent(ROOT, tmp_path / "sent.zip")
    assert (tmp_path / "sent.zip").stat().st_size < 4 << 20


# KubeRay


def schema_problems(job: dict) -> list[str]:
    schema, pod = (json.loads((SCHEMAS / name).read_text()) for name in ("rayjob.json", "pod.json"))
    schema["$defs"] |= pod["$defs"]
    return [e.message for e in jsonschema.Draft202012Validator(schema).iter_errors(job)]


def pod_problems(spec: dict, name: str) -> list[str]:
    box = spec["containers"][0]
    mounts = {m["name"]: m["mountPath"] for m in box["volumeMounts"]}
    cache = {e["name"]: e["value"] for e in box["env"]}.get("IFVIT_CACHE", "")
    return found(
        {
            f"{name} is not the one container": [c["name"] for c in spec["containers"]] != [name],
            "no image": "image" not in box,
            "a mount without its volume": not set(mounts) <= {v["name"] for v in spec["volumes"]},
            "nothing at /shared": "/shared" not in mounts.values() or not cache.startswith("/shared/"),
            "requests are not limits": box["resources"]["requests"] != box["resources"]["limits"],
            "ports of the host": bool(spec.get("hostNetwork") or box.get("ports")),
        }
    )


def worker_problems(group: dict) -> list[str]:
    spec = group["template"]["spec"]
    has, selector = spec["containers"][0]["resources"]["limits"], spec["nodeSelector"]
    hook = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    problems = {
        "not all hosts at once": not group["minReplicas"] == group["replicas"] == group["maxReplicas"],
        "killed while it saves": spec["terminationGracePeriodSeconds"] <= int(re.search(r"seconds (\d+)", hook)[1]),
    }
    if "google.com/tpu" in has:
        chips, shape = int(has["google.com/tpu"]), selector["cloud.google.com/gke-tpu-topology"]
        kind = {"tpu-v5-lite-podslice": "v5litepod", "tpu-v6e-slice": "v6e"}[
            selector["cloud.google.com/gke-tpu-accelerator"]
        ]
        problems[f"{group['numOfHosts']} hosts of {chips} chips are no {shape}"] = (
            shape not in tpu.VALID_TPU_TOPOLOGY[kind]
            or chips != tpu.get_chips_per_host(shape, kind)
            or chips * group["numOfHosts"] != tpu.get_num_chips_from_topology(shape)
        )
    else:
        problems["not several GPUs"] = int(has["nvidia.com/gpu"]) < 2
    return found(problems)


def job_problems(job: dict) -> list[str]:
    """What Kubernetes would refuse, or else what it would take and this project would not."""
    if problems := schema_problems(job):
        return problems
    cluster = job["spec"]["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    hosts = sum(g["replicas"] * g.get("numOfHosts", 1) for g in groups)
    return (
        command_problems(shlex.split(job["spec"]["entrypoint"]), hosts)
        + pod_problems(head["template"]["spec"], "ray-head")
        + [p for g in groups for p in pod_problems(g["template"]["spec"], "ray-worker") + worker_problems(g)]
        + found(
            {
                "another Ray than here": cluster["rayVersion"] != ray.__version__,
                "work on the head": head["rayStartParams"].get("num-cpus") != "0",
            }
        )
    )


@pytest.mark.parametrize("name", ["kuberay-gpu.yaml", "kuberay-tpu-v5e.yaml", "kuberay-tpu-v6e.yaml"])
def test_kuberay_files_hold(name):
    assert job_problems(load(name)) == []


CLUSTER = "spec/rayClusterSpec"
GROUP = CLUSTER + "/workerGroupSpecs/0"
POD = GROUP + "/template/spec"


@pytest.mark.parametrize(
    "where, value, message",
    [
        ("spec/backofLimit", 3, "backofLimit"),
        (CLUSTER + "/authOptions/mode", "disabled", "token"),
        (CLUSTER + "/headGroupSpec/serviceType", "LoadBalancer", "ClusterIP"),
        (CLUSTER + "/headGroupSpec/enableIngress", True, "enableIngress"),
        (POD + "/containers/0/volumeMount", [], "volumeMount"),
        ("spec/entrypoint", "python -m ifvit.train_all --dataset /shared/prints", "unknown flag --dataset"),
        (GROUP + "/numOfHosts", 2, "2 hosts of 4 chips are no 4x4"),
        (GROUP + "/numOfHosts", 2, "4 workers for 2 hosts"),
        (GROUP + "/maxReplicas", 2, "not all hosts at once"),
        (CLUSTER + "/rayVersion", "2.9.0", "another Ray"),
        (CLUSTER + "/headGroupSpec/rayStartParams/num-cpus", None, "work on the head"),
        (POD + "/nodeSelector/cloud.google.com~gke-tpu-topology", "2x4", "are no 2x4"),
        (POD + "/containers/0/resources/requests/google.com~tpu", "1", "requests are not limits"),
        (POD + "/containers/0/image", None, "no image"),
        (POD + "/containers/0/name", "worker", "ray-worker"),
        (POD + "/containers/0/ports", [{"containerPort": 8265, "hostPort": 8265}], "ports of the host"),
        (POD + "/volumes", [], "a mount without its volume"),
        (POD + "/terminationGracePeriodSeconds", 30, "killed while it saves"),
    ],
)
def test_a_broken_rayjob_is_refused(where, value, message):
    assert message in str(job_problems(change(load("kuberay-tpu-v6e.yaml"), where, value)))


# ray up


def start_flags(command: str) -> dict:
    """What `ray start` at the end of a shell command understands; click raises where it does not know a flag."""
    words = shlex.split(command)
    return ray_start.make_context("start", words[words.index("start") + 1 :]).params


def launcher_problems(config: dict) -> list[str]:
    """What Ray's launcher would refuse, or else what it would take and this project would not."""
    starts = [config[f"{who}_start_ray_commands"][-1] for who in ("head", "worker")]
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
        on_head, _ = map(start_flags, starts)
    except (ValueError, jsonschema.ValidationError, click.UsageError) as e:
        return [str(e)]
    kinds = config["available_node_types"]
    head = kinds[config["head_node_type"]]
    (worker,) = (k for k in kinds.values() if k is not head)
    slice_ = worker["node_config"].get("acceleratorType", "v5litepod-16")
    return found(
        {
            "work on the head": head["resources"] != {"CPU": 0},
            "the dashboard is open": on_head["dashboard_host"] not in ("127.0.0.1", "localhost"),
            "nobody would start the workers": not on_head["autoscaling_config"],
            "no token": config["file_mounts"].get(TOKEN) != TOKEN
            or not all("RAY_AUTH_MODE=token" in s for s in starts),
            "open to the world": any(a in json.dumps(config) for a in ("0.0.0.0", "::/0")),
            # which Ray makes for hosts without one, and which opens port 22 to the world
            "Ray's own security group": config["provider"]["type"] == "aws"
            and not all(k["node_config"].get("SecurityGroupIds") for k in kinds.values()),
            "not all hosts at once": not worker["min_workers"] == worker["max_workers"] == config["max_workers"],
            "not preemptible": not re.search("spot|preemptible", str(worker["node_config"])),
            "the head is preemptible": bool(re.search("spot|preemptible", str(head["node_config"]))),
            "wrong chips": worker["resources"].get("TPU", 4) != tpu.get_num_tpu_visible_chips_per_host(slice_),
            "more than code is copied": not set(config["file_mounts"].values())
            <= {TOKEN, "ifvit", "cluster", "tune", "pyproject.toml", "constraints-3.11.txt", "README.md"},
            "this package is not installed": not any(
                f'pip install --quiet -c constraints-3.11.txt ".[{extra}]"' in command
                for command in config["setup_commands"]
                for extra in EXTRAS
            ),
            "the cache is not shared": not all("IFVIT_CACHE=/shared/" in s for s in starts),
            "nothing at /shared": not re.search("mount .*YOUR-.* /shared", str(config["initialization_commands"])),
        }
    )


@pytest.mark.parametrize("name", ["aws-gpu.yaml", "gcp-tpu.yaml"])
def test_launcher_files_hold(name):
    assert launcher_problems(load(name)) == []
    text = (JOBS / name).read_text()
    (said,) = re.findall(r"--working-dir \. -- (.*)", re.sub(r"\\\n# *", "", text))
    pod = re.search(r"acceleratorType: (\S+)", text)  # Ray counts a pod as one worker
    hosts = tpu.get_total_chips_from_accelerator_type(pod[1]) // 4 if pod else load(name)["max_workers"]
    assert command_problems(shlex.split(said), hosts) == []


@pytest.mark.parametrize(
    "where, value, message",
    [
        ("max_worker", 4, "max_worker"),
        ("head_node_type", "heads", "head_node_type"),
        ("available_node_types/gpu/min_worker", 4, "min_worker"),
        ("provider/security_group", {"IpPermissions": [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}, "open to the world"),
        ("available_node_types/head/node_config/SecurityGroupIds", None, "Ray's own security group"),
        (
            "available_node_types/head/node_config/InstanceMarketOptions",
            {"MarketType": "spot"},
            "the head is preemptible",
        ),
        ("head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0", "the dashboard is open"),
        ("head_start_ray_commands/1", "ray start --head --dashboard-hosts=127.0.0.1", "No such option"),
        ("worker_start_ray_commands/1", "ray start --address=$RAY_HEAD_IP:6379", "no token"),
        ("file_mounts/~~ifvit", ".", "more than code is copied"),
        ("setup_commands", [], "this package is not installed"),
    ],
)
def test_a_broken_cluster_is_refused(where, value, message):
    assert message in str(launcher_problems(change(load("aws-gpu.yaml"), where, value)))


# Slurm

STAND_INS = {
    "srun": 'while [ "$1" != ray ]; do shift; done; exec "$@"',
    "ray": '[ "$1" = get-auth-token ] && exec echo secret; printf "%s\\n" "$@" > "$LOG/ray"; '
    'while [ "$1" != -- ]; do shift; done; shift; "$@"',
    "python": 'trap "exit 75" TERM; env > "$LOG/env"; echo "$@" > "$LOG/train"; [ "$CODE" = wait ] || exit "$CODE"; '
    "while :; do sleep 0.05; done",
    "scontrol": 'echo "$@" >> "$LOG/scontrol"; [ "$1" = show ] && echo "JobState=$STATE Reason=None"; true',
}


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(code, state): the script's process; training ends with that code, or with `wait` when it is told."""
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/activate").touch()
    for name, body in STAND_INS.items():
        (tmp_path / "venv/bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "venv/bin" / name).chmod(0o755)
    script = tmp_path / "slurm.sh"
    script.write_text((JOBS / "slurm.sh").read_text().replace("/YOUR-SHARED", str(tmp_path)))
    env = {
        "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "HEAD_IP": "127.0.0.1",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_GPUS_ON_NODE": "8",
    }
    return lambda code, state="RUNNING": subprocess.Popen(["bash", script], env=env | {"CODE": code, "STATE": state})


def requeued(folder: Path) -> bool:
    return (folder / "scontrol").exists() and "requeue 12345" in (folder / "scontrol").read_text()


@pytest.mark.parametrize(
    "code, state, again",
    [("75", "RUNNING", True), ("75", "COMPLETING", False), ("0", "RUNNING", False), ("2", "RUNNING", False)],
)
def test_75_puts_the_job_in_the_queue_again_unless_it_was_cancelled(sbatch, tmp_path, code, state, again):
    assert sbatch(code, state).wait(20) == int(code)
    assert requeued(tmp_path) == again


def test_a_notice_reaches_the_driver_which_saves_and_the_job_queues_again(sbatch, tmp_path):
    job, deadline = sbatch("wait"), time.monotonic() + 20
    while not (tmp_path / "train").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert requeued(tmp_path)


def test_what_the_slurm_script_says_is_understood_by_ray_and_by_the_command(sbatch, tmp_path):
    sbatch("0").wait(20)
    words = (tmp_path / "ray").read_text().splitlines()
    words = words[words.index("symmetric-run") + 1 : words.index("--")]
    given = symmetric_run.make_context("_", list(words), resilient_parsing=True).params
    start = ray_start.make_context("start", curate_and_validate_ray_start_args(list(words))).params
    assert (given["address"], given["min_nodes"]) == ("127.0.0.1:22345", 2)
    assert (start["num_gpus"], start["num_cpus"]) == (8, 64)
    train = (tmp_path / "train").read_text().replace(str(tmp_path), "/shared").split()
    assert command_problems(["python", *train], 2) == []
    env = (tmp_path / "env").read_text().splitlines()
    assert {"RAY_ADDRESS=127.0.0.1:22345", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=secret"} <= set(env)
    with pytest.raises(click.ClickException, match="--head"):
        curate_and_validate_ray_start_args([*words, "--head"])


def test_slurm_gives_each_host_one_task_and_time_to_save():
    text = (JOBS / "slurm.sh").read_text()
    said = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", text, re.M))
    assert subprocess.run(["bash", "-n", JOBS / "slurm.sh"]).returncode == 0
    assert said["ntasks-per-node"] == "1" and int(said["nodes"]) > 1 and int(said["gpus-per-node"]) > 1
    assert {"requeue", "exclusive"} <= set(said) and said["open-mode"] == "append"
    assert int(re.fullmatch(r"B:TERM@(\d+)", said["signal"])[1]) >= 120
    assert text.rindex("#SBATCH") < text.index("\nset -u")  # Slurm reads directives up to the first command


def test_the_image_has_this_ray_and_only_code():
    text = (JOBS / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray.__version__}-py3" in text
    assert not re.search(r"^(COPY|ADD)( --\S+)* \.", text, re.M)
    assert re.search(r"ARG EXTRA=(\w+)$", text, re.M)[1] in EXTRAS
