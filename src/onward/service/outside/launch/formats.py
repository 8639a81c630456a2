"""The formats by the names that users give."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onward.service.outside.launch.job import Job
from onward.service.outside.launch.kubernetes import kubernetes_manifest
from onward.service.outside.launch.ray import ray_script
from onward.service.outside.launch.skypilot import skypilot_task
from onward.service.outside.launch.slurm import slurm_script

SCHEDULERS: Mapping[str, Callable[[Job], str]] = {
    "slurm": slurm_script, "ray": ray_script, "skypilot": skypilot_task, "kubernetes": kubernetes_manifest,
}  # fmt: skip
"""The function that prints the file for each scheduler."""
