# One image for the head, the workers and the submitter of a Ray cluster.
#
#   docker build -t prioritycut-ray:0.1.0-ray2.60.0-cpu .
#   docker build -t prioritycut-ray:0.1.0-ray2.60.0-cu126 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#
# The CUDA libraries come with torch's wheels and the driver from the node, so the base image is the
# same. There is no HEALTHCHECK: the operator adds probes to Ray's pods.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim-bookworm AS build

ARG RAY_VERSION=2.60.0
ARG TORCH_VERSION=2.14.1
ARG TORCHVISION_VERSION=0.29.1
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Dependencies before code: this layer of several GB changes only with pyproject.toml.
WORKDIR /src
RUN pip install --index-url "${TORCH_INDEX}" \
    "torch==${TORCH_VERSION}" "torchvision==${TORCHVISION_VERSION}"
COPY pyproject.toml ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    print(*project["dependencies"], *project["optional-dependencies"]["s3"], sep="\n")' \
    > requirements.txt \
    && pip install "ray[default,train,tune]==${RAY_VERSION}" --requirement requirements.txt

COPY README.md LICENSE ./
COPY prioritycut_ray prioritycut_ray
RUN pip install --no-deps . \
    && pip check \
    && prioritycut --help > /dev/null \
    && ray --version \
    && tensorboard --version \
    && pip uninstall --yes pip

FROM python:${PYTHON_VERSION}-slim-bookworm

# KubeRay's probes use wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && pip uninstall --yes pip setuptools wheel \
    && useradd --uid 1000 --user-group --create-home ray

COPY --from=build /opt/venv /opt/venv
COPY retrain.yaml /home/ray/
COPY tune_configs /home/ray/tune_configs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# NVIDIA's container runtime reads these. Without it, GKE mounts the driver at /usr/local/nvidia, which
# the image must search.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
USER 1000:1000
WORKDIR /home/ray
CMD ["prioritycut", "--help"]
