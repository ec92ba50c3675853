# The daemon alone: no compiler, no root.
#   make image
#   make image IMAGE=kvferry-cuda EXTRAS=nixl TORCH=torch
# Every package has to be the one whose hash is in deploy/ (`make requirements` renews them), but for
# what EXTRAS and TORCH add: those have the versions of constraints.txt, and no hashes.
# Without TORCH there is none: pools lie in host memory. COMMIT is what `kvferry version` shows.
# PIP_EXTRA_INDEX_URL: where torch's build without CUDA is, for the demo (EXTRAS="demo").
ARG PYTHON=python:3.11-slim
FROM ${PYTHON} AS build
ARG EXTRAS=""
ARG TORCH=""
ARG COMMIT=""
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
COPY . .
RUN printf '%s' "${COMMIT}" > daemon/kvferry_daemon/COMMIT \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes -r deploy/requirements-build.txt \
    && /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheel . \
    && python -m venv /opt/kvferry \
    && /opt/kvferry/bin/pip install --no-cache-dir --require-hashes -r deploy/requirements.txt \
    && /opt/kvferry/bin/pip install --no-cache-dir --no-deps /opt/wheel/*.whl
RUN if [ -n "${EXTRAS}${TORCH}" ]; then \
      /opt/kvferry/bin/pip install --no-cache-dir -c constraints.txt \
        ${EXTRAS:+"kvferry[${EXTRAS}]"} ${TORCH}; fi

FROM ${PYTHON}
COPY --from=build /opt/kvferry /opt/kvferry
RUN useradd --uid 10001 --no-create-home kvferry \
    && install -d -o kvferry -m 0700 /run/kvferry
USER 10001
# A tmpfs that the workers' containers share is mounted at /run/kvferry. It belongs to root, as
# mounts do, so the daemon makes a directory of its own inside it.
ENV KVFERRY_RUNTIME_DIR=/run/kvferry/daemon
ENV PATH=/opt/kvferry/bin:$PATH
ENTRYPOINT ["/opt/kvferry/bin/kvferry"]
CMD ["serve"]
HEALTHCHECK --interval=10s --timeout=5s CMD ["/opt/kvferry/bin/kvferry", "status", "--json"]
