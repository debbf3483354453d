//! A node's power is cut in each state of its migration. It comes back with one network, whole, its pods running and reached from
//! everywhere; and then it is migrated after all.

use std::{fs, time::Duration};

use flannel_migration_tests::{
    bed::{Bed, node},
    migration::checks,
    probe::Prober,
    run,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{
    bed, complete, expect_migrated,
    matrix::{Moment, back_to_flannel, begin, forget_failures, rest, rest_on, wait, whole},
    rollback::command,
    table::{Matrix, connected},
};

/// When the power is cut, and where the node comes to rest.
const IN_PLACE: [(Moment, &str); 10] = [
    (Moment("preparing", None, None), "flannel"),
    (Moment("prepared", None, None), "flannel"),
    (Moment("prepared", None, Some("none")), "flannel"),
    (Moment("switching", Some("swap-config"), None), "flannel"),
    (Moment("switching", Some("move-pods"), None), "flannel"),
    (Moment("verifying", None, None), "calico"),
    (Moment("verifying", None, Some("calico")), "calico"),
    (Moment("calico", None, None), "calico"),
    (Moment("reverting", None, None), "flannel"),
    (Moment("reverting", Some("!move-pods"), None), "flannel"),
];

/// What differs: the node is cordoned, and its pods are elsewhere.
const DRAIN: [(Moment, &str); 3] = [
    (Moment("prepared", None, Some("none")), "flannel"),
    (Moment("switching", Some("move-pods"), None), "flannel"),
    (Moment("verifying", None, Some("calico")), "calico"),
];

/// Cuts the power, and starts the node again. All nodes of a test bed share one kernel, which goes on: that it was booted anew is
/// put into the journal by hand.
fn cut_power(bed: &Bed, name: &str) {
    node::stop(bed, name).unwrap();
    let disk = bed.plan.node_directory(name).join("layers/var/lib/upper/cni/flannel-migration/journal.json");
    let mut entry: Value = serde_json::from_str(&fs::read_to_string(&disk).unwrap()).unwrap();
    assert!(entry["boot"].as_str().is_some_and(|boot| !boot.is_empty()), "{entry}");
    entry["boot"] = json!("the boot before");
    fs::write(&disk, entry.to_string()).unwrap();
    node::start(bed, bed.node(name).unwrap()).unwrap();
}

/// Meets `n1`, cuts its power, and looks at what becomes of it.
fn reboot_at(bed: &Bed, prober: &Prober, matrix: &Matrix, strategy: &str, moment: &Moment, end: &str) {
    let (_, at) = moment.reach(bed, "n1", strategy);
    matrix.reset();
    cut_power(bed, "n1");
    let network = rest(bed, "n1", Duration::from_mins(4));
    matrix.row("reboot", &at, &network, Some("n1"));
    assert_eq!(network, end, "{at}");
    whole(bed, "n1", &network);
    wait(bed, "the workloads are Ready", Duration::from_mins(2), || {
        Ok(!checks::pods(bed)?.iter().any(|wrong| wrong.contains("probe/")))
    });
    connected(prober, Duration::from_mins(2));
    if network == "calico" {
        back_to_flannel(bed, "n1");
        whole(bed, "n1", "flannel");
        connected(prober, Duration::from_mins(1));
    }
    forget_failures(bed, "n1");
}

#[test]
#[ignore = "takes eight minutes; hack/faults runs it"]
fn a_node_rebooted_in_any_state_comes_back_whole_and_is_migrated_after_all() {
    let scratch = bed("m-reboots", Shape { nodes: NodeShape::numbered(3), ..Shape::default() });
    let bed = &scratch.bed;
    let prober =
        begin(bed, "n3", &[("STRATEGY", "in-place"), ("MAX_FAILURES", "100"), ("NODE_BUDGET", "180s")]);
    // One other node is Calico's, and one is flannel's, all the while.
    command(bed, &["pause", "n1", "n3"]);
    command(bed, &["resume"]);
    rest_on(bed, "n2", "calico");
    let matrix = Matrix::new("m-reboots", &prober);
    for (strategy, moments) in [("in-place", &IN_PLACE[..]), ("drain", &DRAIN[..])] {
        for (moment, end) in moments {
            reboot_at(bed, &prober, &matrix, strategy, moment, end);
        }
    }
    command(bed, &["resume", "n1", "n3"]);
    complete(bed, Duration::from_mins(5));
    connected(&prober, Duration::from_mins(1));
    prober.stop().unwrap();
    // It ends while it can't reach the API server, and the kubelet waits longer before each further start.
    let rollout = ["-n", "kube-system", "rollout", "status", "deployment/calico-kube-controllers"];
    bed.kubectl(&[&rollout[..], &["--timeout=180s"]].concat()).unwrap();
    run::wait_for("no address is left over", Duration::from_mins(1), || Ok(checks::ipam(bed)?.is_empty()))
        .ok();
    // The administrator's own.
    bed.kubectl(&["annotate", "node", "n1", "flannel-migration/strategy-"]).unwrap();
    expect_migrated(bed);
}
