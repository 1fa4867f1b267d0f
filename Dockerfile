# syntax=docker/dockerfile:1
# The image of head, workers and jobs; one for all of them, as Ray wants the same Python and Ray everywhere.
#
#   docker build -t stagemesh:0.1.0-cpu .
#   docker build -t registry.example.com/stagemesh:0.1.0-cuda --build-arg DEVICE=cuda \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --network host --shm-size 1g stagemesh:0.1.0-cpu        # the demo on http://127.0.0.1:8000
ARG DEVICE=cpu

FROM python:3.11-slim-bookworm AS cpu
# KubeRay's probes need bash, grep and wget; Debian's base has the first two.
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

FROM cpu AS cuda
# Triton compiles a small C program for each kernel. CUDA's libraries come with torch, the driver from the node.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${DEVICE}
WORKDIR /app
# Installed into the image's own Python, so that `ray` is found by login shells too. Layers from what changes least to what
# changes most; the pins are those of the Makefile.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --extra-index-url ${TORCH_INDEX} -c constraints.txt torch==2.13.0
# An editable install only notes the folder of the packages, so that they may be empty yet. The base image has no bytecode
# of the standard library, and nobody could write it later: each process would compile it anew.
COPY pyproject.toml LICENSE ./
# For checkpoints in object stores: --build-arg EXTRAS=[stores]; for batches there or in Parquet: --build-arg EXTRAS=[batch]
ARG EXTRAS=
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md && for package in configs cluster actors deployments; do \
      mkdir $package && touch $package/__init__.py; done && \
    python -m pip install -c constraints.txt hatchling editables && \
    python -m pip install -c constraints.txt --no-build-isolation -e ".${EXTRAS}" && \
    python -m compileall -q -j 0 -x site-packages /usr/local/lib/python3.11
COPY configs configs
COPY cluster cluster
COPY actors actors
COPY deployments deployments
RUN python -m compileall -q configs cluster actors deployments && useradd --uid 1000 --create-home stagemesh
USER 1000
CMD ["python", "-m", "deployments.serve.command", "configs/demo.yaml"]
