# Both images: docker build --target coordinator . ; docker build --target agent .
# Nothing here is of one architecture: docker buildx build --platform ... builds natively or emulated.
ARG RUST_IMAGE=docker.io/library/rust:1.95-trixie
ARG RUNTIME_IMAGE=docker.io/library/debian:trixie-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY . .
# Static: the coordinator's image holds nothing else. The target must be named, or build scripts and macros would be static too.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    host="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target "${host}" \
       --package flannel-migration-coordinator --package flannel-migration-agent \
    && install -D -t /out "target/${host}/release/coordinator" "target/${host}/release/agent"

# The seam: with --build-context bin=DIR, binaries made elsewhere take this stage's place.
FROM scratch AS bin
COPY --from=build /out/ /

FROM scratch AS coordinator
COPY --from=bin /coordinator /coordinator
USER 65532:65532
ENTRYPOINT ["/coordinator"]

FROM ${RUNTIME_IMAGE} AS agent
# flannel's rules are in the tables of these tools, of both iptables variants.
RUN apt-get update \
    && apt-get install -y --no-install-recommends iptables nftables \
    && rm -rf /var/lib/apt/lists/*
COPY --from=bin /agent /usr/local/bin/agent
ENTRYPOINT ["/usr/local/bin/agent"]
