//! What the agent must not forget: the lease it works for, what the host was like before, and which changes were begun
//! and done. Durable before the host is changed.
//!
//! Most changes are to the kernel alone, and end with it. How far they got is noted beside the journal without waiting for the disk: what
//! was written outlives the agent, and need not outlive the kernel.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use flannel_migration_protocol::{Epoch, Evict, Grant, State};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::host::cni::Config;
use crate::host::files;
use crate::host::iptables::Rules;
use crate::host::links::Link;
use crate::host::nft::Table;
use crate::host::saved::Saved;
use crate::inventory::{Pod, Setting};
use crate::probe::Baseline;
use crate::steps::Op;

/// Version of the file's form.
const VERSION: u32 = 1;
const NAME: &str = "journal.json";
const NOTES: &str = "progress.json";

/// A journal that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("the journal can't be kept")]
    File(#[from] files::Error),
    /// The text isn't a journal of this version.
    #[error("the journal {0} can't be understood; it was written by another version, or damaged")]
    Text(String, #[source] serde_json::Error),
    /// Another version's.
    #[error("the journal {0} is of version {1}; this agent knows version {VERSION}")]
    Version(String, u32),
    /// Another node's, on a copied disk.
    #[error("the journal {0} is that of node {1}")]
    Node(String, String),
}

/// flannel's VXLAN device with all that hangs on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The link.
    pub link: Link,
    /// Its addresses.
    pub addresses: Vec<Saved>,
    /// Routes out of it.
    pub routes: Vec<Saved>,
    /// Its permanent neighbours.
    pub neighbours: Vec<Saved>,
    /// Its forwarding entries.
    pub forwarding: Vec<Saved>,
}

/// flannel's bridge with all that hangs on it but its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    /// The link.
    pub link: Link,
    /// Its addresses.
    pub addresses: Vec<Saved>,
    /// Kernel settings that are changed, as they were.
    pub settings: Vec<Setting>,
}

/// The host as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// Whether the pods have Calico's links already (Canal).
    #[serde(default)]
    pub canal: bool,
    /// flannel's CNI configs.
    pub configs: Vec<Config>,
    /// Calico's CNI config, as it will be.
    pub calico_config: String,
    /// Where that goes.
    pub calico_path: PathBuf,
    /// What was at that path before, if anything.
    pub calico_before: Option<Config>,
    /// Name of Calico's CNI network.
    pub calico_network: String,
    /// The VXLAN device.
    pub device: Device,
    /// That of IPv6; none where flannel carries IPv4 only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device6: Option<Device>,
    /// The bridge; absent on a node that never had a pod on flannel's network.
    pub bridge: Option<Bridge>,
    /// Pods that are taken over.
    pub pods: Vec<Pod>,
    /// flannel's rules by world of iptables.
    pub rules: BTreeMap<String, Vec<Rules>>,
    /// flannel's nftables tables.
    pub tables: Vec<Table>,
    /// Felix's nftables tables, that only Canal has before a migration, as family and name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
}

/// How far an operation got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// It may have changed anything of what it changes, or nothing.
    Begun,
    /// It has changed all of it.
    Done,
}

/// The journal's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Form of the file.
    pub version: u32,
    /// The node.
    pub node: String,
    /// The boot of the kernel that the changes were made to.
    #[serde(default)]
    pub boot: String,
    /// The last lease that was begun.
    pub epoch: Option<Epoch>,
    /// The highest fence seen.
    pub fence: u64,
    /// The node's state.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// Why, `CamelCase`.
    pub reason: String,
    /// Why, for people.
    pub message: String,
    /// The lease that is worked for.
    pub grant: Option<Grant>,
    /// When the host began to be changed.
    pub switched: Option<Timestamp>,
    /// The originals.
    pub captured: Option<Captured>,
    /// Operations, in order.
    pub progress: Vec<(Op, Progress)>,
    /// Pods that can't be taken over.
    pub evict: Vec<Evict>,
    /// What worked before.
    pub baseline: Baseline,
    /// Addresses that the node keeps for connections of its own.
    #[serde(default)]
    pub kept: Vec<IpAddr>,
    /// How often the journal was written; notes beside it belong to one of these times.
    #[serde(default)]
    pub writes: u64,
}

/// How far operations got since the journal was written.
#[derive(Debug, Serialize, Deserialize)]
struct Notes {
    writes: u64,
    progress: Vec<(Op, Progress)>,
}

impl Entry {
    /// Pods that are to be made anew: those that can't be taken over, or, after the way back, those that Calico made.
    #[must_use]
    pub fn to_evict(&self) -> &[Evict] {
        if matches!(self.state, State::Prepared | State::Flannel) { &self.evict } else { &[] }
    }

    /// Pods that are taken over now; `None` while none can be.
    #[must_use]
    pub fn adopted(&self) -> Option<&[Pod]> {
        let moved = matches!(self.state, State::Verifying | State::Calico | State::Reverting);
        self.captured.as_ref().filter(|_| moved).map(|captured| captured.pods.as_slice())
    }
}

/// The journal of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journal {
    directory: PathBuf,
    /// What it says.
    pub entry: Entry,
}

impl Journal {
    /// Whether there is a journal on disk.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.directory.join(NAME).exists()
    }

    /// Reads the journal; a new one, of a node at rest on flannel, when there is none.
    pub fn open(directory: &Path, node: &str) -> Result<Self, Error> {
        let path = directory.join(NAME);
        let name = path.display().to_string();
        let entry = match files::read(&path)? {
            None => Entry {
                version: VERSION,
                node: node.to_owned(),
                boot: String::new(),
                epoch: None,
                fence: 0,
                state: State::Flannel,
                since: Timestamp::now(),
                reason: "NotStarted".into(),
                message: String::new(),
                grant: None,
                switched: None,
                captured: None,
                progress: Vec::new(),
                evict: Vec::new(),
                baseline: Baseline::default(),
                kept: Vec::new(),
                writes: 0,
            },
            Some(text) => {
                // The version decides how to read the rest.
                let value: serde_json::Value =
                    serde_json::from_str(&text).map_err(|error| Error::Text(name.clone(), error))?;
                let version = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
                if version != u64::from(VERSION) {
                    return Err(Error::Version(name, u32::try_from(version).unwrap_or(u32::MAX)));
                }
                serde_json::from_value(value).map_err(|error| Error::Text(name.clone(), error))?
            }
        };
        if entry.node != node {
            return Err(Error::Node(name, entry.node));
        }
        let mut journal = Self { directory: directory.to_owned(), entry };
        journal.read_notes()?;
        Ok(journal)
    }

    fn read_notes(&mut self) -> Result<(), Error> {
        let path = self.directory.join(NOTES);
        let Some(text) = files::read(&path)? else { return Ok(()) };
        match serde_json::from_str::<Notes>(&text) {
            Ok(notes) if notes.writes == self.entry.writes => self.entry.progress = notes.progress,
            // The journal was written after them.
            Ok(_) => {}
            // With the kernel that they are about, the disk may have lost them.
            Err(_) if self.entry.boot != boot()? => {}
            Err(error) => return Err(Error::Text(path.display().to_string(), error)),
        }
        Ok(())
    }

    /// The directory of the journal and of files taken away.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes it durably.
    pub fn write(&mut self) -> Result<(), Error> {
        files::make_directory(&self.directory)?;
        self.entry.writes += 1;
        let path = self.directory.join(NAME);
        let text = serde_json::to_vec(&self.entry)
            .map_err(|error| Error::Text(path.display().to_string(), error))?;
        Ok(files::write(&path, &text, 0o600)?)
    }

    /// Changes the state durably. The same state again keeps the time it was entered.
    pub fn enter(&mut self, state: State, reason: &str, message: &str) -> Result<(), Error> {
        if self.entry.state != state {
            self.entry.since = Timestamp::now();
        }
        self.entry.state = state;
        reason.clone_into(&mut self.entry.reason);
        message.clone_into(&mut self.entry.message);
        self.write()
    }

    /// How far an operation got; `None` when it has changed nothing.
    #[must_use]
    pub fn progress(&self, op: Op) -> Option<Progress> {
        self.entry.progress.iter().find(|(other, _)| *other == op).map(|(_, progress)| *progress)
    }

    /// Notes that an operation begins or is done, as durably as it is itself.
    pub fn note(&mut self, op: Op, progress: Progress) -> Result<(), Error> {
        self.set(op, progress);
        self.keep(op.outlives_the_kernel())
    }

    /// Notes at once that an operation is done and that the next begins, unless that is done already.
    pub fn pass(&mut self, done: Op, next: Option<Op>) -> Result<(), Error> {
        self.set(done, Progress::Done);
        let next = next.filter(|next| self.progress(*next).is_none());
        if let Some(next) = next {
            self.set(next, Progress::Begun);
        }
        self.keep(done.outlives_the_kernel() || next.is_some_and(Op::outlives_the_kernel))
    }

    fn keep(&mut self, durably: bool) -> Result<(), Error> {
        // Notes are about a journal that is there.
        if durably || !self.exists() {
            return self.write();
        }
        let path = self.directory.join(NOTES);
        let notes = Notes { writes: self.entry.writes, progress: self.entry.progress.clone() };
        let text =
            serde_json::to_vec(&notes).map_err(|error| Error::Text(path.display().to_string(), error))?;
        Ok(files::put(&path, &text, 0o600)?)
    }

    fn set(&mut self, op: Op, progress: Progress) {
        self.entry.progress.retain(|(other, _)| *other != op);
        self.entry.progress.push((op, progress));
    }

    /// Notes that an operation was undone, as durably as it is itself.
    pub fn forget(&mut self, op: Op) -> Result<(), Error> {
        self.entry.progress.retain(|(other, _)| *other != op);
        self.keep(op.outlives_the_kernel())
    }

    /// Removes the journal and all beside it: the last act of a migration.
    pub fn remove(&self) -> Result<(), Error> {
        Ok(files::remove_tree(&self.directory)?)
    }
}

/// What tells this boot of the kernel from others.
pub fn boot() -> Result<String, Error> {
    Ok(files::read(Path::new("/proc/sys/kernel/random/boot_id"))?.unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_hold_until_the_journal_is_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let read = || Journal::open(directory.path(), "n1").unwrap();
        let mut journal = read();
        journal.entry.boot = boot().unwrap();
        journal.note(Op::SwapConfig, Progress::Begun).unwrap();
        let durable = std::fs::read(directory.path().join(NAME)).unwrap();
        journal.pass(Op::RenamePorts, Some(Op::PreparePods)).unwrap();
        assert_eq!(std::fs::read(directory.path().join(NAME)).unwrap(), durable);
        assert_eq!(read().entry.progress, journal.entry.progress);
        journal.forget(Op::PreparePods).unwrap();
        assert_eq!(read().progress(Op::PreparePods), None);

        journal.enter(State::Verifying, "Switched", "").unwrap();
        assert_eq!(read(), journal, "the journal tells all, and older notes nothing");
        journal.forget(Op::SwapConfig).unwrap();
        assert_eq!(read().entry.progress, [(Op::RenamePorts, Progress::Done)]);
    }

    #[test]
    fn notes_that_a_power_cut_destroyed_are_those_of_a_kernel_that_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path(), "n1").unwrap();
        journal.entry.boot = "another".into();
        journal.note(Op::SwapConfig, Progress::Begun).unwrap();
        std::fs::write(directory.path().join(NOTES), "").unwrap();
        assert_eq!(Journal::open(directory.path(), "n1").unwrap(), journal);
        journal.entry.boot = boot().unwrap();
        journal.write().unwrap();
        assert!(matches!(Journal::open(directory.path(), "n1"), Err(Error::Text(..))));
    }

    #[test]
    fn what_was_written_is_read_again_and_only_by_its_node() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path(), "n1").unwrap();
        assert_eq!(journal.entry.state, State::Flannel);
        journal.enter(State::Switching, "Switching", "").unwrap();
        journal.note(Op::SwapConfig, Progress::Begun).unwrap();
        let read = Journal::open(directory.path(), "n1").unwrap();
        assert_eq!(read, journal);
        assert_eq!(read.progress(Op::SwapConfig), Some(Progress::Begun));
        assert!(matches!(Journal::open(directory.path(), "n2"), Err(Error::Node(..))));
    }

    #[test]
    fn a_journal_of_another_version_or_no_journal_at_all_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(NAME), r#"{"version":2}"#).unwrap();
        assert!(matches!(Journal::open(directory.path(), "n"), Err(Error::Version(_, 2))));
        std::fs::write(directory.path().join(NAME), "{").unwrap();
        assert!(matches!(Journal::open(directory.path(), "n"), Err(Error::Text(..))));
    }
}
