//! What the coordinator costs in big clusters.

use super::{costs::MIB, table};
use crate::bench::{
    audit,
    scale::Figures,
    stats::{Spread, float, number, shown},
    svg::Bar,
};

/// The runs by what they have in common, in their order.
fn by<K: PartialEq>(runs: &[Figures], common: impl Fn(&Figures) -> K) -> Vec<(K, Vec<&Figures>)> {
    let mut kinds: Vec<(K, Vec<&Figures>)> = Vec::new();
    for run in runs {
        let of = common(run);
        match kinds.iter_mut().find(|(kind, _)| *kind == of) {
            Some((_, kind)) => kind.push(run),
            None => kinds.push((of, vec![run])),
        }
    }
    kinds
}

/// The cluster, and how its nodes were taken through.
fn roll(run: &Figures) -> (u32, String) {
    (run.nodes, run.manner())
}

fn median(kind: &[&Figures], quantity: impl Fn(&Figures) -> f64) -> String {
    let spread = Spread::of(kind.iter().map(|run| quantity(run)));
    spread.map_or_else(|| "-".to_owned(), |spread| number(spread.median))
}

/// Milliseconds of processor time per node taken through.
pub fn processor(run: &Figures) -> f64 {
    run.per_node(run.cpu) * 1000.0
}

/// How much of a core the roll takes, in percent.
pub fn share(run: &Figures) -> f64 {
    run.cpu * 100.0 / run.seconds
}

/// Processor time per node, for each cluster and max-unavailable.
pub fn bars(runs: &[Figures]) -> Vec<Bar> {
    let bar = |((nodes, manner), kind): ((u32, String), Vec<&Figures>)| {
        let name = format!("{nodes} nodes, max-unavailable {manner}");
        Some(Bar { name, spread: Spread::of(kind.into_iter().map(processor))? })
    };
    by(runs, roll).into_iter().filter_map(bar).collect()
}

/// The roll.
pub fn rolling(runs: &[Figures]) -> String {
    let rows = by(runs, roll).into_iter().map(|((nodes, manner), kind)| {
        let all = |quantity: &dyn Fn(&Figures) -> f64| shown(kind.iter().map(|run| quantity(run)));
        let per = |quantity: &dyn Fn(&Figures) -> f64| median(&kind, |run| run.per_node(quantity(run)));
        vec![
            nodes.to_string(),
            manner,
            median(&kind, |run| f64::from(run.taken)),
            all(&processor),
            all(&share),
            all(&|run| float(run.peak >> 10) * 1024.0 / MIB),
            per(&|run| float(run.calls.values().sum::<u64>())),
            per(&|run| float(audit::writes(&run.calls))),
            per(&|run| float(run.sent) / 1024.0),
            per(&|run| float(run.received) / 1024.0),
            per(&|run| float(run.waits)),
            per(&|run| run.seconds * 1000.0),
            median(&kind, |run| run.lease * 1000.0),
            median(&kind, |run| (run.lease - run.agent) * 1000.0),
        ]
    });
    table(
        &[
            "nodes",
            "max-unavailable",
            "taken through",
            "CPU per node, ms",
            "CPU, % of a core",
            "peak RSS, MiB",
            "requests per node",
            "writes per node",
            "sent per node, KiB",
            "received per node, KiB",
            "waits per node",
            "wall time per node, ms",
            "a node's lease, ms",
            "of it beyond the agent, ms",
        ],
        rows,
    )
}

/// Starts and restarts.
pub fn starting(runs: &[Figures]) -> String {
    let rows = by(runs, |run| (run.nodes, run.restarted)).into_iter().map(|((nodes, restarted), kind)| {
        let all = |quantity: &dyn Fn(&Figures) -> f64| shown(kind.iter().map(|run| quantity(run)));
        vec![
            nodes.to_string(),
            if restarted { "after a kill".to_owned() } else { "first".to_owned() },
            all(&|run| run.led),
            all(&|run| run.judged),
            all(&|run| run.prepared),
            all(&|run| run.decided),
            all(&|run| run.led + run.judged + run.prepared + run.decided),
            all(&|run| run.cpu_start),
            median(&kind, |run| float(run.calls_start.values().sum::<u64>())),
            median(&kind, |run| float(run.received_start >> 10) * 1024.0 / MIB),
        ]
    });
    let mut text = table(
        &[
            "nodes",
            "start",
            "to leading, s",
            "to the verdict, s",
            "to all nodes prepared, s",
            "to the first step, s",
            "in all, s",
            "CPU, s",
            "requests",
            "received, MiB",
        ],
        rows,
    );
    text.push_str("\nAfter a kill, the dead coordinator's lease of 15 s has to run out first.\n");
    text
}
