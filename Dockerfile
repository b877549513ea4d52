# diffvit in a container: `docker run … IMAGE study --grid full` is `run.py study --grid full`. See docs/docker.md.
# CUDA comes with torch's wheels, so a plain Python image will do; the host has the driver.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS dependencies
WORKDIR /app
# Compiled here, because the user of the runtime stage cannot write there; copied, because the cache is another file system.
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir uv==0.13.9
# Nothing but pyproject.toml: these gigabytes are built and pulled again when it changes, not when the code does.
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync --no-install-project --no-dev --extra s3

FROM python:${PYTHON}-slim-bookworm AS runtime
# Triton and torch.compile compile C and C++ where they run. `ray up` copies files with rsync, and a head logs in to its workers. tini passes signals on and reaps what Ray leaves behind.
# No versions here: Debian keeps only the newest of a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ openssh-client rsync tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --home-dir /cache --no-create-home diffvit
WORKDIR /app
# Open to every user, so that `docker run --user` works too.
RUN install -d -m 1777 /app/checkpoints /cache
COPY --from=dependencies /app/.venv ./.venv
COPY LICENSE run.py ./
COPY diffvit ./diffvit
COPY study ./study

# All that is kept between containers, results apart, lies in /cache: data sets, decoded images, compiled kernels.
# USER names whoever runs it, for libraries that ask and find no such user under `--user`.
ENV PATH="/app/.venv/bin:$PATH" \
    PYTHONPATH=/app \
    HOME=/cache \
    USER=diffvit \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What a run records as its code: there is no git checkout in the image. Late, because it changes with every commit.
ARG COMMIT=""
ENV DIFFVIT_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="diffvit" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${COMMIT}"

USER 1000
HEALTHCHECK --interval=5m --timeout=30s --start-period=30s CMD ["python", "run.py", "--help"]
ENTRYPOINT ["tini", "--", "python", "run.py"]
CMD ["--help"]
