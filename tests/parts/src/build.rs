//! Builds the stacks into the cache, program by program, so that an interrupted build goes on where it was.
//!
//! A pinned version is a Go module that only names what it builds (`tool` lines) with go.mod and go.sum. The stock manifests
//! are taken from the modules in the same go, so that later runs need neither sources nor network.

use std::{
    collections::VecDeque,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cache, manifests, requirements, run,
    say::{Progress, minutes},
    sources::{Origin, Source},
    stacks::{Program, Stack},
    versions::Versions,
};

/// Everything that was built, one directory per stack.
#[derive(Debug, Clone)]
pub struct Parts {
    /// What they are.
    pub versions: Versions,
    stacks: Vec<(&'static str, PathBuf)>,
}

impl Parts {
    /// The program `name` of `stack`.
    pub fn program(&self, stack: &str, name: &str) -> Result<PathBuf> {
        let path = self.stack(stack)?.join("bin").join(name);
        ensure!(path.is_file(), "no program {name} in this version of {stack}");
        Ok(path)
    }

    /// The text of the stock manifest `name` of `stack`.
    pub fn manifest(&self, stack: &str, name: &str) -> Result<String> {
        let path = self.stack(stack)?.join("manifests").join(name);
        fs::read_to_string(&path).with_context(|| format!("can't read the stock manifest {}", path.display()))
    }

    /// What `stacks` are made of: changes when anything that was built for them changes.
    #[must_use]
    pub fn key(&self, stacks: &[&str]) -> String {
        let paths = self.stacks.iter().filter(|(stack, _)| stacks.contains(stack));
        let names: Vec<String> = paths.map(|(_, path)| path.display().to_string()).collect();
        cache::key(names.iter().map(String::as_bytes))
    }

    fn stack(&self, name: &str) -> Result<&Path> {
        self.stacks
            .iter()
            .find(|(stack, _)| *stack == name)
            .map(|(_, path)| path.as_path())
            .with_context(|| format!("no stack {name}"))
    }
}

/// Builds what isn't in the cache yet.
pub fn build(versions: &Versions) -> Result<Parts> {
    let resolved = versions.resolve()?;
    let missing = missing(&resolved)?;
    let progress = Progress::new("parts", missing);
    let parts = build_all(versions, resolved, &progress)?;
    if missing > 0 {
        progress.done("all built");
    }
    Ok(parts)
}

/// How many programs have to be built.
pub fn missing(resolved: &[(&'static Stack, Source)]) -> Result<usize> {
    let mut missing = 0;
    for (stack, source) in resolved {
        if !path(stack, source)?.is_dir() {
            missing += programs(stack, source).map_or(stack.programs.len(), |programs| programs.len());
        }
    }
    Ok(missing)
}

/// Builds what isn't in the cache yet, two stacks at a time: while one is linked, which takes one processor, another is
/// compiled. Within a stack one program after another, since they share most of their packages.
pub fn build_all(
    versions: &Versions,
    resolved: Vec<(&'static Stack, Source)>,
    progress: &Progress,
) -> Result<Parts> {
    let queue = Mutex::new(resolved.into_iter().collect::<VecDeque<_>>());
    let built = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        loop {
            let Some((stack, source)) = queue.lock().ok().and_then(|mut queue| queue.pop_front()) else {
                return Ok(());
            };
            let path = build_stack(stack, &source, progress)?;
            if let Ok(mut built) = built.lock() {
                built.push((stack.name, path));
            }
        }
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(work), scope.spawn(work)];
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a build's thread ended")))
    })?;
    let mut stacks = built.into_inner().unwrap_or_default();
    stacks.sort_unstable();
    Ok(Parts { versions: versions.clone(), stacks })
}

/// Whether this version is in the cache.
#[must_use]
pub fn is_built(stack: &Stack, source: &Source) -> bool {
    path(stack, source).is_ok_and(|path| path.is_dir())
}

fn build_stack(stack: &Stack, source: &Source, progress: &Progress) -> Result<PathBuf> {
    cache::entry(&kind(stack, source), &key(stack, source)?, |directory| {
        let began = Instant::now();
        Build { stack, source, directory }.run(progress)?;
        progress.note(&format!("{} {}: {}", stack.title, source.version, minutes(began.elapsed())));
        Ok(())
    })
}

/// Its directory in the cache, whether or not it is there yet.
pub fn path(stack: &Stack, source: &Source) -> Result<PathBuf> {
    Ok(cache::root().join(format!("{}-{}", kind(stack, source), key(stack, source)?)))
}

fn kind(stack: &Stack, source: &Source) -> String {
    format!("parts-{}-{}", stack.name, source.version)
}

fn key(stack: &Stack, source: &Source) -> Result<String> {
    let recipe: Vec<&str> =
        stack.programs.iter().flat_map(|program| [program.name, program.package]).collect();
    let inputs = [
        source.fingerprint()?,
        stack.linker_flags(&source.version),
        recipe.join("\n"),
        stack.manifests.join("\n"),
    ];
    Ok(cache::key(inputs.iter().map(String::as_bytes)))
}

/// The programs of a pinned version. What a source holds is known once it is unpacked.
fn programs(stack: &'static Stack, source: &Source) -> Option<Vec<&'static Program>> {
    let Origin::Pinned(directory) = &source.origin else { return None };
    Some(stack.programs.iter().filter(|program| has(stack, source, directory, program.package)).collect())
}

/// Whether this version has a package: its go.mod names it as a tool, or its source in `directory` has the folder.
fn has(stack: &Stack, source: &Source, directory: &Path, package: &str) -> bool {
    if let Origin::Pinned(_) = source.origin {
        let text = fs::read_to_string(directory.join("go.mod")).unwrap_or_default();
        return text.lines().any(|line| line.trim_start_matches("tool").trim() == package);
    }
    match package.strip_prefix(stack.module) {
        Some(inside) => directory.join(inside.trim_start_matches('/')).is_dir(),
        // etcd is of another module, which Kubernetes' go.mod names.
        None => stack.name == "kubernetes",
    }
}

/// One stack in the making.
struct Build<'a> {
    stack: &'a Stack,
    source: &'a Source,
    directory: &'a Path,
}

impl Build<'_> {
    fn run(&self, progress: &Progress) -> Result<()> {
        let source = self.prepare()?;
        let bin = self.directory.join("bin");
        fs::create_dir_all(&bin)?;
        let wanted = |program: &&Program| has(self.stack, self.source, &source, program.package);
        for program in self.stack.programs.iter().filter(wanted) {
            progress
                .step(&format!("building {} ({} {})", program.name, self.stack.title, self.source.version));
            let path = bin.join(program.name);
            if path.is_file() {
                continue;
            }
            let unfinished = bin.join(format!(".{}", program.name));
            run::output(self.go(&source)?.arg("-o").arg(&unfinished).arg(program.package))?;
            fs::rename(&unfinished, &path)?;
        }
        self.keep_manifests(&source)?;
        // Sources of archives and trees are large, and nothing needs them any more.
        fs::remove_dir_all(source).context("can't remove the source after the build")
    }

    /// The directory that `go build` runs in.
    fn prepare(&self) -> Result<PathBuf> {
        let source = self.directory.join("source");
        let text = source.display().to_string();
        if source.exists() {
            fs::remove_dir_all(&source)?;
        }
        fs::create_dir_all(&source)?;
        match &self.source.origin {
            Origin::Pinned(pinned) => {
                for file in ["go.mod", "go.sum"] {
                    fs::copy(pinned.join(file), source.join(file))?;
                }
            }
            Origin::Archive(archive) => {
                let archive = archive.display().to_string();
                let unpack = ["--extract", "--file", &archive, "--directory", &text, "--strip-components=1"];
                run::output(&mut run::command("tar", &unpack))?;
            }
            // A copy: a build may write to go.sum, and the user's tree isn't ours to change.
            Origin::Tree(tree) => {
                let from = format!("{}/.", tree.display());
                run::output(&mut run::command("cp", &["-a", "--reflink=auto", &from, &text]))?;
            }
        }
        Ok(source)
    }

    fn keep_manifests(&self, source: &Path) -> Result<()> {
        if self.stack.manifests.is_empty() {
            return Ok(());
        }
        let module = match self.source.origin {
            Origin::Pinned(_) => manifests::module(source, self.stack.module)?,
            Origin::Archive(_) | Origin::Tree(_) => source.to_owned(),
        };
        let manifests = self.directory.join("manifests");
        fs::create_dir_all(&manifests)?;
        for file in self.stack.manifests {
            let name = Path::new(file).file_name().context("a manifest without a name")?;
            fs::write(
                manifests.join(name),
                fs::read(module.join(file)).with_context(|| format!("no {file}"))?,
            )?;
        }
        Ok(())
    }

    fn go(&self, source: &Path) -> Result<Command> {
        let mut go = Command::new(requirements::go()?);
        go.current_dir(source).env("CGO_ENABLED", if self.stack.cgo { "1" } else { "0" });
        // What a source's own go.sum lacks is looked up in the checksum database; pinned versions lack nothing.
        let pinned = matches!(self.source.origin, Origin::Pinned(_));
        go.args(["build", if pinned { "-mod=readonly" } else { "-mod=mod" }, "-trimpath", "-ldflags"]);
        go.arg(self.stack.linker_flags(&self.source.version));
        if self.stack.cgo {
            go.args(["-tags", "netgo,osusergo"]);
        }
        Ok(go)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        sources::find,
        stacks::{FLANNEL_CNI, KUBERNETES, STACKS},
    };

    #[test]
    fn a_pinned_version_builds_every_program_that_its_stack_needs() {
        for stack in STACKS {
            for source in crate::sources::versions(stack, &[]).unwrap() {
                let Some(programs) = programs(stack, &source) else { continue };
                // Two homes of flannel's plugin, and Calico's single program of v3.33: one of each is enough.
                let wanted =
                    stack.programs.iter().map(|program| program.name).filter(|name| *name != "calico");
                for name in wanted {
                    assert!(programs.iter().any(|program| program.name == name), "{source} lacks {name}");
                }
            }
        }
    }

    #[test]
    fn kubernetes_says_the_version_that_is_pinned() {
        assert!(KUBERNETES.linker_flags("v1.37.2").contains("gitVersion=v1.37.2 "));
        assert!(KUBERNETES.linker_flags("v1.37.2").contains("gitMinor=37"));
    }

    #[test]
    fn versions_of_a_stack_lie_side_by_side_in_the_cache() {
        let of = |version| find(&KUBERNETES, version, &[]).unwrap();
        let (old, new) = (of("v1.36.3"), of("v1.37.2"));
        assert_ne!(kind(&KUBERNETES, &old), kind(&KUBERNETES, &new));
        assert_ne!(key(&KUBERNETES, &old).unwrap(), key(&KUBERNETES, &new).unwrap());
        assert_eq!(programs(&FLANNEL_CNI, &find(&FLANNEL_CNI, "v0.9.1", &[]).unwrap()).unwrap().len(), 1);
    }
}
