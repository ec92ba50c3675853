# The daemon alone, for host pools: no torch, no compiler, no root.
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/kvferry \
    && /opt/kvferry/bin/pip install --no-cache-dir -c constraints.txt \
       . click rich uvloop xxhash

FROM python:3.11-slim
COPY --from=build /opt/kvferry /opt/kvferry
RUN useradd --uid 10001 --no-create-home kvferry \
    && install -d -o kvferry -m 0700 /run/kvferry
USER kvferry
# A tmpfs that the workers' containers share is mounted at /run/kvferry. It belongs to root, as
# mounts do, so the daemon makes a directory of its own inside it.
ENV KVFERRY_RUNTIME_DIR=/run/kvferry/daemon
ENTRYPOINT ["/opt/kvferry/bin/kvferry"]
CMD ["serve"]
HEALTHCHECK --interval=10s --timeout=5s CMD ["/opt/kvferry/bin/kvferry", "status", "--json"]
