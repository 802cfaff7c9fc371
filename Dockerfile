# Two images from one file:
#   docker build --target train -t ptv2-train .   runs the chain; also the MLflow and Prefect servers of compose.yaml
#   docker build --target serve -t ptv2-serve .   answers requests for all tasks of the registry, on one backbone
# Both install the versions locked in constraints.txt. PyPI's torch brings CUDA, 4 GB of it; without a GPU, name the index of torch's CPU builds
# (pytorch.org says which): --build-arg TORCH_INDEX_URL=INDEX.
# Podman and Buildah need `--format docker`, or leave out the health checks.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:$PATH \
    DO_NOT_TRACK=true \
    MLFLOW_DISABLE_TELEMETRY=true
RUN groupadd --gid 1000 ptv2 \
    && useradd --uid 1000 --gid ptv2 --create-home ptv2

FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /workspace
RUN python -m venv /opt/venv
# The dependencies come first, installed for an empty project, so that editing the source rebuilds none of them.
COPY pyproject.toml constraints.txt ./
RUN mkdir ptv2_core pipelines ptv2_serving \
    && touch README.md LICENSE ptv2_core/__init__.py pipelines/__init__.py ptv2_serving/__init__.py

FROM build AS build-train
# The address of a package index with the build of torch to use; empty takes the default one.
ARG TORCH_INDEX_URL=
# Editable, so that the code that runs is that of the workspace, in the image or mounted: it is what DVC hashes.
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    -c constraints.txt -e ".[pipelines,demo,postgres]"

FROM build AS build-serve
ARG TORCH_INDEX_URL=
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    -c constraints.txt ".[serving,demo]"
COPY README.md LICENSE ./
COPY ptv2_core ptv2_core
COPY pipelines pipelines
COPY ptv2_serving ptv2_serving
RUN pip install --no-deps --force-reinstall .

FROM base AS train
# git: the commit recorded with each model version. A mounted workspace may belong to somebody else.
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /workspace \
    && install -d -o ptv2 -g ptv2 /workspace /var/lib/ptv2/mlartifacts /var/lib/ptv2/prefect
COPY --from=build-train /opt/venv /opt/venv
ENV DVC_NO_ANALYTICS=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false
WORKDIR /workspace
COPY --chown=ptv2:ptv2 . .
USER ptv2
# The copy of the workspace in the image has no history; a mounted one brings its own .dvc, without this line.
RUN dvc config --local core.no_scm true
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 \
    CMD ["ptv2", "--help"]
CMD ["ptv2", "run"]

FROM base AS serve
RUN install -d -o ptv2 -g ptv2 -m 700 /var/lib/ptv2/store
COPY --from=build-serve /opt/venv /opt/venv
# The backbone is in the image, so nothing is downloaded but prompts; nothing of them is ever unpickled.
ENV HF_HUB_OFFLINE=1 \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
WORKDIR /home/ptv2
USER ptv2
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
# MLFLOW_TRACKING_URI says which registry. Who may ask stands in a file, a token a line; without one it would not listen here.
CMD ["ptv2", "serve", "--host=0.0.0.0", "--port=8080", "--store=/var/lib/ptv2/store", "--token-file=/run/secrets/ptv2_tokens"]
