//! The steps of one node as effects: each checks that it still applies, and writes with the version of the node that it decided by.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_protocol::{Epoch, Evict, Goal, Grant, Network, State, Strategy};
use kube::api::Api;
use kube::runtime::events::EventType;
use serde_json::{Map, Value};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use crate::api::{self, Writer, found, read};
use crate::args::Policy;
use crate::calico::layout::Layout;
use crate::calico::stock::Stock;
use crate::calico::{announced, canal, ipam, prepare};
use crate::cluster::{Node, NodeFacts, Nodes};
use crate::drain;
use crate::patch::{self, failure};
use crate::plan::Step;
use crate::requests::Requests;
use crate::settings::Settings;
use crate::status::Board;

/// Why a step wasn't completed. It is decided anew what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// Pods are in the way.
    #[error(transparent)]
    Drain(#[from] drain::Blocked),
    /// IPAM refused.
    #[error(transparent)]
    Ipam(#[from] ipam::Error),
    /// The node can't be prepared.
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    /// The node says something that its state doesn't allow.
    #[error("{0}")]
    Inconsistent(String),
}

impl Error {
    /// `CamelCase`, for events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Api(error) => error.reason(),
            Self::Drain(error) => error.reason(),
            Self::Ipam(error) => error.reason(),
            Self::Prepare(error) => error.reason(),
            Self::Inconsistent(_) => "NodeInconsistent",
        }
    }
}

/// What the steps of all nodes share.
pub struct Steps {
    /// The cluster's writer.
    pub writer: Writer,
    /// The watched nodes, to be told what was read and written.
    pub nodes: Nodes,
    /// What holds.
    pub settings: Settings,
    /// How nodes are taken through.
    pub policy: Policy,
    /// How flannel's networks are divided into Calico's blocks.
    pub layout: Layout,
    /// Where it is told what becomes of nodes.
    pub board: Board,
    /// What an administrator asks of the whole cluster.
    pub requests: Requests,
    /// Nodes take turns at what belongs to their pods in Calico's IPAM: whoever waits doesn't hold blocks and calls in memory meanwhile.
    pub turns: Semaphore,
}

/// How many nodes have their turn at once; one may have many pods, and their handles are written side by side.
pub const TURNS: usize = 8;

impl Steps {
    /// Does one step.
    pub async fn run(&self, node: &str, step: &Step) -> Result<(), Error> {
        match step {
            Step::Enrol => self.enrol(node).await,
            Step::Relabel(network) => self.relabel(node, *network).await,
            Step::Grant { epoch, goal, strategy } => self.grant(node, *epoch, *goal, *strategy).await,
            Step::CallOff => self.call_off(node).await,
            Step::Clear => self.clear(node).await,
            Step::Register => self.register(node).await,
            Step::Retreat => self.retreat(node).await,
            Step::GiveBack => self.give_back(node).await,
            Step::Settle => self.settle(node).await,
        }
    }

    /// Writes what `patch` says of the node, by the version that it decided by.
    pub(crate) async fn swap(
        &self,
        node: &str,
        what: &str,
        patch: impl Fn(&NodeFacts) -> Option<Value>,
    ) -> Result<Option<NodeFacts>, api::Error> {
        self.nodes.swap(&self.writer, node, what, patch).await
    }

    async fn enrol(&self, node: &str) -> Result<(), Error> {
        let Some(facts) = self.nodes.get(node) else { return Ok(()) };
        let networks = self.settings.networks();
        let prefix = &self.settings.flannel.annotation_prefix;
        // flannel's selector keeps it off nodes without label: whoever has no annotations now will never have any.
        let (flannel, label, more) = if let Ok(flannel) = announced::flannel_node(&facts, prefix, networks) {
            (flannel, Network::Flannel, Map::new())
        } else {
            // A node that joined in mid-run never had flannel. So that the nodes that flannel still runs on reach it, it is announced to
            // them in flannel's own words.
            let joined = announced::joined_node(&facts, networks).map_err(prepare::Error::Contradiction)?;
            let words = announced::flannel_annotations(&joined, &self.settings);
            (joined, Network::Calico, words)
        };
        // What there is of one node is looked at as it is now. What addresses its pods have is followed all the time.
        let needs = (&self.layout, &BTreeSet::new());
        prepare::blocks(&self.writer, node, &flannel, needs, &Stock::default()).await?;
        self.swap(node, "label the node", |now| {
            let unlabelled = now.view.network.is_absent();
            unlabelled.then(|| announced::patch(now, &flannel, Some(label), more.clone())).flatten()
        })
        .await?;
        info!(node, step = "enrol", network = %label, "node joined the migration");
        Ok(())
    }

    async fn relabel(&self, node: &str, network: Network) -> Result<(), Error> {
        let labelled =
            self.swap(node, "correct the network label", |now| patch::relabelled(now, network)).await?;
        if labelled.is_some() {
            info!(node, step = "relabel", %network, "network label corrected");
        }
        Ok(())
    }

    async fn grant(&self, node: &str, epoch: Epoch, goal: Goal, strategy: Strategy) -> Result<(), Error> {
        let grant = Grant {
            epoch,
            fence: self.writer.fence(),
            goal,
            strategy,
            budget_seconds: self.policy.node_budget.as_secs(),
            keep_seconds: self.policy.keep_connections.as_secs(),
            flannel: self.settings.flannel_facts.clone(),
            calico: self.settings.calico_facts.clone(),
        };
        let rest = if goal == Goal::Migrate { State::Flannel } else { State::Calico };
        let granted = self.swap(node, "grant a lease", |now| patch::granted(now, &grant)).await?;
        if granted.is_some() {
            self.board.granted(node, strategy.as_str());
            info!(node, epoch = epoch.get(), state = %rest, step = "grant", ?goal, %strategy, "lease granted");
            self.tell(node, EventType::Normal, "LeaseGranted", format!("lease {epoch}, strategy {strategy}"))
                .await;
        }
        Ok(())
    }

    async fn clear(&self, node: &str) -> Result<(), Error> {
        // In place, where every pod is adopted, nobody is looked for: a watch for each of hundreds of nodes is most of what they take. What is
        // known of the node is enough then, for all that is done is one write, which is refused when the node is another by now.
        let known = self.nodes.get(node).filter(|known| patch::all_stay(&known.view));
        let all_stay = known.is_some();
        let (epoch, evicted) = if let Some(grant) = known.as_ref().and_then(|known| known.view.granted()) {
            (grant.epoch, 0)
        } else {
            let Some(facts) = self.look(node, &[State::Prepared]).await? else { return Ok(()) };
            let (Some(grant), Some(report)) = (facts.view.granted(), facts.view.report.get()) else {
                return Ok(());
            };
            let evicted = self.evict(node, grant.epoch, grant.strategy, &report.evict).await?;
            let Some(evicted) = evicted else { return Ok(()) };
            (grant.epoch, evicted)
        };
        let still = |now: &NodeFacts| !all_stay || patch::all_stay(&now.view);
        let left = self
            .swap(node, "let flannel leave", |now| still(now).then(|| patch::cleared(now, epoch)).flatten())
            .await?;
        if left.is_some() {
            self.board.evicted(node, evicted);
            info!(
                node,
                epoch = epoch.get(),
                state = "prepared",
                step = "clear",
                evicted,
                "flannel may leave"
            );
        }
        Ok(())
    }

    /// Evicts what must leave before the switch; how many. None: the lease was taken back instead.
    async fn evict(
        &self,
        node: &str,
        epoch: Epoch,
        strategy: Strategy,
        listed: &[Evict],
    ) -> Result<Option<usize>, Error> {
        let pods = drain::pods_of(&self.writer.client, node).await?;
        let unmovable = drain::unmovable(&pods.all(), listed);
        if !unmovable.is_empty() {
            self.withdraw(node, epoch, &drain::Blocked::Static(unmovable)).await?;
            return Ok(None);
        }
        // Under `drain` nothing new may come; under `in-place`, what was evicted must not come back.
        if strategy == Strategy::Drain || !drain::leaving(&pods, strategy, listed).is_empty() {
            let tainted = drain::come_back(&pods.all(), listed);
            self.swap(node, "cordon the node", |now| patch::cordoned(now, epoch, tainted)).await?;
        }
        // Looked up after cordoning: nothing is scheduled to the node between this and the switch.
        let leave = drain::leaving(&pods, strategy, listed);
        for evict in listed {
            info!(
                node,
                epoch = epoch.get(),
                step = "drain",
                pod = format!("{}/{}", evict.namespace, evict.pod),
                reason = evict.reason,
                "can't be adopted"
            );
        }
        let evicted = tokio::select! {
            evicted = drain::evict(&self.writer, node, &pods, &leave, self.policy.drain_timeout) => evicted,
            () = self.unwanted(node) => return self.call_off(node).await.map(|()| None),
        };
        match evicted {
            Ok(()) => Ok(Some(leave.len())),
            Err(blocked @ drain::Blocked::Api(_)) => Err(blocked.into()),
            Err(blocked) => {
                self.withdraw(node, epoch, &blocked).await?;
                Ok(None)
            }
        }
    }

    /// Takes a lease back whose agent has changed nothing yet.
    async fn withdraw(&self, node: &str, epoch: Epoch, blocked: &drain::Blocked) -> Result<(), Error> {
        let message = drain::describe(blocked);
        let taken = self
            .swap(node, "withdraw the lease", |now| {
                let failed = failure(&now.view, epoch, false, blocked.reason(), &message);
                patch::withdrawn(now, epoch, Some(failed))
            })
            .await?;
        if taken.is_some() {
            self.board.metrics.node_failed(blocked.reason());
            warn!(
                node,
                epoch = epoch.get(),
                step = "drain",
                reason = blocked.reason(),
                why = message,
                "lease withdrawn; tried again later"
            );
            self.tell(node, EventType::Warning, blocked.reason(), message).await;
        }
        Ok(())
    }

    async fn register(&self, node: &str) -> Result<(), Error> {
        let turn = self.turns.acquire().await;
        let Some(facts) = self.look(node, &[State::Verifying]).await? else { return Ok(()) };
        let Some(epoch) = facts.view.granted().map(|grant| grant.epoch) else { return Ok(()) };
        let Some(adopted) = facts.view.adopted.get() else {
            return Err(Error::Inconsistent(format!(
                "node {node} is verifying, but doesn't say which pods it adopted"
            )));
        };
        let kept = facts.view.kept.get().map_or(&[][..], Vec::as_slice);
        let ipam = ipam::Ipam::new(self.writer.clone());
        // A pod that came last may have an IPv6 address behind all blocks that the node was given.
        let addresses = adopted.iter().flat_map(|pod| &pod.ip).chain(kept);
        let of_pods: BTreeSet<ipnet::IpNet> = addresses
            .filter(|address| address.is_ipv6())
            .filter_map(|address| self.layout.block_of(&facts.pod_cidrs, *address))
            .collect();
        let of_pods: Vec<ipnet::IpNet> = of_pods.into_iter().collect();
        ipam.claim_more(node, &of_pods).await?;
        let blocks = [self.blocks(&facts), of_pods].concat();
        ipam.register(node, &blocks, adopted, kept).await?;
        drop(turn);
        if self.settings.flannel.canal {
            canal::release(&self.writer, node).await?;
        }
        let labelled = self.swap(node, "let Calico come", |now| patch::registered(now, epoch)).await?;
        if labelled.is_some() {
            info!(
                node,
                epoch = epoch.get(),
                state = "verifying",
                step = "register",
                adopted = adopted.len(),
                "adopted addresses are Calico's; Calico may come"
            );
        }
        Ok(())
    }

    async fn settle(&self, node: &str) -> Result<(), Error> {
        // In place all that is done is one write, which is refused when the node is another by now.
        let facts = match self.nodes.get(node).filter(|known| patch::in_place(&known.view)) {
            Some(known) => known,
            None => match self.look(node, &[State::Calico]).await? {
                Some(read) => Arc::new(read),
                None => return Ok(()),
            },
        };
        let Some(grant) = facts.view.granted() else { return Ok(()) };
        let epoch = grant.epoch;
        let mut renewed = 0;
        if grant.strategy == Strategy::Drain {
            let adopted = facts.view.adopted.get().map_or(&[][..], Vec::as_slice);
            if !adopted.is_empty() && patch::reopened(&facts, epoch).is_some() {
                // Pods that were evicted need not wait for others that are made anew here.
                self.swap(node, "uncordon the node", |now| patch::reopened(now, epoch)).await?;
            }
            renewed =
                match drain::renew(&self.writer, node, adopted, self.policy.drain_timeout.min(RENEW_LIMIT))
                    .await
                {
                    Ok(renewed) => renewed,
                    Err(blocked @ drain::Blocked::Api(_)) => return Err(blocked.into()),
                    // The node is migrated and the pods are connected: no reason to hold the others up.
                    Err(blocked) => {
                        warn!(
                            node,
                            epoch = epoch.get(),
                            step = "settle",
                            why = drain::describe(&blocked),
                            "left-over pods not made anew"
                        );
                        0
                    }
                };
        }
        let settled = self.swap(node, "take the lease back", |now| patch::settled(now, epoch)).await?;
        if settled.is_some() {
            self.board.migrated(node, facts.view.adopted.get().map_or(0, Vec::len));
            info!(node, epoch = epoch.get(), state = "calico", step = "settle", renewed, "node migrated");
            self.tell(node, EventType::Normal, "Migrated", "the node's network is Calico's".to_owned()).await;
        }
        Ok(())
    }

    /// The node, if its agent has answered its lease with one of these states.
    pub(crate) async fn look(&self, node: &str, states: &[State]) -> Result<Option<NodeFacts>, api::Error> {
        let nodes: Api<Node> = Api::all(self.writer.client.clone());
        let facts = found(read(format!("read node {node}"), nodes.get(node)).await)?
            .map(|node| NodeFacts::from(&node));
        if let Some(facts) = &facts {
            self.nodes.learnt(facts.clone());
        }
        Ok(facts.filter(|facts| facts.view.answered().is_some_and(|state| states.contains(&state))))
    }

    /// The blocks that a node has whatever its pods' addresses are.
    pub(crate) fn blocks(&self, facts: &NodeFacts) -> Vec<ipnet::IpNet> {
        self.layout.blocks(&facts.pod_cidrs, &BTreeSet::new())
    }

    pub(crate) async fn tell(&self, node: &str, type_: EventType, reason: &str, message: String) {
        self.writer.event(node, type_, reason, message).await;
    }
}

/// How long making left-over pods anew may hold up a migrated node.
const RENEW_LIMIT: Duration = Duration::from_mins(2);
