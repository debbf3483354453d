//! In place where nothing else could: a lone node that is full and whose budgets forbid every eviction; and what its pods live through
//! afterwards.

use std::{collections::BTreeSet, time::Duration};

use flannel_migration_tests::{
    bed::{Bed, node},
    migration::{self, Outcome, Request, pods},
    probe::{
        Options, Prober, Report,
        workload::{IMAGE, NAMESPACE},
    },
    run,
    scratch::Scratch,
    shape::{NodeShape, Shape},
};
use serde_json::{Value, json};

use super::{TESTBED, expect_migrated, items};

/// A budget that forbids every eviction of the workloads.
fn forbid_evictions(bed: &Bed) {
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    let budget = json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": { "name": "never", "namespace": NAMESPACE },
        "spec": { "maxUnavailable": 0, "selector": {} },
    });
    bed.apply(&[namespace, budget]).unwrap();
}

fn migrate(bed: &Bed, pods_per_node: u32) -> Outcome {
    let request = Request {
        strategy: "in-place",
        max_unavailable: "1",
        pods_per_node: Some(pods_per_node),
        interval: Duration::from_millis(10),
        limit: Duration::from_mins(4),
    };
    let outcome = migration::run(bed, &request, |line| eprintln!("{line}")).unwrap();
    eprintln!("{}", outcome.table());
    outcome
}

fn patient() -> Options {
    Options { timeout: migration::PATIENCE, ..Options::default() }
}

/// Probes everything for a while: nothing may be lost.
fn expect_traffic(bed: &Bed, when: &str) {
    let prober = Prober::start(bed.site().unwrap(), patient()).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    expect_nothing_lost(&prober.stop().unwrap(), when);
}

fn expect_nothing_lost(report: &Report, when: &str) {
    for flow in &report.flows {
        assert!(flow.figures.sent > 0 && flow.figures.lost == 0, "{when}: {flow:?}");
        assert_eq!(flow.figures.reconnects, 0, "{when}: {flow:?}");
    }
}

fn running(bed: &Bed) -> Vec<Value> {
    let pods = items(&bed.get(&["pods", "-n", NAMESPACE]).unwrap());
    pods.into_iter().filter(|pod| pod["status"]["phase"] == "Running").collect()
}

fn addresses(pods: &[Value]) -> Vec<String> {
    pods.iter().map(|pod| pod["status"]["podIP"].as_str().unwrap_or_default().to_owned()).collect()
}

fn restart(bed: &Bed, name: &str) {
    for program in ["kubelet", "containerd", "kube-proxy"] {
        node::program(bed, name, program).unwrap().stop().unwrap();
    }
    node::start_programs(bed, bed.node(name).unwrap()).unwrap();
}

fn wait_ready(bed: &Bed, name: &str) {
    bed.kubectl(&["wait", "--for=condition=Ready", "--timeout=90s", &format!("node/{name}")]).unwrap();
    bed.kubectl(&["wait", "--for=condition=Ready", "--timeout=90s", "-n", NAMESPACE, "pods", "--all"])
        .unwrap();
}

/// Waits until nothing is lost for a while. What a kubelet, kube-proxy and Felix that have just started still owe is seen by traffic only:
/// the API server's word on pods and endpoints is from before the reboot, and rules are written anew with each of them.
fn wait_for_traffic(bed: &Bed) {
    run::wait_for("nothing is lost for two seconds", Duration::from_mins(2), || {
        let prober = Prober::start(bed.site()?, patient())?;
        std::thread::sleep(Duration::from_secs(2));
        let flows = prober.stop()?.flows;
        Ok(flows.iter().all(|flow| flow.figures.sent > 0 && flow.figures.lost == 0))
    })
    .unwrap();
}

#[test]
fn a_lone_full_node_that_forbids_evictions_is_migrated_and_its_pods_live_on() {
    let shape = Shape { nodes: NodeShape::numbered(1), ..Shape::default() };
    let scratch = Scratch::up("m-lone", shape, TESTBED).unwrap();
    let bed = &scratch.bed;
    bed.load_project_images().unwrap();
    forbid_evictions(bed);
    let outcome = migrate(bed, 40);
    assert!(outcome.kept() && outcome.changed_pods.is_empty(), "{}", outcome.table());
    assert!(outcome.pods >= 40, "{} pods", outcome.pods);
    let adopted = addresses(&running(bed));

    // Addresses of adopted pods aren't given to others, and are free once their pods are gone.
    bed.kubectl(&["create", "deployment", "more", "-n", NAMESPACE, "--replicas=20", "--image", IMAGE])
        .unwrap();
    bed.kubectl(&["rollout", "status", "deployment/more", "-n", NAMESPACE, "--timeout=120s"]).unwrap();
    let all = addresses(&running(bed));
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "an address is in use twice: {all:?}");
    assert!(all.len() >= adopted.len() + 20, "{} of {} + 20", all.len(), adopted.len());
    bed.kubectl(&["delete", "deployment", "filler-n1", "more", "-n", NAMESPACE, "--cascade=foreground"])
        .unwrap();
    let left: BTreeSet<String> = addresses(&running(bed)).into_iter().collect();
    let gone = adopted.iter().find(|address| !left.contains(*address)).expect("an adopted pod was deleted");
    run::wait_for("a deleted pod's address is free", Duration::from_secs(30), || {
        Ok(migration::calicoctl(bed, &["ipam", "show", &format!("--ip={gone}")])?.contains("not assigned"))
    })
    .unwrap();
    expect_migrated(bed);

    // What the kernel has learned in ten minutes is forgotten in a moment.
    let before = pods::identities(bed).unwrap();
    bed.exec("n1", &["ip", "neigh", "flush", "all"]).unwrap();
    let forget = "for n in /run/netns/*; do nsenter --net=$n ip neigh flush all nud all; done";
    bed.exec("n1", &["sh", "-c", forget]).unwrap();
    expect_traffic(bed, "with nothing learned");
    restart(bed, "n1");
    wait_ready(bed, "n1");
    expect_traffic(bed, "after a restart of kubelet and containerd");
    assert_eq!(pods::differences(&before, &pods::identities(bed).unwrap()), Vec::<String>::new());
    bed.reboot("n1").unwrap();
    wait_ready(bed, "n1");
    wait_for_traffic(bed);
    // It ends while it can't reach the API server, and the kubelet waits longer before each further start.
    let rollout = ["-n", "kube-system", "rollout", "status", "deployment/calico-kube-controllers"];
    bed.kubectl(&[&rollout[..], &["--timeout=180s"]].concat()).unwrap();
    expect_migrated(bed);
}
