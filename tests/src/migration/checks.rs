//! What must be true after a migration. Each check returns what isn't, a line per finding.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{NETWORK_LABEL, calicoctl};
use crate::{bed::Bed, run};

/// Every node Ready, schedulable as `cordoned` says, without labels of the migration, and conditioned as migrated.
pub fn nodes(bed: &Bed, cordoned: &[String]) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for node in items(&bed.get(&["nodes"])?) {
        let name = text(&node, "/metadata/name");
        for (kind, wanted) in
            [("Ready", "True"), ("NetworkMigrated", "True"), ("NetworkUnavailable", "False")]
        {
            let status = condition(&node, kind);
            if status.as_deref() != Some(wanted) {
                wrong.push(format!("{name}: condition {kind} is {status:?}, not {wanted}"));
            }
        }
        let unschedulable = node.pointer("/spec/unschedulable") == Some(&json!(true));
        if unschedulable != cordoned.contains(&name) {
            wrong.push(format!("{name}: unschedulable is {unschedulable}, which it wasn't before"));
        }
        for taint in node.pointer("/spec/taints").and_then(Value::as_array).into_iter().flatten() {
            if text(taint, "/key").starts_with("flannel") {
                wrong.push(format!("{name}: still tainted: {taint}"));
            }
        }
        for part in ["labels", "annotations"] {
            for (key, _) in
                node.pointer(&format!("/metadata/{part}")).and_then(Value::as_object).into_iter().flatten()
            {
                if key == NETWORK_LABEL || key.starts_with("flannel") {
                    wrong.push(format!("{name}: {part} still hold {key}"));
                }
            }
        }
    }
    Ok(wrong)
}

/// Every pod Ready, with an address inside its node's podCIDR unless it is on the node's own network.
pub fn pods(bed: &Bed) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let nodes = items(&bed.get(&["nodes"])?);
    for pod in items(&bed.get(&["pods", "--all-namespaces"])?) {
        let name = format!("{}/{}", text(&pod, "/metadata/namespace"), text(&pod, "/metadata/name"));
        if text(&pod, "/status/phase") == "Succeeded" {
            continue;
        }
        if condition(&pod, "Ready").as_deref() != Some("True") {
            wrong.push(format!("pod {name} isn't Ready"));
        }
        if pod.pointer("/spec/hostNetwork") == Some(&json!(true)) {
            continue;
        }
        let node = nodes.iter().find(|node| text(node, "/metadata/name") == text(&pod, "/spec/nodeName"));
        let cidrs = node.and_then(|node| node.pointer("/spec/podCIDRs")?.as_array());
        let cidrs: Vec<&str> = cidrs.into_iter().flatten().filter_map(Value::as_str).collect();
        let addresses = super::pods::addresses(&pod);
        if addresses.len() != cidrs.len() {
            wrong
                .push(format!("pod {name} has the addresses {addresses:?}, its node the networks {cidrs:?}"));
        }
        for address in addresses {
            let contains = |cidr: &&str| contains(cidr, address);
            let known: Option<Vec<bool>> = cidrs.iter().map(contains).collect();
            let inside = known.with_context(|| format!("{name}: {cidrs:?}, {address:?}"))?.contains(&true);
            if !inside {
                wrong.push(format!("pod {name} has {address}, outside its node's {cidrs:?}"));
            }
        }
    }
    Ok(wrong)
}

/// `calicoctl ipam check` finds nothing.
///
/// But for the addresses of VXLAN devices for IPv6: it asks nodes for those of IPv4 only (`checkIPAM` in calicoctl v3.28), and so takes
/// the others for leaked.
pub fn ipam(bed: &Bed) -> Result<Vec<String>> {
    let report = calicoctl(bed, &["ipam", "check", "--show-problem-ips"])?;
    let device = |line: &&str| line.contains(" leaked; ") && line.contains("vxlan-v6-tunnel-addr-");
    let devices = report.lines().filter(device).count();
    let clean = report.contains(&format!("Check complete; found {devices} problems."));
    Ok(if clean { Vec::new() } else { vec![format!("calicoctl ipam check:\n{report}")] })
}

/// Nothing of flannel's is on the nodes: no device, rule, table, configuration, process.
pub fn leftovers(bed: &Bed) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for node in &bed.nodes {
        let name = &node.shape.name;
        let mut find = |what: &str, command: &str, is_left: &dyn Fn(&str) -> bool| -> Result<()> {
            let output = bed.shell(name, command)?;
            for line in output.lines().filter(|line| is_left(line)) {
                wrong.push(format!("{name}: {what}: {}", line.trim()));
            }
            Ok(())
        };
        find("link", "ip -o link", &|line| line.contains(": flannel") || line.contains(": cni0"))?;
        find("route", "ip route; ip -6 route", &|line| line.contains("flannel") || line.contains("cni0"))?;
        find("policy rule", "ip rule; ip -6 rule", &|line| {
            !["local", "main", "default"]
                .iter()
                .any(|table| line.trim_end().ends_with(&format!("lookup {table}")))
        })?;
        let rules = "for save in iptables-nft-save iptables-legacy-save ip6tables-nft-save ip6tables-legacy-save; do \
                     $save 2>/dev/null || true; done; nft list ruleset";
        find("rule", rules, &|line| line.to_lowercase().contains("flannel"))?;
        find("CNI file", "ls /etc/cni/net.d", &|line| {
            !["10-calico.conflist", "calico-kubeconfig", "cni.lock"].contains(&line)
        })?;
        let files = "ls -d /run/flannel /var/lib/cni/flannel /var/lib/cni/networks/cbr0 /var/lib/cni/results/cbr0-* \
                     2>/dev/null || true";
        find("file", files, &|_| true)?;
        let netns = bed.plan.netns(name);
        find("process", &format!("ip netns pids {netns} | xargs -r ps -o args= -p || true"), &|line| {
            line.split(' ').next().is_some_and(|program| program.ends_with("flanneld"))
        })?;
    }
    Ok(wrong)
}

/// flannel's objects are gone from the API.
pub fn objects(bed: &Bed) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for kind in
        ["daemonsets", "configmaps", "serviceaccounts", "clusterroles", "clusterrolebindings", "namespaces"]
    {
        for object in items(&bed.get(&[kind, "--all-namespaces"])?) {
            let name = text(&object, "/metadata/name");
            let terminating = object.pointer("/metadata/deletionTimestamp").is_some();
            // Our own are the user's to delete.
            if name.contains("flannel") && !name.starts_with("flannel-migration") && !terminating {
                wrong.push(format!("{kind} {name} is still there"));
            }
        }
    }
    Ok(wrong)
}

/// A `NetworkPolicy` that denies all is enforced for a pod on every node, and lets go again.
pub fn policies(bed: &Bed) -> Result<Vec<String>> {
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "name": "deny", "namespace": "probe" },
        "spec": { "podSelector": {}, "policyTypes": ["Ingress"] },
    });
    let pods = items(&bed.get(&["-n", "probe", "pods"])?);
    // From another node's host: from its own, traffic to a pod is never denied.
    let pairs: Vec<(String, String, String)> = bed
        .nodes
        .iter()
        .filter_map(|node| {
            let name = &node.shape.name;
            let pod = pods.iter().find(|pod| text(pod, "/spec/nodeName") == *name)?;
            let other = bed.nodes.iter().find(|other| *other != node).unwrap_or(node);
            let pair = |address: &str| (other.shape.name.clone(), name.clone(), address.to_owned());
            Some(super::pods::addresses(pod).into_iter().map(pair))
        })
        .flatten()
        .filter(|(from, node, _)| from != node)
        .collect();
    let answers = |from: &str, address: &str| bed.exec(from, &["ping", "-c1", "-W1", "-q", address]).is_ok();
    let mut wrong = Vec::new();
    let mut expect = |answered: bool, when: &str| {
        for (from, node, address) in &pairs {
            let what = format!("pod {address} on {node} {when}");
            let as_expected =
                run::wait_for(&what, Duration::from_secs(20), || Ok(answers(from, address) == answered));
            if as_expected.is_err() {
                wrong.push(format!("NetworkPolicy: {what}: not so after 20 s"));
            }
        }
    };
    expect(true, "answers without a policy");
    bed.apply(std::slice::from_ref(&policy))?;
    expect(false, "is silent under a policy that denies all");
    bed.kubectl(&["-n", "probe", "delete", "networkpolicy", "deny"])?;
    expect(true, "answers after the policy went");
    Ok(wrong)
}

pub(super) fn items(list: &Value) -> Vec<Value> {
    list.get("items").and_then(Value::as_array).cloned().unwrap_or_default()
}

fn text(object: &Value, pointer: &str) -> String {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn condition(object: &Value, kind: &str) -> Option<String> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    let condition = conditions.iter().find(|condition| condition.get("type") == Some(&json!(kind)))?;
    Some(text(condition, "/status"))
}

fn contains(cidr: &str, address: &str) -> Option<bool> {
    let cidr: ipnet::IpNet = cidr.parse().ok()?;
    let address: std::net::IpAddr = address.parse().ok()?;
    Some(cidr.contains(&address))
}
