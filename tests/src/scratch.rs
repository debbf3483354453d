//! Test beds that end with the test that made them, and a picture of the machine to compare before and after.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use crate::{
    bed::{Bed, teardown},
    run::{self, command},
    shape::Shape,
};

/// A test bed that is taken down when the value goes, also when its test fails.
#[derive(Debug)]
pub struct Scratch {
    /// The test bed.
    pub bed: Bed,
}

impl Scratch {
    /// Brings a test bed up under `name`; one that an earlier run left there goes first. `testbed` is the program.
    pub fn up(name: &str, shape: Shape, testbed: &str) -> Result<Self> {
        Self::made(name, || Bed::up(name, shape, &PathBuf::from(testbed)))
    }

    /// The same with a control plane and no nodes.
    pub fn up_without_nodes(name: &str, shape: Shape, testbed: &str) -> Result<Self> {
        Self::made(name, || Bed::up_without_nodes(name, shape, &PathBuf::from(testbed)))
    }

    fn made(name: &str, make: impl FnOnce() -> Result<Bed>) -> Result<Self> {
        teardown::down(name)?;
        match make() {
            Ok(bed) => Ok(Self { bed }),
            Err(error) => {
                print_logs(name);
                if let Err(second) = teardown::down(name) {
                    eprintln!("{name}: not taken down: {second:#}");
                }
                Err(error)
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let name = &self.bed.plan.bed;
        if std::thread::panicking() {
            if let Ok(text) = self.bed.kubectl(&["get", "nodes,pods", "--all-namespaces", "-o", "wide"]) {
                eprintln!("{name}, as the test left it:\n{text}");
            }
            print_logs(name);
        }
        if let Err(error) = teardown::down(name) {
            eprintln!("{name}: not taken down: {error:#}");
        }
    }
}

/// The last lines of every log of the test bed, for whoever reads why a test failed.
fn print_logs(name: &str) {
    let plan = crate::bed::layout::Plan { bed: name.to_owned(), index: 0 };
    let find = ["-name", "*.log", "-not", "-name", "audit.log", "-not", "-path", "*/layers/*", "-print"];
    let mut find_command = command("find", &[]);
    let Ok(found) = run::output(find_command.arg(plan.directory()).args(find)) else { return };
    for path in found.lines() {
        let Ok(text) = fs::read_to_string(path) else { continue };
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.get(lines.len().saturating_sub(8)..).unwrap_or_default();
        eprintln!("--- {path}\n{}", last.join("\n"));
        // A program that was started again has said long ago why it ended.
        for (at, _) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("panic: ")) {
            eprintln!("... {}", lines.iter().skip(at).take(24).copied().collect::<Vec<_>>().join("\n"));
        }
    }
}

/// What a test bed could leave behind on the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Lines like `mount /var/lib/x` or `link eth0`.
    pub things: BTreeSet<String>,
}

impl Machine {
    /// The machine as it is now.
    pub fn look() -> Result<Self> {
        let mut things = BTreeSet::new();
        let mut add = |kind: &str, names: &mut dyn Iterator<Item = String>| {
            things.extend(names.map(|name| format!("{kind} {name}")));
        };
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        add("mount", &mut mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned));
        let links = run::output(&mut command("ip", &["-o", "link"]))?;
        add("link", &mut links.lines().filter_map(|line| line.split(": ").nth(1)).map(str::to_owned));
        let rules = run::output(&mut command("iptables-save", &[]))?;
        add("rule", &mut rules.lines().filter(|line| line.starts_with("-A")).map(str::to_owned));
        let groups =
            run::output(&mut command("find", &["/sys/fs/cgroup", "-type", "d", "-path", "*testbed*"]))?;
        add("control group", &mut groups.lines().map(str::to_owned));
        add("process", &mut processes()?.into_iter());
        let mut find = command("find", &["/etc", "/opt", "/run", "/srv", "/usr", "/var", "/mnt", "-xdev"]);
        // What packages and other programs of the machine change while a test runs.
        for path in [
            "/var/cache",
            "/var/lib/apt",
            "/var/lib/dpkg",
            "/var/log",
            "/usr/local",
            "/run/user",
            "/var/tmp/buildah*",
        ] {
            find.args(["-path", path, "-prune", "-o"]);
        }
        let files = run::output(find.arg("-print"))?;
        add("file", &mut files.lines().map(str::to_owned));
        Ok(Self { things })
    }

    /// What is there now and wasn't in `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.things.difference(&before.things).cloned().collect()
    }
}

/// The programs of test beds that run, by their command lines.
fn processes() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let program = Path::new(line.split(' ').next().unwrap_or_default());
        let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let ours =
            ["etcd", "kubelet", "kube-proxy", "containerd", "flanneld", "calico-node", "echo", "busybox"];
        if ours.contains(&name.as_str()) || name.starts_with("kube-") || name.starts_with("containerd-shim") {
            found.push(line);
        }
    }
    Ok(found)
}
