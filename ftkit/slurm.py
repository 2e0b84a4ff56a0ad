"""Tasks of an `srun` step, told to torch in the variables that torchrun would set."""

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 20000, 10000
"""Where the processes of a step meet: below the ports that Linux hands out by itself."""


def step_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """Torch's variables for this task of the step; none outside a step of several tasks, and none that are set already.

    The script that `sbatch` runs, and a shell in an allocation, have a rank and a number of tasks too, but are no step
    of several tasks.

    Args:
        slurm: the environment of this process.
    """
    tasks = int(slurm.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in slurm or tasks < 2 or not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"} <= slurm.keys():
        return {}
    nodes = slurm.get("SLURM_STEP_NODELIST")
    variables = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(slurm, tasks)),
        # Where srun was called is the first node only if that was in a batch script.
        "MASTER_ADDR": first_host(nodes) if nodes else slurm.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        "MASTER_PORT": str(_port(int(slurm.get("SLURM_JOB_ID", "0")), int(slurm["SLURM_STEP_ID"]))),
        # As torchrun does: the cores of a task, not those of the machine.
        "OMP_NUM_THREADS": slurm.get("SLURM_CPUS_PER_TASK", "1"),
    }
    return {name: value for name, value in variables.items() if name not in slurm}


def first_host(nodes: str) -> str:
    """The first host of a node list: "node[01-04,7],gpu3" -> "node01"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", first[0])


def _tasks_on_this_node(slurm: Mapping[str, str], tasks: int) -> int:
    """From the counts of all nodes: "4(x2),3" on the third node -> 3."""
    counts: list[int] = []
    for part in slurm.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)).split(","):
        count, _, repeated = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeated or 1)
    return counts[int(slurm.get("SLURM_NODEID", "0"))]


def _port(job: int, step: int) -> int:
    """The same for all tasks of a step, and another for the steps and jobs that may share the node."""
    return FIRST_PORT + (17 * job + step) % PORTS
