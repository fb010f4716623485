"""launch/gke.py: the YAML it prints, by an independent parser and a schema."""

import pytest
import yaml

TPU = (
    "--name=moe",
    "--image=region-docker.pkg.dev/p/r/moe_jax:1",
    "--accelerator=tpu-v6e-slice",
)
SLICES = (*TPU, "--topology=8x8", "--slices=2", "--queue=tpus")
GPU = (
    "--name=moe",
    "--image=moe_jax:1",
    "--accelerator=nvidia-h100-80gb",
    "--hosts=4",
    "--service-account=trainer",
)
COMMAND = ("--", "moe-jax", "train", "--config=my config.py", "--workdir=gs://b/run")

# The fields of JobSet v1alpha2, Job and Pod that are used, with their types. A dict
# lists the fields that there may be (required unless "?" ends the name), a list has the
# type of its items, `...` stands for names that are free.
ENV = {
    "name": str,
    "value?": str,
    "valueFrom?": {"fieldRef": {"fieldPath": str}},
}
CONTAINER = {
    "name": str,
    "image": str,
    "args": [str],
    "env?": [ENV],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {...: int}},
    "volumeMounts?": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "serviceAccountName?": str,
    "nodeSelector": {...: str},
    "containers": [CONTAINER],
    "volumes?": [{"name": str, "emptyDir": {"medium": str}}],
}
EXIT_CODES = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": EXIT_CODES}]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {
        "name": str,
        "namespace": str,
        "labels?": {...: str},
        "annotations?": {...: str},
    },
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"action": str, "onJobFailureReasons": [str]}],
        },
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "replicatedJobs": [
            {"name": str, "replicas": int, "template": {"spec": JOB}},
        ],
    },
}


def faults(value, schema, path="jobset"):
    """What of a value is not as the schema says."""
    if isinstance(schema, type):
        if type(value) is not schema:
            yield f"{path}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, list):
        if not isinstance(value, list) or not value:
            yield f"{path}: no list with items"
            return
        for i, item in enumerate(value):
            yield from faults(item, schema[0], f"{path}[{i}]")
    elif ... in schema:
        for key, item in value.items():
            yield from faults(item, schema[...], f"{path}.{key}")
    else:
        fields = {name.rstrip("?"): kind for name, kind in schema.items()}
        for name in schema:
            if not name.endswith("?") and name not in value:
                yield f"{path}.{name}: missing"
        for name, item in value.items():
            if name not in fields:
                yield f"{path}.{name}: no such field"
            else:
                yield from faults(item, fields[name], f"{path}.{name}")


@pytest.fixture
def render(launchers):
    def run(*arguments):
        result = launchers.run(*launchers.gke, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.mark.parametrize("name, arguments", [("gke_tpu", SLICES), ("gke_gpu", GPU)])
def test_prints_a_jobset(launchers, render, name, arguments):
    text = render(*arguments, *COMMAND)
    launchers.golden(name, text)
    assert list(faults(yaml.safe_load(text), JOBSET)) == []


def test_the_schema_finds_faults(render):
    jobset = yaml.safe_load(render(*SLICES, *COMMAND))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["backofLimit"] = job.pop("backoffLimit")
    job["completions"] = "16"
    found = " ".join(faults(jobset, JOBSET))
    for part in ("backoffLimit: missing", "backofLimit: no such field", "'16' is no"):
        assert part in found


def parts(text):
    spec = yaml.safe_load(text)["spec"]
    job = spec["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    return spec, job, pod, pod["containers"][0]


def test_one_pod_for_each_host_of_each_slice(render):
    spec, job, pod, container = parts(render(*SLICES, "--restarts=4", *COMMAND))
    assert job["replicas"] == 2
    assert job["template"]["spec"]["parallelism"] == 16, "8 x 8 chips, 4 to a host"
    assert job["template"]["spec"]["completions"] == 16
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == list(COMMAND[1:])
    assert spec["failurePolicy"]["maxRestarts"] == 4
    assert "env" not in container, "GKE tells the processes where the others are"
    one = parts(render(*TPU, "--topology=2x4", "--chips-per-host=8", *COMMAND))
    assert one[1]["template"]["spec"]["parallelism"] == 1


def test_gpu_hosts_are_told_where_the_first_is(render):
    _, job, _, container = parts(render(*GPU, *COMMAND))
    env = {item["name"]: item.get("value") for item in container["env"]}
    # JobSet names a pod's host NAME-JOB-REPLICA-INDEX, in the domain NAME.
    assert env["MOE_JAX_COORDINATOR"] == "moe-workers-0-0.moe:29400"
    assert env["MOE_JAX_NUM_PROCESSES"] == "4"
    assert job["replicas"] == 1 and job["template"]["spec"]["parallelism"] == 4
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_a_mistake_is_not_tried_again(render):
    spec, job, _, container = parts(render(*GPU, *COMMAND))
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["values"]) == (
        "FailJob",
        "In",
        [2],
    )
    assert codes["containerName"] == container["name"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_arguments_with_signs_survive(render):
    odd = ("a: b", "- c", "#d", 'e"f\\g', "yes", "1.0", "", "\u00e4\n\t", "{x}", "*")
    assert parts(render(*GPU, "--", *odd))[3]["args"] == list(odd)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (SLICES, "no command"),
        ((*TPU, *COMMAND), "--topology=: must be like 4x4"),
        ((*TPU, "--topology=4by4", *COMMAND), "--topology=4by4"),
        ((*TPU, "--topology=3x3", *COMMAND), "9 chips"),
        ((*SLICES, "--hosts=2", *COMMAND), "--hosts is for GPUs"),
        ((*SLICES, "--slices=0", *COMMAND), "--slices must be at least 1"),
        ((*SLICES, "--name=Moe", *COMMAND), "--name=Moe"),
        ((*SLICES, f"--name={'m' * 41}", *COMMAND), "at most 40"),
        ((*SLICES, "--restarts=-1", *COMMAND), "--restarts"),
        ((*GPU, "--topology=4x4", *COMMAND), "for TPUs, not for nvidia-h100-80gb"),
        ((*GPU, "--hosts=0", *COMMAND), "--hosts is missing"),
    ],
)
def test_bad_input(launchers, arguments, message):
    result = launchers.run(*launchers.gke, *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1


def test_dockerfile_copies_what_is_there(launchers):
    text = (launchers.root / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and line[0] != "#"]
    allowed = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENV"}
    assert {words[0] for words in lines} == allowed | {"ENTRYPOINT", "CMD"}
    kept = (launchers.root / ".dockerignore").read_text().split()
    for words in lines:
        for source in words[1:-1] if words[0] == "COPY" else ():
            assert (launchers.root / source).exists() and f"!{source}" in kept
    assert '"tini"' in text, "gke.py starts by it: signals must reach Python"
