//! What `hack/demo` shows, as tests: a whole cluster migrated under traffic, by both strategies.

#![allow(clippy::panic, clippy::unwrap_used, reason = "all of it is tests")]

use std::time::Duration;

use flannel_migration_tests::{
    bed::Bed,
    migration::{self, Outcome, Request},
    scratch::Scratch,
    shape::Shape,
};

fn migrate(bed: &Bed, strategy: &str, max_unavailable: &str) -> Outcome {
    bed.load_project_images().unwrap();
    let request = Request {
        strategy,
        max_unavailable,
        pods_per_node: None,
        interval: Duration::from_millis(20),
        limit: Duration::from_mins(6),
    };
    let outcome = migration::run(bed, &request, |line| eprintln!("{line}")).unwrap();
    eprintln!("{}", outcome.table());
    outcome
}

#[test]
fn a_drained_cluster_is_migrated_and_nodes_that_are_not_changing_lose_nothing() {
    let scratch = Scratch::up("t-drain", Shape::default(), env!("CARGO_BIN_EXE_testbed")).unwrap();
    let outcome = migrate(&scratch.bed, "drain", "1");
    assert!(outcome.kept(), "{}", outcome.table());
    assert_eq!(outcome.nodes.len(), 3);
}

#[test]
fn a_cluster_is_migrated_in_place_without_replacing_a_pod_or_breaking_a_connection() {
    let scratch = Scratch::up("t-place", Shape::default(), env!("CARGO_BIN_EXE_testbed")).unwrap();
    let outcome = migrate(&scratch.bed, "in-place", "100%");
    assert!(outcome.kept() && outcome.changed_pods.is_empty(), "{}", outcome.table());
}
