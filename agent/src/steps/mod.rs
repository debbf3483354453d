//! The changes to the host, each an operation that can be repeated and undone, and their order.

pub mod bridge;
pub mod capture;
pub mod config;
pub mod detour;
pub mod device;
pub mod leftovers;
pub mod peers;
pub mod pods;
pub mod ports;
pub mod rules;

use std::path::PathBuf;

pub use flannel_migration_telemetry::log::chain;
use serde::{Deserialize, Serialize};

use crate::host::{cni, command, files, netlink, netns, saved, sysctl};
use crate::journal::{self, Captured, Journal, Progress};

/// One change to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// Calico's CNI config in, flannel's out.
    SwapConfig,
    /// flannel's VXLAN devices get the names that Felix expects.
    RenameDevice,
    /// Chains of hostPorts get the names under which Calico's portmap looks for them.
    RenamePorts,
    /// Whatever can be prepared without an effect on traffic.
    PreparePods,
    /// Pods send everything to their host, still through the bridge.
    RoutePods,
    /// Host ends leave the bridge.
    MovePods,
    /// The bridge goes.
    DeleteBridge,
    /// flannel's packet filter rules go; Calico's stand.
    RemoveRules,
    /// flannel's files go.
    RemoveFiles,
}

impl Op {
    /// Operations of state `switching`, in order.
    pub const SWITCH: [Self; 7] = [
        Self::SwapConfig,
        Self::RenameDevice,
        Self::RenamePorts,
        Self::PreparePods,
        Self::RoutePods,
        Self::MovePods,
        Self::DeleteBridge,
    ];
    /// Operations of state `verifying`, in order, once Felix is ready.
    pub const CLEAN: [Self; 2] = [Self::RemoveRules, Self::RemoveFiles];

    /// Whether it changes files, which a reboot leaves as they are; all else goes with the kernel.
    #[must_use]
    pub const fn outlives_the_kernel(self) -> bool {
        matches!(self, Self::SwapConfig | Self::RemoveFiles)
    }

    /// Name for logs and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SwapConfig => "swap-config",
            Self::RenameDevice => "rename-device",
            Self::RenamePorts => "rename-ports",
            Self::PreparePods => "prepare-pods",
            Self::RoutePods => "route-pods",
            Self::MovePods => "move-pods",
            Self::DeleteBridge => "delete-bridge",
            Self::RemoveRules => "remove-rules",
            Self::RemoveFiles => "remove-files",
        }
    }
}

/// Where things are on this host.
#[derive(Clone, Debug)]
pub struct Site {
    /// The node's name.
    pub node: String,
    /// libcni's records.
    pub results: PathBuf,
    /// Where flannel's and host-local's other state is: `/var/lib/cni`.
    pub cni_state: PathBuf,
    /// flannel's `/run/flannel`.
    pub flannel_run: PathBuf,
    /// Whether to try to rename links while they are up; kernels before 6.2 refuse, and then they are set down.
    pub rename_live: bool,
}

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A change to links, routes or neighbours.
    #[error("the kernel's network")]
    Netlink(#[from] netlink::Error),
    /// A namespace.
    #[error("a pod's namespace")]
    Netns(#[from] netns::Error),
    /// A kernel setting.
    #[error("a kernel setting")]
    Sysctl(#[from] sysctl::Error),
    /// CNI files.
    #[error("CNI")]
    Cni(#[from] cni::Error),
    /// A file.
    #[error("a file")]
    File(#[from] files::Error),
    /// A program.
    #[error("the packet filter")]
    Command(#[from] command::Error),
    /// A saved message.
    #[error("what was captured")]
    Saved(#[from] saved::Error),
    /// The journal.
    #[error("the journal")]
    Journal(#[from] journal::Error),
    /// Something isn't as it must be.
    #[error("{1}")]
    Unfit(&'static str, String),
    /// Nothing was captured, so nothing may be changed.
    #[error("nothing was captured")]
    NotCaptured,
}

impl Error {
    /// Stable, for conditions and reports.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Netlink(_) => "KernelNetworkFailed",
            Self::Netns(_) => "PodNamespaceFailed",
            Self::Sysctl(_) => "KernelSettingFailed",
            Self::Cni(_) => "CniConfigFailed",
            Self::File(_) => "FileFailed",
            Self::Command(_) => "PacketFilterFailed",
            Self::Saved(_) | Self::NotCaptured => "CaptureUnreadable",
            Self::Journal(_) => "JournalFailed",
            Self::Unfit(reason, _) => reason,
        }
    }

    /// The whole chain of causes in one line.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// Does one operation, unless it is done: notes it, changes the host, notes that.
pub fn apply(journal: &mut Journal, site: &Site, op: Op) -> Result<(), Error> {
    apply_before(journal, site, op, None)
}

/// The same, when `next` is done right after it: that it begins goes into the same note.
pub fn apply_before(journal: &mut Journal, site: &Site, op: Op, next: Option<Op>) -> Result<(), Error> {
    match journal.progress(op) {
        Some(Progress::Done) => return Ok(()),
        Some(Progress::Begun) => {}
        None => journal.note(op, Progress::Begun)?,
    }
    let captured = journal.entry.captured.as_ref().ok_or(Error::NotCaptured)?;
    let started = std::time::Instant::now();
    change(journal, captured, site, op)?;
    tracing::info!(step = "apply", op = op.as_str(), took_us = started.elapsed().as_micros(), "done");
    Ok(journal.pass(op, next)?)
}

/// Does operations one after another.
pub fn apply_all(journal: &mut Journal, site: &Site, ops: &[Op]) -> Result<(), Error> {
    let next = ops.iter().skip(1).copied().map(Some).chain([None]);
    ops.iter().zip(next).try_for_each(|(op, next)| apply_before(journal, site, *op, next))
}

// Canal's pods have Calico's links already.
fn moves_pods(op: Op) -> bool {
    matches!(op, Op::RenamePorts | Op::PreparePods | Op::RoutePods | Op::MovePods | Op::DeleteBridge)
}

fn change(journal: &Journal, captured: &Captured, site: &Site, op: Op) -> Result<(), Error> {
    if captured.canal && moves_pods(op) {
        return Ok(());
    }
    match op {
        Op::SwapConfig => config::swap(captured),
        Op::RenameDevice => device::take(captured, site.rename_live)
            .and_then(|()| leftovers::take_reservations(journal, captured, site)),
        Op::RenamePorts => ports::rename(captured, ports::Direction::ToCalico),
        Op::PreparePods => pods::prepare(captured, site.rename_live),
        Op::RoutePods => pods::route(captured),
        Op::MovePods => pods::leave_bridge(captured, site.rename_live),
        Op::DeleteBridge => bridge::delete(captured),
        Op::RemoveRules => rules::remove(journal, captured),
        Op::RemoveFiles => leftovers::take_away(journal, captured, site),
    }
}

/// Undoes all operations that were begun, last first. All are tried: an error of one leaves the others undone as far as may be.
/// What couldn't be undone stays in the journal.
pub fn undo(journal: &mut Journal, site: &Site) -> Result<(), Vec<(Op, Error)>> {
    let mut failures = Vec::new();
    for op in Op::SWITCH.into_iter().chain(Op::CLEAN).rev() {
        if journal.progress(op).is_none() {
            continue;
        }
        let started = std::time::Instant::now();
        match take_back(journal, site, op) {
            Ok(()) => {
                tracing::info!(
                    step = "undo",
                    op = op.as_str(),
                    took_us = started.elapsed().as_micros(),
                    "undone"
                );
            }
            Err(error) => {
                tracing::error!(step = "undo", op = op.as_str(), error = error.chain(), "can't be undone");
                failures.push((op, error));
            }
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

// Noted as begun first: whoever goes on after a crash in between, or with a disk that has become full, must not take it for done.
fn take_back(journal: &mut Journal, site: &Site, op: Op) -> Result<(), Error> {
    if journal.progress(op) == Some(Progress::Done) {
        journal.note(op, Progress::Begun)?;
    }
    let captured = journal.entry.captured.as_ref().ok_or(Error::NotCaptured)?;
    restore(journal, captured, site, op)?;
    Ok(journal.forget(op)?)
}

fn restore(journal: &Journal, captured: &Captured, site: &Site, op: Op) -> Result<(), Error> {
    if captured.canal && moves_pods(op) {
        return Ok(());
    }
    match op {
        Op::SwapConfig => detour::remove().and_then(|()| config::swap_back(captured)),
        Op::RenameDevice => device::give_back(captured, site.rename_live)
            .and_then(|()| leftovers::put_reservations_back(journal, captured, site)),
        Op::RenamePorts => ports::rename(captured, ports::Direction::ToFlannel),
        Op::PreparePods => pods::unprepare(captured),
        Op::RoutePods => pods::unroute(captured),
        Op::MovePods => pods::join_bridge(captured, site.rename_live),
        Op::DeleteBridge => bridge::make(captured),
        Op::RemoveRules => rules::put_back(captured),
        Op::RemoveFiles => leftovers::put_back(journal, captured, site),
    }
}
