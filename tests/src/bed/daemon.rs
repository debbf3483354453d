//! Programs that go on running after the one that started them has ended.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{sys::signal::Signal, unistd::Pid};

use super::cgroup::Cgroup;
use crate::run;

/// Where a daemon runs.
#[derive(Debug)]
pub enum Place {
    /// In this network namespace (by name), otherwise on the machine.
    Netns(String),
    /// In all namespaces of the node whose holder is this process.
    Node(Pid),
    /// On the machine itself.
    Machine,
}

/// What a shell that keeps a program running calls itself.
const KEEPER: &str = "keeper";

/// What `pid` keeps running, if it is a keeper.
fn kept_by(pid: Pid) -> Vec<Pid> {
    let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if !arguments.split('\0').any(|argument| argument == KEEPER) {
        return Vec::new();
    }
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| child.parse().ok().map(Pid::from_raw)).collect()
}

/// A long-running program of the test bed.
#[derive(Debug)]
pub struct Daemon {
    /// Its name: of its log and its pid file.
    pub name: String,
    /// Where those two are.
    pub directory: PathBuf,
    /// Where it runs.
    pub place: Place,
    /// The group that it and all its children belong to.
    pub cgroup: Cgroup,
}

impl Daemon {
    /// Starts `program args...`, detached. Its output goes to `<directory>/<name>.log`.
    pub fn start(&self, program: &Path, args: &[String]) -> Result<()> {
        self.begin(&[], program, args)
    }

    /// The same, and starts it again a second after it has ended by itself, as a machine's init does with what must always run.
    pub fn start_kept(&self, program: &Path, args: &[String]) -> Result<()> {
        let keep = "while :; do \"$@\"; echo \"ended with $?; started again\"; sleep 1; done";
        self.begin(&["sh", "-c", keep, KEEPER], program, args)
    }

    fn begin(&self, keeper: &[&str], program: &Path, args: &[String]) -> Result<()> {
        fs::create_dir_all(&self.directory)?;
        let log = self.log();
        let file = fs::File::options().create(true).append(true).open(&log)?;
        // A shell joins the group, enters the namespaces and becomes the program, so that the pid that it leaves is
        // the program's. In this order: inside, a node's group is the root of what can be seen.
        let enter = match &self.place {
            Place::Netns(name) => format!("nsenter --net=/run/netns/{name}"),
            Place::Node(holder) => ["mount=mnt", "uts=uts", "net=net", "cgroup=cgroup"]
                .iter()
                .filter_map(|pair| pair.split_once('='))
                .fold("nsenter".to_owned(), |text, (flag, kind)| {
                    format!("{text} --{flag}=/proc/{holder}/ns/{kind}")
                }),
            Place::Machine => String::new(),
        };
        let script = format!(
            "{} && echo $$ > {} && exec {enter} \"$@\"",
            self.cgroup.enter()?,
            self.pid_file().display()
        );
        let mut command = run::command("setsid", &["--fork", "sh", "-c", &script, "sh"]);
        command.args(keeper).arg(program).args(args);
        let _ = fs::remove_file(self.pid_file());
        command.current_dir("/").stdin(std::process::Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let status = command.status().with_context(|| format!("can't start {}", self.name))?;
        anyhow::ensure!(status.success(), "can't start {}: {status}; see {}", self.name, log.display());
        run::wait_for(&format!("{} starts", self.name), Duration::from_secs(10), || Ok(self.pid().is_some()))
    }

    /// The running process.
    #[must_use]
    pub fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.pid_file()).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?);
        // A number may have been given to another process since: only one in our group counts.
        self.cgroup.processes().ok()?.contains(&pid).then_some(pid)
    }

    /// Ends it, at first asking.
    pub fn stop(&self) -> Result<()> {
        let Some(pid) = self.pid() else { return Ok(()) };
        // The keeper first: it would start its program again.
        let pids: Vec<Pid> = std::iter::once(pid).chain(kept_by(pid)).collect();
        let running = || self.cgroup.processes().map(|now| pids.iter().any(|pid| now.contains(pid)));
        let end = |signal| {
            for pid in &pids {
                let _ = nix::sys::signal::kill(*pid, signal);
            }
        };
        end(Signal::SIGTERM);
        let limit = Duration::from_secs(10);
        let asked = run::wait_for(&format!("{} ends", self.name), limit, || Ok(!running()?));
        if asked.is_err() {
            end(Signal::SIGKILL);
            run::wait_for(&format!("{} is killed", self.name), limit, || Ok(!running()?))?;
        }
        Ok(())
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.name))
    }

    fn pid_file(&self) -> PathBuf {
        self.directory.join(format!("{}.pid", self.name))
    }
}
