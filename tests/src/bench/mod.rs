//! The benchmark: what a migration costs beside Calico's own controller, what the coordinator costs in big clusters, what a switch
//! costs by the number of pods, and how large the images are. Each run leaves its figures as JSON under `target/bench`; [`report`] makes one text of them all.

pub mod agents;
pub mod audit;
pub mod history;
pub mod images;
pub mod objects;
pub mod process;
pub mod relay;
pub mod report;
pub mod rest;
pub mod scale;
pub mod sides;
pub mod stats;
pub mod svg;
pub mod switch;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Serialize, de::DeserializeOwned};

/// The checkout.
pub fn checkout() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests have no workspace")
}

/// Where the figures of runs are kept.
pub fn results() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| checkout().map(|c| c.join("target")), |t| Ok(t.into()));
    let directory = target?.join("bench");
    fs::create_dir_all(&directory).with_context(|| format!("can't make {}", directory.display()))?;
    Ok(directory)
}

/// Keeps the figures of one run.
pub fn keep(name: &str, figures: &impl Serialize) -> Result<()> {
    let path = results()?.join(format!("{name}.json"));
    fs::write(&path, serde_json::to_vec_pretty(figures)?)
        .with_context(|| format!("can't write {}", path.display()))
}

/// The figures of all runs whose name begins so, by name.
pub fn kept<T: DeserializeOwned>(prefix: &str) -> Result<Vec<T>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(results()?)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    let named = |path: &&PathBuf| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(prefix) && path.extension().is_some_and(|extension| extension == "json")
    };
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is of another version: remove it", path.display()))
    };
    paths.iter().filter(named).map(read).collect()
}
