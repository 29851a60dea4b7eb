# The set-up of `make setup`, with the same pins, in an image:
#
#   docker build -t latent-reasoning .
#   docker build -t latent-reasoning:cuda --build-arg BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 --build-arg GPU=1 .
#   docker run --rm -v "$PWD/runs:/latent-reasoning/runs" latent-reasoning train hrpo
#   docker run --rm --gpus all -v "$PWD/runs:/latent-reasoning/runs" latent-reasoning:cuda train hrpo --config hrpo_gsm8k
#
# TORCH_ARGS names another index of torch, such as one of CPU builds, which are smaller.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG GPU=
ARG TORCH_ARGS=
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /latent-reasoning
COPY . .
RUN PIP_NO_CACHE_DIR=1 make setup GPU="${GPU}" TORCH_ARGS="${TORCH_ARGS}"

ENV PATH="/latent-reasoning/.venv/bin:${PATH}" TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["latent-reasoning"]
CMD ["--help"]
