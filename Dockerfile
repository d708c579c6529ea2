# ablate with everything it needs. CPU build: docker build -t ablate .
# With CUDA:     docker build -t ablate --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run a study:   docker run --rm -v "$PWD:/work" ablate study run studies/first.yaml
# The pipeline:  docker run --rm -v "$PWD:/work" --entrypoint dvc ablate repro
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MLFLOW_DISABLE_TELEMETRY=true DVC_NO_ANALYTICS=true

RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*

# What the package needs comes first, so that a change of code installs none of it again.
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ablate/__init__.py ablate/__init__.py
RUN pip install --extra-index-url "$TORCH_INDEX" --constraint constraints.txt '.[qa]'
COPY ablate ablate
RUN pip install --no-deps --force-reinstall . && python -m ablate.kernels.cpu.warm

# A project is the current folder: studies/, results/, tables/, out/, state/ and data/ are in it.
WORKDIR /work
RUN git config --system --add safe.directory /work
ENTRYPOINT ["ablate"]
CMD ["--help"]
