"""A Kubernetes Job with its volume: a pod that watches the run, replaced if it or its node is lost.

A Job, not a Deployment: a pod that ends with status 0, as after `onward stop`, stays stopped, and one that no restart
can fix is given up. References: kubernetes.io, "Jobs" (pod failure policy, pod replacement policy), and "Define a
command" for `$(...)` in the words of a command.
"""

from __future__ import annotations

from shlex import quote
from typing import Any

from onward.errors import UsageError
from onward.service.outside.launch.commented import head, render
from onward.service.outside.launch.job import PERSON, Job, require_whole
from onward.service.outside.launch.waiting import start_and_wait
from onward.version import __version__

VOLUME = "/volume"
READY = f"{VOLUME}/ready"
USER = 1000
"""The user that the image runs as."""
SHARED_MEMORY = "8Gi"
STOPPED_FROM_OUTSIDE = 143
SCRIPT = (
    start_and_wait('"$@"', "TERM")
    + f"""\
# A pod that is moved ends as if it had failed, so that it is replaced; one that was stopped by `onward stop` does not.
[ -z "$noticed" ] || exit {STOPPED_FROM_OUTSIDE}
exit "$status"
"""
)
FILL = f"until [ -e {READY} ]; do sleep 2; done"


def kubernetes_manifest(job: Job) -> str:
    """Return a volume claim and a Job, both with comments.

    Raises:
        UsageError: the run is spread over nodes, its ledger is elsewhere, or a path cannot be mounted.
    """
    if job.nodes > 1:
        hint = "One node has up to 8 or 16 GPUs: --devices 8. For several nodes: --for slurm, or --for ray in KubeRay."
        raise UsageError("the Job for Kubernetes has one pod", where="--nodes", hint=hint)
    require_whole(job)
    for path in _mounted(job).values():
        if ":" in path:
            raise UsageError("Kubernetes cannot mount a path with a colon", where=path, hint="Move it to another path.")
    return f"{_head(job)}{_claim(job)}---\n{_job(job)}"


def _mounted(job: Job) -> dict[str, str]:
    """Return the paths that are in the volume, by their folder there."""
    return {"run": str(job.run), **({"base": str(job.base)} if job.base else {})}


def _head(job: Job) -> str:
    copies = (f"kubectl cp {quote(path)} POD:{VOLUME}/{folder} -c fill" for folder, path in _mounted(job).items())
    return head(
        f"Onward: cumulative fine-tuning of {job.run}, as a Job of Kubernetes (1.31 or newer).",
        "",
        f"  docker build --target {_target(job)} -t {_image(job)} .    in Onward's sources; push it to the cluster",
        "  kubectl apply -f FILE",
        f"  kubectl get pods -l job-name={job.name}    names the POD, which waits until its volume is filled:",
        *(f"  {line}" for line in copies),
        f"  kubectl exec POD -c fill -- touch {READY}",
        "  kubectl exec POD -- onward status; kubectl cp FILE POD:RUN/inbox/; kubectl exec POD -- onward stop",
    )


def _image(job: Job) -> str:
    return f"onward:{__version__}-{_target(job)}"


def _target(job: Job) -> str:
    return "cpu" if job.on_cpu else "cuda"


def _claim(job: Job) -> str:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": job.name},
        "spec": {"accessModes": ["ReadWriteOncePod"], "resources": {"requests": {"storage": "100Gi"}}},
    }
    why = "One pod at a time, on a disk of one machine: the ledger cannot be on NFS, and one process owns a run."
    room = "Restore points take the most: see onward doctor. Add storageClassName where there is no default."
    return render(claim, {"spec.accessModes": why, "spec.resources": room})


def _job(job: Job) -> str:
    document = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "backoffLimit": 1000,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _rules()},
            "template": {"spec": _pod(job)},
        },
    }
    return render(document, COMMENTS)


def _pod(job: Job) -> dict[str, Any]:
    fill = {
        "name": "fill",
        "image": _image(job),
        "command": ["/bin/sh", "-c", FILL],
        "volumeMounts": [{"name": "state", "mountPath": VOLUME}],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 900,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER},
        "initContainers": [fill],
        "containers": [_container(job)],
        "volumes": [
            {"name": "state", "persistentVolumeClaim": {"claimName": job.name}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}},
        ],
    }


def _container(job: Job) -> dict[str, Any]:
    return {
        "name": "onward",
        "image": _image(job),
        "command": ["/bin/sh", "-c", SCRIPT, "onward"],
        "args": [word.replace("$", "$$") for word in job.words("python", once=False)],
        "env": [{"name": name, "value": value.replace("$", "$$")} for name, value in _variables(job).items()],
        "workingDir": str(job.run),
        "resources": _resources(job),
        "volumeMounts": [
            *({"name": "state", "mountPath": path, "subPath": folder} for folder, path in _mounted(job).items()),
            {"name": "state", "mountPath": "/home/onward/.cache", "subPath": "cache"},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }


COMMENTS = {
    "spec.backoffLimit": "A pod that failed is restarted after 10 s, 20 s, ... up to 6 minutes.",
    "spec.podReplacementPolicy": "Only when the old pod has ended completely: one process owns a run.",
    "spec.podFailurePolicy": "No restart fixes a refused config (2), a run in use (4) or a damaged state (5).\n"
    "A pod that is evicted or preempted does not count as failed.",
    "spec.template.spec.terminationGracePeriodSeconds": "Time for a step and its commit.",
    "spec.template.spec.initContainers": "Waits until the run has been copied into the volume.",
    "spec.template.spec.containers.0.resources": "Equal bits require equal threads (OMP_NUM_THREADS).",
    "spec.template.spec.containers.0.volumeMounts": "Run and base keep their paths, which the config may name.",
}


def _variables(job: Job) -> dict[str, str]:
    """Return the variables of the container; the image has caches of its own, which are put into the volume."""
    return {"OMP_NUM_THREADS": str(job.threads), "ONWARD_RUN": str(job.run)}


def _resources(job: Job) -> dict[str, Any]:
    cpus = {"cpu": str(job.threads * job.devices.most)}
    return {"requests": cpus} if job.on_cpu else {"requests": cpus, "limits": {"nvidia.com/gpu": str(job.devices.most)}}


def _rules() -> list[dict[str, Any]]:
    person = {"containerName": "onward", "operator": "In", "values": list(PERSON)}
    moved = [{"type": "DisruptionTarget", "status": "True"}]
    return [{"action": "FailJob", "onExitCodes": person}, {"action": "Ignore", "onPodConditions": moved}]
