//! The Job: leads, examines, prepares, rolls, finishes; nothing is remembered but in the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use flannel_migration_telemetry::{Probes, serve};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use kube::Client;
use prometheus_client::registry::Registry;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::api::{self, Writer};
use crate::args::Options;
use crate::calico::layout::Layout;
use crate::calico::prepare::Pools;
use crate::calico::stock::Stock;
use crate::calico::{announced, canal, prepare};
use crate::cluster::Nodes;
use crate::finish::{self, Record};
use crate::leader::Candidate;
use crate::metrics::{self, Metrics};
use crate::node::{self, Steps};
use crate::plan::End;
use crate::preflight::nodes::untouched;
use crate::preflight::{Finding, Severity, Verdict};
use crate::requests::Requests;
use crate::roll::winds_down;
use crate::settings::Settings;
use crate::stage::Stage;
use crate::status::{Board, Phase};
use crate::survey::{begun, calico_in_use};
use crate::{ahead, check, images, restore, rights, roll, selectors};

/// Findings are looked at again this often; most also when a node changes.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Leadership is renewed every few seconds; without it for so long, the process hangs.
const SILENCE: Duration = Duration::from_mins(1);
/// How many nodes are prepared at once.
const PREPARED_AT_ONCE: usize = 8;
/// How long the pod of a suspended Job may take to be ended.
const SUSPENDED_LIMIT: Duration = Duration::from_mins(1);

/// Why the migration isn't complete.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// Something is in the way that waiting doesn't remove, or hasn't removed.
    #[error("the cluster can't be migrated: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | "))]
    Findings(Vec<Finding>),
    /// The cluster can't be prepared.
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    /// What was prepared can't be taken back.
    #[error(transparent)]
    Restore(#[from] Box<node::Error>),
    /// Images are missing.
    #[error(transparent)]
    Images(#[from] images::Error),
    /// Another coordinator may have taken over.
    #[error("the leadership is lost")]
    Deposed,
    /// An administrator ended the run.
    #[error("{0}; the Job is suspended: `coordinator resume`, or kubectl delete -k manifests")]
    Stopped(&'static str),
    /// The process was asked to end.
    #[error("ended by signal {0}; the migration goes on with the next pod")]
    Signal(&'static str),
}

impl Error {
    /// The process's exit status; never 0, for the Job isn't complete.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Signal("SIGINT") => 130,
            Self::Signal(_) => 143,
            Self::Stopped(_) => 3,
            _ => 1,
        }
    }
}

/// Runs the migration to its end.
pub async fn run(options: &Options) -> Result<(), Error> {
    let mut registry = Registry::with_prefix(metrics::PREFIX);
    let metrics = Metrics::registered(&mut registry);
    let probes = Probes::new(SILENCE);
    let client = api::counted_client(&metrics.calls).await?;
    // Of its own: renewals of the leadership don't wait behind the work.
    let leading = api::counted_client(&metrics.calls).await?;
    let identity = options.pod_name.clone().unwrap_or_else(|| format!("pid-{}", std::process::id()));
    let board = Board::new(options, &identity, metrics);
    let candidate = Candidate::new(leading, &options.namespace, identity.clone(), probes.clone());
    let migration = async {
        loop {
            candidate.acquire().await?;
            info!(identity, step = "lead", version = env!("CARGO_PKG_VERSION"), "this coordinator leads");
            let writer = Writer::new(client.clone(), candidate.leadership(), Some(identity.clone()));
            let ended = tokio::select! {
                done = migrate(&client, &writer, options, &board, &probes) => done,
                () = candidate.keep() => Err(Error::Deposed),
                () = lost(&candidate) => Err(Error::Deposed),
            };
            match ended {
                // Whoever ended here would be started again after a pause that grows with each outage of the API server.
                Err(error) if !writer.leads() => {
                    warn!(
                        identity,
                        step = "lead",
                        why = api::chain(&error),
                        "not leading any more; candidate again"
                    );
                    probes.set_ready(false);
                }
                ended => return ended,
            }
        }
    };
    let result = tokio::select! {
        result = migration => result,
        name = ended() => Err(Error::Signal(name)),
        never = serve(options.admin_address, registry, probes.clone()) => match never {},
    };
    match &result {
        Ok(()) => candidate.remove().await?,
        Err(_) => candidate.release().await,
    }
    result
}

async fn lost(candidate: &Candidate) {
    candidate.leadership().lost().await;
}

/// Waits for a signal to end.
async fn ended() -> &'static str {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        warn!("signals can't be caught");
        return std::future::pending().await;
    };
    tokio::select! { _ = term.recv() => "SIGTERM", _ = int.recv() => "SIGINT" }
}

async fn migrate(
    client: &Client,
    writer: &Writer,
    options: &Options,
    board: &Board,
    probes: &Probes,
) -> Result<(), Error> {
    let nodes = Nodes::watch(client.clone()).await?;
    board.resume(client).await;
    probes.set_ready(true);
    let stage = Stage { writer, board, namespace: &options.namespace };
    let result = tokio::select! {
        done = phases(client, &stage, options, &nodes) => done,
        never = board.keep(writer, &nodes) => match never {},
    };
    match &result {
        Ok(()) => stage.enter(Phase::Complete, "").await,
        Err(error) => stage.enter(Phase::Failed, &api::chain(error)).await,
    }
    board.tell(writer, &nodes).await;
    result
}

async fn phases(client: &Client, stage: &Stage<'_>, options: &Options, nodes: &Nodes) -> Result<(), Error> {
    let writer = stage.writer;
    let requests = Requests::watch(client.clone(), stage.namespace).await?;
    loop {
        stage.enter(Phase::Preflight, "").await;
        if let Some(request) = requests.now().filter(|_| winds_down(requests.now()) && !begun(&nodes.all())) {
            info!(step = "preflight", %request, "nothing was begun, and nothing is");
            return stop(writer, &requests, "nothing was begun").await;
        }
        let settings = match admitted(client, options, nodes, stage).await? {
            Admitted::AlreadyMigrated => {
                info!(step = "preflight", "Calico runs on every node and flannel is gone: nothing to do");
                return Ok(());
            }
            Admitted::Finishing(record) => {
                info!(step = "finish", "every node is migrated; going on with the finish");
                stage.enter(Phase::Finish, "").await;
                return Ok(finish::finish(writer, nodes, &record).await?);
            }
            Admitted::Ready(settings) => *settings,
        };
        let layout = settings.layout(&nodes.all());
        let pools = layout.pools(settings.ip_masq);
        let winding = winds_down(requests.now());
        if !winding {
            stage.enter(Phase::Prepare, "").await;
            prepared(stage, options, nodes, &settings, (&layout, &pools)).await?;
        }
        stage.enter(Phase::Roll, "").await;
        let steps = Arc::new(Steps {
            writer: writer.clone(),
            nodes: nodes.clone(),
            settings,
            policy: options.policy.clone(),
            layout,
            board: stage.board.clone(),
            requests: requests.clone(),
            turns: Semaphore::new(node::TURNS),
        });
        let end = tokio::select! {
            end = roll::roll(&steps, options.node_name.as_deref(), winding) => end?,
            never = ahead::follow(&steps) => match never {},
        };
        match end {
            // What follows can't be taken back: the watch may not have told yet what was asked last.
            Some(End::Migrated) if requests.certain().await?.is_none() => {
                stage.enter(Phase::Finish, "").await;
                let record = Record::new(&steps.settings, options.policy.keep_connections);
                return Ok(finish::finish(writer, nodes, &record).await?);
            }
            Some(End::Migrated) | None => {}
            Some(End::Aborted) => return stop(writer, &requests, "aborted: every node is at rest").await,
            Some(End::RolledBack) => {
                restore::restore(&steps, &pools).await.map_err(Box::new)?;
                return stop(writer, &requests, "rolled back: every node is flannel's").await;
            }
        }
    }
}

/// The end that an administrator asked for: the Job says so by being suspended, which ends this pod.
async fn stop(writer: &Writer, requests: &Requests, why: &'static str) -> Result<(), Error> {
    requests.suspend(writer).await?;
    info!(step = "stop", why, "the Job is suspended");
    // Ending by itself would be taken for a failure, and started again.
    sleep(SUSPENDED_LIMIT).await;
    Err(Error::Stopped(why))
}

enum Admitted {
    Ready(Box<Settings>),
    Finishing(Record),
    AlreadyMigrated,
}

/// Examines the cluster until nothing is in the way.
async fn admitted(
    client: &Client,
    options: &Options,
    nodes: &Nodes,
    stage: &Stage<'_>,
) -> Result<Admitted, Error> {
    let started = Instant::now();
    let mut changes = nodes.changes();
    let mut told: Vec<Finding> = Vec::new();
    let mut lacking = rights::of_coordinator();
    loop {
        let all = nodes.all();
        let check::Checked { survey, verdict, findings } =
            check::before_run(client, options, nodes, &mut lacking).await?;
        for finding in findings.iter().filter(|finding| !told.contains(finding)) {
            warn!(
                step = "preflight",
                severity = %finding.severity,
                reason = finding.reason,
                object = finding.object,
                found = finding.found,
                remedy = finding.remedy,
                "found"
            );
        }
        told.clone_from(&findings);
        stage.board.found(&findings);
        match verdict {
            Verdict::Ready(settings) => {
                let facts = &settings.flannel_facts;
                info!(
                    step = "preflight", nodes = all.len(), flannel = %settings.flannel.daemon_set, calico = %settings.calico.daemon_set,
                    network = facts.networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(","), vni = facts.vni, port = facts.port, mtu = facts.mtu,
                    "the cluster can be migrated"
                );
                return Ok(Admitted::Ready(settings));
            }
            Verdict::AlreadyMigrated => return Ok(Admitted::AlreadyMigrated),
            Verdict::Finishing => {
                if let Some(record) = survey.and_then(|survey| survey.finishing) {
                    return Ok(Admitted::Finishing(record));
                }
            }
            Verdict::NotReady => {}
        }
        if findings.iter().any(|finding| finding.severity == Severity::Fatal)
            || started.elapsed() > options.policy.preflight_timeout
        {
            let stops = |finding: &Finding| finding.severity.stops();
            return Err(Error::Findings(findings.into_iter().filter(stops).collect()));
        }
        tokio::select! { _ = changes.changed() => {}, () = sleep(LOOK_AGAIN) => {} }
    }
}

/// Prepares everything that is needed before the first node is disturbed. What is so already isn't written again, and what migrated
/// nodes use is never written.
async fn prepared(
    stage: &Stage<'_>,
    options: &Options,
    nodes: &Nodes,
    settings: &Settings,
    (layout, pools): (&Layout, &Pools),
) -> Result<(), Error> {
    let writer = stage.writer;
    // By name: every node becomes another version, and all of both at once would be most of the memory.
    let (in_use, untouched) = {
        let all = nodes.all();
        let untouched = all.iter().filter(|node| untouched(node)).map(|node| node.name.clone());
        (calico_in_use(&all), untouched.collect::<Vec<String>>())
    };
    if settings.flannel.canal {
        for node in &untouched {
            canal::hold(writer, node).await?;
        }
        if !in_use {
            canal::pool(writer, pools).await?;
        }
    }
    prepare::cluster(writer, settings, pools, in_use).await?;

    let stock = if untouched.is_empty() { Stock::default() } else { Stock::read(&writer.client).await? };
    let addresses =
        if settings.dual_stack() { ahead::addresses(&writer.client).await? } else { BTreeMap::new() };
    let no_addresses = BTreeSet::new();
    stream::iter(untouched.iter().map(|name| async {
        // Gone since: there is nothing to prepare.
        let Some(node) = nodes.get(name) else { return Ok(()) };
        let networks = settings.networks();
        let flannel = announced::flannel_node(&node, &settings.flannel.annotation_prefix, networks)
            .map_err(Error::Findings)?;
        let needs = (layout, addresses.get(name).unwrap_or(&no_addresses));
        if let Some(written) = prepare::node(writer, &node, &flannel, needs, &stock).await? {
            nodes.learnt(written);
        }
        Ok::<(), Error>(())
    }))
    .buffer_unordered(PREPARED_AT_ONCE)
    .try_collect::<()>()
    .await?;

    images::pull(writer, &settings.calico, &untouched, options.policy.image_timeout).await?;
    selectors::tie_flannel(writer, &settings.flannel.daemon_set).await?;
    info!(
        step = "prepare",
        nodes = nodes.all().len(),
        untouched = untouched.len(),
        "the cluster is prepared"
    );
    Ok(())
}
