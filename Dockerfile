# A GPU host, x86-64 or aarch64 (an H200 server as well as a DGX Spark):
#   docker build -t isoloss --build-arg UID=$(id -u) .
#   docker run --rm --gpus all -v "$PWD/reports:/opt/isoloss/reports" isoloss --help
#
# devel: Triton builds its launchers with the host compiler, and causal-conv1d, if wanted, needs nvcc. The tag is exact and
# serves both architectures; a digest would pin it harder, but it has to be read from the registry that you pull from:
#   docker buildx imagetools inspect nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM docker.io/nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

# UID: whoever owns the mounted reports/; the base image has a user of number 1000 already, hence --non-unique.
ARG UID=10001
RUN useradd --create-home --non-unique --uid "${UID}" isoloss \
    && install -d -o isoloss /opt/isoloss /opt/venv \
    && git config --system --add safe.directory /opt/isoloss
USER isoloss
WORKDIR /opt/isoloss
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch alone first: the layer outlives changes of the code. PyPI's wheels are CUDA 13.0 builds on x86-64 and on aarch64, so
# neither needs an index of its own.
COPY --chown=isoloss constraints.txt ./
RUN python3.12 -m venv /opt/venv \
    && python -m pip install -c constraints.txt torch==2.13.0 setuptools==84.2.1

# .git comes along: every record names the commit that it was measured with.
COPY --chown=isoloss . .
RUN python -m pip install --no-build-isolation -c constraints.txt -e '.[gpu]'

ENTRYPOINT ["python", "-m", "bench.run"]
