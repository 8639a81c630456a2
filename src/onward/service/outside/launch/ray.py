"""A Python script for Ray Train (V2): its workers are the ranks of the run, on whatever machines Ray has.

References: docs.ray.io, "Ray Train", "Elastic training" and "Handling failures".
"""

from __future__ import annotations

from pprint import pformat

from onward.errors import UsageError
from onward.service.outside.launch.job import Job
from onward.text import printable

RETRIES = 100

SCRIPT = '''\
"""Onward: cumulative fine-tuning of {shown}, by workers of Ray Train.

    pip install 'onward[ray]'
    python FILE                              on this machine, or alongside a cluster that `ray status` finds
    ray job submit -- python FILE            on a cluster

It trains what waits in inbox and queue, then ends. `onward stop` commits and ends it. A worker or a node that is lost
ends this group of workers; Ray starts another with those that are left, and the run resumes from its last commit.
The ledger is on a disk of one machine: worker 0 has to be there.
"""

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

RUN = {run!r}

# Must be set before the libraries are loaded: the same bits from cuBLAS every time, the threads of a worker.
ENVIRONMENT = {environment}


def train() -> None:
    """Be one rank of the run. Ray's backend has set torchrun's variables (RANK, WORLD_SIZE and the rest)."""
    import os

    import torch.distributed

    from onward.startup import keep_out_fetched_code

    keep_out_fetched_code()  # before a library looks for it
    from onward import Run
    from onward.following import follow
    from onward.ranks import place_here

    # The ranks of a run connect by themselves, in addition to the address of Ray's own group, and watch each other.
    torch.distributed.destroy_process_group()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    place = place_here()
    if place is None or place.rank == 0:
        Run(RUN, place=place).watch(once=True, report=print)
    else:
        follow(RUN, place, report=print)


if __name__ == "__main__":
    ray.init(runtime_env={{"env_vars": ENVIRONMENT}})
    trainer = TorchTrainer(
        train,
        # {count}
        scaling_config=ScalingConfig(
            num_workers={workers},
            use_gpu={use_gpu},
            resources_per_worker={resources},
        ),
        # How long the others wait for a rank that says nothing, in seconds.
        torch_config=TorchConfig(timeout_s=600),
        run_config=RunConfig(
            name={name!r},
            storage_path=RUN + "/logs/ray",
            # Lost workers; nodes that are preempted do not count.
            failure_config=FailureConfig(max_failures={retries}),
        ),
    )
    trainer.fit()
'''


def ray_script(job: Job) -> str:
    """Return the script.

    Raises:
        UsageError: a number of nodes is asked for, which Ray chooses itself.
    """
    if job.nodes > 1:
        hint = "Leave --nodes out; --devices is the number of all workers, on as many nodes as Ray has."
        raise UsageError("Ray places its workers itself", where="--nodes", hint=hint)
    devices = job.devices
    is_elastic = devices.least < devices.most
    cpus = {"CPU": job.threads} if job.on_cpu else {"CPU": job.threads, "GPU": 1}
    elastic = "As many as there are, from the first number to the second." if is_elastic else "One rank each."
    variables = {**job.environment, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return SCRIPT.format(
        shown=printable(str(job.run)).replace("\\", "\\\\").replace('"', '\\"'),
        run=str(job.run),
        environment=pformat(variables, width=100, sort_dicts=False),
        count=elastic,
        workers=(devices.least, devices.most) if is_elastic else devices.most,
        use_gpu=not job.on_cpu,
        resources=cpus,
        name=job.name,
        retries=RETRIES,
    )
