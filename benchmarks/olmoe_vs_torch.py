"""A training step of a small OLMoE against PyTorch's `transformers`, on the CPU.

  python benchmarks/olmoe_vs_torch.py

Forward, backward, clipping and AdamW in float32 of `configs/bench/olmoe_small.py`, and
of `OlmoeForCausalLM` with the same sizes, on the same batch, with as many threads,
in turn. Of the ways in which transformers runs its experts the fastest is taken,
measured first. Needs PyTorch and transformers, which moe_jax does not: `pip install
torch transformers`.
"""

import argparse
import importlib.util
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "bench" / "olmoe_small.py"
# "batched_mm" would copy a matrix for every row: 17 GB here.
EXPERTS = ("grouped_mm", "eager")
NEEDED = ("torch", "transformers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--rows", type=int, default=0, help="0: as configured")
    parser.add_argument("--length", type=int, default=0, help="0: as configured")
    parser.add_argument("--layers", type=int, default=0, help="0: as configured")
    parser.add_argument("--experts", choices=EXPERTS, help="default: the fastest")
    options = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"missing: pip install {' '.join(missing)}")
    # Before either library counts the cores.
    for name in ("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    # PyTorch's threads wait for each other by spinning: ruinous on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    compare(options)
    return 0


def load_config(options):
    """The config with the sizes of the command line."""
    from moe_jax.cli import config_file
    from moe_jax.config import validate

    config = config_file.load(str(CONFIG))
    config.train.batch_size = options.rows or config.train.batch_size
    config.data.sequence_length = options.length or config.data.sequence_length
    config.model.num_layers = options.layers or config.model.num_layers
    return validate(config)


def random_batch(config):
    """(B, S) int32 tokens and targets, every id as likely."""
    import numpy as np

    rows, length = config.train.batch_size, config.data.sequence_length
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.model.vocab_size, (rows, length + 1), np.int32)
    return ids[:, :-1], ids[:, 1:]


class Ours:
    """The train step of moe_jax on one device."""

    def __init__(self, config, tokens, targets):
        import jax
        import numpy as np

        from moe_jax.parallel import batches
        from moe_jax.train import setup

        parts = setup.make_parts(config, jax.devices()[:1])
        self.parameters = parts.model.count_parameters()[0]
        self._run = setup.compile_step(parts)
        self._state = setup.fresh_state(parts)
        places = np.broadcast_to(
            np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
        )
        batch = dict(
            tokens=tokens,
            targets=targets,
            positions=places,
            segments=np.ones_like(tokens),
            weights=np.ones(tokens.shape, np.float32),
        )
        self._batch = batches.put(batch, parts.mesh, len(tokens), 0)
        self.losses: list[float] = []
        self.cpu_seconds: list[float] = []
        self.rounds = 0

    def step(self) -> None:
        began = time.process_time()
        self._state, metrics = self._run(self._state, self._batch)
        self.losses.append(float(metrics["loss"]))
        self.rounds = max(self.rounds, int(metrics["dispatch_rounds"]))
        self.cpu_seconds.append(time.process_time() - began)


class Theirs:
    """The same step of PyTorch and transformers."""

    def __init__(self, config, tokens, targets, experts):
        import torch
        import transformers

        model, optimizer = config.model, config.optimizer
        ff = model.feed_forward
        torch.manual_seed(0)
        options = transformers.OlmoeConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.d_model,
            intermediate_size=ff.experts.d_ff,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            rms_norm_eps=model.norm_eps,
            num_experts=ff.num_experts,
            num_experts_per_tok=ff.selector.top_k,
            output_router_logits=True,
            router_aux_loss_coef=ff.balance.load_balance_weight,
            use_cache=False,
            max_position_embeddings=tokens.shape[1],
            experts_implementation=experts,
            attn_implementation="sdpa",
        )
        self._model = transformers.OlmoeForCausalLM(options).train()
        self._clip = optimizer.clip_norm
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=optimizer.learning_rate / config.schedule.warmup_steps,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self._tokens = torch.from_numpy(tokens.astype("int64"))
        self._targets = torch.from_numpy(targets.astype("int64"))
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self.losses: list[float] = []
        self.cpu_seconds: list[float] = []

    def step(self) -> None:
        import torch

        began = time.process_time()
        targets = self._targets
        # The targets are one further on already.
        out = self._model(self._tokens, labels=targets, shift_labels=targets)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(out.loss.detach()))
        self.cpu_seconds.append(time.process_time() - began)


def fastest(config, tokens, targets) -> str:
    """The experts implementation of transformers with the fastest step here."""
    from moe_jax.bench import timing

    medians = {}
    for name in EXPERTS:
        try:
            one = Theirs(config, tokens, targets, name)
            medians[name] = timing.in_turn({name: one.step}, 1)[name].median
            print(f"transformers, {name}: {medians[name]:.2f} s a step", flush=True)
        except (RuntimeError, ValueError, ImportError, MemoryError) as error:
            print(f"transformers, {name}: {str(error).splitlines()[0]}", flush=True)
    return min(medians, key=medians.get)


def compare(options) -> None:
    import torch
    import transformers

    from moe_jax.bench import timing

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    config = load_config(options)
    print(timing.describe_machine())
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    tokens, targets = random_batch(config)
    experts = options.experts or fastest(config, tokens, targets)
    ours = Ours(config, tokens, targets)
    theirs = Theirs(config, tokens, targets, experts)
    found = timing.in_turn(
        {"moe_jax": ours.step, f"transformers, {experts}": theirs.step},
        options.repeats,
        options.warm_up,
    )
    print(
        f"{tokens.size} tokens a step ({len(tokens)} rows), {options.threads} threads, "
        f"median of {options.repeats} steps in turn and the quartiles, "
        f"{options.warm_up} before them left out\n"
        "| | parameters | ms a step | CPU s a step | tokens/s | loss, first, last |\n"
        "|---|---|---|---|---|---|"
    )
    for side, (name, times) in zip((ours, theirs), found.items(), strict=True):
        print(
            f"| {name} | {side.parameters:,} | {times.shown()} | "
            f"{statistics.median(side.cpu_seconds[options.warm_up :]):.2f} | "
            f"{tokens.size / times.median:.0f} | {side.losses[0]:.3f} "
            f"{side.losses[-1]:.3f} |"
        )
    mine, other = found.values()
    ratios = timing.Times(
        tuple(b / a for a, b in zip(mine.seconds, other.seconds, strict=True))
    )
    print(
        f"moe_jax is {ratios.shown(1)} times as fast (median and quartiles of the "
        f"pairs; at least 2 is the aim); rounds of its dispatch: {ours.rounds}"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
