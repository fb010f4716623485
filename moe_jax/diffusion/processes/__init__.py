"""Noise processes: the path, what the network predicts, and the unit of its time.

`PROCESSES` maps a config class to a class built from the config; `base.Process` says
what it must have. The config is saved with a run: a network trained in one convention
gives nonsense in another, without an error.
"""

from moe_jax import config
from moe_jax.diffusion.processes import rectified_flow, variance_preserving
from moe_jax.diffusion.processes.base import Process

PROCESSES = {
    variance_preserving.VariancePreserving: (
        variance_preserving.VariancePreservingProcess
    ),
    rectified_flow.RectifiedFlow: rectified_flow.RectifiedFlowProcess,
}


def make_process(options: config.ProcessConfig) -> Process:
    return PROCESSES[type(options)](options)
