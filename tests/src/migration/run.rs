//! One migration from start to end under traffic, and what was seen.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client, api::ListParams};

use super::{Job, LEASE_LABEL, NETWORK_LABEL, STATE_LABEL, apply, checks, job, pods};
use crate::{
    bed::Bed,
    probe::{self, Kind, Options, Prober, Report, Workloads, deploy_to},
};

/// What is migrated, and how closely it is watched.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// `drain` or `in-place`.
    pub strategy: &'a str,
    /// Nodes at a time, a number or a per cent.
    pub max_unavailable: &'a str,
    /// Pods wanted on every node, if more than the workloads' own.
    pub pods_per_node: Option<u32>,
    /// Time between two probes of a flow.
    pub interval: Duration,
    /// How long the Job may take.
    pub limit: Duration,
}

/// A node's labels at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// `...during-migration`.
    pub network: String,
    /// The agent's state.
    pub state: String,
    /// Whether a lease was there.
    pub leased: bool,
}

/// When a node had its lease, in seconds since the Job was made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NodeTimes {
    /// The lease came.
    pub began: f64,
    /// The lease went, the node migrated and schedulable.
    pub ended: f64,
}

/// What was seen.
#[derive(Debug)]
pub struct Outcome {
    /// Seconds from the Job to `1/1`.
    pub seconds: f64,
    /// Each node's own time.
    pub nodes: BTreeMap<String, NodeTimes>,
    /// The traffic, start to end.
    pub traffic: Report,
    /// Pods replaced, restarted or moved, a line each.
    pub changed_pods: Vec<String>,
    /// How many pods there were.
    pub pods: usize,
    /// Probes lost without excuse, a line each: with `drain` on flows none of whose nodes was changing, in place on any.
    pub losses: Vec<String>,
    /// Probes to the outside that were lost on nodes on their way back to flannel, whose flanneld makes its masquerade rules anew.
    pub lost_going_back: u64,
    /// What else should not have been, a line each.
    pub problems: Vec<String>,
}

/// Deploys what the prober measures, with so many pods on every node, and waits until it runs.
pub fn workloads(bed: &Bed, pods_per_node: Option<u32>) -> Result<()> {
    let workloads = Workloads { pods_per_node, ..Workloads::default() };
    Ok(deploy_to(&bed.plan.kubeconfig(), &workloads, Duration::from_mins(3))?)
}

/// Deploys the workloads, migrates the cluster under traffic and checks everything that it promises.
///
/// `say` hears of every change as it comes.
pub fn run(bed: &Bed, request: &Request<'_>, mut say: impl FnMut(&str)) -> Result<Outcome> {
    workloads(bed, request.pods_per_node)?;
    bed.apply_calico()?;
    bed.kubectl(&[
        "-n",
        "kube-system",
        "rollout",
        "status",
        "deployment/calico-kube-controllers",
        "--timeout=120s",
    ])?;
    let cordoned = cordoned(bed)?;
    let before = pods::identities(bed)?;
    let mut options = Options { interval: request.interval, ..Options::default() };
    if request.strategy == "in-place" {
        options.timeout = PATIENCE;
    }
    let prober = Prober::start(bed.site()?, options)?;
    say("traffic flows; the manifests are applied");
    let began = Instant::now();
    apply(bed, &[("STRATEGY", request.strategy), ("MAX_UNAVAILABLE", request.max_unavailable)])?;
    let watched = watch(bed, request, &prober, began, &mut say);
    // Traffic is measured a little longer: what goes wrong right after the end counts too.
    std::thread::sleep(Duration::from_secs(3));
    let traffic = prober.stop()?;
    let Watched { seconds, nodes, losses, lost_going_back } = watched?;
    let mut problems = Vec::new();
    say("checking nodes, pods, addresses, policies and leftovers");
    let after = pods::identities(bed)?;
    let changed_pods = pods::differences(&before, &after);
    if request.strategy == "in-place" {
        problems.extend(changed_pods.iter().cloned());
        problems.extend(reconnects(&traffic));
    }
    for found in [
        checks::nodes(bed, &cordoned)?,
        checks::pods(bed)?,
        checks::ipam(bed)?,
        checks::leftovers(bed)?,
        checks::objects(bed)?,
        checks::policies(bed)?,
    ] {
        problems.extend(found);
    }
    Ok(Outcome {
        seconds,
        nodes,
        traffic,
        changed_pods,
        pods: before.len(),
        losses,
        lost_going_back,
        problems,
    })
}

/// How long an answer may take where no packet may be lost. The kernels of all nodes answer ICMP at once, and so it shows packets. TCP is
/// answered by programs, which wait for a processor while three calico-nodes start on the machine's two: late isn't lost.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Seconds after which a probe is surely counted: its time-out is half a second.
const SETTLED: f64 = 1.0;

struct Watched {
    seconds: f64,
    nodes: BTreeMap<String, NodeTimes>,
    losses: Vec<String>,
    lost_going_back: u64,
}

/// Follows the nodes until the Job is over. Whatever a flow loses while none of its nodes changes is a problem.
fn watch(
    bed: &Bed,
    request: &Request<'_>,
    prober: &Prober,
    began: Instant,
    say: &mut impl FnMut(&str),
) -> Result<Watched> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = runtime.block_on(probe::client(&bed.plan.kubeconfig()))?;
    let mut last: BTreeMap<String, Change> = BTreeMap::new();
    let mut nodes: BTreeMap<String, NodeTimes> = BTreeMap::new();
    let mut losses = Vec::new();
    let mut lost_going_back = 0;
    // Nodes that were on their way back at any moment since the last look at the losses.
    let mut returning: Vec<String> = Vec::new();
    // Nodes that had a lease at any moment since the last look at the losses.
    let mut busy: Vec<String> = Vec::new();
    let mut counted = prober.report()?;
    let mut looked = Instant::now();
    loop {
        let now = began.elapsed().as_secs_f64();
        let seen = runtime.block_on(changes(&client))?;
        for (name, change) in &seen {
            if last.get(name) != Some(change) {
                let lease = if change.leased { ", leased" } else { "" };
                say(&format!(
                    "{now:5.1} s  {name}: network {}, state {}{lease}",
                    change.network, change.state
                ));
            }
            let times = nodes.get_mut(name);
            match (change.leased, times) {
                (true, None) => {
                    nodes.insert(name.clone(), NodeTimes { began: now, ended: f64::NAN });
                }
                (false, Some(times)) if times.ended.is_nan() => times.ended = now,
                _ => {}
            }
            if change.leased && !busy.contains(name) {
                busy.push(name.clone());
            }
            if change.goes_back() && !returning.contains(name) {
                returning.push(name.clone());
            }
        }
        let changed = last != seen;
        last = seen;
        if looked.elapsed() > Duration::from_secs(2) {
            let report = prober.report()?;
            // In place, a node that changes over has no excuse either.
            let excused: &[String] = if request.strategy == "in-place" { &[] } else { &busy };
            for loss in new_losses(&counted, &report, excused) {
                if matches!(loss.kind, Kind::PodToOutside | Kind::PodToOutsideV6)
                    && loss.nodes.iter().any(|node| returning.contains(node))
                {
                    lost_going_back += loss.lost;
                } else {
                    losses.push(format!("{} around {now:.1} s", loss.text));
                }
            }
            returning =
                last.iter().filter(|(_, change)| change.goes_back()).map(|(name, _)| name.clone()).collect();
            counted = report;
            looked = Instant::now();
            // A lease that went a moment ago: what was lost under it may not be counted yet.
            let recent = |times: &NodeTimes| times.ended.is_nan() || now - times.ended < SETTLED;
            busy = nodes.iter().filter(|(_, times)| recent(times)).map(|(name, _)| name.clone()).collect();
        }
        if changed || now.fract() < 0.2 {
            match job(bed)? {
                Job::Complete => {
                    say(&format!("{now:5.1} s  job 1/1"));
                    return Ok(Watched { seconds: now, nodes, losses, lost_going_back });
                }
                Job::Failed(why) => bail!("the Job failed: {why}\n{}", super::coordinator_log(bed)?),
                Job::Running => {}
            }
        }
        if began.elapsed() > request.limit {
            let log = super::coordinator_log(bed).unwrap_or_default();
            bail!("the Job isn't 1/1 after {} s; the coordinator said:\n{log}", request.limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

async fn changes(client: &Client) -> Result<BTreeMap<String, Change>> {
    let nodes: Api<Node> = Api::all(client.clone());
    let list = tokio::time::timeout(Duration::from_secs(10), nodes.list(&ListParams::default()))
        .await
        .context("the API server doesn't answer")??;
    Ok(list
        .items
        .into_iter()
        .map(|node| {
            let labels = node.metadata.labels.unwrap_or_default();
            let label = |key: &str| labels.get(key).cloned().unwrap_or_else(|| "-".to_owned());
            let change = Change {
                network: label(NETWORK_LABEL),
                state: label(STATE_LABEL),
                leased: labels.contains_key(LEASE_LABEL),
            };
            (node.metadata.name.unwrap_or_default(), change)
        })
        .collect())
}

/// What one flow lost.
struct Loss {
    kind: Kind,
    nodes: Vec<String>,
    lost: u64,
    text: String,
}

/// What flows lost between two reports although none of their nodes was changing.
fn new_losses(before: &Report, after: &Report, busy: &[String]) -> Vec<Loss> {
    let mut losses = Vec::new();
    for flow in &after.flows {
        let was = before
            .flows
            .iter()
            .find(|was| (was.kind, &was.from, &was.to) == (flow.kind, &flow.from, &flow.to));
        let lost = flow.figures.lost - was.map_or(0, |was| was.figures.lost).min(flow.figures.lost);
        // A Service's pod may be on any node.
        let anywhere = flow.kind.is_of_a_service();
        let excused =
            if anywhere { !busy.is_empty() } else { flow.nodes.iter().any(|node| busy.contains(node)) };
        if lost > 0 && !excused {
            let text = format!("{:?} {} -> {} lost {lost}", flow.kind, flow.from, flow.to);
            losses.push(Loss { kind: flow.kind, nodes: flow.nodes.clone(), lost, text });
        }
    }
    losses
}

fn reconnects(report: &Report) -> Vec<String> {
    report
        .flows
        .iter()
        .filter(|flow| flow.figures.reconnects > 0)
        .map(|flow| {
            format!("{:?} {} -> {}: {} reconnects", flow.kind, flow.from, flow.to, flow.figures.reconnects)
        })
        .collect()
}

fn cordoned(bed: &Bed) -> Result<Vec<String>> {
    let names = bed.kubectl(&["get", "nodes", "--field-selector=spec.unschedulable=true", "-o", "name"])?;
    Ok(names.lines().filter_map(|line| line.strip_prefix("node/")).map(str::to_owned).collect())
}

impl Change {
    /// On its way back to flannel, or there and not yet given back.
    fn goes_back(&self) -> bool {
        self.state == "reverting" || (self.state == "flannel" && self.leased)
    }
}

impl Outcome {
    /// Everything that was seen, for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::from("node  lease at  migrated at  took\n");
        for (name, times) in &self.nodes {
            let took = times.ended - times.began;
            let _ =
                writeln!(text, "{name:<4}  {:>6.1} s  {:>9.1} s  {took:>5.1} s", times.began, times.ended);
        }
        let _ = writeln!(text, "\njob 1/1 after {:.1} s\n\n{}", self.seconds, self.traffic.table());
        let _ =
            writeln!(text, "pods replaced, restarted or moved: {} of {}", self.changed_pods.len(), self.pods);
        if self.kept() {
            text.push_str("every promise was kept\n");
        }
        for (title, lines) in [("losses without excuse", &self.losses), ("problems", &self.problems)] {
            if !lines.is_empty() {
                let _ = writeln!(text, "{title}:\n  {}", lines.join("\n  "));
            }
        }
        text
    }

    /// Whether every promise was kept.
    #[must_use]
    pub fn kept(&self) -> bool {
        self.losses.is_empty() && self.problems.is_empty()
    }
}
