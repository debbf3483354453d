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

use crate::{bed::containerd::Containerd, cache, debian, parts::Parts, run, say::Progress};

pub use debian::slim;
pub use peer::peer;
pub use project::{Product, Size, coordinator, echo, product, shipped, sizes};
pub use stock::PAUSE;

/// The name of the base that the Dockerfile builds on.
pub const DEBIAN: &str = "docker.io/library/debian:trixie-slim";

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
    let base = debian::base()?;
    let recipes = stock::recipes(parts)?;
    let made_of = parts.key(&["calico", "containerd", "cni-plugins", "flannel", "flannel-cni"]);
    let key = cache::key([made_of.as_bytes(), format!("{}{recipes:?}", base.display()).as_bytes()]);
    // One store for each pair of networks, beside each other.
    let versions = &parts.versions;
    let kind = format!("images-{}-{}", versions.calico, versions.flannel);
    let store = cache::entry(&kind, &key, |directory| {
        let progress = Progress::new("images", 2);
        progress.step("writing the stock images' layers");
        let layers = directory.join("layers");
        fs::create_dir_all(&layers)?;
        let archive = directory.join("images.tar");
        archive::write(&archive, &stock::images(&layers, &base, &recipes)?)?;
        progress.step("unpacking them into a containerd store");
        let store = directory.join("store");
        if store.exists() {
            fs::remove_dir_all(&store)?;
        }
        import(parts, &store, &archive)?;
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

/// Imports `archive` into a containerd store of its own at `store`.
fn import(parts: &Parts, store: &Path, archive: &Path) -> Result<()> {
    // Not below the cache: the path of a socket has 104 characters at the most.
    let run = tempfile::Builder::new().prefix("fm-").tempdir()?;
    let containerd = Containerd::new(parts, store, &run.path().join("state"))?;
    let config = run.path().join("config.toml");
    fs::write(&config, containerd.config_without_cri())?;
    // A mount namespace of its own: what unpacking mounts never shows on the machine.
    let mut command = run::command("unshare", &["--mount", "--propagation", "private"]);
    command.arg(&containerd.program).arg("--config");
    let log_path = run.path().join("log");
    let log = fs::File::create(&log_path)?;
    let mut child = command
        .arg(&config)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("can't start containerd")?;
    let imported = run::wait_for("containerd answers", Duration::from_mins(1), || {
        run::output(&mut containerd.ctr(&["version"])).map(|_| true)
    })
    .with_context(|| {
        let log = fs::read_to_string(&log_path).unwrap_or_default();
        format!("containerd said last: {}", log.lines().next_back().unwrap_or_default())
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
