//! Traffic, writes and what is left behind.

use std::{collections::BTreeMap, fmt::Write as _};

use super::Kept;
use crate::{
    bench::{
        audit,
        sides::{Figures, Side},
        stats::{Spread, float, shown},
    },
    probe::{Kind, Report, report::KindReport},
};

/// The longest gap on any flow of a run, in milliseconds.
pub fn longest_gap(run: &Figures) -> f64 {
    longest(&run.traffic, |_| true)
}

/// The same without what the prober itself was late by: its interval, and its latest tick.
pub fn beyond_resolution(run: &Figures) -> f64 {
    beyond(&run.traffic, |_| true)
}

/// The same of the flows for which no program has to run.
pub fn beyond_of_kernels(run: &Figures) -> f64 {
    beyond(&run.traffic, by_kernel)
}

/// Which kinds of flows count.
type Counts = fn(Kind) -> bool;

fn longest(traffic: &Report, counts: Counts) -> f64 {
    let gaps = traffic.kinds.iter().filter(|kind| counts(kind.kind)).map(|kind| kind.figures.longest_gap_ms);
    gaps.fold(0.0, f64::max)
}

fn beyond(traffic: &Report, counts: Counts) -> f64 {
    (longest(traffic, counts) - traffic.interval_ms - traffic.prober.max_late_ms).max(0.0)
}

/// Whether the kernels answer, and no program has to run.
const fn by_kernel(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::PodToPodOtherNode | Kind::PodToPodSameNode | Kind::HostToOwnPod | Kind::HostToOtherPod
    )
}

/// The same gaps beside those of calico-node's start alone.
pub fn floor(kept: &Kept) -> String {
    let mut rows = Vec::new();
    for side in [Side::InPlace, Side::InPlaceAll] {
        let floors = || kept.of(side).filter_map(|run| run.floor.as_ref());
        let kinds: [(&str, Counts); 2] =
            [("answered by kernels (ICMP)", by_kernel), ("answered by programs", |kind| !by_kernel(kind))];
        for (name, counts) in kinds {
            rows.push(vec![
                format!("{}: {name}", side.title()),
                shown(kept.of(side).map(|run| beyond(&run.traffic, counts))),
                shown(floors().map(|floor| beyond(&floor.traffic, counts))),
            ]);
        }
        rows.push(vec![
            format!("{}: seconds", side.title()),
            shown(kept.node_times(side)),
            shown(floors().flat_map(|floor| floor.seconds.iter().copied())),
        ]);
    }
    let mut text = super::table(
        &["longest gap beyond the prober's resolution, ms", "migration", "calico-node's start alone"],
        rows,
    );
    text.push_str(
        "\nFor the second column calico-node's pods are deleted on the migrated cluster, one node after another or all at once, and \
         become ready again, with the same traffic and nothing of ours at work.\n",
    );
    text
}

/// Long-lived connections that were opened again, or that never answered again in time.
pub fn broken(run: &Figures) -> f64 {
    let held = [Kind::LongLivedOtherNode, Kind::LongLivedSameNode];
    let flows = run.traffic.flows.iter().filter(|flow| held.contains(&flow.kind));
    float(flows.filter(|flow| flow.figures.reconnects > 0 || flow.figures.lost > 0).count())
}

fn word(kind: Kind) -> String {
    serde_json::to_value(kind).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Lost probes and longest gaps by kind of flow.
pub fn table(kept: &Kept) -> String {
    let mut kinds: Vec<Kind> =
        kept.sides.iter().flat_map(|run| run.traffic.kinds.iter().map(|kind| kind.kind)).collect();
    kinds.sort();
    kinds.dedup();
    let rows = kinds.into_iter().map(|kind| {
        let of = |side: Side, quantity: &dyn Fn(&KindReport) -> f64| {
            shown(kept.of(side).filter_map(|run| run.traffic.kind(kind)).map(quantity))
        };
        let mut row = vec![word(kind)];
        for side in Side::ALL {
            row.push(of(side, &|report| {
                float(report.figures.lost) * 100.0 / float(report.figures.sent.max(1))
            }));
            row.push(of(side, &|report| report.figures.longest_gap_ms));
        }
        row
    });
    let heads =
        Side::ALL.iter().flat_map(|side| [format!("{}: lost, %", side.title()), "gap, ms".to_owned()]);
    let heads: Vec<String> = [String::new()].into_iter().chain(heads).collect();
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    let mut text = super::table(&heads, rows);
    let late = shown(kept.sides.iter().map(|run| run.traffic.prober.max_late_ms));
    let [one, all] =
        [Side::InPlace, Side::InPlaceAll].map(|side| shown(kept.of(side).map(beyond_resolution)));
    let _ = writeln!(
        text,
        "\nThe prober's own latest tick was {late} ms: what is longer than that and its interval of 10 ms is the network's, or that of \
         programs that wait for a processor. In place: {one} ms, all at once: {all} ms."
    );
    text
}

/// Writes by account, and what they were.
pub fn writes(kept: &Kept) -> String {
    let mut text = String::from(
        "By the API server's audit log, from the manifests to the end, divided by the number of nodes. Without events, access reviews, trials and \
         leadership.\n\n",
    );
    let mut all: BTreeMap<(String, String), BTreeMap<Side, Vec<f64>>> = BTreeMap::new();
    for run in &kept.sides {
        let nodes = float(run.history.len().max(1));
        for (account, calls) in &run.calls {
            for (call, count) in
                calls.iter().filter(|(call, _)| audit::is_write(call) && !call.ends_with(" leases"))
            {
                let key = (account.clone(), call.clone());
                all.entry(key).or_default().entry(run.side).or_default().push(float(*count) / nodes);
            }
        }
    }
    let rows = all.iter().map(|((account, call), sides)| {
        let cell = |side: &Side| {
            sides.get(side).map_or_else(|| "-".to_owned(), |values| shown(values.iter().copied()))
        };
        [vec![format!("{account}: {call}")], Side::ALL.iter().map(cell).collect()].concat()
    });
    let mut heads = vec!["per node"];
    heads.extend(Side::ALL.iter().map(|side| side.title()));
    text.push_str(&super::table(&heads, rows));
    text
}

/// What is left on nodes and in the API after the last run of each side.
pub fn leftovers(kept: &Kept) -> String {
    let mut text = String::new();
    for side in Side::ALL {
        let Some(run) = kept.of(side).last() else { continue };
        let per_node = Spread::of(kept.of(side).map(|run| float(run.on_nodes.len())))
            .map_or(0.0, |spread| spread.median);
        let _ = writeln!(
            text,
            "- {}: {per_node} lines on all nodes together, {} of flannel's objects in the API.",
            side.title(),
            run.in_api.len()
        );
        let mut things: BTreeMap<String, usize> = BTreeMap::new();
        for line in &run.on_nodes {
            // Without the node, and without addresses that differ.
            let thing = line.split_once(": ").map_or(line.as_str(), |(_, thing)| thing);
            let kind = thing.split_once(": ").map_or(thing, |(kind, _)| kind);
            *things.entry(kind.to_owned()).or_default() += 1;
        }
        for (thing, count) in things {
            let _ = writeln!(text, "  - {thing}: {count}");
        }
    }
    text
}
