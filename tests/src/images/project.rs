//! The project's own images: coordinator and agent from the Dockerfile that users build, and the workload that
//! the prober talks to.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use super::archive::{self, Content, Files, Image, Layer};
use crate::{cache, programs, run, say::Progress};

/// The workload's image.
pub const ECHO: &str = "docker.io/flannel-migration/echo:bed";
/// What the manifests name.
pub const COORDINATOR: &str = "ghcr.io/flannel-migration/coordinator:v0.1.0";
/// What the manifests name.
pub const AGENT: &str = "ghcr.io/flannel-migration/agent:v0.1.0";

/// The product's images, as archives to be loaded into nodes.
#[derive(Debug, Clone)]
pub struct Product {
    /// The coordinator's.
    pub coordinator: PathBuf,
    /// The agent's.
    pub agent: PathBuf,
}

/// Builds the product's images where they changed.
pub fn product(base: &Path) -> Result<Product> {
    let source = programs::source()?;
    let programs = programs::build(programs::BED, programs::PRODUCT)?;
    let dockerfile = fs::read(source.join("Dockerfile")).context("can't read the Dockerfile")?;
    let mut inputs = vec![dockerfile, base.display().to_string().into_bytes()];
    for name in ["coordinator", "agent"] {
        inputs.push(fs::read(programs.join(name))?);
    }
    let key = cache::key(inputs.iter().map(Vec::as_slice));
    let directory = cache::entry("product", &key, |directory| {
        let progress = Progress::new("images", 2);
        let bin = bin(directory, &programs)?;
        let buildah = Buildah::new("buildah", base)?;
        for (target, name) in [("coordinator", COORDINATOR), ("agent", AGENT)] {
            progress.step(target);
            buildah.build(source, &bin, target, name)?;
            buildah.archive(name, &directory.join(format!("{target}.tar")))?;
            buildah.forget(name)?;
        }
        progress.done("coordinator and agent are built");
        Ok(())
    })?;
    Ok(Product { coordinator: directory.join("coordinator.tar"), agent: directory.join("agent.tar") })
}

/// The seam of the Dockerfile: a directory in place of its stage `bin`.
fn bin(directory: &Path, programs: &Path) -> Result<PathBuf> {
    let bin = directory.join("bin");
    fs::create_dir_all(&bin)?;
    for name in ["coordinator", "agent"] {
        fs::copy(programs.join(name), bin.join(name))?;
    }
    Ok(bin)
}

/// How large an image is, in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Size {
    /// Which.
    pub name: String,
    /// As a registry holds it: each layer compressed by gzip.
    pub compressed: u64,
    /// Unpacked.
    pub uncompressed: u64,
}

/// Builds the product's images as users do, of the release profile's programs on the base `slim`; how large they are.
pub fn sizes(slim: &Path) -> Result<Vec<Size>> {
    let source = programs::source()?;
    let programs = shipped()?;
    let scratch = tempfile::tempdir()?;
    let bin = bin(scratch.path(), &programs)?;
    let buildah = Buildah::new("buildah-slim", slim)?;
    [("coordinator", COORDINATOR), ("agent", AGENT)]
        .into_iter()
        .map(|(target, name)| {
            eprintln!("images: building {target}");
            buildah.build(source, &bin, target, name)?;
            let (archive, layout) =
                (scratch.path().join(format!("{target}.tar")), scratch.path().join(target));
            buildah.archive(name, &archive)?;
            buildah.push(name, &format!("oci:{}:size", layout.display()))?;
            buildah.forget(name)?;
            Ok(Size {
                name: target.to_owned(),
                compressed: archive::compressed(&layout)?,
                uncompressed: archive::unpacked(&archive)?,
            })
        })
        .collect()
}

/// Builds the product's programs as users get them; the directory they are in.
pub fn shipped() -> Result<PathBuf> {
    programs::build(programs::RELEASE, programs::PRODUCT)
}

/// Builds the coordinator as the test bed's nodes get it; the program's path.
pub fn coordinator() -> Result<PathBuf> {
    Ok(programs::build(programs::BED, programs::PRODUCT)?.join("coordinator"))
}

/// Builds the workload's image where it changed.
pub fn echo() -> Result<PathBuf> {
    let program = programs::build(programs::BED, &["echo"])?.join("echo");
    let key = cache::key([fs::read(&program)?.as_slice()]);
    let directory = cache::entry("echo", &key, |directory| {
        let files = Files::from([("/echo", Content::Program(program))]);
        let layer = archive::layer(&directory.join("layer.tar"), &files)?;
        let echo = Image { entrypoint: vec!["/echo"], ..Image::new(ECHO, vec![layer]) };
        archive::write(&directory.join("echo.tar"), &[echo])
    })?;
    Ok(directory.join("echo.tar"))
}

/// buildah with a storage of its own in the cache, where finished layers stay.
struct Buildah {
    storage: PathBuf,
}

impl Buildah {
    /// Of one kind there is one storage, that of the newest base.
    fn new(kind: &str, base: &Path) -> Result<Self> {
        let key = cache::key([base.display().to_string().as_bytes(), b"2"]);
        let storage = cache::entry(kind, &key, |directory| {
            // The name that this directory will have, since buildah remembers absolute paths.
            let last = directory.with_extension("");
            let configuration = format!(
                "[storage]\ndriver = \"overlay\"\ngraphroot = \"{0}/root\"\nrunroot = \"{0}/run\"\n",
                last.display()
            );
            fs::write(directory.join("storage.conf"), configuration)?;
            let debian = Image::new(super::DEBIAN, vec![Layer::of(base)?]);
            archive::write(&directory.join("base.tar"), &[debian])
        })?;
        Ok(Self { storage })
    }

    fn build(&self, source: &Path, bin: &Path, target: &str, name: &str) -> Result<()> {
        let base = self.storage.join("base.tar");
        if base.exists() {
            self.run(&["pull", "--quiet", &format!("docker-archive:{}", base.display())])?;
            fs::remove_file(base)?;
        }
        let context = format!("bin={}", bin.display());
        let source = source.display().to_string();
        let build = ["bud", "--quiet", "--isolation", "chroot", "--pull-never", "--layers"];
        let limits = limits()?;
        let limits = limits.each_ref().map(String::as_str);
        let what = ["--build-context", &context, "--target", target, "--tag", name, &source];
        self.run(&[&build[..], &limits[..], &what[..]].concat())
    }

    fn archive(&self, name: &str, archive: &Path) -> Result<()> {
        let _ = fs::remove_file(archive);
        self.push(name, &format!("docker-archive:{}:{name}", archive.display()))
    }

    fn push(&self, name: &str, to: &str) -> Result<()> {
        self.run(&["push", "--quiet", name, to])
    }

    /// The layers stay for the next build.
    fn forget(&self, name: &str) -> Result<()> {
        self.run(&["rmi", "--force", name])
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        // A mount namespace of its own: what buildah mounts never shows on the machine.
        let mut command = run::command("unshare", &["--mount", "--propagation", "private", "buildah"]);
        command.env("CONTAINERS_STORAGE_CONF", self.storage.join("storage.conf")).args(args);
        run::output(&mut command).map(drop)
    }
}

/// Limits that this process may set: by themselves newer buildahs would set a million, and older ones have set less before,
/// and either is refused to a root that may not raise its own, as in many containers.
fn limits() -> Result<[String; 4]> {
    let of = |name: &str, resource, enough: u64| -> Result<String> {
        let (_, hard) = getrlimit(resource)?;
        Ok(format!("{name}={limit}:{limit}", limit = hard.min(enough)))
    };
    let files = of("nofile", Resource::RLIMIT_NOFILE, 4096)?;
    let processes = of("nproc", Resource::RLIMIT_NPROC, 32768)?;
    Ok(["--ulimit".to_owned(), files, "--ulimit".to_owned(), processes])
}
