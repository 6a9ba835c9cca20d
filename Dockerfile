# The server and what it needs to run, as a user without rights.
#     docker build -t kvik --build-arg PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' .
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=
WORKDIR /src
RUN python -m venv /opt/kvik
COPY pyproject.toml README.md LICENSE ./
COPY kvik ./kvik
COPY model ./model
COPY weights ./weights
COPY engine ./engine
COPY server ./server
COPY training ./training
COPY benchmarks ./benchmarks
RUN /opt/kvik/bin/pip install --no-cache-dir --disable-pip-version-check ${PIP_ARGS} .

FROM ${BASE_IMAGE}
COPY --from=build /opt/kvik /opt/kvik
# The group is root's, which a container has that is run as a user of another number.
RUN useradd --create-home --uid 1000 kvik && install -d -o kvik -g root -m 775 /var/cache/kvik
USER kvik
WORKDIR /home/kvik
# Kernels are compiled for the processor at hand by the first start, and kept in a volume: it can be
# written where the root file system cannot, and outlives the container where it is given a name.
ENV PATH=/opt/kvik/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/var/cache/kvik
VOLUME /var/cache/kvik
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["kvik"]
CMD ["serve", "--host", "0.0.0.0"]
