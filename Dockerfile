# One image for CPU and CUDA: PyTorch's Linux wheels carry their CUDA libraries, and the host's NVIDIA runtime adds the
# driver when the container is started with GPUs. `docs/deployment.md` tells how to run it.

FROM python:3.13.9-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/roiserve
ENV PATH=/opt/roiserve/bin:$PATH
WORKDIR /build

# The dependencies first and without the code, so that a change of the code keeps their layer of several gigabytes.
# OpenVINO is an extra; without it a container on a CPU would be served by the slower `eager`. timm is one for models
# whose backbone it has.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *extras['openvino'], *extras['timm'], sep='\n')" \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY roiserve roiserve
COPY service service
RUN pip install --no-deps .


FROM python:3.13.9-slim-bookworm

# On CUDA, Triton compiles a small launcher for each kernel when it is first needed: the engine `compiled` and our own
# kernels want a C compiler with its headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 10001 roiserve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/roiserve roiserve \
    && install -d -o roiserve -g roiserve /var/cache/roiserve

COPY --from=build /opt/roiserve /opt/roiserve
COPY docker/healthcheck.py /opt/roiserve/healthcheck.py
COPY model_store /srv/model_store

# Numba, OpenVINO, Triton and torch.compile keep here what they compile at the first start; a volume keeps it over a
# rollout. All else may be read-only, but for /tmp.
ENV PATH=/opt/roiserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/var/cache/roiserve/numba \
    ROISERVE_ENGINE_CACHE_DIR=/var/cache/roiserve/engines \
    TRITON_CACHE_DIR=/var/cache/roiserve/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/roiserve/inductor \
    ROISERVE_HOST=0.0.0.0 \
    ROISERVE_PORT=8000 \
    ROISERVE_MODEL_STORE=/srv/model_store
VOLUME /var/cache/roiserve

USER 10001:10001
WORKDIR /srv
EXPOSE 8000

# /healthz, not /readyz: a container that loads or drains is not ready, and must not be killed for it.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/opt/roiserve/healthcheck.py"]

# As a list, so that the server itself and not a shell gets SIGTERM, and drains.
CMD ["roiserve", "serve"]
