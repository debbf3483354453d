//! Every finding of preflight on a real API server: what produces it, that it is the only one, and that its remedy clears it.
//!
//! The API server has all its controllers and no kubelets: nodes are objects, and nothing runs there.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests"
)]

#[path = "preflight/calico.rs"]
mod calico;
#[path = "preflight/cluster.rs"]
mod cluster;
#[path = "preflight/flannel.rs"]
mod flannel;
#[path = "preflight/nodes.rs"]
mod nodes;
#[path = "preflight/settings.rs"]
mod settings;
#[path = "preflight/world.rs"]
mod world;

use std::{collections::BTreeSet, time::Instant};

use world::World;

/// Findings that no test bed's API server can be made to give, and where they are tested instead.
const ELSEWHERE: &[(&str, &str)] = &[
    ("ApiServerTooOld", "the test bed's API server is new; the rule is tested on its version"),
    ("JoinedNodeIncomplete", "only a node that joins in mid-run gives it"),
];

/// Reasons in the README's table of findings.
fn listed() -> BTreeSet<String> {
    include_str!("../../README.md")
        .split("\n## Findings\n")
        .nth(1)
        .expect("the README has a section Findings")
        .split("\n## ")
        .next()
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next().map(str::to_owned))
        .collect()
}

#[test]
fn every_finding_is_produced_and_cleared_by_its_remedy_and_nothing_is_written() {
    let began = Instant::now();
    let mut world = World::new("m-preflight");
    world.expect_clear();
    eprintln!("m-preflight: clear after {:.1} s", began.elapsed().as_secs_f32());
    flannel::all(&mut world);
    calico::all(&mut world);
    nodes::all(&mut world);
    cluster::all(&mut world);
    settings::all(&mut world);
    world.expect_nothing_written();
    eprintln!("m-preflight: {} looks in {:.1} s", world.looks, began.elapsed().as_secs_f32());

    let elsewhere: BTreeSet<String> = ELSEWHERE.iter().map(|(reason, _)| (*reason).to_owned()).collect();
    let produced: BTreeSet<String> = world.produced.union(&elsewhere).cloned().collect();
    assert_eq!(listed(), produced, "the README's findings, and those that were produced here");
}
