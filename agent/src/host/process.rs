//! Processes of this node, found in /proc. Several nodes may share one process table (in tests they do), so a process
//! counts only if it, or a process above it, lives in this node's network namespace.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::host::netns;

/// What is known of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// The process that started it.
    pub parent: u32,
    /// Last part of `argv[0]` and of the executable's path.
    pub names: Vec<String>,
    /// Number of its network namespace, if it could be read.
    pub netns: Option<u64>,
}

/// All processes that can be read, by id.
#[must_use]
pub fn all() -> BTreeMap<u32, Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, process(pid)?)))
        .collect()
}

fn process(pid: u32) -> Option<Process> {
    let directory = Path::new("/proc").join(pid.to_string());
    let command = fs::read(directory.join("cmdline")).ok()?;
    let mut names = Vec::new();
    if let Some(first) = command.split(|byte| *byte == 0).next() {
        names.extend(last_part(&String::from_utf8_lossy(first)));
    }
    if let Ok(executable) = fs::read_link(directory.join("exe")) {
        names.extend(last_part(executable.to_string_lossy().trim_end_matches(" (deleted)")));
    }
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    let mut after_name = stat.rsplit_once(')')?.1.split_whitespace();
    // A zombie runs no more; its parent may be slow to notice.
    if after_name.next()? == "Z" {
        return None;
    }
    let parent = after_name.next()?.parse().ok()?;
    Some(Process { pid, parent, names, netns: netns::number(&directory.join("ns/net")) })
}

fn last_part(path: &str) -> Option<String> {
    path.rsplit('/').next().filter(|name| !name.is_empty()).map(str::to_owned)
}

/// Processes with one of these names that belong to the node with this network namespace.
#[must_use]
pub fn named<'a>(processes: &'a BTreeMap<u32, Process>, names: &[&str], node: u64) -> Vec<&'a Process> {
    let mut found: Vec<&Process> = processes
        .values()
        .filter(|process| process.names.iter().any(|name| names.contains(&name.as_str())))
        .filter(|process| belongs(processes, process, node))
        .collect();
    found.sort_by_key(|process| process.pid);
    found
}

// A CNI plugin may be inside a pod's namespace for a moment; the runtime above it is in the node's.
fn belongs(processes: &BTreeMap<u32, Process>, process: &Process, node: u64) -> bool {
    let mut current = Some(process);
    // A loop can't be, but the table was read while processes came and went.
    for _ in 0..64 {
        match current {
            Some(process) if process.netns == Some(node) => return true,
            Some(process) => current = processes.get(&process.parent),
            None => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[(u32, u32, &str, Option<u64>)]) -> BTreeMap<u32, Process> {
        rows.iter()
            .map(|(pid, parent, name, netns)| {
                let names = vec![(*name).to_owned()];
                (*pid, Process { pid: *pid, parent: *parent, names, netns: *netns })
            })
            .collect()
    }

    #[test]
    fn a_process_of_another_node_does_not_count() {
        let processes =
            table(&[(10, 1, "flanneld", Some(7)), (11, 1, "flanneld", Some(8)), (1, 0, "init", Some(1))]);
        let pids: Vec<_> = named(&processes, &["flanneld"], 7).iter().map(|process| process.pid).collect();
        assert_eq!(pids, [10]);
    }

    #[test]
    fn a_plugin_inside_a_pod_belongs_to_the_node_of_its_runtime() {
        let processes = table(&[
            (20, 1, "containerd", Some(7)),
            (21, 20, "flannel", Some(7)),
            (22, 21, "bridge", Some(99)),
        ]);
        let pids: Vec<_> =
            named(&processes, &["bridge", "flannel"], 7).iter().map(|process| process.pid).collect();
        assert_eq!(pids, [21, 22]);
    }

    #[test]
    fn the_process_table_holds_this_very_process() {
        let own = std::process::id();
        let processes = all();
        assert_eq!(processes.get(&own).unwrap().netns, netns::own());
    }
}
