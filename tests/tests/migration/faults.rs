//! What goes wrong around the migration: a Calico that doesn't start, an API server that is down, a flannel that is put back, keys that are
//! edited by hand. One cluster for all of it; each ends with traffic flowing, and the run goes on.

use std::time::Duration;

use flannel_migration_tests::{
    bed::{Bed, control, flannel},
    migration::{self, LEASE_LABEL, NETWORK_LABEL, STATE_LABEL},
    probe::{Options, Prober, Workloads, deploy_to},
    run,
    shape::{NodeShape, Shape},
};
use serde_json::json;

use super::{
    bed, complete, expect_migrated, label, look, moment,
    rollback::{command, expect_connected},
};

/// How long the API server is down; 90 s when every fault is asked for.
pub fn outage() -> Duration {
    Duration::from_secs(if std::env::var_os("FAULTS").is_some() { 90 } else { 15 })
}

pub fn wait(bed: &Bed, what: &str, limit: Duration, holds: impl FnMut() -> anyhow::Result<bool>) {
    run::wait_for(what, limit, holds)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", migration::coordinator_log(bed).unwrap_or_default()));
}

fn set_calico_command(bed: &Bed, command: Option<&str>) {
    let patch = json!([match command {
        Some(command) =>
            json!({ "op": "add", "path": "/spec/template/spec/containers/0/command", "value": [command] }),
        None => json!({ "op": "remove", "path": "/spec/template/spec/containers/0/command" }),
    }]);
    bed.kubectl(&[
        "-n",
        "kube-system",
        "patch",
        "daemonset",
        "calico-node",
        "--type=json",
        "-p",
        &patch.to_string(),
    ])
    .unwrap();
    // The rollout would wait for a pod that can't become ready.
    let selector = "k8s-app=calico-node";
    bed.kubectl(&["-n", "kube-system", "delete", "pods", "-l", selector, "--wait=false"]).unwrap();
}

#[test]
#[ignore = "takes four minutes; hack/faults runs it"]
fn faults_around_a_migration_have_their_documented_outcome_and_the_run_goes_on() {
    let scratch = bed("m-faults", Shape { nodes: NodeShape::numbered(3), ..Shape::default() });
    let bed = &scratch.bed;
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    let prober = Prober::start(
        bed.site().unwrap(),
        Options { interval: Duration::from_millis(50), ..Options::default() },
    )
    .unwrap();

    calico_that_does_not_start(bed, &prober);
    api_server_that_is_down(bed, &prober);
    flannel_that_is_put_back(bed, &prober);

    // After an outage Kubernetes' own controllers take their time until they see again that a DaemonSet is there or gone: five minutes
    // at most.
    complete(bed, Duration::from_mins(6));
    expect_connected(&prober);
    prober.stop().unwrap();
    expect_migrated(bed);
}

/// The node reverts by itself within its budget, no other is started, and it is tried again when there is a Calico.
fn calico_that_does_not_start(bed: &Bed, prober: &Prober) {
    set_calico_command(bed, Some("/nonexistent"));
    // The coordinator's own node is the last one.
    migration::apply_with(bed, &[("STRATEGY", "in-place"), ("NODE_BUDGET", "30s")], |job| {
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = json!("n3");
    })
    .unwrap();
    let failures =
        |node: &str| look(bed, node)["metadata"]["annotations"]["flannel-migration/failures"].clone();
    wait(bed, "n1 is given back", Duration::from_mins(2), || Ok(failures("n1").is_string()));
    let noted = failures("n1").as_str().unwrap().to_owned();
    assert!(noted.contains("BudgetExceeded") && noted.contains(r#""touched":true"#), "{noted}");
    expect_connected(prober);
    for node in ["n2", "n3"] {
        let node = look(bed, node);
        assert!(label(&node, LEASE_LABEL).is_empty() && label(&node, STATE_LABEL) == "flannel", "{node}");
    }
    // A key edited by hand: its writer corrects its own.
    bed.kubectl(&["label", "node", "n2", "--overwrite", &format!("{STATE_LABEL}=nonsense")]).unwrap();
    wait(bed, "the agent corrects its label", Duration::from_secs(30), || {
        Ok(label(&look(bed, "n2"), STATE_LABEL) == "flannel")
    });
    set_calico_command(bed, None);
    wait(bed, "n1 is migrated after all", Duration::from_mins(2), || {
        let now = look(bed, "n1");
        Ok(label(&now, STATE_LABEL) == "calico" && label(&now, LEASE_LABEL).is_empty())
    });
}

/// What has begun ends without it; the next step comes when it is back.
fn api_server_that_is_down(bed: &Bed, prober: &Prober) {
    moment(bed, "n2", &["prepared", "switching", "verifying"]);
    command(bed, &["pause"]);
    control::stop_apiserver(bed).unwrap();
    // Nothing to wait on: the time itself is the fault.
    std::thread::sleep(outage());
    let lost = prober.report().unwrap();
    eprintln!("m-faults: API server down for {:?}:\n{}", outage(), lost.table());
    control::start_apiserver(bed).unwrap();
    control::wait(bed).unwrap();
    wait(bed, "n2 is at rest", Duration::from_mins(3), || {
        let now = look(bed, "n2");
        Ok(label(&now, LEASE_LABEL).is_empty()
            && ["calico", "flannel"].contains(&label(&now, STATE_LABEL).as_str()))
    });
    expect_connected(prober);
}

/// Whether flannel's pods follow the network label.
pub fn tied(bed: &Bed) -> anyhow::Result<bool> {
    let (namespace, name) = flannel::daemonset(&bed.shape);
    let set = bed.get(&["-n", namespace, "daemonset", name])?;
    Ok(set["spec"]["template"]["spec"]["nodeSelector"][NETWORK_LABEL] == "flannel")
}

/// As somebody would in mid-run.
pub fn reinstall_flannel(bed: &Bed) {
    let (namespace, name) = flannel::daemonset(&bed.shape);
    bed.kubectl(&["-n", namespace, "delete", "daemonset", name]).unwrap();
    bed.apply(&flannel::manifest(&bed.parts, &bed.shape).unwrap()).unwrap();
    wait(bed, "flannel is tied to the label again", Duration::from_mins(1), || tied(bed));
}

/// Somebody installs flannel again in mid-run: its pods are tied to the label again, and migrated nodes stay Calico's.
fn flannel_that_is_put_back(bed: &Bed, prober: &Prober) {
    reinstall_flannel(bed);
    wait(bed, "n1 has nothing of flannel's", Duration::from_mins(1), || {
        let left = bed.exec("n1", &["sh", "-c", "ls /etc/cni/net.d; ip -o link show type vxlan"])?;
        Ok(!left.contains("flannel"))
    });
    expect_connected(prober);
    command(bed, &["resume"]);
}
