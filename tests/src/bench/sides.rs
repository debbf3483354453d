//! Side by side: Calico's own controller and ours on the same kind of test bed, with the same workloads, the same prober and the same
//! definitions.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{
    audit::{self, Calls},
    history::{self, Follower, History},
};
use crate::{
    bed::{Bed, flannel::documents, teardown},
    images,
    migration::{self, PATIENCE, checks, pods},
    probe::{Options, Prober, Report},
    shape::{NodeShape, Shape},
};

/// Who migrates, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Calico's own controller.
    Peer,
    /// Ours, strategy `drain`.
    Drain,
    /// Ours, strategy `in-place`.
    InPlace,
    /// Ours, strategy `in-place`, all nodes at once.
    InPlaceAll,
}

impl Side {
    /// All, in the order of tables.
    pub const ALL: [Self; 4] = [Self::Peer, Self::Drain, Self::InPlace, Self::InPlaceAll];

    /// For tables.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Peer => "Calico's controller",
            Self::Drain => "drain",
            Self::InPlace => "in-place",
            Self::InPlaceAll => "in-place, all at once",
        }
    }

    /// For file names.
    const fn word(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Drain => "drain",
            Self::InPlace => "in-place",
            Self::InPlaceAll => "in-place-all",
        }
    }
}

/// What one run gave.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Who.
    pub side: Side,
    /// Which round, from 1.
    pub round: u32,
    /// Seconds from the manifests to the Job's end.
    pub job_seconds: f64,
    /// What became of the nodes.
    pub history: History,
    /// The traffic, to a few seconds after the end.
    pub traffic: Report,
    /// Pods on the pod network before.
    pub pods: usize,
    /// Those replaced, restarted or moved, a line each.
    pub changed_pods: Vec<String>,
    /// Calls by account.
    pub calls: BTreeMap<String, Calls>,
    /// Left on the nodes, a line each.
    pub on_nodes: Vec<String>,
    /// Left in the API, a line each.
    pub in_api: Vec<String>,
    /// What cannot be less; where pods stay.
    pub floor: Option<Floor>,
}

/// What calico-node's start alone costs: made anew on the migrated cluster, the same traffic flowing, as many nodes at a time.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Floor {
    /// Seconds from the old pods' deletion to the new ones' being ready, per turn.
    pub seconds: Vec<f64>,
    /// The traffic in that time.
    pub traffic: Report,
}

impl Figures {
    /// Writes of the coordinator and the agents, or of Calico's controller.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.calls.values().map(audit::writes).sum()
    }
}

/// How the comparison is run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How often each side runs.
    pub rounds: u32,
    /// The number of the first round: figures of other rounds stay.
    pub first: u32,
    /// Who runs.
    pub sides: Vec<Side>,
    /// Nodes of each cluster.
    pub nodes: usize,
    /// Pods wanted on every node, if more than the workloads' own.
    pub pods_per_node: Option<u32>,
    /// How long a Job may take.
    pub limit: Duration,
}

/// Name of the test bed.
pub const BED: &str = "b-sides";

/// Runs all sides in all rounds, every other round backwards, each on a cluster of its own.
pub fn run(plan: &Plan, testbed: &Path) -> Result<()> {
    for round in plan.first..plan.first + plan.rounds {
        let mut sides = plan.sides.clone();
        if round % 2 == 0 {
            sides.reverse();
        }
        for side in sides {
            eprintln!("bench: round {round}, {}", side.title());
            teardown::down(BED)?;
            let figures = one(plan, side, round, testbed);
            teardown::down(BED)?;
            let figures = figures.with_context(|| format!("round {round}, {}", side.title()))?;
            super::keep(&format!("sides-{}-{round}", side.word()), &figures)?;
        }
    }
    Ok(())
}

fn one(plan: &Plan, side: Side, round: u32, testbed: &Path) -> Result<Figures> {
    let shape = Shape { nodes: NodeShape::numbered(plan.nodes), ..Shape::default() };
    let bed = Bed::up(BED, shape, testbed)?;
    // Both find their images on the nodes.
    match side {
        Side::Peer => {
            bed.load_echo()?;
            bed.load_image(&images::peer(&bed.parts, &bed.images.base)?)?;
        }
        _ => bed.load_project_images()?,
    }
    migration::workloads(&bed, plan.pods_per_node)?;
    bed.apply_calico()?;
    history::rolled_out(&bed, "deployment/calico-kube-controllers")?;
    let before = pods::identities(&bed)?;
    let prober = Prober::start(bed.site()?, options())?;
    let logged = audit::position(&bed)?;
    let began = Instant::now();
    let follower = Follower::start(&bed.plan.kubeconfig(), began)?;
    apply(&bed, side)?;
    let over = follower.wait(plan.limit);
    let job_seconds = began.elapsed().as_secs_f64();
    // What goes wrong right after the end counts too.
    std::thread::sleep(Duration::from_secs(5));
    let (traffic, history) = (prober.stop()?, follower.finish());
    if let Err(error) = over {
        let log = migration::coordinator_log(&bed).unwrap_or_default();
        return Err(error.context(format!("it said:\n{log}")));
    }
    let calls = audit::since(&bed, logged)?;
    let after = pods::identities(&bed)?;
    eprintln!("bench: {} took {job_seconds:.1} s, {} probes lost", side.title(), traffic.lost());
    let (on_nodes, in_api) = (checks::leftovers(&bed)?, checks::objects(&bed)?);
    Ok(Figures {
        side,
        round,
        job_seconds,
        history,
        traffic,
        pods: before.len(),
        changed_pods: pods::differences(&before, &after),
        calls,
        on_nodes,
        in_api,
        floor: match side {
            Side::Peer | Side::Drain => None,
            Side::InPlace => Some(floor(&bed, 1)?),
            Side::InPlaceAll => Some(floor(&bed, bed.nodes.len())?),
        },
    })
}

/// Deletes calico-node's pods of so many nodes at a time, with the same prober.
fn floor(bed: &Bed, at_once: usize) -> Result<Floor> {
    let prober = Prober::start(bed.site()?, options())?;
    let mut seconds = Vec::new();
    for turn in bed.nodes.chunks(at_once) {
        let began = Instant::now();
        let nodes: Vec<&str> = turn.iter().map(|node| node.shape.name.as_str()).collect();
        let mut names = Vec::new();
        for node in nodes {
            let field = format!("spec.nodeName={node}");
            let pods = ["-n", "kube-system", "get", "pods", "-l", "k8s-app=calico-node", "-o", "name"];
            let told = bed.kubectl(&[&pods[..], &["--field-selector", &field]].concat())?;
            names.extend(told.lines().map(str::to_owned));
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        bed.kubectl(&[&["-n", "kube-system", "delete", "--wait=true"], &names[..]].concat())?;
        history::rolled_out(bed, "daemonset/calico-node")?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    Ok(Floor { seconds, traffic: prober.stop()? })
}

// The same time-out for all, the one under which in place nothing may be lost: late isn't lost.
fn options() -> Options {
    Options { interval: Duration::from_millis(10), timeout: PATIENCE, ..Options::default() }
}

fn apply(bed: &Bed, side: Side) -> Result<()> {
    let ours = |strategy: &str, max: &str| {
        migration::apply(bed, &[("STRATEGY", strategy), ("MAX_UNAVAILABLE", max)])
    };
    match side {
        Side::Peer => bed.apply(&documents(&bed.parts.manifest("calico", "migration-job.yaml")?)?),
        Side::Drain => ours("drain", "1"),
        Side::InPlace => ours("in-place", "1"),
        Side::InPlaceAll => ours("in-place", "100%"),
    }
}
