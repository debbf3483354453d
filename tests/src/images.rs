//! The images of a real cluster without a registry: stand-in bases, the stock images around the real programs,
//! and one containerd store that has them all unpacked.

pub mod archive;
mod peer;
mod project;
mod stock;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{bed::containerd::Containerd, cache, parts::Parts, run, say::Progress};

pub use peer::peer;
pub use project::{Product, Size, coordinator, echo, product, shipped, sizes};
pub use stock::PAUSE;

/// What goes into the base that stands in for the official images' Debian.
const BASE_PACKAGES: &str =
    "iptables,nftables,iproute2,ipset,kmod,conntrack,procps,iputils-ping,netbase,ca-certificates";

/// Debian's release of the stand-in base.
const BASE_SUITE: &str = "trixie";

/// The finished base and store.
#[derive(Debug, Clone)]
pub struct Images {
    /// Root filesystem of the stand-in base, a tar.
    pub base: PathBuf,
    /// A containerd root directory with every stock image unpacked, to be linked into nodes.
    pub store: PathBuf,
}

/// Makes what isn't in the cache yet.
pub fn build(parts: &Parts) -> Result<Images> {
    let base = base()?;
    let recipe = stock::recipe(parts)?;
    let key = cache::key([parts.key().as_bytes(), format!("{}{recipe:?}", base.display()).as_bytes()]);
    let store = cache::entry("images", &key, |directory| {
        let mut progress = Progress::new("images", 2);
        progress.step("writing the stock images' layers");
        let layers = directory.join("layers");
        fs::create_dir_all(&layers)?;
        let archive = directory.join("images.tar");
        archive::write(&archive, &stock::images(&layers, &base, &recipe)?)?;
        progress.step("unpacking them into a containerd store");
        let store = directory.join("store");
        if store.exists() {
            fs::remove_dir_all(&store)?;
        }
        import(directory, &store, &archive)?;
        fs::remove_file(&archive)?;
        fs::remove_dir_all(&layers)?;
        progress.done("stock images ready");
        Ok(())
    })?;
    Ok(Images { base, store: store.join("store") })
}

/// Makes a node's containerd root at `root` from the finished store: files are shared as hard links, only the
/// databases are the node's own. Layers are never written to, so sharing is safe.
pub fn link_store(store: &Path, root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let from = format!("{}/.", store.display());
    let to = root.display().to_string();
    if run::output(&mut run::command("cp", &["-a", "--link", &from, &to])).is_err() {
        // The cache may be on another file system.
        return run::output(&mut run::command("cp", &["-a", &from, &to])).map(drop);
    }
    for database in
        ["io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db"]
    {
        let path = root.join(database);
        fs::remove_file(&path)?;
        fs::copy(store.join(database), &path).with_context(|| format!("no {database}"))?;
    }
    Ok(())
}

/// The tar of the stand-in base.
fn base() -> Result<PathBuf> {
    debian("base", BASE_PACKAGES, &[])
}

/// The tar of a base that holds what the official slim one does, and nothing that the images need beyond it.
pub fn slim() -> Result<PathBuf> {
    debian("slim", "", &["--customize-hook=rm -f \"$1\"/var/cache/apt/*.bin"])
}

fn debian(name: &str, packages: &str, hooks: &[&str]) -> Result<PathBuf> {
    let parts = [packages, BASE_SUITE, "2"].into_iter().chain(hooks.iter().copied());
    let key = cache::key(parts.map(str::as_bytes));
    let directory = cache::entry(name, &key, |directory| {
        eprintln!("images: installing a stand-in for the official Debian base (about a minute)");
        let tar = directory.join("base.tar");
        let include = format!("--include={packages}");
        let mut arguments = vec!["--variant=minbase", "--mode=root", "--quiet"];
        if !packages.is_empty() {
            arguments.push(&include);
        }
        arguments.extend(hooks);
        for drop in ["doc/*", "man/*", "locale/*", "info/*"] {
            arguments.push(match drop {
                "doc/*" => "--dpkgopt=path-exclude=/usr/share/doc/*",
                "man/*" => "--dpkgopt=path-exclude=/usr/share/man/*",
                "locale/*" => "--dpkgopt=path-exclude=/usr/share/locale/*",
                _ => "--dpkgopt=path-exclude=/usr/share/info/*",
            });
        }
        // As the official images: without these, every later apt run leaves its binary caches in its layer.
        arguments.push("--customize-hook=printf 'Dir::Cache::pkgcache \"\";\\nDir::Cache::srcpkgcache \"\";\\n' > \"$1/etc/apt/apt.conf.d/docker-clean\"");
        arguments.push("--customize-hook=rm -rf \"$1\"/var/lib/apt/lists/*");
        let tar_text = tar.display().to_string();
        arguments.extend([BASE_SUITE, tar_text.as_str()]);
        run::output(&mut run::command("mmdebstrap", &arguments)).map(drop)
    })?;
    Ok(directory.join("base.tar"))
}

/// Imports `archive` into a containerd store of its own at `store`.
fn import(directory: &Path, store: &Path, archive: &Path) -> Result<()> {
    let run = tempfile::Builder::new().prefix("run-").tempdir_in(directory)?;
    let containerd = Containerd { root: store.to_owned(), state: run.path().join("state") };
    let config = run.path().join("config.toml");
    fs::write(&config, containerd.config_without_cri())?;
    // A mount namespace of its own: what unpacking mounts never shows on the machine.
    let mut command =
        run::command("unshare", &["--mount", "--propagation", "private", "containerd", "--config"]);
    let log = fs::File::create(run.path().join("log"))?;
    let mut child = command
        .arg(&config)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("can't start containerd")?;
    let imported = run::wait_for("containerd answers", Duration::from_mins(1), || {
        run::output(&mut containerd.ctr(&["version"])).map(|_| true)
    })
    .and_then(|()| {
        // Unpacking must happen in containerd itself: ctr's own mounts would be outside its namespace.
        run::output(containerd.ctr(&["images", "import", "--snapshotter", "overlayfs"]).arg(archive))
    });
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(child.id())?),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    child.wait()?;
    imported.map(drop)
}
