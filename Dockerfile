# An image for launch/gke.py, or for any other scheduler of containers:
#
#   docker build --build-arg EXTRA=tpu -t moe_jax .
#   docker run --rm moe_jax moe-jax train --help
#
# EXTRA is tpu, cuda, or empty for CPUs. Data and checkpoints come from outside: a bucket,
# or a volume that the user 1000 may write to.
FROM python:3.11-slim

# As process 1, Python would ignore SIGTERM until it has set a handler of its own, and
# the run would be killed in place of saving. tini hands signals on.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRA=tpu
WORKDIR /app
COPY setup.py pyproject.toml README.md LICENSE ./
COPY moe_jax moe_jax
RUN pip install --no-cache-dir -e ".${EXTRA:+[$EXTRA]}"
COPY configs configs

RUN useradd --create-home --uid 1000 trainer
USER trainer
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["tini", "-g", "--"]
CMD ["moe-jax", "--help"]
