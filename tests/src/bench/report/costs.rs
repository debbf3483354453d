//! What coordinator and agent cost.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Kept, rolls, table};
use crate::bench::{
    rest, scale,
    stats::{Spread, float, number, shown},
    svg::Bar,
};

pub(super) const MIB: f64 = 1_048_576.0;

/// How the table of rolls is to be read.
const ROLLING: &str = "\nWaits are the coordinator's: how often it had nothing to do until the next answer or change. With one at a time, where every node's way \
is the same, its requests, bytes and waits per node are to be compared; what a wake-up costs differs from one run of the same cluster to the next as the wall time does, \
with the machine's speed. Where agents wait, each answer comes alone, and the status that is told every some seconds counts for fewer nodes; that of 5,000 nodes is \
too large for a ConfigMap and is told without them.\n";

/// What was changed in the coordinator.
const SCALE_BEFORE: &str = "\nBefore, at 5,000 nodes: 5.9 s to the verdict, 322 s to all nodes prepared, 737 ms of processor time per node with one at a time, \
206 MiB resident. What was slow then: a waiting node named all nodes in its way, so that the status grew by the square of the nodes (now five are \
named); the roll looked at all nodes at each change of one, without a pause (now it rests nineteen times as long as a look took); each look copied what isn't \
kept; labels were written one by one. Then, with 500 nodes at a \
time, 102 MiB, 27.9 requests and 6.4 ms of processor time per node: calls were under way without bound (now 32 at a time). Then 84 MiB: nodes that \
waited to write their pods' addresses held them (now eight have their turn), events that are told once were remembered, every node was held twice during the \
preparation; and 7 reads of its node for each: each step read it again (now what is known is tried first). Until then the coordinator of the test bed was \
measured, which is hardly optimised. Then 2.3, 3.1 and 3.1 ms per node at 100, 1,000 and 5,000 nodes with ten at a time, and 3.8, 3.5 and 9.0 ms with one: each change of a \
node was a look at all of them, and an own write that came back through the watch was one (now what has changed is judged again).\n";

/// What was changed in the agent's switch.
const SWITCH_BEFORE: &str = "\nBefore, on the machine of the first report: 227, 193, 238 and 434 ms with 1, 10, 50 and 110 pods. What was slow then: each \
operation was noted twice, durably; the detour's rules went through four starts of `nft`; bridge and detour were deleted one after the other, and for each the \
kernel waits until nobody uses it; settings were written file by file; links were listed nine times with all their counters; pods' namespaces were \
entered one by one.\n";

/// The switch's time by number of pods.
pub fn switch_bars(kept: &Kept) -> Vec<Bar> {
    let mut by_pods: BTreeMap<u8, Vec<f64>> = BTreeMap::new();
    for figures in &kept.switch {
        by_pods.entry(figures.pods).or_default().push(figures.total);
    }
    let bar = |(pods, totals): (u8, Vec<f64>)| {
        Some(Bar { name: format!("{pods} pods"), spread: Spread::of(totals)? })
    };
    by_pods.into_iter().filter_map(bar).collect()
}

/// All sections.
pub fn text(kept: &Kept) -> String {
    let mut text = format!(
        "\n## The coordinator in big clusters\n\n\
         A real etcd and API server, nodes as objects (with 20 images each in their status), simulated agents that decide by the agent's own code and \
         write as it does, with nothing to do on a host; {} adopted pods and one block of Calico's per node; strategy `in-place`; \
         the coordinator's release build. Several coordinators one after another in each cluster: each but the first starts after a `kill -9` in the middle of the roll, and is measured \
         when as many nodes are through as are in change at once. All of it on one machine: times contain that API server, agents and coordinator wait for each other's processor.\n\n",
        scale::PODS
    );
    text.push_str(&rolls::rolling(&kept.scale));
    text.push_str(ROLLING);
    text.push_str("\n![Processor time per node](bench-scale.svg)\n\n### Start and restart\n\n");
    text.push_str(&rolls::starting(&kept.scale));
    text.push_str(SCALE_BEFORE);
    text.push_str("\n## The agent\n\n### The switch by number of pods\n\n");
    text.push_str(
        "The agent's own operations on real devices in network namespaces, journal included, without kubelet, flanneld and Felix. What moves pods \
         is netlink alone: the operations `prepare-pods`, `route-pods` and `move-pods` are the floor.\n\n",
    );
    text.push_str(&switching(kept));
    text.push_str(SWITCH_BEFORE);
    text.push_str("\n![The switch](bench-switch.svg)\n\n### At rest\n\n");
    text.push_str(&resting(kept));
    text.push_str("\n## The images\n\n");
    text.push_str(&sizes(kept));
    text
}

fn sizes(kept: &Kept) -> String {
    if kept.images.is_empty() {
        return "Not measured.\n".to_owned();
    }
    let rows = kept
        .images
        .iter()
        .map(|image| vec![image.name.clone(), number(mb(image.compressed)), number(mb(image.uncompressed))]);
    let mut text = table(&["", "compressed, MB", "unpacked, MB"], rows);
    text.push_str(
        "\nBuilt from the Dockerfile with the release profile, on a Debian made by `mmdebstrap` of what the official slim image holds; compressed is \
         the sum of the layers as a registry holds them.\n",
    );
    text
}

/// Millions of bytes.
pub fn mb(bytes: u64) -> f64 {
    float(bytes / 1000) / 1000.0
}

fn switching(kept: &Kept) -> String {
    let mut by_pods: BTreeMap<u8, Vec<_>> = BTreeMap::new();
    for figures in &kept.switch {
        by_pods.entry(figures.pods).or_default().push(figures);
    }
    let names: Vec<String> = kept
        .switch
        .first()
        .map(|figures| figures.operations.iter().map(|(name, _)| name.clone()).collect())
        .unwrap_or_default();
    let mut heads = vec!["pods", "all, ms"];
    heads.extend(names.iter().map(String::as_str));
    heads.push("the way back, ms");
    let rows = by_pods.into_iter().map(|(pods, runs)| {
        let operation = |name: &String| {
            let times = runs.iter().flat_map(|run| run.operations.iter().filter(|(of, _)| of == name));
            Spread::of(times.map(|(_, time)| *time))
                .map_or_else(|| "-".to_owned(), |spread| number(spread.median))
        };
        let mut row = vec![pods.to_string(), shown(runs.iter().map(|run| run.total))];
        row.extend(names.iter().map(operation));
        row.push(shown(runs.iter().map(|run| run.undo)));
        row
    });
    table(&heads, rows)
}

fn resting(kept: &Kept) -> String {
    let mut text = String::new();
    let Some(last) = kept.rest.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds)) else {
        return "Not measured.\n".to_owned();
    };
    let mib = |bytes: u64| number(float(bytes >> 10) * 1024.0 / MIB);
    let _ = writeln!(
        text,
        "The real program on a node that waits for its lease: {} ms from its start to its first word on the Node, then {} MiB resident (peak {} \
         MiB), and {} s of processor time in {} s.",
        shown(kept.rest.iter().map(|figures: &rest::Figures| figures.start)),
        mib(last.usage.resident),
        mib(last.usage.peak),
        number(last.cpu),
        number(last.seconds),
    );
    text
}
