//! This project's own programs, compiled by cargo.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::run;

/// The profile of everything that runs on a test bed, the test bed's own programs included: one set of dependencies.
pub const BED: &str = "bed";
/// The profile of what users get.
pub const RELEASE: &str = "release";

/// The product.
pub const PRODUCT: &[&str] = &["coordinator", "agent"];
/// What `hack/testbed` runs and puts on nodes: all of it compiled in one go.
pub const TESTBED: &[&str] = &["testbed", "echo", "coordinator", "agent"];

/// The project's directory.
pub fn source() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).context("the checkout is not whole")
}

/// Builds programs statically, for images that hold nothing else; returns the directory they are in.
pub fn build(profile: &str, names: &[&str]) -> Result<PathBuf> {
    let version = run::output(&mut run::command("rustc", &["-vV"]))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let source = source()?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| source.join("target"), PathBuf::from);
    let mut cargo = Command::new("cargo");
    cargo.current_dir(source).env("RUSTFLAGS", "-C target-feature=+crt-static");
    // Under `cargo test` these describe the tests; build scripts that look at them would run again at every change
    // between there and here, and half the dependencies after them.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|start| text.starts_with(start))
        {
            cargo.env_remove(&name);
        }
    }
    cargo.args(["build", "--quiet", "--locked", "--profile", profile, "--target", host]);
    for name in names {
        cargo.args(["--bin", name]);
    }
    run::output(&mut cargo)?;
    Ok(target.join(host).join(profile))
}
