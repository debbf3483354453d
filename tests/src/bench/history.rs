//! What became of every node, seen from outside: the same keys and the same definition of a node's own time for whoever migrates.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::StreamExt as _;
use k8s_openapi::api::{batch::v1::Job as BatchJob, core::v1::Node};
use kube::{
    Api, Client,
    runtime::{WatchStreamExt as _, watcher},
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{
    migration::{Job, LEASE_LABEL, NETWORK_LABEL, STATE_LABEL},
    probe,
};

/// A node at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Seconds since the start.
    pub at: f64,
    /// `...during-migration`; empty without.
    pub network: String,
    /// The agent's state; empty without.
    pub state: String,
    /// Whether a lease is there.
    pub leased: bool,
    /// Whether it is cordoned.
    pub cordoned: bool,
}

impl Moment {
    /// Whether somebody is at work on the node: it is cordoned, has no network of its own, or its agent is to change it or isn't at rest.
    /// What happens to pods once it is verified and takes some again isn't the node's time.
    #[must_use]
    pub fn busy(&self) -> bool {
        let at_rest = matches!(self.state.as_str(), "" | "flannel" | "calico");
        let to_be_changed = self.leased && self.state != "calico";
        to_be_changed || self.cordoned || self.network == "none" || !at_rest
    }

    fn differs(&self, other: &Self) -> bool {
        Self { at: 0.0, ..self.clone() } != Self { at: 0.0, ..other.clone() }
    }
}

/// All moments of all nodes at which something changed.
pub type History = BTreeMap<String, Vec<Moment>>;

/// A node's own time, in seconds: from the first change to the last moment at which it became schedulable and verified.
#[must_use]
pub fn own_time(moments: &[Moment]) -> Option<f64> {
    let began = moments.iter().find(|moment| moment.busy())?.at;
    let ended = moments.windows(2).rev().find_map(|pair| match pair {
        [before, after] if before.busy() && !after.busy() => Some(after.at),
        _ => None,
    })?;
    Some(ended - began)
}

/// From the first change on the first node to the last one's end, in seconds.
#[must_use]
pub fn all_nodes(history: &History) -> Option<f64> {
    let began = history.values().filter_map(|moments| moments.iter().find(|m| m.busy())).map(|m| m.at);
    let ended = history.values().filter_map(|moments| {
        let began = moments.iter().find(|moment| moment.busy())?.at;
        Some(began + own_time(moments)?)
    });
    Some(ended.fold(f64::NAN, f64::max) - began.fold(f64::NAN, f64::min)).filter(|span| span.is_finite())
}

/// Where a node's time goes: what it waits for, and how long, in seconds. Only for our own migration.
#[must_use]
pub fn phases(moments: &[Moment]) -> Vec<(&'static str, f64)> {
    let first = |holds: &dyn Fn(&Moment) -> bool| moments.iter().find(|m| holds(m)).map(|m| m.at);
    let leased = first(&|m| m.leased);
    let marks = [
        ("lease to prepared: the agent examines the node", first(&|m| m.leased && m.state == "prepared")),
        (
            "to network none: the coordinator evicts what must leave",
            first(&|m| m.leased && m.network == "none"),
        ),
        ("to switching: flannel's pod ends", first(&|m| m.state == "switching")),
        ("to verifying: the switch", first(&|m| m.state == "verifying")),
        ("to network calico: addresses are registered", first(&|m| m.leased && m.network == "calico")),
        (
            "to calico: calico-node starts; verification with traffic",
            first(&|m| m.leased && m.state == "calico"),
        ),
        ("to the lease's end: left-over pods are made anew (drain)", {
            moments
                .iter()
                .rev()
                .zip(moments.iter().rev().skip(1))
                .find_map(|(after, before)| (before.leased && !after.leased).then_some(after.at))
        }),
    ];
    let mut last = leased;
    marks
        .into_iter()
        .filter_map(|(what, at)| {
            let (from, to) = (last?, at?);
            last = at;
            Some((what, to - from))
        })
        .collect()
}

#[derive(Default)]
struct Seen {
    history: History,
    job: Option<Job>,
}

/// Follows nodes and the Job through watches, from a thread of its own.
pub struct Follower {
    seen: Arc<Mutex<Seen>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Begins; times are counted from `began`.
    pub fn start(kubeconfig: &Path, began: Instant) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(probe::client(kubeconfig))?;
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! { () = follow(client, &shared, began) => {}, _ = stopped => {} }
            });
        });
        Ok(Self { seen, stop: Some(stop), thread: Some(thread) })
    }

    /// Waits until the Job is over.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < limit {
            match &lock(&self.seen).job {
                Some(Job::Complete) => return Ok(()),
                Some(Job::Failed(why)) => bail!("the Job failed: {why}"),
                Some(Job::Running) | None => {}
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("the Job isn't over after {} s", limit.as_secs())
    }

    /// Ends, and hands out what was seen.
    #[must_use]
    pub fn finish(mut self) -> History {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        std::mem::take(&mut lock(&self.seen).history)
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn follow(client: Client, seen: &Mutex<Seen>, began: Instant) {
    let nodes: Api<Node> = Api::all(client.clone());
    let jobs: Api<BatchJob> = Api::namespaced(client, "kube-system");
    let one = watcher::Config::default().fields("metadata.name=flannel-migration");
    let nodes = watcher(nodes, watcher::Config::default()).default_backoff().applied_objects();
    let jobs = watcher(jobs, one).default_backoff().applied_objects();
    let nodes = nodes.for_each(|node| {
        if let Ok(node) = node {
            see_node(&node, &mut lock(seen).history, began.elapsed().as_secs_f64());
        }
        std::future::ready(())
    });
    let jobs = jobs.for_each(|found| {
        if let Ok(found) = found {
            lock(seen).job = Some(see_job(&found));
        }
        std::future::ready(())
    });
    futures::future::join(nodes, jobs).await;
}

fn see_node(node: &Node, history: &mut History, at: f64) {
    let Some(name) = &node.metadata.name else { return };
    let label = |key: &str| node.metadata.labels.as_ref().and_then(|labels| labels.get(key)).cloned();
    let moment = Moment {
        at,
        network: label(NETWORK_LABEL).unwrap_or_default(),
        state: label(STATE_LABEL).unwrap_or_default(),
        leased: label(LEASE_LABEL).is_some(),
        cordoned: node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false),
    };
    let moments = history.entry(name.clone()).or_default();
    if moments.last().is_none_or(|last| last.differs(&moment)) {
        moments.push(moment);
    }
}

fn see_job(job: &BatchJob) -> Job {
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let mut last = Job::Running;
    for condition in conditions.filter(|condition| condition.status == "True") {
        match condition.type_.as_str() {
            "Complete" => return Job::Complete,
            "Failed" => last = Job::Failed(condition.message.clone().unwrap_or_default()),
            _ => {}
        }
    }
    last
}

/// Waits for the rollout that `kubectl` shows.
pub fn rolled_out(bed: &crate::bed::Bed, target: &str) -> Result<()> {
    bed.kubectl(&["-n", "kube-system", "rollout", "status", target, "--timeout=120s"])
        .map(drop)
        .with_context(|| format!("{target} doesn't roll out"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(at: f64, leased: bool, cordoned: bool, network: &str, state: &str) -> Moment {
        Moment { at, network: network.into(), state: state.into(), leased, cordoned }
    }

    #[test]
    fn a_nodes_own_time_is_from_its_first_change_to_its_last_return() {
        let peer = [
            moment(0.0, false, false, "flannel", ""),
            moment(2.0, false, true, "flannel", ""),
            moment(5.0, false, true, "none", ""),
            moment(20.0, false, true, "calico", ""),
            moment(27.0, false, false, "calico", ""),
            moment(60.0, false, false, "", ""),
        ];
        assert_eq!(own_time(&peer), Some(25.0));
        assert_eq!(own_time(&peer[..2]), None, "not back yet");
        let ours = [
            moment(1.0, false, false, "flannel", "flannel"),
            moment(2.0, true, false, "flannel", "prepared"),
            moment(3.0, true, false, "none", "switching"),
            moment(6.0, true, true, "calico", "calico"),
            moment(7.0, true, false, "calico", "calico"),
            moment(9.0, false, false, "calico", "calico"),
        ];
        assert_eq!(own_time(&ours), Some(5.0));
        let both = History::from([("a".into(), peer.to_vec()), ("b".into(), ours.to_vec())]);
        assert_eq!(all_nodes(&both), Some(25.0));
    }

    #[test]
    fn the_phases_add_up_to_the_time_of_the_lease() {
        let ours = [
            moment(2.0, true, false, "flannel", "flannel"),
            moment(2.5, true, false, "flannel", "prepared"),
            moment(3.0, true, false, "none", "prepared"),
            moment(3.5, true, false, "none", "switching"),
            moment(4.0, true, false, "none", "verifying"),
            moment(4.5, true, false, "calico", "verifying"),
            moment(6.0, true, false, "calico", "calico"),
            moment(7.0, false, false, "calico", "calico"),
        ];
        let sum: f64 = phases(&ours).iter().map(|(_, span)| span).sum();
        assert!((sum - 5.0).abs() < 1e-9, "{sum}");
    }
}
