//! Debian root filesystems that stand in for the official images, and for a machine on which nothing is installed.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{cache, run};

/// Debian's release of all of them.
pub const SUITE: &str = "trixie";

/// What goes into the base of the stock images.
const BASE_PACKAGES: &str =
    "iptables,nftables,iproute2,ipset,kmod,conntrack,procps,iputils-ping,netbase,ca-certificates";

/// The tar of the base of the stock images, which has the network's tools.
pub fn base() -> Result<PathBuf> {
    debian("base", BASE_PACKAGES, &[])
}

/// The same as a directory, for tools of that Debian on a machine that has older ones.
pub fn base_directory() -> Result<PathBuf> {
    let tar = base()?.display().to_string();
    cache::entry("base-directory", &key(BASE_PACKAGES, &[]), |directory| {
        let directory = directory.display().to_string();
        run::output(&mut run::command("tar", &["--extract", "--file", &tar, "--directory", &directory]))
            .map(drop)
    })
}

/// Whether [`base`] is in the cache.
#[must_use]
pub fn has_base() -> bool {
    cache::root().join(format!("base-{}", key(BASE_PACKAGES, &[]))).is_dir()
}

/// The tar of a base that holds what the official slim one does, and nothing that the images need beyond it.
pub fn slim() -> Result<PathBuf> {
    debian("slim", "", &["--customize-hook=rm -f \"$1\"/var/cache/apt/*.bin"])
}

fn key(packages: &str, hooks: &[&str]) -> String {
    cache::key([packages, SUITE, "3"].into_iter().chain(hooks.iter().copied()).map(str::as_bytes))
}

fn debian(name: &str, packages: &str, hooks: &[&str]) -> Result<PathBuf> {
    let directory = cache::entry(name, &key(packages, hooks), |directory| {
        make(&directory.join("base.tar"), packages, hooks)
    })?;
    Ok(directory.join("base.tar"))
}

fn make(tar: &Path, packages: &str, hooks: &[&str]) -> Result<()> {
    let include = format!("--include={packages}");
    let mut arguments = vec!["--variant=minbase", "--mode=root", "--quiet"];
    if !packages.is_empty() {
        arguments.push(&include);
    }
    arguments.extend(hooks);
    arguments.extend([
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=path-exclude=/usr/share/info/*",
        // As the official images: without these, every later apt run leaves its binary caches in its layer.
        "--customize-hook=printf 'Dir::Cache::pkgcache \"\";\\nDir::Cache::srcpkgcache \"\";\\n' > \"$1/etc/apt/apt.conf.d/docker-clean\"",
        "--customize-hook=rm -rf \"$1\"/var/lib/apt/lists/*",
    ]);
    let tar = tar.display().to_string();
    arguments.extend([SUITE, tar.as_str()]);
    run::output(&mut run::command("mmdebstrap", &arguments)).map(drop)
}
