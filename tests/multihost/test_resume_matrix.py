"""Going on with other hosts, and experts over other devices, is the same run."""

import numpy as np
import pytest

from moe_jax.observe import ledger
from moe_jax.observe.writers import read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.multiprocess, pytest.mark.timeout(3000)]

# Processes, degree of expert parallelism, and the step after which they end.
STAGES = ((4, 4, 4), (2, 2, 8), (1, 1, 12), (4, 4, 16))
EXACT = ("step", "drops", "expert_counts", "tokens")
# Balance losses are of float32, and another mesh adds their terms in another order.
NEAR = {"loss": 1e-8, "total_loss": 1e-8, "grad_norm": 1e-6}


@pytest.mark.parametrize("kind", ["plain", "packed", "mixed"])
def test_four_two_one_four(hosts, kind):
    whole, moved = (hosts.folder / f"{kind}_{name}" for name in ("whole", "moved"))
    few = ("--config.data.validation_fraction=0.0",)
    hosts.train(1, whole, *few, config=kind, float64=True)
    for count, expert, end in STAGES:
        mesh = f"--config.mesh.expert={expert}"
        steps = f"--config.train.steps={end}"
        lines = hosts.train(count, moved, mesh, steps, *few, config=kind, float64=True)
        assert (f"going on from step {end - 4}" in lines) == (end > 4)

    # Bit for bit the same arrays for whoever restores them: of the manifest's own
    # checksums, which restoring compares, these hashes know nothing.
    hashes = [
        hosts.hashes(count, moved, expert, float64=True)
        for count, expert, _ in STAGES[:3]
    ]
    assert hashes[0] == hashes[1] == hashes[2]
    embedding = [value for name, value in hashes[0].items() if "embed" in name]
    assert len(set(embedding)) >= 4, "it learned between them"

    lines, expected = (read_metrics(f / "metrics.jsonl") for f in (moved, whole))
    assert len(lines) == 16
    for line, want in zip(lines, expected, strict=True):
        assert [line[n] for n in EXACT] == [want[n] for n in EXACT]
        for name, rtol in NEAR.items():
            np.testing.assert_allclose(line[name], want[name], rtol, err_msg=name)

    assert ledger.read(moved) == ledger.read(whole)
    for folder in (moved, whole):
        *sources, last = hosts.command(1, "ledger", f"--workdir={folder}")
        assert last == "16 steps: each row once in each pass"
        print(kind, sources)
        passes = [int(line.split(" whole")[0].split()[-1]) for line in sources]
        assert all(count >= 2 for count in passes), "it crosses passes"
    readers = {path.name for path in (moved / "ledger").iterdir()}
    assert readers == {f"{process}.jsonl" for process in range(4)}
