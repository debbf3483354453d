//! Every process of a test bed lives below one control group, in each hierarchy of the machine. That finds them
//! all again, containers included, whoever started them and whatever became of him.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::run;

/// The group that holds all test beds.
const TOP: &str = "flannel-migration-testbed";

/// The control group of a test bed or of a part of it, by its path below the one that holds all of them.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group of test bed `bed`, or of its part `part`.
    #[must_use]
    pub fn of(bed: &str, part: Option<&str>) -> Self {
        let path = Path::new(TOP).join(bed);
        Self { path: part.map_or(path.clone(), |part| path.join(part)) }
    }

    /// Makes the group in every hierarchy.
    pub fn create(&self) -> Result<()> {
        for hierarchy in hierarchies()? {
            let mut path = hierarchy.clone();
            for component in &self.path {
                path.push(component);
                fs::create_dir_all(&path)
                    .with_context(|| format!("can't create the control group {}", path.display()))?;
                inherit_cpuset(&path)?;
            }
        }
        Ok(())
    }

    /// Shell text that moves the shell itself into the group.
    pub fn enter(&self) -> Result<String> {
        use std::fmt::Write as _;
        let mut text = String::new();
        for hierarchy in hierarchies()? {
            let _ = write!(text, "echo $$ > {}/cgroup.procs && ", hierarchy.join(&self.path).display());
        }
        text.push_str("true");
        Ok(text)
    }

    /// The processes in the group and below it.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let mut pids = Vec::new();
        for hierarchy in hierarchies()? {
            for directory in below(&hierarchy.join(&self.path)) {
                let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Kills every process in the group until none is left, then removes the group.
    pub fn kill(&self) -> Result<()> {
        run::wait_for(
            &format!("the processes in {} end", self.path.display()),
            Duration::from_secs(30),
            || {
                let pids = self.processes()?;
                for pid in &pids {
                    // Gone already is as good as killed.
                    let _ = nix::sys::signal::kill(*pid, Signal::SIGKILL);
                }
                Ok(pids.is_empty())
            },
        )?;
        for hierarchy in hierarchies()? {
            let mut directories = below(&hierarchy.join(&self.path));
            directories.reverse();
            for directory in directories {
                run::wait_for(
                    &format!("{} can be removed", directory.display()),
                    Duration::from_secs(5),
                    || match fs::remove_dir(&directory) {
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
                        _ => Ok(true),
                    },
                )?;
            }
            // The last test bed takes the common parent along; any other leaves it.
            let _ = fs::remove_dir(hierarchy.join(TOP));
        }
        Ok(())
    }
}

/// `directory` and everything below it, parents before children; empty when it isn't there.
fn below(directory: &Path) -> Vec<PathBuf> {
    if !directory.is_dir() {
        return Vec::new();
    }
    let mut found = vec![directory.to_owned()];
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&entry.path()));
        }
    }
    found
}

/// Mount points of the control group hierarchies, version 1 and 2.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("can't read the mounts")?;
    let mut found: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let kind = right.split(' ').next()?;
            let point = left.split(' ').nth(4)?;
            (kind.starts_with("cgroup") && point.starts_with("/sys/fs/cgroup")).then(|| PathBuf::from(point))
        })
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// A new version 1 cpuset group has no processors, and takes no process until it has.
fn inherit_cpuset(group: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = group.join(file);
        if fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty())
            && let Some(parent) = group.parent()
            && let Ok(value) = fs::read_to_string(parent.join(file))
        {
            fs::write(&own, value.trim()).with_context(|| format!("can't write {}", own.display()))?;
        }
    }
    Ok(())
}
