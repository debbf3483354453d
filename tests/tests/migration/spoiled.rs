//! A Calico that is spoiled when a node has its lease already, and a node that is deleted in mid-run: traffic flows, and the run goes on.

use std::time::Duration;

use flannel_migration_tests::{
    bed::Bed,
    migration::{LEASE_LABEL, checks},
    probe::{Options, Prober},
    run,
    scratch::Scratch,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{
    bed, complete, expect_migrated, label, look,
    matrix::{back_to_flannel, begin, meet, rest_on, wait},
    rollback::{command, expect_connected},
    table::Matrix,
};

const CALICO: [&str; 4] = ["-n", "kube-system", "daemonset", "calico-node"];
const CONFIG: [&str; 4] = ["-n", "kube-system", "configmap", "calico-config"];

fn patch(bed: &Bed, object: [&str; 4], patch: &Value) {
    let [flag, namespace, kind, name] = object;
    let patch = patch.to_string();
    bed.kubectl(&[flag, namespace, "patch", kind, name, "--type=json", "-p", &patch]).unwrap();
}

fn failures(bed: &Bed, node: &str) -> Value {
    look(bed, node)["metadata"]["annotations"]["flannel-migration/failures"].clone()
}

/// Waits until an attempt has failed after the node was changed, and the node is flannel's again.
fn reverted(bed: &Bed, node: &str) {
    wait(bed, &format!("{node} is given back"), Duration::from_mins(2), || {
        Ok(failures(bed, node).is_string())
    });
    let noted = failures(bed, node).as_str().unwrap().to_owned();
    assert!(noted.contains("BudgetExceeded") && noted.contains(r#""touched":true"#), "{noted}");
    rest_on(bed, node, "flannel");
}

#[test]
#[ignore = "takes four minutes; hack/faults runs it"]
fn a_calico_that_is_spoiled_and_a_node_that_is_deleted_stop_neither_traffic_nor_the_run() {
    let mut scratch = bed("m-spoiled", Shape { nodes: NodeShape::numbered(3), ..Shape::default() });
    let bed = &scratch.bed;
    // The coordinator's own node is the last one.
    let prober = begin(bed, "n3", &[("STRATEGY", "in-place"), ("NODE_BUDGET", "30s")]);
    let matrix = Matrix::new("m-spoiled", &prober);
    command(bed, &["pause", "n1", "n2", "n3"]);
    command(bed, &["resume"]);
    let image = "/spec/template/spec/containers/0/image";
    let unpullable = json!("registry.invalid/calico/node:v0");
    calico_spoiled(bed, &matrix, CALICO, image, &unpullable, "calico-node's image can't be pulled");
    let template = "/data/cni_network_config";
    calico_spoiled(bed, &matrix, CONFIG, template, &json!("{"), "CNI template that is no JSON");
    prober.stop().unwrap();
    node_that_is_deleted(&mut scratch);
    let bed = &scratch.bed;
    let options = Options { interval: Duration::from_millis(20), ..Options::default() };
    let prober = Prober::start(bed.site().unwrap(), options).unwrap();
    expect_connected(&prober);
    prober.stop().unwrap();
    expect_migrated(bed);
}

/// Something of Calico's is made unusable when the node has its lease already.
fn calico_spoiled(bed: &Bed, matrix: &Matrix, object: [&str; 4], path: &str, value: &Value, fault: &str) {
    let good = bed.get(&object).unwrap().pointer(path).unwrap().clone();
    let met = meet(bed, "n1", "prepared", None);
    matrix.reset();
    patch(bed, object, &json!([{ "op": "replace", "path": path, "value": value }]));
    met.go_on();
    reverted(bed, "n1");
    matrix.expect_connected();
    patch(bed, object, &json!([{ "op": "replace", "path": path, "value": good }]));
    rest_on(bed, "n1", "calico");
    matrix.expect_connected();
    matrix.row(fault, &met.at, "reverted; migrated when it is repaired", None);
    if object == CALICO {
        back_to_flannel(bed, "n1");
    }
}

/// It holds its lease, is switched off and deleted: its slot is free, and the others go on to the end.
fn node_that_is_deleted(scratch: &mut Scratch) {
    let met = meet(&scratch.bed, "n2", "verifying", None);
    assert!(!label(&look(&scratch.bed, "n2"), LEASE_LABEL).is_empty());
    scratch.bed.remove_node("n2").unwrap();
    command(&scratch.bed, &["resume", "n3"]);
    let took = complete(&scratch.bed, Duration::from_mins(4));
    let took = took.as_secs();
    eprintln!(
        "| m-spoiled | node switched off and deleted | {} | the others completed, {took} s | |",
        met.at
    );
    // Kubernetes waits for about a minute before it makes the pods of a node that is gone anew.
    run::wait_for("the node's pods are made anew, and Calico forgets it", Duration::from_mins(3), || {
        Ok(checks::pods(&scratch.bed)?.is_empty() && checks::ipam(&scratch.bed)?.is_empty())
    })
    .ok();
}
