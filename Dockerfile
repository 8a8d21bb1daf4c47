# An image with nemo_hybrid installed; it runs as an ordinary user.
#   CPU:  docker build -t nemo-hybrid .
#   GPU:  docker build -t nemo-hybrid --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#           --build-arg TORCH_INDEX= .
# Any Debian or Ubuntu base whose python3 is 3.10 to 3.13 will do; torch brings its own CUDA libraries.
ARG BASE=debian:bookworm-slim
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton compiles the launchers of its kernels when they first run: gcc and the headers are for that.
# The versions are those of the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --shell /bin/bash --uid 10001 trainer \
    && install -d -o trainer /opt/nemo_hybrid
USER 10001
WORKDIR /opt/nemo_hybrid

COPY --chown=trainer . .

# The CPU builds of torch; empty: the builds of pip's own index, which bring CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e .
ENV PATH=/opt/nemo_hybrid/.venv/bin:$PATH

CMD ["nemo-hybrid", "doctor"]
