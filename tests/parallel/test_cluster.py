"""Who belongs together, from environments as schedulers make them."""

import importlib.util
import re

import pytest

from moe_jax.errors import UserError
from moe_jax.parallel import cluster

# A step of 12 tasks: 8 on node007, 4 on node009; this is the second task of node009.
SLURM = {
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[007,009]",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_NTASKS": "12",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def found(monkeypatch):
    """`cluster.find` in an environment that has these variables alone."""

    def find(env=(), **flags):
        import os

        prefixes = ("MOE_JAX", "SLURM", "OMPI", "PMI", "MPI_", "CUDA", "JAX_LOCAL")
        for name in [n for n in os.environ if n.startswith(prefixes)]:
            monkeypatch.delenv(name)
        for name, value in dict(env).items():
            monkeypatch.setenv(name, value)
        return cluster.find(**flags)

    return find


def test_alone(found):
    assert found() is None
    assert found({"SLURM_NTASKS": "1"}) is None
    assert found(SLURM | {"SLURM_NTASKS": "1"}) is None, "a step of one task"
    assert found({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}) is None


def test_flags_win_over_the_environment(found):
    env = {
        "MOE_JAX_COORDINATOR": "a:1",
        "MOE_JAX_NUM_PROCESSES": "4",
        "MOE_JAX_PROCESS_ID": "3",
    }
    by_env = found(env | SLURM | OPEN_MPI_5)
    assert by_env.found_by == "flags" and by_env.num_processes == 4
    assert by_env.arguments == {
        "coordinator_address": "a:1",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    by_flag = found(env, coordinator="b:2", process_id=0)
    assert by_flag.arguments["coordinator_address"] == "b:2"
    assert by_flag.arguments["process_id"] == 0
    assert by_flag.arguments["num_processes"] == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"coordinator": "a:1"}, "--num_processes, --process_id missing"),
        ({"num_processes": 2}, "--coordinator, --process_id missing"),
        ({"coordinator": "a:1", "process_id": 0}, "--num_processes missing"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "--process_id=2: must be below --num_processes=2",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": -2},
            "--process_id=-2",
        ),
        (
            {"coordinator": "a:1", "num_processes": -2, "process_id": 0},
            "--num_processes=-2: must be at least 1",
        ),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "a:70000", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
        ({"coordinator": "http://a:1", "num_processes": 2, "process_id": 0}, "HOST:"),
    ],
)
def test_refuses_half_an_address(found, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        found(**flags)


def test_variable_that_is_no_number(found):
    with pytest.raises(UserError, match="MOE_JAX_NUM_PROCESSES='two'"):
        found({"MOE_JAX_NUM_PROCESSES": "two"})
    with pytest.raises(UserError, match="SLURM_NTASKS='8x'"):
        found({"SLURM_NTASKS": "8x"})


def test_slurm(found):
    step = found(SLURM)
    assert (step.found_by, step.num_processes) == ("SLURM", 12)
    assert step.arguments == {
        # 61440 + (16 * 1000 + 2) % 4096
        "coordinator_address": "node007:65154",
        "num_processes": 12,
        "process_id": 9,
        "cluster_detection_method": "deactivate",
    }
    port = found(SLURM | {"JAX_COORDINATOR_PORT": "29400"}).arguments
    assert port["coordinator_address"] == "node007:29400"


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node1,other", "node1"),
        ("node[001-0015],host2", "node001"),
        ("node[7,9-12]", "node7"),
        ("rack[3-4].site,x", "rack3.site"),
        ("node-a-1,node-a-2", "node-a-1"),
    ],
)
def test_first_host_of_slurm(found, nodes, first):
    address = found(SLURM | {"SLURM_STEP_NODELIST": nodes}).arguments
    assert address["coordinator_address"].split(":")[0] == first


@pytest.mark.parametrize(
    "extra, expected",
    [
        ({}, [1]),  # the task's own, of all
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [1]),  # the second that it sees
        ({"CUDA_VISIBLE_DEVICES": "3"}, None),  # bound by --gpus-per-task=1
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [2, 3]),  # two for each
        ({"JAX_LOCAL_DEVICE_IDS": "2"}, None),  # JAX reads it
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),  # one task: all of them
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, [1]),
    ],
)
def test_gpus_of_a_slurm_task(found, extra, expected):
    step = found(SLURM | extra, accelerator="gpu")
    assert step.arguments["local_device_ids"] == expected


def test_gpus_that_cannot_be_shared(found):
    env = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    with pytest.raises(UserError, match="4 processes on this host cannot share 3 GPUs"):
        found(env, accelerator="gpu")


def test_slurm_without_srun(found, monkeypatch):
    batch = {k: v for k, v in SLURM.items() if "STEP" not in k}
    assert found(batch) is None
    assert cluster.alone_in_slurm() == 12
    assert found(SLURM) and cluster.alone_in_slurm() == 0


def test_open_mpi(found, monkeypatch):
    four = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}
    assert found(four) == cluster.Cluster(
        "Open MPI", 4, {"cluster_detection_method": "ompi"}
    )
    # mpirun starts its daemons by srun; what they start has the daemons' numbers.
    assert found(four | SLURM).found_by == "Open MPI"
    real = importlib.util.find_spec
    there = {"mpi4py": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: there[n] if n in there else real(n)
    )
    with pytest.raises(UserError, match=r"Open MPI 5 does not tell.*launch/mpi.sh"):
        found(OPEN_MPI_5)
    there["mpi4py"] = object()
    assert found(OPEN_MPI_5).arguments == {"cluster_detection_method": "mpi4py"}


@pytest.mark.parametrize(
    "env, by, size, index",
    [
        (OPEN_MPI_5, "Open MPI", 4, 3),
        (OPEN_MPI_5 | SLURM, "Open MPI", 4, 3),
        (SLURM, "SLURM", 12, 9),
        ({"PMI_SIZE": "6", "PMI_RANK": "5"}, "MPI", 6, 5),
    ],
)
def test_a_coordinator_is_enough_where_a_scheduler_counts(found, env, by, size, index):
    step = found(env, coordinator="a:1", accelerator="gpu")
    assert (step.found_by, step.num_processes) == (by, size)
    assert step.arguments["process_id"] == index
    local = [1] if by != "MPI" else None
    assert step.arguments["local_device_ids"] == local


def test_other_mpi_needs_an_address(found):
    with pytest.raises(UserError, match=r"one of 6 processes.*MOE_JAX_COORDINATOR"):
        found({"PMI_SIZE": "6", "PMI_RANK": "5"})


def test_tpu_hosts_that_the_environment_names(found, monkeypatch):
    assert found(accelerator="tpu") == cluster.Cluster("TPU metadata")
    for names, slices, hosts in (("", "", 1), ("a", "", 1), ("a,b", "2", 4)):
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", names)
        monkeypatch.setenv("MEGASCALE_NUM_SLICES", slices)
        assert cluster.expected_tpu_hosts() == hosts
