//! Where a stack's version comes from: pinned in this project and served by the Go module proxy, or sources that the user
//! has, as an archive or as a tree.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cache, run,
    stacks::{STACKS, Stack},
};

/// The variable that names folders with sources, separated by colons.
pub const VARIABLE: &str = "PARTS_SOURCES";

/// Endings of archives that `tar` unpacks by itself.
const ENDINGS: &[&str] = &[".tar.xz", ".tar.gz", ".tgz", ".tar.zst", ".tar"];

/// A version of a stack that can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The stack's name.
    pub stack: &'static str,
    /// Its version, with a leading `v` where it is a number.
    pub version: String,
    /// From where.
    pub origin: Origin,
}

/// From where a version comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A directory of this project with go.mod and go.sum.
    Pinned(PathBuf),
    /// An archive of the module's source, in a directory of its own.
    Archive(PathBuf),
    /// The module's source as a tree, such as a checkout.
    Tree(PathBuf),
}

/// The versions of `stack` that can be had: those of this project first, then those of the user's sources.
pub fn versions(stack: &'static Stack, more: &[PathBuf]) -> Result<Vec<Source>> {
    let mut found = pinned(stack)?;
    found.extend(given(more)?.into_iter().filter(|source| source.stack == stack.name));
    Ok(found)
}

/// Version `wanted` of `stack`, or one line that says what there is.
pub fn find(stack: &'static Stack, wanted: &str, more: &[PathBuf]) -> Result<Source> {
    let wanted = normal(wanted);
    let all = versions(stack, more)?;
    if let Some(source) = all.iter().find(|source| source.version == wanted) {
        return Ok(source.clone());
    }
    let there: Vec<String> = all.iter().map(ToString::to_string).collect();
    bail!(
        "no {} {wanted}: there is {}; other versions are built from sources in a folder that --source PATH or {VARIABLE} names",
        stack.title,
        there.join(", ")
    )
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.origin {
            Origin::Pinned(_) => write!(f, "{}", self.version),
            Origin::Archive(path) | Origin::Tree(path) => {
                write!(f, "{} (from {})", self.version, path.display())
            }
        }
    }
}

impl Source {
    /// Changes when what would be built changes.
    pub fn fingerprint(&self) -> Result<String> {
        match &self.origin {
            Origin::Pinned(directory) => {
                let files = ["go.mod", "go.sum"].map(|file| fs::read(directory.join(file)));
                let [module, sums] = files;
                Ok(cache::key([module?.as_slice(), sums?.as_slice()]))
            }
            Origin::Archive(path) => {
                let size = fs::metadata(path)?.len();
                Ok(cache::key([path.file_name().unwrap_or_default().as_encoded_bytes(), &size.to_le_bytes()]))
            }
            Origin::Tree(path) => tree_fingerprint(path),
        }
    }
}

fn pinned(stack: &Stack) -> Result<Vec<Source>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("go").join(stack.name);
    let entries = fs::read_dir(&directory).with_context(|| {
        format!("no pinned versions in {}: the checkout has moved or is not whole", directory.display())
    })?;
    let mut versions: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    versions.sort_by_key(|path| numbers(&name(path)));
    Ok(versions
        .into_iter()
        .map(|path| Source { stack: stack.name, version: name(&path), origin: Origin::Pinned(path) })
        .collect())
}

/// The folders that the variable names, as they are called from anywhere.
#[must_use]
pub fn named() -> Vec<PathBuf> {
    let variable = env::var_os(VARIABLE).unwrap_or_default();
    let folders = env::split_paths(&variable).filter(|path| !path.as_os_str().is_empty());
    folders.map(|path| fs::canonicalize(&path).unwrap_or(path)).collect()
}

/// What lies in the folders that `more` and the variable name, or is named by them itself.
fn given(more: &[PathBuf]) -> Result<Vec<Source>> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for path in named().iter().chain(more) {
        ensure!(path.exists(), "--source or {VARIABLE} names {}, which isn't there", path.display());
        let path = fs::canonicalize(path)?;
        if !seen.insert(path.clone()) {
            continue;
        }
        if let Some(source) = one(&path) {
            found.push(source);
        } else if path.is_dir() {
            let mut inside: Vec<PathBuf> = fs::read_dir(&path)?.flatten().map(|entry| entry.path()).collect();
            inside.sort();
            found.extend(inside.iter().filter_map(|path| one(path)));
        } else {
            bail!(
                "--source or {VARIABLE} names {}, which is neither a folder nor an archive called like {}-v1.2.3.tar.xz",
                path.display(),
                STACKS.iter().map(|stack| stack.archive).collect::<Vec<_>>().join("-v1.2.3.tar.xz, ")
            );
        }
    }
    Ok(found)
}

/// The source that an archive or tree is, if it is one of a stack.
fn one(path: &Path) -> Option<Source> {
    if path.is_dir() { tree(path) } else { archive(path) }
}

fn archive(path: &Path) -> Option<Source> {
    let name = name(path);
    let stem = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending))?;
    let (stack, version) = STACKS.iter().find_map(|stack| Some((stack, versioned(stem, stack)?)))?;
    Some(Source { stack: stack.name, version, origin: Origin::Archive(path.to_owned()) })
}

fn tree(path: &Path) -> Option<Source> {
    let go_mod = fs::read_to_string(path.join("go.mod")).ok()?;
    let module = go_mod.lines().find_map(|line| line.strip_prefix("module "))?.trim();
    let stack = STACKS.iter().find(|stack| stack.module == module)?;
    // What it says of itself comes before how its folder is called.
    let version = manifest_version(path, stack)
        .or_else(|| versioned(&name(path), stack))
        .or_else(|| described(path))?;
    Some(Source { stack: stack.name, version, origin: Origin::Tree(path.to_owned()) })
}

/// The tag of the images that a tree's own manifest names.
fn manifest_version(path: &Path, stack: &Stack) -> Option<String> {
    let text = fs::read_to_string(path.join(stack.manifests.first()?)).ok()?;
    let image = match stack.name {
        "calico" => "calico/node:",
        _ => "/flannel:",
    };
    let line = text.lines().find(|line| line.trim_start().starts_with("image:") && line.contains(image))?;
    Some(line.rsplit(':').next()?.trim().to_owned())
}

fn described(path: &Path) -> Option<String> {
    let path = path.display().to_string();
    let described = run::output(&mut run::command("git", &["-C", &path, "describe", "--tags", "--always"]));
    described.ok().map(|text| text.trim().to_owned())
}

fn tree_fingerprint(path: &Path) -> Result<String> {
    let git = |args: &[&str]| {
        let place = path.display().to_string();
        run::output(&mut run::command("git", &[&["-C", &place], args].concat()))
    };
    if path.join(".git").exists() {
        let (head, changed) = (git(&["rev-parse", "HEAD"])?, git(&["diff", "HEAD"])?);
        return Ok(cache::key([head.as_bytes(), changed.as_bytes()]));
    }
    let place = path.display().to_string();
    let newest =
        run::output(&mut run::command("find", &[&place, "-name", "*.go", "-printf", "%P %s %T@\n"]))?;
    Ok(cache::key([newest.as_bytes()]))
}

/// The version behind the stack's name in `stem`, with a leading `v`.
fn versioned(stem: &str, stack: &Stack) -> Option<String> {
    let version = stem.strip_prefix(stack.archive)?.strip_prefix('-')?;
    let numeric = version.trim_start_matches('v').starts_with(|c: char| c.is_ascii_digit());
    numeric.then(|| normal(version))
}

/// `1.2.3` as `v1.2.3`; names that are no numbers stay.
fn normal(version: &str) -> String {
    if version.starts_with(|c: char| c.is_ascii_digit()) { format!("v{version}") } else { version.to_owned() }
}

fn numbers(version: &str) -> Vec<u32> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|text| text.parse().ok()).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stacks::{CALICO, FLANNEL, KUBERNETES};

    #[test]
    fn what_is_pinned_is_whole_and_holds_the_default() {
        for stack in STACKS {
            let versions = pinned(stack).unwrap();
            assert!(versions.iter().any(|source| source.version == stack.default), "{}", stack.name);
            for Source { version, origin, .. } in versions {
                let Origin::Pinned(directory) = origin else { panic!("{version} is not pinned") };
                let module = fs::read_to_string(directory.join("go.mod")).unwrap();
                let sums = fs::read_to_string(directory.join("go.sum")).unwrap();
                assert!(sums.lines().count() > 50, "{} {version}", stack.name);
                assert!(module.contains("tool"), "{} {version}", stack.name);
                if stack.name != "calico" && stack.name != "flannel-cni" {
                    assert!(
                        module.contains(&format!("{} {version}", stack.module)),
                        "{} {version}",
                        stack.name
                    );
                }
            }
        }
    }

    #[test]
    fn versions_are_in_order_and_the_v_may_be_left_out() {
        let versions: Vec<_> =
            pinned(&KUBERNETES).unwrap().into_iter().map(|source| source.version).collect();
        assert!(versions.is_sorted_by_key(|version| numbers(version)), "{versions:?}");
        assert_eq!(find(&CALICO, "3.28.5", &[]).unwrap().version, "v3.28.5");
    }

    #[test]
    fn archives_are_known_by_their_names() {
        let version = |name: &str| archive(Path::new(name)).map(|source| (source.stack, source.version));
        assert_eq!(version("/x/calico-v3.32.1.tar.xz"), Some(("calico", "v3.32.1".into())));
        assert_eq!(version("/x/calico-3.30.0.tar.gz"), Some(("calico", "v3.30.0".into())));
        assert_eq!(version("/x/flannel-v0.26.7.tgz"), Some(("flannel", "v0.26.7".into())));
        let plugin = Some(("flannel-cni", "v1.9.1-flannel1".into()));
        assert_eq!(version("/x/flannel-cni-plugin-v1.9.1-flannel1.tar.xz"), plugin);
        for other in ["/x/calico-manifests.tar.xz", "/x/README.md", "/x/other-v1.0.0.tar.xz"] {
            assert_eq!(version(other), None, "{other}");
        }
    }

    #[test]
    fn a_tree_says_itself_which_version_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("checkout");
        let manifests = tree.join("manifests/flannel-migration");
        fs::create_dir_all(&manifests).unwrap();
        fs::write(tree.join("go.mod"), "module github.com/projectcalico/calico\n\ngo 1.26\n").unwrap();
        fs::write(manifests.join("calico.yaml"), "  image: quay.io/calico/node:v3.31.7\n").unwrap();
        for named in [folder.path(), tree.as_path()] {
            let found = find(&CALICO, "v3.31.7", &[named.to_owned()]).unwrap();
            assert_eq!(found.origin, Origin::Tree(fs::canonicalize(&tree).unwrap()), "{}", named.display());
        }
        let before = tree_fingerprint(&tree).unwrap();
        fs::write(tree.join("main.go"), "package main").unwrap();
        assert_ne!(tree_fingerprint(&tree).unwrap(), before);
    }

    #[test]
    fn what_cannot_be_had_is_one_line_that_says_what_there_is() {
        let error = find(&CALICO, "v9.9.9", &[]).unwrap_err().to_string();
        assert!(error.contains("Calico v9.9.9") && error.contains("v3.28.5"), "{error}");
        assert_eq!(error.lines().count(), 1);
        let error = find(&FLANNEL, "v1", &["/nowhere".into()]).unwrap_err().to_string();
        assert!(error.contains("--source") && error.contains("/nowhere"), "{error}");
    }
}
