"""Which hosts of a Ray cluster a job's workers go to, and what each of them gets."""

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.host import ClusterError
from cluster.job import Job, Request

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """What each worker gets, and how many there are."""

    platform: str  # GPU, TPU or CPU
    resources: dict[str, float]  # of each worker
    workers: tuple[int, int]  # fewest, most
    exactly: bool  # whether the user asked for this number
    topology: str | None = None  # of a TPU slice, e.g. 4x4
    accelerator: str | None = None  # e.g. TPU-V6E

    def fits(self, workers: int, batches: tuple[int, ...]) -> bool:
        """Whether the batch divides among so many workers, for every batch.

        A worker uses all its GPUs or TPU chips. Of its CPU cores it uses as many as divide the batch.
        """
        devices = 1 if self.platform == "CPU" else int(self.resources[self.platform])
        return all(batch % (workers * devices) == 0 for batch in batches)

    def fitting(self, job: Job) -> "Placement":
        """This placement with the largest number of workers that divides the job's batches.

        ClusterError where no number of workers does, or none that the user asked for.
        """
        low, high = self.workers
        found = [n for n in range(low if self.exactly else 1, high + 1) if self.fits(n, job.batches)]
        if not found:
            devices = "" if self.platform == "CPU" else f" of {self.resources[self.platform]:g} {self.platform}s"
            raise ClusterError(
                f"Batches of {' and '.join(map(str, job.batches))} {job.item} do not divide among "
                f"{high} workers{devices}; use another --num_workers, or {job.another_batch}."
            )
        if found[-1] < high:
            print(f"{found[-1]} workers, not {high}: more do not divide the batch", flush=True)
        if low < high and self.exactly and found[0] > low:
            print(f"at least {found[0]} workers, not {low}: fewer do not divide the batch", flush=True)
        return replace(self, workers=(found[0] if low < high else found[-1], found[-1]))


def placement(request: Request, alone: bool) -> Placement:
    """Waits until there are hosts for the workers. A host gets one worker with all it has, or `workers_per_host`.

    `alone`: Ray runs on this machine only, and all workers share it. ClusterError when the cluster does not have in
    time what the user asks for.
    """
    asked = request.workers()

    def look(nodes: list[dict]) -> Placement | Missing:
        low, high = asked or (1, 0)
        platform = request.devices.upper() if request.devices != "auto" else kind_of_devices(nodes, alone)
        a_host = request.workers_per_host or 1
        if alone and asked and not request.workers_per_host:  # all workers on this host, as far as it has devices
            high = max(low, min([high, *(int(n["Resources"].get(platform, 0)) for n in nodes)]))
            a_host = high
        hosts = [n for n in nodes if min(n["Resources"].get(p, 0) for p in ("CPU", platform)) >= a_host]
        if len(hosts) * a_host >= low and (asked or hosts):
            return _shares(platform, hosts, a_host, (low, high) if asked else None)
        there = Counter(
            ", ".join(
                f"{n['Resources'].get(p, 0):g} {p}"
                for p in ("CPU", "GPU", "TPU")
                if p == "CPU" or n["Resources"].get(p)
            )
            for n in nodes
        )
        return Missing(
            [{"CPU": a_host, platform: a_host}] * -(-low // a_host),
            (
                f"The cluster cannot fit this run: it asks for {low} workers, {a_host} a host, each with at least one "
                f"{platform if platform == 'CPU' else platform + ' and one CPU'}, and there are "
                f"{', '.join(f'{k} × {v}' for v, k in there.items()) or 'no hosts'}; "
                f"{jax_platforms_ask(platform) if request.devices == 'auto' else ''}"
                "start more hosts, ask for fewer with --num_workers, put more on one with --workers_per_host, or wait "
                "longer with --wait_for_hosts."
            ),
        )

    return wait_for_hosts(look, 0 if alone else request.wait_for_hosts)


@dataclass(frozen=True)
class Missing:
    """What a cluster lacks: a bundle of resources for each host, and the sentence for the user if they do not come."""

    bundles: list[dict[str, float]]
    sentence: str


def wait_for_hosts(look: Callable[[list[dict]], T | Missing], seconds: float) -> T:
    """Waits until `look` finds the hosts that are alive enough; returns what it found. ClusterError after `seconds`.

    An autoscaler starts hosts only for somebody who asks: this asks for what was missing at the first look.
    """
    until = time.monotonic() + seconds
    called = None
    try:
        while isinstance(found := look([n for n in ray.nodes() if n["Alive"]]), Missing):
            if seconds and not called:
                called = placement_group(found.bundles, strategy="STRICT_SPREAD")
            if time.monotonic() > until:
                raise ClusterError(found.sentence)
            time.sleep(0.5)
        return found
    finally:
        if called:
            remove_placement_group(called)  # from here on the workers' own claims count


# JAX's name of a platform -> Ray's
KINDS = {"cpu": "CPU", "cuda": "GPU", "gpu": "GPU", "rocm": "GPU", "tpu": "TPU"}


def kind_of_devices(nodes: list[dict], alone: bool) -> str:
    """The kind of device for a run's workers: TPU, GPU or CPU, chosen by JAX_PLATFORMS and by what the hosts have.

    JAX_PLATFORMS=cpu is often meant for the driver alone, so it does not choose the devices of other hosts.
    ClusterError for a platform that Ray's workers cannot have.
    """
    wished = [word.strip() for word in os.environ.get("JAX_PLATFORMS", "").split(",") if word.strip()]
    if unknown := [word for word in wished if word not in KINDS]:
        raise ClusterError(
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} names {unknown[0]}, which Ray's workers cannot "
            "have; unset it, or set it to cpu, cuda or tpu."
        )
    kinds = [KINDS[word] for word in wished]
    if not kinds or (kinds == ["CPU"] and not alone):
        kinds = ["TPU", "GPU", "CPU"]
    return next((k for k in kinds if any(n["Resources"].get(k) for n in nodes)), "CPU" if "CPU" in kinds else kinds[0])


def jax_platforms_ask(platform: str) -> str:
    """The remedy where JAX_PLATFORMS asks for the devices that are missing; else ''."""
    if platform == "CPU" or not os.environ.get("JAX_PLATFORMS"):
        return ""
    return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} asks for them: unset it, or "


def _shares(platform: str, hosts: list[dict], a_host: int, asked: tuple[int, int] | None) -> Placement:
    """What each of `a_host` workers gets of its host."""
    each = min(int(n["Resources"][platform]) for n in hosts) // a_host
    resources = {"CPU": float(each)} if platform == "CPU" else {"CPU": 1.0, platform: float(each)}
    most = asked[1] if asked else len(hosts) * a_host
    workers = (asked[0] if asked else most, most)
    if platform != "TPU" or most == 1:
        return Placement(platform, resources, workers, bool(asked))
    labels = hosts[0]["Labels"]
    pod = labels.get("ray.io/tpu-pod-type", "")  # v6e-16
    return Placement(
        platform,
        resources,
        workers,
        bool(asked),
        labels.get("ray.io/tpu-topology"),
        f"TPU-{pod.split('-')[0].upper()}" if pod else None,
    )
