"""Prints a JobSet that runs a command of moe-jax on GKE. Needs Python alone.

  python launch/gke.py --name=moe --image=REGION-docker.pkg.dev/P/R/moe_jax \
      --accelerator=tpu-v6e-slice --topology=8x8 --slices=2 -- \
      moe-jax train --config=configs/lm/mixtral_8x7b.py --workdir=gs://bucket/run \
      | kubectl apply -f -

Needs of the cluster: JobSet 0.6 or newer, and a node pool of that accelerator (on TPUs
one for each slice, with that topology). The image is that of the Dockerfile; the
workdir must be a bucket or a volume that all hosts see.

On TPUs, GKE tells the processes where the others are. On GPUs (--accelerator=
nvidia-..., --hosts, --gpus) the address of the first pod is given to all. After a
failure all pods are started anew, at most --restarts times, but not after status 2, a
mistake in the command or its config. It touches no cluster: printing is its dry run.
"""

import argparse
import json
import math
import re
import sys
from typing import Any, NoReturn

_JOB = "workers"
_PORT = 29400
_MISTAKE = 2


def fail(text: str) -> NoReturn:
    print(f"gke.py: {text}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet")
    add("--namespace", default="default")
    add("--image", required=True, help="of the Dockerfile, pushed to a registry")
    add("--accelerator", required=True, help="tpu-v6e-slice, nvidia-h100-80gb, ...")
    add("--topology", default="", help="of a TPU slice, as 8x8 or 4x4x8")
    add("--chips-per-host", type=int, default=4, help="of a TPU slice (default: 4)")
    add("--slices", type=int, default=1, help="TPU slices")
    add("--hosts", type=int, default=0, help="hosts with GPUs")
    add("--gpus", type=int, default=8, help="GPUs of each host (default: 8)")
    add("--restarts", type=int, default=10, help="after failures (default: 10)")
    add("--queue", default="", help="local queue of Kueue")
    add("--service-account", default="", help="of Kubernetes, to reach the bucket")
    add("command", nargs=argparse.REMAINDER, help="-- COMMAND ...")
    args = parser.parse_args(argv)
    args.command = args.command[args.command[:1] == ["--"] :]
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Ends the program with a message where the arguments make no sense."""
    if not args.command:
        fail("no command: write it after --")
    # A pod is named NAME-workers-SLICE-HOST-xxxxx, in at most 63 characters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
        fail(
            f"--name={args.name}: must be small letters, digits and '-', begin with a "
            "letter, not end with '-', and have at most 40 characters"
        )
    for name in ("chips_per_host", "slices", "gpus"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
    if args.restarts < 0:
        fail("--restarts must not be negative")
    if not on_tpus(args):
        if args.topology or args.slices > 1:
            fail(f"--topology and --slices are for TPUs, not for {args.accelerator}")
        if args.hosts < 1:
            fail("--hosts is missing: how many hosts with GPUs")
        return
    if args.hosts:
        fail("--hosts is for GPUs: on TPUs --topology says how many there are")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", args.topology):
        fail(f"--topology={args.topology}: must be like 4x4 or 2x2x4")
    if chips(args) % args.chips_per_host:
        fail(
            f"--topology={args.topology} has {chips(args)} chips, which "
            f"--chips-per-host={args.chips_per_host} does not divide"
        )


def on_tpus(args: argparse.Namespace) -> bool:
    return args.accelerator.startswith("tpu")


def chips(args: argparse.Namespace) -> int:
    """Chips of one slice."""
    return math.prod(map(int, args.topology.split("x")))


def jobset(args: argparse.Namespace) -> dict[str, Any]:
    """The JobSet: one job a slice, or one for all hosts with GPUs."""
    tpus = on_tpus(args)
    hosts = chips(args) // args.chips_per_host if tpus else args.hosts
    metadata: dict[str, Any] = {"name": args.name, "namespace": args.namespace}
    if args.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": args.queue}
    if tpus:
        # A slice is a node pool: its pods must not be spread over two of them.
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    mistake = {"containerName": "moe-jax", "operator": "In", "values": [_MISTAKE]}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": {"spec": pod(args, hosts)},
    }
    rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts, "rules": [rule]},
            # Processes look for the first before it is ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {"name": _JOB, "replicas": args.slices, "template": {"spec": job}}
            ],
        },
    }


def pod(args: argparse.Namespace, hosts: int) -> dict[str, Any]:
    """What one host runs."""
    # `args`, not `command`: the entry point of the image hands signals on.
    container = {"name": "moe-jax", "image": args.image, "args": args.command}
    found = {
        "restartPolicy": "Never",
        # From SIGTERM to SIGKILL: time for a checkpoint.
        "terminationGracePeriodSeconds": 300,
    }
    if args.service_account:
        found["serviceAccountName"] = args.service_account
    if on_tpus(args):
        found["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": args.accelerator,
            "cloud.google.com/gke-tpu-topology": args.topology,
        }
        container["ports"] = [{"containerPort": 8471}, {"containerPort": 8482}]
        container["resources"] = {"limits": {"google.com/tpu": args.chips_per_host}}
    else:
        found["nodeSelector"] = {"cloud.google.com/gke-accelerator": args.accelerator}
        container["env"] = address(args.name, hosts)
        container["ports"] = [{"containerPort": _PORT}]
        container["resources"] = {"limits": {"nvidia.com/gpu": args.gpus}}
        container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
        found["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    return found | {"containers": [container]}


def address(name: str, hosts: int) -> list[dict[str, Any]]:
    """The variables that moe_jax.parallel.cluster reads; JobSet names the pods."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {
            "name": "MOE_JAX_COORDINATOR",
            "value": f"{name}-{_JOB}-0-0.{name}:{_PORT}",
        },
        {"name": "MOE_JAX_NUM_PROCESSES", "value": str(hosts)},
        {
            "name": "MOE_JAX_PROCESS_ID",
            "valueFrom": {"fieldRef": {"fieldPath": index}},
        },
    ]


def yaml_lines(value: Any, indent: str = "") -> list[str]:
    """Lines of YAML for dicts, lists, strings, numbers and truth values.

    Strings are written as in JSON, which YAML contains.
    """
    lines = []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        nested = isinstance(item, dict | list) and bool(item)
        if isinstance(value, dict):
            plain = re.fullmatch(r"[A-Za-z][\w./-]*", key)
            head = f"{indent}{key if plain else json.dumps(key)}:"
            lines += [head] if nested else [f"{head} {json.dumps(item)}"]
            lines += yaml_lines(item, indent + "  ") if nested else []
        elif nested:
            inner = yaml_lines(item, indent + "  ")
            lines += [f"{indent}- {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{indent}- {json.dumps(item)}")
    return lines


def main(argv: list[str]) -> int:
    print("\n".join(yaml_lines(jobset(parse(argv)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
