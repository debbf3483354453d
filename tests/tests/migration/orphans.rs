//! flannel's pods that no DaemonSet has any more, where Kubernetes doesn't end them.

use std::time::Duration;

use flannel_migration_tests::{
    bed::{control, flannel},
    migration::{self, PAUSE_LABEL, STATE_LABEL},
    probe::{Options, Prober, Workloads, deploy_to},
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{
    bed, complete, expect_migrated,
    faults::{reinstall_flannel, tied, wait},
    label, look,
    rollback::expect_connected,
};

#[test]
fn flannels_pod_that_its_deleted_daemonset_left_behind_is_ended_where_nobody_else_ends_it() {
    let scratch = bed("m-orphan", Shape { nodes: NodeShape::numbered(2), ..Shape::default() });
    let bed = &scratch.bed;
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    let options = Options { interval: Duration::from_millis(50), ..Options::default() };
    let prober = Prober::start(bed.site().unwrap(), options).unwrap();
    bed.kubectl(&["label", "nodes", "--all", &format!("{PAUSE_LABEL}=")]).unwrap();
    migration::apply_with(bed, &[], |job| {
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = json!("n2");
    })
    .unwrap();
    let (namespace, name) = flannel::daemonset(&bed.shape);
    wait(bed, "the migration is prepared", Duration::from_mins(2), || {
        Ok(tied(bed)? && label(&look(bed, "n1"), STATE_LABEL) == "flannel")
    });

    control::stop_controllers(bed).unwrap();
    reinstall_flannel(bed);
    let flannels = || -> anyhow::Result<usize> {
        let pods = bed.get(&["-n", namespace, "pods", "--field-selector=spec.nodeName=n1"])?;
        let of_set = |pod: &&Value| pod["metadata"]["ownerReferences"][0]["name"] == name;
        Ok(pods["items"].as_array().map_or(0, |pods| pods.iter().filter(of_set).count()))
    };
    assert_eq!(flannels().unwrap(), 1, "nobody has ended the pod of the deleted DaemonSet");
    bed.kubectl(&["label", "node", "n1", &format!("{PAUSE_LABEL}-")]).unwrap();
    wait(bed, "n1 is switched", Duration::from_secs(90), || {
        Ok(label(&look(bed, "n1"), STATE_LABEL) == "verifying")
    });
    wait(bed, "flannel's pod is gone from n1", Duration::from_mins(1), || Ok(flannels()? == 0));
    let log = migration::coordinator_log(bed).unwrap();
    assert!(log.contains("its DaemonSet is gone: deleted"), "{log}");

    control::start_controllers(bed).unwrap();
    bed.kubectl(&["label", "node", "n2", &format!("{PAUSE_LABEL}-")]).unwrap();
    complete(bed, Duration::from_mins(3));
    expect_connected(&prober);
    prober.stop().unwrap();
    expect_migrated(bed);
}
