//! Stock manifests without the programs: for what only reads them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{
    build, requirements, run,
    sources::{self, Origin, VARIABLE},
    stacks::Stack,
};

/// Where Go keeps a module that `source`'s go.mod names; it is fetched if it has to be.
pub fn module(source: &Path, module: &str) -> Result<PathBuf> {
    let go = |args: &[&str]| {
        let mut go = Command::new(requirements::go()?);
        run::output(go.current_dir(source).args(args))
    };
    go(&["mod", "download", module])?;
    Ok(PathBuf::from(go(&["list", "-mod=readonly", "-m", "-f", "{{.Dir}}", module])?.trim()))
}

/// The text of the stock manifest `name` of a stack's default version.
pub fn stock(stack: &'static Stack, name: &str) -> Result<String> {
    let source = sources::find(stack, stack.default, &[])?;
    let built = build::path(stack, &source)?.join("manifests").join(name);
    let path = match &source.origin {
        Origin::Pinned(directory) if !built.exists() => {
            let file = stack.manifests.iter().find(|file| Path::new(file).ends_with(name));
            module(directory, stack.module)?.join(file.with_context(|| format!("no manifest {name}"))?)
        }
        _ => built,
    };
    fs::read_to_string(&path).with_context(|| format!("can't read the stock manifest {}", path.display()))
}

/// Unpacks the YAML files of the archives of Calico that the variable's folder holds, each archive into a directory of its own
/// below `directory`; `None` without the variable.
pub fn unpack_calicos(directory: &Path) -> Result<Option<Vec<PathBuf>>> {
    let Some(folder) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) else { return Ok(None) };
    let folder = PathBuf::from(folder);
    let mut archives = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("{VARIABLE}={}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("calico") && name.ends_with(".tar.xz") {
            let target = directory.join(name.trim_end_matches(".tar.xz"));
            fs::create_dir_all(&target)?;
            let mut tar = Command::new("tar");
            tar.arg("-xJf").arg(&path).arg("-C").arg(&target).args(["--wildcards", "*.yaml"]);
            run::output(&mut tar)?;
            archives.push(target);
        }
    }
    ensure!(!archives.is_empty(), "{VARIABLE}={}: no calico*.tar.xz is there", folder.display());
    archives.sort();
    Ok(Some(archives))
}
