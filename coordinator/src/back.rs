//! The steps of a node that goes back: a lease that isn't wanted any more, a switch that is undone, a rollback.

use std::time::Duration;

use flannel_migration_protocol::{Epoch, Goal, Network, Report, Request, State};
use kube::runtime::events::EventType;
use tracing::{info, warn};

use crate::calico::{canal, ipam};
use crate::drain;
use crate::node::{Error, Steps};
use crate::patch::{self, failure};
use crate::plan::asked;

/// How long flannel's pod may take to be ready on a node that is its again.
const FLANNEL_LIMIT: Duration = Duration::from_mins(1);

impl Steps {
    pub(crate) async fn retreat(&self, node: &str) -> Result<(), Error> {
        let retreated = self.swap(node, "let Calico leave", patch::retreated).await?;
        if let Some(facts) = retreated {
            let why = facts.view.report.get().map_or("", |report| report.message.as_str());
            warn!(
                node,
                state = "reverting",
                step = "retreat",
                why,
                "Calico leaves; the agent undoes the switch"
            );
        }
        Ok(())
    }

    pub(crate) async fn give_back(&self, node: &str) -> Result<(), Error> {
        let Some(facts) = self.look(node, &[State::Flannel]).await? else { return Ok(()) };
        let (Some(grant), Some(report)) = (facts.view.granted(), facts.view.report.get()) else {
            return Ok(());
        };
        let epoch = grant.epoch;
        let touched = facts.view.network.get() != Some(&Network::Flannel);
        if touched {
            if self.settings.flannel.canal {
                canal::hold(&self.writer, node).await?;
            }
            let turn = self.turns.acquire().await;
            let ipam = ipam::Ipam::new(self.writer.clone());
            let freed = ipam.release_pods(node, &facts.pod_cidrs, &self.blocks(&facts)).await?;
            drop(turn);
            info!(
                node,
                epoch = epoch.get(),
                state = "flannel",
                step = "release",
                handles = freed,
                "addresses of pods are flannel's again"
            );
        }
        let failed = grant.goal == Goal::Migrate;
        if !failed {
            self.bring_flannel(node, epoch).await?;
        }
        self.renew_guests(node, epoch, report).await?;
        let failures = failed.then(|| failure(&facts.view, epoch, touched, &report.reason, &report.message));
        let given = self
            .swap(node, "give the node back", |now| patch::given_back(now, epoch, failures.clone()))
            .await?;
        if given.is_some() && failed {
            self.board.metrics.node_failed(&report.reason);
            let retry = failures.map(|failures| failures.retry_after.to_string());
            warn!(
                node,
                epoch = epoch.get(),
                state = "flannel",
                step = "give-back",
                reason = report.reason,
                why = report.message,
                retry,
                "node not migrated"
            );
            self.tell(
                node,
                EventType::Warning,
                "NotMigrated",
                format!("{}: {}", report.reason, report.message),
            )
            .await;
        } else if given.is_some() {
            info!(node, epoch = epoch.get(), state = "flannel", step = "give-back", "node rolled back");
            self.tell(node, EventType::Normal, "RolledBack", "flannel's network again".to_owned()).await;
        }
        Ok(())
    }

    /// Lets flannel's pod come back, and waits until it is ready: only then the next node may go back.
    async fn bring_flannel(&self, node: &str, epoch: Epoch) -> Result<(), Error> {
        self.swap(node, "let flannel come back", |now| patch::returned(now, epoch)).await?;
        let set = &self.settings.flannel.daemon_set;
        let pods = drain::pods_of(&self.writer.client, node).await?;
        if pods.until(FLANNEL_LIMIT, |pods| drain::daemon_ready(pods, set).then_some(())).await.is_none() {
            let limit = FLANNEL_LIMIT.as_secs();
            return Err(Error::Inconsistent(format!(
                "flannel's pod (DaemonSet {set}) isn't ready on node {node} within {limit} s; the node keeps its lease until it is"
            )));
        }
        Ok(())
    }

    /// Evicts the pods that Calico made on a node that is flannel's again. They are connected: what is in the way of one is told, no more.
    async fn renew_guests(&self, node: &str, epoch: Epoch, report: &Report) -> Result<(), Error> {
        if report.evict.is_empty() {
            return Ok(());
        }
        let pods = drain::pods_of(&self.writer.client, node).await?;
        let (leave, stay) = drain::guests(&pods, &report.evict);
        for pod in stay {
            warn!(node, epoch = epoch.get(), step = "renew", pod = %pod, "made by Calico, and nobody makes it again: it stays as it is");
        }
        match drain::evict(&self.writer, node, &pods, &leave, self.policy.drain_timeout).await {
            Ok(()) => {
                info!(
                    node,
                    epoch = epoch.get(),
                    step = "renew",
                    pods = leave.len(),
                    "pods of Calico's making evicted"
                );
                Ok(())
            }
            Err(blocked @ drain::Blocked::Api(_)) => Err(blocked.into()),
            Err(blocked) => {
                let why = drain::describe(&blocked);
                warn!(
                    node,
                    epoch = epoch.get(),
                    step = "renew",
                    why,
                    "pods of Calico's making stay as they are"
                );
                self.tell(node, EventType::Warning, "MadeByCalico", why).await;
                Ok(())
            }
        }
    }

    /// Waits until an administrator doesn't want the node migrated any more.
    pub(crate) async fn unwanted(&self, node: &str) {
        let (mut nodes, mut requests) = (self.nodes.changes(), self.requests.changes());
        loop {
            let cluster = self.requests.now();
            let asked = self.nodes.get(node).and_then(|facts| asked(&facts.view, cluster));
            if matches!(asked, Some(Request::Abort | Request::Rollback)) {
                return;
            }
            let alive =
                tokio::select! { alive = nodes.changed() => alive, alive = requests.changed() => alive };
            if alive.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Takes a lease back that isn't wanted any more.
    pub(crate) async fn call_off(&self, node: &str) -> Result<(), Error> {
        let taken = self
            .swap(node, "call the lease off", |now| {
                patch::withdrawn(now, now.view.granted()?.epoch, now.view.failures.get().cloned())
            })
            .await?;
        if taken.is_some() {
            info!(node, state = "prepared", step = "call-off", "lease taken back by request");
            self.tell(node, EventType::Normal, "CalledOff", "lease taken back by request".to_owned()).await;
        }
        Ok(())
    }
}
