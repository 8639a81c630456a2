"""A task for SkyPilot: a managed job on whichever cloud or cluster has devices, with the run in a persistent volume.

References: SkyPilot's task YAML, "Managed jobs" (recovery) and "Volumes". A bucket mounted into the machine is
unsuitable for a run: it has neither locks nor links.
"""

from __future__ import annotations

import shlex
from typing import Any

from onward.errors import UsageError
from onward.service.outside.launch.commented import head, render
from onward.service.outside.launch.job import Job, require_whole
from onward.version import __version__

GPUS = ("H100", "A100-80GB", "A100", "L40S", "L4")
"""The kinds of GPU requested, whichever is available; the user keeps those with enough memory for the model."""
SEED = "~/onward-seed"
RETRIES = 10

RUN = """\
set -e
# The volume is filled by the first start; later ones use what is there. The ledger, which makes it a run, gets its name
# last: the machine may be taken away meanwhile.
if [ ! -e {run}/ledger.sqlite3 ]; then
  mkdir -p {run}
  [ ! -e {seed}/ledger.sqlite3 ] || mv {seed}/ledger.sqlite3 {seed}/ledger.filling
  cp -a {seed}/. {run}/
  sync
  mv {run}/ledger.filling {run}/ledger.sqlite3
fi
exec {command}
"""


def skypilot_task(job: Job) -> str:
    """Return the task with comments.

    Raises:
        UsageError: the run is spread over nodes, or its ledger is elsewhere.
    """
    if job.nodes > 1:
        hint = "One node has up to 8 or 16 GPUs: --devices 8. For several nodes: --for slurm."
        raise UsageError("the task for SkyPilot has one node", where="--nodes", hint=hint)
    require_whole(job)
    mounts = {f"{SEED}/run": str(job.run), **({str(job.base): str(job.base)} if job.base else {})}
    task = {
        "name": job.name,
        "resources": _resources(job),
        "volumes": {str(job.run): job.name},
        "file_mounts": mounts,
        "envs": {"OMP_NUM_THREADS": str(job.threads)},
        "setup": f"pip install 'onward=={__version__}'\n",
        "run": RUN.format(
            run=shlex.quote(str(job.run)), seed=f"{SEED}/run", command=shlex.join(job.words("python", once=True))
        ),
    }
    return _head(job) + render(task, COMMENTS)


def _head(job: Job) -> str:
    return head(
        f"Onward: cumulative fine-tuning of {job.run}, as a managed job of SkyPilot.",
        "",
        f"  sky volumes apply --name {job.name} --type k8s-pvc --size 100    once, or another type",
        f"  sky jobs launch -n {job.name} FILE",
        "",
        "It trains what waits in the run, then ends and releases its devices. Put new files into inbox/ of the",
        "volume, and launch it again.",
    )


def _resources(job: Job) -> dict[str, Any]:
    recovery = {"strategy": "FAILOVER", "max_restarts_on_errors": RETRIES}
    cpus = f"{job.threads * job.devices.most}+"
    devices = {} if job.on_cpu else {"accelerators": dict.fromkeys(GPUS, job.devices.most)}
    return {**devices, "cpus": cpus, "use_spot": True, "job_recovery": recovery}


COMMENTS = {
    "resources.accelerators": "Any of these; keep those with enough memory (see onward doctor).\n"
    "Equal bits are promised on one kind of device; after a change of kind the handover says how close.",
    "resources.use_spot": "A machine that is taken away is replaced; the run continues from its last commit.",
    "resources.job_recovery": "How often a failed process is restarted on the same machine.",
    "volumes": "Outlives the machine. One machine at a time: several must not share the disk of the ledger.",
    "file_mounts": "The run as it is now, for the first start.",
}
