//! What the cluster is at, told once: in the log, as an event of the Job, and in the status.

use kube::runtime::events::EventType;
use tracing::info;

use crate::api::Writer;
use crate::status::{Board, Phase};

/// Where it is told.
#[derive(Clone, Copy)]
pub struct Stage<'a> {
    /// Writes the events.
    pub writer: &'a Writer,
    /// Holds the status.
    pub board: &'a Board,
    /// Namespace of the Job.
    pub namespace: &'a str,
}

impl Stage<'_> {
    /// Enters a phase; again the same one, and nothing is told.
    pub async fn enter(&self, phase: Phase, message: &str) {
        if !self.board.enter(phase, message) {
            return;
        }
        info!(step = %phase, message, "phase");
        let (type_, reason, what) = match phase {
            Phase::NotStarted => return,
            Phase::Preflight => (EventType::Normal, "PreflightStarted", "the cluster is examined"),
            Phase::Prepare => {
                (EventType::Normal, "PrepareStarted", "Calico's objects and images are put in place")
            }
            Phase::Roll => (EventType::Normal, "RollStarted", "nodes are migrated"),
            Phase::Finish => {
                (EventType::Normal, "FinishStarted", "every node is migrated; flannel is removed")
            }
            Phase::Complete => {
                (EventType::Normal, "MigrationComplete", "Calico runs every node, and flannel is gone")
            }
            Phase::Failed => (EventType::Warning, "MigrationFailed", message),
        };
        self.writer.job_event(self.namespace, type_, reason, what).await;
    }
}
