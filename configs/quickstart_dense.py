"""The quickstart, dense: as wide as the experts that serve one token there.

moe-jax train --config=configs/quickstart_dense.py --workdir=runs/quickstart_dense
"""

from configs import quickstart
from moe_jax.config import Config
from moe_jax.nn.feedforward import Dense


def get_config() -> Config:
    """Everything but the feed-forward is that of quickstart.py."""
    config = quickstart.get_config()
    config.model.feed_forward = Dense(d_ff=quickstart.TOP_K * quickstart.EXPERT_WIDTH)
    return config
