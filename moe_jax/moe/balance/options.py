"""The config of balance, and its rules."""

from collections.abc import Iterator

from moe_jax import config

_WEIGHTS = (
    "load_balance_weight",
    "sequence_weight",
    "global_weight",
    "device_weight",
    "pooled_weight",
    "z_weight",
    "importance_weight",
    "load_weight",
    "entropy_weight",
)
# Those of the form `E * sum_e f_e P_e`.
LOAD_BALANCE = _WEIGHTS[:5]
SHARES = ("assignments", "tokens", "first")
RULES = ("sign", "proportional")
FORMS = ("additive", "multiplicative")


@config.node
class Balance(config.Node):
    """Weights of the losses (0: off; several may be on), and the bias.

    The load-balance loss is `E * sum_e f_e P_e` (Switch, Fedus et al. 2021), f_e the
    load of expert e and P_e its mean probability. Its scopes differ in the tokens
    over which f and P are taken. Each loss is summed over the MoE layers.

    Attributes:
      load_balance_weight: of the load-balance loss over a micro-batch.
      sequence_weight: over each row of the batch (DeepSeek-V3); the mean over rows is
        weighted by their tokens, so padding does not count.
      global_weight: f over all micro-batches of the optimizer step (Qiu et al. 2025).
        With `train.accumulation` above 1 this costs a second forward pass.
      device_weight: over groups of experts in place of experts (DeepSeekMoE).
      device_groups: how many groups of neighbouring experts.
      pooled_weight: over the tokens of all MoE layers together (Hugging Face). The
        model adds it; a lone `MoELayer` gives `MoEAux.statistics`.
      load_share: what f_e is. "assignments": the share of all assignments, a uniform
        loss is 1 (DeepSeek). "tokens": assignments per token, a uniform loss is K
        (Hugging Face). "first": the share of tokens whose most probable expert is e
        (GShard, Switch).
      z_weight: of the router z-loss (ST-MoE, Zoph et al. 2022).
      importance_weight: of the squared coefficient of variation of the experts' summed
        probabilities (V-MoE, Riquelme et al. 2021).
      load_weight: of that of the experts' expected load when the noise is drawn anew
        (V-MoE); needs a selector that adds noise.
      entropy_weight: of the mean entropy of the probabilities; pushes them apart
        (Huang et al. 2024).
      bias_rate: step of the loss-free bias (Wang et al. 2024); 0 keeps no bias.
      bias_rule: "sign" of the load's error, or "proportional" to it.
      bias_form: "additive" to the scores, or "multiplicative".
    """

    load_balance_weight: float = 0.01
    sequence_weight: float = 0.0
    global_weight: float = 0.0
    device_weight: float = 0.0
    device_groups: int = 0
    pooled_weight: float = 0.0
    load_share: str = "assignments"
    z_weight: float = 0.001
    importance_weight: float = 0.0
    load_weight: float = 0.0
    entropy_weight: float = 0.0
    bias_rate: float = 0.0
    bias_rule: str = "sign"
    bias_form: str = "additive"

    def problems(self, path, root):
        for name in (*_WEIGHTS, "bias_rate"):
            if getattr(self, name) < 0:
                yield f"{path}.{name}={getattr(self, name)}: must not be negative"
        for name, known in (
            ("load_share", SHARES),
            ("bias_rule", RULES),
            ("bias_form", FORMS),
        ):
            if getattr(self, name) not in known:
                yield f"{path}.{name}={getattr(self, name)!r}: must be one of {known}"
        yield from self._ignored(path)

    def _ignored(self, path: str) -> Iterator[str]:
        if self.device_groups and not self.device_weight:
            yield (
                f"{path}.device_groups={self.device_groups} would be ignored: "
                "device_weight is 0"
            )
        if self.load_share != "assignments" and not self.has_load_balance:
            yield (
                f"{path}.load_share={self.load_share!r} would be ignored: no "
                f"load-balance loss is on; set one of {list(LOAD_BALANCE)}"
            )
        for name, default in (("bias_rule", "sign"), ("bias_form", "additive")):
            if getattr(self, name) != default and not self.bias_rate:
                yield (
                    f"{path}.{name}={getattr(self, name)!r} would be ignored: "
                    "bias_rate is 0"
                )

    def layer_problems(
        self, path: str, num_experts: int, selector: config.SelectorConfig
    ) -> Iterator[str]:
        """Problems that need more of the layer; `path` is that of its config."""
        groups = self.device_groups
        if self.device_weight and (groups < 2 or num_experts % groups):
            yield (
                f"{path}.balance.device_groups={groups}: must be at least 2 and divide "
                f"the {num_experts} experts that are routed; it takes one of "
                f"{config.divisors(num_experts)[1:]}"
            )
        for name, value, other in (
            ("softmax", "after", "before"),
            ("score", "identity", "sigmoid"),
        ):
            compares_logits = getattr(selector, name, "") == value
            if self.bias_form == "multiplicative" and compares_logits:
                yield (
                    f"{path}.balance.bias_form='multiplicative' with {path}.selector."
                    f"{name}={value!r}: a factor raises positive scores only, and "
                    f"logits are compared; set {name}={other!r} or bias_form='additive'"
                )

    @property
    def has_load_balance(self) -> bool:
        """Whether any load-balance loss is on."""
        return any(getattr(self, name) for name in LOAD_BALANCE)
