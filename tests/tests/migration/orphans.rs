//! flannel's pods that no DaemonSet has any more, where Kubernetes doesn't end them.

use std::time::Duration;

use flannel_migration_tests::{
    bed::{control, flannel},
    migration::{self, NETWORK_LABEL, STATE_LABEL},
    probe::{Options, Prober, Workloads, deploy_to},
    run,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{bed, complete, expect_migrated, label, look, rollback::expect_connected};

const PAUSE: &str = "flannel-migration/pause";

#[test]
fn flannels_pod_that_its_deleted_daemonset_left_behind_is_ended_where_nobody_else_ends_it() {
    let scratch = bed("m-orphan", Shape { nodes: NodeShape::numbered(2), ..Shape::default() });
    let bed = &scratch.bed;
    deploy_to(&bed.plan.kubeconfig(), &Workloads::default(), Duration::from_mins(2)).unwrap();
    let options = Options { interval: Duration::from_millis(50), ..Options::default() };
    let prober = Prober::start(bed.site().unwrap(), options).unwrap();
    let wait = |what: &str, limit: u64, holds: &mut dyn FnMut() -> anyhow::Result<bool>| {
        run::wait_for(what, Duration::from_secs(limit), holds).unwrap_or_else(|error| {
            panic!("{error:#}\n{}", migration::coordinator_log(bed).unwrap_or_default())
        });
    };
    bed.kubectl(&["label", "nodes", "--all", &format!("{PAUSE}=")]).unwrap();
    migration::apply_with(bed, &[], |job| {
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = json!("n2");
    })
    .unwrap();
    let (namespace, name) = flannel::daemonset(&bed.shape);
    let tied = || -> anyhow::Result<bool> {
        let set = bed.get(&["-n", namespace, "daemonset", name])?;
        let selector = &set["spec"]["template"]["spec"]["nodeSelector"];
        Ok(selector[NETWORK_LABEL] == "flannel" && label(&look(bed, "n1"), STATE_LABEL) == "flannel")
    };
    wait("the migration is prepared", 120, &mut || tied());

    control::stop_controllers(bed).unwrap();
    bed.kubectl(&["-n", namespace, "delete", "daemonset", name]).unwrap();
    bed.apply(&flannel::manifest(&bed.parts, &bed.shape).unwrap()).unwrap();
    wait("the new DaemonSet is tied to the label", 60, &mut || tied());
    let flannels = || -> anyhow::Result<usize> {
        let pods = bed.get(&["-n", namespace, "pods", "--field-selector=spec.nodeName=n1"])?;
        let of_set = |pod: &&Value| pod["metadata"]["ownerReferences"][0]["name"] == name;
        Ok(pods["items"].as_array().map_or(0, |pods| pods.iter().filter(of_set).count()))
    };
    assert_eq!(flannels().unwrap(), 1, "nobody has ended the pod of the deleted DaemonSet");
    bed.kubectl(&["label", "node", "n1", &format!("{PAUSE}-")]).unwrap();
    wait("n1 is switched", 90, &mut || Ok(label(&look(bed, "n1"), STATE_LABEL) == "verifying"));
    wait("flannel's pod is gone from n1", 60, &mut || Ok(flannels()? == 0));
    let log = migration::coordinator_log(bed).unwrap();
    assert!(log.contains("its DaemonSet is gone: deleted"), "{log}");

    control::start_controllers(bed).unwrap();
    bed.kubectl(&["label", "node", "n2", &format!("{PAUSE}-")]).unwrap();
    complete(bed, Duration::from_mins(3));
    expect_connected(&prober);
    prober.stop().unwrap();
    expect_migrated(bed);
}
