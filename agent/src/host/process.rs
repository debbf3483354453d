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
    /// Last part of `argv[0]` and of the executable's path; of Calico's combined program, what it runs as.
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
    let executable = fs::read_link(directory.join("exe")).ok();
    let names = names(&command, executable.as_deref());
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    let mut after_name = stat.rsplit_once(')')?.1.split_whitespace();
    // A zombie runs no more; its parent may be slow to notice.
    if after_name.next()? == "Z" {
        return None;
    }
    let parent = after_name.next()?.parse().ok()?;
    Some(Process { pid, parent, names, netns: netns::number(&directory.join("ns/net")) })
}

/// What a process goes by. From Calico 3.33 on all of Calico is one program, `calico`: without arguments it is the CNI plugin of that name,
/// and `calico component felix` is what was `calico-node` before.
fn names(command: &[u8], executable: Option<&Path>) -> Vec<String> {
    let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let executable = executable.map(Path::to_string_lossy);
    let mut names: Vec<String> = words.first().and_then(|first| last_part(first)).into_iter().collect();
    names.extend(executable.and_then(|path| last_part(path.trim_end_matches(" (deleted)"))));
    if names.iter().any(|name| name == "calico")
        && let [_, command, rest @ ..] = words.as_slice()
    {
        let component = match (command.as_ref(), rest.first().map(AsRef::as_ref)) {
            ("component", Some("felix" | "node" | "confd")) => "calico-node".to_owned(),
            ("component", Some(component)) => format!("calico-{component}"),
            ("ctl" | "health" | "version" | "help", _) => format!("calico-{command}"),
            _ => return names,
        };
        return vec![component];
    }
    names
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
    fn calicos_one_program_goes_by_what_it_runs_as() {
        let names = |command: &str, executable: &str| {
            let command = command.replace(' ', "\0") + "\0";
            names(command.as_bytes(), Some(Path::new(executable)))
        };
        assert_eq!(names("calico-node -felix", "/usr/bin/calico-node"), ["calico-node", "calico-node"]);
        assert_eq!(names("calico component felix", "/usr/bin/calico"), ["calico-node"]);
        assert_eq!(names("/usr/bin/calico component node node-services", "/usr/bin/calico"), ["calico-node"]);
        // It may run on any node for as long as the cluster lives, and is no plugin at work.
        let controllers = names("/usr/bin/calico component kube-controllers", "/usr/bin/calico");
        assert_eq!(controllers, ["calico-kube-controllers"]);
        assert_eq!(names("/opt/cni/bin/calico", "/opt/cni/bin/calico (deleted)"), ["calico", "calico"]);
        assert_eq!(names("/opt/cni/bin/calico-ipam", "/opt/cni/bin/calico"), ["calico-ipam", "calico"]);
        assert_eq!(names("flanneld --ip-masq", "/opt/bin/flanneld"), ["flanneld", "flanneld"]);
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
