//! What each combination goes through: migrated in place under traffic, one node rolled back in between, and checked.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Combination, Row};
use crate::{
    bed::Bed,
    migration::{self, LEASE_LABEL, PAUSE_LABEL, Request, STATE_LABEL},
    probe::workload::IMAGE,
    run as process,
    scratch::Scratch,
};

/// The administrator's wish for one node.
const REQUEST: &str = "flannel-migration/request";

/// The node that waits until the other has been there and back.
const LAST: &str = "n1";
/// The node that is rolled back.
const BACK: &str = "n2";

/// What was seen of one combination.
#[derive(Debug)]
pub struct Outcome {
    /// The migration and its traffic, the rollback included.
    pub migration: migration::Outcome,
    /// What else should not have been, a line each: what the node that went back still had of Calico's, nodes that needed more
    /// than one attempt, closed pods that answer.
    pub others: Vec<String>,
}

impl Outcome {
    /// Everything that was broken, a line each.
    #[must_use]
    pub fn broken(&self) -> Vec<String> {
        let migration = &self.migration;
        [&migration.losses, &migration.problems, &self.others].into_iter().flatten().cloned().collect()
    }
}

/// Brings the combination's cluster up and takes it through everything.
pub fn run(combination: &Combination, testbed: &Path) -> Result<Outcome> {
    let testbed = testbed.to_str().context("the test bed's path is no text")?;
    let scratch = Scratch::up("m-versions", combination.shape.clone(), testbed)?;
    let bed = &scratch.bed;
    bed.load_project_images()?;
    close_pods(bed)?;
    bed.kubectl(&["label", "node", LAST, &format!("{PAUSE_LABEL}=true")])?;
    let request = Request {
        strategy: "in-place",
        max_unavailable: "1",
        pods_per_node: None,
        interval: Duration::from_millis(20),
        limit: Duration::from_mins(5),
    };
    std::thread::scope(|scope| {
        let detour = scope.spawn(|| there_and_back(bed));
        let migration = migration::run(bed, &request, |line| eprintln!("matrix: {line}"));
        let detour = detour.join().unwrap_or_else(|_| bail!("the rollback's thread ended"));
        // What went wrong in the rollback explains why the Job didn't end.
        let mut others = detour?;
        let migration = migration?;
        others.extend(open_pods(bed)?);
        Ok(Outcome { migration, others })
    })
}

/// The row that a run of the combination makes, also of one that failed.
pub fn row(combination: &Combination, testbed: &Path) -> Row {
    let outcome = run(combination, testbed);
    let mut row = Row::of(combination);
    match outcome {
        Ok(outcome) => {
            eprintln!("{}", outcome.migration.table());
            row.measured(&outcome);
        }
        Err(error) => row.result = format!("failed: {}", one_line(&format!("{error:#}"))),
    }
    row
}

/// The first node is migrated, rolled back and looked at; then both go on to the end.
fn there_and_back(bed: &Bed) -> Result<Vec<String>> {
    wait_rest(bed, BACK, "calico", Duration::from_mins(4))?;
    let mut wrong = failures(bed)?;
    bed.kubectl(&["annotate", "node", BACK, &format!("{REQUEST}=rollback")])?;
    wait_rest(bed, BACK, "flannel", Duration::from_mins(2))?;
    wrong.extend(left_of_calico(bed, BACK)?);
    bed.kubectl(&["annotate", "node", BACK, &format!("{REQUEST}-")])?;
    bed.kubectl(&["label", "node", LAST, &format!("{PAUSE_LABEL}-")])?;
    Ok(wrong)
}

/// The namespace of pods that policies close, as most charts bring them, and that flannel has left open so far.
const CLOSED: &str = "closed";

/// A pod on each node under the usual pair of policies: everything denied, and DNS allowed. Its probes, forbidden once Calico is
/// there, must not keep a node from being migrated at the first attempt.
fn close_pods(bed: &Bed) -> Result<()> {
    let policy = |name: &str, spec: Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "name": name, "namespace": CLOSED }, "spec": spec,
        })
    };
    let dns = json!([{ "ports": [{ "protocol": "UDP", "port": 53 }, { "protocol": "TCP", "port": 53 }] }]);
    bed.apply(&[
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": CLOSED } }),
        policy("default-deny", json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"] })),
        policy("allow-dns", json!({ "podSelector": {}, "policyTypes": ["Egress"], "egress": dns })),
        json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": CLOSED, "namespace": CLOSED },
            "spec": {
                "selector": { "matchLabels": { "app": CLOSED } },
                "template": {
                    "metadata": { "labels": { "app": CLOSED } },
                    "spec": {
                        "terminationGracePeriodSeconds": 1,
                        "containers": [{ "name": CLOSED, "image": IMAGE, "imagePullPolicy": "IfNotPresent" }],
                    },
                },
            },
        }),
    ])?;
    bed.kubectl(&["-n", CLOSED, "rollout", "status", "daemonset", CLOSED, "--timeout=60s"]).map(drop)
}

/// Pods that still answer another node although a policy closes them.
fn open_pods(bed: &Bed) -> Result<Vec<String>> {
    let pods = bed.get(&["-n", CLOSED, "pods"])?;
    let mut open = Vec::new();
    for pod in pods.pointer("/items").and_then(Value::as_array).into_iter().flatten() {
        let text = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (node, address) = (text("/spec/nodeName"), text("/status/podIP"));
        let other = if node == LAST { BACK } else { LAST };
        if bed.exec(other, &["ping", "-c1", "-W1", "-q", address]).is_ok() {
            open.push(format!("the closed pod {address} on {node} answers {other}"));
        }
    }
    Ok(open)
}

/// Nodes that were given back or reverted before they were migrated, and why.
fn failures(bed: &Bed) -> Result<Vec<String>> {
    let nodes = bed.get(&["nodes"])?;
    let items = nodes.pointer("/items").and_then(Value::as_array).cloned().unwrap_or_default();
    let failed = |node: &Value| {
        let failures = node.pointer("/metadata/annotations")?.get("flannel-migration/failures")?;
        let name = node.pointer("/metadata/name")?.as_str()?;
        Some(format!("{name} wasn't migrated at the first attempt: {failures}"))
    };
    Ok(items.iter().filter_map(failed).collect())
}

fn wait_rest(bed: &Bed, node: &str, state: &str, limit: Duration) -> Result<()> {
    process::wait_for(&format!("{node} is at rest on {state}"), limit, || {
        let now = bed.get(&["node", node])?;
        let label = |key: &str| {
            now.pointer("/metadata/labels").and_then(|labels| labels.get(key)).and_then(Value::as_str)
        };
        Ok(label(STATE_LABEL) == Some(state) && label(LEASE_LABEL).is_none())
    })
}

/// Tables, chains, sets and links of Calico's on a node that is flannel's again. In Canal, Felix runs there all the time.
fn left_of_calico(bed: &Bed, node: &str) -> Result<Vec<String>> {
    if bed.shape.layout == crate::shape::Layout::Canal {
        return Ok(Vec::new());
    }
    let look = "nft list tables; \
                for save in iptables-nft-save iptables-legacy-save ip6tables-nft-save ip6tables-legacy-save; do \
                    $save 2>/dev/null || true; done; \
                ipset list -n; ip -o link; ls /etc/cni/net.d";
    let found = bed.shell(node, look)?;
    let of_calico =
        |line: &&str| line.contains("calico") || line.contains("cali-") || line.contains("cali40");
    Ok(found
        .lines()
        .filter(of_calico)
        .map(|line| format!("{node} after its rollback: {}", line.trim()))
        .collect())
}

fn one_line(text: &str) -> String {
    let text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.chars().take(400).collect()
}
