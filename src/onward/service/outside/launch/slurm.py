"""A batch script for Slurm: `sbatch` starts it; it continues after preemption, a time limit or a lost node.

Rules of `#SBATCH` lines: sbatch(1). A backslash escapes inside either kind of quotes; file name patterns read `%`, so
none of them contains the run's path.
"""

from __future__ import annotations

import shlex

from onward.service.outside.launch.job import NOTICE, PERSON, Job
from onward.service.outside.launch.waiting import start_and_wait
from onward.text import printable

SCRIPT = """\
#!/bin/bash
# Onward: cumulative fine-tuning of {shown}, as a job of Slurm.
#
#   sbatch FILE          trains what waits in inbox and queue, then ends and releases its devices
#   onward stop          with --run {run}: commits and ends; the job is not requeued
#   scancel JOB          the same from outside: the run has KillWait (30 s by default) for a step and its commit
#
# Lines that begin with ##SBATCH are off. Slurm reads none after the first command.
#SBATCH --job-name={name}
#SBATCH --chdir={directory}
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# One process owns a run: a second job of this name waits until the first has ended.
#SBATCH --dependency=singleton
# After preemption, a lost node or `scontrol requeue` the job is requeued and resumes from the last commit.
#SBATCH --requeue
# A warning to this script, this long before the time is up. It must exceed a step and a commit.
#SBATCH --signal=B:USR1@{notice}
#SBATCH --nodes={nodes}
# The ledger is on a local disk of this machine.
#SBATCH --nodelist={machine}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
{gpus}# What the cluster asks for:
##SBATCH --time=24:00:00
##SBATCH --mem=64G
##SBATCH --partition=NAME
##SBATCH --account=NAME

{exports}
{rendezvous}{wait}
# After the notice: back into the queue, under the same number.
if [ -n "$noticed" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
# A restart does not fix a refused config (2), a run that another process owns (4) or a damaged state (5). What fails
# within five minutes would fail again. Everything else is tried again.
case "$status" in
  0 | 3 | {person}) exit "$status" ;;
esac
if [ "$SECONDS" -ge 300 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""

RENDEZVOUS = """\
# Rank 0 owns the run, so it is on the machine with the ledger; the other nodes count on from there.
nodes=({hosts})
for index in "${{!nodes[@]}}"; do
  if [ "${{nodes[index]}}" = {machine} ]; then export ONWARD_FIRST_NODE=$index; fi
done
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
"""
NODE = """\
# A notice would end torchrun, and SIGTERM gives its ranks 30 s: they get both themselves, and it ends with them.
trap "" USR1
{command} &
agent=$!
pass() {{ pkill "-$1" -P "$agent" || kill "$agent"; }}
trap "pass USR1" USR1
trap "pass TERM" TERM
while :; do
  wait "$agent"
  status=$?
  kill -s 0 "$agent" 2>/dev/null || exit "$status"
done
"""
HOSTS = '$(scontrol show hostnames "$SLURM_JOB_NODELIST")'
ALIVE = "trap : TERM  # of scancel, preemption and requeue, which the run gets too: wait for its commit\n"


def slurm_script(job: Job) -> str:
    """Return the script for a job; its comments say what each part is for."""
    cpus, machine = job.threads * job.devices.most, shlex.quote(_node(job))
    command = f"srun --cpus-per-task={cpus} --kill-on-bad-exit=1 {_words(job)}"
    return SCRIPT.format(
        shown=printable(str(job.run)),
        run=shlex.quote(str(job.run)),
        directory=_word(str(job.run)),
        name=job.name,
        notice=NOTICE,
        nodes=job.nodes,
        machine=machine,
        cpus=cpus,
        gpus="" if job.on_cpu else f"#SBATCH --gpus-per-node={job.devices.most}\n",
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()),
        rendezvous=RENDEZVOUS.format(hosts=HOSTS, machine=machine) if job.nodes > 1 else "",
        wait=ALIVE + start_and_wait(command, "USR1"),
        person=" | ".join(map(str, PERSON)),
    )


def _node(job: Job) -> str:
    """Return the machine's name as clusters know it: without its domain."""
    return job.host.machine.partition(".")[0]


def _word(text: str) -> str:
    """Return a text quoted as a word of an `#SBATCH` line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _words(job: Job) -> str:
    """Return the command that runs on each node: Onward, or torchrun with it if nodes have to find each other."""
    if job.nodes == 1:
        return shlex.join(job.words(job.host.python, once=True))
    rank = f"$(( (SLURM_NODEID - ONWARD_FIRST_NODE + {job.nodes}) % {job.nodes} ))"
    agent = [job.host.python, "-P", "-m", "torch.distributed.run", f"--nnodes={job.nodes}"]
    agent += [f"--nproc-per-node={job.devices.most}", f"--master-addr={_node(job)}"]
    run = ["-m", "--", "onward", "watch", "--run", str(job.run), "--once"]  # torchrun has options that begin with --run
    command = f"{shlex.join(agent)} --master-port=$MASTER_PORT --node-rank={rank} {shlex.join(run)}"
    return f"bash -c {shlex.quote(NODE.format(command=command))}"
