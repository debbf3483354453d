//! Taking a test bed away, whatever state it was left in.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use nix::{sys::signal::Signal, unistd::Pid};

use super::{cgroup::Cgroup, layout, layout::Plan, net};
use crate::{cache, requirements, run, shape};

/// Removes the test bed `name`: its processes, namespaces, mounts, control groups and files. Nothing there is fine.
pub fn down(name: &str) -> Result<()> {
    shape::check_name("test bed name", name)?;
    requirements::root()?;
    let top = layout::top();
    // The index plays no part in what is removed, so a bed whose record was never written can be removed too.
    let plan = Plan { bed: name.to_owned(), index: 0 };
    Cgroup::of(name, None).kill()?;
    kill_in_namespaces(&plan)?;
    net::remove(&plan)?;
    let directory = plan.directory();
    if directory.exists() {
        run::wait_for(&format!("{} can be removed", directory.display()), Duration::from_secs(20), || {
            fs::remove_dir_all(&directory)?;
            Ok(true)
        })?;
    }
    if top.exists() {
        let lock = cache::lock(&top.join("lock"))?;
        if super::names()?.is_empty() {
            let _ = fs::remove_dir_all(&top);
        }
        drop(lock);
    }
    Ok(())
}

/// Kills what somebody else started in the test bed's namespaces, such as a forgotten `ip netns exec`.
fn kill_in_namespaces(plan: &Plan) -> Result<()> {
    let namespaces: Vec<_> =
        net::parts(plan)?.iter().filter_map(|part| inode(&plan.netns_path(part))).collect();
    let own = Pid::this();
    run::wait_for("the processes in the test bed's namespaces end", Duration::from_secs(20), || {
        let mut left = false;
        for entry in fs::read_dir("/proc").context("no /proc")?.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let inside = inode(&entry.path().join("ns/net")).is_some_and(|inode| namespaces.contains(&inode));
            if inside && pid != own.as_raw() {
                left = true;
                let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        Ok(!left)
    })
}

fn inode(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}
