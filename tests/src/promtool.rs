//! Prometheus's own checker.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{cache, run};

/// Debian's package holds it, and a server that nobody wants installed: it is unpacked into the cache.
pub fn promtool() -> Result<PathBuf> {
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|dir| dir.join("promtool")).find(|file| file.is_file())
    });
    if let Some(program) = on_path {
        return Ok(program);
    }
    let directory = cache::entry("promtool", &cache::key([&b"2"[..]]), |directory| {
        // A package of its own from trixie on.
        let script = "apt-get -q update && { apt-get -q download promtool || apt-get -q download prometheus; } \
                      && dpkg-deb -x prom*.deb . && rm prom*.deb && test -x usr/bin/promtool";
        let mut command = run::command("sh", &["-c", script]);
        command.current_dir(directory);
        run::output(&mut command).map(drop).context("promtool isn't on PATH and can't be had from Debian")
    })?;
    Ok(directory.join("usr/bin/promtool"))
}
