"""The mathematics of diffusion and of flows; it knows no model.

Images are x (B, H, W, C). On every path x = alpha x0 + sigma eps, with data x0 and
noise eps ~ N(0, I). A denoiser is a function `(x, time) -> prediction`: x (B, H, W, C),
time (B,) in the unit of the process, prediction (B, H, W, C_out), whose first C
channels are what the process predicts; further ones, where there are any, are the
learned variance. What the network sees as time is `process.network_time(time)`: who
makes a denoiser of a network applies it.

| file | |
|---|---|
| `processes/` | conventions: the path, the prediction, the unit of time |
| `schedules.py`, `posterior.py` | tables of DDPM, respacing; one step back |
| `conversions.py` | between x0, eps, v, velocity and score |
| `losses.py`, `weights.py`, `times.py` | what is minimised, weighed, and when |
| `pairing.py`, `conditions.py` | noise for an image; labels dropped and perturbed |
| `guidance.py`, `samplers/` | from noise to images |
"""
