# Onward in a container: the run is a volume at /run-dir, trained by `onward watch`, not as root.
#
#   docker build --target cpu -t onward:cpu .
#   docker build --target cuda -t onward:cuda .
#   docker run --rm -v my-run:/run-dir -v onward-cache:/home/onward/.cache onward:cpu init --model smollm2-135m
#   docker run -d -v my-run:/run-dir -v onward-cache:/home/onward/.cache onward:cpu
#
# The second volume keeps the base model, which only `init` downloads from a hub; one can serve many runs.
#
# TORCH_INDEX names the package index that has PyTorch's build for this machine (pytorch.org shows it: for the target
# cpu the one for "CPU"). Without it the default index is used, whose Linux build is for NVIDIA GPUs.

ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src ./src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS onward
ARG TORCH_INDEX=""
ARG EXTRAS="parquet"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /tmp/wheels
# hadolint ignore=DL3013  # the versions are those of constraints.txt
RUN torch="$(grep '^torch==' /tmp/constraints.txt)" \
    && pip install "${torch}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    && wheel="$(find /tmp/wheels -name 'onward-*.whl')" \
    && pip install --constraint /tmp/constraints.txt "${wheel}[${EXTRAS}]" \
    && rm -rf /tmp/wheels /tmp/constraints.txt \
    && useradd --create-home --uid 1000 onward \
    && install -d -o onward -g onward /run-dir /home/onward/.cache
ENV ONWARD_RUN=/run-dir
WORKDIR /run-dir
VOLUME /run-dir
USER 1000:1000
STOPSIGNAL SIGTERM
# It is healthy while `status` can be read and says neither that the run failed nor that a step hangs.
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import json, subprocess, sys; status = json.loads(subprocess.check_output(['onward', 'status', '--json'])); sys.exit(status['state'] == 'failed' or status['hangs'])"]
ENTRYPOINT ["onward"]
CMD ["watch"]

FROM onward AS cpu
ENV CUDA_VISIBLE_DEVICES=""

FROM onward AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
