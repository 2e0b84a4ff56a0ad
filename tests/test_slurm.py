import pytest

from ftkit.slurm import first_host, step_environment

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_NODELIST": "node[01-02,7]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_NTASKS": "11",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}
"""The second task on the third node."""


def test_a_task_of_a_step_becomes_a_rank():
    assert step_environment(STEP | {"HOME": "/", "SLURM_CPUS_PER_TASK": "6"}) == {
        "RANK": "9",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node01",
        "MASTER_PORT": "20087",
        "OMP_NUM_THREADS": "6",
    }
    assert step_environment(STEP | {"SLURM_NODEID": "1"})["LOCAL_WORLD_SIZE"] == "4"
    assert step_environment(STEP)["OMP_NUM_THREADS"] == "1"


def test_what_the_user_set_stays():
    assert step_environment(STEP | {"MASTER_PORT": "29500", "OMP_NUM_THREADS": "2"}).keys() == {
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
    }  # fmt: skip


def test_without_a_node_list_it_is_where_srun_was_called():
    step = {name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"}
    assert step_environment(step)["MASTER_ADDR"] == "10.0.0.9"


def test_all_tasks_of_a_step_meet_at_one_port_and_other_steps_elsewhere():
    def port(**changes):
        return step_environment(STEP | changes)["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="4712")}) == 3
    assert 20000 <= int(port(SLURM_JOB_ID="98765432")) < 30000


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"},
        STEP | {"RANK": "0"},
    ],
    ids=["no Slurm", "sbatch alone", "a shell in an allocation", "torchrun in a step"],
)
def test_what_is_no_step_of_several_tasks(environment):
    assert step_environment(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node[01-04,7]", "node01"),
        ("node[7,9-12]", "node7"),
        ("gpu3", "gpu3"),
        ("gpu3,node[1-2]", "gpu3"),
        ("n-a[10-12]-ib,n-b1", "n-a10-ib"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("node[5]", "node5"),
        ("node1.cluster.org,node2.cluster.org", "node1.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host
