//! The combination of versions that every run tests beside the default: today's Calico, nftables throughout. The rest is
//! `hack/matrix`'s.

#![allow(clippy::panic, clippy::unwrap_used, reason = "all of it is tests")]

use std::path::Path;

use flannel_migration_tests::matrix::{self, NFTABLES};

#[test]
fn todays_calico_and_nftables_lose_nothing_there_and_back_and_leave_nothing() {
    let all = matrix::combinations();
    let combination = all.iter().find(|one| one.name == NFTABLES).unwrap();
    if let Err(error) = combination.shape.versions.resolve() {
        // Its source is in no registry: hack/test has said so too.
        eprintln!("left out: {error:#}");
        return;
    }
    let outcome = matrix::run(combination, Path::new(env!("CARGO_BIN_EXE_testbed"))).unwrap();
    eprintln!("{}", outcome.migration.table());
    assert!(outcome.broken().is_empty(), "{}", outcome.broken().join("\n"));
    assert!(outcome.migration.changed_pods.is_empty());
    assert_eq!(outcome.migration.nodes.len(), 2);
}
