//! Clusters of other shapes than flannel's stock manifest gives, migrated under traffic, and what a migration leaves behind.
//!
//! Every test here needs root and brings real clusters up; run them one after another (`hack/test` does).

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of it is tests"
)]

use std::{
    collections::BTreeSet,
    io::Read as _,
    process::{Child, Stdio},
    time::Duration,
};

use flannel_migration_tests::{
    bed::Bed,
    migration::{self, Outcome, PAUSE_LABEL, Request, footprint},
    probe::workload::IMAGE,
    run,
    scratch::Scratch,
    shape::{Layout, NodeShape, Rules, Shape},
};
use serde_json::{Value, json};

const TESTBED: &str = env!("CARGO_BIN_EXE_testbed");

fn migrate(bed: &Bed, strategy: &str) -> Outcome {
    bed.load_project_images().unwrap();
    let request = Request {
        strategy,
        max_unavailable: "1",
        pods_per_node: None,
        interval: Duration::from_millis(20),
        limit: Duration::from_mins(6),
    };
    let outcome = migration::run(bed, &request, |line| eprintln!("{line}")).unwrap();
    eprintln!("{}", outcome.table());
    outcome
}

/// In place, a probe in flight at the moment a port moves may be lost; a connection may not.
fn expect_in_place(outcome: &Outcome) {
    assert!(outcome.problems.is_empty(), "{}", outcome.table());
    assert!(outcome.changed_pods.is_empty(), "{}", outcome.table());
    for flow in &outcome.traffic.flows {
        assert!(flow.figures.lost <= 3, "{flow:?}\n{}", outcome.table());
    }
}

/// How a migrated cluster may differ from one that never had flannel: part of the line, and why it is so.
const EXPLAINED: &[(&str, &str)] = &[
    (
        "annotations projectcalico.org/metadata",
        "Calico's client notes there what it read; these objects are written as they are",
    ),
    (
        "labels projectcalico.org/affinity-type",
        "Calico from v3.31 looks for them; v3.28's own objects have none",
    ),
    ("labels projectcalico.org/hostname-hash", "as above"),
    ("labels projectcalico.org/ip-version", "as above"),
    ("spec.clusterType = k8s,", "the order in which Calico's programs came"),
    ("veth_mtu = ", "pods keep flannel's MTU"),
    ("conflist \"mtu\": ", "as above"),
    (
        "DaemonSet.apps spec.template.spec.containers[].env[].value = ",
        "how the other cluster was given the same network",
    ),
    ("spec.vxlanMTU = ", "flannel's overlay goes on with its MTU"),
    ("spec.vxlanPort = ", "flannel's overlay goes on with its port"),
    ("spec.vxlanVNI = ", "flannel's overlay goes on with its network identifier"),
    ("IPAMConfig.crd.projectcalico.org", "Calico makes it when it gives out its first address by itself"),
    (
        "annotations projectcalico.org/VXLANTunnelMACAddr",
        "flannel's VXLAN device goes on with its hardware address",
    ),
    ("condition NetworkMigrated Migrated", "says since when; kept on purpose, for those who wait for it"),
    ("file /var/lib/cni/results/k8s-pod-network-", "made with a pod; adopted pods were made by flannel"),
    ("file /var/log/calico/cni/cni.log", "made with the first pod"),
    ("file /run/systemd", "where the agent finds journald; test beds have none, and get an empty directory"),
    (
        "iptables-legacy *",
        "the kernel's own, empty tables, which stay until a reboot once any rule was in them",
    ),
    (
        "link cali<pod>: ",
        "adopted pods know their gateway by the bridge's hardware address, and keep the queues of their links",
    ),
];

#[test]
fn a_cluster_like_rke2s_is_migrated_and_then_like_one_that_never_had_flannel() {
    let shape = Shape {
        nodes: vec![NodeShape { control_plane: true, ..NodeShape::worker("n1") }, NodeShape::worker("n2")],
        pod_cidr: "10.42.0.0/16".parse().unwrap(),
        node_prefix: 25,
        vni: 4096,
        port: 4789,
        layout: Layout::Older,
        rules: Rules::Legacy,
        ..Shape::default()
    };
    let never = Shape { layout: Layout::Calico, rules: Rules::Iptables, ..shape.clone() };
    let migrated = {
        let scratch = Scratch::up("t-rke", shape, TESTBED).unwrap();
        expect_in_place(&migrate(&scratch.bed, "in-place"));
        migration::delete(&scratch.bed).unwrap();
        footprint::settled(&scratch.bed).unwrap()
    };
    let never = {
        let scratch = Scratch::up("t-never", never, TESTBED).unwrap();
        scratch.bed.load_echo().unwrap();
        migration::workloads(&scratch.bed, None).unwrap();
        let rollout = ["-n", "kube-system", "rollout", "status", "deployment/calico-kube-controllers"];
        scratch.bed.kubectl(&[&rollout[..], &["--timeout=120s"]].concat()).unwrap();
        footprint::settled(&scratch.bed).unwrap()
    };
    let differences: BTreeSet<String> = never.symmetric_difference(&migrated).cloned().collect();
    let (explained, not): (Vec<&String>, Vec<&String>) =
        differences.iter().partition(|line| EXPLAINED.iter().any(|(part, _)| line.contains(part)));
    let side =
        |line: &&String| if migrated.contains(*line) { format!("+ {line}") } else { format!("- {line}") };
    eprintln!("explained:\n{}", explained.iter().map(side).collect::<Vec<_>>().join("\n"));
    assert!(not.is_empty(), "not explained:\n{}", not.iter().map(side).collect::<Vec<_>>().join("\n"));
    for (part, why) in EXPLAINED {
        assert!(explained.iter().any(|line| line.contains(part)), "no difference {part:?} ({why}) any more");
    }
}

/// Rules as flannel wrote them until v0.19, which no chain and no comment tells.
const BARE_RULES: &str = "iptables -t nat -A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN; \
    iptables -t nat -A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully; \
    iptables -t nat -A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE --random-fully; \
    iptables -A FORWARD -s 10.244.0.0/16 -j ACCEPT; iptables -A FORWARD -d 10.244.0.0/16 -j ACCEPT";

#[test]
#[ignore = "takes three minutes; hack/faults runs it"]
fn small_nodes_with_nftables_and_bare_rules_are_drained_while_one_node_joins_and_another_leaves() {
    let shape = Shape { node_prefix: 26, rules: Rules::Nftables, ..Shape::default() };
    let mut scratch = Scratch::up("t-small", shape, TESTBED).unwrap();
    for node in ["n1", "n2", "n3"] {
        scratch.bed.exec(node, &["sh", "-c", BARE_RULES]).unwrap();
    }
    let bed = &mut scratch.bed;
    bed.load_project_images().unwrap();
    migration::workloads(bed, None).unwrap();
    bed.apply_calico().unwrap();
    bed.kubectl(&["label", "node", "n2", "n3", &format!("{PAUSE_LABEL}=true")]).unwrap();
    // The coordinator's own node is the last one.
    migration::apply_with(bed, &[("STRATEGY", "drain")], |job| {
        job["spec"]["template"]["spec"]["nodeSelector"]["kubernetes.io/hostname"] = json!("n2");
    })
    .unwrap();
    // One at a time may be in change, so that what comes and goes is in nobody's way.
    run::wait_for("the first node is Calico's", Duration::from_mins(2), || {
        let labels = bed.get(&["node", "n1"])?["metadata"]["labels"].clone();
        Ok(labels[migration::STATE_LABEL] == "calico" && labels[migration::LEASE_LABEL].is_null())
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", migration::coordinator_log(bed).unwrap()));
    bed.add_node(NodeShape::worker("n4")).unwrap();
    bed.load_project_images().unwrap();
    bed.remove_node("n3").unwrap();
    bed.kubectl(&["label", "node", "n2", &format!("{PAUSE_LABEL}-")]).unwrap();
    run::wait_for("the Job completes", Duration::from_mins(4), || match migration::job(bed)? {
        migration::Job::Failed(why) => panic!("{why}\n{}", migration::coordinator_log(bed).unwrap()),
        job => Ok(job == migration::Job::Complete),
    })
    .unwrap_or_else(|error| panic!("{error}\n{}", migration::coordinator_log(bed).unwrap()));
    run::wait_for("pods are Ready", Duration::from_mins(1), || Ok(migration::checks::pods(bed)?.is_empty()))
        .ok();
    let mut wrong = Vec::new();
    for found in [
        migration::checks::nodes(bed, &[]),
        migration::checks::pods(bed),
        migration::checks::ipam(bed),
        migration::checks::leftovers(bed),
        migration::checks::objects(bed),
        migration::checks::policies(bed),
    ] {
        wrong.extend(found.unwrap());
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for node in &bed.nodes {
        let rules = bed.exec(&node.shape.name, &["iptables-save"]).unwrap();
        let bare = |line: &&str| {
            line.contains("10.244.0.0/16") && !line.contains("cali:") && !line.contains("KUBE-")
        };
        let left: Vec<&str> = rules.lines().filter(bare).collect();
        assert!(left.is_empty(), "{}: {}", node.shape.name, left.join("\n"));
    }
}

fn two_of_both_families() -> Shape {
    Shape { nodes: NodeShape::numbered(2), dual_stack: true, ..Shape::default() }
}

/// Every flow by IPv4 has its twin by IPv6, and none of either lost anything.
fn expect_nothing_lost_in_either_family(outcome: &Outcome) {
    expect_in_place(outcome);
    let kinds = &outcome.traffic.kinds;
    assert_eq!(kinds.len(), 18, "{}", outcome.table());
    for kind in kinds {
        assert!(kind.figures.sent > 0, "{kind:?}\n{}", outcome.table());
    }
    assert_eq!(outcome.traffic.lost(), 0, "{}", outcome.table());
}

#[test]
fn a_cluster_of_both_families_is_migrated_in_place_and_its_policies_are_enforced() {
    let scratch = Scratch::up("t-dual", two_of_both_families(), TESTBED).unwrap();
    let bed = &scratch.bed;
    let outcome = migrate(bed, "in-place");
    expect_nothing_lost_in_either_family(&outcome);
    let pools = bed.get(&["ippools.crd.projectcalico.org"]).unwrap();
    assert_eq!(pools["items"].as_array().unwrap().len(), 2, "{pools}");
    // A pod that Calico makes has addresses of both families, and is reached by both.
    bed.kubectl(&["-n", "probe", "rollout", "restart", "daemonset/echo2"]).unwrap();
    bed.kubectl(&["-n", "probe", "rollout", "status", "daemonset/echo2", "--timeout=90s"]).unwrap();
    let wrong =
        [migration::checks::pods(bed), migration::checks::ipam(bed), migration::checks::policies(bed)];
    let wrong: Vec<String> = wrong.into_iter().flat_map(Result::unwrap).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
#[ignore = "takes two minutes; hack/faults runs it"]
fn a_cluster_of_both_families_is_migrated_by_drain() {
    let scratch = Scratch::up("t-dual-drain", two_of_both_families(), TESTBED).unwrap();
    let outcome = migrate(&scratch.bed, "drain");
    assert!(outcome.kept(), "{}", outcome.table());
}

/// A pod on each node that a policy closes against everybody.
const SHUT: &str = "shut";

fn shut_pods(bed: &Bed) -> Vec<(String, String)> {
    bed.apply(&[
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": SHUT } }),
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "name": "nobody", "namespace": SHUT },
            "spec": { "podSelector": {}, "policyTypes": ["Ingress"] },
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": SHUT, "namespace": SHUT },
            "spec": {
                "selector": { "matchLabels": { "app": SHUT } },
                "template": {
                    "metadata": { "labels": { "app": SHUT } },
                    "spec": {
                        "terminationGracePeriodSeconds": 1,
                        "containers": [{ "name": SHUT, "image": IMAGE, "imagePullPolicy": "IfNotPresent" }],
                    },
                },
            },
        }),
    ])
    .unwrap();
    bed.kubectl(&["-n", SHUT, "rollout", "status", "daemonset", SHUT, "--timeout=60s"]).unwrap();
    let pods = bed.get(&["-n", SHUT, "pods"]).unwrap();
    let text = |pod: &Value, pointer: &str| pod.pointer(pointer).unwrap().as_str().unwrap().to_owned();
    let found = pods["items"].as_array().unwrap().iter();
    found.map(|pod| (text(pod, "/spec/nodeName"), text(pod, "/status/podIP"))).collect()
}

/// Sends a packet every 50 ms from `node` until it is told to stop.
struct Knocking(Child);

impl Knocking {
    fn begin(bed: &Bed, node: &str, address: &str) -> Self {
        let mut command = bed.exec_command(node, &["ping", "-i", "0.05", "-q", address]).unwrap();
        Self(command.stdout(Stdio::piped()).spawn().unwrap())
    }

    /// How many were sent and answered.
    fn end(mut self) -> (u32, u32) {
        run::output(&mut run::command("kill", &["-INT", &self.0.id().to_string()])).unwrap();
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let summary = text.lines().find(|line| line.contains("packets transmitted")).expect("a summary");
        let number = |part: usize| summary.split(", ").nth(part)?.split(' ').next()?.parse().ok();
        (number(0).expect("sent"), number(1).expect("answered"))
    }
}

impl Drop for Knocking {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn canal_is_migrated_in_place_and_its_policies_are_enforced_all_the_time() {
    let shape = Shape { nodes: NodeShape::numbered(2), layout: Layout::Canal, ..Shape::default() };
    let scratch = Scratch::up("t-canal-mig", shape, TESTBED).unwrap();
    let bed = &scratch.bed;
    bed.load_echo().unwrap();
    let shut = shut_pods(bed);
    let knocking: Vec<_> = shut
        .iter()
        .map(|(node, address)| Knocking::begin(bed, if node == "n1" { "n2" } else { "n1" }, address))
        .collect();
    let outcome = migrate(bed, "in-place");
    for (knocking, (node, _)) in knocking.into_iter().zip(&shut) {
        let (sent, answered) = knocking.end();
        assert!(sent > 200, "{sent}");
        assert_eq!(answered, 0, "of {sent} packets to the closed pod on {node}");
    }
    expect_in_place(&outcome);
    let felix = bed.get(&["felixconfigurations.crd.projectcalico.org"]).unwrap();
    assert_eq!(felix["items"].as_array().unwrap().len(), 1, "{felix}");
}
