#!/bin/bash
# Sourced by the scripts of this folder: finds the toolchains, and installs what compiling needs.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$(basename "$0")

fail() {
    echo "$script: $*" >&2
    exit 1
}

# need PROGRAM PACKAGE...: installs Debian's packages where the program is missing.
need() {
    local program=$1
    shift
    command -v "$program" >/dev/null && return
    [ -e /etc/debian_version ] || fail "no $program: install what your distribution calls $*"
    echo "$script: installing $*" >&2
    # Lists of packages are fetched once: a machine that has none has never had any.
    ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1 || apt-get -q -y update >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "$@" >/dev/null ||
        { apt-get -q -y update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "$@" >/dev/null; }
}

prepare() {
    [ "$(id -u)" = 0 ] || fail "not root: namespaces, mounts and containerd need it; run it with sudo"
    command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"
    command -v cargo >/dev/null || fail "no cargo: install Rust from https://rustup.rs"
    command -v go >/dev/null || PATH="/usr/local/go/bin:$PATH"
    command -v go >/dev/null || fail "no go: install Go 1.26.8 or later from https://go.dev/dl"
    need cc gcc libc6-dev
    need git git
    host=$(rustc -vV | sed -n 's/^host: //p')
    target=${CARGO_TARGET_DIR:-$here/target}
    # One profile for everything that runs, tests included: dependencies are compiled once. Static, as what goes into the images is.
    export RUSTFLAGS="-C target-feature=+crt-static"
    built=(--locked --profile bed --target "$host")
    programs=$target/$host/bed
}

# builder COMMAND [ARGUMENT...]: builds what that command of the test bed needs, the test bed included, side by side.
builder() {
    [ -e "$programs/parts" ] || echo "$script: compiling the builder (about half a minute, once)" >&2
    (cd "$here" && cargo build --quiet "${built[@]}" --package flannel-migration-parts)
    (cd "$here" && "$programs/parts" prepare -- "$@")
}
